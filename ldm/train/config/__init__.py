"""Settings of a run: YAML, Lightning's names and command line overrides -> typed settings."""
