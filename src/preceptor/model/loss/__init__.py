"""The loss over trained tokens, computed in chunks, with its float64 reference."""
