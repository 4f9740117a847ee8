"""Freed memory is kept where the C library can."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from counterpoint.engine import memory

# What glibc itself says it holds: page faults would depend on the machine's kernel.
CODE = """
import ctypes
import torch
from counterpoint.engine.memory import keep_freed_memory
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
def show():
    before = library.mallinfo2()
    parts = [torch.ones(10_000_000) for _ in range(4)]
    during = library.mallinfo2()
    del parts
    after = library.mallinfo2()
    print(during.hblks - before.hblks, after.fordblks - before.fordblks)
show()
assert keep_freed_memory()
show()
"""


def held() -> list[tuple[int, int]]:
    """Count the blocks that four tensors of 40 MB have mapped, and the heap's free bytes after their deletion.

    Return both for a plain process, and for the same process once it keeps freed memory.
    """
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return [(int(mapped), int(free)) for mapped, free in (line.split() for line in done.stdout.splitlines())]


def test_freed_memory_stays_in_the_process():
    if platform.libc_ver()[0] != "glibc":
        assert not memory.keep_freed_memory()
        return
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc before 2.33 does not say what it holds")
    (mapped_before, free_before), (mapped, free) = held()
    assert mapped_before == 4
    assert free_before < 40_000_000
    assert mapped == 0
    assert free >= 150_000_000


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
