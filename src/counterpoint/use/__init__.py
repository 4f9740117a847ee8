"""Use a trained run: detect moments in videos, predict classes, ask, generate, and pass it to other programs and hubs."""
