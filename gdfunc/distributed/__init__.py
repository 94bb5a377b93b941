"""Runs on several machines, on torch.distributed under torchrun."""
