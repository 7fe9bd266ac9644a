"""The training loop, optimizer, checkpoints, and proofs before the first step."""
