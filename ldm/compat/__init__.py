"""The modules of the original code base, for third-party code that imports them.

Modules of this package are imported by the names in `names.MODULES`, such as
`ldm.modules.attention` or `ldm.util`. Nothing else in `ldm` imports them, and `ldm.load` does not
use their classes. They have no `__all__`, so that `from … import *` imports all names.
"""
