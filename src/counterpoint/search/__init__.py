"""Write the embeddings of a whole set to a file or a folder of shards, and search them.

A query is a text, an image, a sound or a vector. Several queries are combined.

The package is a function, too (see `counterpoint.face.functions.search`):

    counterpoint.search(run, query, embeddings, *, k=10, modality=None, html=None)

    run          the run that made the embeddings, or its path
    query        words, or the path of an image, a sound or a vector (.npy); the queries of a list are combined; for a run of
                 sequences, names of items
    embeddings   the file or folder that `counterpoint.embed` wrote
    k            number of items
    modality     the modality to search in; default: the first that no query has
    html         a page to write

    rows = embed("runs/first", "emb.parquet")                   # every item in every modality, a Parquet file
    index("emb.parquet")                                        # for large sets: an index for each modality, beside it
    hits = search("runs/first", ["red arrow"], "emb.parquet")   # texts, image files, sound files, vector files
    z = encode("runs/first", images=["a.png", "b.png"])         # only the embeddings, [2, dim]

    transform.py   files, arrays and words -> the tensors that a run's encoders take
    encoder.py     a trained run as a function from items to embeddings
    items.py       the items of a data source, by split and position
    table.py       their table, made batch by batch in bounded memory
    writing.py     `embed`: the table in a file, or in a folder of shards, by this process or by others
    stored.py      such files and folders, read
    nearest.py     exact search, indices, and their recall
    asking.py      `search`: queries, hits

Search is exact, unless `index` has made an index (FAISS's inverted file) of the same content with sufficient recall. It was chosen
by measurement (`benchmarks/search.py`, `benchmarks/indices.py`) among indices of usearch, LanceDB and FAISS.
Exact search of 100,000 rows of width 128 takes milliseconds. An index is useful only from about a million rows on.
"""

from __future__ import annotations

import sys

import counterpoint
from counterpoint.search.asking import search
from counterpoint.search.encoder import Encoder, encode
from counterpoint.search.items import SPLITS
from counterpoint.search.nearest import IndexReport, index, nearest_rows, stored_index
from counterpoint.search.stored import Embeddings, Hit, read_embeddings
from counterpoint.search.writing import embed

__all__ = [
    "SPLITS",
    "Embeddings",
    "Encoder",
    "Hit",
    "IndexReport",
    "embed",
    "encode",
    "index",
    "nearest_rows",
    "read_embeddings",
    "search",
    "stored_index",
]

sys.modules[__name__].__class__ = counterpoint.Room  # `counterpoint.search(...)` is a function, too
