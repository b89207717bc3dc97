"""The same as `ldm upscale`; see `python scripts/upscale.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
