"""Optimizers, learning rate schedules and the EMA of weights."""
