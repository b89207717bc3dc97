"""The same as `ldm layout2img`; see `python scripts/layout2img.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
