"""The backends: each runs a loop forward, on plain tensors."""
