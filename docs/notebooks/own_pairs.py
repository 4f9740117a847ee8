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
# # Your own pairs of picture and text
#
# You have a table: a picture and a caption in each row. In a minute you can search the pictures with words. The method is CLIP:
# a network for pictures and a network for texts learn one common space.
#
# You need the extra `language` ([installation](../guides/installation.md)) and pandas.

# %% [markdown]
# ## A table of pictures and captions
#
# This cell draws 600 pictures and writes their captions. With data of your own, read your table with pandas instead. The column
# `image` may hold paths, bytes or Pillow images.

# %%
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 230), "yellow": (230, 210, 40)}
SHAPES = ["ball", "box", "arrow"]
PLACES = {"left": 9, "middle": 16, "right": 23}


def draw(colour, shape, place, rng):
    """Draw one coloured shape on a noisy grey ground."""
    picture = Image.fromarray(rng.integers(90, 140, (32, 32, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    x, y, r = PLACES[place], int(rng.integers(9, 23)), int(rng.integers(5, 8))
    if shape == "ball":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    elif shape == "box":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - r), (x - r, y), (x + r, y)], fill=COLOURS[colour])
        pen.rectangle((x - 2, y, x + 2, y + r), fill=COLOURS[colour])
    return picture


rng = np.random.default_rng(0)
rows = []
for number in range(600):
    colour, shape, place = (str(rng.choice(list(names))) for names in (COLOURS, SHAPES, PLACES))
    words = rng.choice(["a {c} {s} at the {p}", "at the {p}: one {c} {s}", "{c} {s}, {p} side"])
    caption = words.format(c=colour, s=shape, p=place) + f", number {number}"
    rows.append({"image": draw(colour, shape, place, rng), "caption": caption})
frame = pd.DataFrame(rows)
frame.assign(image="Pillow image").head(4)

# %% [markdown]
# ## Look at the data first

# %%
from textwrap import fill

import matplotlib.pyplot as plt


def show(pictures, titles, *, width=6):
    """Show pictures with their titles."""
    height = -(-len(pictures) // width)
    figure, axes = plt.subplots(height, width, figsize=(1.9 * width, 2.1 * height), squeeze=False)
    for place, picture, title in zip(axes.flat, pictures, titles, strict=False):
        place.imshow(picture)
        place.set_title(fill(title, 22), fontsize=8)
    for place in axes.flat:
        place.axis("off")
    plt.show()


show(frame.image[:6], frame.caption[:6])

# %% [markdown]
# ## Train
#
# The columns are recognised by their names. The tokenizer of the texts is learned from the captions, so nothing is downloaded.

# %%
import counterpoint as cp

run = cp.train(
    "clip",
    data=frame,
    epochs=14,
    batch_size=64,
    image_encoder="conv-s",
    text_encoder="text-64-2-4",
    name="pairs",
    quiet=True,
)
run

# %% [markdown]
# ## How well does it search?
#
# `caption_to_image_r1` is the share of captions whose own picture comes first among all test pictures. `r5` accepts the first
# five. Many pictures here show the same, and their captions differ by a number that no picture shows. So even a perfect model
# is far from 1.

# %%
names = [name for name in run.metrics if name.endswith(("_r1", "_r5"))]
table = pd.DataFrame({"after training": run.metrics, "chance": run.metrics.chance}).loc[names].round(3)
table

# %% [markdown]
# ## Search with words
#
# `cp.embed` writes the embeddings of the whole set into one Parquet file. `cp.search` compares a query with them.

# %%
cp.embed(run, "pairs.parquet", data=frame)
for words in ("a yellow arrow at the left", "one blue ball"):
    hits = cp.search(run, words, "pairs.parquet", k=6, modality="image")
    print(words)
    print(hits)

# %% [markdown]
# The rows of a query and of the pictures can also be compared by hand. `encode` returns rows of length 1.

# %%
queries = ["a yellow arrow at the left", "a red box at the right", "a green ball at the middle"]
both = run.encode(images=list(frame.image), texts=queries, progress=False)
best = np.argsort(-(both["caption"] @ both["image"].T), axis=1)[:, :5]
for words, found in zip(queries, best, strict=True):
    show([frame.image[n] for n in found], [words] + [""] * 4, width=5)

# %% [markdown]
# A table says the same in numbers: how many of the first ten pictures of each query fit its colour and its shape.

# %%
first = np.argsort(-(both["caption"] @ both["image"].T), axis=1)[:, :10]
fits = {
    words: {
        part: float(np.mean([word in frame.caption[n] for n in found]))
        for part, word in (("colour", words.split()[1]), ("shape", words.split()[2]))
    }
    for words, found in zip(queries, first, strict=True)
}
pd.DataFrame(fits).T

# %% [markdown]
# ## Next
#
# - Larger networks with published weights: `image_encoder="timm:resnet50", pretrained=True, text_encoder="minilm"`.
# - The same from files: `counterpoint train clip --data csv:items.csv`, or `parquet:`, `lance:`, `litdata:`, `webdataset:`.
# - Do your items have sounds, too? Continue with [Three modalities](three_modalities.md).
