"""CreamFL on Flower: equal to the federation in one process, in the simulation engine and between processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterpoint.engine.run import Run
from counterpoint.experiment import Experiment
from counterpoint.tasks import federations

flwr = pytest.importorskip("flwr", reason="Flower is not installed: pip install 'counterpoint[federated]'")

DATA = "digit-parties?vectors=1&train=40&test=30&items=40&pairs=1&images=1&texts=1"
SETTINGS = {
    "rounds": 2,
    "party_epochs": 1,
    "vector_encoder": "relu-8",
    "party_vector_encoder": "relu-6,relu-8-4",
    "embedding": 4,
    "batch_size": 16,
    "party_batch_size": 16,
}
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    """Give this process the identity of a Flower task, which messages carry."""
    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)


class Context:
    """A context of Flower's, as far as the apps use it."""

    def __init__(self, number=0, out="", **node):
        from flwr.app import RecordDict

        self.run_config = {
            "data": DATA,
            "settings": json.dumps(SETTINGS),
            "seed": 0,
            "out": out,
            "nodes": 3,
            "wait": 60,
        }
        self.node_config = {"partition-id": number} if number is not None else node
        self.state = RecordDict()


class Grid:
    """A grid in this process: every node runs the client's functions; those in `gone` never answer."""

    def __init__(self, gone=()):
        self.contexts = {10 + n: Context(n) for n in range(3)}
        self.gone, self.bytes = gone, []

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, timeout=None):
        from flwr.app import Error, Message, RecordDict

        from counterpoint.use import flower

        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "query":
                values = {
                    "party": flower.party_of(self.contexts[node], flower.experiment_of(self.contexts[node])[0].task())
                }
            elif node in self.gone:
                yield Reply(node, None, Error(code=1, reason="the node is gone"))
                continue
            else:
                assert set(message.content[flower.RECORD]) == {"message"}
                self.bytes.append(message.content[flower.RECORD]["message"])
                values = None
            if values is None:
                found = flower.answer_to(message.content[flower.RECORD]["message"], self.contexts[node])
                values = {"message": found}
            yield Reply(node, RecordDict({flower.RECORD: flower.ConfigRecord(values)}), None)
        assert Message


class Reply:
    def __init__(self, node, content, error):
        self.metadata = type("Metadata", (), {"src_node_id": node})
        self.content, self.error = content, error

    def has_error(self):
        return self.error is not None


def in_process(tmp_path):
    experiment = Experiment.resolve("creamfl", DATA, overrides=SETTINGS)
    run = Run.create(tmp_path / "one", experiment.record(0), "r")
    experiment.run(0, run=run)
    return run


def test_over_a_grid_the_figures_are_those_of_one_process(tmp_path):
    from counterpoint.use import flower

    grid = Grid()
    flower.federation(grid, Context(out=str(tmp_path / "flower")))
    (path,) = (tmp_path / "flower").iterdir()
    one, other = in_process(tmp_path), Run.open(path)
    assert other.metrics() == one.metrics()
    assert (path / federations.LOG).read_text() == (one.path / federations.LOG).read_text()
    assert len(grid.bytes) == 6
    assert all(set(federations.unpack(message)[1]) == {"image", "text"} for message in grid.bytes)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_node_that_fails_is_named_in_the_log(tmp_path):
    from counterpoint.use import flower

    flower.federation(Grid(gone={11}), Context(out=str(tmp_path)))
    (path,) = tmp_path.iterdir()
    log = [json.loads(line) for line in (path / federations.LOG).read_text().splitlines()]
    assert [line["left_out"] for line in log] == [{"images-1": "dropped out: ConnectionError('the node is gone')"}] * 2


def test_a_node_without_a_party_is_named():
    from counterpoint.errors import CounterpointError
    from counterpoint.use import flower

    context = Context(None)
    with pytest.raises(CounterpointError, match="a node names no party; start it with --node-config"):
        flower.party_of(context, flower.experiment_of(context)[0].task())
    context = Context(None, party="texts-1")
    assert flower.party_of(context, flower.experiment_of(context)[0].task()) == "texts-1"


PROJECT = """
[project]
name = "parties"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "counterpoint"

[tool.flwr.app.components]
serverapp = "counterpoint.use.flower:server"
clientapp = "counterpoint.use.flower:client"

[tool.flwr.app.config]
data = "{data}"
settings = '{settings}'
seed = 0
out = "{out}"
nodes = 3
wait = 120
"""


def free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.mark.slow
def test_flwr_run_against_processes_ends_as_one_process_does(tmp_path):
    app, home, ports = tmp_path / "app", tmp_path / "home", [free_port() for _ in range(4)]
    app.mkdir()
    home.mkdir()
    said = {"data": DATA, "settings": json.dumps(SETTINGS), "out": str(tmp_path / "out")}
    (app / "pyproject.toml").write_text(PROJECT.format(**said))
    place = f"127.0.0.1:{ports[0]}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{place}"\ninsecure = true\n'
    )
    source = Path(federations.__file__).parents[2]
    variables = os.environ | {"FLWR_HOME": str(home), "PYTHONPATH": str(source), "PATH": f"{BIN}:{os.environ['PATH']}"}
    variables |= {"FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    started = []

    def start(name, *words):
        with (tmp_path / f"{name}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [BIN / words[0], *words[1:]], stdout=log, stderr=log, env=variables, start_new_session=True
                )
            )

    try:
        where = ["--host", "127.0.0.1", "--port"]
        start(
            "link", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation", *where, str(ports[0])
        )
        for port, party in zip(ports[1:], ("pairs-1", "images-1", "texts-1"), strict=True):
            named = ["--node-config", f'party="{party}"']
            start(party, "flower-supernode", "--insecure", "--superlink", place, *where, str(port), *named)
        until = time.monotonic() + 400
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", ports[0]), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        subprocess.run([BIN / "flwr", "run", str(app), "here"], env=variables, check=True, timeout=120)
        while not list((tmp_path / "out").glob("*/model.safetensors")):
            assert time.monotonic() < until, (tmp_path / "link.log").read_text()[-3000:]
            time.sleep(1)
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    (path,) = (tmp_path / "out").iterdir()
    assert Run.open(path).metrics() == in_process(tmp_path).metrics()
