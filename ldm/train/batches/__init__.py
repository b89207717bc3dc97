"""Open the data section of a config as batches, with cached latents and contexts."""
