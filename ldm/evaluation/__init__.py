"""Evaluation: images of prompts by several models and settings, scores, a table and a figure."""
