"""Put losses of `counterpoint.losses` into the trainers of other libraries.

Lightly's style, `loss(z0, z1)`, Lightning and accelerate need nothing: the losses are modules of two arguments. Two libraries call
their losses otherwise:

    SentenceLoss    sentence-transformers: `SentenceTransformerTrainer(model, loss=SentenceLoss(model, losses.CLIP()))`
    MinedLoss       pytorch-metric-learning: `loss(embeddings, labels, miner(embeddings, labels))`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.errors import CounterpointError


def _value(found: Any) -> Tensor:
    """Return the loss of an output that has more than the loss."""
    value = getattr(found, "loss", found)
    if not isinstance(value, Tensor):
        raise CounterpointError(f"the loss returned a {type(found).__name__}, which holds no loss")
    return value


class SentenceLoss(nn.Module):
    """A loss of embeddings in the form that sentence-transformers calls: columns of token features, and labels.

    Args:
        model: a `SentenceTransformer`.
        loss: a module or function of one argument for each text column, such as `losses.CLIP()` for pairs of texts.
        labelled: pass the labels as the last argument, as `losses.SupConSingleView()` takes them.

    The data set has a column for each argument, and the column `label` where `labelled` is set.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any], *, labelled: bool = False) -> None:
        super().__init__()
        self.model, self.loss, self.labelled = model, loss, labelled

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            sentence_features: the token features of each column.
            labels: [n] class numbers.

        Raises CounterpointError where labels are needed and missing, and for columns that the loss does not take.
        """
        rows = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if self.labelled:
            if labels is None:
                raise CounterpointError("this loss needs labels; give the data set a column 'label'")
            rows.append(labels.long())
        called = inspect.signature(self.loss.forward if isinstance(self.loss, nn.Module) else self.loss)
        try:
            called.bind(*rows)
        except TypeError as error:
            count = len(rows) - self.labelled
            given = f"{count} column{'s' * (count != 1)} of text{' and the labels' if self.labelled else ''}"
            raise CounterpointError(
                f"{self._name()} takes ({', '.join(called.parameters)}), but the data set has {given}; keep the columns that the "
                "loss takes"
            ) from error
        return _value(self.loss(*rows))

    def _name(self) -> str:
        function = self.loss.func if isinstance(self.loss, partial) else self.loss
        return getattr(function, "__name__", type(function).__name__)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the name of the loss, for the model card of sentence-transformers."""
        return {"loss": self._name()}


class MinedLoss(nn.Module):
    """A loss of embeddings and labels that a miner of pytorch-metric-learning restricts to the rows it names.

    Our losses compare all pairs of a batch, and choose hard ones themselves. Of a miner's pairs or triplets they therefore take the
    rows, not the pairings.

    Args:
        loss: a module of embeddings [n, dim] and labels [n], such as `losses.SupConSingleView()` or `losses.Triplet()`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Sequence[Tensor] | None = None) -> Tensor:
        """Compute the loss of the rows that a miner names; 0 with a gradient of 0 where it names none.

        Args:
            embeddings: [n, dim].
            labels: [n] class numbers.
            indices_tuple: what a miner returned: positions of triplets or pairs. Default: all rows.
        """
        if indices_tuple is None:
            return _value(self.loss(embeddings, labels))
        rows = torch.cat([part.flatten() for part in indices_tuple]).unique()
        if not len(rows):
            return embeddings.sum() * 0
        return _value(self.loss(embeddings[rows], labels[rows]))
