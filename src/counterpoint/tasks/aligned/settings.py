"""Define the settings that every learner of the task `aligned` has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Suppress

from counterpoint.encoders.audio import check_audio_encoder
from counterpoint.encoders.images import check_image_encoder
from counterpoint.encoders.text import Tokenizer, build_tokenizer, check_text_encoder
from counterpoint.engine.optim import OptimConfig
from counterpoint.errors import CounterpointError
from counterpoint.tasks.adapted import check_aligned_adapters
from counterpoint.views.images import check_recipe


@dataclass
class AlignedConfig(OptimConfig):
    """Settings that every learner of this task has."""

    epochs: int = 32
    """Passes over the training items."""
    batch_size: int = 256
    """Items in a batch, over all processes together. The last, smaller batch of an epoch is dropped."""
    image_encoder: str = "torchvision:resnet50"
    """The network for images: resnet-s, conv-s, conv-group, conv-fine, conv-cells, convnet, convnet-s, unet,
    unet-s, mlp-s, vit-s, vit-xs, vit-conv, tower-WIDTH-DEPTH-HEAD, timm:NAME, torchvision:NAME, hf:NAME."""
    text_encoder: str = "text-s"
    """The network for text: text-s, minilm, tower-WIDTH-DEPTH-HEAD, hf:NAME."""
    audio_encoder: str = "sound-s"
    """The network for sounds: sound-s, frames-s, hf:NAME."""
    vector_encoder: str = "mlp"
    """The network for vectors: mlp (normalised, 256 wide, GELU), linear, relu-WIDTH-WIDTH..., or as-is (unchanged)."""
    vector_noise: float = 0.0
    """Standard deviation of the noise to add to training vectors; 0: none."""
    pretrained: bool = False
    """Start from published weights if the image encoder has them."""
    lora: int = 0
    """Rank of low-rank adapters (LoRA) of the encoders with published weights: of pictures with --pretrained, minilm and
    hf:NAME of texts, hf:NAME of sounds. They train instead of these encoders' own weights. 0: no adapters."""
    lora_alpha: float | None = None
    """Adapters are multiplied by lora_alpha / lora; > 0. None: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers with adapters: attention, linear, conv, or names, ends of names and patterns of layers. Default: attention and
    linear layers of transformers; convolutions and linear layers of others."""
    lora_statistics: Literal["frozen", "train"] = "frozen"
    """Running statistics of batch normalisation in adapted encoders: frozen, or train as without adapters."""
    lora_modalities: tuple[str, ...] = ()
    """Modalities whose encoders get adapters, such as those of a run to --continue. Default: those with published weights."""
    embedding: int = 512
    """Width of the shared space."""
    context: int = 77
    """Maximum number of tokens of a text; longer texts are cut."""
    vocabulary: int = 2000
    """Maximum number of tokens that text-s learns from the training captions."""
    recipe: str = "weak"
    """Augmentation of training images: simclr, simclr-cifar, supcon, moco-v1, moco-v2, byol, swav, dino, dino-cifar, adainf,
    adainf-cifar, obow, obow-cifar, mae, supervised, weak, none; for small digits digits-moved, digits-easy, digits-plain,
    digits-shifted, digits-hard, digits-s0, digits-s25, digits-s50, digits-s100, digit-patterns, digit-styles, obow-canvases,
    tile-canvases; shapes; clusters; latent-factors (see counterpoint.views.images.RECIPES)."""
    prompt: str = "{}"
    """Texts of a class in zero-shot classification; {} is the class's name. Several stand between "|", or in a text file, one a
    line; the mean of their embeddings counts."""
    class_names: str = ""
    """File of the classes' names for these texts: JSON {class: name} or a line for each class. Default: the data's names."""
    evaluate_every: int = 5
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 0
    """Number of processes that load items; 0: load in the main process."""
    constant_lr: bool = False
    """Keep the learning rate constant from the first step to the last."""
    parts: Annotated[dict[str, Any], Suppress] = field(default_factory=dict)
    """Settings of the parts added to the system, by slug."""

    adapts: ClassVar[bool] = True  # whether `lora` applies to the encoders

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("epochs", "batch_size", "embedding", "context", "vocabulary", "evaluate_every")
        self.need_weight("vector_noise", "workers")
        if "{}" not in self.prompt and not Path(self.prompt).suffix:
            raise CounterpointError(f"prompt must contain {{}}, the place of the class's name, got '{self.prompt}'")

    def tokenizer(self, captions: Sequence[str]) -> Tokenizer:
        """Return the tokenizer of the texts; text-s and towers learn theirs from these captions."""
        return build_tokenizer(self.text_encoder, captions, vocabulary=self.vocabulary)

    def check_batch(self) -> None:
        """Raise CounterpointError for a batch of one item, which has no other item to contrast it with."""
        if self.batch_size < 2:
            raise CounterpointError("batch_size must be at least 2: items are contrasted within a batch")

    def check(self) -> None:
        """Raise CounterpointError for unknown names of networks and views. Runs before data are read."""
        check_image_encoder(self.image_encoder)
        check_text_encoder(self.text_encoder)
        check_audio_encoder(self.audio_encoder)
        check_recipe(self.recipe)
        check_aligned_adapters(self)
        self.check_batch()


# Settings for a small set on a few cores, which replace the papers'. Systems add their own.
LAPTOP: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 256,
    "image_encoder": "resnet-s",
    "text_encoder": "text-s",
    "embedding": 128,
    "context": 16,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
}
