"""The proof: what a template does with each message, and where a turn starts and ends."""
