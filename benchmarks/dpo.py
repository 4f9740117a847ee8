"""Compare STIC's step over preferences with the step of trl's DPOTrainer on one model: time, value, and peak memory.

    python benchmarks/dpo.py [--rounds 7] [--threads 1]      writes results/bench/dpo.json

Both take the same Llama with the same adapter of peft, whose reference is the model without its adapter. Both take the same pairs
of answers, with alpha 0 and beta 0.1: then the losses are equal. A step is the loss and its gradients, without the optimiser. trl's
step is its `compute_loss`, with its default measures. Ours is STIC's: one pass of both answers with the adapter and one without,
`regularized_dpo`, and the rewards. The `ratio` is trl's time over ours: above 1 ours is faster.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sides import Case, Sides, run
from torch import Tensor, nn

from counterpoint.encoders.chat_models import ChatModel, padded
from counterpoint.encoders.chat_tokenizers import learn_tokenizer
from counterpoint.experiment import Experiment
from counterpoint.systems.language.stic import STIC
from counterpoint.tasks.adapted_chats import with_adapter

OUT = Path(__file__).parents[1] / "results" / "bench" / "dpo.json"
SMALL = ("llama-64-3-4", 400, 4, 16, 8)
CASES = {
    f"{name}, {vocabulary:,} tokens, {pairs} pairs, prompts of {prompt}": (name, vocabulary, pairs, prompt, 24)
    for name, vocabulary, pairs, prompt in (
        ("llama-64-3-4", 400, 16, 64),
        ("llama-256-4-8", 8000, 8, 64),
        ("llama-256-4-8", 8000, 8, 192),
    )
}


class Both(NamedTuple):
    """STIC's learner and trl's trainer of one model, each with the same pairs."""

    learner: STIC
    batch: dict[str, Any]
    trainer: Any
    inputs: dict[str, Tensor]


def both(name: str, vocabulary: int, pairs: int, prompt: int, answer: int) -> Both:
    """Make both sides, with pairs of answers of up to `answer` tokens."""
    import datasets
    import transformers
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    warnings.filterwarnings("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tokenizer = learn_tokenizer(["a question and an answer"], 300, 0)
    tokenizer.vocabulary = vocabulary
    torch.manual_seed(0)
    model = ChatModel(name, tokenizer, context=prompt + answer)
    g = torch.Generator().manual_seed(0)

    def drawn(n: int) -> list[int]:
        return torch.randint(20, vocabulary, (n,), generator=g).tolist()

    rows = [
        {
            "prompt_ids": drawn(prompt),
            "chosen_ids": drawn(answer - n % 5),
            "rejected_ids": drawn(answer - n % 7),
        }
        for n in range(pairs)
    ]
    texts = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(folder, report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False)
        trainer = DPOTrainer(
            copy.deepcopy(model.model),
            None,
            arguments,
            train_dataset=texts,
            processing_class=tokenizer.fast,
            peft_config=config,
        )
    theirs: Any = trainer.model
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02, generator=g)
    inputs = DataCollatorForPreference(pad_token_id=tokenizer.pad)(rows)

    with_adapter(model, 8, "default")
    model.model.load_state_dict(theirs.state_dict(), strict=True)
    for key, parameter in model.model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    learner = STIC.__new__(STIC)
    nn.Module.__init__(learner)
    learner.config = Experiment.resolve("stic", "grid-chats", overrides={"alpha": 0.0}).config
    learner.model = model
    answers = [(row["prompt_ids"], row[key]) for key in ("chosen_ids", "rejected_ids") for row in rows]
    ids, mask = padded([[*first, *second] for first, second in answers], tokenizer.pad)
    labels = torch.full_like(ids, -100)
    for n, (first, second) in enumerate(answers):
        labels[n, len(first) : len(first) + len(second)] = torch.tensor(second)
    batch = {"ids": ids, "mask": mask, "labels": labels, "pairs": pairs}
    return Both(learner, batch, trainer, inputs)


def case(name: str, vocabulary: int, pairs: int, prompt: int, answer: int) -> Case:
    """Make both steps."""
    learner, batch, trainer, inputs = both(name, vocabulary, pairs, prompt, answer)

    def trl() -> Tensor:
        trainer.model.zero_grad()
        found: Tensor = trainer.compute_loss(trainer.model, dict(inputs))
        return found

    def ours() -> Tensor:
        learner.zero_grad()
        return learner.loss(batch)["loss"]

    return ours, trl


if __name__ == "__main__":
    cases = {name: Sides(partial(case, *given), partial(case, *SMALL)) for name, given in CASES.items()}
    run(cases, OUT, __doc__, rounds=7)
