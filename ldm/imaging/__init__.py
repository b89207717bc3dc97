"""Images: tensors to pixels and back, files and their metadata, watermarks, output folders."""
