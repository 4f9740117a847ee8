"""Test the losses of other libraries, and ours, with `counterpoint.lab.check_loss`; write results/check-loss.json.

    python benchmarks/check_losses.py [--only WORD ...]      the losses whose name holds a word; the other records stay

Install the peers first: lightly, open_clip_torch, pytorch-metric-learning, sentence-transformers, stable-pretraining. They may
stand in another environment than the tests'. A loss whose library is missing is left out with a message. The record names the
versions. The page "Losses of other libraries" of the documentation shows it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).resolve()
OUT = FILE.parents[1] / "results" / "check-loss.json"


# --- adapters: losses that need more than a constructor with plain settings -------------------------------------------


class SupConOfProcesses(nn.Module):
    """pytorch-metric-learning's SupConLoss in its DistributedLossWrapper, or without it."""

    def __init__(self, wrapped: bool = True, efficient: bool = False) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import SupConLoss
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        warnings.filterwarnings("ignore", message="DistributedLossWrapper is being used in a non-distributed setting")
        loss = SupConLoss(temperature=0.1)
        self.loss = DistributedLossWrapper(loss, efficient=efficient) if wrapped else loss

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = self.loss(rows, labels)
        return found


class MultipleNegatives(nn.Module):
    """The MultipleNegativesRankingLoss of sentence-transformers, on embeddings instead of texts."""

    def __init__(self, gather_across_devices: bool = False, symmetric: bool = False) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
        self.loss = MultipleNegativesRankingLoss(
            nn.Identity(),
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode="per_direction" if symmetric else "joint",
        )

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        found: Tensor = self.loss.compute_loss_from_embeddings([query, document], torch.empty(0))
        return found


# --- the losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A loss to test."""

    library: str
    """Name of its package on PyPI."""
    title: str
    """Its name and the settings that matter."""
    loss: str
    """Its place, as `counterpoint check-loss` takes it."""
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: str = "n d, n d"
    normalize: bool = False


PROCESSES = {"rank": "{rank}", "world_size": "{world}"}
SCALED = "n d, n d, logit_scale=10.0"
ENTRIES = [
    *(
        Entry(
            "counterpoint",
            f"{place.partition(':')[2]}, group=world",
            f"counterpoint.systems.classics.{place}",
            settings,
            inputs,
        )
        for place, settings, inputs in (
            ("clip:clip", {"group": "world"}, "n d, n d, 2.0"),
            ("simclr:nt_xent", {"group": "world"}, "n d, n d"),
            ("siglip:siglip", {"group": "world"}, "n d, n d, 2.0, -5.0"),
            ("supcon:supcon", {"group": "world"}, "n 2 d, n:int"),
            ("supcon:supcon_single_view", {"group": "world"}, "n d, n:int"),
            ("vicreg:vicreg", {"group": "world"}, "n d, n d"),
            ("barlow_twins:barlow", {"group": "world"}, "n d, n d"),
        )
    ),
    *(
        Entry(
            "lightly",
            f"{name}{', gather_distributed' if gather else ''}",
            f"lightly.loss:{name}",
            {"gather_distributed": gather},
        )
        for name in ("NTXentLoss", "DCLLoss", "BarlowTwinsLoss", "VICRegLoss")
        for gather in (False, True)
    ),
    *(
        Entry(
            "open_clip_torch",
            f"ClipLoss, local_loss={local}, gather_with_grad={gradient}",
            "open_clip.loss:ClipLoss",
            {**PROCESSES, "local_loss": local, "gather_with_grad": gradient},
            SCALED,
            True,
        )
        for local in (False, True)
        for gradient in (False, True)
    ),
    *(
        Entry(
            "open_clip_torch",
            f"SigLipLoss, dist_impl={way}",
            "open_clip.loss:SigLipLoss",
            {**PROCESSES, "dist_impl": way},
            "n d, n d, logit_scale=10.0, logit_bias=-10.0",
            True,
        )
        for way in ("bidir", "shift", "reduce", "gather")
    ),
    Entry("pytorch-metric-learning", "SupConLoss", f"{FILE}:SupConOfProcesses", {"wrapped": False}, "n d, n:int"),
    Entry(
        "pytorch-metric-learning", "SupConLoss in DistributedLossWrapper", f"{FILE}:SupConOfProcesses", {}, "n d, n:int"
    ),
    Entry(
        "pytorch-metric-learning",
        "SupConLoss in DistributedLossWrapper, efficient",
        f"{FILE}:SupConOfProcesses",
        {"efficient": True},
        "n d, n:int",
    ),
    *(
        Entry(
            "sentence-transformers",
            f"MultipleNegativesRankingLoss{', both directions' if symmetric else ''}"
            f"{', gather_across_devices' if gather else ''}",
            f"{FILE}:MultipleNegatives",
            {"gather_across_devices": gather, "symmetric": symmetric},
        )
        for gather, symmetric in ((False, False), (True, False), (True, True))
    ),
    *(
        Entry("stable-pretraining", name, f"stable_pretraining.losses.{place}:{name}")
        for place, name in (
            ("joint_embedding", "NTXEntLoss"),
            ("joint_embedding", "BarlowTwinsLoss"),
            ("joint_embedding", "VICRegLoss"),
            ("multimodal", "CLIPLoss"),
        )
    ),
]


def main() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from counterpoint.engine.run import machine
    from counterpoint.files import replacing
    from counterpoint.lab.check_loss import Crew, check_loss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    words = parser.parse_args().only
    kept = json.loads(OUT.read_text()) if OUT.is_file() else {"losses": []}
    records = {(record["library"], record["version"], record["title"]): record for record in kept["losses"]}
    torch.set_num_threads(1)
    modules = {entry.loss.partition(":")[0] for entry in ENTRIES if ".py:" not in entry.loss}
    modules |= {"pytorch_metric_learning.utils.distributed", "sentence_transformers.sentence_transformer.losses"}
    with Crew(preload=sorted(modules)) as crew:
        for entry in ENTRIES:
            if words and not any(word in f"{entry.library} {entry.title}" for word in words):
                continue
            try:
                found = version(entry.library)
            except PackageNotFoundError:
                print(f"{entry.library} is not installed: {entry.title} left out")
                continue
            report = check_loss(
                entry.loss, settings=entry.settings, inputs=entry.inputs, normalize=entry.normalize, crew=crew
            )
            record = report.record()
            record["loss"] = record["loss"].replace(str(FILE.parents[1]) + "/", "")
            record["versions"][entry.library] = found
            records[entry.library, found, entry.title] = {
                "library": entry.library,
                "version": found,
                "title": entry.title,
                **record,
            }
            bad = [f"{c.name}: {c.verdict}, {c.found}" for c in report.checks if c.verdict in ("fails", "error")]
            print(
                f"{entry.library} {found} {entry.title}: {'holds' if report.holds else ''}",
                *bad,
                sep="\n    ",
                flush=True,
            )
            written = {
                "what": "counterpoint.lab.check_loss on losses of other libraries and ours; see benchmarks/check_losses.py",
                "date": time.strftime("%Y-%m-%d"),
                "machine": machine(),
                "losses": [records[key] for key in sorted(records, key=_order)],
            }
            with replacing(OUT) as file:
                file.write((json.dumps(written, indent=1, allow_nan=False) + "\n").encode())


def _order(key: tuple[str, str, str]) -> tuple[int, str]:
    """Return the place of a record: the order of ENTRIES, then the version."""
    library, version, title = key
    places = [place for place, entry in enumerate(ENTRIES) if (entry.library, entry.title) == (library, title)]
    return (places or [len(ENTRIES)])[0], version


if __name__ == "__main__":
    main()
