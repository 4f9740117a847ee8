"""Ask a model a question by several methods of decoding: `counterpoint ask`.

>>> from counterpoint.use.ask import ask
>>> for found in ask("runs/first", "is there a brick ?", ["a.png"], ["plain", "ritual"]):   # doctest: +SKIP
...     print(found.method, found.answer.text)

The model is that of a finished run of the task `chats` or `interleaved`, or hf:NAME, a model of transformers. No answer is
executed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from counterpoint.data.images import decode
from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import chat_tokenizer
from counterpoint.encoders.decoding import Answer, Decoder, Plain, answers
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, RunError, check_seed, unknown
from counterpoint.experiment import load_learner
from counterpoint.files import check_empty, check_there
from counterpoint.use.converters import Made, dispatch, zoo
from counterpoint.words import counted

CONTRASTED = (
    "lol",
    "icd",
    "dola",
    "fusion",
    "refocus",
    "instructed",
)  # methods that need a run of lol, with its amateur
# Method -> the module whose `decoder_of(learner, method)` makes its rule.
METHODS = {
    "plain": "",
    "greedy": "",
    **dict.fromkeys(("ritual", "ritual+", "same", "vcd", "m3id"), "counterpoint.systems.language.ritual"),
    **dict.fromkeys(CONTRASTED, ""),
}


class Asked(NamedTuple):
    """An answer, and how it was made."""

    method: str
    answer: Answer


class Answering:
    """A model that answers: that of a run, or one of transformers.

    Args:
        name: Path of a run, or hf:NAME.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises RunError for a run whose model does not answer, CounterpointError for a model that cannot be loaded.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        place = Loop(device=device).on()
        self.learner: Any = None
        if name.startswith("hf:"):
            size = _picture_size(name)
            tokenizer = chat_tokenizer(name, (), vocabulary=0, size=size)
            self.model = ChatModel(name, tokenizer, size=size, context=1).eval().to(place)
            self.model.context = int(getattr(self.model.text_config, "max_position_embeddings", 2048))
            return
        run = Run.open(name)
        if run.config.get("task") not in ("chats", "interleaved"):
            raise RunError(
                f"{run.path} is a run of the task {run.config.get('task')}, whose model does not answer; name one of chats"
            )
        self.learner = load_learner(run).to(place)
        self.model = self.learner.model

    def prompt(self, question: str, images: Sequence[Path | str], system: str = "") -> Prompt:
        """Make a prompt of a question and pictures. Marks `<image>` that are missing are put before the question."""
        if images and not self.model.size:
            raise CounterpointError(f"{self.model.name} takes no pictures; leave out --image")
        marks = question.count(IMAGE)
        if marks not in (0, len(images)):
            raise CounterpointError(
                f"the question has {marks} marks {IMAGE}, and {counted(len(images), 'picture was', 'pictures were')} given; "
                "write a mark for each, or none"
            )
        text = question if marks else f"{' '.join([IMAGE] * len(images))} {question}".strip()
        messages = (*([Message("system", system)] if system else []), Message("user", text))
        return Prompt(messages, tuple(decode(Path(image), self.model.size) for image in images))

    def answers(
        self, prompts: Sequence[Prompt], *, decoder: Decoder, temperature: float, new_tokens: int, seed: int = 0
    ) -> list[Answer]:
        """Answer prompts by a rule; that of a run as its learner does."""
        if self.learner is not None:
            given = {"temperature": temperature, "new_tokens": new_tokens, "draw": seed}
            of_run: list[Answer] = self.learner.answers(prompts, decoder=decoder, **given)
            return of_run
        generator = torch.Generator().manual_seed(seed)
        more: dict[str, Any] = {"temperature": temperature, "new_tokens": new_tokens, "generator": generator}
        return answers(self.model, prompts, decoder, **more)

    def rule(self, method: str) -> Decoder:
        """Return the rule of a method. CounterpointError where it needs an amateur, which the run lacks."""
        if method in CONTRASTED:
            if not hasattr(self.learner, "rule"):
                raise CounterpointError(
                    f"{method} needs an amateur; name a run of lol, or another method than {', '.join(CONTRASTED)}"
                )
            found: Decoder = self.learner.rule(method)
            return found
        place = METHODS[method]
        return importlib.import_module(place).decoder_of(self, method) if place else Plain()


def ask(
    run: str,
    question: str,
    images: Sequence[Path | str] = (),
    methods: Sequence[str] = ("plain",),
    *,
    system: str = "",
    temperature: float = 1.0,
    new_tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[Asked]:
    """Answer a question by each method.

    Args:
        run: path of a run, or hf:NAME.
        question: text; `<image>` marks the place of a picture, by default before it.
        images: paths of pictures, which are cut to squares.
        methods: names of METHODS.
        system: text of a system's message. Default: none.
        temperature: of draws; 0 for the most probable tokens. "greedy" always takes these.
        new_tokens: maximum number of tokens of an answer. Default: as many as the run's own; 64 for a model of transformers.
        seed: seed of the draws and of random transformations; they are the same on every device.
        device: device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises CounterpointError for an unknown method and for a question that does not fit. Raises DataError for a picture that
    cannot be read.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    check_seed(seed)
    check_there(images)
    answering = Answering(run, device)
    prompt = answering.prompt(question, images, system)
    if new_tokens is None:
        new_tokens = 64 if answering.learner is None else int(answering.learner.config.new_tokens)
    found = []
    for method in methods:
        [answer] = answering.answers(
            [prompt],
            decoder=answering.rule(method),
            temperature=0.0 if method == "greedy" else temperature,
            new_tokens=new_tokens,
            seed=seed,
        )
        found.append(Asked(method, answer))
    return found


def produce(
    run: str, reply: str, out: Path | str, *, picture: str = "drawn", seed: int = 0, device: str = "cpu"
) -> list[Made]:
    """Give the reply of a run that names modalities to its converters, and write their files into a new folder.

    Args:
        run: path of a run of switchgpt.
        reply: what its model answered.
        out: the folder, which must not exist or must be empty.
        picture: converter of pictures: drawn, run:RUN or hf:NAME.
        seed: seed of the pictures' noise.
        device: device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises CounterpointError for another model, a folder with files and an unknown converter.
    """
    flags = () if run.startswith("hf:") else (Run.open(run).config.get("config") or {}).get("flags", ())
    if not flags:
        raise CounterpointError(f"{run} names no modalities, which --out needs; name a run of switchgpt")
    out = check_empty(out)
    return dispatch(reply, zoo(picture, seed=seed, device=device), out, flags)


def _picture_size(name: str) -> int:
    """Return the size of the pictures of a model of transformers; 0 for one without pictures."""
    from transformers import AutoConfig, AutoImageProcessor

    place = name.removeprefix("hf:")
    try:
        config: Any = AutoConfig.from_pretrained(place)
    except Exception as error:  # of transformers and of its HTTP client
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {text[:300].rstrip('.')}; name a folder, or a run"
        ) from error
    if getattr(config, "vision_config", None) is None:
        return 0
    size: Any = AutoImageProcessor.from_pretrained(place)
    for name_of in ("crop_size", "size"):
        wanted = getattr(size, name_of, None) or {}
        for key in ("height", "shortest_edge"):
            value = wanted.get(key) if hasattr(wanted, "get") else getattr(wanted, key, None)
            if value:
                return int(value)
    return int(config.vision_config.image_size)
