"""Evaluation: generate images of prompts with several settings; score, tabulate and plot them."""
