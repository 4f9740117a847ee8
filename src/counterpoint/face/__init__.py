"""What `import counterpoint as cp` offers: train, create, load, compare, embed, search and systems; a trained run as an object.

    functions.py   train, resume, load, own, compare, embed, search
    creating.py    an untrained learner for somebody's own loop
    trained.py     a finished run: metrics, page, encode, evaluate, export, push_to_hub
    finding.py     embeddings of a set and search in them, data by name or as an object
    listing.py     the catalogue, by pattern

Nothing here imports torch until a function needs it.
"""
