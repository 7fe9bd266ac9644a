"""What `from preceptor import ...` gives."""
