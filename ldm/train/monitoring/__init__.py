"""Monitoring of a run: logs, samples, validation, evaluation, sanity checks."""
