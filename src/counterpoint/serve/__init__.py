"""Serve a local page over runs, claims, comparisons, embeddings and detections: `counterpoint serve`.

    places.py      the folders that the page may read; every path is confined to them
    walking.py     runs, embeddings and detections under these folders, found again by the folders' times
    runs.py        a summary of each run, for lists of ten thousand
    guard.py       who may ask, and for what: host, token, origin, sizes, headers
    showing.py     templates, scripts and errors as responses
    run_pages.py   the list of runs, a run, runs side by side
    claim_pages.py claims and comparisons
    space.py       embeddings and encoders in memory: search, and the map
    labels.py      labels of items, given on the map
    space_pages.py search and map
    review.py      detections, and the decisions of a reviewer
    review_pages.py the timeline with its keyboard
    jobs.py        trainings as child processes
    job_pages.py   start, stop and resume a training
    app.py         all of it as one ASGI application; `run` serves it

The server is Starlette on uvicorn. The pages are HTML that Jinja2 renders, with a few small scripts; there is no build step.
Nothing reads a pickle, and nothing is loaded from another host.
"""
