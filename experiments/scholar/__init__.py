"""Generators of the scholar: facts, texts, questions, tasks, tokenizer. The package needs only their output."""
