"""What a source names, and how its rows become records: files and data sets in every format."""
