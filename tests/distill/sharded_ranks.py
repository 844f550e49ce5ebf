"""A network that learns, alone or shared out among processes: what test_sharding.py compares.

Run as a script under `accelerate launch` it learns, saves, takes up what one process has saved, learns on, saves again,
and prints as JSON what the first process has found out about the shares.
"""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from distill import checkpoint, sharding
from distill.average import Average
from distill.optim import prepare
from distill.sections import Optimizer as OptimizerConfig
from samplers import NetworkDenoiser
from samplers.adapters import EDM
from tests.distill.tiny import unet

BATCH, PARTS = 8, 2


class Learner:
    """A tiny denoiser with its update and its average, wherever the launcher puts them."""

    def __init__(self, accelerator: Accelerator, seed: int) -> None:
        network = NetworkDenoiser(unet(seed=seed, channels=(8, 16)), EDM(0.5, 0.01, 20.0, 0.0, 0.25, 1.0))
        self.network = network.requires_grad_(True)
        self.accelerator = accelerator
        kept = sharding.place(accelerator, copy.deepcopy(network).requires_grad_(False))
        self.denoiser, self.update = prepare(accelerator, network, OptimizerConfig(lr=1e-2, clip=0.5), 10)
        self.average = Average(kept, network, 0.9)

    def losses(self, step: int) -> Iterator[Tensor]:
        """Of this process's rows, in two parts, whose gradients only meet those of others in the second one."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(BATCH) % 10
        own = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        parts = list(zip(x[own].chunk(PARTS), labels[own].chunk(PARTS), strict=True))
        for k, (rows, classes) in enumerate(parts):
            with self.update.no_sync(k < PARTS - 1):
                yield self.denoiser(rows, torch.ones(len(rows)), classes).square().mean() / PARTS

    def learn(self, steps: range) -> None:
        for step in steps:
            self.update(self.losses(step), step)
            self.average(step)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.network, "average": self.average.module}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"student": self.update.optimizer}

    def save(self, folder: Path, step: int) -> Path:
        return checkpoint.save(folder, step, self.modules, self.optimizers, write=self.accelerator.is_main_process)

    def picture(self) -> Tensor:
        """What the average makes of something; all processes take part."""
        with torch.no_grad(), self.average.shown() as network:
            x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(9))
            found: Tensor = network(x, torch.ones(2), torch.tensor([3, 4]))
            return found


def main(place: Path) -> None:
    accelerator = Accelerator()
    learner = Learner(accelerator, seed=0)
    state = learner.network.state_dict()
    shares = sum(sharding.local(tensor).numel() for tensor in state.values())
    facts: dict[str, Any] = {
        "processes": accelerator.num_processes,
        "sharded": [sharding.is_sharded(module) for module in learner.modules.values()],
        "share": shares / sum(tensor.numel() for tensor in state.values()),
        "units": sum(sharding.is_sharded(module) for module in learner.network.modules()),
        "class": type(learner.network.network).__name__,
        "denoiser": learner.denoiser is learner.network and isinstance(learner.denoiser, NetworkDenoiser),
    }
    learner.learn(range(3))
    learner.save(place / "two", 3)
    facts["picture"] = learner.picture().flatten().tolist()
    facts["finite"] = sharding.all_finite(accelerator, learner.network)

    other = Learner(accelerator, seed=1)
    checkpoint.load(place / "one/step-00000003", other.modules, other.optimizers)
    other.save(place / "copied", 3)
    other.learn(range(3, 5))
    other.save(place / "continued", 5)
    if accelerator.process_index == 1:  # weights that only one process holds
        with torch.no_grad():
            sharding.local(other.network.network.conv_in.weight).fill_(torch.nan)
    facts["harm is seen"] = not sharding.all_finite(accelerator, other.network)
    if accelerator.is_main_process:
        (place / "facts.json").write_text(json.dumps(facts))
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
