# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distil a CLIP
#
# You have a network of pictures and texts, such as CLIP, and it is too large for your job. You want a small network for
# pictures that knows your classes as well as the large one. The method is VL2V-ADiP: the small network learns to place pictures
# where CLIP places the texts.
#
# You need the extra `language` ([installation](../guides/installation.md)). No network is downloaded here. This notebook makes a
# small CLIP with the classes of `transformers`, and trains it in seconds. For a real one, name it below: `TEACHER =
# "hf:openai/clip-vit-base-patch32"`, or `"open_clip:ViT-B-32/laion2b_s34b_b79k"`. Then skip the cells on the teacher.

# %% [markdown]
# ## Pictures of your classes
#
# This cell draws 600 pictures into `pictures/CLASS/`. With pictures of your own, name your folder instead.

# %%
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 50, 50), "green": (50, 190, 70), "blue": (70, 100, 230)}
SHAPES = ["disc", "stripes"]
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def draw(name, rng):
    """Draw a coloured disc, or coloured stripes, on a noisy ground."""
    colour, shape = name.split()
    picture = Image.fromarray(rng.integers(60, 160, (32, 32, 3), dtype=np.uint8))
    x, y, r = rng.integers(9, 24), rng.integers(9, 24), rng.integers(5, 9)
    pen = ImageDraw.Draw(picture)
    if shape == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        for line in range(-r, r, 4):
            pen.rectangle((x - r, y + line, x + r, y + line + 1), fill=COLOURS[colour])
    return picture


rng = np.random.default_rng(0)
for number in range(600):
    name = CLASSES[number % len(CLASSES)]
    folder = Path("pictures") / name
    folder.mkdir(parents=True, exist_ok=True)
    draw(name, rng).save(folder / f"{number:03}.png")

# %% [markdown]
# One picture of each class:

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, len(CLASSES), figsize=(9, 1.8))
for place, name in zip(axes, CLASSES, strict=True):
    place.imshow(Image.open(next(Path("pictures", name).glob("*.png"))))
    place.set_title(name, fontsize=9)
    place.axis("off")
plt.show()

# %% [markdown]
# ## A teacher
#
# A CLIP of `transformers` with a tokenizer of whole words. Skip this with a published network.

# %%
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "[START]", "[END]", "a", "photo", "of", "one", "the", "picture", *COLOURS, *SHAPES]
numbers = {word: number for number, word in enumerate(words)}
parts = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
parts.pre_tokenizer = pre_tokenizers.Whitespace()
parts.post_processor = processors.TemplateProcessing(
    single="[START] $A [END]", special_tokens=[("[START]", 2), ("[END]", 3)]
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=parts, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")

torch.manual_seed(0)
size = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
clip = CLIPModel(
    CLIPConfig(
        text_config=size
        | {
            "vocab_size": len(words),
            "max_position_embeddings": 12,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
)
processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
f"{sum(p.numel() for p in clip.parameters()):,} weights"

# %% [markdown]
# It learns from pictures with captions. The loss is one of `cp.losses`, in a plain loop of PyTorch.

# %%
import counterpoint as cp

loss = cp.losses.CLIP()  # each batch holds every class once
optimiser = torch.optim.AdamW([*clip.parameters(), *loss.parameters()], lr=1e-3)
templates = ["a photo of a {}", "one {}", "the picture of a {}"]
history = []
for _ in range(350):
    names = [CLASSES[n] for n in rng.permutation(len(CLASSES))]
    pixels = processor([draw(name, rng) for name in names], return_tensors="pt")["pixel_values"]
    texts = tokenizer([str(rng.choice(templates)).format(name) for name in names], padding=True, return_tensors="pt")
    out = clip(pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
    value = loss(out.image_embeds, out.text_embeds)
    optimiser.zero_grad()
    value.backward()
    optimiser.step()
    history.append(float(value))
clip.save_pretrained("teacher")
processor.save_pretrained("teacher")
tokenizer.save_pretrained("teacher")
TEACHER = "hf:teacher"
print(f"loss {history[0]:.2f} at the start, {np.mean(history[-10:]):.2f} at the end")

# %% [markdown]
# ## Distil
#
# The student `conv-s` is a small convolutional network. `distil` trains it, measures both networks on the same test pictures,
# and compares their sizes. The teacher classifies by the texts of the class names, which are the names of the folders. A guess
# is right in a sixth of the cases.

# %%
from counterpoint.distilling import distil

given = {
    "epochs": 10,
    "align_epochs": 2,
    "batch_size": 48,
    "lr": 5e-3,
    "align_lr": 5e-3,
    "pretrained": False,
    "swad": False,
}
record = distil(["vl2v-adip"], TEACHER, "conv-s", "imagefolder:pictures?size=32", given=given, say=lambda text: None)

# %% [markdown]
# What the student kept, and what it costs:

# %%
import pandas as pd

row = record["rows"][0]
columns = ["accuracy", "weights", "pictures a second"]
teacher = [row["teacher"], row["teacher_parameters"], row["teacher_images_a_second"]]
student = [row["mean"], row["parameters"], row["images_a_second"]]
table = pd.DataFrame({"teacher": teacher, "student": student}, index=columns).T
table.astype({"weights": int, "pictures a second": int}).round(3)

# %% [markdown]
# ## Use the student
#
# The student is a run like any other. It gives embeddings, and the classes of new pictures.

# %%
run = cp.load(record["runs"][0])
fresh = [(name, draw(name, np.random.default_rng(100 + n))) for n, name in enumerate(CLASSES)]
z = run.encode(images=[picture for _, picture in fresh], progress=False)
known = sorted(Path("pictures").rglob("*.png"))
nearest = (z @ run.encode(images=known, progress=False).T).argmax(1)
figure, axes = plt.subplots(1, len(fresh), figsize=(9, 2))
for place, (name, picture), n in zip(axes, fresh, nearest, strict=True):
    place.imshow(picture)
    place.set_title(f"{name}\nnearest: {known[n].parent.name}", fontsize=8)
    place.axis("off")
plt.show()

# %% [markdown]
# ## Take it away
#
# An ONNX file needs neither this library nor PyTorch. It is compared with the run before it is kept.

# %%
for made in run.export("student.onnx"):
    print(f"{made.path}: {made.path.stat().st_size / 1e6:.2f} MB, largest difference {made.difference:.1e}")

# %% [markdown]
# ## Next
#
# - Other methods of the same call: `kd3`, `tinyclip` and more. [From teacher to student](../guides/distillation.md) describes
#   them.
# - On the command line: `counterpoint distill --teacher hf:openai/clip-vit-base-patch32 --student timm:resnet18 --data
#   imagefolder:FOLDER`.
# - A method of your own: continue with [Add a system](add_system.md).
