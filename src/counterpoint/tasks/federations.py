"""Define the task `federations`: a server learns a public set of two modalities with the help of private parties.

Rounds of messages, of which the server asks for some parties' answers in each:

    1. the server learns, and sends its representations of the public items to the chosen parties
    2. each party learns from its own items and the message, and answers with its representations of the public items
    3. the server learns from the answers

A message is a safetensors file in memory: one float32 matrix [public items, width] for each modality, and the facts of
`FACTS` as text. Nothing else travels. The server leaves out a party that answers late or not at all. It also leaves out an
answer with NaN, another shape, another round or another version. The round goes on, and the log names the party and the reason.

After each round the state of the server and of the parties is in the run's last.ckpt. A resumed federation ends with the same
figures. Random numbers depend on the seed, the round and the party alone. rounds.jsonl has a line for each round.

The public set is measured as the task `aligned` measures its items.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

import counterpoint
from counterpoint.data.federations import FederatedData, Party
from counterpoint.engine.checkpoint import write_checkpoint
from counterpoint.engine.run import Run
from counterpoint.engine.survey import moved
from counterpoint.errors import CounterpointError, DataError, Interrupted, RunError
from counterpoint.files import quoted, replacing
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, AlignedTask
from counterpoint.tasks.aligned.batches import BATCH, SplitBatches, evaluated
from counterpoint.words import counted

PROTOCOL = "1"  # of the messages; a change of their contents changes it
FACTS = ("protocol", "version", "round", "sender")
LOG = "rounds.jsonl"


@dataclass
class FederationConfig(AlignedConfig):
    """Settings of every federation."""

    rounds: int = 30
    """Number of rounds."""
    epochs: int = 1
    """The server's passes over the public items in each round, before it sends its representations."""
    chosen: int = 10
    """Number of parties that a round asks, drawn anew for each; 0: all."""
    party_epochs: int = 5
    """Passes of a party over its own items, and over the public items, in a round."""
    party_image_encoder: str = "torchvision:resnet18"
    """The parties' networks for images (see `image_encoder`); several, separated by commas, are given out in turn."""
    party_text_encoder: str = "text-s"
    """The parties' networks for text; several, separated by commas, are given out in turn."""
    party_vector_encoder: str = "mlp"
    """The parties' networks for vectors; several, separated by commas, are given out in turn."""
    party_batch_size: int = 512
    """Items in a batch of a party; a party with fewer items has one batch of all."""
    together: bool = False
    """Add the contrast to each step on the party's own items, as the paper writes it. Default: a pass of its own, as released."""
    distil_weight: float = 0.3
    """Weight of the mean squared distance to the fused representations, for each modality; 0: the server learns alone."""
    answer_seconds: float = 0.0
    """Leave out a party whose answer takes longer, in seconds; 0: no limit."""
    message_megabytes: float = 2000.0
    """Maximum size of a message. Flower's messages must stay below 2,048."""

    adapts: ClassVar[bool] = False  # server and parties train networks of their own

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("rounds", "party_epochs", "party_batch_size")
        for name in ("chosen", "answer_seconds"):
            if getattr(self, name) < 0:
                raise CounterpointError(f"{name} must not be negative, got {getattr(self, name)}")
        self.need_positive("message_megabytes")
        self.need_weight("distil_weight")

    def party_encoders(self, number: int) -> dict[str, Any]:
        """Return the networks of the party of this number, as settings."""
        found = {}
        for kind in ("image", "text", "vector"):
            names = getattr(self, f"party_{kind}_encoder").split(",")
            found[f"{kind}_encoder"] = names[number % len(names)].strip()
        return found


class FederationTask(AlignedTask):
    """The public set as aligned items, and the parties beside it."""

    name = "federations"
    contract = "federations"

    def __init__(self, data: FederatedData, config: FederationConfig) -> None:
        if not isinstance(data, FederatedData):
            raise CounterpointError(
                "the task federations needs a public set and parties, such as digit-parties or parties:DIR"
            )
        super().__init__(data.public, config)
        self.parties = data.parties
        self.facts |= {"parties": [party.name for party in data.parties]}
        wide = len(data.public.modalities) * len(data.public.train) * config.embedding * 4 / 1e6
        if wide > config.message_megabytes:
            raise CounterpointError(
                f"a message of {counted(len(data.public.train), 'public item')} with {config.embedding} numbers in "
                f"{counted(len(data.public.modalities), 'modality')} has {wide:.1f} MB, more than message_megabytes "
                f"{config.message_megabytes:g}; use a smaller --embedding or fewer public items"
            )


TASK = FederationTask

# --------------------------------------------------------------------------------------------------------------- messages


def pack(rows: Mapping[str, Tensor], *, round: int, sender: str) -> bytes:
    """Write a message: representations of the public items, by modality.

    Args:
        rows: modality -> [public items, width].
        round: number of the round.
        sender: name of the party, or "server".
    """
    facts = {"protocol": PROTOCOL, "version": counterpoint.__version__, "round": str(round), "sender": sender}
    held = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in rows.items()}
    return safetensors.torch.save(held, facts)


def unpack(message: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a message: its facts, and its rows by modality.

    Raises CounterpointError for bytes that are no message, and for one of another version of this package.
    """
    try:
        size = int.from_bytes(message[:8], "little")
        facts = dict(json.loads(message[8 : 8 + size]).get("__metadata__", {}))
        rows = dict(sorted(safetensors.torch.load(message).items()))
    except (ValueError, UnicodeDecodeError, safetensors.SafetensorError, AttributeError) as error:
        raise CounterpointError(f"a message cannot be read ({type(error).__name__})") from error
    if set(facts) != set(FACTS):
        raise CounterpointError(f"a message has the facts {sorted(facts)} instead of {sorted(FACTS)}")
    mine = (PROTOCOL, counterpoint.__version__)
    if (facts["protocol"], facts["version"]) != mine:
        raise CounterpointError(
            f"{facts['sender']} has counterpoint {facts['version']} (messages {facts['protocol']}), this side {mine[1]} "
            f"(messages {mine[0]}); install the same version on both"
        )
    return facts, rows


def answer_of(message: bytes, *, round: int, sender: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read a party's answer. Raises CounterpointError with the reason not to use it.

    Args:
        message: the answer.
        round: number of the current round.
        sender: name of the party that was asked.
        shapes: modality -> shape of its rows, for the party's modalities.
    """
    facts, rows = unpack(message)
    if (facts["round"], facts["sender"]) != (str(round), sender):
        raise CounterpointError(f"it is {facts['sender']}'s answer of round {facts['round']}")
    found = {name: list(value.shape) for name, value in rows.items()}
    wanted = {name: list(shape) for name, shape in shapes.items()}
    if found != wanted:
        raise CounterpointError(f"its rows are {found}, not {wanted}")
    for name, value in rows.items():
        if not bool(value.isfinite().all()):
            raise CounterpointError(f"its rows of {name} hold NaN or infinite values")
    return rows


# ------------------------------------------------------------------------------------------------------------- the learners


def passes(count: int, batch_size: int, *numbers: int) -> list[NDArray[np.int64]]:
    """Return the positions of each batch of a pass, in an order of these numbers; the last, smaller batch is dropped."""
    order = np.random.default_rng(numbers).permutation(count)
    size = min(batch_size, count)
    return [order[at : at + size] for at in range(0, count - size + 1, size)]


class Items:
    """Items of the server or of a party, in batches of the modalities that it has."""

    def __init__(self, task: AlignedTask, split: Any, modalities: Mapping[str, Any]) -> None:
        data = replace(task.data, modalities=dict(modalities))
        self.batches = SplitBatches(data, split, task.tokenizers, task.config.context)

    def __len__(self) -> int:
        return len(self.batches)

    def train(self, learner: AlignedLearner, rows: NDArray[np.int64], seed: int) -> dict[str, Any]:
        """Return a batch with the views of training."""
        batch = moved(self.batches[rows.tolist()], learner.device)
        return learner.prepare(batch, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def represent(self, learner: AlignedLearner) -> dict[str, Tensor]:
        """Return unit rows [items, embedding] of every modality, in evaluation mode."""
        learner.eval()
        parts = []
        for at in range(0, len(self), BATCH):
            rows = list(range(at, min(at + BATCH, len(self))))
            parts.append(learner.embed(moved(evaluated(self.batches, rows, "survey"), learner.device)))
        learner.train()
        return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


class Server(Protocol):
    """The server's side of a round."""

    def learn(self, round: int) -> dict[str, float]: ...
    def represent(self) -> dict[str, Tensor]: ...
    def merge(self, round: int, answers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Member(Protocol):
    """A party's side of a round: from the server's message to its answer."""

    def answer(self, message: bytes) -> bytes: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


Answers = dict[str, bytes | Exception]


class InProcess:
    """Parties in this process, one after another.

    Args:
        members: the parties by name.
        seconds: limit of an answer, 0 for none.
    """

    def __init__(self, members: Mapping[str, Member], seconds: float = 0.0) -> None:
        self.members, self.seconds = dict(members), seconds

    def __call__(self, round: int, asked: Sequence[str], message: bytes) -> Answers:
        found: Answers = {}
        for name in asked:
            started = time.monotonic()
            try:
                found[name] = self.members[name].answer(message)
            except Exception as error:  # whatever stops a party must not stop the others
                found[name] = error
            if self.seconds and (took := time.monotonic() - started) > self.seconds:
                found[name] = TimeoutError(f"late: its answer took {took:.1f} s of {self.seconds:g} s")
        return found

    def state(self) -> dict[str, Any]:
        return {name: member.state() for name, member in self.members.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, member in self.members.items():
            member.restore(state[name])


# ---------------------------------------------------------------------------------------------------------------- the rounds


class Federation:
    """Rounds of a server and its parties.

    Args:
        server: the server's side.
        exchange: sends a message to parties and returns their answers, or what stopped them. It has `state` and `restore`.
        parties: the parties.
        config: the settings.
        seed: seed of the choice of parties.
        public: number of public items.
        measure: returns the figures of the server after a round, by name, where it is measured.
        run: the run directory, or None.
        say: receives a line for each party that is left out.
    """

    def __init__(
        self,
        server: Server,
        exchange: Any,
        parties: Sequence[Party],
        config: FederationConfig,
        seed: int,
        public: int,
        *,
        measure: Callable[[int], Mapping[str, float]] = lambda _: {},
        run: Run | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.server, self.exchange, self.config, self.seed = server, exchange, config, seed
        self.parties = {party.name: party for party in parties}
        self.public, self.measure, self.directory, self.say = public, measure, run, say
        self.rows: list[dict[str, float]] = []

    def ask(self, round: int) -> list[str]:
        """Return the names of a round's parties, in the order of the data."""
        count = min(self.config.chosen or len(self.parties), len(self.parties))
        rng = np.random.default_rng([self.seed, round, 0])
        return [list(self.parties)[n] for n in np.sort(rng.choice(len(self.parties), count, replace=False))]

    def round(self, number: int, *, ask: bool = True) -> dict[str, float]:
        """Run one round and return its row. `ask` False: the server learns alone."""
        row = {f"train/{name}": value for name, value in self.server.learn(number).items()}
        log: dict[str, Any] = {"round": number, "asked": [], "left_out": {}, "sent_bytes": 0, "received_bytes": 0}
        if ask:
            names = self.ask(number)
            message = pack(self.server.represent(), round=number, sender="server")
            answers = {}
            for name, reply in self.exchange(number, names, message).items():
                log["received_bytes"] += 0 if isinstance(reply, Exception) else len(reply)
                try:
                    if isinstance(reply, Exception):
                        raise reply
                    shapes = dict.fromkeys(self.parties[name].modalities, (self.public, self.config.embedding))
                    answers[name] = answer_of(reply, round=number, sender=name, shapes=shapes)
                except Exception as error:  # of a party's code, or of its answer
                    said = (
                        str(error) if isinstance(error, CounterpointError | TimeoutError) else f"dropped out: {error!r}"
                    )
                    log["left_out"][name] = said
                    self.say(f"note: round {number + 1} goes on without {name}: {said}")
            log |= {"asked": names, "sent_bytes": len(message) * len(names)}
            row |= {f"train/{name}": value for name, value in self.server.merge(number, answers).items()}
            row |= {"train/parties": float(len(answers))}
        every, last = self.config.evaluate_every, number == self.config.rounds - 1
        if (number + 1) % every == 0 or last:
            row |= self.measure(number)
        if self.directory is not None:
            with (self.directory.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(log) + "\n")
        return {"epoch": float(number), "step": float(number + 1)} | row

    def rounds(self, *, ask: bool = True) -> list[dict[str, float]]:
        """Run all rounds that are left, and return a row for each. The state is on disk after each round.

        Raises Interrupted after Ctrl-C.
        """
        self._resume()
        try:
            for number in range(len(self.rows), self.config.rounds):
                self.rows.append(self.round(number, ask=ask))
                self._keep()
        except KeyboardInterrupt as error:
            where = (
                ""
                if self.directory is None
                else f"; resume it: counterpoint train --resume {quoted(self.directory.path)}"
            )
            raise Interrupted(f"stopped in round {len(self.rows) + 1}{where}") from error
        return self.rows

    def _keep(self) -> None:
        if self.directory is None:
            return
        state = {"rows": self.rows, "server": self.server.state(), "parties": self.exchange.state()}
        write_checkpoint(self.directory, state | {"names": list(self.parties)})
        self.directory.write_metrics(self.rows)

    def _resume(self) -> None:
        """Continue after the last round on disk, and drop lines of the log that came after it."""
        if self.directory is None or not self.directory.checkpoint.is_file():
            return
        path = self.directory.checkpoint
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["names"] != list(self.parties):
                raise DataError(
                    f"{path} has the parties {state['names']}, the data {list(self.parties)}; restore the data"
                )
            self.server.restore(state["server"])
            self.exchange.restore(state["parties"])
            self.rows = list(state["rows"])
        except DataError:
            raise
        except Exception as error:  # of any kind: the message must name the file
            raise RunError(
                f"{path} cannot be resumed from ({type(error).__name__}); delete it to start over, or restore it from a copy"
            ) from error
        log: Path = self.directory.path / LOG
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[: len(self.rows)]
            with replacing(log) as file:
                file.write("".join(lines).encode())


def finish(run: Run, learner: AlignedLearner, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the weights and metrics of a finished federation, and remove its checkpoint."""
    run.write_metrics(rows)
    run.save_weights(learner.exported())
    if run.checkpoint.is_file():
        os.remove(run.checkpoint)
