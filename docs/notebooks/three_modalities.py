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
# # Three modalities
#
# You have items in three forms: a picture, a text and a sound. Some information needs two of them together. Here the picture
# and the text alone tell nothing about the sound, but both together determine it. Methods for pairs cannot learn this. Symile
# can.
#
# You need the extra `language` ([installation](../guides/installation.md)).

# %% [markdown]
# ## Items in three forms
#
# A picture shows one to four dots. A text names a number from zero to three. The sound is a tone. Its pitch is the number of
# dots plus the named number, counted round four steps. With data of your own, fill the same dictionary with your pictures,
# texts and sounds.

# %%
import numpy as np

RATE, STEPS = 4000, 4
WORDS = ["zero", "one", "two", "three"]
PITCHES = 220.0 * 2 ** (np.arange(STEPS) * 7 / 12)  # in hertz


def dots(count, rng):
    """Draw `count` bright dots on a dark ground."""
    picture = rng.integers(0, 50, (16, 16, 3), dtype=np.uint8)
    corners = [(2, 2), (9, 2), (2, 9), (9, 9)]
    for place in rng.permutation(4)[:count]:
        x, y = corners[place] + rng.integers(-1, 2, 2)
        picture[y : y + 4, x : x + 4] = rng.integers(150, 256, 3)
    return picture


def tone(step, rng):
    """Return a tenth of a second of one pitch, with random loudness, phase and noise."""
    times = np.arange(RATE // 10) / RATE
    wave = np.sin(2 * np.pi * PITCHES[step] * times + rng.uniform(0, 6))
    return (rng.uniform(0.3, 0.9) * wave + rng.normal(0, 0.05, len(times))).astype(np.float32)


rng = np.random.default_rng(0)
count = 1200
shown, named = np.divmod(np.arange(count) % STEPS**2, STEPS)  # all pairs equally often: nothing else to learn from
part = np.arange(count) // STEPS**2 % 10
pitch = (shown + named) % STEPS
items = {
    "image": np.stack([dots(n + 1, rng) for n in shown]),
    "text": [WORDS[n] for n in named],
    "audio": np.stack([tone(n, rng) for n in pitch]),
    "split": np.select([part < 2, part == 2], ["test", "validation"], "train").tolist(),
}
{name: len(values) for name, values in items.items()}

# %% [markdown]
# ## Look at the data first
#
# Each column is one item: picture, text, and the beginning of the sound.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 6, figsize=(9, 3))
for column, n in enumerate((0, 3, 5, 6, 9, 14)):
    axes[0, column].imshow(items["image"][n])
    axes[0, column].set_title(f"{WORDS[named[n]]}, so tone {pitch[n]}", fontsize=8)
    axes[1, column].plot(items["audio"][n][:120], linewidth=0.8)
for place in axes.flat:
    place.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Train twice
#
# The first run contrasts pairs of modalities, as CLIP does. The second contrasts whole triples. Only the setting `objective`
# differs.

# %%
import counterpoint as cp

data = cp.own(items, size=16, rate=RATE, seconds=0.1)
settings = {
    "epochs": 30,
    "batch_size": 128,
    "image_encoder": "conv-s",
    "text_encoder": "text-64-1-4",
    "lr": 2e-3,
    "quiet": True,
}
pairs = cp.train("symile", data=data, objective="clip", name="pairs", **settings)
triples = cp.train("symile", data=data, objective="symile", name="triples", **settings)
triples

# %% [markdown]
# ## The measure
#
# Each test item has a picture and a text. The question is which tone belongs to them. Both runs score every tone for every pair
# of picture and text. A tone is right where its pitch is right. A guess is right in a quarter of the cases.

# %%
import pandas as pd

test = np.flatnonzero(np.array(items["split"]) == "test")
z = {
    name: run.encode(
        images=list(items["image"][test]),
        texts=[items["text"][n] for n in test],
        sounds=list(items["audio"][test]),
        progress=False,
    )
    for name, run in (("pairs", pairs), ("triples", triples))
}
scores = {
    "pairs": z["pairs"]["image"] @ z["pairs"]["audio"].T + z["pairs"]["text"] @ z["pairs"]["audio"].T,
    "triples": (z["triples"]["image"] * z["triples"]["text"]) @ z["triples"]["audio"].T,
}
right = {name: float((pitch[test][score.argmax(1)] == pitch[test]).mean()) for name, score in scores.items()}
pd.DataFrame({"right tone": right | {"chance": 1 / STEPS}}).round(3)

# %% [markdown]
# There are only sixteen pairs of dots and number. So chance moves the first row by a tenth and more, from run to run.

# %% [markdown]
# ## See it
#
# Rows are pairs of dots and number. Columns are pitches. A good model is bright exactly where the sum fits.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 4), sharey=True)
for place, (name, score) in zip(axes, scores.items(), strict=True):
    grid = np.zeros((STEPS * STEPS, STEPS))
    for row in range(STEPS * STEPS):
        here = (shown[test] == row // STEPS) & (named[test] == row % STEPS)
        for step in range(STEPS):
            grid[row, step] = score[np.ix_(here, pitch[test] == step)].mean()
    place.imshow(grid - grid.mean(1, keepdims=True), aspect="auto", cmap="viridis")
    place.set(title=f"{name}: {right[name]:.0%} right", xlabel="pitch", xticks=range(STEPS))
axes[0].set_yticks(
    range(STEPS * STEPS), [f"{r // STEPS + 1} dots, {WORDS[r % STEPS]}" for r in range(STEPS * STEPS)], fontsize=7
)
plt.show()

# %% [markdown]
# ## Next
#
# - Files of your own: `counterpoint train symile --data manifest:items.csv`, with the columns `image`, `caption` and `audio`.
# - Rows may lack a modality. [Search](../guides/search.md) describes how such items are learned from and found.
# - Videos have pictures and sound, too. Continue with [Violence in videos](violence.md).
