"""Checkpoints: their files, who may write them, and how any topology reads them."""
