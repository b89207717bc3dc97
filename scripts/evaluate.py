"""The same as `ldm evaluate`; see `python scripts/evaluate.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
