"""What will be done and why: every `auto` of a recipe resolved, each choice a `Decision` with its reason and source."""
