"""megaregion: region-based cluster discrimination, from raw images to a vision encoder.

The rooms, from the top down; a room imports only from rooms below it:

    tools/                                       thin command lines
    evaluation  export  curation  demo           what is made before, and of, a trained encoder
    training                                     the run: step, schedule, checkpoint, signals
    heads                                        class-sharded heads and their streaming loss
    models  data  parallel                       encoder, samples, process groups and engines
    config                                       every setting, and every check between settings
    errors  heap  products                       mistakes a user can mend; freed memory; the matrix library
"""

__version__ = "0.1.0"
