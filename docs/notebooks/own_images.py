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
# # Your own images
#
# You have a folder of pictures, and few of them have labels. In a minute you get an encoder that places similar pictures close
# together. The method is SimCLR. It learns without labels: two changed copies of one picture belong together, all other
# pictures do not.
#
# You need Counterpoint ([installation](../guides/installation.md)) and no GPU.

# %% [markdown]
# ## A folder of pictures
#
# This cell draws 480 pictures of fruit into `photos/CLASS/`. With pictures of your own, skip it and name your folder below.

# %%
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Of each class: its hue in degrees, its height and its width as shares of the size.
CLASSES = {"apple": (0, 1.0, 1.0), "banana": (52, 0.5, 1.4), "lime": (95, 0.8, 1.0), "plum": (280, 1.2, 0.8)}


def draw(kind, rng):
    """Draw a fruit with light and shade, at a random place, size and angle, on a table of random colour."""
    hue, height, width = CLASSES[kind]
    colour = colorsys.hsv_to_rgb((hue + rng.normal(0, 12)) % 360 / 360, rng.uniform(0.5, 1), rng.uniform(0.4, 1))
    size = rng.uniform(6, 10)
    layer = Image.new("L", (32, 32))
    ImageDraw.Draw(layer).ellipse(
        (16 - size * width, 16 - size * height, 16 + size * width, 16 + size * height), fill=255
    )
    layer = layer.rotate(rng.uniform(0, 180), translate=tuple(rng.integers(-5, 6, 2).tolist()))
    mask = np.asarray(layer)[..., None] / 255
    light = np.linspace(rng.uniform(0.5, 1.2), rng.uniform(0.5, 1.2), 32)[:, None, None]
    table = rng.uniform(20, 235) + rng.normal(0, 12, 3)
    pixels = (table * (1 - mask) + 255 * np.array(colour) * mask) * light + rng.normal(0, 8, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


rng = np.random.default_rng(0)
for number in range(480):
    kind = list(CLASSES)[number % len(CLASSES)]
    folder = Path("photos") / kind
    folder.mkdir(parents=True, exist_ok=True)
    draw(kind, rng).save(folder / f"{number:03}.png")

# %% [markdown]
# ## Look at the data first
#
# One row for each class. If a class looks wrong here, no method will mend it.

# %%
import matplotlib.pyplot as plt


def show(rows, titles):
    """Show rows of picture files, with a title for each row."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(len(rows[0]), 1.1 * len(rows)), squeeze=False)
    for line, files, title in zip(axes, rows, titles, strict=True):
        for place, file in zip(line, files, strict=True):
            place.imshow(Image.open(file))
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    plt.show()


show([sorted(Path("photos", kind).glob("*.png"))[:8] for kind in CLASSES], CLASSES)

# %% [markdown]
# ## Train
#
# `imagefolder:photos` reads the folder. A fifth of the pictures becomes the test split, and a tenth of the others the valid
# split. Equal pictures never stand in two splits. The labels are used for the measurement only.
#
# The setting `recipe` names the changes that make two copies of a picture. They must keep what you care about. Colour tells fruit
# apart. So this recipe adds noise, changes the brightness a little and hides a small square. The default also changes colours.

# %%
import counterpoint as cp

settings = {
    "encoder": "conv-s",
    "recipe": "digits-easy",
    "epochs": 15,
    "batch_size": 64,
    "optimizer": "adam",
    "lr": 0.004,
}
run = cp.train("simclr", data="imagefolder:photos?size=32", name="fruit", quiet=True, **settings)
run

# %% [markdown]
# ## What did it learn?
#
# `knn_accuracy` asks the nearest training pictures for the class of a test picture. `chance` is the accuracy of a guess. The
# plain pixels are the first row, because they may be good enough.

# %%
import pandas as pd
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

files = sorted(Path("photos").rglob("*.png"))
names = [file.parent.name for file in files]
pixels = np.stack([np.asarray(Image.open(file), np.float32).ravel() for file in files])
before = cross_val_score(KNeighborsClassifier(), pixels, names).mean()
table = {"pixels": before, "after training": run.metrics["knn_accuracy"], "chance": run.metrics.chance["knn_accuracy"]}
pd.DataFrame({"knn_accuracy": table}).round(3)

# %% [markdown]
# ## Find similar pictures
#
# `encode` takes paths, Pillow images or arrays, and returns one row for each picture. The rows have length 1, so a product of
# two rows is their similarity. Each line shows a picture, and then the most similar ones.

# %%
z = run.encode(images=files, progress=False)
queries = [3, 150, 270, 400]
nearest = np.argsort(-(z[queries] @ z.T), axis=1)[:, :7]
show([[files[n] for n in row] for row in nearest], [files[n].parent.name for n in queries])

# %% [markdown]
# ## A map of all pictures
#
# Principal components show the embeddings on a plane. Colours are the classes, which the training never saw.

# %%
from sklearn.decomposition import PCA

flat = PCA(2).fit_transform(z)
figure, axes = plt.subplots(figsize=(5, 4))
for kind in CLASSES:
    here = [file.parent.name == kind for file in files]
    axes.scatter(*flat[here].T, s=9, label=kind)
axes.set(xticks=[], yticks=[], title="480 pictures, learned without labels")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Next
#
# - Your own folder: `cp.train("simclr", data="imagefolder:FOLDER", epochs=100, encoder="timm:resnet18")`.
# - `run.page` is a page with curves and settings.
# - `counterpoint finetune runs/fruit --data imagefolder:photos` trains a classifier on few labels.
# - Do your pictures have captions? Continue with [Your own pairs](own_pairs.md).
