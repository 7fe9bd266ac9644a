"""A run, or several, watched while they go on."""
