"""The programs: `ldm COMMAND`, also as `scripts/COMMAND.py` and `ldm-COMMAND`."""
