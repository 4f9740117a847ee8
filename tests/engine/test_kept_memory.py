"""Freed memory is kept where the C library can."""

from __future__ import annotations

import platform
import subprocess
import sys

from counterpoint.engine import memory

CODE = """
import resource, sys
import torch
from counterpoint.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    parts = [torch.ones(1_000_000) for _ in range(8)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_step_asks_the_system_for_fewer_pages():
    if platform.libc_ver()[0] != "glibc":
        assert not memory.keep_freed_memory()
        return
    assert faults("keep") < faults("plain") / 2


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
