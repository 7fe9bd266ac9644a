"""How the scholar was made: facts, texts, questions, tasks, tokenizer. The package needs only what it ships."""
