"""The trainer against exact gradients of divergences, and its cost counted on real networks."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import DIVERGENCES, FDivergence, Fixed, OneStep, Trainer, train
from distill.adversary import Comparison, FakeHeads, TeacherHeads
from distill.discriminator import Discriminator
from distill.divergences import alpha
from distill.noise import Share
from distill.optim import Update
from distill.taps import Tap
from distill.trainer import by_level
from distill.weights import RatioWeight
from samplers import GaussianMixture, Guided, denoiser_from
from tests.distill.tiny import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, unet
from tests.truth import relative_error
from tools.bench_toys import BatchShare

START = 5.0  # the student's noise level; an affine student divides it out


class Affine(nn.Module):
    """A denoiser [B, 1] whose one step is x = shift + scale z: the student's samples are exactly Gaussian."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.shift + self.scale * x / START

    def law(self) -> GaussianMixture:
        shift, scale = self.shift.detach(), self.scale.detach()
        return GaussianMixture(torch.ones(1), shift.reshape(1, 1), (scale**2).reshape(1))


class ExactFake(nn.Module):
    """The exact denoiser of the student's law as it stands; its parameter lets an update run without changing it."""

    def __init__(self, student: Affine) -> None:
        super().__init__()
        self.law, self.nothing = student.law, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.law()(x, sigma) + 0 * self.nothing


class Exact:
    """An adversary that knows both laws: its one head is ln r. The student may move."""

    bridges = False

    def settle(self) -> None:
        raise AssertionError("it does not bridge")

    def __init__(self, target: GaussianMixture, student: Affine) -> None:
        self.target, self.student = target, student

    def compare(self, fake: Any, target: Any, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool) -> Comparison:
        x = x.detach().requires_grad_(adversarial)
        logits = (self.target.log_density(x, sigma) - self.student.law().log_density(x, sigma))[:, None]
        pull = torch.autograd.grad(nn.functional.softplus(-logits).sum(), x)[0] if adversarial else None
        with torch.no_grad():
            return Comparison(fake(x, sigma, cond), target(x, sigma, cond), logits.detach(), pull)

    def learn(self, denoising: Callable[[], Tensor], *_: Any) -> Iterator[Tensor]:
        yield denoising().mean()


def unweighted(x: Tensor, denoised_target: Tensor, sigma: Tensor) -> Tensor:
    """Every sample and level counts as it is: what is left is sigma^2 times the divergence's own gradient."""
    return torch.ones_like(sigma)


def exact_weight(name: str) -> RatioWeight:
    """h(r) as it is, but for bounds far outside what occurs."""
    divergence = alpha(float(name.removeprefix("alpha"))) if name.startswith("alpha") else DIVERGENCES[name]
    return RatioWeight(divergence, clip=(1e-9, 1e9), normalise=False)


@pytest.fixture
def target() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([0.35, 0.65], dtype=torch.float64),
        torch.tensor([[-1.2], [0.9]], dtype=torch.float64),
        torch.tensor([0.1, 0.3], dtype=torch.float64),
    )


class Kept(torch.optim.SGD):
    """A step of size zero that keeps the gradients it was given."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.kept: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kept = [None if p.grad is None else p.grad.clone() for g in self.param_groups for p in g["params"]]


def frozen(module: nn.Module) -> Update:
    """Real updates of size zero: the parameters stay as they are."""
    return Update(Kept(module.parameters()), lambda step: 0.0)


def gradients(
    student: Affine,
    target: GaussianMixture,
    sigma: float,
    steps: int = 40,
    share: Share | BatchShare = BatchShare(3, 40_000),  # noqa: B008
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The mean and the standard error of the gradient that the trainer gives shift and scale, each [2]."""
    fake, update = ExactFake(student), frozen(student)
    trainer = Trainer(
        OneStep(student, START),
        fake,
        Fixed(target),
        update,
        frozen(fake),
        student_level=lambda u: torch.full_like(u, sigma),
        fake_level=lambda u: torch.full_like(u, sigma),
        share=share,  # type: ignore[arg-type]
        shape=(1,),
        **options,
    )
    rows = []
    for n, metrics in enumerate(train(trainer, steps)):
        assert metrics["gap"] > 0, f"step {n}"
        rows.append(torch.stack(update.optimizer.kept))  # type: ignore[attr-defined]
    table = torch.stack(rows)
    return table.mean(0), table.std(0, correction=0) / max(1, steps - 1) ** 0.5


def divergence_gradient(f: FDivergence, student: Affine, target: GaussianMixture, sigma: float) -> Tensor:
    """grad D_f(p_sigma || q_sigma) in shift and scale, [2], by quadrature and automatic differentiation."""
    x = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    variance = student.scale**2 + sigma**2
    log_q = -0.5 * ((x - student.shift) ** 2 / variance + variance.log() + math.log(2 * math.pi))
    log_p = target.log_density(x[:, None], sigma)
    kept = log_q > -200
    integrand = log_q[kept].exp() * f.f((log_p - log_q)[kept].exp())
    value = torch.trapezoid(integrand, x[kept])
    return torch.stack(torch.autograd.grad(value, [student.shift, student.scale]))


def assert_agree(mean: Tensor, error: Tensor, expected: Tensor) -> None:
    assert bool((5 * error < 0.02 * expected.norm()).all()), f"too noisy to tell: {error} of {expected}"
    assert bool(((mean - expected).abs() < 5 * error).all()), f"{mean} +- {error}, expected {expected}"


# Where the weight grows with r the student is the wider of the two, so that its ratio is bounded, and the other way.
WIDE, NARROW = (-1.6, 1.9), (1.1, 0.55)
STARTS = {
    "reverse-kl": WIDE,
    "softened-reverse-kl": WIDE,
    "jensen-shannon": WIDE,
    "squared-hellinger": WIDE,
    "forward-kl": WIDE,
    "jeffreys": WIDE,
    "neyman": NARROW,
    "alpha-0.5": NARROW,
    "alpha0": NARROW,
    "alpha0.3": WIDE,
    "alpha2": WIDE,
}


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1.2, 2.5])  # at lower levels |ln r| passes 10 in the tails, where it is cut
@pytest.mark.parametrize("name", STARTS)
def test_the_gradient_is_that_of_the_divergence(target: GaussianMixture, name: str, sigma: float) -> None:
    """E[h(r) (D_fake - D_target) dx] = sigma^2 grad D_f(p_sigma || q_sigma), by quadrature, for every divergence."""
    student = Affine(*STARTS[name])
    weight = exact_weight(name)
    mean, error = gradients(
        student, target, sigma, ratio_weight=weight, weighting=unweighted, adversary=Exact(target, student)
    )
    expected = sigma**2 * divergence_gradient(weight.divergence, student, target, sigma)
    assert_agree(mean, error, expected)
    if not weight.divergence.constant:  # the test would tell it from reverse KL, however it is scaled
        other = divergence_gradient(DIVERGENCES["reverse-kl"], student, target, sigma)
        other = other * (mean @ other) / (other @ other)
        assert bool(((other - mean).abs() > 5 * error).any())


def test_every_divergence_is_tested() -> None:
    assert DIVERGENCES.keys() <= STARTS.keys()


@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_without_a_ratio_the_gradient_is_that_of_the_reverse_kl(target: GaussianMixture, sigma: float) -> None:
    student = Affine(1.8, 0.6)
    mean, error = gradients(student, target, sigma, weighting=unweighted)
    expected = sigma**2 * divergence_gradient(DIVERGENCES["reverse-kl"], student, target, sigma)
    assert_agree(mean, error, expected)


def test_a_level_s_weight_scales_its_gradient(target: GaussianMixture) -> None:
    """`by_level` gives sqrt(sigma^2 + sigma_data^2) / (sigma sigma_data) times the plain gradient, sample by sample."""
    student, sigma = Affine(1.8, 0.6), 0.7
    share = Share(3, 500)
    plain, _ = gradients(student, target, sigma, 1, share, weighting=unweighted)
    scaled, _ = gradients(student, target, sigma, 1, share, weighting=by_level(0.5))
    assert relative_error(scaled, plain * math.sqrt(sigma**2 + 0.25) / (sigma * 0.5)) < 1e-6


def first_batch(student: Affine, sigma: float, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What step 0 draws: z, x with its graph, and x_sigma, each [B, 1]."""
    noise = Share(3, batch).noise(0)
    z = noise.normal((1,))
    x = student.shift + student.scale * z
    noise.uniform()
    return z, x, x + sigma * noise.normal((1,))


def test_by_default_a_sample_is_weighted_with_the_inverse_distance_to_its_prediction(target: GaussianMixture) -> None:
    """mean of w (D_q - D_p) (1, z) with w = 1 / |x - D_p|, for the very samples of step 0."""
    student, sigma = Affine(1.8, 0.6), 0.8
    z, x, noised = (t.detach() for t in first_batch(student, sigma, 300))
    level = torch.tensor(sigma, dtype=torch.float64)
    to_target = target(noised, level)
    pull = (student.law()(noised, level) - to_target) / (x - to_target).abs()
    found, _ = gradients(student, target, sigma, 1, Share(3, 300))
    assert relative_error(found, torch.stack([pull.mean(), (pull * z).mean()])) < 1e-4


def test_the_adversarial_term_reaches_the_student_with_its_weight(target: GaussianMixture) -> None:
    """Doubling the weight adds the gradient of E[softplus(ln q - ln p)](x_sigma) once more, and h(r) has none."""
    student, sigma = Affine(1.0, 0.8), 0.7
    adversary, share = Exact(target, student), Share(3, 1000)
    options = {"adversary": adversary, "ratio_weight": exact_weight("forward-kl")}
    found = [gradients(student, target, sigma, 1, share, adversarial_weight=w, **options)[0] for w in (0.0, 0.5, 1)]
    _, _, x_sigma = first_batch(student, sigma, 1000)
    level = torch.tensor(sigma, dtype=torch.float64)
    log_q = student.law().log_density(x_sigma, level)
    loss = nn.functional.softplus(log_q - target.log_density(x_sigma, level)).mean()
    expected = torch.stack(torch.autograd.grad(loss, [student.shift, student.scale]))
    assert relative_error(found[2] - found[0], expected) < 1e-5
    assert relative_error(found[1] - found[0], expected / 2) < 1e-5


def test_a_divergence_without_its_ratio_is_refused(target: GaussianMixture) -> None:
    student = Affine(1.0, 0.8)
    with pytest.raises(ValueError, match="adversary: is none; ratio_weight"):
        gradients(student, target, 1.0, 1, ratio_weight=exact_weight("forward-kl"))
    with pytest.raises(ValueError, match=r"adversarial_weight \(0\.1\) need one"):
        gradients(student, target, 1.0, 1, adversarial_weight=0.1)


class Counter:
    """Counts the passes of a real network: rows of every forward (with or without a graph) and backward."""

    def __init__(self, network: nn.Module) -> None:
        self.graph: list[int] = []
        self.plain: list[int] = []
        self.backward = 0
        network.register_forward_hook(self._forward)
        network.register_full_backward_hook(self._backward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        (self.graph if output[0].requires_grad else self.plain).append(len(inputs[0]))

    def _backward(self, *_: Any) -> None:
        self.backward += 1


def tiny_trainer(
    guidance: float = 1.0, fake_steps: int = 1, batch: int = 4, lr: float = 1e-3, **options: Any
) -> tuple[Trainer, dict[str, nn.Module]]:
    """The objects of a run on three real UNets, without the command line."""
    from distill.export import teacher_scheduler

    networks: dict[str, nn.Module] = {name: unet(10) for name in ("student", "fake", "target")}
    networks["target"].requires_grad_(False)
    scheduler = teacher_scheduler(SIGMA_DATA, SIGMA_MIN, SIGMA_MAX)
    denoisers = {name: denoiser_from(network, scheduler) for name, network in networks.items()}
    target = denoisers["target"] if guidance == 1 else Guided(denoisers["target"], guidance, 10)
    updates = {
        name: Update(torch.optim.AdamW(networks[name].parameters()), lambda step: lr) for name in ("student", "fake")
    }
    level: Callable[[Tensor], Tensor] = lambda u: 0.1 + 5 * u  # noqa: E731
    trainer = Trainer(
        OneStep(denoisers["student"], 2.5),
        denoisers["fake"],
        Fixed(target),
        updates["student"],
        updates["fake"],
        level,
        level,
        Share(0, batch),
        (1, 8, 8),
        conditions=lambda noise, device: noise.integers(10, device),
        fake_steps=fake_steps,
        sigma_data=SIGMA_DATA,
        **options,
    )
    return trainer, networks


@pytest.mark.parametrize(("fake_steps", "guidance"), [(1, 1.0), (3, 1.0), (1, 2.0), (3, 2.0), (2, 0.0)])
def test_an_update_costs_what_the_trainer_says(fake_steps: int, guidance: float) -> None:
    """Forwards: student 1, target 1 (2 B rows if guided), fake 1 + K; backwards: 1 and K."""
    batch, updates = 4, 2
    trainer, networks = tiny_trainer(guidance, fake_steps, batch)
    counts = {name: Counter(network) for name, network in networks.items()}
    for _ in train(trainer, updates):
        pass
    k = fake_steps
    assert counts["student"].graph == [batch] * updates
    assert counts["student"].plain == []
    assert counts["target"].graph == []
    assert counts["target"].plain == [batch if guidance == 1 else 2 * batch] * updates
    assert counts["fake"].plain == [batch] * updates
    assert counts["fake"].graph == [batch] * k * updates
    assert [counts[name].backward for name in ("student", "target", "fake")] == [updates, 0, k * updates]


@pytest.mark.parametrize("features", ["teacher", "fake"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_adversarial_gradient_of_a_real_network_is_that_of_its_logits(features: str, guidance: float) -> None:
    """At step 0, where fake and teacher agree to rounding, it is all there is; against a pass with the whole graph."""
    trainer, networks = tiny_trainer(guidance, lr=0.0)
    denoiser = trainer.target.denoiser.denoiser if guidance != 1 else trainer.target.denoiser  # type: ignore[attr-defined]
    network = denoiser if features == "teacher" else trainer.fake
    tap = Tap(network.network)  # type: ignore[union-attr]
    x, cond = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 5, 9])
    with torch.no_grad():
        heads = Discriminator(tap.encode(lambda: network(x, torch.ones(4), cond)))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))

    kept: list[Tensor] = []
    shared = {"network": network, "tap": tap, "heads": heads, "train_heads": heads, "reals": lambda noise, cond: x}
    adversary = (
        TeacherHeads(**shared, level=trainer.student_level) if features == "teacher" else FakeHeads(**shared)  # type: ignore[arg-type]
    )
    trainer.adversary, trainer.adversarial_weight = adversary, 0.7
    trainer.weighting = lambda x, denoised, sigma: kept.append(sigma) or torch.zeros_like(sigma)  # type: ignore[func-returns-value]
    trainer.student_update = frozen(networks["student"])
    trainer.step(0)
    found = trainer.student_update.optimizer.kept  # type: ignore[attr-defined]

    noise = trainer.share.noise(0)
    cond = trainer.conditions(noise, "cpu")
    x0 = trainer.student(noise.normal((1, 8, 8)), cond)
    noise.uniform()
    noised = x0 + kept[0][:, None, None, None].float() * noise.normal((1, 8, 8))
    with tap.record() as maps:
        network(noised, kept[0], cond)
    loss = 0.7 * nn.functional.softplus(-heads(maps)).mean()
    student = [p for p in networks["student"].parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, student, allow_unused=True)
    found, expected = (torch.cat([g.flatten() for g in gradients if g is not None]) for gradients in (found, expected))
    assert float(expected.abs().max()) > 1e-6
    assert relative_error(found, expected) < 1e-4


def test_a_step_is_a_function_of_its_number_and_the_weights() -> None:
    """Steps 0, 1, 2 in one go and steps 0 .. 1, then 2 with another history of the global generator."""
    trainer, networks = tiny_trainer(fake_steps=2)
    for _ in train(trainer, 3):
        pass
    again, others = tiny_trainer(fake_steps=2)
    for _ in train(again, 2):
        torch.randn(7)
    for metrics in train(again, 3, start=2):
        assert sorted(metrics) == ["fake_loss", "gap", "student_loss"]
    for name in ("student", "fake"):
        for a, b in zip(networks[name].parameters(), others[name].parameters(), strict=True):
            assert torch.equal(a, b)


class GaussianFake(Affine):
    """A trainable denoiser of the exact form for a Gaussian."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        gain = self.scale**2 / (self.scale**2 + sigma[:, None] ** 2)
        return self.shift + gain * (x - self.shift)


@pytest.mark.slow
def test_an_affine_student_and_its_fake_find_a_gaussian() -> None:
    """The whole loop, nothing exact but the target N(0.7, 0.5^2) in 8 dimensions."""
    mean = torch.full((1, 8), 0.7, dtype=torch.float64)
    target = GaussianMixture(torch.ones(1), mean, torch.tensor([0.25], dtype=torch.float64))
    student, fake, steps = Affine(-0.5, 1.0), GaussianFake(-0.5, 1.0), 300

    def falling(module: nn.Module, rate: float) -> Update:
        optimizer = torch.optim.Adam(module.parameters(), betas=(0.0, 0.99))
        return Update(optimizer, lambda n: rate * (1 - (n % 10_000) / (2 * steps)))

    trainer = Trainer(
        OneStep(student, START),
        fake,
        Fixed(target),
        falling(student, 0.02),
        falling(fake, 0.04),
        student_level=lambda u: 0.2 + 2 * u,
        fake_level=lambda u: 0.2 + 2 * u,
        share=Share(0, 32),
        shape=(8,),
        fake_steps=2,
    )
    for _ in train(trainer, steps):
        pass
    assert student.shift.item() == pytest.approx(0.7, abs=0.03)
    assert student.scale.item() == pytest.approx(0.5, abs=0.03)
