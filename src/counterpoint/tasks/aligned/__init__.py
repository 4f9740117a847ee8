"""The task `aligned`: items seen in several modalities at once, brought together in one space.

    batch["inputs"]   {modality: tensor, or (ids, mask) for text}; images uint8 [B, 3, H, W] until the learner prepares them
    batch["present"]  {modality: [B] bool}; what stands where a modality is missing is zeros, and is not encoded
    batch["index"]    [B] positions in the training set
    batch["label"]    [B] int64, -1 where there is none, or None

A learner's `predict` gives {"embedding": {modality: [n, dim] unit rows}}. Measured (tasks/measures.py) are retrieval from
every modality to every other (recall at 1, 5 and 10, mean reciprocal rank), how far two modalities lie apart (core/gap.py),
and, where items have classes, zero-shot classification: by prompts if a modality is text, else by the mean embedding of each
class in another modality over training items. At the end a linear probe is fitted.

Of the user's own data a found item is right where it is the query's own, or has in common with it the picture, sound, text
or vector in the modality that is asked with or searched in: all five captions of a picture are right for it. Of built-in
data, items with the very same words or vector count as the same.

Where items were cut from something larger (`groups`), the votes of what they retrieve name it.
Test splits of other domains (`shifts`) are measured alike, their figures named <shift>_....
A learner may also give
    "joint"              {modality: [n, dim]}, what all other modalities together look for it by: retrieval from several to one
    "<name>_embedding"   a further embedding of the same form, measured alike: its figures are named <name>_...
    "logits"             [n, classes], where it classifies: the share of labelled items told right is its `accuracy`
    "measures"           {name: number}, what it has measured itself

Its files:
    settings.py    `AlignedConfig`, and what a small set asks for
    learner.py     `AlignedLearner`
    batches.py     what a batch holds
    retrieval.py   retrieval from every modality to every other, and the gap between two
    classes.py     classes told by prompts, by examples and by a probe
    seen.py        the figures of one split
    evaluator.py   `AlignedEvaluator`
    task.py        `AlignedTask`
"""

from counterpoint.tasks.aligned.batches import BATCH
from counterpoint.tasks.aligned.evaluator import AlignedEvaluator
from counterpoint.tasks.aligned.learner import AlignedLearner, each_without, first_two, taken, there
from counterpoint.tasks.aligned.settings import LAPTOP, AlignedConfig
from counterpoint.tasks.aligned.task import AlignedTask

TASK = AlignedTask

__all__ = [
    "BATCH",
    "LAPTOP",
    "TASK",
    "AlignedConfig",
    "AlignedEvaluator",
    "AlignedLearner",
    "AlignedTask",
    "each_without",
    "first_two",
    "taken",
    "there",
]
