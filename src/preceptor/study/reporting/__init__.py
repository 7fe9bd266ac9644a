"""The rooms of the report: what a run's folder holds, what to think of it, its plots, and the page that shows them."""
