"""Finds a run's images in folders and tars, and reads them and what came with them."""
