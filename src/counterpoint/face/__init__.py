"""Offer the library's public functions, `import counterpoint as cp`, and a trained run as an object.

    functions.py   train, resume, load, own, compare, embed, search
    creating.py    an untrained learner for your own loop
    trained.py     a finished run: metrics, page, encode, evaluate, export, push_to_hub
    finding.py     embeddings of a set and search in them, data by name or as an object
    listing.py     the catalogue, by pattern

No module here imports torch until a function needs it.
"""
