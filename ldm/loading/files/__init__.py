"""File formats of weights: safetensors and pickles, read without executing code in them."""
