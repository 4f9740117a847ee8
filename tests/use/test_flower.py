"""CreamFL on Flower: equal to the federation in one process, in the simulation engine and between processes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
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

flwr = pytest.importorskip("flwr", reason="Flower is not installed here; make test-flower has it")
psutil = pytest.importorskip("psutil", reason="psutil is not installed, which tells the processes' connections")

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
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


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
    """A grid in this process: every node runs the client's functions.

    Those in `gone` have an error, those in `late` never answer, and those in `wrong` answer with NaN.
    """

    def __init__(self, gone=(), late=(), wrong=()):
        self.contexts = {10 + n: Context(n) for n in range(3)}
        self.gone, self.late, self.wrong, self.bytes = gone, late, wrong, []

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
            elif node in self.late:
                continue
            else:
                assert set(message.content[flower.RECORD]) == {"message"}
                self.bytes.append(message.content[flower.RECORD]["message"])
                values = None
            if values is None:
                found = flower.answer_to(message.content[flower.RECORD]["message"], self.contexts[node])
                values = {"message": spoilt(found) if node in self.wrong else found}
            yield Reply(node, RecordDict({flower.RECORD: flower.ConfigRecord(values)}), None)
        assert Message


def spoilt(message):
    """Return an answer with NaN in it."""
    facts, rows = federations.unpack(message)
    rows = {name: value.fill_(float("nan")) for name, value in rows.items()}
    return federations.pack(rows, round=int(facts["round"]), sender=facts["sender"])


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


@pytest.mark.parametrize(
    ("way", "said"),
    [("late", "late: no answer in 90 s"), ("wrong", "its rows of image hold NaN or infinite values")],
)
def test_a_node_that_is_late_or_sends_nan_is_named_and_the_round_goes_on(way, said, tmp_path):
    from counterpoint.use import flower

    context = Context(out=str(tmp_path))
    context.run_config["settings"] = json.dumps(SETTINGS | {"answer_seconds": 90, "rounds": 1})
    flower.federation(Grid(**{way: {11}}), context)
    (path,) = tmp_path.iterdir()
    (log,) = [json.loads(line) for line in (path / federations.LOG).read_text().splitlines()]
    assert log["left_out"] == {"images-1": said}
    assert Run.open(path).metrics()[-1]["train/parties"] == 2


def test_a_node_without_a_party_is_named():
    from counterpoint.errors import CounterpointError
    from counterpoint.use import flower

    context = Context(None)
    with pytest.raises(CounterpointError, match="a node names no party; start it with --node-config"):
        flower.party_of(context, flower.experiment_of(context)[0].task())
    context = Context(None, party="texts-1")
    assert flower.party_of(context, flower.experiment_of(context)[0].task()) == "texts-1"


class Averaging:
    """A grid whose three nodes train a network with a counter: node 3 sends NaN at weight 0, node 4 has an error in round 2."""

    def __init__(self, weights=(2, 1, 0, 1)):
        self.weights, self.round = weights, 0

    def get_node_ids(self):
        return [1, 2, 3, 4]

    def send_and_receive(self, messages, timeout=None):
        from flwr.app import ArrayRecord, Error, MetricRecord, RecordDict

        messages = list(messages)
        self.round += bool(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            if node == 4 and self.round == 2:
                yield Reply(node, None, Error(code=1, reason="it lost its network"))
                continue
            state = message.content["arrays"].to_torch_state_dict()
            state["w"] += float("nan") if node == 3 else node
            state["steps"] += 1
            seen = MetricRecord({"num-examples": self.weights[node - 1], "loss": float(node)})
            yield Reply(node, RecordDict({"arrays": ArrayRecord(state), "metrics": seen}), None)


def averaged(weights=(2, 1, 0, 1)):
    import torch
    from flwr.app import ArrayRecord

    from counterpoint.use.flower_mean import MeanOfParties

    strategy = MeanOfParties(min_available_nodes=4, min_train_nodes=4, fraction_evaluate=0.0)
    state = {"w": torch.zeros(2), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    found = strategy.start(Averaging(weights), ArrayRecord(state), num_rounds=2)
    return strategy, found, state


@pytest.fixture
def logged():
    """Return what Flower's logger says, once it has said it."""
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    yield handler.stream
    logger.removeHandler(handler)


def test_the_strategy_averages_votes_and_leaves_out_by_name(logged):
    import torch

    strategy, found, state = averaged()
    assert strategy.left_out == {
        1: {"3": "it has no examples"},
        2: {"3": "it has no examples", "4": "dropped out: it lost its network"},
    }
    after = found.arrays.to_torch_state_dict()
    assert {name: value.dtype for name, value in after.items()} == {name: v.dtype for name, v in state.items()}
    torch.testing.assert_close(after["w"], torch.full((2,), (2 * 1 + 2 + 4) / 4 + (2 * 1 + 2) / 3))
    assert int(after["steps"]) == 9
    assert after["mask"].tolist() == [True, False]
    assert found.train_metrics_clientapp[2]["loss"] == pytest.approx(4 / 3)
    assert "round 2 goes on without node 4: dropped out" in logged.getvalue()


def test_where_all_are_empty_the_server_keeps_its_arrays():
    strategy, found, _ = averaged((0, 0, 0, 0))
    assert len(strategy.left_out[1]) == 4
    assert not found.arrays or found.arrays.to_torch_state_dict()["steps"] == 7


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


class Processes:
    """Processes of Flower's for one test: an app, a SuperLink on a free port, and what more the test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.started = folder, free_port(), []
        self.place = f"127.0.0.1:{self.port}"
        self.partners: set[str] = set()  # addresses that the processes were connected with
        app, home = folder / "app", folder / "home"
        app.mkdir()
        home.mkdir()
        said = {"data": DATA, "settings": json.dumps(SETTINGS), "out": str(folder / "out")}
        (app / "pyproject.toml").write_text(PROJECT.format(**said))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.place}"\ninsecure = true\n'
        )
        source = Path(federations.__file__).parents[2]
        self.variables = os.environ | {"FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.variables |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self.variables |= {"PYTHONPATH": str(source)}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.started:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def start(self, name: str, *words: str) -> None:
        """Start a program that writes to a log of this name."""
        with (self.folder / f"{name}.log").open("w") as log:
            words = [BIN / words[0], *words[1:]]
            streams = {"stdout": log, "stderr": log, "env": self.variables, "start_new_session": True}
            self.started.append(subprocess.Popen(words, **streams))

    def connect(self, parties) -> None:
        """Start the SuperLink and a SuperNode for each party."""
        self.start(*LINK, str(self.port))
        for party in parties:
            words = ["--superlink", self.place, "--host", "127.0.0.1", "--port", str(free_port())]
            self.start(party, "flower-supernode", "--insecure", *words, "--node-config", f'party="{party}"')

    def submit(self, *options: str) -> None:
        """Start the app with `flwr run` as soon as the SuperLink answers."""
        until = time.monotonic() + 400
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        subprocess.run(
            [BIN / "flwr", "run", self.folder / "app", "here", *options], env=self.variables, check=True, timeout=120
        )

    def run(self, *options: str) -> Run:
        """Start the app, and return its run directory when it is finished."""
        self.submit(*options)
        until = time.monotonic() + 400
        while not list((self.folder / "out").glob("*/model.safetensors")):
            assert time.monotonic() < until, (self.folder / "link.log").read_text()[-3000:]
            self.look()
            time.sleep(0.5)
        (path,) = (self.folder / "out").iterdir()
        return Run.open(path)

    def look(self) -> None:
        """Note the addresses that the processes are connected with."""
        for started in self.started:
            with contextlib.suppress(psutil.Error):
                one = psutil.Process(started.pid)
                for process in (one, *one.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        self.partners |= {c.raddr.ip for c in process.net_connections("inet") if c.raddr}


LINK = (
    "link",
    "flower-superlink",
    "--insecure",
    "--disable-runtime-dependency-installation",
    "--host",
    "127.0.0.1",
    "--port",
)


@pytest.mark.slow
def test_flwr_run_against_processes_ends_as_one_process_does(tmp_path):
    with Processes(tmp_path) as flower:
        flower.connect(["pairs-1", "images-1", "texts-1"])
        assert flower.run().metrics() == in_process(tmp_path).metrics()
        assert flower.partners
        assert flower.partners <= LOOPBACK


@pytest.mark.slow
def test_flower_s_simulation_engine_ends_as_one_process_does(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation engine needs Ray: pip install 'flwr[simulation]'")
    with Processes(tmp_path) as flower:
        flower.start(*LINK, str(flower.port), "--simulation")
        run = flower.run("--federation-config", "num-supernodes=3 client-resources-num-cpus=1")
        assert run.metrics() == in_process(tmp_path).metrics()
        assert (run.path / federations.LOG).read_text() == (tmp_path / "one" / "r" / federations.LOG).read_text()
