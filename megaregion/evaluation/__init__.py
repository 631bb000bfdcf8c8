"""Measure an encoder on scenes whose truth is known, beside honest baselines, and show the result."""
