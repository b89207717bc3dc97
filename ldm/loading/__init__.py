"""Files in, a model out: YAML (`config`), old names (`legacy`), weights (`checkpoint`), which
published family a file belongs to (`families`), and the place where the four meet (`load`).
`folder` reads and writes what diffusers keeps as folders; `convert` leads from each to the others.

Nothing here runs code that a file names: targets are looked up in a table, pickles are read by a
restricted unpickler, and there is no network.
"""
