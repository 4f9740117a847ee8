"""CreamFL on Flower: the server and the parties of `systems.federated.creamfl` behind Flower's message API.

`server` and `client` are the apps that a Flower project names in its pyproject.toml:

    [tool.flwr.app.components]
    serverapp = "counterpoint.use.flower:server"
    clientapp = "counterpoint.use.flower:client"

    [tool.flwr.app.config]
    data = "parties:/data/mine"     # as of `counterpoint train creamfl --data`
    settings = "{}"                 # settings by name, as JSON
    seed = 0
    out = ""                        # folder of the run; empty: none is written
    nodes = 3                       # parties to wait for; 0: all of the data
    wait = 60                       # seconds to wait for them

A SuperNode's `--node-config` names its party: `party="north"`, and may name its own `data=`. In a simulation (`flower-superlink
--simulation`, with Ray) the partition is the number of the party.

A message holds the same bytes as in one process, in one ConfigRecord. No weights travel. A party keeps its network and optimiser in
the state of its own context. Telemetry is off. Needs the extra `federated`, which the base install does not import.

Not built: secure aggregation, resuming the parties of a stopped `flwr run`.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before flwr is imported

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError("counterpoint.use.flower needs Flower: pip install 'counterpoint[federated]'") from error

from counterpoint.engine.run import Run
from counterpoint.engine.state import recorded
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.federated import creamfl
from counterpoint.tasks.federations import Answers
from counterpoint.tasks.public_sets import federate

RECORD = "counterpoint"


def experiment_of(context: Context) -> tuple[Experiment, int]:
    """Return the experiment and the seed that a run's config, or a node's own `data`, asks for."""
    asked = context.run_config
    data = str(context.node_config.get("data") or asked.get("data", "digit-parties"))
    settings = json.loads(str(asked.get("settings", "{}")))
    return Experiment.resolve("creamfl", data, overrides=settings), int(asked.get("seed", 0))


# --------------------------------------------------------------------------------------------------------------- the party

client = ClientApp()


@client.query()
def who(message: Message, context: Context) -> Message:
    """Answer with the name of this node's party."""
    task = experiment_of(context)[0].task()
    return Message(RecordDict({RECORD: ConfigRecord({"party": party_of(context, task)})}), reply_to=message)


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Learn from the server's message; answer with the party's representations of the public items."""
    found = answer_to(message.content[RECORD]["message"], context)
    return Message(RecordDict({RECORD: ConfigRecord({"message": found})}), reply_to=message)


def answer_to(message: bytes, context: Context) -> bytes:
    """Return the answer of this node's party, whose network lasts in the state of the context."""
    experiment, seed = experiment_of(context)
    task = experiment.task()
    party = creamfl.CreamFLParty(task, party_of(context, task), seed)
    if RECORD in context.state:
        kept = context.state[RECORD]["state"]
        party.restore(torch.load(io.BytesIO(kept), map_location="cpu", weights_only=True))
    found = party.answer(message)
    state = io.BytesIO()
    torch.save(party.state(), state)
    context.state[RECORD] = ConfigRecord({"state": state.getvalue()})
    return found


def party_of(context: Context, task: Any) -> str:
    """Return the party of a node: the one it names, or the one with the number of its partition."""
    names = [party.name for party in task.parties]
    named = context.node_config.get("party")
    if named is None:
        number = context.node_config.get("partition-id")
        if number is None or not 0 <= int(number) < len(names):
            raise CounterpointError(f"a node names no party; start it with --node-config 'party=\"{names[0]}\"'")
        return names[int(number)]
    return str(named)


# -------------------------------------------------------------------------------------------------------------- the server

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    federation(grid, context)


def federation(grid: Grid, context: Context) -> None:
    """Run the federation over a grid of nodes, and write its run directory where the config names a folder."""
    experiment, seed = experiment_of(context)
    task = experiment.task()
    wanted = int(context.run_config.get("nodes", 0)) or len(task.parties)
    exchange = OverGrid(grid, wanted, float(context.run_config.get("wait", 60)), experiment.config.answer_seconds)
    out = str(context.run_config.get("out", ""))
    run = Run.create(Path(out), experiment.record(seed)) if out else None
    with recorded(run.path if run else None):
        federate(experiment, task, creamfl.CreamFLServer, exchange, seed, run=run, say=print)


class OverGrid:
    """Parties behind a grid of Flower's nodes: an exchange for `Federation`.

    Args:
        grid: the grid.
        nodes: number of nodes to wait for.
        wait: seconds to wait for nodes, and for their names.
        seconds: limit of an answer; 0 for none.
    """

    def __init__(self, grid: Grid, nodes: int, wait: float, seconds: float) -> None:
        self.grid, self.seconds = grid, seconds
        until = time.monotonic() + wait
        while len(found := list(grid.get_node_ids())) < nodes and time.monotonic() < until:
            time.sleep(0.5)
        if not found:
            raise CounterpointError(f"no node has connected within {wait:g} s; start a flower-supernode for each party")
        asked = [self._message(node, {"who": True}, "query") for node in found]
        self.nodes: dict[str, int] = {}
        for reply in grid.send_and_receive(asked, timeout=wait):
            if reply.has_error():
                print(f"note: node {reply.metadata.src_node_id} has no party: {reply.error.reason}")
            else:
                self.nodes[str(reply.content[RECORD]["party"])] = reply.metadata.src_node_id

    def _message(self, node: int, values: dict[str, Any], kind: str) -> Message:
        return Message(RecordDict({RECORD: ConfigRecord(values)}), dst_node_id=node, message_type=kind)

    def __call__(self, round: int, asked: Sequence[str], message: bytes) -> Answers:
        there = {self.nodes[name]: name for name in asked if name in self.nodes}
        late = f"late: no answer in {self.seconds:g} s" if self.seconds else "no answer"
        found: Answers = {
            name: TimeoutError(late if name in self.nodes else "no node has this party") for name in asked
        }
        sent = [self._message(node, {"message": message}, "train") for node in there]
        for reply in self.grid.send_and_receive(sent, timeout=self.seconds or None):
            name = there[reply.metadata.src_node_id]
            failed = reply.has_error()
            found[name] = ConnectionError(reply.error.reason) if failed else reply.content[RECORD]["message"]
        return found

    def state(self) -> dict[str, Any]:
        """Return nothing: the parties keep their state themselves."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Raise CounterpointError: the parties' state is not here."""
        raise CounterpointError("a federation on Flower cannot be resumed: start `flwr run` again")
