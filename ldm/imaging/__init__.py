"""Images: read and write files with metadata, convert tensors, make masks, add watermarks."""
