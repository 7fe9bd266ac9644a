"""Files -> conversations -> trees -> rows: plain values, no torch."""
