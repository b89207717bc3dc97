"""Basics of all programs: devices, ranks, files, errors, parsing and running commands."""
