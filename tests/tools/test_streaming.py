import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.distill.command import fresh
from tests.tools.streaming_ranks import ROWS, D, answers, fake_rows, normal, real_rows, statistics
from tools.classes import inception_score
from tools.features import Extracted
from tools.frechet import frechet_distance, frechet_estimate
from tools.pairwise import pairwise
from tools.streamed_rows import StreamedRows
from tools.streaming import FrechetMetric, InceptionScoreMetric, PairwiseMetric, VendiMetric
from tools.vendi import vendi_score


def fed(metric: Any, batch: int = 50, real: bool = True) -> Any:
    for rows in real_rows().split(batch) if real else ():
        metric.update(rows, real=True)
    for rows in fake_rows().split(batch):
        metric.update(rows)
    return metric


def states(metric: StreamedRows) -> list[Tensor]:
    found = []
    for name in metric._defaults:
        state = getattr(metric, name)
        found += state if isinstance(state, list) else [state]
    return found


# The numbers are those of the functions


@pytest.mark.parametrize("fold", [1, 64, 10_000])
@pytest.mark.parametrize("referenced", [False, True])
def test_frechet_is_that_of_all_rows(fold: int, referenced: bool, monkeypatch) -> None:
    monkeypatch.setattr("tools.streaming.FOLD", fold)
    reference = statistics(real_rows())
    metric = fed(FrechetMetric(D, reference=reference if referenced else None), real=not referenced)
    expected = frechet_estimate(fake_rows(), reference)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(expected.value, rel=1e-12)
    estimate = metric.estimate()
    assert estimate.value == pytest.approx(expected.value, rel=1e-12)
    assert estimate.debiased == pytest.approx(expected.debiased, rel=1e-11)
    assert estimate.standard_error == pytest.approx(expected.standard_error, rel=1e-10)
    assert estimate.leave_one_out == pytest.approx(expected.leave_one_out, rel=1e-12)
    assert estimate.warning is None


def test_frechet_is_torchmetrics_own() -> None:
    network = nn.Linear(D, D).double()
    network.num_features = D  # type: ignore[assignment]
    ours, theirs = FrechetMetric(D, network), FrechetInceptionDistance(feature=network)
    for seed in range(6):
        for metric in (ours, theirs):
            metric.update(normal(40, D, seed=seed), real=True)
            metric.update(2 * normal(40, D, seed=9 + seed), real=False)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-10)
    assert not any(p.grad is not None for p in network.parameters())


def test_a_reference_keeps_the_digits_of_features_far_away() -> None:
    reference = statistics(real_rows() + 2**20)
    metric = FrechetMetric(D, reference=reference)
    metric.update(fake_rows() + 2**20)
    exact = frechet_distance(statistics(fake_rows()), statistics(real_rows())).value
    assert metric.compute().item() == pytest.approx(exact, rel=1e-9)


def test_constant_features_are_no_negative_variance() -> None:
    metric = FrechetMetric(3)
    for real in (True, False):
        for _ in range(7):
            metric.update(torch.full((11, 3), 0.1), real=real)
    assert metric.compute().item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise_is_that_of_all_rows(dtype: torch.dtype) -> None:
    asked = ("kd", "precision", "recall", "density", "coverage", "clip-mmd")
    expected = pairwise(real_rows().to(dtype), fake_rows().to(dtype), asked=asked, dtype=dtype)
    metric = fed(PairwiseMetric(D, asked=asked, dtype=dtype))
    assert metric.estimate() == expected
    values = metric.compute()
    assert set(values) == set(asked)
    assert expected.kernel_distance is not None
    assert expected.coverage is not None
    assert values["kd"].item() == expected.kernel_distance.value
    assert values["coverage"].item() == expected.coverage.value
    assert fed(PairwiseMetric(D, reference=real_rows(), asked=asked, dtype=dtype), real=False).estimate() == expected


def test_rows_in_any_order_have_the_same_bits() -> None:
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    metric = PairwiseMetric(D, reference=real_rows())
    for numbers in shuffled.split(37):
        metric.update(fake_rows()[numbers], numbers=numbers)
    assert metric.estimate() == fed(PairwiseMetric(D, reference=real_rows()), real=False).estimate()


def test_vendi_and_inception_score_are_those_of_all_rows() -> None:
    rows = fake_rows().float()
    vendi = fed(VendiMetric(D, q=2, kernel="linear"))
    assert vendi.compute().item() == pytest.approx(vendi_score(rows, 2, "linear").value, rel=1e-12)
    assert vendi.estimate() == vendi_score(rows, 2, "linear")
    inception = fed(InceptionScoreMetric(D))
    assert inception.estimate().value == pytest.approx(inception_score(fake_rows()).value, rel=1e-12)
    assert inception.estimate().standard_error == pytest.approx(inception_score(fake_rows()).standard_error, rel=1e-9)
    assert inception.compute().item() == inception.estimate().value


# Networks


def test_a_network_stays_in_evaluation_mode_and_keeps_no_graph() -> None:
    network = nn.Sequential(nn.Linear(4, D), nn.Dropout(0.5))
    metric = FrechetMetric(D, network)
    nn.ModuleList([metric]).train()
    assert not network.training
    x = normal(60, 4).float()
    for real in (True, False):
        metric.update(x, real=real)
    assert metric.compute().item() < 1e-12
    assert not any(state.requires_grad for state in states(metric))


def test_an_extractor_gives_features_and_logits() -> None:
    def extractor(images: Tensor) -> Extracted:
        return Extracted(images[:, :D], images[:, D:])

    x = torch.cat([fake_rows(), real_rows()[:100].repeat(4, 1)[:ROWS]], dim=1)
    vendi, inception = VendiMetric(D, extractor), InceptionScoreMetric(D, extractor)
    vendi.update(x)
    inception.update(x)
    assert vendi.compute().item() == pytest.approx(vendi_score(x[:, :D].float()).value, rel=1e-12)
    assert inception.compute().item() == pytest.approx(inception_score(x[:, D:]).value, rel=1e-12)


# torchmetrics' protocol


def test_half_precision_of_the_model_leaves_the_sums_alone() -> None:
    """Whatever converts the module around it: the states keep their dtype, and the network follows."""
    exact = fed(FrechetMetric(D)).compute().item()
    for convert in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: nn.ModuleList([m]).half(),
        lambda m: nn.ModuleList([m]).to(torch.float16),
    ):
        metric = FrechetMetric(D, nn.Identity())
        convert(metric)
        fed(metric)
        convert(metric)
        assert metric.compute().item() == exact
    network = nn.Linear(D, D)
    nn.ModuleList([FrechetMetric(D, network)]).half()
    assert network.weight.dtype == torch.float16


def test_autocast_does_not_reach_the_sums() -> None:
    metric = FrechetMetric(D)
    with torch.autocast("cpu", torch.bfloat16):
        fed(metric)
        assert metric.compute().item() == fed(FrechetMetric(D)).compute().item()


def test_float16_rows_are_summed_in_float64() -> None:
    metric, rows = FrechetMetric(D), [100 * r.half() for r in (real_rows(), fake_rows())]
    metric.update(rows[0], real=True)
    metric.update(rows[1])
    exact = frechet_distance(statistics(rows[0].double()), statistics(rows[1].double())).value
    assert metric.compute().item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("make", [lambda **k: FrechetMetric(D, **k), lambda **k: PairwiseMetric(D, **k)])
def test_reset_forgets_all_or_all_but_the_real_rows(make, monkeypatch) -> None:
    monkeypatch.setattr("tools.streaming.FOLD", 100)
    exact = fed(make()).estimate()
    for reset_real in (True, False):
        metric = fed(make(reset_real=reset_real))
        metric.reset()
        if reset_real:
            with pytest.raises(ValueError, match="0 rows"):
                fed(metric, real=False).compute()
        metric.reset()
        assert fed(metric, real=reset_real).estimate() == exact


def test_a_state_dict_and_a_pickle_go_on_where_they_were() -> None:
    for make in (lambda: FrechetMetric(D), lambda: PairwiseMetric(D), lambda: VendiMetric(D)):
        whole, half = fed(make()), make()
        assert not half.state_dict()
        half.persistent(True)
        for rows in real_rows().split(50):
            half.update(rows, real=True)
        half.update(fake_rows()[:150])
        loaded = make()
        loaded.persistent(True)
        loaded.load_state_dict(half.state_dict())
        for metric in (loaded, pickle.loads(pickle.dumps(half)), copy.deepcopy(half), half):
            for rows in fake_rows()[150:].split(50):
                metric.update(rows)
            assert metric.estimate() == whole.estimate()


def test_merge_state_adds() -> None:
    one, other = FrechetMetric(D), FrechetMetric(D)
    one.update(real_rows()[:90], real=True)
    other.update(real_rows()[90:], real=True)
    one.update(fake_rows()[:90], numbers=range(90))
    other.update(fake_rows()[90:], numbers=range(90, ROWS))
    one.merge_state(other)
    expected = fed(FrechetMetric(D)).estimate()
    assert one.estimate().value == pytest.approx(expected.value, rel=1e-12)
    assert one.estimate().standard_error == pytest.approx(expected.standard_error, rel=1e-10)


def test_a_collection_takes_them_all() -> None:
    collection = MetricCollection({"fd": FrechetMetric(D), "pairs": PairwiseMetric(D), "vendi": VendiMetric(D)})
    for rows in real_rows().split(50):
        collection.update(rows, real=True)
    for rows in fake_rows().split(50):
        collection(rows, real=False)
    found = collection.compute()
    assert found["fd"].item() == fed(FrechetMetric(D)).compute().item()
    assert found["kd"].item() == fed(PairwiseMetric(D)).compute()["kd"].item()
    assert found["vendi"].item() == fed(VendiMetric(D)).compute().item()


def test_a_collection_shares_no_states_of_metrics_that_differ() -> None:
    """Alike after the first batch, which is all that MetricCollection looks at: references, networks."""
    references = [statistics(real_rows()), statistics(real_rows() + 9)]
    collection = MetricCollection(
        {str(k): FrechetMetric(D, reference=r) for k, r in enumerate(references)}
        | {f"vendi {k}": VendiMetric(D, network) for k, network in enumerate((nn.Identity(), nn.ReLU()))}
    )
    collection["vendi 0"].update(real_rows(), real=True)
    collection.update(fake_rows()[:0])
    for rows in fake_rows().split(50):
        collection.update(rows)
    for k, reference in enumerate(references):
        expected = frechet_distance(statistics(fake_rows()), reference).value
        assert collection.compute()[str(k)].item() == pytest.approx(expected, rel=1e-12)
    assert collection.compute()["vendi 1"].item() == fed(VendiMetric(D, nn.ReLU())).compute().item()


def test_what_has_no_error_says_so() -> None:
    metric = FrechetMetric(2)
    metric.update(normal(50, 2), real=True)
    metric.update(normal(12, 2, seed=1))
    assert metric.estimate().standard_error is None
    assert metric.estimate().warning == "12 samples are too few for an error"
    assert metric.estimate().value == metric.compute().item()
    wide = FrechetMetric(D)
    fed(wide).reset()
    wide.update(real_rows(), real=True)
    wide.update(fake_rows()[: 7 * D])
    assert "fewer than 8 a feature" in (wide.estimate().warning or "")


# Bad input


def test_what_cannot_be_used_is_named_and_nothing_is_added() -> None:
    bad = fake_rows()[:20].clone()
    bad[3, 1] = bad[8, 0] = float("nan")
    reference = statistics(real_rows())
    for make, referenced in (
        (lambda: FrechetMetric(D), lambda: FrechetMetric(D, reference=reference)),
        (lambda: PairwiseMetric(D), lambda: PairwiseMetric(D, reference=real_rows())),
    ):
        metric = fed(make())
        before = metric.estimate()
        for rows, numbers, message in (
            (bad, None, r"features: 2 of 20 rows have NaN or infinite values: .*3.*8"),
            (normal(4, 3), None, rf"features: shape \[4, 3\] is not \[N, {D}\]"),
            (normal(4, D).cfloat(), None, "not real"),
            ([1, 2], None, "features: list is not a tensor"),
            (normal(2, D), [1, -2], "numbers: torch.int64 of shape .* needed are 2 from 0"),
            (normal(2, D), [1, 2, 3], "numbers: "),
            (normal(2, D), [0.5, 1.0], "numbers: torch.float32"),
        ):
            with pytest.raises(ValueError, match=message):
                metric.update(rows, numbers=numbers)
        assert metric.estimate() == before
        with pytest.raises(ValueError, match="real: True, but the reference is given"):
            referenced().update(normal(2, D), real=True)
    for make in (
        lambda: FrechetMetric(0),
        lambda: FrechetMetric(D + 1, reference=reference),
        lambda: PairwiseMetric(D, asked="kd"),
        lambda: PairwiseMetric(D, reference=normal(4, 3)),
    ):
        with pytest.raises(ValueError, match=r"dim: 0|reference: (statistics of|shape)|asked: 'kd'"):
            make()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="count: 0 rows"):
        FrechetMetric(D).compute()


# Real processes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["strided", "uneven", "one without"])
def test_two_processes_measure_what_one_does(tmp_path: Path, how: str) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script, root = Path(__file__).with_name("streaming_ranks.py"), str(Path(__file__).parents[2])
    result = fresh(*launcher, script, how, tmp_path / "two.json", cwd=tmp_path, PYTHONPATH=root)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    one = json.loads(json.dumps(answers({"fake": torch.arange(ROWS), "real": torch.arange(200)}, batch=64)))
    assert two.keys() == one.keys()
    for name in one:
        _assert_close(two[name], one[name], name)
    for name in ("pairwise", "vendi", "pairwise, estimate"):
        assert two[name] == one[name]  # measured in the order of the samples: to the bit


def _assert_close(two: Any, one: Any, name: str) -> None:
    if isinstance(one, dict):
        assert two.keys() == one.keys()
        for key in one:
            _assert_close(two[key], one[key], f"{name}, {key}")
    elif isinstance(one, list):
        for pair in zip(two, one, strict=True):
            _assert_close(*pair, name)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-12 if "error" not in name else 1e-9), name
    else:
        assert two == one, name
