"""What a run shows while it trains: logs, samples, validation, sanity checks."""
