"""Load weights other than a model's own: LoRA, embeddings, MiDaS, Karlo, LPIPS, CLIP and others."""
