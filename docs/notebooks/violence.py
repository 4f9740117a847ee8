# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Violence in videos
#
# You have videos that are sorted into two groups: violence occurs somewhere, or it does not. No times are known. You want the
# times, in new videos. The method is MACIL-SD. It reads picture and sound, also where one comes later than the other.
#
# You need the extra `demo` ([installation](../guides/installation.md)) and `pip install --no-deps arcade`. That package has the
# sprites that are drawn here.

# %% [markdown]
# ## Videos to learn from
#
# The source `arcade` draws clips of a game, with explosions and shots. It knows when they occur, but training sees one label
# for each clip. Drawing takes some seconds, and the features are kept for the next time.

# %%
import counterpoint as cp

SOURCE = "arcade?train=96&valid=8&test=32"
clips = cp.data.load(SOURCE)
violent = sum(bag.label for bag in clips.train)
print(f"{len(clips.train)} training clips, {violent:.0f} of them violent; {len(clips.test)} test clips")

# %% [markdown]
# ## Train on one label for each clip

# %%
run = cp.train("macil-sd", data=SOURCE, epochs=40, batch_size=16, name="violence", quiet=True)
run

# %% [markdown]
# ## How well does it find the times?
#
# `av_ap` is the average precision over frames, from picture and sound together. A frame has the score of its snippet, which lasts
# two thirds of a second. `chance` is the share of violent frames, which a guess reaches.

# %%
import pandas as pd

table = pd.DataFrame({"after training": run.metrics, "chance": run.metrics.chance})
table.loc[[name for name in run.metrics if name.endswith("_ap")]].round(3)

# %% [markdown]
# ## A new video file
#
# This cell writes a video that the model has not seen. With a video of your own, set `film` to its path.

# %%
from pathlib import Path

from counterpoint.data import arcade
from counterpoint.data.worlds.sprites.scenes import spans

clip = next(c for c in (arcade.script("test", n) for n in range(200, 300)) if len(spans(c)) == 2)
film = Path("film.mp4")
arcade.write_clip(clip, film)
print(
    f"{film}: {film.stat().st_size / 1e6:.1f} MB, true moments: {[(round(a, 1), round(b, 1)) for a, b in spans(clip)]}"
)

# %% [markdown]
# ## Find the moments
#
# The detector reads the file in a stream. Each moment has a start, an end and the highest score in it.

# %%
from counterpoint.use.detect import Detector

found = Detector(run.run).detect(film, truth=spans(clip))
pd.DataFrame([{"start": m.start, "end": m.end, "score": m.score} for m in found.intervals]).round(2)

# %% [markdown]
# ## See it
#
# The curves are the scores of picture, of sound, and of both. Grey areas are the true moments, which the model never saw.

# %%
import matplotlib.pyplot as plt
import numpy as np

times = (np.arange(len(found.score)) + 0.5) * found.snippet_seconds
figure, axes = plt.subplots(figsize=(9, 3))
for start, end in spans(clip):
    axes.axvspan(start, end, color="0.85")
axes.plot(times, found.visual, linewidth=0.8, label="picture")
axes.plot(times, found.audio, linewidth=0.8, label="sound")
axes.plot(times, found.score, linewidth=2, label="both")
axes.axhline(found.threshold, linewidth=0.8, color="0.4", linestyle="--")
axes.set(xlabel="seconds", ylabel="probability of violence", ylim=(0, 1), xlim=(0, found.duration))
axes.legend(frameon=False, ncol=3, loc="upper right")
plt.show()

# %% [markdown]
# Pictures at the peaks show why the model reacted.

# %%
import io

from PIL import Image

if found.thumbnails:
    figure, axes = plt.subplots(1, len(found.thumbnails), figsize=(3 * len(found.thumbnails), 2), squeeze=False)
    for place, thumbnail in zip(axes[0], found.thumbnails, strict=True):
        place.imshow(Image.open(io.BytesIO(thumbnail.jpeg)))
        place.set_title(f"{thumbnail.time:.1f} s", fontsize=9)
        place.axis("off")
    plt.show()

# %% [markdown]
# ## Next
#
# - Your own videos in `mine/train/violent`, `mine/train/normal` and so on: `data="videos:mine"`. The guide [Your own
#   videos](../guides/detection.md) describes the folders, trained backbones and thresholds.
# - On the command line, `counterpoint detect FOLDER --out found` writes a page, CSV, WebVTT and cut lists for editors.
# - A smaller network from a larger one: continue with [Distil a CLIP](distil_clip.md).
