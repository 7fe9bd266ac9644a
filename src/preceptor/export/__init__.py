"""A trained model for other programs: folders, GGUF, Ollama, the Hub; each proved to read what was trained."""
