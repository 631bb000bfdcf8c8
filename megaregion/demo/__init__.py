"""Demo scenes: photo cut-outs and rendered words on photo backgrounds, with everything in them known.

assets    cut-outs and backgrounds, and which part of the demo each belongs to
words     the words, and pictures of them
scenes    scenes by number: what lies where, and what of it is visible
folder    a folder of scenes, written in parallel
"""
