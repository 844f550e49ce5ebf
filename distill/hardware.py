"""Where a run would run: how many processes, of which precision, on which accelerator; without starting any of it."""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

SHARE = 0.35  # of a vendor's peak that training reaches: passes and what lies between them, and waits
_PRECISIONS = {"no": None, "float32": None, "bf16": torch.bfloat16}


class Accelerator(NamedTuple):
    """memory: bytes. low, full: the vendor's dense peaks in FLOP/s, of bfloat16 (with float32 sums) and of float32."""

    memory: float
    low: float
    full: float


ACCELERATORS = {
    "A100": Accelerator(80e9, 312e12, 19.5e12),
    "B200": Accelerator(180e9, 2250e12, 75e12),
    "H100": Accelerator(80e9, 989e12, 67e12),
    "H200": Accelerator(141e9, 989e12, 67e12),
    "L40S": Accelerator(48e9, 362e12, 91.6e12),
    "RTX4090": Accelerator(24e9, 165e12, 82.6e12),
}


@dataclass(frozen=True)
class Hardware:
    """processes: one accelerator each. autocast: the dtype of mixed precision, None is none. sharded: by FSDP.

    parts: that a process computes its batch in. accelerator: a name in `ACCELERATORS`. own: the bytes of the one that
    is here and not in that table, which is taken to be as fast as `accelerator`.
    """

    processes: int = 1
    autocast: torch.dtype | None = None
    sharded: bool = False
    parts: int = 1
    accelerator: str = "H100"
    own: float | None = None

    @classmethod
    def present(cls) -> "Hardware":
        """Of this process, as accelerate's launcher says in its environment; of the accelerator that is here."""
        told = os.environ.get
        known, own = _here()
        return cls(
            int(told("WORLD_SIZE", "1")),
            _PRECISIONS.get(told("ACCELERATE_MIXED_PRECISION", "no")),
            told("ACCELERATE_USE_FSDP", "false").lower() == "true" and int(told("WORLD_SIZE", "1")) > 1,
            int(told("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")),
            known,
            own,
        )

    @classmethod
    def parse(cls, text: str) -> "Hardware":
        """Of a description such as 8xH100,bf16,fsdp. Raises ValueError for what is not known."""
        first, *rest = text.split(",")
        found = re.fullmatch(r"(?:(\d+)x)?(\w+)", first)
        accelerator = {name.lower(): name for name in ACCELERATORS}.get(found[2].lower()) if found else None
        if found is None or accelerator is None or found[1] == "0":
            raise ValueError(f"--hardware: {first!r}; accepted is NxNAME, of {', '.join(ACCELERATORS)}")
        unknown = [word for word in rest if word not in (*_PRECISIONS, "fsdp")]
        if unknown:
            raise ValueError(f"--hardware: {unknown[0]!r}; accepted are fsdp, {', '.join(_PRECISIONS)}")
        if "fsdp" in rest and (found[1] or "1") == "1":
            raise ValueError(f"--hardware: {text!r}; fsdp shares networks out among several processes")
        precision = next((_PRECISIONS[word] for word in rest if word in _PRECISIONS), None)
        return cls(int(found[1] or 1), precision, "fsdp" in rest, 1, accelerator)

    @property
    def memory(self) -> float:
        """Bytes of one accelerator."""
        return ACCELERATORS[self.accelerator].memory if self.own is None else self.own

    @property
    def speed(self) -> float:
        """FLOP/s of all of them together at `SHARE` of their peak."""
        one = ACCELERATORS[self.accelerator]
        return SHARE * self.processes * (one.full if self.autocast is None else one.low)

    def __str__(self) -> str:
        precision = "float32" if self.autocast is None else f"{str(self.autocast).removeprefix('torch.')} autocast"
        sharded = ", sharded (FSDP)" if self.sharded else ""
        alike = "" if self.own is None else f"{self.own / 1e9:.0f} GB, as fast as "
        return f"{self.processes} x {alike}{self.accelerator}, {precision}{sharded}"


def _here() -> tuple[str, float | None]:
    """The accelerator of this machine by its name in `ACCELERATORS`; of one that is not in it the bytes, and another's
    name, which is also what a machine without any is taken for."""
    if not torch.cuda.is_available():
        return "H100", None
    name = torch.cuda.get_device_name().replace(" ", "").upper()
    known = next((known for known in ACCELERATORS if known.upper() in name), None)
    return (known, None) if known else ("H100", float(torch.cuda.get_device_properties().total_memory))
