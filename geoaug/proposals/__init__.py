"""Region proposals: stored once, read by id."""
