"""The module names of the original code base, for programs that import it.

`ldm.modules.attention`, `ldm.util` and the others of `names.MODULES` are files of this package
under their old names. Nothing else in `ldm` imports them, and models of `ldm.load` have none of
their classes.
"""
