import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from samplers.gaussian import Gaussian
from samplers.moments import Moments
from tools.bench_gaussian import images

METHODS = ["full", "incremental"]
D = 24


def data(n: int = 500, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows with a mean, and a spectrum that falls as 1 / k^2 in rotated directions."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn((d, d), generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
    scale = 3.0 / torch.arange(1, d + 1, dtype=torch.float64)
    x = torch.randn((n, d), generator=generator, dtype=torch.float64) * scale
    return (x @ axes.mT + torch.linspace(-1, 1, d, dtype=torch.float64)).to(dtype)


def labels_of(n: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(5))


def fitted(x: Tensor, method: str, labels: Tensor | None = None, rank: int | None = None, block: int = 64) -> Gaussian:
    n_classes = None if labels is None else int(labels.max()) + 1
    moments = Moments(x.shape[1:], n_classes, rank=rank, block=block, method=method)
    moments.update(x, labels)
    return moments.gaussian(rank)


def pooled(x: Tensor, labels: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Class means and the within-class covariance / (N - K), by numpy in float64."""
    rows = x.double().numpy().reshape(len(x), -1)
    named = np.zeros(len(x), dtype=int) if labels is None else labels.numpy()
    means = np.stack([rows[named == c].mean(0) for c in range(named.max() + 1)])
    centred = rows - means[named]
    return means, centred.T @ centred / (len(rows) - len(means))


def dense(g: Gaussian) -> Tensor:
    u = g.components.double()
    return u.mT @ torch.diag(g.variances - g.rest) @ u + g.rest * torch.eye(g.dim, dtype=torch.float64)


def exact_cut(x: Tensor, rank: int, labels: Tensor | None = None) -> Gaussian:
    """The exact top directions of the full covariance, and the mean variance of the others."""
    means, covariance = pooled(x, labels)
    values, vectors = np.linalg.eigh(covariance)
    components = torch.from_numpy(vectors[:, ::-1].T[:rank].copy())
    mean = torch.from_numpy(means if labels is not None else means[0]).reshape(-1, *x.shape[1:])
    return Gaussian(
        mean if labels is not None else mean[0],
        components,
        torch.from_numpy(values[::-1][:rank].copy()),
        float(values[:-rank].mean()),
        n_classes=None if labels is None else len(means),
    )


def apart(a: Gaussian, b: Gaussian, sigma: float = 20.0, start: float = 80.0) -> float:
    """The rms distance of two jumps, relative to the noise level where they end; over classes too."""
    generator = torch.Generator().manual_seed(3)
    x = start * torch.randn((24, *a.shape), generator=generator, dtype=torch.float64)
    cond = None if a.n_classes is None else torch.arange(24) % a.n_classes
    ends = [g.transport(x, start, sigma, cond) for g in (a, b)]
    return float((ends[0] - ends[1]).square().mean().sqrt()) / sigma


def parts_of(x: Tensor, labels: Tensor | None, parts: int, method: str, rank: int | None) -> Moments:
    """As many processes would: each its share, and all states merged in order."""
    n_classes = None if labels is None else int(labels.max()) + 1
    whole = Moments(x.shape[1:], n_classes, rank=rank, block=64, method=method)
    for k in range(parts):
        own = Moments(x.shape[1:], n_classes, rank=rank, block=64, method=method)
        own.update(x[k::parts], None if labels is None else labels[k::parts])
        whole.merge(Moments.from_state(own.state()))
    return whole


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("method", METHODS)
def test_moments_are_those_of_numpy(method, dtype, tolerance, classes) -> None:
    """The incremental way is exact too where it may keep every direction."""
    x = data(dtype=dtype)
    labels = labels_of(len(x)) if classes else None
    g = fitted(x, method, labels, rank=D)
    means, covariance = pooled(x, labels)
    torch.testing.assert_close(g.mean.double().reshape(-1, D).numpy(), means, rtol=0, atol=tolerance)
    torch.testing.assert_close(dense(g).numpy(), covariance, rtol=0, atol=tolerance * 10)
    assert g.rest == 0
    assert g.count == 500


@pytest.mark.parametrize("method", METHODS)
def test_the_rest_holds_the_variance_of_all_other_directions(method) -> None:
    x = data()
    g = fitted(x, method, rank=5)
    _, covariance = pooled(x, None)
    assert g.rank == 5
    assert float(g.variances.sum()) + 19 * g.rest == pytest.approx(np.trace(covariance), rel=1e-12)
    assert bool((g.variances.diff() <= 0).all())


@pytest.mark.parametrize("classes", [None, 4])
def test_one_pass_makes_the_jump_of_the_exact_top_directions(classes) -> None:
    x = images(3000, 16, 3, torch.Generator().manual_seed(0))
    labels = None
    if classes:
        labels = labels_of(len(x), classes)
        x = x + 0.3 * labels[:, None, None, None]
    g, exact = fitted(x, "incremental", labels, rank=64, block=256), exact_cut(x, 64, labels)
    assert apart(g, exact) < 6e-5
    assert apart(exact_cut(x, 48, labels), exact) > 6e-5  # so the bound does tell


@pytest.mark.slow
def test_one_pass_makes_the_jump_of_the_exact_top_directions_of_larger_images() -> None:
    x = images(8000, 32, 3, torch.Generator().manual_seed(0))
    g, exact = fitted(x, "incremental", rank=256, block=512), exact_cut(x, 256)
    assert apart(g, exact) < 6e-5
    assert apart(exact, exact_cut(x, 128)) > 6e-5


def test_above_4096_dimensions_the_whole_covariance_is_not_kept() -> None:
    assert Moments((4096,)).method == "full"
    assert Moments((4097,)).method == "incremental"
    state = Moments((4097,), rank=8).state()
    assert state["scatter"].shape == (0, 4097)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=12), classes=st.sampled_from([None, 3]))
def test_how_the_stream_is_cut_into_batches_changes_no_bit(method, cuts, classes) -> None:
    x = data(300, dtype=torch.float32)
    labels = labels_of(300) if classes else None
    once, cut = (Moments((D,), classes, rank=6, block=32, method=method) for _ in range(2))
    once.update(x, labels)
    edges = [0, *sorted(cuts), 300]
    for low, high in pairwise(edges):
        cut.update(x[low:high], None if labels is None else labels[low:high])
        assert cut.count == high
    a, b = once.state(), cut.state()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize(("method", "tolerance"), [("full", 1e-9), ("incremental", 1e-4)])
def test_order_block_and_number_of_processes_do_not_matter(method, tolerance, classes) -> None:
    x = images(1500, 12, 3, torch.Generator().manual_seed(0))
    labels = labels_of(len(x)) if classes else None
    if labels is not None:
        x = x + 0.3 * labels[:, None, None, None]
    rank = 48
    one = fitted(x, method, labels, rank)
    others = [parts_of(x, labels, parts, method, rank).gaussian(rank) for parts in (2, 3, 4)]
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for order in (shuffled, torch.arange(len(x)).flip(0), x.flatten(1).norm(dim=1).argsort()):
        others.append(fitted(x[order], method, None if labels is None else labels[order], rank))
    if labels is not None:  # all of one class first
        order = labels.argsort(stable=True)
        others.append(fitted(x[order], method, labels[order], rank))
    others += [fitted(x, method, labels, rank, block) for block in (37, 512, 5000)]
    for other in others:
        assert apart(one, other) < tolerance
        assert other.count == 1500


@pytest.mark.slow
def test_processes_hand_over_their_states_in_files(tmp_path) -> None:
    x = data(400, dtype=torch.float32)
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file;"
        "from samplers.moments import Moments;"
        "m = Moments((24,), rank=24, method='incremental'); m.update(load_file(sys.argv[1])['x']);"
        "save_file(m.state(), sys.argv[2])"
    )
    whole = Moments((D,), rank=D, method="incremental")
    for k in range(2):
        save_file({"x": x[k::2].contiguous()}, tmp_path / f"in{k}")
        subprocess.run([sys.executable, "-c", code, tmp_path / f"in{k}", tmp_path / f"out{k}"], check=True)
        whole.merge(Moments.from_state(load_file(tmp_path / f"out{k}")))
    assert apart(whole.gaussian(D), fitted(x, "full", rank=D)) < 1e-6


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_goes_on_where_it_was(method, classes) -> None:
    x, labels = data(300, dtype=torch.float32), labels_of(300) if classes else None

    def first_half() -> Moments:
        moments = Moments((2, 3, 4), classes, rank=6, block=32, method=method)
        moments.update(x[:150].reshape(-1, 2, 3, 4), None if labels is None else labels[:150])
        moments.state()  # folds what is pending, here as there
        return moments

    here, there = first_half(), Moments.from_state(first_half().state())
    for moments in (here, there):
        moments.update(x[150:].reshape(-1, 2, 3, 4), None if labels is None else labels[150:])
    a, b = here.state(), there.state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(here.gaussian(6).components, there.gaussian(6).components)


@pytest.mark.parametrize("method", METHODS)
def test_a_gaussian_made_on_the_way_changes_nothing(method) -> None:
    x, looked, folded = data(300), *(Moments((D,), rank=6, block=32, method=method) for _ in range(2))
    for moments, look in ((looked, looked.gaussian), (folded, folded.state)):
        moments.update(x[:150].float())
        look()
        moments.update(x[150:200].float())
        look()
        moments.update(x[200:])
    a, b = looked.state(), folded.state()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_moments_without_samples_change_nothing_when_merged(method) -> None:
    x, labels = data(), labels_of(500)
    moments, empty = (Moments((D,), 3, rank=D, method=method) for _ in range(2))
    moments.update(x, labels)
    plain = moments.gaussian(D)
    moments.merge(Moments.from_state(empty.state()))
    empty.merge(moments)
    for g in (moments.gaussian(D), empty.gaussian(D)):
        torch.testing.assert_close(dense(g), dense(plain), rtol=0, atol=1e-12)
        assert torch.equal(g.mean, plain.mean)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_leaves_the_other_as_it_is(method) -> None:
    a, b = (Moments((D,), rank=D, method=method) for _ in range(2))
    a.update(data(100))
    b.update(data(100, seed=1))
    before = b.state()
    a.merge(b)
    after = b.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_classes_that_are_seen_once_or_in_turn_are_classes(method) -> None:
    x = data(202)
    labels = torch.cat([torch.zeros(100), torch.ones(100), torch.tensor([2.0, 3.0])]).long()
    g = fitted(x, method, labels, rank=D, block=32)
    means, covariance = pooled(x, labels)
    torch.testing.assert_close(g.mean.numpy(), means, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(g).numpy(), covariance, rtol=0, atol=1e-11)
    assert torch.equal(g.mean[2], x[200])


@pytest.mark.parametrize("method", METHODS)
def test_a_mean_of_ten_thousand_standard_deviations_costs_no_digits(method) -> None:
    """float32 samples are themselves rounded to 1e4 x 6e-8 there: the truth is that of the rounded samples."""
    x = (data(2000) / 3 + 1e4).float()
    g, (means, covariance) = fitted(x, method, rank=D), pooled(x, None)
    assert float(np.abs(dense(g).numpy() - covariance).max()) < 2e-6
    assert float(np.abs(g.mean.double().numpy() - means[0]).max()) < 1e-3  # half a float32 there


@pytest.mark.parametrize("method", METHODS)
def test_a_spectrum_over_many_orders_keeps_its_directions_orthogonal(method) -> None:
    """Divided by a singular value of 1e-4 the largest, the vectors of a float32 Gram matrix are not."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** -torch.linspace(0, 4, 40, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn((60, 40), generator=generator, dtype=torch.float64))[0]
    x = ((torch.randn((800, 40), generator=generator, dtype=torch.float64) * scale) @ axes.mT).float()
    g = fitted(x, method, rank=32, block=100)
    eye = torch.eye(32, dtype=torch.float64)
    assert float((g.components.double() @ g.components.double().mT - eye).abs().max()) < 1e-5
    values = np.linalg.eigvalsh(pooled(x, None)[1])[::-1][:32].copy()
    relative = {"full": 0.1, "incremental": 1e-3}[method]  # squares of 1e-4 are at the rounding of products
    torch.testing.assert_close(g.variances, torch.from_numpy(values), rtol=relative, atol=0)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_automatic_rank_is_the_smallest_that_keeps_to_a_tenth_of_the_tolerance(classes) -> None:
    """At the level where the samples' own cost is the tolerance; KL by torch.distributions between full matrices."""
    n, tolerance = 300, 0.05
    x, labels = data(n), labels_of(n, classes)
    moments = Moments((D,), classes)
    moments.update(x, labels)
    g = moments.gaussian(tolerance=tolerance)
    _, covariance = pooled(x, labels)
    values = np.linalg.eigvalsh(covariance)

    def cost(log_sigma: float) -> float:
        rho = values / (values + math.exp(2 * log_sigma))
        return (rho.sum() ** 2 + (rho**2).sum()) / 4 + classes * rho.sum() / 2 - tolerance * (n - classes)

    noise = math.exp(2 * scipy.optimize.brentq(cost, -9, 9)) * torch.eye(D, dtype=torch.float64)
    zero = torch.zeros(D, dtype=torch.float64)
    true = MultivariateNormal(zero, torch.from_numpy(covariance) + noise)
    lost = [
        float(kl_divergence(true, MultivariateNormal(zero, dense(moments.gaussian(k)) + noise)))
        for k in (g.rank, g.rank - 1)
    ]
    assert 2 < g.rank < D - 2
    assert lost[0] <= tolerance / 10 < lost[1]


def test_a_tighter_tolerance_keeps_fewer_directions_of_few_samples_and_more_samples_keep_more() -> None:
    few, many = (Moments((D,)) for _ in range(2))
    few.update(data(300))
    many.update(data(30_000))
    assert few.gaussian().rank < many.gaussian().rank


def costs(covariance: Tensor, sigma: float, n: int, rank: int, classes: int = 1, fits: int = 300) -> Tensor:
    """The exact KL(true || fitted) at noise level sigma, of so many fits to n samples each, by torch.distributions."""
    labels, noise = torch.arange(n) % classes, sigma**2 * torch.eye(D, dtype=torch.float64)
    law = MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance + noise)
    root, generator = torch.linalg.cholesky(covariance), torch.Generator().manual_seed(0)
    found = []
    for _ in range(fits):
        x = torch.randn((n, D), generator=generator, dtype=torch.float64) @ root.mT
        moments = Moments((D,), classes, block=n)
        moments.update(x, labels)
        g = moments.gaussian(rank)
        kl = [kl_divergence(law, MultivariateNormal(mean, dense(g) + noise)) for mean in g.mean]
        found.append(float(sum(kl)) / classes)
    return torch.tensor(found)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_the_cost_of_few_samples_is_that_of_many_fits(sigma, classes) -> None:
    """5 standard errors, and 6 % that the leading order in 1 / n leaves out (d / n is 6 %)."""
    n, (_, covariance) = 399, pooled(data(), None)
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    mean = torch.zeros((classes, D), dtype=torch.float64)
    known = Gaussian(mean, vectors.flip(1).mT, values.flip(0), 0.0, n_classes=classes, count=n)
    found, expected = costs(dense(known), sigma, n, D, classes), known.sampling_kl(sigma)
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(len(found)) + 0.06 * expected


def test_the_cost_of_few_samples_counts_the_directions_of_the_rest_once() -> None:
    """They have one variance in common, and turn against those that have their own."""
    n, sigma, rank = 1000, 0.3, 3
    axes = torch.linalg.qr(data(D).mT)[0].mT
    mean, variances = torch.zeros(D, dtype=torch.float64), torch.tensor([9.0, 4.0, 2.0])
    known = Gaussian(mean, axes[:rank], variances, 0.2, count=n)
    found, expected = costs(dense(known), sigma, n, rank), known.sampling_kl(sigma)
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(len(found)) + 0.06 * expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_samples_are_summed_in_single(method, dtype) -> None:
    x = data(dtype=dtype)
    a, b = fitted(x, method, rank=5), fitted(x.float(), method, rank=5)
    assert torch.equal(a.components, b.components)
    assert torch.equal(a.variances, b.variances)


@pytest.mark.parametrize("method", METHODS)
def test_precisions_may_change_in_the_stream(method) -> None:
    x = data()
    moments = Moments((D,), rank=D, method=method)
    moments.update(x[:100].float())
    moments.update(x[100:])
    rounded = torch.cat([x[:100].float().double(), x[100:]])
    torch.testing.assert_close(dense(moments.gaussian(D)).numpy(), pooled(rounded, None)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_samples_may_be_overwritten_strided_or_need_gradients(method) -> None:
    x = data(dtype=torch.float32).reshape(-1, 2, 3, 4)
    expected = fitted(x, method, rank=5)
    moments = Moments((2, 3, 4), rank=5, block=64, method=method)
    for part in x.to(memory_format=torch.channels_last).clone().requires_grad_().split(40):
        moments.update(part)
        part.detach().fill_(7.0)
    g = moments.gaussian(5)
    assert torch.equal(g.components, expected.components)
    assert g.shape == (2, 3, 4)
    assert not g.components.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_equal_samples_have_no_variance(method) -> None:
    x = torch.full((9, D), 0.5)
    moments = Moments((D,), method=method)
    moments.update(x)
    for m in (moments, Moments.from_state(moments.state())):
        g = m.gaussian()
        assert (g.rank, g.rest, g.count) == (0, 0.0, 9)
        assert torch.equal(g.mean.float(), x[0])


@pytest.mark.parametrize("method", METHODS)
def test_two_samples_are_enough_and_span_one_direction(method) -> None:
    x = data(2)
    g = fitted(x, method, rank=1)
    torch.testing.assert_close(dense(g).numpy(), np.cov(x.numpy().T), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"rank: 2; these 2 samples span 1"):
        fitted(x, method, rank=2)


def test_fit_is_the_moments_of_the_stream() -> None:
    x, labels = data(dtype=torch.float32), labels_of(500)
    plain = Gaussian.fit(x.split(77), facts={"data": "rows"})
    assert plain.facts["data"] == "rows"
    assert plain.facts["extremes"] == pytest.approx([float(v) for v in (x.min(), x.max())], rel=1e-6)
    moments = Moments((D,))
    moments.update(x)
    assert torch.equal(plain.components, moments.gaussian().components)
    g = Gaussian.fit(zip(x.split(77), labels.split(77), strict=True), 7, n_classes=3)
    assert (g.rank, g.n_classes, g.count) == (7, 3, 500)
    assert torch.equal(g.components, fitted(x, "full", labels, 7, block=512).components)
    with pytest.raises(ValueError, match="batches: there are none"):
        Gaussian.fit([])


def broken(value: float, *where: int) -> Tensor:
    x = torch.zeros(10, D)
    for k in where:
        x[k, k % D] = value
    return x


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_samples_that_are_not_finite_are_named_by_their_number(method, value) -> None:
    moments = Moments((D,), block=8, method=method)
    with pytest.raises(ValueError, match=r"1 of 10 samples are not finite, at number 4 of"):
        moments.update(broken(value, 4))
    moments.update(data(100, dtype=torch.float32))
    moments.update(data(3, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"2 of 10 samples are not finite, at number 105, 112 of"):
        moments.update(broken(value, 2, 9))
    both = broken(math.inf, 3)
    both[3, 5] = -math.inf
    with pytest.raises(ValueError, match="number 106"):
        moments.update(both)


@pytest.mark.parametrize("method", METHODS)
def test_large_values_are_not_called_infinite(method) -> None:
    """The sum of 24 times 6e4 is infinite in float16, and their squares are too."""
    x = 6e4 * torch.sign(data(50)).to(torch.float16)
    g = fitted(x, method, rank=5)
    assert float(g.variances[0]) == pytest.approx(np.linalg.eigvalsh(pooled(x, None)[1])[-1], rel=1e-5)
    with pytest.raises(ValueError, match=r"hold 3e\+38; sums of squares"):
        Moments((D,), method=method).update(torch.full((3, D), 3e38))
    Moments((D,), method=method).update(torch.full((3, D), 3e38, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_added_when_an_update_raises(method) -> None:
    x, labels = data(100), labels_of(100)

    def seen(bad: bool) -> dict[str, Tensor]:
        moments = Moments((D,), 3, rank=6, block=32, method=method)
        for k in range(0, 100, 20):
            moments.update(x[k : k + 20], labels[k : k + 20])
            for rows, named in (
                (torch.cat([x[:50], torch.full((1, D), math.nan)]), torch.zeros(51).long()),
                (x[:50], torch.full((50,), 3)),
                (x[:50], labels[:49]),
                (x[:50], None),
                (x[:50, :5], labels[:50]),
                (torch.full((50, D), 1e300, dtype=torch.float64), labels[:50]),
            ):
                if bad:
                    with pytest.raises(ValueError, match=r"batches|labels"):
                        moments.update(rows, named)
            assert moments.count == k + 20
        return moments.state()

    a, b = seen(True), seen(False)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("x", "labels", "says"),
    [
        (torch.zeros(2, 5), None, "batches: hold"),
        (torch.zeros(D), None, "batches: hold"),
        (torch.zeros(2, D, dtype=torch.uint8), None, "uint8"),
        (torch.zeros(2, D), torch.zeros(2).long(), "n_classes is not"),
    ],
)
def test_batches_that_do_not_fit_raise(x, labels, says) -> None:
    with pytest.raises(ValueError, match=says):
        Moments((D,)).update(x, labels)


@pytest.mark.parametrize(
    "labels",
    [None, torch.zeros(3).long(), torch.zeros(2), torch.tensor([0, 3]), torch.tensor([-1, 0])],
)
def test_labels_that_do_not_fit_raise(labels) -> None:
    with pytest.raises(ValueError, match="labels"):
        Moments((D,), 3).update(torch.zeros(2, D), labels)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_samples_raise(method) -> None:
    moments = Moments((D,), method=method)
    with pytest.raises(ValueError, match="hold 0 samples, too few for a covariance; needed are 2"):
        moments.gaussian()
    moments.update(data(1))
    with pytest.raises(ValueError, match="hold 1 samples"):
        moments.gaussian()

    classes = Moments((D,), 3, method=method)
    classes.update(data(2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"no sample of class 1 of 0 \.\. 2"):
        classes.gaussian()
    classes.update(data(1), torch.tensor([1]))
    with pytest.raises(ValueError, match="hold 3 samples, too few for a covariance; needed are 4"):
        classes.gaussian()


def test_a_rank_beyond_what_is_kept_says_so() -> None:
    moments = Moments((D,), rank=8, method="incremental")
    moments.update(data())
    assert moments.gaussian(10).rank == 10
    with pytest.raises(ValueError, match=r"rank: 11; these 500 samples span 10 directions, and 10 are kept"):
        moments.gaussian(11)
    for rank, tolerance, says in ((-1, 0.05, "rank"), (3, 0.0, "tolerance"), (3, math.nan, "tolerance")):
        with pytest.raises(ValueError, match=says):
            moments.gaussian(rank, tolerance)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shape": (0, 3)}, "shape"),
        ({"shape": (3,), "n_classes": 0}, "n_classes"),
        ({"shape": (3,), "rank": 4}, "rank"),
        ({"shape": (3,), "rank": -1}, "rank"),
        ({"shape": (3,), "block": 0}, "block"),
        ({"shape": (3,), "method": "nystrom"}, "method"),
    ],
)
def test_bad_settings_raise(arguments, says) -> None:
    with pytest.raises(ValueError, match=says):
        Moments(**arguments)


def test_moments_of_other_things_do_not_merge() -> None:
    moments = Moments((D,))
    for other in (Moments((D + 1,)), Moments((D,), 2), Moments((D,), method="incremental")):
        with pytest.raises(ValueError, match="merge"):
            moments.merge(other)


def test_a_state_of_something_else_is_refused() -> None:
    moments = Moments((D,))
    moments.update(data())
    state = moments.state()
    with pytest.raises(ValueError, match="lacks means"):
        Moments.from_state({name: t for name, t in state.items() if name != "means"})
    with pytest.raises(ValueError, match="do not fit"):
        Moments.from_state(state | {"scatter": torch.zeros(5, 5)})
    with pytest.raises(ValueError, match="do not fit"):
        Moments.from_state(state | {"means": torch.zeros(2, D)})
