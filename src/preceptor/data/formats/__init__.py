"""Formats of files and of examples: JSON lines, JSON, CSV, Parquet, Arrow; messages, pairs, ShareGPT, text."""
