"""Spherical k-means over embeddings, flat or in cells, and the nearest of very many centers."""
