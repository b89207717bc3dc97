"""Training tasks: each turns a batch into losses."""
