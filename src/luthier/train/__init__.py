"""Training: the optimizer step, the loop around it, its checkpoints, its events and their display."""
