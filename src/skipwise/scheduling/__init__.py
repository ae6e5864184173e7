"""Which model, which blocks, at which step: what steps are worth, and the search over schedules."""
