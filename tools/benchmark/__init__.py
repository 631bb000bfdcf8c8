"""Comparisons in one run on one machine: our parts beside honest peers, or beside stated goals.

A function below ``@part(flags)`` is a part; what parts share is in part, measure, memory, scenes and browser.
"""
