"""The same as `ldm merge`; see `python scripts/merge.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
