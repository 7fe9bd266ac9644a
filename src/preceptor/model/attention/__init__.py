"""Attention over packed trees: a dense reference and fast paths for CPUs and GPUs."""
