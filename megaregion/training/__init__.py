"""The training run: step, schedule, checkpoint, metrics and signals."""
