"""The coverage benchmark: its runs train and resume, and its table is arithmetic."""

from typing import Any

import pytest

from tools.bench_digits import arm_name, compare_table
from tools.bench_toys import COMPARED, Arm, coverage_table, run_arm, toy_trainer
from tools.results import Spread


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_run_trains_the_discriminator_whether_or_not_it_is_used(adversarial: bool) -> None:
    arm = Arm("ring", "reverse-kl", adversarial, "narrow", 0, 3)
    trainer, _ = toy_trainer(arm)
    heads = trainer.adversary.heads  # type: ignore[attr-defined]
    before = [p.clone() for p in heads.parameters()]
    metrics = [trainer.step(n) for n in range(3)][-1]
    assert any((a != b).any() for a, b in zip(before, heads.parameters(), strict=True))
    assert ("adversarial_loss" in metrics) == adversarial
    assert metrics["weight_ess"] == 1


def test_a_run_is_judged_and_depends_on_its_seed_only() -> None:
    arm = Arm("grid", "forward-kl", True, "wide", 1, 5)
    first, again = run_arm(arm), run_arm(arm)
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert 0 < first["weight_ess"] <= 1
    assert first["covered"] <= 25


def test_the_coverage_table_has_means_and_standard_errors() -> None:
    def result(seed: int, covered: int) -> dict[str, Any]:
        fixed = {"kl": 0.1, "near": 0.9, "spread": 1.5, "wasserstein": 0.2, "weight_ess": 0.5, "seconds": 20.0}
        arm = {"mixture": "ring", "start": "narrow", "divergence": "jensen-shannon", "adversarial": True, "seed": seed}
        return arm | fixed | {"covered": covered}

    table = coverage_table([result(0, 6), result(1, 8)])
    assert "| ring | narrow | jensen-shannon | yes | 7.0 ± 1.0 | 0.100 ± 0.000 |" in table


def test_the_comparison_s_differences_are_paired_with_the_control_of_the_same_seed() -> None:
    def result(control: float, other: float) -> dict[str, Any]:
        def entry(fd: float) -> dict[str, Any]:
            return {"summary": {m: Spread(fd, 0.01, 3) for m in ("fd", "pixel_fd", "precision", "recall")}}

        names = [arm_name(d, a) for d in COMPARED for a in (False, True)]
        entries = {name: entry(other) for name in names} | {"reverse-kl": entry(control)}
        return entries | {"seconds": dict.fromkeys(names, 60.0)}

    table = compare_table([result(1.0, 0.8), result(2.0, 1.6)])
    assert "| forward-kl | yes | 1.200 | -0.300 ± 0.100 |" in table
    assert "| reverse-kl | no | 1.500 | +0.000 ± 0.000 |" in table


def test_names_of_runs_are_distinct() -> None:
    arms = [Arm("ring", d, a, s, 0, 1) for d in COMPARED for a in (False, True) for s in ("narrow", "wide")]
    assert len({arm.name for arm in arms}) == len(arms)
