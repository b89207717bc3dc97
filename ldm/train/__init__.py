"""Training: a loss, an optimizer, and a state that stops and goes on as if nothing happened."""
