"""What training did to a model: generation, evaluation, and looking at tokens. Knows nothing of training."""
