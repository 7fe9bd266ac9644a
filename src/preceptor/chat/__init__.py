"""Chat templates: what a model reads before each turn and what it must generate, proved. No torch here."""
