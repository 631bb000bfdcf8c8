"""Comparisons in one run on one machine: our parts beside honest peers, or beside stated goals.

A part is a module with ``add_arguments(parser)`` and ``measure(options, device) -> Report``; its
docstring is its ``--help``. What parts share: browser, contestant, measure, memory, report, scenes.
"""
