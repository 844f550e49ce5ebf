"""What each of several processes does in test_streaming.py: its share of the rows, and the answers of all to a file."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.statistics import FeatureStatistics
from tools.streaming import FrechetMetric, InceptionScoreMetric, PairwiseMetric, VendiMetric

ROWS, D = 331, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real_rows() -> Tensor:
    return normal(200, D, seed=1) + 0.5


def fake_rows() -> Tensor:
    return 1.3 * normal(ROWS, D, seed=2) + torch.arange(ROWS)[:, None] / ROWS  # sorted by something


def statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    found.update(rows)
    return found


def metrics() -> dict[str, Any]:
    return {
        "frechet": FrechetMetric(D),
        "referenced": FrechetMetric(D, reference=statistics(real_rows())),
        "pairwise": PairwiseMetric(D, dtype=torch.float64),
        "vendi": VendiMetric(D),
        "inception": InceptionScoreMetric(D),
    }


def answers(shares: dict[str, Tensor], batch: int) -> dict[str, Any]:
    """Of the sample numbers of this process, by `real` and `fake`, in batches; JSON-able."""
    found: dict[str, Any] = {}
    for name, metric in metrics().items():
        with pytest.raises(ValueError, match=r"0 rows|0 samples|\[0, "):  # and this process has its own state again
            metric.compute()
        for kind, rows in (("real", real_rows()), ("fake", fake_rows())):
            if kind == "real" and name == "referenced":
                continue
            for numbers in shares[kind].split(batch):
                metric.update(rows[numbers], real=kind == "real", numbers=numbers)
        value = metric.compute()
        found[name] = {k: v.item() for k, v in value.items()} if isinstance(value, dict) else value.item()
        found[f"{name}, estimate"] = asdict(metric.estimate())
        assert metric.rows[0].shape[1] == D  # this process's own again
    return found


def main(how: str, path: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    fake, real = torch.arange(ROWS), torch.arange(len(real_rows()))
    shares = {
        "strided": {"fake": fake[rank::2], "real": real[rank::2]},
        "uneven": {"fake": (fake[:40], fake[40:])[rank], "real": (real[150:], real[:150])[rank]},
        "one without": {"fake": (fake, fake[:0])[rank], "real": (real[:0], real)[rank]},
    }[how]
    found = answers(shares, batch=32 if rank else 50)
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
