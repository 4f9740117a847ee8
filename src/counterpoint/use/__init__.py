"""Use a trained run: `detect` finds moments in video files, `export` and `hub` pass it to other programs."""
