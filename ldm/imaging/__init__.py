"""Pictures: tensors to pixels and back, PNG files with their metadata, watermarks, folders."""
