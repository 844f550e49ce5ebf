"""How a number came about: versions, device, arithmetic, the command; for people, and not part of any key."""

import functools
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("distill-diffusion", "torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "pillow")


def provenance(device: str, command: str) -> dict[str, Any]:
    """Facts of this process, now."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "judged_on": maker(torch.device(device)),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "folder": os.getcwd(),
        "revision": _revision(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))}
        | {"python": platform.python_version()},
    }


def maker(device: torch.device) -> str:
    """In a line, what computes: the device and the library whose kernels decide the last bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, full float32" + (", one thread" if device.type == "cpu" else "")


@functools.cache
def _revision() -> str | None:
    """Of a checkout that this runs from; None where it is installed."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True)
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if tracked.returncode == found.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
