"""Provide every loss of the catalogue as an `nn.Module`, with its queue, bank, centre or temperatures where it has them.

>>> import torch
>>> from counterpoint import losses
>>> loss = losses.NTXent(temperature=0.5)
>>> loss(torch.eye(3), torch.eye(3))
tensor(0.4327)

Each module calls the function that its system trains with. Buffers and parameters hold the state: `state_dict` saves it, `.to`
moves it, and a forward pass in training mode updates it. By default a loss is that of this process's batch. With
`group="world"` it is that of all processes' batches (see `counterpoint.core.distributed`). A class is imported when it is
first used, and its system when its first instance is made.
"""

from __future__ import annotations

import importlib
from typing import Any

from counterpoint.errors import unknown

_FILES = {
    "contrastive": "ColumnInfoNCE DCL InfoNCE MixedNTXent NTXent NTXentByIndex PairwiseNTXent SimpleContrastive SnippetNTXent",
    "negatives": "CACR CACRMomentum HardContrastive IsoGCLR MoCHi MoCo",
    "views": "BYOL BarlowTwins DINO MAE MSN NegativeCosine SimSiam SwAV VICReg",
    "regions": "CMD",
    "class_centres": "ClusterMargin MLCD",
    "labelled": "CAPro Hydra SLA SepCLR SupCon SupConSingleView SupReMix Triplet",
    "modalities": "BatchHinge CLIP CaptionContrast CWCL MILNCE PairwiseCLIP SigLIP Symile TemporalNCE",
    "cells": "PixContrast PixPro PixelRegression",
    "instances": "ReID",
    "proposals": "WeakGuidedContrast",
    "masks": "BinaryMask SoftDice",
    "mixtures": "M3Co MultiSClip",
    "uniformity": "ContrastiveGap CrossUniformity Uniformity",
    "language": "ALBEF BarLIP CLIPRocket MLMDistill SiamLIP SwALIP TokenMimic",
    "bags": "MACILSD MIL",
    "dialogs": "RDrop SoftSupCon TreeContrast",
    "continual": "CoconutMM CoconutNSPT ModX MulKI",
    "recommendation": "LearnedViews NextItem ScoreSpread",
    "generation": "LabelGuided SentenceMatch WordMatch MACL",
    "federated": "PublicContrast SoftContrastive",
    "class_texts": "GOPro PromptKD PromptTuning VL2V VLMOOD",
    "restored": "DualContrast FeatureRatio PatchNCE",
    "distances": "ChannelCorrelation RelationDistance SemanticDistance",
    "distilled_sets": "KernelRidge",
    "distillation": "AffinityMimicking AttentionTransfer CRD DynamicScores FitNets InterModal IntraModal KD MeanTeacher RKD "
    "TokenKL WeightedFeature",
    "tokens": "NST PairedHinge TokenCRD TokenContrast TokenFeature TokenRelation",
}
_PLACES = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in _PLACES:
        raise AttributeError(f"counterpoint.losses: {unknown('loss', name, _PLACES)}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_PLACES)
