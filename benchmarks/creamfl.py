"""Compare rounds of CreamFL's federation with the same clients run bare, and count the bytes of a round.

    python benchmarks/creamfl.py [--rounds 5]      writes results/bench/creamfl.json

`bare` calls the training of each party and both passes of the server one after another. It has no message, check, log or state on
disk. `federation` has all of these. Both have digit-parties with seven parties and one thread. The figure is bare / federation, the
median over runs of six rounds each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from counterpoint.engine.run import Run, machine, versions
from counterpoint.experiment import Experiment
from counterpoint.systems.federated.creamfl import CreamFLParty, CreamFLServer
from counterpoint.tasks.federations import LOG, Federation, InProcess

OUT = Path(__file__).parents[1] / "results" / "bench" / "creamfl.json"
ROUNDS = 6


def sides(experiment: Experiment) -> tuple[CreamFLServer, dict[str, CreamFLParty], Experiment]:
    """Build the server and the parties."""
    task = experiment.task()
    server = CreamFLServer(experiment.learner(task.facts, 0), task, experiment.config, 0)
    return server, {party.name: CreamFLParty(task, party.name, 0) for party in task.parties}, task


def bare(experiment: Experiment) -> float:
    """Return the seconds of a round without the federation."""
    server, parties, _ = sides(experiment)
    started = time.perf_counter()
    for number in range(ROUNDS):
        server.learn(number)
        rows = server.represent()
        answers = {}
        for name, party in parties.items():
            party.train(number, rows)
            answers[name] = party.public.represent(party.learner)
        server.merge(number, answers)
    return (time.perf_counter() - started) / ROUNDS


def federation(experiment: Experiment) -> tuple[float, dict[str, int]]:
    """Return the seconds of a round with the federation, and the bytes of one."""
    server, parties, task = sides(experiment)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder), experiment.record(0), "r")
        count = len(task.data.train)
        made = Federation(server, InProcess(parties), task.parties, experiment.config, 0, count, run=run)
        started = time.perf_counter()
        made.rounds()
        seconds = (time.perf_counter() - started) / ROUNDS
        log = json.loads((run.path / LOG).read_text().splitlines()[-1])
    return seconds, {name: log[name] for name in ("sent_bytes", "received_bytes")}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": ROUNDS, "evaluate_every": 1000}
    experiment = Experiment.resolve("creamfl", "digit-parties?vectors=1", overrides=settings)
    pairs = [(bare(experiment), federation(experiment)) for _ in range(options.rounds)]
    plain, ours = (statistics.median(values) for values in ([a for a, _ in pairs], [b for _, (b, _) in pairs]))
    found = {"bare_seconds": plain, "federation_seconds": ours, "bare_over_federation": plain / ours} | pairs[0][1][1]
    print(json.dumps(found, indent=1))
    OUT.write_text(json.dumps({"machine": machine(), "versions": versions(), "round": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
