"""Proofs, on the user's own model, that packing and memory saving change nothing."""
