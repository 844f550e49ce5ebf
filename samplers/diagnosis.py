"""Whether to trust a Feynman-Kac run: effective sample sizes, ancestry, log-evidence and clipped weight by level."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samplers.atomic import atomic_write
from samplers.feynman_kac import FeynmanKacState

# Below these a result is not to be trusted: particles that count, and shares of the weight.
_FEW = 10.0
_LOW_ESS = 0.05
_CLIPPED = 0.05


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a run's states say of it, every row a step; printed, a table and warnings in words.

    sigma [steps]; ess, unique_ancestors, log_evidence, clipped [steps, groups] and resampled [steps, groups], on the
    CPU. particles: in a group. last: the last state.
    """

    sigma: Tensor
    ess: Tensor
    unique_ancestors: Tensor
    log_evidence: Tensor
    clipped: Tensor
    resampled: Tensor
    particles: int
    last: FeynmanKacState

    @property
    def warnings(self) -> list[str]:
        """Why not to trust the result, each in a sentence; empty where nothing speaks against it."""
        found, k, few = [], self.particles, max(2.0, min(_FEW, self.particles / 2))
        step, group = divmod(int(self.ess.argmin()), self.ess.shape[1])
        low = float(self.ess[step, group])
        if k > 1 and (low < _LOW_ESS * k or low < min(2.0, 0.75 * k)):
            found.append(
                f"only {low:.1f} of {k} particles carried weight at sigma {float(self.sigma[step]):.3g}: "
                "take more steps there, more particles, or a target that is less far from the models"
            )
        left = int(self.unique_ancestors[-1].min())
        if k > 1 and left < few:
            found.append(
                f"all particles of a group descend from {left} of the first {k}: modes can be missing, and differences "
                "between samples are those of the last steps; take more particles, or the trace form"
            )
        clipped = float(self.clipped.sum(0).max())
        if clipped > _CLIPPED:
            at = float(self.sigma[int(self.clipped.amax(1).argmax())])
            found.append(
                f"clamping moved {clipped:.2g} of the weight, summed over the steps (most at sigma {at:.3g}): the "
                "target is not met exactly; take more steps"
            )
        return found

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the result."""
        return not self.warnings

    @property
    def verdict(self) -> str:
        """The warnings, a line each, or that there are none."""
        return "\n".join(f"not to be trusted: {w}" for w in self.warnings) or "nothing speaks against this result"

    def __str__(self) -> str:
        groups, steps = self.ess.shape[1], len(self.sigma)
        rows = sorted({round(i * (steps - 1) / 9) for i in range(10)})
        lines = [
            f"{groups} group{'s' if groups > 1 else ''} of {self.particles} particles, {steps} steps, resampled "
            f"{self.resampled.double().sum(0).mean():.1f} times",
            f"{'sigma':>10} {'ESS':>8} {'ancestors':>10} {'log-evidence':>13} {'clipped':>8}   (groups' means)",
        ]
        for i in rows:
            lines.append(
                f"{float(self.sigma[i]):>10.4g} {float(self.ess[i].mean()):>8.1f} "
                f"{float(self.unique_ancestors[i].double().mean()):>10.1f} {float(self.log_evidence[i].mean()):>13.3f} "
                f"{float(self.clipped[i].mean()):>8.1%}"
            )
        return "\n".join([*lines, self.verdict])

    def plot(self, path: str | Path) -> None:
        """Write a PNG of effective sample size, ancestry and log-evidence against sigma, a line for each group."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3), layout="constrained")
        shown = self.sigma > 0
        parts = (("ESS", self.ess), ("unique ancestors", self.unique_ancestors), ("log-evidence", self.log_evidence))
        for axes, (name, values) in zip(figure.subplots(1, 3), parts, strict=True):
            axes.plot(self.sigma[shown], values[shown], linewidth=1)
            axes.set(xscale="log", xlabel="sigma", title=name)
            axes.invert_xaxis()
            if name != "log-evidence":
                axes.set_ylim(0, 1.05 * self.particles)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120)


def diagnose(states: Iterable[FeynmanKacState]) -> Diagnosis:
    """Drain a run, or read the list of its states. Only the last state is kept whole. Raises ValueError for none."""
    rows: list[tuple[Tensor, ...]] = []
    state: FeynmanKacState | None = None
    for state in states:
        p = state.particles
        own = (state.sigma, state.ess, p.unique_ancestors, p.log_evidence, p.clipped, p.resampled)
        rows.append(tuple(v.detach().cpu() for v in own))
    if state is None:
        raise ValueError("states: there are none")
    sigma, ess, unique, evidence, clipped, resampled = (torch.stack(column) for column in zip(*rows, strict=True))
    return Diagnosis(sigma, ess, unique, evidence, clipped, resampled, state.log_weights.shape[1], state)
