"""Monitoring of a run: logs, samples, validation, evaluation, check of the initial loss."""
