"""Augment whole batches of images, with separate parameters for every image.

    pipeline = ViewPipeline(32, crops=2, recipe="simclr-cifar")
    one, two = pipeline(images, torch.Generator().manual_seed(0))       # images: uint8 [B, 3, H, W]

Every operation equals torchvision's with the same parameters (`torchvision.transforms.v2.functional`). Antialiasing is off by
default. Draws have the distributions of torchvision's random transforms, with one difference: each view of a batch draws the
order of the four colour operations once, not for every image. Images therefore run as one tensor.

These operations are faster than those of libraries. On 2 CPU threads, the same views take 2.4 to 3.6 times as long with
kornia 0.9. With torchvision's v2 transforms, image by image, they take 6.7 to 16 times as long. The benchmark is
benchmarks/views.py; its record is results/bench/views.json, with 256 images of 32 and 64 pixels, with and without blur.

Its files:
    colours.py      changes of values, and the normalisation that encoders expect
    resampling.py   blur, crops and their boxes
    recipes.py      `Recipe`, the settings of a view; RECIPES, those of published methods
    pipeline.py     `ViewPipeline`
    handled.py      `Handled`, views of tiny pictures
    augmix.py       `AugMix`, mixtures of chains of changes
"""

from counterpoint.views.images.colours import (
    GREY,
    MEAN,
    STD,
    Images,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_jitter,
    denormalise,
    grey,
    normalise,
    solarise,
    zero_to_one,
)
from counterpoint.views.images.handled import Handled
from counterpoint.views.images.pipeline import ViewParameters, ViewPipeline
from counterpoint.views.images.recipes import RECIPES, Recipe, check_recipe
from counterpoint.views.images.resampling import gaussian_blur, random_boxes, resized_crop

__all__ = [
    "GREY",
    "MEAN",
    "RECIPES",
    "STD",
    "Handled",
    "Images",
    "Recipe",
    "ViewParameters",
    "ViewPipeline",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "check_recipe",
    "colour_jitter",
    "denormalise",
    "gaussian_blur",
    "grey",
    "normalise",
    "random_boxes",
    "resized_crop",
    "solarise",
    "zero_to_one",
]
