"""Encoders of conditions: each turns one entry of a batch into one slot of `Cond`.

open_clip (for its vocabulary) and timm are imported only here. Nothing is downloaded, and all
encoders can be built on the meta device.
"""
