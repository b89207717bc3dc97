"""The same as `ldm inspect-checkpoint`; see `python scripts/inspect_checkpoint.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
