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
# # Add a system
#
# You have an idea for a loss. You want to train with it, and know whether it is better than a published method. A *system* is a
# file with settings and a learner. The library brings views, encoders, the loop, measurement, pages, resumption and comparison.
#
# You need Counterpoint ([installation](../guides/installation.md)). In a checkout of the project, `make new SLUG=my-method`
# writes this file, its test and its claim. [Architecture](../architecture.md) describes that way. Here the system stays yours,
# outside the package.

# %% [markdown]
# ## A loss
#
# The idea: similarities of two views, as in SimCLR, but the positive has to win by a margin. With a margin of 0 it is the usual
# cross-entropy. A loss is a function of tensors.

# %%
import torch
import torch.nn.functional as F


def margin_nt_xent(z1, z2, temperature=0.5, margin=0.2):
    """Compute cross-entropy over similarities, where the positive's similarity is lowered by a margin."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    similarity = z @ z.T
    own = torch.arange(2 * n, device=z.device)
    partner = (own + n) % (2 * n)
    similarity = similarity.index_put((own, partner), similarity[own, partner] - margin)
    logits = (similarity / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, partner)


# %% [markdown]
# ## Check it before you train
#
# Three quick questions. Is it the known loss without a margin? Does a margin raise it? Do gradients flow?

# %%
import counterpoint as cp

torch.manual_seed(0)
a, b = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
known = cp.functional.of("simclr").nt_xent(a, b, 0.5)
torch.testing.assert_close(margin_nt_xent(a, b, margin=0.0), known)
raised = margin_nt_xent(a, b, margin=0.2)
raised.backward()
print(f"margin 0: {known:.4f}, margin 0.2: {raised:.4f}, largest gradient {a.grad.abs().max():.4f}")

# %% [markdown]
# ## The system
#
# The settings are a dataclass. Each has a default and a sentence that explains it. The learner computes the loss of a batch.
# `ViewsLearner` brings the encoder, the projector, the optimiser and the embeddings.

# %%
from dataclasses import dataclass

from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner


@dataclass
class MarginConfig(ViewsConfig):
    """Settings of contrast with a margin."""

    temperature: float = 0.5
    """Temperature of the loss."""
    margin: float = 0.2
    """Similarity by which the positive has to win."""


class MarginContrast(ViewsLearner):
    """Contrast two views, with a margin."""

    def loss(self, batch):
        z1, z2 = self.project(batch["views"])
        return {"loss": margin_nt_xent(z1, z2, self.config.temperature, self.config.margin)}


SYSTEM = System(
    slug="margin-contrast", task="views", config=MarginConfig, learner=MarginContrast, data="digits", recipe=LAPTOP
)

# %% [markdown]
# `cp.register` makes it known by its name. Put these cells into a file of your own, such as `margin_contrast.py` with the line
# `cp.register(SYSTEM)` at its end. Import that file before you train, or before you load such a run.

# %%
cp.register(SYSTEM, title="Contrast with a margin")
print(cp.systems("*margin*"))

# %% [markdown]
# ## Train it
#
# It now has all that the built-in systems have: settings by keyword, a run directory, a page, embeddings.

# %%
run = cp.train(
    "margin-contrast", data="digits", epochs=5, batch_size=128, encoder="conv-s", margin=0.1, name="first", quiet=True
)
run

# %% [markdown]
# ## Is it better?
#
# One run shows nothing: another seed gives another number. `cp.compare` trains both systems on the same seeds, and reports the
# difference with its 95 % interval. An interval that includes zero shows no difference.

# %%
result = cp.compare(
    "simclr",
    "margin-contrast",
    data="digits",
    seeds=3,
    jobs=1,
    epochs=3,
    batch_size=128,
    encoder="conv-s",
    temperature=0.5,
)
result

# %% [markdown]
# The same as a table, a row for each seed:

# %%
import pandas as pd

runs = {name: [seed[result.metric] for seed in seeds.values()] for name, seeds in result.record["results"].items()}
table = pd.DataFrame(runs, index=[f"seed {n}" for n in range(3)])
table["difference"] = table["margin-contrast"] - table["simclr"]
table.round(4)

# %% [markdown]
# And as a picture. Lines that all rise or all fall show a difference; lines that cross show noise.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(5, 3))
for seed in range(3):
    axes.plot([0, 1], [runs["simclr"][seed], runs["margin-contrast"][seed]], marker="o", label=f"seed {seed}")
axes.set(
    xticks=[0, 1], xticklabels=["simclr", "margin-contrast"], xlim=(-0.3, 1.3), ylabel=result.metric.replace("_", " ")
)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Next
#
# - More seeds and longer training make the interval narrower. `counterpoint check-loss` tests a loss for common faults.
# - [Claims](../guides/claims.md) describes a fair test: its protocol is written before its seeds run.
# - To bring a published method into the library, follow [Architecture](../architecture.md).
