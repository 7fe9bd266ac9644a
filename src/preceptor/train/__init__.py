"""The loop and what it stands on: optimizer, checkpoints, metrics, proofs before the first step."""
