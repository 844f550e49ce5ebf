"""How a number came about: versions, device, arithmetic, the command; for people, and not part of any key."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = ("distill-diffusion", "torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "pillow")


def provenance(device: str, command: str) -> dict[str, Any]:
    """Facts of this process, now."""
    import torch

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine() or device,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "tf32": False,  # the extractors turn it off
        "versions": {name: found for name in LIBRARIES if (found := _version(name))}
        | {"python": platform.python_version()},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
