"""The command-line programs: `ldm COMMAND`, also `scripts/COMMAND.py` and `ldm-COMMAND`."""
