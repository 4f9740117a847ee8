"""Tokenize chats: pieces learned here or read from a model's folder, the chat's form, and places of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from counterpoint.encoders.chat_names import patch_side, takes_pictures, unloaded
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.encoders.text import PAD, Tokenizer, train_bpe
from counterpoint.errors import CounterpointError

SYSTEM, USER, ASSISTANT, STOP = "[SYSTEM]", "[USER]", "[ASSISTANT]", "[STOP]"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role | upper }}] {{ message.content }}{% if message.role == 'assistant' %}[STOP]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)


class ChatTokenizer:
    """A tokenizer of transformers with a chat template, and the text that stands for one picture.

    Args:
        fast: `PreTrainedTokenizerFast`, or the fast tokenizer of a published model.
        mark: the text that the template's mark of a picture becomes.
        parts: whether the template takes a message's content as a list of parts, as those of published models with pictures do.
        image: the token that stands for a part of a picture; "" without pictures.
    """

    def __init__(self, fast: Any, *, mark: str = "", parts: bool = False, image: str = "") -> None:
        self.fast, self.mark, self.parts, self.image = fast, mark, parts, image
        if not getattr(fast, "chat_template", None):
            raise CounterpointError("its tokenizer has no chat template, so prompts cannot be made; name a chat model")
        self.pad = int(fast.pad_token_id if fast.pad_token_id is not None else fast.eos_token_id)
        self.vocabulary = len(fast)
        self.seen: dict[Any, tuple[list[int], list[int]]] = {}
        self.parts_seen: dict[Any, list[tuple[list[int], bool]]] = {}
        self.words_seen: dict[int, str] = {}

    @property
    def image_id(self) -> int:
        """The number of the token that stands for a part of a picture; -1 without pictures."""
        return int(self.fast.convert_tokens_to_ids(self.image)) if self.image else -1

    def _text(self, messages: Sequence[Message], prompt: bool) -> str:
        """Render messages; `prompt`: to be answered."""
        if self.parts:
            turns: list[dict[str, Any]] = []
            for role, text in messages:
                content: list[dict[str, str]] = []
                for n, part in enumerate(text.split(IMAGE)):
                    content += [{"type": "image"}] if n else []
                    content += [{"type": "text", "text": part.strip()}] if part.strip() else []
                turns.append({"role": role, "content": content})
        else:
            turns = [{"role": role, "content": text} for role, text in messages]
        text = self.fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return str(text).replace(self.image or IMAGE, self.mark) if self.mark else str(text)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt."""
        return list(self.fast(self._text(messages, True), add_special_tokens=False)["input_ids"])

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and those of its answer, which is the last message, with its end."""
        key = tuple(messages)
        if key not in self.seen:
            before, whole = self._text(messages[:-1], True), self._text(messages, False)
            if not whole.startswith(before):
                raise CounterpointError(
                    "the tokenizer's chat template does not put the prompt before the answer, so the answer's tokens are unknown; "
                    "use a template that ends a prompt with add_generation_prompt"
                )
            first, second = (
                list(self.fast(text, add_special_tokens=False)["input_ids"]) for text in (before, whole[len(before) :])
            )
            self.seen[key] = first, second
        return self.seen[key]

    def turns(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """Return the tokens of a chat in parts, and whether each is an answer of the assistant with its end."""
        key = tuple(messages)
        if key in self.parts_seen:
            return self.parts_seen[key]
        found: list[tuple[list[int], bool]] = []
        done = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, whole = self._text(messages[:number], True), self._text(messages[: number + 1], False)
            for text, answer in ((before[done:], False), (whole[len(before) :], True)):
                found.append((list(self.fast(text, add_special_tokens=False)["input_ids"]), answer))
            done = len(whole)
        self.parts_seen[key] = found
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without special tokens."""
        return str(self.fast.decode(list(ids), skip_special_tokens=True)).strip()

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, with special tokens."""
        for number in set(ids) - self.words_seen.keys():
            self.words_seen[number] = str(self.fast.decode([number]))
        return [self.words_seen[number] for number in ids]

    def to_json(self) -> str:
        """Return the tokenizer as one string, for `from_json`."""
        kept = {
            "tokenizer": self.fast.backend_tokenizer.to_str(),
            "template": self.fast.chat_template,
            "specials": {
                name: str(value) for name, value in self.fast.special_tokens_map.items() if isinstance(value, str)
            },
            "mark": self.mark,
            "parts": self.parts,
            "image": self.image,
        }
        return json.dumps(kept)

    @staticmethod
    def from_json(text: str) -> ChatTokenizer:
        """Build the tokenizer that `to_json` wrote."""
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        kept = json.loads(text)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(kept["tokenizer"]),
            chat_template=kept["template"],
            **kept["specials"],
        )
        return ChatTokenizer(fast, mark=kept["mark"], parts=kept["parts"], image=kept["image"])


def learn_tokenizer(texts: Iterable[str], vocabulary: int, patches: int) -> ChatTokenizer:
    """Learn a tokenizer from texts.

    Args:
        texts: the texts of all messages.
        vocabulary: maximum number of tokens, at least 270.
        patches: number of tokens of a picture; 0 without pictures.
    """
    from transformers import PreTrainedTokenizerFast

    learned: Tokenizer = train_bpe((text.replace(IMAGE, " ") for text in texts), vocabulary - 8, lowercase=False)
    model = learned.model
    model.add_special_tokens([SYSTEM, USER, ASSISTANT, STOP, IMAGE])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, chat_template=TEMPLATE, eos_token=STOP, pad_token=PAD, additional_special_tokens=[IMAGE]
    )
    return ChatTokenizer(fast, mark=IMAGE * patches, image=IMAGE if patches else "")


def chat_tokenizer(name: str, texts: Iterable[str], *, vocabulary: int, size: int) -> ChatTokenizer:
    """Return the tokenizer of a model: learned from texts for models built here, else the model's own.

    Args:
        name: name from the module's table.
        texts: texts to learn from.
        vocabulary: maximum number of tokens that are learned.
        size: height and width of the pictures in pixels; 0 without pictures.

    Raises CounterpointError for an unknown name, or a model without a fast tokenizer or chat template.
    """
    if not name.startswith("hf:"):
        patches = (size // patch_side(size)) ** 2 if size and takes_pictures(name) else 0
        return learn_tokenizer(texts, vocabulary, patches)
    place = name.removeprefix("hf:")
    try:
        from transformers import AutoProcessor, AutoTokenizer

        processor: Any = AutoProcessor.from_pretrained(place) if size else AutoTokenizer.from_pretrained(place)
    except Exception as error:  # of transformers and of its HTTP client
        raise unloaded(name, error) from error
    fast = getattr(processor, "tokenizer", processor)
    if not getattr(fast, "is_fast", False):
        raise CounterpointError(f"{name} has no fast tokenizer, and a run can keep no other kind; name another model")
    if getattr(fast, "chat_template", None) is None:
        fast.chat_template = getattr(processor, "chat_template", None)
    if not size:
        return ChatTokenizer(fast)
    image = getattr(processor, "image_token", None)
    if image is None or getattr(processor, "image_processor", None) is None:
        raise CounterpointError(f"{name} takes no pictures, which these data have; name a model of LLaVA's kind")
    blank = np.zeros((size, size, 3), np.uint8)
    number = fast.convert_tokens_to_ids(image)
    many = sum(int(token) == number for token in processor(text=str(image), images=[blank])["input_ids"][0])
    return ChatTokenizer(fast, mark=str(image) * many, parts=True, image=str(image))
