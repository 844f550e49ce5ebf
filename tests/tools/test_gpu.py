"""On a GPU the evaluation's numbers are those of the CPU, to the arithmetic of the device."""

import pytest
import torch

from distill.data import digits
from tools.features import load_extractor
from tools.metrics import Reference, evaluate
from tools.streaming import FrechetMetric

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METRICS = ["fd", "kd", "precision", "recall", "density", "coverage", "vendi"]


def test_features_and_metrics_are_those_of_the_cpu() -> None:
    real, fake = digits("held-out").images, digits("train").images
    found = {}
    for device in ("cpu", "cuda"):
        extractor = load_extractor("digits", (1, 8, 8), device)
        reference = Reference.of(extractor(real).features, extractor.name)
        found[device] = evaluate(extractor(fake).features, reference, METRICS, device=device)
    for name in METRICS:
        on_cpu, on_gpu = found["cpu"][name], found["cuda"][name]
        assert on_cpu.standard_error is not None
        assert abs(on_gpu.value - on_cpu.value) < 0.02 * on_cpu.standard_error, name


def test_a_metric_on_a_gpu_is_the_one_on_the_cpu() -> None:
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for device in ("cpu", "cuda"):
        metric = FrechetMetric(16).to(device)
        metric.update(rows[:200].to(device), real=True)
        metric.update(rows[200:].to(device))
        values.append(float(metric.compute()))
    assert values[1] == pytest.approx(values[0], rel=1e-9)
