"""Programs: one module each, with `main(argv)` that returns the exit code."""
