"""What a forward pass keeps for backward, and modules that keep less."""
