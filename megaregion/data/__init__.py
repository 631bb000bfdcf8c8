"""Shards, sample order, transforms and batches: from a dataset folder to tensors."""
