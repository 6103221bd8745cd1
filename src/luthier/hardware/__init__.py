"""What the machine has: `Device` is the value, `probe` the one place that looks."""
