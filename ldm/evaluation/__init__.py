"""Evaluation: generate images of prompts with several settings, score them, plot the scores."""
