"""File formats of weights: safetensors and pickles, read without running anything in them."""
