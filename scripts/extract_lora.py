"""The same as `ldm extract-lora`; see `python scripts/extract_lora.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
