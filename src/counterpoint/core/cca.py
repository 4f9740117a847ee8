r"""Canonical correlation analysis (CCA) as a layer of a network: two modalities turned so that they correlate.

H1 and H2 [m, k] are m paired rows, centred by their means. Their covariances are S11 = H1'H1 / (m-1) + r I, S22 likewise,
and S12 = H1'H2 / (m-1). The whitened cross-covariance is T = S11^-1/2 S12 S22^-1/2. Its singular value decomposition is

    T = E diag(corr) F',

the projections are U = S11^-1/2 E and V = S22^-1/2 F, and the outputs are H1 U and H2 V. Source: Dorfer et al., "End-to-end
cross-modality retrieval with CCA projections and pairwise ranking loss", IJMIR 2018.

    means       are constants: no gradient flows through them, as in the authors' code
    signs       u_c' S12 v_c >= 0, so that both sides of an axis point the same way; a singular value decomposition
                ensures this
    axes        by ascending correlation. The authors take E and F from two eigendecompositions, of T T' and T'T. These
                agree with the decomposition here where correlations differ, and are unrelated bases where they do not
    gradients   of the inverse roots by divided differences, whose denominators cannot vanish; of the axes with
                denominators corr_i^2 - corr_j^2, exact down to 1e-8 and damped below, so that equal correlations give
                no NaN
    precision   all is computed in float64: with m slightly above k the inverse roots reach 1 / sqrt(r), and float32
                would leave three digits of T. Forward and backward of 128 float32 rows of 32 take 1.7 ms on one core,
                a transcription 1.5 ms in float32 and 1.8 ms in float64. No eigenvalue of S11 or S22 is below r. Where
                columns are nearly equal with a variance above 1e12, rounding may give smaller values, which count as r

Across processes the rows of all processes are gathered first, so that W processes give the result of one.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds, once, refuse_graph
from counterpoint.core.world import over_group

# Lower bound of reported squared correlations; 1 is the upper bound, which the regulariser can exceed.
LEAST_SQUARE = 1e-7
# Differences of squared correlations below it are damped in the gradient. Rounding moves them by 1e-16.
NEAR = 1e-8


class Projections(NamedTuple):
    """The result of CCA on paired rows; float64."""

    mean1: Float[Tensor, " k"]
    mean2: Float[Tensor, " k"]
    u: Float[Tensor, "k k"]
    v: Float[Tensor, "k k"]
    correlations: Float[Tensor, " k"]  # ascending, that of column c of u and v


class _InverseRoot(torch.autograd.Function):
    """S^-1/2 of a symmetric matrix whose eigenvalues are known to be at least `least`, by eigendecomposition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=least).sqrt()
        return (vectors / roots) @ vectors.T, roots, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        refuse_graph("CCA")
        roots, vectors = ctx.saved_tensors
        # (a^-1/2 - b^-1/2) / (a - b), written so that a = b is no exception.
        a, b = roots[:, None], roots[None, :]
        divided = -1 / (a * b * (a + b))
        inner = vectors.T @ gradients[0] @ vectors
        inner = (inner + inner.T) / 2
        return vectors @ (divided * inner) @ vectors.T, None


class _Axes(torch.autograd.Function):
    """The singular value decomposition T = E diag(s) F' of a square matrix, s ascending."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, s, f = torch.linalg.svd(matrix)
        return e.flip(1), s.flip(0), f.T.flip(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        refuse_graph("CCA")
        e, s, f = ctx.saved_tensors
        to_e, to_s, to_f = gradients
        apart = s.square()[None, :] - s.square()[:, None]
        # 1 / apart, and from NEAR on a straight line to 0, where two values are equal.
        inverse = torch.where(apart.abs() < NEAR, apart / NEAR**2, 1 / apart)
        left, right = inverse * (e.T @ to_e), inverse * (f.T @ to_f)
        inner = (left + left.T) * s[None, :] + s[:, None] * (right + right.T) + torch.diag(to_s)
        return e @ inner @ f.T


@over_group
@full_precision(keep=("h1", "h2"))  # all is float64
def canonical_projections(h1: Float[Tensor, "m k"], h2: Float[Tensor, "m k"], regulariser: float = 1e-3) -> Projections:
    """Compute means, projections and canonical correlations of paired rows (see the module), with gradients to the rows.

    Args:
        h1, h2: row i of both is one item. Across processes the rows are those of all processes.
        regulariser: r > 0, added to the diagonals of S11 and S22.

    Returns float64 for every input type; the means carry no gradient. `correlations` are sqrt(corr^2 + r) within
    [sqrt(1e-7), 1], as the authors report them. With m <= k rows the projections fit noise, and some correlations are
    always 1: a UserWarning reports this.

    Raises ValueError for shapes that differ, and for fewer than two rows. Raises it too for values that are not finite and
    for a regulariser that is not positive. Source: the authors' code, models/cca_layer.py.

    >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> canonical_projections(x, x).correlations
    tensor([0.9991, 0.9996], dtype=torch.float64)
    """
    if h1.ndim != 2 or h1.shape[1:] != h2.shape[1:] or len(h1) != len(h2):
        raise ValueError(f"h1 and h2 must be [m, k] alike, got {shapes(h1=h1, h2=h2)}")
    need_positive(regulariser=regulariser)
    h1, h2 = gather_rows(torch.stack([h1.double(), h2.double()], 1)).unbind(1)
    rows, k = h1.shape
    if rows < 2:
        raise ValueError(f"h1 and h2 must have at least two rows for a covariance, got {rows}")
    if holds(~(h1.detach().isfinite().all() & h2.detach().isfinite().all())):
        raise ValueError("h1 or h2 holds NaN or infinite values")
    if rows <= k:
        warnings.warn(
            f"CCA of {rows} rows in {k} dimensions fits noise: it needs more rows than dimensions, better many more",
            stacklevel=2,
        )
    mean1, mean2 = h1.detach().mean(0), h2.detach().mean(0)
    c1, c2 = (once(h - mean, "CCA") for h, mean in ((h1, mean1), (h2, mean2)))
    ridge = regulariser * torch.eye(k, dtype=torch.float64, device=h1.device)
    root1 = _InverseRoot.apply(c1.T @ c1 / (rows - 1) + ridge, regulariser)[0]
    root2 = _InverseRoot.apply(c2.T @ c2 / (rows - 1) + ridge, regulariser)[0]
    e, s, f = _Axes.apply(root1 @ (c1.T @ c2 / (rows - 1)) @ root2)
    correlations = (s.square() + regulariser).clamp(LEAST_SQUARE, 1).sqrt()
    return Projections(mean1, mean2, root1 @ e, root2 @ f, correlations)


class CCALayer(nn.Module):
    """Project paired rows of two modalities onto their canonical axes.

    In training mode the axes are those of the batch, with gradients through them, and are stored. Evaluation mode uses the
    stored axes. Only those of the last batch are stored (running averages of rate 1), and one batch is a poor estimate. So
    after training call `refine` on many rows. The outputs are not normalised.

    Args:
        k: width of both inputs and of both outputs.
        regulariser: r of `canonical_projections`.

    >>> layer = CCALayer(2).double()
    >>> rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> x, y = layer(rows, -rows)
    >>> torch.allclose(x, y)
    True
    """

    mean1: Tensor
    mean2: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, k: int, regulariser: float = 1e-3) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k, self.regulariser = k, regulariser
        for side in ("mean1", "mean2"):
            self.register_buffer(side, torch.zeros(k, dtype=torch.float64))
        for side in ("u", "v"):
            self.register_buffer(side, torch.eye(k, dtype=torch.float64))

    @full_precision
    def forward(
        self, h1: Float[Tensor, "m k"], h2: Float[Tensor, "m k"]
    ) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
        """Return the projected rows of both modalities.

        Raises ValueError for another width than k, and in training mode as `canonical_projections` does.
        """
        if not self.training:
            return self.first(h1), self.second(h2)
        self._fits(h1)
        self._fits(h2)
        found = canonical_projections(h1, h2, self.regulariser)
        self._store(found)
        x, y = (h1.double() - found.mean1) @ found.u, (h2.double() - found.mean2) @ found.v
        return x.to(wide(h1).dtype), y.to(wide(h2).dtype)

    @full_precision
    def first(self, h1: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Project rows of the first modality alone onto the stored axes."""
        self._fits(h1)
        return ((h1.double() - self.mean1.double()) @ self.u.double()).to(wide(h1).dtype)

    @full_precision
    def second(self, h2: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Project rows of the second modality alone onto the stored axes."""
        self._fits(h2)
        return ((h2.double() - self.mean2.double()) @ self.v.double()).to(wide(h2).dtype)

    @torch.no_grad()
    def refine(self, h1: Float[Tensor, "m k"], h2: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
        """Store the axes of these (many) rows in place of the last batch's; return their correlations."""
        self._fits(h1)
        found = canonical_projections(h1, h2, self.regulariser)
        self._store(found)
        return found.correlations

    def _fits(self, rows: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.k or not rows.is_floating_point():
            raise ValueError(f"the layer takes rows [m, {self.k}], got {list(rows.shape)} {rows.dtype}")

    @torch.no_grad()
    def _store(self, found: Projections) -> None:
        for name in ("mean1", "mean2", "u", "v"):
            getattr(self, name).copy_(getattr(found, name))
