"""The same as `ldm read-watermark`; see `python scripts/read_watermark.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
