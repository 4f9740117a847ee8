"""Compare queries after distilled vectors with queries after all demonstrations: time, and peak memory.

    python benchmarks/mend.py [--rounds 5] [--threads 1]      writes results/bench/mend.json

The model is a GPT-2 of transformers with 6 layers of width 384, the distiller a copy of it. There are 100 vectors, the paper's
number. A demonstration has 56 tokens, so 16 of them fill 896 of the paper's 900. A query with its answer has 32. "ours" reads
[vectors ; query], "plain" [demonstrations ; query]; both score the answers, without gradient. A ratio is the time after all
demonstrations over the time after vectors: above 1 ours is faster.

In "at hand" the vectors of the task were distilled before. "with distilling" distils them once for the queries that it names, which
are of one task. In "cached" both sides have the keys and values of what precedes the query, computed before.

The values of both sides differ, since this distiller is not trained.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.context_models import ContextModel, Distiller, Query
from counterpoint.encoders.text import train_bpe

OUT = Path(__file__).parents[1] / "results" / "bench" / "mend.json"
WIDTH, VECTORS, EXAMPLE, QUERY, ANSWER = 384, 100, 56, 32, 4


def numbers(seed: int, *shape: int) -> Tensor:
    """Draw token numbers."""
    return torch.randint(100, 280, shape, generator=torch.Generator().manual_seed(seed))


def case(queries: int, demonstrations: int, way: str) -> Case:
    """Make both sides for some queries of one task."""
    torch.manual_seed(0)
    tokenizer = train_bpe(["a text to learn a few tokens from"] * 4, 300)
    name, positions = f"gpt2-{WIDTH}-6-6", demonstrations * EXAMPLE + VECTORS + QUERY
    model = ContextModel(name, tokenizer, positions).eval()
    distiller = Distiller(name, tokenizer, positions, VECTORS, WIDTH).eval()
    distiller.start_from(model)
    ids = numbers(1, 1, demonstrations * EXAMPLE)
    there, none = torch.ones_like(ids, dtype=torch.bool), ids.new_zeros(queries, 0)
    asked = numbers(2, queries, QUERY)
    answer = torch.arange(QUERY).expand(queries, -1) >= QUERY - ANSWER
    query = Query(none, none.bool(), asked, torch.ones_like(answer), answer)
    at_hand = normal(3, 1, VECTORS, WIDTH)

    def scored(logits: Tensor) -> Tensor:
        found = fn.candidate_scores(logits, query.ids, query.answer, torch.ones(queries, 1), 0, 1)
        return found.mean()

    def after(rows: Tensor) -> Tensor:
        rows = rows.expand(queries, -1, -1)
        return scored(model(rows, torch.ones(rows.shape[:2], dtype=torch.bool), query))

    def kept(rows: Tensor) -> object:
        """Return the keys and values of a context."""
        return model.model(inputs_embeds=rows.expand(queries, -1, -1), use_cache=True).cache

    def continued(cache: object, before: int) -> Tensor:
        places = torch.arange(before, before + QUERY).expand(queries, -1)
        found = model.model(input_ids=asked, cache=copy.deepcopy(cache), position_ids=places, use_cache=True)
        return scored(found.logits)

    @torch.no_grad()
    def ours() -> Tensor:
        if way == "cached":
            return continued(caches[0], VECTORS)
        return after(distiller(ids, there) if way == "with distilling" else at_hand)

    @torch.no_grad()
    def plain() -> Tensor:
        return continued(caches[1], ids.shape[1]) if way == "cached" else after(model.embed(ids))

    with torch.no_grad():
        caches = [kept(at_hand), kept(model.embed(ids))] if way == "cached" else []
    return ours, plain


CASES = {
    **{
        f"{queries} queries, {k} demonstrations, at hand": (queries, k, "at hand")
        for queries, k in ((1, 4), (1, 16), (4, 16))
    },
    **{
        f"{queries} queries, 16 demonstrations, with distilling": (queries, 16, "with distilling") for queries in (1, 4)
    },
    "4 queries, 16 demonstrations, cached": (4, 16, "cached"),
}

if __name__ == "__main__":
    cases = {name: Sides(partial(case, *given), partial(case, 1, 1, given[2])) for name, given in CASES.items()}
    what = "float32, forward without gradient, medians; ratio above 1: ours is faster; megabytes: peak of a process"
    run(
        cases,
        OUT,
        __doc__,
        rounds=5,
        what=what,
        width=WIDTH,
        vectors=VECTORS,
        tokens_of_demonstration=EXAMPLE,
        query=QUERY,
    )
