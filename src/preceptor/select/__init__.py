"""Selection of training data by quality and diversity."""
