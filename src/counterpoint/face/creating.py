"""Build an untrained learner for your own loop, from a system's settings and a few facts of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from counterpoint.errors import CounterpointError

if TYPE_CHECKING:
    from counterpoint.engine.learner import Learner

# By task, the facts that a learner needs, with an example.
NEEDED: dict[str, dict[str, str]] = {
    "views": {"size": "size=224 (pixels, height and width)"},
    "labelled": {
        "size": "size=224 (pixels, height and width)",
        "classes": "classes=10 (number of classes, or their names)",
    },
    "regression": {"size": "size=224 (pixels, height and width)"},
    "aligned": {
        "modalities": "modalities={'image': {'kind': 'image', 'size': 64}, 'text': {'kind': 'text'}} (name, kind and size, dim, "
        "or rate and samples of each)"
    },
    "federations": {
        "modalities": "modalities={'image': {'kind': 'image', 'size': 64}, 'text': {'kind': 'text'}} (name, kind and size, dim, "
        "or rate and samples of each)"
    },
    "dense": {
        "size": "size=224 (pixels, height and width)",
        "regions": "regions=['background', 'road'] (names of the pixels' classes)",
    },
    "boxes": {
        "size": "size=224 (pixels, height and width)",
        "regions": "regions=['background', 'car'] (the background, then names of the objects' classes)",
    },
    "frames": {"size": "size=64 (pixels, height and width of a crop)"},
    "regions": {
        "size": "size=256 (pixels, height and width of a picture)",
        "class_names": "class_names=['cat', 'dog'] (names of the objects' classes)",
        "proposals": "proposals=100 (boxes of a picture)",
    },
    "tokens": {"texts": "texts=[...] (training texts, from which the tokenizer is learnt)"},
    "chats": {"texts": "texts=[...] (training texts, from which the tokenizer is learnt)"},
    "interleaved": {
        "texts": "texts=[...] (training texts, from which the tokenizer is learnt)",
        "size": "size=224 (pixels, height and width)",
    },
    "dialogs": {"texts": "texts=[...] (training utterances, from which the tokenizer is learnt)"},
    "generation": {
        "size": "size=64 (pixels, height and width)",
        "texts": "texts=[...] (training captions, from which the vocabulary is learnt)",
    },
    "demonstrations": {"texts": "texts=[...] (training texts, from which the tokenizer is learnt)"},
    "episodes": {
        "feature_width": "feature_width=1792 (features of a slot)",
        "class_names": "class_names=['cat', 'dog'] (names of the known classes)",
    },
    "sequences": {"items": "items=1000 (number of items)"},
    "bags": {
        "visual_dim": "visual_dim=1024 (width of visual rows)",
        "audio_dim": "audio_dim=128 (width of audio rows)",
    },
}
FACTS = (
    *("size", "channels", "classes", "class_names", "examples", "modalities", "texts", "tokenizers"),
    *("regions", "background", "proposals", "domains"),
    *("visual_dim", "audio_dim", "snippet_seconds", "teacher_dim"),
    *("words", "text_width", "layer_widths", "endings", "pairs", "clip_dim", "unlabelled"),
    *("kind", "mean", "deviation", "length", "target_mean", "target_deviation"),
    *("items", "ordered", "feature_width"),
)


class Missing(AttributeError):
    """A fact that a learner needs and that is not given."""


class Facts(SimpleNamespace):
    """The facts of a learner's data, as attributes."""

    def __getattr__(self, name: str) -> Any:
        raise Missing(name)


def create(
    system: str, *, data: Any = None, seed: int = 0, recipe: bool | None = None, steps: int = 0, **settings: Any
) -> Learner:
    """Build an untrained learner, an nn.Module with its networks and its loss, for your own loop.

    Args:
        system: A name of `counterpoint.systems()`, or a composition such as "moco-v2+mochi".
        data: A source, or an object (see `counterpoint.own`), from which the facts are read. Default: none; give the facts.
        seed: Seed of initialisation.
        recipe: Start from the system's recipe for the data. Default: True with data, as `train` does; False without data, so
            that the paper's settings apply.
        steps: Number of steps of your loop, for systems whose momentum or weights follow a schedule. Default: an epoch's steps
            times the epochs where the number of examples is known; otherwise such schedules keep their initial value.
        settings: Settings of the system (encoder="timm:resnet18", temperature=0.1). Without data, also these facts:
            size: height and width of images, in pixels; channels: number of channels of images, default 3; classes: number of
            classes, or their names; examples: number of training examples, for systems that keep state for each; modalities:
            {name: {"kind": ...}} of aligned data; texts: {name: training texts}, from which a tokenizer is learnt; visual_dim,
            audio_dim: widths of feature rows; regions: names of the pixels' classes of dense data; proposals: boxes of a picture;
            domains: names of kinds of imaging; teacher_dim: width of the embeddings of a teacher of pictures and texts;
            words, text_width, layer_widths: tokens of its prompts, width of its text's tokens and of its image blocks' tokens;
            endings: what follows the context in the prompt of each class;
            clip_dim, pairs: width of a clip's rows and number of texts with clips; unlabelled: number of turns
            without annotation;
            kind: "table" or "series" in place of pictures, with mean and deviation of each column and a series' length;
            target_mean, target_deviation: of the targets;
            items: number of items of histories or sets; feature_width: features of a slot of episodes.

    Returns the learner in training mode. Minimise `learner.loss(batch)["loss"]` over `learner.parameters()`:

        views, labelled   {"views": [x1, x2], "index": int64 [n], "label": int64 [n] or None}, x float [n, 3, size, size]
        dense             {"views": [x], "masks": [y], "index": int64 [n]}, y uint8 [n, size, size], 255 where unknown
        boxes             {"views": [x], "seen": [(boxes, kinds)], "index": int64 [n]}, boxes float [n, k, 4] in pixels, kinds
                          int64 [n, k], -1 for none
        regression        what `learner.prepare` makes of {"input": uint8 [n, 3, size, size] or float rows, "target": float64 [n]}
        frames            what `learner.prepare(batch, generator)` makes of a batch of `tasks.frames`
        regions           what `learner.prepare` makes of {"image": uint8 [n, 3, size, size], "boxes": float [n, k, 4],
                          "label": int64 [n, k], "score": float [n, k]}
        aligned           {"inputs": {name: tensor}, "present": {name: bool [n]}, "index": int64 [n], "label": None}
        bags              {"visual": [n, T, dim], "audio": [n, T, dim], "label": float [n]}
        restored          what `learner.prepare` makes of {"image": uint8 [n, 3, height, width]} (see below)
        dialogs           what `learner.prepare` makes of a batch of `counterpoint.tasks.dialogs`
        tokens            what `learner.prepare` makes of {"ids": int64 [n, T], "mask": bool [n, T], "index": int64 [n]}
        chats             {"ids": int64 [n, T], "mask": bool [n, T], "labels": int64 [n, T], "pictures": uint8 [n, k, size,
                          size, 3], "counts": int64 [n], "index": int64 [n]}; without pictures if size is 0
        generation        what `learner.prepare` makes of a batch of `counterpoint.tasks.generation`, in a fit
        demonstrations    a batch of `counterpoint.tasks.demonstrations`
        episodes          what `learner.prepare` makes of a batch of `counterpoint.tasks.episodes`, in a fit
        interleaved       a batch of chats with pictures, and {"paired": bool [n], "captions": int64 [n]}
        sequences         what `learner.prepare(batch, generator)` makes of {"ids": int64 [n, T], "lengths": int64 [n],
                          "target": int64 [n]}

    "index" has the positions of the n items in your data. Instead of making views yourself, you can let the system draw them:
    `batch = learner.prepare({"image": uint8 [n, 3, size, size], "index": ..., "label": ...}, generator)`. A composition such as
    "moco-v2+mochi" needs that. After each optimiser step call `learner.end_step()`, which updates momentum networks, and count
    `learner.position.step += 1`.

    Raises CounterpointError for missing facts, which it lists, and for unknown settings, with near matches.

    >>> import counterpoint as cp, torch
    >>> learner = cp.create("simclr", encoder="conv-s", size=16)
    >>> x = torch.randn(8, 3, 16, 16)
    >>> bool(learner.loss({"views": [x, x + 0.1], "index": torch.arange(8)})["loss"] > 0)
    True
    """
    from counterpoint.data.memory import plainly
    from counterpoint.experiment import Experiment
    from counterpoint.face.finding import source_of
    from counterpoint.face.functions import divided

    given = {name: settings.pop(name) for name in FACTS if name in settings}
    with plainly():
        spec, _held = source_of(data)
        based = data is not None if recipe is None else recipe
        start = Experiment.resolve(system, spec, recipe=based, check=False)
        chosen = divided(system, start.config, settings, ("data", "seed", "recipe", "steps", *FACTS))[1]
        experiment = Experiment.resolve(start.system, spec, config=start.config, overrides=chosen)
        config, task = experiment.config, experiment.system.task
        if data is not None:
            facts = Facts(**(dict(experiment.task().facts) | given))
        else:
            facts = _facts(system, task, config, given)
        try:
            learner = experiment.system.learner(config, facts, seed)
        except Missing as error:
            raise CounterpointError(
                f"{system} needs the fact {error} of the data; give counterpoint.create({system!r}, {error}=...), or data="
            ) from error
    examples = getattr(facts, "examples", None)
    learner.epochs = int(getattr(config, "epochs", 1))
    learner.steps_per_epoch = max(1, examples // config.batch_size) if examples else 0
    learner.total_steps = steps or learner.steps_per_epoch * learner.epochs
    return learner.train()


def _facts(system: str, task: str, config: Any, given: Mapping[str, Any]) -> Facts:
    """Return the facts of the data from keyword arguments. CounterpointError, which lists all missing facts."""
    facts = dict(given)
    missing = [name for name in NEEDED.get(task, {}) if name not in facts]
    if task == "regression" and facts.get("kind", "image") != "image":
        needed = ("mean", "deviation", "length") if facts["kind"] == "series" else ("mean", "deviation")
        missing = [name for name in needed if name not in facts]
    if task == "labelled" and "class_names" in facts:
        missing = [name for name in missing if name != "classes"]
        facts.setdefault("classes", len(facts["class_names"]))
    texts = facts.pop("texts", {})
    if task in ("aligned", "federations") and "modalities" in facts:
        worded = [name for name, spec in facts["modalities"].items() if spec.get("kind") == "text"]
        if isinstance(texts, Sequence) and not isinstance(texts, str) and len(worded) == 1:
            texts = {worded[0]: texts}
        facts["tokenizers"] = dict(facts.get("tokenizers", {})) | _tokenizers(config, worded, texts)
        if any(name not in facts["tokenizers"] for name in worded):
            missing.append("texts")
    if task in ("tokens", "dialogs") and texts:
        missing = []
        facts = (_text_facts if task == "tokens" else _dialog_facts)(config, list(texts)) | facts
    if task in ("chats", "interleaved") and texts:
        missing = [name for name in missing if name != "texts"]
        facts = _chat_facts(config, list(texts), int(facts.get("size", 0))) | facts
    if task == "generation" and texts:
        facts = _caption_facts(config, list(texts)) | facts
    if task == "demonstrations" and texts:
        missing = []
        facts = _demonstration_facts(config, list(texts)) | facts
    if task == "episodes" and not missing:
        facts["tokenizer"] = config.tokenizer([str(name) for name in facts["class_names"]]).to_json()
    if missing:
        said = NEEDED.get(task, {}) | {
            "mean": "mean=[...] (of each column)",
            "deviation": "deviation=[...] (of each column)",
            "length": "length=64 (steps of a series)",
            "texts": "texts=[...] (training texts, from which the tokenizer is learnt), or tokenizers={name: JSON}",
        }
        raise CounterpointError(
            f"{system} is built from facts of the data, and these are missing: {'; '.join(said[name] for name in missing)}. Give "
            "them by keyword, or give data="
        )
    if not isinstance(facts.get("classes", 0), int):
        facts["class_names"] = [str(name) for name in facts["classes"]]
        facts["classes"] = len(facts["class_names"])
    if task == "dense":
        facts = {"modalities": ["image"], "background": True} | facts
    if task in ("views", "labelled", "dense", "boxes", "regression"):
        facts = {"channels": 3, "classes": 0} | facts
    facts.setdefault("class_names", [str(n) for n in range(facts.get("classes", 0))])
    if task in ("aligned", "federations"):
        facts.setdefault("classes", len(facts["class_names"]))
    if task == "bags":
        facts = {"snippet_seconds": 16 / 24, "backbones": None} | facts
    for name in ("teacher_encoder", "encoder"):  # for a system whose facts name a network
        if hasattr(config, name):
            facts.setdefault(name, getattr(config, name))
    return Facts(**facts)


def _text_facts(config: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return the facts of texts alone."""
    import numpy as np

    from counterpoint.data.tokens import TokenData, TokenSplit

    data = TokenData(
        "texts", *(TokenSplit(texts),) * 3, grounded=TokenSplit(texts, [np.zeros((1, 1), np.float32)] * len(texts))
    )
    return dict(config.facts(data, config.tokenizer(data)))


def _chat_facts(config: Any, texts: Sequence[str], size: int) -> dict[str, Any]:
    """Return the facts of chats whose messages are these texts."""
    from counterpoint.data.chats import Chat, ChatData, ChatSplit
    from counterpoint.encoders.messages import Message

    split = ChatSplit([Chat((Message("user", text), Message("assistant", text))) for text in texts])
    return dict(config.facts(ChatData("texts", split, split, split, size)))


def _caption_facts(config: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return the facts of pictures with these captions, without classes."""
    import numpy as np

    from counterpoint.data.generation import GenerationData, GenerationSplit
    from counterpoint.data.images import ArrayImages

    split = GenerationSplit(ArrayImages(np.zeros((len(texts), 1, 1), np.uint8)), texts)
    return dict(config.facts(GenerationData("texts", split, split, split, 1)))


def _dialog_facts(config: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return the facts of dialogs of one turn, without annotated nodes."""
    from counterpoint.data.dialogs import USER, DialogData, Turn, user_turns

    data = DialogData("dialogs", *(user_turns([[Turn(USER, text, {})] for text in texts], annotated=True),) * 3)
    return dict(config.facts(data, config.tokenizer(data)))


def _demonstration_facts(config: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return the facts of one task whose examples are these texts."""
    from counterpoint.data.demonstrations import DemonstrationData, DemonstrationSplit, Example

    split = DemonstrationSplit([Example("texts", text, text) for text in texts])
    return dict(config.facts(DemonstrationData("texts", split, split, split)))


def _tokenizers(config: Any, worded: Sequence[str], texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Learn a tokenizer for each text modality with training texts. Return them by modality, as JSON."""
    from counterpoint.encoders.text import build_tokenizer

    return {
        name: build_tokenizer(config.text_encoder, list(texts[name]), vocabulary=config.vocabulary).to_json()
        for name in worded
        if name in texts
    }
