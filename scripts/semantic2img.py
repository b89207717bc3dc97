"""The same as `ldm semantic2img`; see `python scripts/semantic2img.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
