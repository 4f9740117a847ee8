"""Measure what a space of sounds and texts knows of two events in a clip: zero-shot tests of growing temporal difficulty (ZSTE).

All are decided by the cosines of a clip with candidate texts. Events have names c; i and j are the events of a clip.

    rung              clip            question                                          candidates
    single            one sound       which event?                                      every c
    overlay_any       both at once    is the nearest name one of the two?               every c
    overlay_both      both at once    are the two nearest names the two events?         every c
    overlay_pair      both at once    which pair?                                       "c_i and c_j" of every pair
    sequence_any      one, then one   as above                                          as above
    sequence_both     one, then one   as above                                          as above
    sequence_pair     one, then one   as above                                          as above
    order             one, then one   which came first?                                 a text and the same with events swapped
    relation          all three       before, after or while?                           three texts of the same two events
    free_order        one, then one   which came first, in other words?                 a text and the same with events swapped
    retrieval         one, then one   which ordered text of all clips?                  those of all clips and all swapped clips

Pairs of more than `PAIRS` are a sample with those of the clips. `summary` is sqrt(retrieval max(0, order - 1/2)), as in TACT.
The paper names the rungs, but their scoring is this library's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.views.sounds import at_once, in_a_row, other_kind, sounding

PAIRS = 1000  # maximum number of pairs among the candidates
CLIPS = 240  # sounds of which a learner composes clips, at most
AT_ONCE = 256  # rows that are embedded together
SEQUENTIAL = ("{} before {}", "{} after {}")  # of the first and the second event; in the second the later one leads
FREE = ("{}, then {}", "{} followed by {}")
RUNGS = (
    *("single", "overlay_any", "overlay_both", "overlay_pair", "sequence_any", "sequence_both", "sequence_pair"),
    *("order", "relation", "free_order", "retrieval"),
)


class Space(NamedTuple):
    """The functions of a network: unit rows of sounds, and of texts."""

    sounds: Callable[[Tensor], Float[Tensor, "n dim"]]
    texts: Callable[[list[str]], Float[Tensor, "n dim"]]


def ladder(
    space: Space, waves: Float[Tensor, "n samples"], kinds: Int[Tensor, " n"], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure every rung on clips that are composed of these sounds, the same at every call.

    Args:
        space: the network.
        waves: sounds of one event each, at most a few hundred; each begins one clip.
        kinds: number of each sound's event, a position in `names`; on the CPU.
        names: texts of the events.

    Returns two mappings: shares of right answers and `summary`; chance levels. Both are {} where all sounds are of one kind.
    """
    if len(kinds.unique()) < 2:
        return {}, {}
    partner = other_kind(kinds, torch.Generator().manual_seed(0))
    i, j = kinds, kinds[partner]
    first = sounding(waves)
    second = first.at(partner.to(waves.device))

    def sounds(rows: Tensor) -> Tensor:
        return torch.cat([space.sounds(part) for part in rows.split(AT_ONCE)])

    def texts(words: list[str]) -> Tensor:
        return torch.cat([space.texts(words[s : s + AT_ONCE]) for s in range(0, len(words), AT_ONCE)])

    def said(template: str, a: Tensor, b: Tensor) -> Tensor:
        return texts([template.format(names[int(m)], names[int(n)]) for m, n in zip(a, b, strict=True)])

    forward, swapped, together = (
        sounds(clips) for clips in (in_a_row(first, second), in_a_row(second, first), at_once(first, second))
    )
    single, everyone = sounds(waves), texts(list(names))
    pairs = _pairs(i, j, len(names))
    neutral = texts([f"{names[a]} and {names[b]}" for a, b in pairs])
    own = _positions(i, j, pairs)
    device = forward.device
    i, j, own = i.to(device), j.to(device), own.to(device)
    found = {"single": _share((single @ everyone.T).argmax(1) == i)}
    for name, clips in (("overlay", together), ("sequence", forward)):
        nearest = (clips @ everyone.T).topk(2, 1).indices
        right = (nearest == i[:, None]) | (nearest == j[:, None])
        found[f"{name}_any"], found[f"{name}_both"] = _share(right[:, 0]), _share(right.all(1))
        found[f"{name}_pair"] = _share((clips @ neutral.T).argmax(1) == own)

    # [i; j] is "i before j" and "j after i".
    before, before_swapped = said(SEQUENTIAL[0], i, j), said(SEQUENTIAL[0], j, i)
    after, after_swapped = said(SEQUENTIAL[1], j, i), said(SEQUENTIAL[1], i, j)
    found["order"] = _mean(
        [
            _share(_cosine(forward, right) > _cosine(forward, wrong))
            for right, wrong in ((before, before_swapped), (after, after_swapped))
        ]
    )
    three = before, after_swapped, said("{} while {}", i, j)  # of i and j in this order: before, after, while
    found["relation"] = _mean(
        [
            _share(torch.stack([_cosine(clips, text) for text in three]).argmax(0) == n)
            for n, clips in enumerate((forward, swapped, together))
        ]
    )
    found["free_order"] = _mean(
        [_share(_cosine(forward, said(words, i, j)) > _cosine(forward, said(words, j, i))) for words in FREE]
    )
    ordered = sorted({(int(a), int(b)) for a, b in zip([*i, *j], [*j, *i], strict=True)})
    at = {pair: n for n, pair in enumerate(ordered)}
    wanted = torch.tensor([at[int(a), int(b)] for a, b in zip(i, j, strict=True)], device=device)
    candidates = texts([SEQUENTIAL[0].format(names[a], names[b]) for a, b in ordered])
    found["retrieval"] = _share((forward @ candidates.T).argmax(1) == wanted)
    found["summary"] = float(np.sqrt(found["retrieval"] * max(0.0, found["order"] - 0.5)))
    return found, _chance(len(names), len(pairs), len(ordered))


def ladder_figures(found: Mapping[str, Sequence[float]], chance: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of ladders: lines over the rungs, and a table. {} where there is none.

    Args:
        found: heading -> share of right answers on each of `RUNGS`.
        chance: chance level of each rung.
    """
    if not found or not chance:
        return {}
    series = {**found, "chance": [chance[name] for name in RUNGS]}
    numbers, named = list(range(1, len(RUNGS) + 1)), [name.replace("_", " ") for name in RUNGS]
    rungs = ", ".join(f"{n} {name}" for n, name in zip(numbers, named, strict=True))
    lines = {
        "kind": "curves",
        "series": {name: (numbers, list(values)) for name, values in series.items()},
        "xlabel": "rung",
        "caption": f"Share of right answers on clips of valid sounds. {rungs}. From 8 on, the order of events counts.",
    }
    rows = [[name, *(round(values[n], 3) for values in series.values())] for n, name in enumerate(named)]
    columns = ["rung", *series]
    return {
        "The ladder of zero-shot tests": lines,
        "The ladder in numbers": {
            "kind": "table",
            "columns": columns,
            "rows": rows,
            "caption": "Shares, as drawn above.",
        },
    }


def _pairs(i: Tensor, j: Tensor, kinds: int) -> list[tuple[int, int]]:
    """Return the candidates: all pairs, or where these are many, those of the clips and a sample of others."""
    if kinds * (kinds - 1) // 2 <= PAIRS:
        return list(combinations(range(kinds), 2))
    found = {(min(a, b), max(a, b)) for a, b in zip(i.tolist(), j.tolist(), strict=True)}
    rng = np.random.default_rng(0)
    while len(found) < PAIRS:
        a, b = sorted(map(int, rng.choice(kinds, 2, replace=False)))
        found.add((a, b))
    return sorted(found)


def _positions(i: Tensor, j: Tensor, pairs: list[tuple[int, int]]) -> Int[Tensor, " n"]:
    """Return the position of each clip's pair."""
    at = {pair: n for n, pair in enumerate(pairs)}
    return torch.tensor([at[min(a, b), max(a, b)] for a, b in zip(i.tolist(), j.tolist(), strict=True)])


def _chance(kinds: int, pairs: int, ordered: int) -> dict[str, float]:
    both = {f"{clip}_any": 2 / kinds for clip in ("overlay", "sequence")}
    both |= {f"{clip}_both": 2 / (kinds * (kinds - 1)) for clip in ("overlay", "sequence")}
    both |= {f"{clip}_pair": 1 / pairs for clip in ("overlay", "sequence")}
    return both | {"single": 1 / kinds, "order": 0.5, "relation": 1 / 3, "free_order": 0.5, "retrieval": 1 / ordered}


def _cosine(a: Tensor, b: Tensor) -> Float[Tensor, " n"]:
    return (a * b).sum(1)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _mean(shares: Sequence[float]) -> float:
    return float(np.mean(shares))
