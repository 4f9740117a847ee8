"""Convert the prompts of meta-responses to texts, pictures, sounds, films and plots.

>>> from counterpoint.use.converters import dispatch, zoo
>>> [made] = dispatch("Modality: [IMAGE] Prompt: a red square", zoo(), "made")   # doctest: +SKIP
>>> made.status, made.file                                                       # doctest: +SKIP
('made', PosixPath('made/1-image.png'))

    [TEXT]     the prompt itself
    [IMAGE]    drawn: a coloured shape; run:RUN: a finished run of the task generation; hf:NAME: a pipeline of diffusers
    [AUDIO]    speech by espeak NG
    [VIDEO]    the picture of the prompt, moving over the frame
    [PLOT]     bars of the numbers in the prompt, by matplotlib

A prompt is data: no converter executes it, and no name of a file comes from it. A converter returns the whole content of a file, so
a failure leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import io
import re
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from counterpoint.data.images import Pixels
from counterpoint.encoders.meta_responses import TEXT, flags_in, parse_meta_response, well_formed
from counterpoint.engine.options import Loop
from counterpoint.errors import CounterpointError, unknown
from counterpoint.files import replacing

PICTURES = ("drawn", "run:RUN", "hf:NAME")
SIDE = 128  # pixels of a drawn picture
FRAMES = 8
VOICE, SPEED, PITCH = "en", 150, 50
NAMES = {"circle": "disc", "disk": "disc", "disc": "disc", "square": "square", "triangle": "triangle"}
MOST = 64  # numbers of a plot

Converter = Callable[[str], bytes]


class Made(NamedTuple):
    """What became of one modality of a reply."""

    modality: str
    prompt: str
    status: str  # answered, made; refused, missing or failed
    file: Path | None = None
    reason: str = ""  # of refused, missing and failed


@dataclass(frozen=True)
class Zoo:
    """The converters by flag.

    Attributes:
        converters: Flag -> function from a prompt to a file's content.
        suffixes: Flag -> suffix of the file.
        missing: Flag -> why it has no converter.
    """

    converters: Mapping[str, Converter]
    suffixes: Mapping[str, str]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """All flags, with and without a converter."""
        return list(dict.fromkeys([TEXT, *self.converters, *self.missing]))


def zoo(picture: str = "drawn", *, seed: int = 0, steps: int = 20, device: str = "cpu") -> Zoo:
    """Return the converters that this machine has.

    Args:
        picture: drawn, run:RUN or hf:NAME.
        seed: seed of the pictures' noise, which is the same on every device.
        steps: denoising steps of a pipeline of diffusers.
        device: device of run:RUN and hf:NAME: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises CounterpointError for an unknown name, and for a device that this machine lacks.
    """
    Loop(device=device).on()  # what a converter raises would be a reason why it failed
    paint: Callable[[str], Pixels]
    if picture == "drawn":
        paint = drawn
    elif picture.startswith("run:") and len(picture) > 4:
        paint = partial(generated, picture.removeprefix("run:"), seed=seed, device=device)
    elif picture.startswith("hf:") and len(picture) > 3:
        paint = partial(diffused, picture.removeprefix("hf:"), seed=seed, steps=steps, device=device)
    else:
        raise unknown("converter of pictures", picture, PICTURES)
    found: dict[str, Converter] = {
        "[IMAGE]": lambda prompt: png_of(paint(prompt)),
        "[VIDEO]": lambda prompt: moving(paint(prompt)),
        "[PLOT]": plotted,
    }
    missing = {}
    if importlib.util.find_spec("espeakng_loader") is not None:
        found["[AUDIO]"] = spoken
    else:
        missing["[AUDIO]"] = "espeak NG is not installed: pip install 'counterpoint[speech]'"
    return Zoo(found, {"[IMAGE]": ".png", "[VIDEO]": ".gif", "[PLOT]": ".png", "[AUDIO]": ".wav"}, missing)


def dispatch(reply: str, converters: Zoo, out: Path | str, flags: Sequence[str] = ()) -> list[Made]:
    """Give the prompt of a reply to the converter of each of its modalities.

    Args:
        reply: what a model answered.
        converters: the converters.
        out: folder of the files; it is made when the first file is written.
        flags: flags that the model has. Default: those of the converters.

    A reply without any flag is an answer in text. A reply with flags that is no meta-response is refused, as is an empty prompt. A
    modality without a converter is "missing", and an error of a converter is "failed", with its reason.
    """
    known = list(dict.fromkeys([TEXT, *flags, *converters.flags]))
    found, prompts = parse_meta_response(reply, known, TEXT, strict=True)
    if not well_formed(reply, known):
        if flags_in(reply):
            return [Made(TEXT, "", "refused", None, "the reply is no meta-response of known flags with a prompt")]
        return [Made(TEXT, reply.strip(), "answered")]
    return [
        _made(number, flag, prompt, converters, Path(out))
        for number, (flag, prompt) in enumerate(zip(found, prompts, strict=True), 1)
    ]


def _made(number: int, flag: str, prompt: str, converters: Zoo, out: Path) -> Made:
    if flag == TEXT:
        return Made(flag, prompt, "answered")
    converter = converters.converters.get(flag)
    if converter is None:
        reason = converters.missing.get(flag, f"{flag} has no converter; those known are {', '.join(converters.flags)}")
        return Made(flag, prompt, "missing", None, reason)
    try:
        content = converter(prompt)
    except Exception as error:  # of any converter: one that fails must not end the answer
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Made(flag, prompt, "failed", None, line[:300])
    file = out / f"{number}-{flag.strip('[]').lower()}{converters.suffixes.get(flag, '.bin')}"
    with replacing(file) as opened:
        opened.write(content)
    return Made(flag, prompt, "made", file)


# ---------------------------------------------------------------------------------------------------------- converters


def drawn(prompt: str) -> Pixels:
    """Draw the shape that a prompt names, in its colour. CounterpointError where the prompt names no shape or no colour."""
    from counterpoint.data.worlds.shapes import COLOURS, SHAPES, within

    words = re.findall(r"[a-z]+", prompt.lower())
    shape = next((NAMES[word] for word in words if word in NAMES), "")
    colour = next((word for word in words if word in COLOURS), "")
    if not shape or not colour:
        raise CounterpointError(
            f"this draws {', '.join(sorted(NAMES))} in {', '.join(COLOURS)}, and the prompt lacks shape or colour; choose another "
            "converter with --picture run:RUN or hf:NAME"
        )
    down, across = np.meshgrid(*[np.linspace(-1.5, 1.5, SIDE)] * 2, indexing="ij")
    found = np.full((SIDE, SIDE, 3), 255, np.uint8)
    found[within(SHAPES.index(shape), down, across, 1.0)] = COLOURS[colour]
    return found


def generated(run: str, prompt: str, seed: int = 0, device: str = "cpu") -> Pixels:
    """Generate a picture of a prompt by a finished run of the task generation."""
    from counterpoint.data.generation import Condition
    from counterpoint.use.generate import generator_of

    [picture] = generator_of(run, device).generate([Condition(prompt)], seed).cpu()
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


def diffused(place: str, prompt: str, seed: int = 0, steps: int = 20, device: str = "cpu") -> Pixels:
    """Generate a picture of a prompt by a pipeline of diffusers, by name or folder. Its steps begin at pure noise ("trailing")."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise CounterpointError("diffusers is not installed: pip install 'counterpoint[generation]'") from error
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(place).to(Loop(device=device).on())
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(prompt, num_inference_steps=steps, generator=generator).images[0]
    return np.asarray(image.convert("RGB"), np.uint8)


def spoken(prompt: str) -> bytes:
    """Speak a prompt by espeak NG; return a WAV file."""
    from counterpoint.data.espeak import ESPEAK_RATE, speak

    if not re.search(r"\w", prompt):
        raise CounterpointError("the prompt has no word that can be spoken")
    [sound] = list(speak([(VOICE, SPEED, PITCH, prompt)]))
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(ESPEAK_RATE)
        file.writeframes(sound.astype("<i2").tobytes())
    return held.getvalue()


def plotted(prompt: str) -> bytes:
    """Plot the numbers in a prompt as bars; return a PNG. CounterpointError where it has none, or more than MOST."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", prompt)]
    if not np.isfinite(numbers).all():
        raise CounterpointError("a number of the prompt is too large to plot")
    if not 1 <= len(numbers) <= MOST:
        raise CounterpointError(f"a plot needs 1 to {MOST} numbers, the prompt has {len(numbers)}")
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    axes.bar(range(1, len(numbers) + 1), numbers)
    axes.set_title(prompt[:60], parse_math=False)
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def png_of(pixels: Pixels) -> bytes:
    """Return a picture as a PNG file."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def moving(pixels: Pixels) -> bytes:
    """Return a GIF whose frames show a picture that moves once over the frame."""
    width = pixels.shape[1]
    frames = [Image.fromarray(np.roll(pixels, width * n // FRAMES, axis=1)) for n in range(FRAMES)]
    held = io.BytesIO()
    frames[0].save(held, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    return held.getvalue()
