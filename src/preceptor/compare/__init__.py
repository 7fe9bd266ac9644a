"""Comparison of the base and the tuned model: alignment tax, distribution shift, weight averaging."""
