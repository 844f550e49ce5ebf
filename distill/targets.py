"""What the student is pulled towards: a denoiser that is never trained, the same throughout or on the way to it.

DisBack (arXiv 2408.15991): between a network that fits the first student and the teacher lies a path; its points are
targets one after the other, and the teacher is the last one, and kept.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill import sharding
from distill.nodes import Weights, load_own
from samplers import Denoiser

Metrics = dict[str, Tensor]


class Target(Protocol):
    """A denoiser that may change between updates.

    final: it is the teacher, now and for good. fraction: of the way to it, 1 at the end.
    """

    @property
    def final(self) -> bool: ...
    @property
    def fraction(self) -> float: ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor: ...

    def begin(self, n: int) -> bool:
        """Makes ready for update number n; returns whether the target is another one than before."""
        ...

    def observe(self, x_sigma: Tensor, sigma: Tensor, denoised_fake: Tensor, denoised_target: Tensor) -> Metrics:
        """Is told what an update saw, each [B, ...] and sigma [B], and returns metrics of this process, each []."""
        ...


class Fixed:
    """The same denoiser from the first step to the last: the teacher.

    Whether its call is part of a graph is the caller's choice: an adversary reads its encoder with one.
    """

    final, fraction = True, 1.0

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma, cond)

    def begin(self, n: int) -> bool:
        return False

    def observe(self, x_sigma: Tensor, sigma: Tensor, denoised_fake: Tensor, denoised_target: Tensor) -> Metrics:
        return {}


class Walk(Protocol):
    """Denoisers between the one that fits the first student (fraction 0) and the teacher (1, never asked for).

    Called as a denoiser at its present place. node: how far that is from the teacher, in nodes; of an interpolation,
    the share of the way that is left.
    """

    @property
    def node(self) -> float: ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor: ...

    def move(self, fraction: float) -> None:
        """Goes to a place."""
        ...


class Nodes:
    """Recorded nodes N - 1, ..., 1, one after the other, in one network. (Node N is where the fake score starts.)

    network: is loaded with their weights. load(k): the weights of node k, all of them. count: N, at least 2. Raises
    ValueError where a node is the same network as the target before it.
    """

    def __init__(self, network: nn.Module, load: Callable[[int], Weights], count: int) -> None:
        if count < 2:
            raise ValueError(f"target.path: has {count} node; target.name: nodes needs 2 or more (1 is that of warm)")
        self._network, self._load, self._count = network, load, count
        self.node = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self._network(x, sigma, cond)

    def move(self, fraction: float) -> None:
        targets = self._count - 1
        node = targets - min(int(fraction * targets), targets - 1)
        if node == self.node:
            return
        weights, before = self._load(node), sharding.state(self._network)
        if weights.keys() == before.keys() and all(
            bool((weights[key].to(before[key]) == before[key]).all()) for key in before
        ):
            raise ValueError(f"target.path: node {node} is the same network as the target before it")
        load_own(self._network, weights)
        self.node = node


class WeightInterpolation:
    """The network whose weights are (1 - fraction) start + fraction end.

    network: is overwritten. start, end: all its weights; those of the last node, and of the teacher. Raises ValueError
    where they are not of one architecture, or the same.
    """

    def __init__(self, network: nn.Module, start: Weights, end: Weights) -> None:
        if start.keys() != end.keys() or any(start[key].shape != end[key].shape for key in start):
            raise ValueError("target.name: weight-interpolation; its ends are networks of different architectures")
        if all(bool((start[key].to(end[key]) == end[key]).all()) for key in start):
            raise ValueError("target.path: its last node is the teacher itself")
        self._network, self._fraction = network, math.nan  # as `network` is until the first move
        own = sharding.state(network)
        self._ends = [(own[key], *(ends[key].to(own[key].device) for ends in (start, end))) for key in own]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self._network(x, sigma, cond)

    @property
    def node(self) -> float:
        return 1 - self._fraction

    @torch.no_grad()
    def move(self, fraction: float) -> None:
        if fraction == self._fraction:
            return
        for own, start, end in self._ends:
            own.copy_(torch.lerp(start, end, fraction) if own.is_floating_point() else end)
        self._fraction = fraction


class ScoreInterpolation:
    """(1 - fraction) D_start + fraction D_teacher: the geometric bridge p_start^(1 - f) p_teacher^f at each level.

    Costs a pass of both. start: the denoiser of the last node.
    """

    def __init__(self, start: Denoiser, teacher: Denoiser) -> None:
        self._start, self._teacher, self._fraction = start, teacher, 0.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        with torch.no_grad():
            start = self._start(x, sigma, cond)
        return torch.lerp(start, self._teacher(x, sigma, cond), self._fraction)

    @property
    def node(self) -> float:
        return 1 - self._fraction

    def move(self, fraction: float) -> None:
        self._fraction = fraction


def walk_of(
    name: str, network: nn.Module, load: Callable[[int], Weights], count: int, weights: Weights, teacher: Denoiser
) -> Walk:
    """A way back by its name in a configuration: nodes, weight-interpolation or score-interpolation.

    network: a denoiser with the weights of the last node, which the walk may overwrite. load(k): the weights of node k
    of `count`. weights, teacher: of the teacher, and itself.
    """
    if name == "nodes":
        return Nodes(network, load, count)
    if name == "weight-interpolation":
        return WeightInterpolation(network, load(count), weights)
    return ScoreInterpolation(network, teacher)


class Backtracking(nn.Module):
    """A path, then the teacher: DisBack's target. Its buffers are its state, for checkpoints.

    path is let go when the teacher is reached. updates: until then; at a fixed schedule the fraction grows evenly.
    stages: None, or of an adaptive schedule: the next stage begins when the mismatch between target and fake score, a
    mean over `window` updates, is below `fall` times what it was in the stage's first window, and when an even schedule
    would have begun it at the latest. average(tensor): over the processes. A target switches when the node, the stage
    or the teacher is another; within an even interpolation it drifts.
    """

    state: Tensor  # stage, updates in it, its first mismatch (NaN: not seen), place (NaN: no update yet); on the CPU
    seen: Tensor  # the sum of `score_difference` in the present window

    def __init__(
        self,
        path: Walk,
        teacher: Denoiser,
        updates: int,
        stages: int | None = None,
        window: int = 5,
        fall: float = 0.5,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if updates < 1:
            raise ValueError(f"updates: {updates}; at least 1 is needed to walk a path")
        self._path: Walk | None = path
        self._teacher = (teacher,)  # not a part of this module: its weights belong to no checkpoint of the target
        self._updates, self._stages, self._window, self._fall = updates, stages, window, fall
        self._average, self.fraction, self._done = average, 0.0, 0
        self.register_buffer("state", torch.tensor([0.0, 0.0, math.nan, math.nan], dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(2, device=device))

    @property
    def final(self) -> bool:
        return self._path is None

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return (self._path or self._teacher[0])(x, sigma, cond)

    def begin(self, n: int) -> bool:
        self._done = n
        if self._path is None:
            return False
        if self._stages is None:
            self.fraction = min(1.0, (n + 1) / (self._updates + 1))
        else:
            stage = self.state[0].item()
            self.fraction = 1.0 if stage >= self._stages else (stage + 0.5) / self._stages
        if self.fraction < 1:
            self._path.move(self.fraction)
            place = float(math.ceil(self._path.node) if self._stages is None else self._stages - self.state[0].item())
        else:
            self._path, place = None, 0.0
        before = self.state[3].item()
        self.state[3] = place
        return not math.isnan(before) and before != place

    @torch.no_grad()
    def observe(self, x_sigma: Tensor, sigma: Tensor, denoised_fake: Tensor, denoised_target: Tensor) -> Metrics:
        # Over all processes: a mean of their ratios would be another number.
        difference = self._average(score_difference(denoised_target, denoised_fake, x_sigma, sigma))
        node = self.state[3].item() if self._path is None or self._stages is not None else float(self._path.node)
        if self._stages is not None and not self.final:
            self._count(difference)
        mismatch = difference[0] / difference[1]
        return {"node": mismatch.new_full((), node), "target_mismatch": mismatch}

    def _count(self, difference: Tensor) -> None:
        """One more update of a stage; at the end of a window, and only there, the device is read."""
        assert self._stages is not None
        self.seen += difference.to(self.seen)
        stage, age, first, place = self.state.tolist()
        age += 1
        due = math.floor((self._done + 1) * self._stages / self._updates)  # where an even schedule would be next
        late = due > stage
        if late or age % self._window == 0:
            total, length = self.seen.tolist()
            mean = total / length if length else math.nan
            self.seen.zero_()
            if late or mean < self._fall * first:  # never where there is no first one: NaN compares false
                stage, age, first = max(stage + 1, float(due)), 0.0, math.nan
            elif math.isnan(first):
                first = mean
        self.state.copy_(torch.tensor([stage, age, first, place], dtype=torch.float64))


def score_difference(denoised: Tensor, reference: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The means of sigma |s - s_ref| and of sigma |s_ref|, [2], of two scores at noised samples [B, ...], levels [B].

    From their denoised samples, each [B, ...]. The first over the second is the mismatch; times sigma, because a score
    at low noise is large and would be all that is seen.
    """
    pairs = ((denoised, reference), (x_sigma, reference))
    return torch.stack([((a - b).flatten(1).norm(dim=1) / sigma.to(a)).mean() for a, b in pairs])
