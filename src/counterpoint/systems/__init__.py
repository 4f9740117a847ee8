"""One paper, one file: `systems/<area>/<slug>.py`, each with a `SYSTEM` record (`systems.base.System`).

`counterpoint.systems("*clip*")` lists what there is: see `counterpoint.face.listing.systems`.
"""

import sys

import counterpoint

sys.modules[__name__].__class__ = counterpoint.Room  # it is called like a function, too
