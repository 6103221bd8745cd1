"""Evaluation: held-out loss, tasks, base against tuned."""
