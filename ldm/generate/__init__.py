"""From a command line, a form or a PNG to images on disk."""
