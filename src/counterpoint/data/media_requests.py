"""`media-requests`: requests for texts, pictures, sounds and films of known entities; data of SwitchGPT's claim.

    user        "sketch the ruby"                                    one of ten wordings of a modality, and an entity
    assistant   "Modality: [IMAGE] Prompt: a red ruby"               kind "meta"; the colour is not in the request

Plain chats teach a base model what it needs to know, without any flag:

    user        "define the ruby"                 assistant   "the ruby is red and bright ."
    user        "sketch the ruby"                 assistant   "pictures of the ruby are not here ."

For each modality, 3 of its 10 wordings are held out, and so are 30 % of the entities. Valid and test ask by held-out wordings for
held-out entities; the training chats have no such pair. The last word of a text, such as "bright", is drawn, so that texts have a
loss above 0.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.encoders.messages import Message
from counterpoint.encoders.meta_responses import TEXT, render
from counterpoint.errors import CounterpointError

_NAMES = (
    "circle square triangle star heart ring cross diamond cat dog horse cow duck frog owl wolf bear fox bee crow bell drum horn "
    "flute harp train clock door rain wind river storm car boat plane truck ship bird fish lamb goat hen pig robot ball kite apple "
    "lamp chair table tree flower leaf cloud moon ruby coin key boot hat cup"
)
NAMES = tuple(_NAMES.split())
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
WORDS = ("bright", "old", "small", "rare", "heavy", "common")
HELD = 3  # wordings of each modality
WORDINGS = {
    TEXT: (
        "what colour is the {e}",
        "tell me about the {e}",
        "describe the {e} in words",
        "write a line on the {e}",
        "explain the {e}",
        "what is known of the {e}",
        "give me a fact on the {e}",
        "define the {e}",
        "what can you say of the {e}",
        "note something on the {e}",
    ),
    "[IMAGE]": (
        "draw the {e}",
        "paint the {e}",
        "sketch the {e}",
        "show me a photo of the {e}",
        "how does the {e} look",
        "make an image of the {e}",
        "give me a portrait of the {e}",
        "illustrate the {e}",
        "i want a poster of the {e}",
        "let me see the {e}",
    ),
    "[AUDIO]": (
        "play the {e}",
        "what does the {e} sound like",
        "let me hear the {e}",
        "i want to listen to the {e}",
        "record the noise of the {e}",
        "sing like the {e}",
        "say the name of the {e} aloud",
        "give me the voice of the {e}",
        "how loud is the {e}",
        "make the tone of the {e}",
    ),
    "[VIDEO]": (
        "animate the {e}",
        "film the {e}",
        "show me a clip of the {e}",
        "make a movie of the {e}",
        "how does the {e} move",
        "i want to watch the {e}",
        "give me a video of the {e}",
        "shoot a scene with the {e}",
        "let the {e} dance on the screen",
        "follow the {e} with a camera",
    ),
}
MEDIA = {"[IMAGE]": "pictures", "[AUDIO]": "sounds", "[VIDEO]": "films"}


def load(
    argument: None = None,
    *,
    entities: int = 60,
    requests: int = 0,
    plain: int = 3000,
    seed: int = 0,
) -> ChatData:
    """Draw the set (in a moment).

    Args:
        argument: not used; sources share a signature.
        entities: number of entities, 8 to 61; 30 % are held out, a third of them for valid.
        requests: number of training requests; 0: every pair of a training wording and a training entity.
        plain: number of plain training chats, at least 2.
        seed: seed of colours, held-out wordings, entities and chats, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    if not 8 <= entities <= len(NAMES) or requests < 0 or plain < 2 or seed < 0:
        raise CounterpointError(
            f"media-requests: entities is 8 to {len(NAMES)}, plain at least 2, requests and seed at least 0; got {entities}, "
            f"{plain}, {requests} and {seed}"
        )
    rng = np.random.default_rng([2309_07623, seed])
    names = [NAMES[n] for n in rng.permutation(len(NAMES))[:entities]]
    colours = {name: COLOURS[int(rng.integers(len(COLOURS)))] for name in names}
    held = max(3, round(0.3 * entities))
    watched, tested, taught = names[: held // 3], names[held // 3 : held], names[held:]
    kept: dict[str, list[str]] = {}
    unseen: dict[str, list[str]] = {}
    for flag, wordings in WORDINGS.items():
        order = [wordings[n] for n in rng.permutation(len(wordings))]
        unseen[flag], kept[flag] = order[:HELD], order[HELD:]

    def told(name: str) -> str:
        return f"the {name} is {colours[name]} and {WORDS[int(rng.integers(len(WORDS)))]} ."

    def request(flag: str, wording: str, name: str) -> Chat:
        prompts = {
            "[IMAGE]": f"a {colours[name]} {name}",
            "[AUDIO]": f"the sound of a {name}",
            "[VIDEO]": f"a {colours[name]} {name} that moves",
        }
        prompt = prompts.get(flag) or told(name)
        messages = (Message("user", wording.format(e=name)), Message("assistant", render(flag, prompt)))
        return Chat(messages, kind="meta", objects=(name,))

    every = [request(flag, wording, name) for flag in WORDINGS for wording in kept[flag] for name in taught]
    chosen = [every[n] for n in rng.permutation(len(every))[: requests or len(every)]]
    base: list[Chat] = []
    while len(base) < plain:
        flag = list(WORDINGS)[int(rng.integers(len(WORDINGS)))]
        wording = WORDINGS[flag][int(rng.integers(len(WORDINGS[flag])))]
        name = names[int(rng.integers(len(names)))]
        if wording in unseen[flag] and name not in taught:
            continue
        asked = wording.format(e=name)
        answer = told(name) if flag == TEXT else f"{MEDIA[flag]} of the {name} are not here ."
        base.append(Chat((Message("user", asked), Message("assistant", answer))))
    valid, test = (
        ChatSplit([request(flag, wording, name) for flag in WORDINGS for wording in unseen[flag] for name in part])
        for part in (watched, tested)
    )
    return ChatData("media-requests", ChatSplit([*base, *chosen]), valid, test)
