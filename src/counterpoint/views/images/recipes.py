"""Define the settings of a view of an image, and the recipes of published methods by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from counterpoint.errors import CounterpointError, unknown


@dataclass(frozen=True)
class Recipe:
    """The settings of one view. Strengths have the meaning of torchvision's ColorJitter; probabilities are per image."""

    scale: tuple[float, float] | None = (0.08, 1.0)  # range of the share of the area in a crop; None: no random crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a crop
    shift: float = 0.0  # if scale is None: move by up to this share of the side, black beyond the edge
    flip: float = 0.5
    jitter: float = 0.0  # probability of colour jitter
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    gain: float = 0.0  # multiply values by a factor from 1 - gain to 1 + gain
    cut: int = 0  # side of a black square, in pixels of the view; 0: none
    cut_chance: float = 1.0
    noise: float = 0.0  # standard deviation of grey noise added to values in 0..1, which may leave that range
    channels: int = (
        3  # number of channels to change, from the first; scale the others to the view's size and add `other_noise`
    )
    other_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.gain < 0 or self.cut < 0 or self.noise < 0 or self.other_noise < 0:
            raise CounterpointError("a view's gain, cut and noise must not be negative")
        if not 1 <= self.channels <= 3:
            raise CounterpointError(f"a view's channels must lie between 1 and 3, got {self.channels}")
        for name in ("flip", "jitter", "grey", "blur", "solarise", "shift", "cut_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"a view's {name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise CounterpointError(f"a crop's scale must be a range 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise CounterpointError(f"a crop's ratio must be a range 0 < low <= high, got {self.ratio}")
        if not 0 <= self.hue <= 0.5:
            raise CounterpointError(f"hue must lie between 0 and 0.5, half the colour circle, got {self.hue}")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise CounterpointError(f"a blur's sigma must be a range 0 < low <= high, got {self.sigma}")


_SIMCLR = Recipe(jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5)
_MOCO = Recipe(scale=(0.2, 1.0), jitter=0.8, grey=0.2, blur=0.5)
_SUPCON = replace(_MOCO, blur=0.0)
_BYOL = Recipe(jitter=0.8, saturation=0.2, grey=0.2)
_ADAINF = Recipe(scale=(0.2, 1.0), jitter=0.4, grey=0.2, blur=0.5)
_OBOW = Recipe(scale=(0.08, 0.6), jitter=0.8, grey=0.2, blur=0.5)
_SHAPES = Recipe(scale=(0.25, 1.0), ratio=(1.0, 1.0), jitter=1.0, saturation=0.0, hue=0.0)
_DIGITS = Recipe(scale=None, flip=0.0)
_PATTERNS = replace(_DIGITS, noise=0.15, cut=3, cut_chance=0.8, gain=0.4, shift=1 / 8, channels=1, other_noise=0.05)
# Each recipe: the settings of its views, taken in turn (first, second, first again), and the settings of local crops.
RECIPES: dict[str, tuple[tuple[Recipe, ...], Recipe]] = {
    name: (tuple(views), local)
    for name, views, local in (
        # Chen et al. 2020, strength 1, and 0.5 without blur for CIFAR.
        ("simclr", [_SIMCLR], replace(_SIMCLR, scale=(0.05, 0.14))),
        (
            "simclr-cifar",
            [Recipe(jitter=0.8, grey=0.2)],
            Recipe(scale=(0.05, 0.14), jitter=0.8, grey=0.2),
        ),
        # Khosla et al. 2020, its published code for CIFAR.
        ("supcon", [_SUPCON], replace(_SUPCON, scale=(0.05, 0.2))),
        # He et al. 2020; Chen et al. 2020, also SimSiam's.
        ("moco-v1", [Recipe(scale=(0.2, 1.0), jitter=1.0, hue=0.4, grey=0.2)], Recipe(scale=(0.05, 0.2), jitter=1.0)),
        ("moco-v2", [_MOCO], replace(_MOCO, scale=(0.05, 0.2))),
        # Grill et al. 2020, also Barlow Twins' and VICReg's: the two views differ in blur and solarisation.
        (
            "byol",
            [replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarise=0.2)],
            replace(_BYOL, scale=(0.05, 0.14), blur=0.5),
        ),
        # Caron et al. 2020 and 2021: large crops and many small ones.
        ("swav", [replace(_SIMCLR, scale=(0.14, 1.0))], replace(_SIMCLR, scale=(0.05, 0.14))),
        (
            "dino",
            [
                replace(_BYOL, scale=(0.4, 1.0), blur=1.0),
                replace(_BYOL, scale=(0.4, 1.0), blur=0.1, solarise=0.2),
            ],
            replace(_BYOL, scale=(0.05, 0.4), blur=0.5),
        ),
        # Grey 8 x 8 digits, as in the pilots of several papers' claims: from hardly changed to hardly recognisable.
        ("digits-moved", [replace(_DIGITS, shift=1 / 8)], _DIGITS),
        ("digits-easy", [replace(_DIGITS, noise=0.05, cut=2, cut_chance=0.7, gain=0.2)], _DIGITS),
        ("digits-plain", [replace(_DIGITS, noise=0.1, cut=2, cut_chance=0.5, gain=0.2)], _DIGITS),
        ("digits-shifted", [replace(_DIGITS, noise=0.1, cut=2, cut_chance=0.5, gain=0.3, shift=1 / 8)], _DIGITS),
        ("digits-hard", [replace(_DIGITS, noise=0.15, cut=3, cut_chance=0.8, gain=0.4, shift=1 / 8)], _DIGITS),
        # The hardest, applied to the digit's channel alone: for MCL's claim.
        ("digit-patterns", [_PATTERNS], replace(_DIGITS, channels=1)),
        # Shifts of an eighth and changes of colour, for digits in many styles: for BSS's claim.
        ("digit-styles", [replace(_DIGITS, shift=1 / 8, jitter=0.8)], replace(_DIGITS, jitter=0.8)),
        # Changes of the same kinds, from very weak to very strong: for AdaInf's claim.
        ("digits-s0", [replace(_DIGITS, noise=0.05, gain=0.1)], _DIGITS),
        ("digits-s25", [replace(_DIGITS, shift=1 / 8, noise=0.1, cut=1, cut_chance=0.9, gain=0.225)], _DIGITS),
        ("digits-s50", [replace(_DIGITS, shift=1 / 8, noise=0.15, cut=2, cut_chance=0.9, gain=0.35)], _DIGITS),
        ("digits-s100", [replace(_DIGITS, shift=1 / 4, noise=0.25, cut=4, cut_chance=0.9, gain=0.6)], _DIGITS),
        # Wang et al. 2024: weaker than SimCLR's, for sets inflated with generated images. Small pictures have no blur.
        ("adainf", [_ADAINF], replace(_ADAINF, scale=(0.05, 0.2))),
        ("adainf-cifar", [replace(_ADAINF, blur=0.0)], replace(_ADAINF, scale=(0.05, 0.2), blur=0.0)),
        # Noise alone, of the source `clusters`.
        ("clusters", [replace(_DIGITS, noise=0.4 * 0.12)], _DIGITS),
        # Noise alone, of the source `latent-factors`: 0.1 in numbers of -1..1.
        ("latent-factors", [replace(_DIGITS, noise=0.05)], _DIGITS),
        # DINO's for small pictures: colours as in simclr-cifar, no blur.
        (
            "dino-cifar",
            [
                Recipe(scale=(0.4, 1.0), jitter=0.8, grey=0.2),
                Recipe(scale=(0.4, 1.0), jitter=0.8, grey=0.2, solarise=0.2),
            ],
            Recipe(scale=(0.05, 0.4), jitter=0.8, grey=0.2),
        ),
        # Gidaris et al. 2021: small crops; patches are cut from a large crop without blur, the local view. Small pictures have
        # no blur. Canvases of digits have noise and changes of brightness in place of colours.
        ("obow", [_OBOW], replace(_OBOW, scale=(0.6, 1.0), blur=0.0)),
        ("obow-cifar", [replace(_OBOW, blur=0.0)], replace(_OBOW, scale=(0.6, 1.0), blur=0.0)),
        (
            "obow-canvases",
            [Recipe(scale=(0.16, 0.49), flip=0.0, gain=0.3, noise=0.1)],
            Recipe(scale=(0.6, 1.0), flip=0.0, gain=0.3, noise=0.1),
        ),
        # One key tile among 16: crops that keep the size of tiles nearly.
        (
            "tile-canvases",
            [Recipe(scale=(0.56, 1.0), flip=0.0, gain=0.3, noise=0.1)],
            Recipe(scale=(0.15, 0.4), flip=0.0, gain=0.3, noise=0.1),
        ),
        # Textured shapes: crops of half to the whole side; brightness and contrast change, hues stay.
        ("shapes", [_SHAPES], replace(_SHAPES, scale=(0.05, 0.25))),
        # He et al. 2022.
        ("mae", [Recipe(scale=(0.2, 1.0))], Recipe(scale=(0.05, 0.2))),
        # Crop and flip, as ImageNet classifiers are trained.
        ("supervised", [Recipe()], Recipe(scale=(0.05, 0.14))),
        # Flip and a shift of up to an eighth, as CIFAR classifiers and mean teachers are trained.
        ("weak", [Recipe(scale=None, shift=1 / 8)], Recipe(scale=(0.05, 0.14))),
        # No change.
        ("none", [Recipe(scale=None, flip=0.0)], Recipe(scale=None, flip=0.0)),
    )
}


def check_recipe(name: str) -> None:
    """Raise CounterpointError, with near matches, for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise unknown("recipe of views", name, RECIPES)
