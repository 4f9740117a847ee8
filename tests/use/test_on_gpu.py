"""Models that answer, on a GPU that is not there: their answers are those of the processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import Plain
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.experiment import Experiment
from counterpoint.systems.language.ritual import decoder_of
from pretend_gpu import pretend_gpu

CHATS = "grid-chats?train=16&valid=4&test=4&grid=2&cell=8&most=2"
LLAVA: dict[str, Any] = {"model": "llava-16-2-2", "vocabulary": 300, "context": 256, "epochs": 1, "batch_size": 16}
LLAMA = LLAVA | {"model": "llama-16-4-2"}
COMD = LLAVA | {"teacher": "llava-16-1-2", "teacher_epochs": 1}
SYSTEMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ritual": (CHATS, LLAVA, ("ritual+", "vcd", "m3id")),
    "lol": ("misconceptions?entities=8&relations=1&values=5&train=40", LLAMA, ("lol", "dola")),
    "stic": (f"{CHATS}&styles=1&unlabelled=12", LLAVA, ("plain",)),
    "llava-mod": (f"{CHATS}&questions=0&pairs=16", LLAVA | {"teacher": "llava-24-1-2"}, ("plain",)),
    "comd": ("digit-questions?train=30&captions=20&test=2&watched=2", COMD, ("plain",)),
    "switchgpt": ("media-requests?entities=10&plain=24&requests=16", LLAMA | {"vocabulary": 320}, ("plain",)),
    "cosmo": ("digit-documents?train=24&documents=8&each=1&test_documents=3", LLAMA, ("vcd", "m3id")),
}


@pytest.mark.parametrize("slug", SYSTEMS)
def test_answers_are_the_processor_s(slug, monkeypatch):
    data, settings, methods = SYSTEMS[slug]
    experiment = Experiment.resolve(slug, data, overrides=settings, recipe=False)
    learner: Any = experiment.learner(experiment.task().facts, 0).eval()
    size = learner.model.size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    seen = Prompt((Message("user", f"{IMAGE} is there a brick ?"),), (picture,))
    prompts = [*([seen] if size else []), Prompt((Message("user", "what ?"),))]

    def answers(method: str) -> Any:
        if hasattr(learner, "rule") and method != "plain":
            rule = learner.rule(method)
        else:
            rule = Plain() if method == "plain" else decoder_of(learner, method)
        return learner.answers(prompts, decoder=rule, temperature=1.0, new_tokens=3, draw=3)

    here = [answers(method) for method in methods]
    with pretend_gpu(monkeypatch):
        learner.to("cuda")
        there = [answers(method) for method in methods]
    for one, other in zip(here, there, strict=True):
        assert [x.text for x in one] == [x.text for x in other]
        assert [x.probabilities for x in one] == [pytest.approx(x.probabilities, rel=1e-4) for x in other]
