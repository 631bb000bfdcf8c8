"""Numbers that tell whether a run's labels are any good: clusters, texts, and, where it is known, the truth.

Everything is read from the files that the stages left, piece by piece, or from a sample of fixed size, so
that a report of a billion regions fits the memory of one of a thousand.
"""
