"""Run folders: states to resume from, exported weights, initial weights."""
