"""One paper, one file: `systems/<area>/<slug>.py`, each with a `SYSTEM` record (`systems.base.System`)."""
