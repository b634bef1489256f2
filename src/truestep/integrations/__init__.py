"""Frameworks that own the training loop: one file each, on the public names only."""
