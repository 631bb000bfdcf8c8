"""Comparisons in one run on one machine: ours against honest peers, against stated goals."""
