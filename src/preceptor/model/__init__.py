"""Hugging Face causal models: loading, vocabulary, adapters, attention over a forest, the loss."""
