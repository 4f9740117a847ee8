"""Losses of the image systems over processes: uneven shares of a batch have what one process has."""

from __future__ import annotations

import over_processes
import torch
import torch.nn.functional as F

COUNTS = [4, 2]


def draw(many: int, n: int, dim: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(many, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def mine(whole: torch.Tensor) -> torch.Tensor:
    return over_processes.mine(whole, COUNTS)


def of_two_sides():
    """name -> loss of two sides; the spawned processes import what they need here and nothing else."""
    from counterpoint import functional as fn
    from counterpoint.core.compared import Compared, Queued, pairs, views
    from counterpoint.core.distributed import global_mean
    from counterpoint.core.map_sums import class_means
    from counterpoint.systems.images.hard_contrastive import HardContrastive, HardContrastiveConfig, hard_losses
    from counterpoint.systems.images.isogclr import Settings, _side, _views
    from counterpoint.systems.images.mochi import mixed_losses
    from counterpoint.systems.parts import Step

    settings = Settings(0.4, 0.8, 0.03, 0.9, 0.05, 1.0, 3.0)
    queue = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    random = torch.rand(sum(COUNTS), 2, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def state(n: int) -> dict[str, torch.Tensor]:
        values = {"s": 0.0, "u": 0.0, "b": 0.0, "tau": 0.3}
        return {k: torch.full((n,), v, dtype=torch.float64) for k, v in values.items()}

    forms = {"views": views, "queue": Queued(queue), "pairs": pairs}

    def ways(form, x, y):
        return Compared(x, y, forms[form], 0.3).directions()

    def drawn(way, n, number):
        own = mine(random)
        return own.transpose(0, 1).flatten(0, 1) if len(way.query) == 2 * n else own[:, number]

    def mochi(form):
        return lambda x, y: torch.stack(
            [
                global_mean(mixed_losses(way, 0.3, drawn(way, len(x), number), 4, 5).losses)
                for number, way in enumerate(ways(form, x, y))
            ]
        ).sum()

    def hard(form):
        return lambda x, y: torch.stack([global_mean(hard_losses(way, 0.3, 0.5)) for way in ways(form, x, y)]).sum()

    def spread(x, y):
        part = HardContrastive(HardContrastiveConfig(keep_fraction=0.5), None, None, views)
        found = part.loss(Compared(x, y, views, 0.3), Step({}), lambda _: {})
        return found["loss"] + found["batch_uniformity"]

    def unit(f):
        return lambda x, y: f(F.normalize(x, dim=1), F.normalize(y, dim=1))

    g = torch.Generator().manual_seed(3)
    maps = torch.randn(sum(COUNTS), 4, 5, 5, generator=g, dtype=torch.float64)
    words, head = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((9, 4), (4, 5)))

    def bags(x, y):
        bow = fn.bow_targets(mine(maps), words, 0.5, 3.0, train=True, momentum=0.5).bow
        crops = torch.stack([y, x + y], 1).flatten(0, 1)
        return fn.obow_loss([x, crops], [words], [bow], [lambda v: v @ head], 2.0).loss

    def cross_level(x, y):
        """Compare two crops of two regions each; what the regions are made of depends on the picture alone."""
        one, two = x + y, x - y
        region = torch.cat([torch.stack(pair, 1).flatten(0, 1) for pair in ((x, one), (y, two))])
        feature, teacher = region.sin(), torch.cat([two, one])
        grid = torch.cat([torch.stack(pair, 1).flatten(0, 1) for pair in ((two, y), (one, x))]).detach()
        at = torch.cat([x, y]), region, feature, teacher.detach(), grid, grid.cos()
        return fn.cmd_loss(*at, [2], 2, head[0], head[1], 0.3, 0.2, pooling="attention").loss

    masks, names = (
        torch.tensor([0, 1, 3, 1, 0, 3], dtype=torch.uint8),
        torch.randn(4, 3, generator=g, dtype=torch.float64),
    )

    def relations(x, y):
        features = torch.stack([x, y], 2)[..., None]  # [n, 5, 2, 1]
        means, shown = class_means(features, mine(masks)[:, None, None].expand(-1, 2, 1), 4, whole=True)
        return fn.intra_modal_loss(means, names, shown, 0.3)

    index = torch.tensor([0, 1, 0, 2, 3, 4])
    return {
        "relations of classes over the batch": relations,
        "obow": bags,
        "cmd": cross_level,
        "dcl": lambda x, y: fn.dcl(x, y, 0.3),
        "dclw": lambda x, y: fn.dcl(x, y, 0.3, 0.5),
        "dcl one way": lambda x, y: fn.dcl(x, y, 0.3, symmetric=False),
        "by index": lambda x, y: fn.ntxent_by_index(torch.cat([x, y]), torch.cat([mine(index), mine(index)]), 0.3),
        "isogclr views": unit(lambda x, y: _views(state(len(x)), x, y, settings._replace(gamma=1.0), False)[0]),
        "isogclr pairs": unit(lambda x, y: _side(state(len(x)), x, y, settings, 1e-10, False)[0]),
        **{f"mochi {form}": mochi(form) for form in ("views", "queue", "pairs")},
        **{f"hard {form}": hard(form) for form in ("views", "queue", "pairs")},
        "hard with uniformity": spread,
    }


def losses():
    return {name: (2, function) for name, function in of_two_sides().items()}


def test_processes_together_have_the_losses_and_the_gradients_of_one(tmp_path):
    over_processes.check(losses, draw, COUNTS, tmp_path)
