"""Demo scenes: photo cut-outs and rendered words on photo backgrounds, with everything in them known."""
