"""Data by name or as an object, and what is found with a run: the embeddings of a set, and search in them."""

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
    """Return the name of data, and what holds the object in memory that it leads to: keep it as long as the name is used."""
    if data is None or isinstance(data, str | Path):
        return data if data is None else str(data), None
    own = Own.of(data)
    return own.spec, own


def held_again(run: Run, data: Any) -> Own | None:
    """Return the object that a run was trained on, given again. CounterpointError where it is missing, other, or not wanted."""
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


def embed(run: Run, out: Path | str, *, data: Any = None, split: str = "all", quiet: bool = True) -> Embeddings:
    """Write the embeddings of a set and read them (see `counterpoint.embed`)."""
    with plainly():
        spec, _held = source_of(data)
        write(run, out, data=spec, split=split, say=silent if quiet else print)
        return read_embeddings(out)


class Hits(list[Hit]):
    """Items that a search found, shown as a table."""

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
    """Return the k items that are most like a query (see `counterpoint.search`)."""
    queries = [str(one) for one in (query if isinstance(query, (list, tuple)) else [query])]
    with plainly():
        return Hits(find(run, queries, embeddings, k=k, modality=modality, html=html)[1])
