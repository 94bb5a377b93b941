"""From a Python function to a body."""
