"""Start functions and commands in processes of their own, which have the imports of the tests' server (see conftest.py)."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def exit_code(function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> int:
    """Run a module's function in a process of its own, on one thread. Return its exit code, negative for a signal.

    Args:
        function: A function at the top of a module.
        arguments: Its arguments, which must pickle.
        timeout: Seconds after which the process is killed and AssertionError raised.
    """
    process = get_context("forkserver").Process(target=_on_one_thread, args=(function, *arguments))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{function.__name__} did not end within {timeout} s")
    return process.exitcode


def _on_one_thread(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def command_over_processes(words: Sequence[str], folder: Path, processes: int = 2) -> str:
    """Run a command of `counterpoint` in processes that have the environment of torchrun. Return what all print together.

    Args:
        words: The command and its options.
        folder: An existing folder for the output of each process.
        processes: Number of processes, at least 2.
    """
    mp.start_processes(
        _command, (list(words), folder, processes, free_port()), nprocs=processes, start_method="forkserver"
    )
    return "".join((folder / f"printed-{rank}.txt").read_text() for rank in range(processes))


def _command(rank: int, words: list[str], folder: Path, processes: int, port: int) -> None:
    from counterpoint import cli

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main(words)
    (folder / f"printed-{rank}.txt").write_text(printed.getvalue())
    assert code == 0, printed.getvalue()
