"""The same as `ldm knn2img`; see `python scripts/knn2img.py --help`."""

from ldm.commands.main import main_of_alias

if __name__ == "__main__":
    raise SystemExit(main_of_alias())
