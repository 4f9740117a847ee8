"""Define losses that guide the generation of pictures from captions."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, function_of


class LabelGuided(Loss):
    """SupCon-T2I's contrast of two sets: all candidates of an anchor's class are its positives.

    Args:
        temperature: Divisor of cosines, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchors | [n, dim] | rows of any norm |
        | candidates | [m, dim] or None | the other set; None: the anchors, of which none is its own candidate |
        | labels_a | [n] int | classes of the anchors |
        | labels_c | [m] int or None | classes of the candidates; None without candidates |

    Relations: with distinct labels and paired sets it is one direction of CLIP. Without candidates it is SupConSingleView, but a
    mean over the anchors that have a positive.

    Source: Liu et al., arXiv 2412.03957.

    >>> LabelGuided(temperature=1.0)(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3))
    tensor(0.5514)
    """

    calls = "supcon-t2i:label_guided_contrast"

    def __init__(self, temperature: float = 0.1, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        anchors: Float[Tensor, "n dim"],
        candidates: Float[Tensor, "m dim"] | None,
        labels_a: Int[Tensor, " n"],
        labels_c: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over anchors with a positive."""
        alone = candidates is None
        other = (anchors, labels_a) if candidates is None else (candidates, labels_c)
        with over(self.group):
            loss: Tensor = self.function(anchors, other[0], labels_a, other[1], self.temperature, alone)
        return loss


class SentenceMatch(Loss):
    """AttnGAN's match of pictures and sentences: cross-entropies of scaled cosines in both directions, added.

    Args:
        gamma3: Scale of cosines, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, sentence | [n, dim] | codes of any norm, in the same order |
        | class_ids | [n] int or None | classes; other pairs of a class are no negatives. Below 0: without a class |

    Relations: without classes it is twice CLIP of unit rows with temperature 1 / gamma3.

    Source: Xu et al., arXiv 1711.10485.

    >>> SentenceMatch(gamma3=1.0)(torch.eye(2), torch.eye(2))
    tensor(0.6265)
    """

    calls = "supcon-t2i:damsm_sentence"

    def __init__(self, gamma3: float = 10.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(gamma3=gamma3)
        self.gamma3 = gamma3

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        sentence: Float[Tensor, "n dim"],
        class_ids: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the sum of both directions."""
        with over(self.group):
            found = self.function(image, sentence, self.gamma3, class_ids)
        loss: Tensor = found.image_to_text + found.text_to_image
        return loss


class WordMatch(Loss):
    """AttnGAN's match of the regions of pictures and the words of captions, in both directions, added.

    Args:
        gamma1: Sharpness of the attention over regions, > 0.
        gamma2: Sharpness of the sum over words, > 0.
        gamma3: Scale of the match, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | regions | [n, dim, *grid] | features of regions |
        | words | [n, dim, T] | features of words; from `lengths` on padding |
        | lengths | [n] int | numbers of words, 1 to T |
        | class_ids | [n] int or None | as of SentenceMatch |

    Relations: for one region and one word it is SentenceMatch with gamma3 = gamma2 gamma3.

    Source: Xu et al., arXiv 1711.10485.

    >>> x = torch.eye(2)[:, :, None]
    >>> WordMatch(1.0, 1.0, 1.0)(x, x, torch.tensor([1, 1]))
    tensor(0.6265)
    """

    calls = "supcon-t2i:damsm_words"

    def __init__(self, gamma1: float = 4.0, gamma2: float = 5.0, gamma3: float = 10.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(gamma1=gamma1, gamma2=gamma2, gamma3=gamma3)
        self.gamma1, self.gamma2, self.gamma3 = gamma1, gamma2, gamma3

    def forward(
        self,
        regions: Float[Tensor, "n dim *grid"],
        words: Float[Tensor, "n dim words"],
        lengths: Int[Tensor, " n"],
        class_ids: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the sum of both directions."""
        with over(self.group):
            found = self.function(regions, words, lengths, (self.gamma1, self.gamma2, self.gamma3), class_ids)
        loss: Tensor = found.image_to_text + found.text_to_image
        return loss


class MACL(Loss):
    """CustomContrast's contrast of pseudo-words: frames of a subject agree, other subjects repel by their real difference.

    Args:
        temperature: Divisor of cosines, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchors, positives | [layers, n, dim] | rows of any norm of one frame and of another |
        | features | [n, width] | features of the subjects by a frozen encoder, without gradient; cosines are clipped to 0..1 |
        | subjects | [n] int | their numbers; rows of one number never repel, rows below 0 are subjects of their own |
        | paired | [n] bool or None | rows that have a positive; None: all |

    Relations: with orthogonal features and distinct subjects it is InfoNCE whose negatives are the other anchors.

    Source: Chen et al., arXiv 2409.05606; the form is this library's, as the paper's print was not available.

    >>> x = torch.eye(3)
    >>> MACL(temperature=1.0)(x[None], x[None].clone(), x, torch.arange(3))
    tensor(0.5514)
    """

    calls = "customcontrast:macl"

    def __init__(self, temperature: float = 0.07, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        anchors: Float[Tensor, "layers n dim"],
        positives: Float[Tensor, "layers n dim"],
        features: Float[Tensor, "n width"],
        subjects: Int[Tensor, " n"],
        paired: Bool[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over layers and paired rows."""
        with over(self.group):
            similarity = function_of("customcontrast:subject_similarity")(features, subjects)
            loss: Tensor = self.function(anchors, positives, similarity, self.temperature, paired)
        return loss
