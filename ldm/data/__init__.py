"""Records for training: where they come from, in which order, and what is done to them."""
