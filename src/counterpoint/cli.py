"""Hold the entry point of the program `counterpoint`; the commands are in `counterpoint.commands`."""

from __future__ import annotations

from counterpoint.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
