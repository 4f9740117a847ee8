"""The contract of federated data, for the task `federations`: a public aligned set, and parties with private items.

A party has the public set's modalities, or one of them. One modality needs class labels, to train on alone. Classes are the
party's own and may differ between parties.

`parties:DIR` reads the user's own federation:

    DIR/public.csv           the public items, as a `manifest:` source (or .jsonl, .parquet)
    DIR/parties/NAME.csv     the items of the party NAME, in the same layout; a column `label` gives the classes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.manifest import load_manifest
from counterpoint.data.pairs import AlignedData, AlignedSplit, Modality
from counterpoint.errors import DataError
from counterpoint.words import counted

FILES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Party:
    """One holder of private items.

    Args:
        name: its name, which no other party has.
        modalities: its modalities, of the public set's.
        items: its private items; every item has all of its modalities.
        classes: names of the labels of its items. Default: no labels.
    """

    name: str
    modalities: dict[str, Modality]
    items: AlignedSplit
    classes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The party's modalities, joined by a plus."""
        return "+".join(self.modalities)


@dataclass(frozen=True)
class FederatedData:
    """A public set and the parties. Raises DataError, naming the party, for one that cannot take part."""

    public: AlignedData
    parties: tuple[Party, ...]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.parties:
            raise DataError(f"{self.name}: a federation needs at least one party")
        names = [party.name for party in self.parties]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{self.name}: two parties have the name {twice[0]}; rename one")
        for party in self.parties:
            self._check(party)
        self.notes.extend(self.public.notes)
        first: dict[str, Party] = {}
        for party in self.parties:
            if len(party.modalities) == 1:
                other = first.setdefault(party.kind, party)
                if set(other.classes) != set(party.classes):
                    new = sorted(set(party.classes) ^ set(other.classes))
                    self.notes.append(
                        f"{self.name}: {party.name} and {other.name} have different classes ({', '.join(new[:3])}); each "
                        "keeps a classifier of its own"
                    )

    def _check(self, party: Party) -> None:
        where = f"{self.name}: the party {party.name}"
        if len(party.items) < 2:
            raise DataError(f"{where} has {counted(len(party.items), 'item')} and needs at least 2; leave it out")
        public = self.public.modalities
        for name, modality in party.modalities.items():
            if name not in public:
                raise DataError(
                    f"{where} has the modality {name}, the public set {' and '.join(public)}; rename the column"
                )
            if modality.spec != public[name].spec:
                raise DataError(
                    f"{where} has {name} of {modality.spec}, the public set of {public[name].spec}; give both the same size"
                )
            here = party.items.present(name, np.arange(len(party.items)))
            if not here.all():
                raise DataError(f"{where} lacks {name} in {counted(int((~here).sum()), 'item')}; leave these items out")
        if len(party.modalities) not in (1, len(public)):
            raise DataError(f"{where} has {party.kind}; a party has one modality or all of the public set")
        if len(party.modalities) == 1:
            labels = party.items.labels
            if labels is None or int(labels.min()) < 0 or len(np.unique(labels)) < 2:
                raise DataError(
                    f"{where} has {party.kind} alone and learns by its classes: give every item a label, of at least two classes"
                )

    @property
    def name(self) -> str:
        return self.public.name

    @property
    def train(self) -> tuple[Any, ...]:
        """All items that the federation learns from: the public ones and each party's."""
        return (self.public.train, *(party.items for party in self.parties))


def load(place: str, *, size: int = 64, test: str = "", valid: str = "") -> FederatedData:
    """Read a federation of the user's own files (see the module).

    Args:
        place: the folder.
        size: height and width of images in pixels, 8 to 4096.
        test: fraction or split of the public items to test on, as of `manifest:`.
        valid: fraction or split of the public items to watch training on, as of `manifest:`.

    A party learns from its rows of the split "train", or from the rows that a `manifest:` source trains on.
    Raises DataError for missing files, and as `manifest:` does.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; parties:DIR needs DIR/public.csv and DIR/parties/NAME.csv")
    found = [folder / f"public{end}" for end in FILES if (folder / f"public{end}").is_file()]
    if not found:
        raise DataError(f"{folder} has no public{', public'.join(FILES)}: the public items, in all modalities")
    files = sorted(file for file in (folder / "parties").glob("*") if file.suffix in FILES)
    if not files:
        raise DataError(f"{folder / 'parties'} has no file NAME{', NAME'.join(FILES)}: a file for each party")
    public = _opened(found[0], size=size, test=test, valid=valid)
    parties = []
    for file in files:
        try:
            held = _opened(file, size=size, task="federations")
        except DataError as error:
            raise DataError(f"the party {file.stem}: {error}") from error
        parties.append(Party(file.stem, dict(held.modalities), held.train, tuple(held.classes or ())))
    return FederatedData(public, tuple(parties))


def _opened(file: Path, **options: Any) -> AlignedData:
    found = load_manifest(str(file), **options)
    assert isinstance(found, AlignedData)
    return found
