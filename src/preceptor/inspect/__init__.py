"""Views of the data before training: show, check, template."""
