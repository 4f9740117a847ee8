"""Learn each modality alone from unpaired items, before all modalities learn from the aligned items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from counterpoint.core.distributed import world
from counterpoint.data.images import Indices
from counterpoint.data.pairs import AlignedSplit, rows_with
from counterpoint.engine.loading import Steps
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned.learner import AlignedLearner
from counterpoint.words import counted


class Pool(NamedTuple):
    """The items of a split that have one modality, which is an image, a sound or a vector."""

    name: str
    split: AlignedSplit
    rows: Indices  # positions of the items

    def draw(self, most: int, generator: torch.Generator) -> Indices:
        """Draw the positions of `most` different items, or of all in random order if there are fewer."""
        chosen = torch.randperm(len(self.rows), generator=generator)[:most]
        return self.rows[chosen.numpy()]

    def values(self, positions: Indices) -> Shaped[Tensor, "n ..."]:
        """Return the items at these positions of the split, images as [n, 3, height, width]."""
        found = torch.from_numpy(np.asarray(self.split.column(self.name, positions)))
        return found.permute(0, 3, 1, 2) if found.ndim == 4 else found


def pool(survey: Survey, name: str) -> Pool:
    """Return the items of a modality in the split `unpaired`; if it has none, those of the training split.

    Args:
        survey: access to the data.
        name: the modality.

    Raises DataError if fewer than two items have it.
    """
    split, unpaired = survey.split("train"), survey.split("unpaired")
    if unpaired is not None and unpaired.present(name, np.arange(len(unpaired))).any():
        split = unpaired
    rows = np.flatnonzero(split.present(name, np.arange(len(split))))
    if len(rows) < 2:
        raise DataError(f"the data has {counted(len(rows), 'item')} of {name} to pre-train on, at least 2 are needed")
    return Pool(name, split, rows)


class UnpairedLearner(AlignedLearner):
    """A learner of two stages: each modality alone on unpaired items, then all modalities on the aligned items.

    A batch of the first stage holds "views": for each modality of `pretrained`, two views of a separate batch of items. The
    setting `pretrain_epochs` is the number of its epochs. Each has as many steps as an epoch of the second stage. In both
    stages each modality has an optimiser. The first stage has no warm-up.

    Subclasses write `first` and `loss`, and set these attributes:

        pretrained     modalities that learn alone, in order; none: there is no first stage
        items          {modality: items} with methods `windows` and `snippets`, such as `SheetItems` of views/music
        first_views    {modality: views} with methods `pair` and `apply`, such as `SheetViews` of views/music
        pair_views     {modality: views} with methods `draw` and `apply`, for the aligned items; none: items stay unchanged
        projections    {modality: network} for the first stage only; an export leaves them out
    """

    pretrained: tuple[str, ...]
    items: dict[str, Any]
    first_views: dict[str, Any]
    pair_views: dict[str, Any]
    projections: nn.ModuleDict
    pools: dict[str, Pool]

    def first(self, name: str) -> tuple[int, float]:
        """Return the items in a modality's batch of the first stage, over all processes, and the learning rate at it."""
        raise CounterpointError(f"{type(self).__name__} must override `first`")

    def begin(self, survey: Survey) -> None:
        self.pools = {name: pool(survey, name) for name in self.pretrained}

    def stages(self) -> list[Stage]:
        aligned = Stage("pairs", self.config.epochs)
        if not self.pretrained:
            return [aligned]

        def steps(survey: Survey) -> Steps:
            return Steps(survey.examples // survey.batch_size)

        # `prepare` draws its items, a batch of each modality.
        return [Stage("pathways", self.config.pretrain_epochs, turns=self._first_turns, batches=steps), aligned]

    @property
    def by_itself(self) -> bool:
        """Whether each modality learns alone, in the first stage."""
        return self.survey is not None and self.position.stage + 1 < len(self.stages())

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.by_itself:
            return {"views": {name: self._two_views(name, generator) for name in self.pretrained}}
        inputs = {}
        total, mine = self.share(len(batch["index"]))
        for name, values in batch["inputs"].items():
            windows, views = self.items[name].windows(values), self.pair_views.get(name)
            if views is None:
                inputs[name] = self.items[name].snippets(windows)
            else:
                inputs[name] = views.apply(windows, views.draw(total, generator).take(mine))
        return batch | {"inputs": inputs}

    def _two_views(self, name: str, generator: torch.Generator) -> list[Tensor]:
        """Draw two views of this process's share of a batch of unpaired items."""
        rank, size = world()
        mine = slice(rank, None, size)
        views = self.first_views[name]
        chosen = self.pools[name].draw(self.first(name)[0], generator)
        drawn = views.pair(len(chosen), generator)
        windows = self.items[name].windows(self.pools[name].values(chosen[mine]).to(self.device))
        return [views.apply(windows, view.take(mine)) for view in drawn]

    def turns(self) -> list[Turn]:
        return self._turns(dict.fromkeys(self.kinds, 1.0), self.config.warmup_epochs)

    def _first_turns(self) -> list[Turn]:
        """Make the first stage's turns: its learning rates are multiples of `lr`, which the optimisers are made with."""
        usual = self.config.lr * self.config.batch_size / 256
        return self._turns({name: self.first(name)[1] / usual for name in self.kinds}, 0)

    def _turns(self, rates: Mapping[str, float], warmup: int) -> list[Turn]:
        """Make an optimiser for each modality, with this factor of its learning rates."""
        config = replace(self.config, warmup_epochs=warmup)
        constant = tuple(self.parameters()) if config.constant_lr else ()
        turns = []
        for name, rate in rates.items():
            modules = [part[name] for part in (self.encoders, self.heads, self.projections) if name in part]
            turns.append(self.turn_of(modules, config, constant=constant, rate=rate))
        return [Turn([o for turn in turns for o in turn.optimizers], [s for turn in turns for s in turn.schedules])]

    def training_rows(
        self, survey: Survey, modalities: Sequence[str], encode: Callable[[str, Any], Tensor], most: int
    ) -> tuple[Shaped[Tensor, "n dim"], ...]:
        """Encode training items that have all of these modalities; return this process's share of the rows of each modality.

        Args:
            survey: access to the data.
            modalities: their names.
            encode: maps a modality's name and inputs, as they are in evaluation, to rows [n, dim].
            most: maximum number of items, over all processes; they are drawn once, whatever the seed of the run.
        """
        items = np.random.RandomState(0).permutation(rows_with(survey.split("train"), *modalities))[:most]

        def every(batch: dict[str, Any]) -> Tensor:
            return torch.stack([encode(name, batch["inputs"][name]) for name in modalities], 1)

        rank, size = world()
        return survey.over("train", every, items)[rank::size].to(self.device).unbind(1)

    def exported(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.state_dict().items() if not key.startswith("projections.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. An export has no `projections`, which only the first stage uses: they stay unchanged."""
        own = {key: value for key, value in self.state_dict().items() if key.startswith("projections.")}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)
