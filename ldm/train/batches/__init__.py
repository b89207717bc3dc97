"""From the data section of a config to batches, with cached latents and contexts."""
