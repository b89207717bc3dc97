"""Processes of one run: launch, ranks, collectives, signals."""
