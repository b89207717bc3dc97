"""What a model listens to: each encoder turns one entry of a batch into one part of `Cond`.

Third-party packages that bring data or weights' layouts (open_clip, transformers, timm) are
fenced in here. Nothing in this folder downloads anything, and all of it builds on the meta device.
"""
