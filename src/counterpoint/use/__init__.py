"""Use a trained run: `detect` finds the moments in video files."""
