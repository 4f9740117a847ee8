"""Networks of in-context classification: a fuser of feature slots, label vectors, a classifier, and a causal meta-model.

    name          meta-model
    gpt2-W-D-H    a GPT-2 of D layers of width W with H heads, built here
    hf:NAME       a published GPT-2 of transformers, by name or folder

The names of the weights are those of SINC's authors, so that `dict(model.weights)` fits `in_context_classifier`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.errors import CounterpointError, needs_extra, unknown

FORMS = ["gpt2-W-D-H", "hf:NAME"]
EPS = 1e-12  # of the fuser's layer normalisations


def check_meta_model(name: str) -> None:
    """Raise CounterpointError for a name that is not in the module's table."""
    if re.match(r"hf:.", name):
        return
    if not re.fullmatch(r"gpt2-\d+-\d+-\d+", name):
        raise unknown("meta-model", name, FORMS)
    width, depth, heads = (int(part) for part in name.split("-")[1:])
    if min(width, depth, heads) < 1 or width % heads:
        raise CounterpointError(f"{name}: needs a width that is a multiple of its heads, and at least one layer")


class MetaModel(nn.Module):
    """A GPT-2 over vectors, without its token embedding.

    Args:
        name: name from the module's table.
        positions: number of vectors of the longest prompt. A published model must have as many positions.

    Raises CounterpointError for a model that cannot be loaded, is no GPT-2 or has too few positions.
    """

    def __init__(self, name: str, positions: int) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise needs_extra(name, "language") from error
        if name.startswith("hf:"):
            try:
                self.body: Any = transformers.GPT2Model.from_pretrained(name.removeprefix("hf:"), dtype=torch.float32)
            except Exception as error:  # of transformers and of its HTTP client
                said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise CounterpointError(
                    f"{name} could not be loaded as a GPT-2: {said[:300].rstrip('.')}. Name a folder, or gpt2-W-D-H"
                ) from error
            if self.body.config.n_positions < positions:
                raise CounterpointError(
                    f"{name} has {self.body.config.n_positions} positions, and a prompt has {positions}; lower --demonstrations"
                )
        else:
            width, depth, heads = (int(part) for part in name.split("-")[1:])
            shape: dict[str, Any] = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": positions}
            quiet: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            ends: dict[str, Any] = {"vocab_size": 1, "bos_token_id": 0, "eos_token_id": 0}
            started: dict[str, Any] = {"initializer_range": 0.8 * width**-0.5}  # 0.02 is made for widths of hundreds
            self.body = transformers.GPT2Model(transformers.GPT2Config(**shape, **quiet, **ends, **started))
        self.width = int(self.body.config.n_embd)
        self.body.wte = nn.Identity()

    def forward(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        """Return the last hidden states of a prompt."""
        found: Tensor = self.body(inputs_embeds=x, use_cache=False).last_hidden_state
        return found


def _attention(width: int, names: tuple[str, ...]) -> nn.ModuleDict:
    own = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
    return nn.ModuleDict({"self": own, "output": _ending(width, width)})


def _ending(inner: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)})


class InContextNetwork(nn.Module):
    """The weights of an in-context classifier, and its meta-model.

    Args:
        features: width of a slot's features.
        tokens: [vocabulary, width] initial embedding of label tokens, copied into a table that trains.
        fuser: width of the fuser.
        meta: name of the meta-model.
        positions: number of vectors of the longest prompt.
        scorer: hidden width of the classifier.

    The fuser's query attends to itself alone, so query and key of that attention have no effect. They have no weights here.
    """

    def __init__(
        self,
        features: int,
        tokens: Float[Tensor, "vocabulary width"],
        fuser: int,
        meta: str,
        positions: int,
        scorer: int,
    ) -> None:
        super().__init__()
        self.meta = MetaModel(meta, positions)
        width = self.meta.width
        self.fuser_query = nn.Parameter(torch.randn(1, features) * 0.02)
        self.label_token_embeddings = nn.Parameter(tokens.detach().clone())
        block = nn.ModuleDict(
            {
                "attention": _attention(fuser, ("value",)),
                "crossattention": _attention(fuser, ("query", "key", "value")),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(fuser, 4 * fuser)}),
                "output": _ending(4 * fuser, fuser),
            }
        )
        self.fuser = nn.ModuleDict(
            {
                "fc": nn.Linear(features, fuser),
                "attention_layers": nn.ModuleList([block]),
                "fcs": nn.ModuleList([nn.Linear(fuser, fuser)]),
                "final": nn.Linear(fuser, width),
            }
        )
        self.corr_proj, self.in_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.label_proj = nn.Linear(tokens.shape[1], width)
        self.classifier = nn.ModuleDict(
            {"dense_d": nn.Linear(width, scorer), "dense_l": nn.Linear(width, scorer), "dense": nn.Linear(scorer, 1)}
        )
        own = [self.fuser, self.corr_proj, self.in_proj, self.label_proj, self.classifier]
        for module in (layer for part in own for layer in part.modules() if isinstance(layer, nn.Linear)):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)  # 0.02, the authors', is made for large widths
            nn.init.zeros_(module.bias)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights but the meta-model's, by the authors' names."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("meta.")}


def word_embedding(name: str) -> Float[Tensor, "vocabulary width"]:
    """Return the token embedding of a published model: hf:NAME. CounterpointError for one that cannot be loaded."""
    try:
        import transformers

        found: Tensor = transformers.AutoModel.from_pretrained(name.removeprefix("hf:")).get_input_embeddings().weight
    except Exception as error:  # of transformers and of its HTTP client
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {said[:300].rstrip('.')}. Name a folder, or learnt"
        ) from error
    return found.detach().float()
