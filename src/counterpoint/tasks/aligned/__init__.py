"""Define the task `aligned`: embed items with several modalities in one shared space.

    batch["inputs"]   {modality: tensor, or (ids, mask) for text}; images uint8 [B, 3, H, W] until the learner prepares them
    batch["present"]  {modality: [B] bool}; a missing modality is filled with zeros, and is not encoded
    batch["whole"]    the modalities that all items of the batch have; a GPU's learner reads no mask for these
    batch["index"]    [B] positions in the training set
    batch["label"]    [B] int64, -1 where there is none, or None

A learner's `predict` returns {"embedding": {modality: [n, dim] unit rows}}. The evaluation (tasks/measures/) measures:

- retrieval from every modality to every other: recall at 1, 5 and 10, mean reciprocal rank.
- the gap between two modalities (core/gap.py).
- zero-shot classification, if items have classes. Each class has a prompt if a modality is text. Otherwise it has the mean
  embedding of its training items in another modality.
- a linear probe, at the end.

In the user's own data, a retrieved item is right if it is the query's own item. It is also right if both
items share the content of the query's or the searched modality: picture, sound, text or vector.
All five captions of a picture are right for it. In
built-in data, items with exactly the same words or vector count as the same.

If items were cut from larger wholes (`groups`), votes of the retrieved items identify the whole.
Test splits of other domains (`shifts`) are measured in the same way, under the names <shift>_....
A learner may also return
    "joint"              {modality: [n, dim]}, queries from all other modalities together: retrieval from several to one
    "<name>_embedding"   another embedding of the same form, measured in the same way under the names <name>_...
    "logits"             [n, classes], if it classifies: its `accuracy` is the share of labelled items classified right
    "measures"           {name: number}, its own measures

Its files:
    settings.py    `AlignedConfig`, and settings for small sets
    learner.py     `AlignedLearner`
    unpaired.py    `UnpairedLearner`: each modality alone on unpaired items first
    batches.py     contents of a batch
    views.py       `MultiViewLearner`: a weak view and strong views of each item
    retrieval.py   retrieval from every modality to every other, and the gap between two
    classes.py     classification by prompts, by examples and by a probe
    seen.py        the figures of one split
    evaluator.py   `AlignedEvaluator`
    task.py        `AlignedTask`
"""

from counterpoint.tasks.aligned.batches import BATCH
from counterpoint.tasks.aligned.evaluator import AlignedEvaluator
from counterpoint.tasks.aligned.learner import (
    AlignedLearner,
    chosen,
    each_without,
    first_two,
    need_finite,
    one_each,
    taken,
    there,
    whole_items,
)
from counterpoint.tasks.aligned.settings import LAPTOP, AlignedConfig
from counterpoint.tasks.aligned.task import AlignedTask
from counterpoint.tasks.aligned.unpaired import UnpairedLearner

TASK = AlignedTask

__all__ = [
    "BATCH",
    "LAPTOP",
    "TASK",
    "AlignedConfig",
    "AlignedEvaluator",
    "AlignedLearner",
    "AlignedTask",
    "UnpairedLearner",
    "chosen",
    "each_without",
    "first_two",
    "need_finite",
    "one_each",
    "taken",
    "there",
    "whole_items",
]
