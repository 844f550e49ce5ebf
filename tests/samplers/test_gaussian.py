import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import MultivariateNormal

from samplers import GaussianMixture, heun, karras_sigmas, sample, score
from samplers.gaussian import PATHS, Bound, Gaussian
from tests.truth import gaussian_transport, order, relative_error

D = 12
EXACT = {"rtol": 1e-12, "atol": 1e-12}
INFINITE = [(path, math.inf) for path in ("vp", "flow")]
JUMPS = [("ve", 80.0), ("vp", 80.0), ("flow", 80.0), *INFINITE]


def gaussian(
    rank: int = 5, rest: float = 0.3, d: int = D, n_classes: int | None = None, dtype: torch.dtype = torch.float64
) -> Gaussian:
    generator = torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn((d, d), generator=generator, dtype=torch.float64))[0][:rank]
    variances = 20.0 / torch.arange(1, rank + 1, dtype=torch.float64) ** 2
    mean = torch.randn((n_classes or 1, d), generator=generator, dtype=torch.float64)
    mean = mean if n_classes else mean[0]
    return Gaussian(mean.to(dtype), components.to(dtype), variances, rest, n_classes=n_classes)


def covariance(g: Gaussian) -> Tensor:
    """The matrix that it stands for."""
    across = torch.eye(g.dim, dtype=torch.float64) - g.components.mT @ g.components
    return g.components.mT @ torch.diag(g.variances) @ g.components + g.rest * across


def at_level(g: Gaussian, sigma: float, path: str = "ve") -> tuple[Tensor, Tensor]:
    """Mean and covariance of the state, by the definition of each path."""
    alpha, s = {
        "ve": (1.0, sigma),
        "vp": (1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2) if sigma < math.inf else 1.0),
        "flow": (1 / (1 + sigma), sigma / (1 + sigma) if sigma < math.inf else 1.0),
    }[path]
    return alpha * g.mean, alpha**2 * covariance(g) + s**2 * torch.eye(g.dim, dtype=torch.float64)


def root(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.sqrtm(matrix.numpy()))


def states(sigma: float, n: int = 4, d: int = D) -> Tensor:
    """Of any path; sigma only sets the size."""
    return (1 + sigma) * torch.randn((n, d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rank", [0, 5, D])
@pytest.mark.parametrize("sigma", [80.0, 5.0, math.inf])
@pytest.mark.parametrize("path", PATHS)
def test_transport_is_that_of_the_full_covariance(path, sigma, rank) -> None:
    """x' = m' + C'^(1/2) C^(-1/2) (x - m) with scipy's root of the matrix that low rank and rest stand for."""
    if path == "ve" and sigma == math.inf:
        return
    g, x = gaussian(rank), states(1.0)
    for sigma_to in (8.4, 0.5, 0.0):
        (mean, before), (mean_to, after) = at_level(g, sigma, path), at_level(g, sigma_to, path)
        scale = root(after) @ torch.linalg.inv(root(before))
        moved = g.transport(x, sigma, sigma_to, path=path)
        torch.testing.assert_close(moved, mean_to + (x - mean) @ scale.mT, **EXACT)


@pytest.mark.parametrize(("path", "high"), JUMPS)
def test_transport_is_a_semigroup_and_has_an_inverse(path, high) -> None:
    g, x = gaussian(), states(1.0)
    direct = g.transport(x, high, 0.7, path=path)
    stepped = g.transport(g.transport(x, high, 9.0, path=path), 9.0, 0.7, path=path)
    torch.testing.assert_close(stepped, direct, **EXACT)
    torch.testing.assert_close(g.transport(direct, 0.7, high, path=path), x, **EXACT)
    torch.testing.assert_close(g.transport(x, high, high, path=path), x, **EXACT)


@pytest.mark.parametrize("mode", ["ode", "marginal"])
def test_the_paths_are_one_trajectory_in_three_coordinates(mode) -> None:
    g, (high, low) = gaussian(), (30.0, 2.0)
    x = states(high)
    ve = g.transport(x, high, low, mode=mode)
    vp = g.transport(x / math.sqrt(1 + high**2), high, low, mode=mode, path="vp")
    flow = g.transport(x / (1 + high), high, low, mode=mode, path="flow")
    torch.testing.assert_close(vp * math.sqrt(1 + low**2), ve, **EXACT)
    torch.testing.assert_close(flow * (1 + low), ve, **EXACT)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_from_pure_noise_both_modes_are_the_law_written_down(path) -> None:
    """Flow at t = 1, and VP with zero terminal SNR: x is the noise, and no formula divides by 1 - t."""
    g, eps = gaussian(), states(0.0)
    mean, after = at_level(g, 2.5, path)
    expected = mean + eps @ root(after).mT
    for mode in ("ode", "marginal"):
        torch.testing.assert_close(g.transport(eps, math.inf, 2.5, mode=mode, path=path), expected, **EXACT)
    torch.testing.assert_close(g.transport(expected, 2.5, math.inf, path=path), eps, **EXACT)


@pytest.mark.parametrize("mode", ["ode", "marginal"])
@pytest.mark.parametrize(("path", "high"), JUMPS)
def test_the_law_that_a_mode_starts_from_becomes_the_law_at_the_end(path, high, mode) -> None:
    """The map is affine: its matrix, read off unit vectors, takes one covariance to the other."""
    g, eye = gaussian(), torch.eye(D, dtype=torch.float64)
    origin = g.transport(torch.zeros(1, D, dtype=torch.float64), high, 1.5, mode=mode, path=path)
    matrix = g.transport(eye, high, 1.5, mode=mode, path=path) - origin  # its transpose acts on columns
    before = at_level(g, high, path)
    if mode == "marginal":  # standard normal noise of the level's size, and no data in it
        s = float(PATHS[path](torch.tensor(high, dtype=torch.float64))[1])
        before = torch.zeros(D, dtype=torch.float64), s**2 * eye
    mean_to, after = at_level(g, 1.5, path)
    torch.testing.assert_close(matrix.mT @ before[1] @ matrix, after, **EXACT)
    torch.testing.assert_close(origin[0] + before[0] @ matrix, mean_to, **EXACT)


@pytest.mark.parametrize("n_classes", [None, 3])
def test_a_batch_of_different_levels_is_every_sample_on_its_own(n_classes) -> None:
    g, x = gaussian(n_classes=n_classes), states(3.0)
    cond = torch.tensor([2, 0, 1, 1]) if n_classes else None
    high, low = torch.tensor([80.0, 9.0, 3.0, 20.0]).double(), torch.tensor([8.0, 1.0, 0.0, 5.0]).double()
    together = (g.transport(x, high, low, cond, path="vp"), g(x, high, cond), g.log_density(x, high, cond))
    for k in range(len(x)):
        own = None if cond is None else cond[k : k + 1]
        one = x[k : k + 1]
        alone = (
            g.transport(one, float(high[k]), float(low[k]), own, path="vp"),
            g(one, high[k], own),
            g.log_density(one, high[k], own),
        )
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[k : k + 1], b, **EXACT)


def test_every_class_is_the_gaussian_of_its_own_mean() -> None:
    g, x = gaussian(n_classes=3), states(3.0)
    cond = torch.tensor([2, 0, 1, 1])
    for k, c in enumerate(cond.tolist()):
        single, one = Gaussian(g.mean[c], g.components, g.variances, g.rest), x[k : k + 1]
        for a, b in (
            (g(x, 2.0, cond)[k : k + 1], single(one, 2.0)),
            (g.transport(x, 80.0, 2.0, cond)[k : k + 1], single.transport(one, 80.0, 2.0)),
            (g.log_density(x, 2.0, cond)[k : k + 1], single.log_density(one, 2.0)),
        ):
            torch.testing.assert_close(a, b, **EXACT)
    assert torch.equal(g(x, 2.0, torch.tensor(1)), g(x, 2.0, torch.ones(4, dtype=torch.int64)))


def test_heun_over_the_denoiser_converges_to_transport_with_order_two() -> None:
    g, x = gaussian(), states(80.0)
    exact, steps = g.transport(x, 80.0, 0.5), [128, 256, 512, 1024]
    ends = [sample(heun, g, x, karras_sigmas(n + 1, 0.5, 80.0)[:-1]) for n in steps]
    assert abs(order(steps, [float((end - exact).norm()) for end in ends]) - 2) < 0.03
    assert relative_error(ends[-1], exact) < 1e-5


def test_transport_is_the_flow_of_a_diagonal_gaussian_written_down() -> None:
    variance = torch.tensor([4.0, 1.0, 0.04], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g, x = Gaussian(mean, torch.eye(3, dtype=torch.float64), variance, 0.0), states(20.0, d=3)
    torch.testing.assert_close(g.transport(x, 20.0, 0.1), gaussian_transport(x, mean, variance, 20.0, 0.1), **EXACT)


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 80.0])
@pytest.mark.parametrize("rank", [0, 5, D])
def test_the_denoiser_is_that_of_a_mixture_of_one(rank, sigma) -> None:
    g, x = gaussian(rank), states(sigma)
    mixture = GaussianMixture(torch.ones(1), g.mean[None], covariance(g)[None])
    level = torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(g(x, level), mixture(x, level), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(g.log_density(x, sigma), mixture.log_density(x, sigma), rtol=1e-11, atol=1e-11)


def test_the_denoiser_is_tweedies_formula_of_the_log_density() -> None:
    g, x, sigma = gaussian(), states(2.0).requires_grad_(), torch.tensor(2.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(g.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(score(g, x.detach(), sigma), gradient, **EXACT)


def test_without_noise_the_denoiser_is_the_identity_and_flat_directions_do_not_divide_by_zero() -> None:
    x = states(1.0)
    for g in (gaussian(), gaussian(rest=0.0), gaussian(0, 0.0)):
        torch.testing.assert_close(g(x, 0.0), x, **EXACT)
    point = gaussian(0, 0.0)
    torch.testing.assert_close(point(x, 1.0), point.mean.expand(4, D), **EXACT)
    moved = point.transport(x, 10.0, 0.0)  # all noise goes, and nothing else was there
    torch.testing.assert_close(moved, point.mean.expand(4, D), **EXACT)


@pytest.mark.parametrize("rank", [0, 5, D])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 40.0])
def test_log_density_is_that_of_torch_distributions(sigma, rank) -> None:
    g, x = gaussian(rank), states(sigma)
    mean, noised = at_level(g, sigma)
    torch.testing.assert_close(g.log_density(x, sigma), MultivariateNormal(mean, noised).log_prob(x), **EXACT)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_samples_have_the_mean_and_covariance(sigma) -> None:
    n, g = 40_000, gaussian()
    x = g.sample(n, sigma, generator=torch.Generator().manual_seed(2))
    mean, expected = at_level(g, sigma)
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((products.mean(0) - expected).abs() < 5 * products.std(0) / math.sqrt(n)).all())
    assert torch.equal(x[:9], g.sample(n, sigma, generator=torch.Generator().manual_seed(2))[:9])


def test_samples_of_classes_are_around_their_own_means() -> None:
    g, cond = gaussian(n_classes=3), torch.tensor([0, 2]).repeat(5000)
    x = g.sample(10_000, 1.0, cond, torch.Generator().manual_seed(3))
    for c in (0, 2):
        own = x[cond == c]
        assert bool(((own.mean(0) - g.mean[c]).abs() < 5 * own.std(0) / math.sqrt(len(own))).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_computed_in_single(dtype) -> None:
    g = gaussian(dtype=torch.float32)
    x = states(80.0).to(dtype)
    for ours, single in (
        (g.transport(x, 80.0, 20.0), g.transport(x.float(), 80.0, 20.0)),
        (g(x, 80.0), g(x.float(), 80.0)),
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours, single.to(dtype))


def test_in_single_precision_a_jump_to_sigma_20_errs_by_rounding_only() -> None:
    """The state is of size 80 x 4; bfloat16 would err by 0.5."""
    d, rank, generator = 3072, 256, torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn((d, rank), generator=generator, dtype=torch.float64))[0].mT
    variances = 600 / torch.arange(1, rank + 1).double() ** 1.2
    double = Gaussian(torch.zeros(d, dtype=torch.float64), components, variances, 0.02)
    single = Gaussian(torch.zeros(d), components.float(), variances, 0.02)
    x = 80 * torch.randn((8, d), generator=generator, dtype=torch.float64)
    error = single.transport(x.float(), 80.0, 20.0).double() - double.transport(x, 80.0, 20.0)
    assert 1e-7 < float(error.abs().max()) < 5e-5


def test_images_keep_their_shape() -> None:
    flat = gaussian()
    g = Gaussian(flat.mean.reshape(3, 2, 2), flat.components, flat.variances, flat.rest)
    x = states(9.0)
    for a, b in (
        (g(x.reshape(4, 3, 2, 2), 9.0), flat(x, 9.0)),
        (g.transport(x.reshape(4, 3, 2, 2), 9.0, 1.0), flat.transport(x, 9.0, 1.0)),
        (
            g.sample(4, generator=torch.Generator().manual_seed(0)),
            flat.sample(4, generator=torch.Generator().manual_seed(0)),
        ),
    ):
        assert torch.equal(a, b.reshape(4, 3, 2, 2))
    assert g.log_density(x.reshape(4, 3, 2, 2)).shape == (4,)


def test_a_moved_gaussian_is_another_with_every_tensor_there() -> None:
    """The device without memory tells: whatever is left behind cannot be combined with what moved."""
    g, x = gaussian(), states(1.0)
    before, same = g(x, 1.0), g.to("cpu")
    assert same is not g
    assert torch.equal(same(x, 1.0), before)
    assert g.to("meta")(x.to("meta"), torch.tensor(1.0, device="meta")).device.type == "meta"
    assert torch.equal(g(x, 1.0), before)  # the first stays where it is


def test_eta_is_the_integral_that_the_exponential_integrator_needs() -> None:
    """d eta / d sigma = -1 / (sigma phi), the limit of no variance included."""
    g, sigma = gaussian(rest=0.0), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (phi, phi_rest), (eta, eta_rest) = g.exponential(sigma, states(1.0))
    for p, e in ((phi[0], eta[0]), (phi_rest[0], eta_rest[0])):
        for k in range(len(e)):
            (slope,) = torch.autograd.grad(e[k], sigma, retain_graph=True)
            torch.testing.assert_close(slope, -1 / (sigma * p[k]).detach(), **EXACT)


def test_samples_needed_is_where_the_sampling_cost_is_the_tolerance() -> None:
    g = gaussian()
    n = g.samples_needed(2.0, 0.05)
    costs = [Gaussian(g.mean, g.components, g.variances, g.rest, count=m).sampling_kl(2.0) for m in (n - 1, n)]
    assert costs[0] > 0.05 >= costs[1]
    assert g.sampling_kl(2.0) == 0


def test_a_bound_gives_the_lowest_level_down_to_which_it_keeps_to_the_tolerance() -> None:
    bound = Bound((40.0, 20.0, 10.0, 5.0, 2.0), (0.001, 0.01, 0.06, 0.02, math.inf))
    assert bound.sigma_skip(0.05) == 20
    assert bound.sigma_skip(0.06) == 5
    assert [bound.at(s) for s in (100.0, 40.0, 39.0, 5.0, 1.0)] == [0.001, 0.001, 0.01, 0.02, math.inf]
    with pytest.raises(ValueError, match=r"smallest bound is 0\.001 nats, at sigma 40"):
        bound.sigma_skip(0.0005)
    for tolerance in (0.0, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            bound.sigma_skip(tolerance)


FACTS = {"data": "faces", "range": [-1.0, 1.0], "classes": ["a", "b", "é"], "vae": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_gaussian_is_read_back_bit_for_bit(tmp_path, dtype) -> None:
    plain = gaussian(rest=0.1 + 0.2, n_classes=3, dtype=dtype)
    bound = Bound((9.0, 1 / 3), (1e-3, math.inf))
    g = Gaussian(
        plain.mean.reshape(3, 3, 2, 2),
        plain.components,
        plain.variances,
        plain.rest,
        n_classes=3,
        count=1234,
        facts=FACTS,
        bound=bound,
    )
    path = tmp_path / "stats.safetensors"
    g.save(path)
    again = Gaussian.load(path)
    for name in ("mean", "components", "variances"):
        a, b = getattr(g, name), getattr(again, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for name in ("rest", "n_classes", "count", "facts", "bound", "shape", "rank"):
        assert getattr(g, name) == getattr(again, name)
    x, cond = states(9.0).reshape(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    assert torch.equal(g.transport(x, 80.0, 9.0, cond), again.transport(x, 80.0, 9.0, cond))
    gaussian().save(path)  # over the old one
    assert Gaussian.load(path).bound is None
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
def test_another_process_reads_the_same_numbers(tmp_path) -> None:
    g, path = gaussian(), tmp_path / "stats.safetensors"
    g.save(path)
    code = (
        "import sys, torch; from samplers.gaussian import Gaussian;"
        "g = Gaussian.load(sys.argv[1]); x = torch.arange(12).double()[None];"
        "print(g.transport(x, 80.0, 5.0).sum().item().hex())"
    )
    output = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert output.strip() == g.transport(torch.arange(12).double()[None], 80.0, 5.0).sum().item().hex()


def _pickled(path):
    with open(path, "wb") as file:
        pickle.dump({"mean": [0.0]}, file)


def _torch_pickled(path):
    torch.save({"mean": torch.zeros(3)}, path)


def _truncated(path):
    gaussian().save(path)
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def _tensors(g: Gaussian) -> dict[str, Tensor]:
    return {"mean": g.mean, "components": g.components.contiguous(), "variances": g.variances}


def _about(**changes) -> dict[str, str]:
    about = {"n_classes": None, "count": None, "rest": 0.3, "facts": {}} | changes
    return {"format": "gaussian-1", "gaussian": json.dumps(about)}


def _other_format(path):
    save_file(_tensors(gaussian()), path, _about() | {"format": "gaussian-2"})


def _without_components(path):
    tensors = _tensors(gaussian())
    del tensors["components"]
    save_file(tensors, path, _about())


def _not_an_object(path):
    save_file(_tensors(gaussian()), path, _about() | {"gaussian": "[1]"})


def _negative(path):
    save_file(_tensors(gaussian()), path, _about(rest=-1.0))


def _skewed(path):
    tensors = _tensors(gaussian())
    save_file(tensors | {"components": tensors["components"] * 1.1}, path, _about())


def _other_classes(path):
    save_file(_tensors(gaussian()), path, _about(n_classes=3))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (_pickled, "cannot be read"),
        (_torch_pickled, "cannot be read"),
        (_truncated, "cannot be read"),
        (_foreign, "its format is None"),
        (_other_format, "its format is 'gaussian-2'"),
        (_without_components, "components"),
        (_not_an_object, "cannot be read"),
        (_negative, "negative"),
        (_skewed, "orthonormal"),
        (_other_classes, "for each class"),
    ],
)
def test_a_file_that_is_no_gaussian_is_refused_by_name(tmp_path, write, says) -> None:
    path = tmp_path / "stats.safetensors"
    write(path)
    with pytest.raises(ValueError, match=says) as caught:
        Gaussian.load(path)
    assert str(path) in str(caught.value)


def test_facts_that_json_cannot_hold_leave_no_file(tmp_path) -> None:
    g = gaussian()
    g.facts = {"range": [-math.inf, 1.0]}
    with pytest.raises(ValueError, match="JSON"):
        g.save(tmp_path / "stats.safetensors")
    assert not os.listdir(tmp_path)


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(4), EYE, torch.ones(3), 0.1), "components"),
        ((torch.zeros(3), EYE, torch.ones(2), 0.1), "components"),
        ((torch.zeros(3), EYE[:2], torch.ones(2, 1), 0.1), "components"),
        ((torch.zeros(3), torch.cat([EYE, EYE]), torch.ones(6), 0.1), "components"),
        ((torch.zeros(3), 1.01 * EYE, torch.ones(3), 0.1), "orthonormal"),
        ((torch.zeros(3), EYE[[0, 0]], torch.ones(2), 0.1), "orthonormal"),
        ((torch.zeros(3), EYE, torch.tensor([1.0, 0.5, -0.1]), 0.1), "negative"),
        ((torch.zeros(3), EYE, torch.ones(3), -0.1), "rest"),
        ((torch.zeros(3), EYE, torch.ones(3), math.nan), "rest"),
        ((torch.zeros(3), EYE, torch.ones(3), math.inf), "rest"),
        ((torch.full((3,), math.nan), EYE, torch.ones(3), 0.1), "mean"),
        ((torch.zeros(3), EYE * math.inf, torch.ones(3), 0.1), "components"),
        ((torch.zeros(3), EYE, torch.full((3,), math.inf), 0.1), "variances"),
        ((torch.zeros(3, dtype=torch.int64), EYE, torch.ones(3), 0.1), "mean"),
    ],
)
def test_bad_parameters_raise(arguments, says) -> None:
    with pytest.raises(ValueError, match=says):
        Gaussian(*arguments)


@pytest.mark.parametrize(("mean", "n_classes"), [(torch.zeros(3), 3), (torch.zeros(2, 3), 3)])
def test_means_that_are_not_one_for_each_class_raise(mean, n_classes) -> None:
    with pytest.raises(ValueError, match="for each class"):
        Gaussian(mean, EYE, torch.ones(3), 0.1, n_classes=n_classes)


@pytest.mark.parametrize(
    "cond",
    [
        None,
        3,
        {"class_labels": None},
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([0, 1, 2, -1]),
        torch.tensor([0, 1]),
        torch.tensor([0.0, 1.0, 2.0, 0.0]),
    ],
)
def test_labels_that_are_missing_or_out_of_range_raise(cond) -> None:
    g, x = gaussian(n_classes=3), states(1.0)
    for call in (lambda: g(x, 1.0, cond), lambda: g.transport(x, 80.0, 1.0, cond), lambda: g.log_density(x, 1.0, cond)):
        with pytest.raises(ValueError, match="cond"):
            call()


def test_jumps_that_cannot_be_made_raise() -> None:
    g, flat, x = gaussian(), gaussian(rest=0.0), states(1.0)
    for call, says in (
        (lambda: g.transport(x, math.inf, 1.0), "infinite"),
        (lambda: g.transport(x, 1.0, math.inf), "infinite"),
        (lambda: flat.transport(x, 0.0, 1.0), "without variance"),
        (lambda: g.transport(x, 0.0, 1.0, mode="marginal"), "without variance"),
        (lambda: flat.log_density(x), "no density"),
        (lambda: g.transport(x, 2.0, 1.0, mode="sde"), "mode"),
        (lambda: g.transport(x, 2.0, 1.0, path="edm"), "path"),
        (lambda: g.transport(x[:, :5], 2.0, 1.0), "x: has shape"),
        (lambda: g.transport(x, torch.ones(3), 1.0), "sigma"),
        (lambda: g(x[0], 2.0), "x: has shape"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    whole = gaussian(D, 0.0)  # no direction is left for a rest of 0 to be flat in
    assert bool(whole.transport(x, 0.0, 1.0).isfinite().all())
    assert bool(whole.log_density(x).isfinite().all())
