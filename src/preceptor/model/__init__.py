"""Hugging Face causal models: loading, the forward pass over packed sequences, the loss, saving."""
