"""Weights that extend or accompany a model: LoRA, embeddings, MiDaS, Karlo, LPIPS."""
