"""File formats and record formats: JSON lines, JSON, CSV, Parquet, Arrow; messages, pairs, ShareGPT, text."""
