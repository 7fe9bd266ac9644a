"""Files -> examples -> trees -> packed sequences. Plain values, no torch."""
