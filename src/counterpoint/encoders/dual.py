"""Load published models of pictures and texts in one space, by their own libraries: CLIP, SigLIP and models alike.

    hf:NAME                     a model of transformers with get_image_features and get_text_features, or its folder
    open_clip:MODEL/WEIGHTS     a model of open_clip with the name of its weights or their file: open_clip:ViT-B-32/openai

    network = build_dual_encoder("hf:openai/clip-vit-base-patch32")
    network.images(pictures)                    # [n, dim] of pictures normalised as in counterpoint.views.images
    network.texts(["a photo of a cat"])         # [1, dim]

Each network enlarges pictures to its own size, and normalises them by its own statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.errors import CounterpointError, unknown

LIBRARIES = ("hf", "open_clip")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that arrive
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = 256  # texts that are encoded together


class DualEncoder(nn.Module):
    """A network of pictures and texts. Subclasses write `image_rows` and `text_rows`.

    Args:
        dim: width of the space.
        scale: factor of cosines in its logits, 1 / temperature.
        size: height and width of its pictures, in pixels.
        mean, std: statistics of each channel by which it normalises pictures.
    """

    def __init__(
        self, dim: int, scale: float, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
    ) -> None:
        super().__init__()
        self.dim, self.scale, self.size = dim, scale, size
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        # One affine map from the statistics of the pictures that arrive to its own.
        self.register_buffer("factor", (torch.tensor(STD) / std_)[:, None, None], persistent=False)
        self.register_buffer("shift", ((torch.tensor(MEAN) - mean_) / std_)[:, None, None], persistent=False)
        self.factor: Tensor
        self.shift: Tensor

    def image_rows(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        raise NotImplementedError

    def text_rows(self, texts: list[str], cut: bool = False) -> Float[Tensor, "n dim"]:
        raise NotImplementedError

    def images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of normalised pictures of any size. They are not normalised."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self.image_rows(images * self.factor + self.shift).float()

    def texts(self, texts: Sequence[str], *, cut: bool = False) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of texts, not normalised.

        Args:
            texts: the texts.
            cut: cut texts that are longer than the context. Default: raise CounterpointError for them.
        """
        more = (True,) if cut else ()
        rows = [self.text_rows(list(texts[at : at + TEXTS]), *more).float() for at in range(0, len(texts), TEXTS)]
        return torch.cat(rows)


def need_short(name: str, texts: Sequence[str], lengths: Sequence[int], context: int) -> None:
    """Raise CounterpointError for texts of more tokens than a network's context."""
    long = [text for text, length in zip(texts, lengths, strict=True) if length > context]
    if long:
        raise CounterpointError(
            f"{name} reads {context} tokens, and {len(long)} texts are longer, such as '{long[0][:80]}'; shorten the names of "
            "the classes, their descriptions or the template"
        )


class _Transformers(DualEncoder):
    """A model of transformers."""

    def __init__(self, name: str, model: Any, tokenizer: Any, processor: Any) -> None:
        config = model.config
        vision, text = config.vision_config, config.text_config
        width = getattr(config, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size
        scale = getattr(model, "logit_scale", None)
        super().__init__(
            int(width),
            float(scale.detach().exp()) if scale is not None else 100.0,
            int(vision.image_size),
            getattr(processor, "image_mean", None) or CLIP_MEAN,
            getattr(processor, "image_std", None) or CLIP_STD,
        )
        # transformers 5 keeps the type of the file: widen half-precision weights.
        self.name, self.model, self.tokenizer = name, model.float(), tokenizer
        self.context = int(getattr(text, "max_position_embeddings", 77))
        self.padding = "max_length" if "siglip" in str(config.model_type) else True

    @staticmethod
    def _rows(found: Any) -> Tensor:
        # transformers 5 returns an object with the pooled output, transformers 4 a tensor.
        return found if isinstance(found, Tensor) else found.pooler_output

    def image_rows(self, images: Tensor) -> Tensor:
        return self._rows(self.model.get_image_features(pixel_values=images))

    def text_rows(self, texts: list[str], cut: bool = False) -> Tensor:
        if not cut:
            need_short(self.name, texts, [len(ids) for ids in self.tokenizer(texts)["input_ids"]], self.context)
        found = self.tokenizer(
            texts, padding=self.padding, max_length=self.context, truncation=True, return_tensors="pt"
        )
        names = [name for name in ("input_ids", "attention_mask") if name in found]
        return self._rows(self.model.get_text_features(**{name: found[name].to(self.factor.device) for name in names}))


class _OpenClip(DualEncoder):
    """A model of open_clip."""

    def __init__(self, name: str, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        size = settings.get("size", 224)
        scale = float(model.logit_scale.exp())
        blank = tokenizer(["a"])
        with torch.no_grad():
            dim = model.eval().encode_text(blank).shape[1]
        super().__init__(
            int(dim),
            scale,
            int(size[0] if isinstance(size, tuple | list) else size),
            settings.get("mean", CLIP_MEAN),
            settings.get("std", CLIP_STD),
        )
        self.name, self.model, self.tokenizer, self.context = name, model.float(), tokenizer, int(blank.shape[1])

    def image_rows(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def text_rows(self, texts: list[str], cut: bool = False) -> Tensor:
        if not cut and hasattr(self.tokenizer, "encode"):  # it cuts long texts without a word
            need_short(self.name, texts, [len(self.tokenizer.encode(text)) + 2 for text in texts], self.context)
        return self.model.encode_text(self.tokenizer(texts).to(self.factor.device))


@functools.lru_cache(maxsize=1)
def build_dual_encoder(name: str) -> DualEncoder:
    """Load a network of pictures and texts in evaluation mode, without gradients; keep the last one in memory.

    Args:
        name: name from the module's table.

    Raises CounterpointError for an unknown library, a missing extra and weights that cannot be downloaded. Raises it too for a
    model that lacks pictures or texts.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise unknown("model of pictures and texts", name, [f"{known}:NAME" for known in LIBRARIES])
    try:
        found = _of_transformers(name, model) if library == "hf" else _of_open_clip(name, model)
    except CounterpointError:
        raise
    except Exception as error:  # each library and its client of the network raise their own kinds
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {said[:300].rstrip('.')}. A model that is not on this machine is downloaded. "
            "If there is no network, name a folder or file with its weights"
        ) from error
    return found.eval().requires_grad_(False)


def _of_transformers(name: str, place: str) -> DualEncoder:
    try:
        import transformers
    except ImportError as error:
        raise CounterpointError(f"{name} needs the extra [language]: pip install 'counterpoint[language]'") from error
    model = transformers.AutoModel.from_pretrained(place)
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise CounterpointError(f"{name} does not embed pictures and texts in one space; name a model such as CLIP")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place)
    except Exception:  # none was saved beside the weights: CLIP's statistics
        processor = None
    return _Transformers(name, model, transformers.AutoTokenizer.from_pretrained(place), processor)


def _of_open_clip(name: str, model: str) -> DualEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise CounterpointError(f"{name} needs open_clip: pip install open_clip_torch") from error
    architecture, _, weights = model.partition("/")
    if not weights:
        raise CounterpointError(f"{name}: name its weights too, such as open_clip:ViT-B-32/openai, or their file")
    network = open_clip.create_model(architecture, pretrained=weights)
    settings = open_clip.get_model_preprocess_cfg(network)
    return _OpenClip(name, network, open_clip.get_tokenizer(architecture), settings)
