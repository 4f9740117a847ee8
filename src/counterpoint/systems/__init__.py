"""Hold one file per paper, `systems/<area>/<slug>.py`, each with a `SYSTEM` record (`systems.base.System`).

The package is also a function, which lists the systems:

    counterpoint.systems(pattern="*", *, task="", area="", state="", planned=False)

    pattern   a name or a title with wildcards, such as "*clip*"
    task      only systems of this form of data: views, labelled, aligned, bags
    area      only systems of this area, such as "classics"
    state     only systems of this state: done, built, planned
    planned   also list systems that are only planned

It returns records with slug, title, verdict, state, area, task, arxiv and claim (see `counterpoint.face.listing.systems`).
"""

import sys

import counterpoint

sys.modules[__name__].__class__ = counterpoint.Room  # callable like a function
