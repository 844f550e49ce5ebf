"""Who lies within whose nearest neighbours: precision and recall, density and coverage.

Kynkäänniemi et al. 2019, "Improved precision and recall metric", eq. 1-2; Naeem et al. 2020, "Reliable fidelity and
diversity metrics", eq. 2-3. A ball around a row reaches to its k-th neighbour in its own set; for precision and recall
the boundary belongs to it (<=, as published), for density and coverage not (<, as the authors' program has it).
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from tools.gram import Pair, Points, Tile, resolved
from tools.jackknife import Estimate, jackknife

NAMES = ("precision", "recall", "density", "coverage")
ROUNDING = 16  # epsilons: how far apart equal rows may seem; five were seen


class Neighbours:
    """A visitor of tiles that gathers radii within the sets and then who is in which ball."""

    def __init__(self, pair: Pair, asked: Collection[str], k_manifold: int, k_density: int) -> None:
        self.pair, self.asked, self.k_manifold, self.k_density = pair, asked, k_manifold, k_density
        real, fake, like = pair.real, pair.fake, pair.real.rows
        # Norms are shortened by the rounding of products, so that equal rows are at distance 0 and not near it.
        shorten = 1 - ROUNDING * torch.finfo(like.dtype).eps
        self.squares = {points.name: (shorten * points.squares).to(like) for points in (real, fake)}

        most = max([k for k, names in ((k_manifold, {"precision"}), (k_density, {"density", "coverage"}))
                    if names & set(asked)], default=0)  # fmt: skip
        self.nearest = {
            "real": like.new_full((len(real), 1, most), math.inf),
            "fake": like.new_full((len(fake), fake.n_blocks, k_manifold * ("recall" in asked)), math.inf),
        }
        self.margin = like.new_full((len(fake),), math.inf)  # least distance^2 to a real row, less its radius^2
        self.inside = like.new_zeros(len(fake))  # real balls
        self.closest = like.new_full((len(real), fake.n_blocks), math.inf)  # distance^2 to the fake rows of a block
        self.reach = like.new_full((len(real), fake.n_blocks + 1), math.inf)  # as margin; without a block, or with all
        self.radii: dict[str, Tensor] = {}

    def within(self, points: Points, i: Tile, j: Tile, tile: Tensor) -> None:
        nearest, squares = self.nearest[points.name], self.squares[points.name]
        if not nearest.shape[2]:
            return
        distances = _distances(tile, squares[i.rows], squares[j.rows])
        if i == j:
            distances.fill_diagonal_(math.inf)  # a row is not its own neighbour
        else:
            _keep(nearest[j.rows, i.block], distances.T.contiguous())
        _keep(nearest[i.rows, j.block], distances)

    def across(self, i: Tile, j: Tile, tile: Tensor) -> None:
        radii = self.radii or self._find_radii()
        distances = _distances(tile, self.squares["real"][i.rows], self.squares["fake"][j.rows])
        if "precision" in self.asked:
            margin = (distances - radii["precision"][i.rows, None]).amin(dim=0)
            self.margin[j.rows] = torch.minimum(self.margin[j.rows], margin)
        if "density" in self.asked:
            self.inside[j.rows] += (distances < radii["density"][i.rows, None]).sum(dim=0)
        if "coverage" in self.asked:
            closest = self.closest[i.rows, j.block]
            closest.copy_(torch.minimum(closest, distances.amin(dim=1)))
        if "recall" in self.asked:
            for without in range(self.reach.shape[1]):
                if without != j.block or self.pair.fake.n_blocks == 1:
                    reach = self.reach[i.rows, without]
                    margin = (distances - radii["recall"][j.rows, without]).amin(dim=1)
                    reach.copy_(torch.minimum(reach, margin))

    def _find_radii(self) -> dict[str, Tensor]:
        """Squared radii: of real rows [M], and of fake rows without each block and with all of them [N, blocks + 1]."""
        nearest = self.nearest["real"][:, 0].sort(dim=1).values
        if "precision" in self.asked:
            self.radii["precision"] = nearest[:, self.k_manifold - 1]
        for name in {"density", "coverage"} & set(self.asked):
            self.radii[name] = nearest[:, self.k_density - 1]
        if "recall" in self.asked:
            lists, k = self.nearest["fake"], self.k_manifold
            blocks = range(lists.shape[1])
            kept = [[b for b in blocks if b != without] or [0] for without in blocks] + [list(blocks)]
            radii = [lists[:, some].flatten(1).topk(k, largest=False).values[:, -1] for some in kept]
            self.radii["recall"] = torch.stack(radii, dim=1)
        return self.radii

    def unresolved(self) -> list[str]:
        """The shares with a ball so small that rounding may decide who is in it."""
        real, fake = self.pair.real, self.pair.fake
        balls = {
            name: (fake, radii[:, -1]) if name == "recall" else (real, radii) for name, radii in self.radii.items()
        }
        return [name for name, ball in balls.items() if not resolved(*ball)]

    def finish(self) -> dict[str, Estimate]:
        """The shares that were asked for.

        Errors are of the fake set: every number is counted again without each block, exactly; recall with the balls
        as they then are, and its error comes out 1.3 to 1.6 times too large (measured; the others within 1.2). Coverage
        and recall are defined for a number of samples (they rise with it), so nothing is debiased. Intervals end where
        the number cannot go.
        """
        return {name: getattr(self, f"_{name}")() for name in NAMES if name in self.asked}

    def _precision(self) -> Estimate:
        return self._of_fake_rows((self.margin <= 0).cpu().double(), 1.0)

    def _density(self) -> Estimate:
        return self._of_fake_rows(self.inside.cpu().double() / self.k_density, math.inf)

    def _coverage(self) -> Estimate:
        hit = (self.closest < self.radii["coverage"][:, None]).cpu()
        others = hit.sum(dim=1, keepdim=True) > hit.long()  # some other block hits as well
        return self._estimate(_mean(hit.any(dim=1)), lambda b: _mean(others[:, b]), 1.0)

    def _recall(self) -> Estimate:
        covered = (self.reach <= 0).cpu()
        left = len(self.pair.fake) - int(torch.bincount(self.pair.fake.block).max())
        if left <= self.k_manifold:
            return Estimate(_mean(covered[:, -1]))
        return self._estimate(_mean(covered[:, -1]), lambda b: _mean(covered[:, b]), 1.0)

    def _of_fake_rows(self, values: Tensor, most: float) -> Estimate:
        return self._estimate(_mean(values), lambda b: _mean(values[self.pair.fake.block != b]), most)

    def _estimate(self, value: float, without: Callable[[int], float], most: float) -> Estimate:
        if self.pair.fake.n_blocks == 1:
            return Estimate(value)
        whole = jackknife(value, [without(b) for b in range(self.pair.fake.n_blocks)])
        assert whole.interval is not None
        half = (whole.interval[1] - whole.interval[0]) / 2
        interval = (max(value - half, 0.0), min(value + half, most))
        return Estimate(value, whole.standard_error, None, interval, whole.leave_one_out)


def _distances(tile: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return tile.mul(-2).add_(i[:, None]).add_(j).clamp_(min=0)


def _keep(nearest: Tensor, distances: Tensor) -> None:
    """Of the distances [n, many] and those in `nearest` [n, k], leave the k least in `nearest`."""
    k = nearest.shape[1]
    new = distances.topk(min(k, distances.shape[1]), dim=1, largest=False, sorted=False).values
    nearest.copy_(torch.cat([nearest, new], dim=1).topk(k, dim=1, largest=False, sorted=False).values)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
