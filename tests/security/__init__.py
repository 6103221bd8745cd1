"""Files made to harm: each is refused with its own message, and what it would have done is not done."""
