"""The same as `ldm merge-lora`; see `python scripts/merge_lora.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
