"""SWAD: average the weights of all steps within a valley of the validation loss.

Cha, Chun, Lee, Cho, Park, Lee, Park: "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, arXiv 2102.08604.

The steps between two evaluations form a segment: the mean of its weights, and the loss measured at its end. The valley
begins where a segment's loss is the smallest of `n_converge` in a row. It ends where all of `n_tolerance` in a row are above
the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive


def as_vector(parameters: Iterable[Tensor]) -> Float[Tensor, " n"]:
    """Copy parameters into one vector, without gradient."""
    return torch.cat([one.detach().reshape(-1) for one in parameters])


@torch.no_grad()
def from_vector(vector: Float[Tensor, " n"], parameters: Sequence[Tensor]) -> None:
    """Write a vector of `as_vector` back into parameters of the same shapes."""
    for one, values in zip(parameters, vector.split([one.numel() for one in parameters]), strict=True):
        one.copy_(values.view(one.shape))


class LossValley(nn.Module):
    """The state of an average over a valley, in buffers, so that checkpoints keep it.

    Args:
        weights: [n] all weights at the start, as one vector; only their number and type count.
        n_converge: segments in a row that decide the beginning, at least 1.
        n_tolerance: segments in a row that decide the end, at least 1.
        tolerance_ratio: share by which the threshold lies above the mean loss at the beginning, at least 0.

    Raises ValueError for numbers out of range.
    """

    dead: Tensor

    def __init__(
        self, weights: Float[Tensor, " n"], n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 0.3
    ) -> None:
        super().__init__()
        need_positive(n_converge=n_converge, n_tolerance=n_tolerance)
        if tolerance_ratio < 0:
            raise ValueError(f"tolerance_ratio must not be negative, got {tolerance_ratio}")
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        kept = max(n_converge, n_tolerance)
        self.register_buffer("means", weights.new_zeros(kept, len(weights)))  # of the last segments, see `slot`
        self.register_buffer("head", torch.zeros((), dtype=torch.long))  # place of the oldest
        self.register_buffer("losses", torch.zeros(kept, dtype=torch.float64))
        self.register_buffer("spans", torch.zeros(kept, 2, dtype=torch.long))  # first and last step
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # segments kept
        self.register_buffer("running", weights.new_zeros(len(weights)))  # mean of the open segment
        self.register_buffer("open", torch.zeros((), dtype=torch.long))  # its number of steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))  # steps seen
        self.register_buffer("average", weights.new_zeros(len(weights)))
        self.register_buffer("span", torch.full((2,), -1, dtype=torch.long))  # of the average
        self.register_buffer("averaged", torch.zeros((), dtype=torch.long))  # segments in the average
        self.register_buffer("converged", torch.full((), -1, dtype=torch.long))  # last step of the first segment, or -1
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("dead", torch.zeros((), dtype=torch.bool))
        self.means: Tensor
        self.head: Tensor
        self.losses: Tensor
        self.spans: Tensor
        self.count: Tensor
        self.running: Tensor
        self.open: Tensor
        self.step: Tensor
        self.average: Tensor
        self.span: Tensor
        self.averaged: Tensor
        self.converged: Tensor
        self.threshold: Tensor

    def slot(self, n: int) -> int:
        """Return the place of segment n, of which 0 is the oldest that is kept."""
        return (int(self.head) + n) % len(self.losses)

    def kept_losses(self) -> Float[Tensor, " segments"]:
        """Return the losses of the kept segments, the oldest first."""
        return self.losses[[self.slot(n) for n in range(int(self.count))]]

    @torch.no_grad()
    def update(self, weights: Float[Tensor, " n"]) -> None:
        """Add the weights after a step to the open segment."""
        self.open += 1
        self.step += 1
        self.running.lerp_(weights, 1 / int(self.open))

    @torch.no_grad()
    def evaluate(self, loss: float) -> None:
        """Close the segment with the loss measured at its end, and continue the average."""
        if not int(self.open):
            raise ValueError("a segment needs a step: call update before evaluate")
        kept = len(self.losses)
        if int(self.count) == kept:  # the oldest makes room
            self.head.copy_((self.head + 1) % kept)
            self.count -= 1
        self.count += 1
        slot = self.slot(int(self.count) - 1)
        self.means[slot], self.losses[slot] = self.running, loss
        self.spans[slot] = torch.stack([self.step - self.open, self.step - 1])
        self.running.zero_()
        self.open.zero_()
        if bool(self.dead):
            return
        count, converge, tolerance = int(self.count), self.n_converge, self.n_tolerance
        losses = self.kept_losses()
        smooth = range(max(0, count - tolerance), count)
        if int(self.converged) < 0:
            recent = range(count - converge, count)
            if count < converge or int(losses[recent[0] :].argmin()):
                return
            self._begin(recent[0])
            if tolerance < converge:
                chosen = recent[1 : 1 + converge - tolerance]
            else:
                head = smooth[: tolerance - converge + 1]
                above = [place for place, n in enumerate(head) if losses[n] > self.threshold]
                chosen = head[(above[-1] + 1 if above else 0) + 1 :] if tolerance > converge else head[:0]
            for n in chosen:
                self._add(n)
            return
        if int(self.spans[self.slot(smooth[0]), 1]) < int(self.converged):
            return
        if float(losses[smooth[0] :].min()) > float(self.threshold):
            self.dead.fill_(True)
        else:
            self._add(smooth[0])

    def _begin(self, n: int) -> None:
        slot = self.slot(n)
        self.converged.copy_(self.spans[slot, 1])
        mean = self.kept_losses()[-self.n_converge :].mean()
        self.threshold.copy_(mean * (1 + self.tolerance_ratio))
        self.average.copy_(self.means[slot])  # alone until a segment is added
        self.span.copy_(self.spans[slot])

    def _add(self, n: int) -> None:
        slot = self.slot(n)
        if not int(self.averaged):
            self.span[0] = self.spans[slot, 0]
        self.averaged += 1
        self.average.lerp_(self.means[slot], 1 / int(self.averaged))  # the first replaces what stood alone
        self.span[1] = self.spans[slot, 1]

    @torch.no_grad()
    def finish(self) -> tuple[Float[Tensor, " n"], int, int, int]:
        """Return the average, its first and last step, and its number of segments.

        A run that never converged returns the last segment's mean, and its number of steps. ValueError without a segment.
        """
        count = int(self.count)
        if not count:
            raise ValueError("no segment was closed: call evaluate before finish")
        if int(self.converged) < 0:
            slot = self.slot(count - 1)
            first, last = self.spans[slot].tolist()
            return self.means[slot], first, last, last - first + 1
        losses = self.kept_losses()
        if not bool(self.dead):
            for n in range(max(0, count - self.n_tolerance) + 1, count):
                if float(losses[n:].min()) > float(self.threshold):
                    break
                self._add(n)
        first, last = self.span.tolist()
        return self.average, first, last, int(self.averaged)


def swad_loss_valley(
    weights: Float[Tensor, "steps n"],
    val_losses: Sequence[float] | Float[Tensor, " evaluations"],
    steps_per_eval: int,
    n_converge: int = 3,
    n_tolerance: int = 6,
    tolerance_ratio: float = 0.3,
) -> tuple[Float[Tensor, " n"], int, int, int, bool]:
    """Average weights over the valley of a series of validation losses (see `LossValley`, which training uses).

    Args:
        weights: the weights after each step.
        val_losses: the loss after every `steps_per_eval` steps.
        steps_per_eval: steps between two evaluations, at least 1.
        n_converge, n_tolerance, tolerance_ratio: see `LossValley`.

    Returns the average, its first and last step, its number of segments, and whether the valley has ended. A series that
    never converged returns the last segment's mean, and its number of steps.
    """
    valley = LossValley(weights[0], n_converge, n_tolerance, tolerance_ratio)
    for number, loss in enumerate(val_losses):
        for row in weights[number * steps_per_eval : (number + 1) * steps_per_eval]:
            valley.update(row)
        valley.evaluate(float(loss))
        if bool(valley.dead):
            break
    return (*valley.finish(), bool(valley.dead))
