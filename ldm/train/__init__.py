"""Training of models from a config, with states from which a run resumes exactly."""
