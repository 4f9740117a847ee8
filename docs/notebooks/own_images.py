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
# You need `pip install counterpoint` and no GPU.

# %% [markdown]
# ## A folder of pictures
#
# This cell draws 480 small pictures into `photos/CLASS/`. With pictures of your own, skip it and name your folder below.

# %%
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ["circle", "square", "triangle", "cross"]


def draw(kind, rng):
    """Draw one shape in a random colour, at a random place, on a noisy ground."""
    size, radius = 32, int(rng.integers(6, 11))
    x, y = rng.integers(radius + 1, size - radius - 1, 2)
    colour = tuple(rng.integers(90, 256, 3).tolist())
    picture = Image.fromarray(rng.integers(0, 70, (size, size, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        pen.line((x - radius, y, x + radius, y), fill=colour, width=4)
        pen.line((x, y - radius, x, y + radius), fill=colour, width=4)
    return picture


rng = np.random.default_rng(0)
for number in range(480):
    kind = CLASSES[number % 4]
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

# %%
import counterpoint as cp

run = cp.train(
    "simclr", data="imagefolder:photos?size=32", epochs=12, batch_size=64, encoder="conv-s", name="shapes", quiet=True
)
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
z.shape

# %%
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
# - `run.page` is a page with curves and settings. `counterpoint finetune --encoder run:runs/shapes` trains a classifier on few
#   labels.
# - Do your pictures have captions? Continue with [Your own pairs](own_pairs.md).
