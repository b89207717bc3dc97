"""Run folders: resume states, exported weights, initial weights."""
