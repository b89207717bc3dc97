"""`python -m ldm` is the command `ldm`."""

from ldm.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
