"""Compare SASRec here (`mclrec` without contrast) with RecBole's own SASRec: the same splits, batches, steps and ranking.

    python benchmarks/recbole_sasrec.py [--epochs 80] [--seeds 3]      writes results/bench/recbole_sasrec.json

It needs an environment in which `import recbole.model` works (recbole 1.2.1). RecBole's class is trained by a plain loop
with Adam, on the batches that our learner sees. Both have width 32, 2 blocks, 2 heads, inner width 256 and dropout 0.3. Both
learn by cross-entropy over all items. MovieLens-100K is cut to each user's last 14 films. `ties` is the order of films of
equal time, which leaves the last film of 415 users open. `masked` ranks films that the user has not rated; `all` ranks every
film, as RecBole's sequential evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recbole.model.sequential_recommender.sasrec import SASRec

from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Position
from counterpoint.experiment import Experiment

OUT = Path(__file__).parents[1] / "results" / "bench" / "recbole_sasrec.json"
SETTINGS: dict[str, Any] = {
    "view_weight": 0.0, "learned_weight": 0.0, "whole_histories": True, "batch_size": 128, "dim": 32, "length": 14,
    "inner": 256, "dropout": 0.3, "lr": 8e-3,
}  # fmt: skip
FIELDS = {
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
    "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": 14, "device": "cpu", "n_layers": 2, "n_heads": 2, "hidden_size": 32,
    "inner_size": 256, "hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.3, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "initializer_range": 0.02, "loss_type": "CE",
}  # fmt: skip


class Numbers:
    """The number of items, with padding, as RecBole's models ask for it."""

    def __init__(self, items: int) -> None:
        self.items = items

    def num(self, field: str) -> int:
        return self.items + 1


def judged(task: Any, predict: Any) -> dict[str, float]:
    """Rank the test films with and without those that a user has rated."""
    found = {}
    for name, masked in (("masked", True), ("all", False)):
        evaluator = task.evaluator("test")
        evaluator.mask_seen = masked
        with torch.no_grad():
            for batch in task.evaluation_loader("test"):
                evaluator.update(batch, predict(batch))
        figures = evaluator.compute()
        found |= {f"{name}/{measure}": round(figures[measure], 4) for measure in ("ndcg_20", "recall_20")}
    return found


def ours(task: Any, experiment: Experiment, seed: int) -> dict[str, float]:
    learner = experiment.learner(task.facts, seed)
    start = time.perf_counter()
    fit(learner, task, evaluate_every=10_000, bar=False)
    seconds = time.perf_counter() - start
    learner.eval()
    return judged(task, learner.predict) | {"seconds": round(seconds, 1)}


def theirs(task: Any, experiment: Experiment, seed: int, epochs: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = SASRec(FIELDS, Numbers(len(task.data.items)))
    optimiser = torch.optim.Adam(model.parameters(), SETTINGS["lr"] * SETTINGS["batch_size"] / 256)
    start, position = time.perf_counter(), Position()
    model.train()
    for epoch in range(epochs):
        position.epoch = epoch
        for batch in task.train_loader(seed, position):
            loss = model.calculate_loss(asked(batch) | {"item": batch["target"] + 1})
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    seconds = time.perf_counter() - start
    model.eval()
    items = model.item_embedding.weight[1:]

    def predict(batch: dict[str, Any]) -> dict[str, Any]:
        given = asked(batch)
        return {"query": model(given["item_list"], given["length"]), "items": items}

    return judged(task, predict) | {"seconds": round(seconds, 1)}


def asked(batch: dict[str, Any]) -> dict[str, Any]:
    """Return histories as RecBole has them, of 14 places."""
    ids = torch.nn.functional.pad(batch["ids"], (0, 14 - batch["ids"].shape[1]))
    return {"item_list": ids, "length": batch["lengths"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"recbole": "1.2.1", "epochs": options.epochs, "seeds": options.seeds, "ties": {}}
    for ties in ("file", "item", "random&seed=1", "random&seed=2"):
        rows: dict[str, list[dict[str, float]]] = {"ours": [], "recbole": []}
        experiment = Experiment.resolve(
            "mclrec", f"movielens?last=14&ties={ties}", overrides=SETTINGS | {"epochs": options.epochs}
        )
        task = experiment.task()
        for seed in range(options.seeds):
            rows["ours"].append(ours(task, experiment, seed))
            rows["recbole"].append(theirs(task, experiment, seed, options.epochs))
        record["ties"][ties] = {
            who: {name: round(statistics.mean(row[name] for row in found), 4) for name in found[0]}
            for who, found in rows.items()
        }
        mine = record["ties"][ties]
        mine["ratio"] = round(mine["recbole"]["seconds"] / mine["ours"]["seconds"], 2)
        print(ties, mine, flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
