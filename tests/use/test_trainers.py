"""Our losses inside the trainers of other libraries: sentence-transformers, pytorch-metric-learning, Lightning, accelerate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterpoint import losses
from counterpoint.errors import CounterpointError
from counterpoint.functional import one_way_infonce
from counterpoint.use.trainers import MinedLoss, SentenceLoss

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "small", "large", "runs", "sleeps"]
PAIRS = [(f"{a} {b}", f"the {b} is {a}") for a in WORDS[:3] for b in WORDS[3:6]] * 2


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build a model of sentence-transformers of a tiny BERT and a tokenizer of whole words."""
    pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", *WORDS]
    # Not vocab_file=: see findings/transformers_vocab_file_ignored.sh.
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    facts: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
    }
    facts |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=17, max_position_embeddings=16, **facts)).save_pretrained(folder)
    tower = Transformer(str(folder))
    return SentenceTransformer(modules=[tower, Pooling(16)], device="cpu")


@pytest.mark.slow
def test_sentence_transformers_trains_with_our_loss(sentences: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    data = Dataset.from_dict({"anchor": [a for a, _ in PAIRS], "positive": [b for _, b in PAIRS]})
    loss = SentenceLoss(sentences, losses.CLIP())

    def value() -> float:
        features = [sentences.tokenize([pair[side] for pair in PAIRS[:9]]) for side in (0, 1)]
        with torch.no_grad():
            return float(loss(features))

    before = value()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=8, per_device_train_batch_size=9, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(model=sentences, args=arguments, train_dataset=data, loss=loss).train()
    assert value() < 0.7 * before


def test_a_labelled_loss_of_sentences_needs_labels(sentences: Any) -> None:
    loss = SentenceLoss(sentences, losses.SupConSingleView(), labelled=True)
    features = [sentences.tokenize([text for text, _ in PAIRS[:6]])]
    rows = sentences(dict(features[0]))["sentence_embedding"]
    labels = torch.arange(6) % 3
    torch.testing.assert_close(loss(features, labels), losses.SupConSingleView()(rows, labels))
    with pytest.raises(CounterpointError, match="give the data set a column 'label'"):
        loss(features)


def test_a_loss_of_sentences_names_the_columns_that_it_takes(sentences: Any) -> None:
    features = [sentences.tokenize([text for text, _ in PAIRS[:6]]) for _ in range(3)]
    with pytest.raises(
        CounterpointError, match=r"CLIP takes \(image, text\), but the data set has 3 columns of text; keep"
    ):
        SentenceLoss(sentences, losses.CLIP())([dict(part) for part in features])
    labelled = SentenceLoss(sentences, losses.SupConSingleView(), labelled=True)
    with pytest.raises(CounterpointError, match="2 columns of text and the labels"):
        labelled([dict(part) for part in features[:2]], torch.zeros(6))


def test_a_function_is_a_loss_of_sentences(sentences: Any) -> None:
    loss = SentenceLoss(sentences, partial(one_way_infonce, temperature=0.05))
    features = [sentences.tokenize([pair[side] for pair in PAIRS[:6]]) for side in (0, 1)]
    rows = [sentences(dict(part))["sentence_embedding"] for part in features]
    torch.testing.assert_close(loss(features), one_way_infonce(*rows, 0.05))
    assert loss.get_config_dict() == {"loss": "one_way_infonce"}


def test_a_miner_s_rows_are_the_loss_s_batch() -> None:
    pytest.importorskip("pytorch_metric_learning", reason="needs the package pytorch-metric-learning")
    from pytorch_metric_learning.miners import TripletMarginMiner

    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(12, 4), dim=1).requires_grad_()
    labels = torch.arange(12) % 4
    mined = TripletMarginMiner(margin=0.05, type_of_triplets="hard")(x, labels)
    rows = torch.cat(mined).unique()
    assert 2 < len(rows) <= 12
    loss = MinedLoss(losses.Triplet(margin=0.5))
    torch.testing.assert_close(loss(x, labels, mined), losses.Triplet(margin=0.5)(x[rows], labels[rows]))
    torch.testing.assert_close(loss(x, labels), losses.Triplet(margin=0.5)(x, labels))
    none = loss(x, labels, tuple(torch.empty(0, dtype=torch.int64) for _ in range(3)))
    none.backward()
    assert float(none) == 0
    assert not x.grad.any()


@pytest.mark.slow
def test_lightning_trains_with_our_loss_and_saves_its_queue(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the package lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.loss = nn.Linear(6, 4), losses.MoCo(dim=4, queue=16)

        def training_step(self, batch: Any, number: int) -> Any:
            z = self.encoder(batch[0])
            return self.loss(z, z.detach() + 0.1 * torch.randn_like(z))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 6)), batch_size=8)
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    changed = {name for name, value in saved.items() if not torch.equal(value, before[name])}
    assert "encoder.weight" in changed
    assert any(name.startswith("loss.") for name in changed)  # the queue


def test_accelerate_takes_our_loss_as_it_is() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    encoder, loss = nn.Linear(6, 4), losses.NTXent(temperature=0.5)
    encoder, loss, optimiser = accelerator.prepare(encoder, loss, torch.optim.SGD(encoder.parameters(), 0.5))
    x = torch.randn(16, 6)
    values = []
    for _ in range(6):
        value = loss(encoder(x), encoder(x + 0.1))
        accelerator.backward(value)
        optimiser.step()
        optimiser.zero_grad()
        values.append(float(value.detach()))
    assert values[-1] < values[0]
