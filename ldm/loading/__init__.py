"""Load models: YAML (`config`), weights (`weights`, `files`), old names (`legacy`), published
families (`families`), all of them together (`load`); `addons` are files beside a checkpoint.
`published` and `hub` find and download checkpoints by name.
`diffusers` reads and writes what diffusers keeps as folders; `convert` leads from each to the
others, `report` describes a file.

Nothing here runs code that a file names: targets are looked up in a table, pickles are read by a
restricted unpickler, and only `hub` connects, to fetch what the user names.
"""
