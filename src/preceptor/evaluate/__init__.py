"""Evaluation of a model: tasks, generation, likelihood, confidence intervals."""
