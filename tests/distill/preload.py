"""What the server process of command.py imports before it forks: everything that `distill` loads when it works."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import matplotlib.figure  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import torchvision.utils  # noqa: F401
from sklearn.datasets import load_digits  # noqa: F401

import distill.cli
import distill.experiment
import distill.generate  # noqa: F401

LAZY = (diffusers.UNet2DModel, diffusers.ConsistencyModelPipeline, diffusers.CMStochasticIterativeScheduler)
