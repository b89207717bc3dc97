"""Training data: where samples come from, in which order, and how they are transformed."""
