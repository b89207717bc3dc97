"""The same as `ldm check-data`; see `python scripts/check_data.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
