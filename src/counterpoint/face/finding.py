"""Resolve data by name or as an object, embed a set with a run, and search the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from counterpoint.data.memory import Own, is_memory, plainly, said, same_again
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import silent
from counterpoint.search.asking import search as find
from counterpoint.search.stored import Embeddings, Hit, read_embeddings
from counterpoint.search.writing import embed as write


def source_of(data: Any) -> tuple[str | None, Own | None]:
    """Return the name of the data, and the holder of the object in memory. Keep the holder while the name is in use."""
    if data is None or isinstance(data, str | Path):
        return data if data is None else str(data), None
    own = Own.of(data)
    return own.spec, own


def held_again(run: Run, data: Any) -> Own | None:
    """Check that `data` is the object that a run was trained on, and return it; None for a run on data by name.

    Raises CounterpointError when the object is missing, or given for data by name; DataError when its contents differ.
    """
    spec = str(run.config.get("data", ""))
    if not is_memory(spec):
        if data is not None:
            raise CounterpointError(f"{run.path} reads its data by name ({spec}); leave data out")
        return None
    if data is None:
        raise CounterpointError(
            f"{run.path} was trained on an object in memory: {said(spec)}. Give the same object again: "
            f'counterpoint.resume("{run.path}", data=OBJECT)'
        )
    return same_again(spec, data)


def embed(
    run: Run, out: Path | str, *, data: Any = None, split: str = "all", device: str = "cpu", quiet: bool = True
) -> Embeddings:
    """Write the embeddings of a set and read them (see `counterpoint.embed`)."""
    with plainly():
        spec, _held = source_of(data)
        write(run, out, data=spec, split=split, device=device, say=silent if quiet else print)
        return read_embeddings(out)


class Hits(list[Hit]):
    """The items that a search found. The repr is a table."""

    def __repr__(self) -> str:
        lines = ["   similarity  item"]
        for hit in self:
            words = " · ".join([*hit.texts.values(), *([hit.label] if hit.label else []), hit.name])
            lines.append(f"{hit.rank:2} {hit.similarity:10.3f}  {words}")
        return "\n".join(lines)


def search(
    run: Run,
    query: Any,
    embeddings: Path | str,
    *,
    k: int = 10,
    modality: str | None = None,
    html: Path | str | None = None,
) -> Hits:
    """Return the k items most similar to a query (see `counterpoint.search`)."""
    queries = [str(one) for one in (query if isinstance(query, (list, tuple)) else [query])]
    with plainly():
        return Hits(find(run, queries, embeddings, k=k, modality=modality, html=html)[1])
