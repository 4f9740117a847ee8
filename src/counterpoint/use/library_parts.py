"""Write and load one encoder in the layout of transformers, timm or sentence-transformers (see `library_folders`)."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.encoders.audio import PretrainedAudio
from counterpoint.encoders.images import Wrapped
from counterpoint.encoders.text import PretrainedText, pool
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import MEAN, STD

POOLING = {"mean": "mean", "end": "lasttoken", "first": "cls"}  # our names to those of sentence-transformers
PLAIN = "vit_tiny_patch16_224"  # an architecture of timm that takes the sizes of any plain vision transformer


def refusal(network: Any, to: str) -> str:
    """Return the reason why a library has no architecture for an encoder; "" where it has one."""
    if network is None:
        return "the system keeps no single encoder"
    model = getattr(network, "model", None)
    if to == "timm":
        if isinstance(network, (Wrapped, VisionTokens)) and (hasattr(model, "pretrained_cfg") or _plain(model)):
            return ""
        return "its encoder is no architecture of timm (timm:NAME, vit-s or vit-xs)"
    texts = isinstance(network, PretrainedText)
    if isinstance(network, (PretrainedText, PretrainedAudio, Wrapped)) and (whole := _part_of(model)):
        return f"its encoder is a part of {whole}, which transformers loads only whole"
    if to == "sentence-transformers":
        return "" if texts else "its encoder is no text model of transformers (hf:NAME or minilm)"
    if (texts or isinstance(network, (Wrapped, PretrainedAudio))) and _of_transformers(model):
        return ""
    return "its encoder is no architecture of transformers (hf:NAME or minilm)"


def _of_transformers(model: Any) -> bool:
    """Return whether a network is a model of transformers. Do not import the library for others."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def _part_of(model: Any) -> str:
    """Return the name of AutoModel's class for a network's configuration, where the network is only a part of it; else ""."""
    if not _of_transformers(model):
        return ""
    from transformers import MODEL_MAPPING

    known: Any = MODEL_MAPPING.get(type(model.config), ())
    classes: Any = tuple(known) if isinstance(known, (tuple, list)) else (known,)
    return "" if not classes or isinstance(model, classes) else str(classes[0].__name__)


def _plain(model: Any) -> bool:
    """Return whether a network is a vision transformer of timm with a linear map of each patch."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    return type(model).__module__ == "timm.models.vision_transformer" and isinstance(projection, nn.Conv2d)


# --- timm -------------------------------------------------------------------------------------------------------------


def write_timm(network: Any, folder: Path, size: int, pretrained: bool) -> None:
    """Write config.json and model.safetensors.

    Args:
        network: The encoder, whose `model` is of timm.
        folder: An empty folder.
        size: Height and width of the run's pictures in pixels.
        pretrained: Whether training began at published weights, whose licence is then named.
    """
    from safetensors.torch import save_file

    model = network.model
    known = getattr(model, "pretrained_cfg", None)
    arguments = dict(getattr(model, "_model_args", {}))
    if known is None:
        sizes = {"img_size": size, "patch_size": network.patch, "embed_dim": int(model.embed_dim)}
        heads = {"depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads, "dynamic_img_size": True}
        arguments = sizes | heads
    elif isinstance(network, VisionTokens) and "img_size" not in arguments:
        arguments["img_size"] = size
    channels = int(arguments.get("in_chans", 3))
    facts: dict[str, Any] = {
        "input_size": [channels, size, size],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(MEAN),
        "std": list(STD),
        "num_classes": 0,
        "custom_load": False,
    }
    published = dict(known or {})
    facts |= {key: published[key] for key in ("first_conv", "classifier") if key in published}
    if pretrained:
        facts |= {key: published[key] for key in ("license", "origin_url", "paper_ids") if published.get(key)}
    content = {
        "architecture": published.get("architecture", PLAIN),
        "num_classes": 0,
        "num_features": int(network.dim),
        "model_args": {**arguments, "num_classes": 0},
        "pretrained_cfg": facts,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def load_timm(folder: Path) -> Callable[[Any], Tensor]:
    """Load a folder with timm. Return the function from pictures [n, size, size, 3] to features."""
    import timm
    from PIL import Image

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return lambda pictures: model(torch.stack([prepare(Image.fromarray(picture)) for picture in pictures]))


# --- transformers -----------------------------------------------------------------------------------------------------


def write_hf(network: Any, folder: Path, encoder: Any, name: str) -> None:
    """Write a model of transformers, with its image processor, tokenizer or feature extractor.

    Args:
        network: The encoder, whose `model` is of transformers.
        folder: An empty folder.
        encoder: The loaded run.
        name: The modality.
    """
    network.model.config._name_or_path = ""  # it may name a folder of this machine
    network.model.save_pretrained(folder)
    if isinstance(network, PretrainedText):
        write_tokenizer(encoder.transform.tokenizers[name], folder, encoder.transform.context)
    elif isinstance(network, PretrainedAudio):
        if network.raw:
            network.extractor.do_normalize = True
        network.extractor.save_pretrained(folder)
    else:
        # CLIP's: scale the short side, cut out the centre, normalise.
        size = encoder.transform.modalities[name]["size"]
        content = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 2,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_tokenizer(tokenizer: Any, folder: Path, context: int) -> None:
    """Write a run's tokenizer for `AutoTokenizer`. Texts are cut to `context` tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer.from_str(tokenizer.to_json())
    vocabulary = model.get_vocab()
    roles = {
        "unk_token": ("[UNK]", "<unk>"),
        "cls_token": ("[CLS]",),
        "sep_token": ("[SEP]",),
        "mask_token": ("[MASK]", "<mask>"),
        "bos_token": ("<s>", "<|startoftext|>"),
        "eos_token": ("</s>", "<|endoftext|>"),
    }
    special = {role: word for role, words in roles.items() for word in words if word in vocabulary}
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=model.id_to_token(tokenizer.pad),
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    made.save_pretrained(folder)


def load_hf(network: Any, folder: Path, encoder: Any, name: str) -> Callable[[Any], Tensor]:
    """Load a folder with transformers. Return the function from items to features, by the folder's own processor.

    Raises CounterpointError where the folder lacks weights of the architecture.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

    model, facts = AutoModel.from_pretrained(folder, output_loading_info=True)
    model.eval()
    if facts["missing_keys"] or facts["mismatched_keys"]:
        raise CounterpointError(
            f"{name}: the encoder is a part of {type(model).__name__}, which AutoModel loads only whole. Write the format onnx or "
            "torch instead"
        )
    if isinstance(network, PretrainedText):
        tokenizer, context = AutoTokenizer.from_pretrained(folder), encoder.transform.context

        def of_texts(texts: Any) -> Tensor:
            coded = tokenizer(list(texts), padding=True, truncation=True, max_length=context, return_tensors="pt")
            return pool(model(**coded).last_hidden_state, coded["attention_mask"].bool(), network.pooling)

        return of_texts
    if isinstance(network, PretrainedAudio):
        extractor = AutoFeatureExtractor.from_pretrained(folder)

        def of_sounds(waves: Any) -> Tensor:
            made = extractor(list(waves), sampling_rate=network.rate, return_tensors="pt")
            key = model.main_input_name
            found: Tensor = model(**{key: made[key]}).last_hidden_state.mean(1)
            return found

        return of_sounds
    processor = AutoImageProcessor.from_pretrained(folder)
    return lambda pictures: network._read(model, processor(images=list(pictures), return_tensors="pt")["pixel_values"])


# --- sentence-transformers --------------------------------------------------------------------------------------------


def write_sentences(network: Any, head: nn.Linear | None, folder: Path, encoder: Any, name: str) -> None:
    """Write tower, pooling, projection and normalisation as modules of sentence-transformers.

    Args:
        network: The text encoder, whose `model` is of transformers.
        head: The run's linear layer, or None.
        folder: An empty folder.
        encoder: The loaded run.
        name: The modality.
    """
    from sentence_transformers import SentenceTransformer

    modules = _modules()
    tower = folder.with_name(f"{folder.name}.tower")
    tower.mkdir()
    write_hf(network, tower, encoder, name)
    chain: list[Any] = [
        modules.Transformer(str(tower), max_seq_length=encoder.transform.context),
        modules.Pooling(int(network.dim), pooling_mode=POOLING[network.pooling]),
    ]
    if head is not None:
        dense = modules.Dense(
            head.in_features, head.out_features, bias=head.bias is not None, activation_function=nn.Identity()
        )
        dense.linear.load_state_dict(head.state_dict())
        chain.append(dense)
    SentenceTransformer(modules=[*chain, modules.Normalize()], device="cpu").save(str(folder), create_model_card=False)


def _modules() -> Any:
    """Import the modules of sentence-transformers, which version 6 moved."""
    try:
        return importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:
        return importlib.import_module("sentence_transformers.models")


def load_sentences(folder: Path) -> Callable[[Any], Tensor]:
    """Load a folder with sentence-transformers. Return the function from texts to embeddings."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)


# --- how to load ------------------------------------------------------------------------------------------------------


def usage(to: str, network: Any, spec: Mapping[str, Any], *, projected: bool, whole: bool) -> list[str]:
    """Return the lines of Python that load a folder and compute with it, for its card."""
    if to == "sentence-transformers":
        return [
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("FOLDER")',
            'z = model.encode(["a red house"])  # unit rows, those of the run',
        ]
    if to == "timm":
        lines = [
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()',
            "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            "features = model(prepare(picture).unsqueeze(0))  # picture: a Pillow image",
        ]
    elif isinstance(network, PretrainedText):
        lines = [
            "from transformers import AutoModel, AutoTokenizer",
            "",
            'model, tokenizer = AutoModel.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
            'states = model(**tokenizer(["a red house"], return_tensors="pt")).last_hidden_state',
            {
                "mean": "features = states.mean(1)  # of several texts: the mean over each one's own tokens",
                "end": "features = states[:, -1]  # of several texts: the last token of each one",
                "first": "features = states[:, 0]",
            }[network.pooling],
        ]
    elif isinstance(network, PretrainedAudio):
        lines = [
            "from transformers import AutoFeatureExtractor, AutoModel",
            "",
            'model, extractor = AutoModel.from_pretrained("FOLDER"), AutoFeatureExtractor.from_pretrained("FOLDER")',
            f'inputs = extractor([wave], sampling_rate={network.rate}, return_tensors="pt")',
            "features = model(**inputs).last_hidden_state.mean(1)",
        ]
    else:
        stretch = "interpolate_pos_encoding" in inspect.signature(network.model.forward).parameters
        trained = getattr(network.model.config, "image_size", spec["size"])
        more = ", interpolate_pos_encoding=True" if stretch and trained != spec["size"] else ""
        lines = [
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            'model, prepare = AutoModel.from_pretrained("FOLDER"), AutoImageProcessor.from_pretrained("FOLDER")',
            f'found = model(**prepare(images=[picture], return_tensors="pt"){more})',
            "features = found.pooler_output  # or, without a pooler, the mean of found.last_hidden_state",
        ]
    if projected:
        lines.append(
            '# the run\'s embeddings: features @ safetensors.torch.load_file("projection.safetensors")["weight"].T, as unit rows'
        )
    elif whole:
        lines.append("# the run's embeddings: the features as unit rows")
    else:
        lines.append(
            "# the run's embeddings: its system computes more on these features; its format onnx has all of it"
        )
    return lines
