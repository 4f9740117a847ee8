"""Compare rounds of CreamFL's federation with the same clients run bare, and its soft contrast with the authors' way.

    python benchmarks/creamfl.py [--rounds 7]      writes results/bench/creamfl.json
    python benchmarks/creamfl.py --flower          adds rounds over Flower, in an environment with the extra `federated`

`bare` calls the training of each party and both passes of the server one after another. It has no message, check, log or state on
disk. `federation` has all of these. Both have digit-parties with all its parties and one thread, and take turns. The ratio is
of processor time: the least of all bare rounds over the least of the federation's. So it holds on a busy machine, too. It has no
waiting for the disk, which the seconds of the clock have.

Over Flower a SuperLink and three SuperNodes run on this machine, each with its own processes, as `flwr run` starts them. Its figure
is the median time between the ends of two rounds. Beside it is the fastest round of these parties in one process, by the clock.

"soft contrast" is the loss of n pairs of width 256, forward and backward. A transcription that stores the matrix takes turns. The
record has medians, and the peak of each side's allocations in bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from alignment import timed
from audio_sheet_retrieval import peak
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.engine.run import Run, machine, versions
from counterpoint.experiment import Experiment
from counterpoint.systems.federated.creamfl import CreamFLParty, CreamFLServer
from counterpoint.tasks.federations import LOG, Federation, InProcess

OUT = Path(__file__).parents[1] / "results" / "bench" / "creamfl.json"
ROUNDS, WIDTH = 4, 256
DATA = "digit-parties?vectors=1"
THREE = f"{DATA}&pairs=1&images=1&texts=1"
SETTINGS: dict[str, Any] = {"rounds": ROUNDS, "evaluate_every": 1000}


def sides(experiment: Experiment) -> tuple[CreamFLServer, dict[str, CreamFLParty], Any]:
    """Build the server and the parties."""
    task = experiment.task()
    server = CreamFLServer(experiment.learner(task.facts, 0), task, experiment.config, 0)
    return server, {party.name: CreamFLParty(task, party.name, 0) for party in task.parties}, task


Seconds = tuple[float, float]  # of the processor, and of the clock


def now() -> Seconds:
    return time.process_time(), time.perf_counter()


def since(started: Seconds) -> Seconds:
    ended = now()
    return ended[0] - started[0], ended[1] - started[1]


def bare(experiment: Experiment) -> list[Seconds]:
    """Return the seconds of each round without the federation."""
    server, parties, _ = sides(experiment)
    found = []
    for number in range(ROUNDS):
        started = now()
        server.learn(number)
        rows = server.represent()
        answers = {}
        for name, party in parties.items():
            party.train(number, rows)
            answers[name] = party.public.represent(party.learner)
        server.merge(number, answers)
        found.append(since(started))
    return found


class Timed(Federation):
    """A federation that notes the time of each round, with its state on disk."""

    def round(self, number: int, *, ask: bool = True) -> dict[str, float]:
        self.started = now()
        return super().round(number, ask=ask)

    def _keep(self) -> None:
        super()._keep()
        self.seconds = [*getattr(self, "seconds", []), since(self.started)]


def federation(experiment: Experiment) -> tuple[list[Seconds], dict[str, int]]:
    """Return the seconds of each round with the federation, and the bytes of one."""
    server, parties, task = sides(experiment)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder), experiment.record(0), "r")
        count = len(task.data.train)
        made = Timed(server, InProcess(parties), task.parties, experiment.config, 0, count, run=run)
        made.rounds()
        log = json.loads((run.path / LOG).read_text().splitlines()[-1])
    return made.seconds, {name: log[name] for name in ("sent_bytes", "received_bytes")}


def rounds(times: int) -> dict[str, Any]:
    """Time both ways in turn."""
    experiment = Experiment.resolve("creamfl", DATA, overrides=SETTINGS)
    plain: list[Seconds] = []
    ours: list[Seconds] = []
    for number in range(times):
        for way in ("bare", "federation") if number % 2 else ("federation", "bare"):
            if way == "bare":
                plain += bare(experiment)
            else:
                seconds, sent = federation(experiment)
                ours += seconds
    found: dict[str, Any] = {}
    for n, clock in enumerate(("processor", "clock")):
        a, b = (min(seconds[n] for seconds in way) for way in (plain, ours))
        found |= {f"bare_{clock}_s": round(a, 4), f"federation_{clock}_s": round(b, 4)}
    return found | {"ratio": round(min(plain)[0] / min(ours)[0], 3)} | sent


def over_flower() -> dict[str, Any]:
    """Time rounds over Flower's processes by the growth of the log."""
    sys.path.insert(0, str(OUT.parents[2] / "tests" / "use"))
    import test_flower

    test_flower.DATA, test_flower.SETTINGS = THREE, SETTINGS
    experiment = Experiment.resolve("creamfl", THREE, overrides=SETTINGS)
    names = [party.name for party in experiment.task().parties]
    with tempfile.TemporaryDirectory() as folder, test_flower.Processes(Path(folder)) as flower:
        flower.connect(names)
        flower.submit()
        ends: list[float] = []
        while len(ends) < ROUNDS:
            logs = list((Path(folder) / "out").glob(f"*/{LOG}"))
            lines = len(logs[0].read_text().splitlines()) if logs else 0
            ends += [time.perf_counter()] * (lines - len(ends))
            time.sleep(0.02)
    one = min(clock for _, clock in federation(experiment)[0])
    found: dict[str, Any] = {"parties": names, "federation_clock_s": round(one, 4)}
    return found | {"flower_clock_s": round(statistics.median(b - a for a, b in itertools.pairwise(ends)), 2)}


def contrast(n: int) -> dict[str, Any]:
    """Time the soft contrast of n pairs and its transcription in turn."""
    torch.manual_seed(0)
    v, t = (torch.randn(n, WIDTH, requires_grad=True) for _ in range(2))
    inputs = [v, t]

    def plain() -> Tensor:
        logits = 2 * (15 - 15 * torch.cdist(F.normalize(v), F.normalize(t)))
        return 2 * F.softplus(torch.where(torch.eye(n, dtype=torch.bool), -logits, logits)).sum()

    ways = (lambda: fn.soft_contrastive(v, t), plain)
    pairs = [[timed(inputs, way)[0] for way in ways] for _ in range(101 if n <= 256 else 7 if n <= 1024 else 3)]
    ours, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    held = [peak(inputs, way) for way in ways]
    found: dict[str, Any] = {
        "ours_s": round(ours, 5),
        "transcription_s": round(theirs, 5),
        "ratio": round(theirs / ours, 2),
    }
    return found | {"ours_bytes": held[0], "transcription_bytes": held[1]}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flower", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.flower:
        record = json.loads(OUT.read_text())
        record["flower"] = over_flower()
    else:
        held = json.loads(OUT.read_text()) if OUT.is_file() else {}
        record = {"machine": machine(), "versions": versions(), "round": rounds(options.rounds)}
        record |= {name: held[name] for name in ("flower",) if name in held}
        record["soft contrast"] = {str(n): contrast(n) for n in (64, 256, 1024, 4096)}
    print(json.dumps(record, indent=1))
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
