"""The files through which rooms talk to each other: one module a file, used by its writer and its readers."""
