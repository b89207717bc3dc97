"""Training: a loss, an optimizer, and a state that can stop and go on as if nothing had happened."""
