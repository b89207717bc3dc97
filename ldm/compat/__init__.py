"""The module names of the original code base, for programs that import it.

Modules of this package are imported by the names in `names.MODULES`, such as
`ldm.modules.attention` or `ldm.util`. Nothing else in `ldm` imports them, and models of `ldm.load`
have none of their classes. They have no `__all__`, so that `from … import *` imports all names.
"""
