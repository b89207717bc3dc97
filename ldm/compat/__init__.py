"""The module names of the original code base, for programs that import it.

`ldm.modules.attention`, `ldm.util` and the others of `names.MODULES` are modules of this package
under their old names. Nothing else in `ldm` imports them, and models of `ldm.load` have none of
their classes. They have no `__all__`, so that `from … import *` gives programs all names.
"""
