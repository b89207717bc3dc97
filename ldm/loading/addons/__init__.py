"""Files with weights besides a model's: LoRA, embeddings, MiDaS, Karlo, LPIPS, CLIP and others."""
