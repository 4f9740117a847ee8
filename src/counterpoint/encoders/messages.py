"""Messages of chats, and the mark of a picture in their texts. Importing this module does not import torch."""

from __future__ import annotations

from typing import NamedTuple

ROLES = ("system", "user", "assistant")
IMAGE = "<image>"  # stands for a picture of the chat, in order


class Message(NamedTuple):
    """One turn of a chat."""

    role: str  # of ROLES
    text: str
