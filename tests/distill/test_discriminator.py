"""The discriminator and both places for its heads, against separate passes, closed forms and exact ratios."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from distill.adversary import DIFFERENCE, FakeHeads, ScoreOnly, TeacherHeads
from distill.discriminator import Discriminator, Head, frozen, log_ratio
from distill.export import teacher_scheduler
from distill.losses import (
    adversarial_loss,
    denoising_loss,
    difference_penalty,
    discriminator_loss,
    gradient_penalty,
)
from distill.real import RealMixture
from distill.sections import Toy
from distill.taps import Tap
from distill.toy import networks, two_modes
from samplers import GaussianMixture, Guided, NetworkDenoiser, SampleNoise, denoiser_from
from samplers.denoiser import expand
from tests.distill.tiny import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, unet
from tests.truth import order, relative_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def opinionated(module: nn.Module) -> nn.Module:
    """Its parameters drawn anew, so that no logit is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# Heads

SIZES = [
    *[(n, n) for n in range(1, 34)],
    *[(3, 7), (1, 9), (33, 5), (8, 16), (17, 6), (64, 4)],
    *[(1,), (5,), (256,)],
    (),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_head_reads_features_of_any_size_and_starts_without_an_opinion(size: tuple[int, ...]) -> None:
    """One logit each, exactly 0 at first; afterwards it depends on every number of its sample and on no other's."""
    head, features = Head(torch.zeros(1, 6, *size)).double(), normal(3, 6, *size).requires_grad_()
    logits = head(features)
    assert torch.equal(logits, torch.zeros(3, 1, dtype=torch.float64))
    opinionated(head)
    (gradient,) = torch.autograd.grad(head(features)[1, 0], features)
    assert bool((gradient[1] != 0).all())
    assert bool((gradient[[0, 2]] == 0).all())


@pytest.mark.parametrize("channels", [1, 3, 8, 40, 64])
def test_a_head_has_the_width_of_its_features(channels: int) -> None:
    for size in ((), (4,), (8, 8)):
        head = opinionated(Head(torch.zeros(1, channels, *size)))
        assert head(normal(2, channels, *size).float()).shape == (2, 1)


def test_the_logit_of_tokens_does_not_depend_on_their_order_or_number() -> None:
    head, tokens = opinionated(Head(torch.zeros(1, 8, 4)).double()), normal(2, 8, 6)
    turned = tokens[:, :, torch.tensor([3, 5, 0, 1, 4, 2])]
    torch.testing.assert_close(head(turned), head(tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(torch.cat([tokens, tokens], 2)), head(tokens), rtol=1e-12, atol=1e-12)


def test_tokens_are_averaged_after_a_layer_that_reads_each() -> None:
    head, tokens = opinionated(Head(torch.zeros(1, 8, 4)).double()), normal(2, 8, 6)
    each, norm, *_, layer, _, last = head.layers
    hidden = torch.einsum("oc,bcn->bon", each.weight[:, :, 0], tokens) + each.bias[:, None]
    spread = (hidden - hidden.mean(2, keepdim=True)) / (hidden.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    assert norm.num_groups == 8  # so that every channel is normalised over its tokens
    mean = silu(spread * norm.weight[:, None] + norm.bias[:, None]).mean(2)
    expected = silu(mean @ layer.weight.mT + layer.bias) @ last.weight.mT + last.bias
    torch.testing.assert_close(head(tokens), expected, rtol=1e-10, atol=1e-10)


def test_features_of_another_form_are_refused_by_their_shape() -> None:
    with pytest.raises(ValueError, match=r"features of shape \[1, 4, 2, 2, 2\]"):
        Head(torch.zeros(1, 4, 2, 2, 2))


def test_a_discriminator_has_a_head_for_each_layer_and_computes_in_its_own_precision() -> None:
    sizes = [(8, 8, 8), (6, 5), (4,)]
    heads = opinionated(Discriminator([torch.zeros(1, *size) for size in sizes]))
    features = [normal(3, *size, seed=k) for k, size in enumerate(sizes)]
    logits = heads(features)
    assert (logits.shape, logits.dtype) == ((3, 3), torch.float32)
    for k, head in enumerate(heads.heads):
        assert torch.equal(logits[:, k], head(features[k].float())[:, 0])
    half = heads([f.to(torch.bfloat16) for f in features])
    assert half.dtype == torch.float32
    assert relative_error(half.detach(), logits.detach()) < 0.02
    with pytest.raises(ValueError, match="shorter"):
        heads(features[:2])


def test_the_log_ratio_is_the_mean_over_heads_within_ten() -> None:
    logits = torch.tensor([[1.0, 3.0], [-40.0, 0.0], [50.0, 10.0], [-9.0, -10.0], [40.0, -39.0]])
    assert log_ratio(logits).tolist() == [2.0, -10.0, 10.0, -9.5, 0.5]
    assert bool(log_ratio(torch.full((2, 2), math.nan)).isnan().all())


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_gives_back_what_it_took_and_no_more(fails: bool) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    first.bias.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    try:
        with frozen(first, second):
            assert not any(p.requires_grad for m in (first, second) for p in m.parameters())
            y = second(first(x)).sum()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [p.requires_grad for p in (first.weight, first.bias, second.weight, second.bias)] == [
        True,
        False,
        True,
        True,
    ]
    y.backward()
    assert x.grad is not None
    assert all(p.grad is None for m in (first, second) for p in m.parameters())


# Losses


def test_the_losses_are_those_of_logistic_regression() -> None:
    real, fake = normal(4, 3, seed=1).requires_grad_(), normal(4, 3, seed=2).requires_grad_()
    sigmoid = [1 / (1 + (-t.detach()).exp()) for t in (real, fake)]
    loss = discriminator_loss(real, fake)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.detach(), -(sigmoid[0].log() + (1 - sigmoid[1]).log()).mean(1))
    of_real, of_fake = torch.autograd.grad(loss.sum(), [real, fake])
    torch.testing.assert_close(of_real, (sigmoid[0] - 1) / 3)
    torch.testing.assert_close(of_fake, sigmoid[1] / 3)

    loss = adversarial_loss(fake)
    torch.testing.assert_close(loss.detach(), -sigmoid[1].log().mean(1))
    (gradient,) = torch.autograd.grad(loss.sum(), fake)
    torch.testing.assert_close(gradient, (sigmoid[1] - 1) / 3)
    large = torch.full((1, 1), 1e4, dtype=torch.float64)
    assert discriminator_loss(-large, large).item() == 2e4
    assert adversarial_loss(-large).item() == 1e4


def test_the_discriminators_loss_is_least_at_the_log_ratio() -> None:
    """Of two distributions over five outcomes; any step away from ln p / q costs more."""
    p, q = normal(5, seed=1).softmax(0), normal(5, seed=2).softmax(0)

    def loss(logit: Tensor) -> Tensor:
        return (p * discriminator_loss(logit[:, None], logit[:, None] - 1e9)).sum() + (
            q * discriminator_loss(logit[:, None] + 1e9, logit[:, None])
        ).sum()

    logit = (p / q).log().requires_grad_()
    (slope,) = torch.autograd.grad(loss(logit), logit)
    assert float(slope.abs().max()) < 1e-15
    assert all(loss(logit + 0.1 * way) > loss(logit) for way in (*torch.eye(5), *-torch.eye(5)))


def test_the_penalty_of_a_linear_logit_is_its_squared_norm() -> None:
    x, weight = normal(3, 2, 2, 2).requires_grad_(), normal(8, 5, seed=1).requires_grad_()
    penalty = gradient_penalty(x.flatten(1) @ weight, x)
    torch.testing.assert_close(penalty, weight.mean(1).square().sum().expand(3))
    (gradient,) = torch.autograd.grad(penalty.sum(), weight)
    torch.testing.assert_close(gradient, (3 * 2 * weight.mean(1) / 5)[:, None].expand(8, 5))


def curved(x: Tensor) -> Tensor:
    """Two logits [B, 2], neither of them linear in x [B, 3]."""
    return torch.stack([(x * torch.tensor([1.0, -0.5, 2.0])).sum(1).tanh(), x.square().sum(1)], 1)


def test_the_difference_has_the_squared_gradient_for_its_mean() -> None:
    point, n = normal(1, 3), 200_000
    x = point.clone().requires_grad_()
    expected = gradient_penalty(curved(x), x).item()
    found = difference_penalty(curved(point).expand(n, 2), curved(point + 1e-4 * normal(n, 3, seed=1)), 1e-4)
    error = float(found.std()) / n**0.5
    assert abs(float(found.mean()) - expected) < 5 * error
    assert 5 * error < 0.05 * expected


def test_the_error_of_the_difference_is_of_second_order_in_its_step() -> None:
    """The mean by Gauss and Hermite's quadrature; of x^2 it is 4 x^2 + 3 step^2."""
    nodes, masses = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    masses = masses / masses.sum()

    def mean(logit: Callable[[Tensor], Tensor], x: float, step: float) -> float:
        at, moved = (logit(p)[:, None] for p in (torch.full_like(nodes, x), x + step * nodes))
        return float((masses * difference_penalty(at, moved, step)).sum())

    assert mean(torch.square, 0.7, 0.3) == pytest.approx(4 * 0.49 + 3 * 0.09, rel=1e-10)
    errors = [abs(mean(torch.tanh, 0.7, 0.05 / n) - (1 - math.tanh(0.7) ** 2) ** 2) for n in (1, 2, 4)]
    assert order([1, 2, 4], errors) == pytest.approx(2, abs=0.02)


# Both places for the heads, on real networks

SIGMA = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
LABELS = torch.tensor([2, 5, 9])
REAL = 0.7


class Parts:
    """A teacher, a fake score with other weights and attention in its encoder, and heads that have an opinion."""

    def __init__(self, place: str, **options: Any) -> None:
        scheduler = teacher_scheduler(SIGMA_DATA, SIGMA_MIN, SIGMA_MAX)
        self.teacher = denoiser_from(unet(10, 0, channels=(8, 16), attention=(0, 1)).double(), scheduler)
        self.fake = denoiser_from(unet(10, 1, channels=(8, 16), attention=(0, 1)).double(), scheduler)
        self.teacher.requires_grad_(False)
        self.network = self.teacher if place == "teacher" else self.fake
        self.tap = Tap(self.network.network)
        with torch.no_grad():
            features = self.tap.encode(lambda: self.network(self.x0(), SIGMA, LABELS))
        torch.manual_seed(0)
        self.heads = opinionated(Discriminator(features)).double()
        kind = partial(TeacherHeads, level=self.level) if place == "teacher" else FakeHeads
        self.adversary = kind(
            network=self.network, tap=self.tap, heads=self.heads, train_heads=self.heads, reals=self.reals, **options
        )

    @staticmethod
    def level(u: Tensor) -> Tensor:
        return 0.1 + 2 * u

    @staticmethod
    def x0() -> Tensor:
        return normal(3, 1, 8, 8, seed=4)

    @staticmethod
    def reals(noise: SampleNoise, cond: Tensor) -> Tensor:
        assert torch.equal(cond, LABELS)
        return REAL * noise.normal((1, 8, 8), torch.float64) + cond[:, None, None, None] / 9

    def logits(self, x: Tensor, sigma: Tensor, label: Tensor = LABELS) -> Tensor:
        """From a pass of its own."""
        return self.heads(self.tap.encode(lambda: self.network(x, sigma, label)))

    def denoising(self) -> Callable[[], Tensor]:
        return partial(denoising_loss, self.fake, self.x0(), SIGMA, normal(3, 1, 8, 8, seed=5), LABELS, SIGMA_DATA)

    def learn(self) -> tuple[float, list[Tensor], dict[str, Tensor]]:
        """The losses' sum, its gradients, and the metrics; each loss is differentiated before the next is asked for."""
        metrics: dict[str, Tensor] = {}
        total, noise = 0.0, SampleNoise(7, range(3))
        for loss in self.adversary.learn(self.denoising(), self.x0(), SIGMA, LABELS, noise, metrics):
            assert loss.shape == ()
            total += loss.item()
            loss.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        for parameter in self.parameters():
            parameter.grad = None
        return total, found, metrics

    def parameters(self) -> list[nn.Parameter]:
        return [*self.fake.parameters(), *self.heads.parameters()]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters(), found, strict=True)]


PLACES = pytest.mark.parametrize("place", ["teacher", "fake"])


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Relative to the largest of all."""
    scale = max(float(e.abs().max()) for e in expected)
    assert scale > 0
    assert max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) < tolerance * scale


def pull_of_a_whole_pass(parts: Parts, x: Tensor) -> Tensor:
    """The gradient in x of every sample's softplus(-logit), from a pass of its own that keeps its whole graph."""
    x = x.detach().requires_grad_()
    with parts.tap.record() as features:
        assert parts.network(x, SIGMA, LABELS).requires_grad
    (gradient,) = torch.autograd.grad(softplus(-parts.heads(features)).mean(1).sum(), x)
    return gradient


@PLACES
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_compare_equals_separate_passes(place: str, guidance: float) -> None:
    """Both predictions, the logits, and the pull: those of the conditional pass."""
    parts = Parts(place)
    target = parts.teacher if guidance == 1 else Guided(parts.teacher, guidance, 10)
    x = normal(3, 1, 8, 8)
    found = parts.adversary.compare(parts.fake, target, x, SIGMA, LABELS, adversarial=True)
    without = parts.adversary.compare(parts.fake, target, x, SIGMA, LABELS, adversarial=False)
    assert without.pull is None
    for one, other in zip(found[:3], without[:3], strict=True):
        assert relative_error(one, other) < 1e-12

    expected = pull_of_a_whole_pass(parts, x)
    assert float(expected.abs().amax((1, 2, 3)).min()) > 0
    assert relative_error(found.pull, expected) < 1e-10
    with torch.no_grad():
        logits = parts.logits(x, SIGMA)
        assert relative_error(found.logits, logits) < 1e-12
        assert relative_error(found.denoised_fake, parts.fake(x, SIGMA, LABELS)) < 1e-12
        assert relative_error(found.denoised_target, target(x, SIGMA, LABELS)) < 1e-12
        assert relative_error(parts.logits(x, SIGMA, LABELS.flip(0)), logits) > 1e-3  # the condition matters


@PLACES
@pytest.mark.parametrize("adversarial", [True, False])
def test_nothing_that_compare_gives_has_a_graph_and_nothing_is_left_behind(place: str, adversarial: bool) -> None:
    parts = Parts(place)
    parts.heads.heads[0].requires_grad_(False)
    flags = [p.requires_grad for p in parts.parameters()]
    assert len(set(flags)) == 2
    x = normal(3, 1, 8, 8).requires_grad_()
    found = parts.adversary.compare(parts.fake, parts.teacher, x, SIGMA, LABELS, adversarial)
    assert not any(value.requires_grad for value in found if value is not None)
    assert x.is_leaf
    assert x.grad is None
    for module in (parts.fake, parts.teacher, parts.heads):
        assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in parts.parameters()] == flags
    assert not any(p.requires_grad for p in parts.teacher.parameters())
    assert torch.is_grad_enabled()


@PLACES
@pytest.mark.parametrize("adversarial", [True, False])
def test_compare_needs_no_pass_of_its_own(place: str, adversarial: bool) -> None:
    """One forward of each network; no graph but through the encoder that is read, whose blocks run once more for it."""
    parts, graphs = Parts(place), set()
    ran: list[tuple[str, int]] = []
    calls: list[tuple[str, str]] = []
    back: list[tuple[str, str]] = []
    layers = ("down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv1", "conv_out")
    for name, denoiser in (("fake", parts.fake), ("teacher", parts.teacher)):
        network = denoiser.network
        network.register_forward_hook(lambda m, args, out, name=name: ran.append((name, len(args[0]))))
        for part in layers:
            layer, key = network.get_submodule(part), (name, part)
            layer.register_full_backward_hook(lambda m, a, b, key=key: back.append(key))
            layer.register_forward_hook(lambda m, a, out, key=key: calls.append(key))
            layer.register_forward_hook(lambda m, a, out, key=key: graphs.add(key) if out.requires_grad else None)
    parts.adversary.compare(parts.fake, parts.teacher, normal(3, 1, 8, 8), SIGMA, LABELS, adversarial)
    assert sorted(ran) == [("fake", 3), ("teacher", 3)]
    read = [(place, layers[0])] if adversarial else []
    assert sorted(calls) == sorted([(name, part) for name in ("fake", "teacher") for part in layers] + read)
    assert graphs == set(read)
    assert back == read


class Saved:
    """A tensor kept for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept() -> Iterator[weakref.WeakSet[Saved]]:
    """What the graphs that are built inside keep, as long as they keep it."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


def checkpointable(parts: Parts, able: bool) -> None:
    parts.network.network._supports_gradient_checkpointing = able


@PLACES
def test_the_graph_and_the_features_of_compare_are_gone_before_the_decoder_runs(place: str) -> None:
    most = {}
    for able in (True, False):
        parts, at_heads, at_decoder = Parts(place), [], []
        checkpointable(parts, able)
        features: list[weakref.ref[Tensor]] = []
        with kept() as alive:

            def at_the_heads(
                module: nn.Module, args: Any, at: Any = at_heads, refs: Any = features, alive: Any = alive
            ) -> None:
                at.append(len(alive))
                refs.extend(weakref.ref(f) for f in args[0])

            parts.heads.register_forward_pre_hook(at_the_heads)
            first = parts.network.network.up_blocks[0]
            first.register_forward_pre_hook(lambda *_, at=at_decoder, alive=alive: at.append(len(alive)))
            found = parts.adversary.compare(parts.fake, parts.teacher, normal(3, 1, 8, 8), SIGMA, LABELS, True)
            assert at_decoder == [0]
            assert not alive
        assert len(features) == 2
        assert all(ref() is None for ref in features)
        assert found.pull is not None
        (most[able],) = at_heads
    assert 0 < most[True] < 0.7 * most[False]  # diffusers keeps what attention keeps


@PLACES
@pytest.mark.parametrize(("r1", "exact"), [(0.0, True), (0.5, True), (0.5, False)])
def test_no_graph_of_one_loss_is_alive_when_the_next_is_computed(place: str, r1: float, exact: bool) -> None:
    parts = Parts(place, weight=0.3, r1=r1, r1_exact=exact)
    seen: list[int] = []
    features: list[weakref.ref[Tensor]] = []
    parts.heads.register_forward_pre_hook(lambda m, args: features.extend(weakref.ref(f) for f in args[0]))
    with kept() as alive:

        def denoising() -> Tensor:
            seen.append(len(alive))
            assert len(features) == 2
            assert all(ref() is None for ref in features)
            return parts.denoising()()

        for loss in parts.adversary.learn(denoising, parts.x0(), SIGMA, LABELS, SampleNoise(7, range(3)), {}):
            assert len(alive) > 0
            loss.backward()
        assert seen == [0]
        assert not alive


class Mishap(Exception):
    pass


@PLACES
@pytest.mark.parametrize("already", [True, False])
@pytest.mark.parametrize("where", [None, "down_blocks.1", "conv_out"])
def test_gradient_checkpointing_is_left_as_it_was(place: str, already: bool, where: str | None) -> None:
    """As well where the network fails, in the graph or after it; on only while the encoder that is read runs."""
    parts = Parts(place)
    network, seen = parts.network.network, []
    if already:
        network.enable_gradient_checkpointing()
    flags = {name: getattr(m, "gradient_checkpointing", None) for name, m in network.named_modules()}
    network.down_blocks[0].register_forward_pre_hook(lambda *_: seen.append(network.is_gradient_checkpointing))

    def fail(*_: Any) -> None:
        raise Mishap

    x = normal(3, 1, 8, 8)
    arguments = parts.fake, parts.teacher, x, SIGMA, LABELS
    if where is None:
        found = parts.adversary.compare(*arguments, adversarial=True)
        parts.adversary.compare(*arguments, adversarial=False)
        assert seen == [True, already]
    else:
        handle = network.get_submodule(where).register_forward_pre_hook(fail)
        with pytest.raises(Mishap):
            parts.adversary.compare(*arguments, adversarial=True)
        handle.remove()
    assert {name: getattr(m, "gradient_checkpointing", None) for name, m in network.named_modules()} == flags
    assert all(p.requires_grad for p in parts.parameters())
    assert torch.is_grad_enabled()
    network.disable_gradient_checkpointing()
    if where is None:
        assert relative_error(found.pull, pull_of_a_whole_pass(parts, x)) < 1e-10


@pytest.mark.parametrize("already", [True, False])
@pytest.mark.parametrize("levels", [None, [0], [3], [0, 1, 2, 3]], ids=str)
def test_blocks_that_run_again_for_the_pull_do_not_confuse_the_tap(levels: list[int] | None, already: bool) -> None:
    """A transformer checkpoints whole blocks: the tapped ones run again, and the heads run inside the last one."""
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=4,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    opinionated(network.double().eval())
    denoiser = denoiser_from(network, teacher_scheduler(SIGMA_DATA, SIGMA_MIN, SIGMA_MAX))
    x, tap = normal(3, 2, 8, 8), Tap(network, levels)
    with torch.no_grad():
        heads = opinionated(Discriminator(tap.encode(lambda: denoiser(x, SIGMA, LABELS)))).double()
    adversary = FakeHeads(network=denoiser, tap=tap, heads=heads, train_heads=heads, reals=Parts.reals)
    moved = x.clone().requires_grad_()
    with tap.record() as features:
        prediction = denoiser(moved, SIGMA, LABELS)
    logits = heads(features)
    (expected,) = torch.autograd.grad(softplus(-logits).mean(1).sum(), moved)

    if already:
        network.enable_gradient_checkpointing()
    ran: list[int] = []
    for k, block in enumerate(network.transformer_blocks):
        block.register_forward_hook(lambda m, args, out, k=k: ran.append(k))
    found = adversary.compare(denoiser, denoiser, x, SIGMA, LABELS, adversarial=True)
    assert set(ran) == {0, 1, 2, 3}
    assert relative_error(found.pull, expected) < 1e-10
    assert relative_error(found.logits, logits.detach()) < 1e-12
    assert relative_error(found.denoised_fake, prediction.detach()) < 1e-12
    assert network.is_gradient_checkpointing == already


def expected_loss(parts: Parts, place: str, weight: float, r1: float, exact: bool) -> Tensor:
    """What a step of the fake score minimises, from separate passes and the same random numbers."""
    noise, shape = SampleNoise(7, range(3)), (1, 8, 8)
    fake_loss = parts.denoising()().mean()
    sigma = SIGMA
    x = parts.x0() + expand(sigma, parts.x0()) * normal(3, 1, 8, 8, seed=5)
    if place == "teacher":
        sigma = parts.level(noise.uniform())
        x = parts.x0() + expand(sigma, x) * noise.normal(shape, torch.float64)
    x0 = parts.reals(noise, LABELS)
    real = (x0 + expand(sigma, x) * noise.normal(shape, torch.float64)).requires_grad_()
    logits = parts.logits(real, sigma)
    loss = (softplus(parts.logits(x, sigma)) + softplus(-logits)).mean()
    if r1 and exact:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            mean = parts.logits(real, sigma).mean(1).sum()
        (slope,) = torch.autograd.grad(mean, real, create_graph=True)
        loss = loss + r1 / 2 * slope.square().sum((1, 2, 3)).mean()
    elif r1:
        moved = parts.logits(real + DIFFERENCE * noise.normal(shape, torch.float64), sigma)
        loss = loss + r1 / 2 * ((moved.mean(1) - logits.mean(1)) / DIFFERENCE).square().mean()
    return fake_loss + weight * loss


@PLACES
@pytest.mark.parametrize(("r1", "exact"), [(0.0, True), (0.5, True), (0.5, False)])
def test_learn_equals_separate_passes_in_value_and_gradient(place: str, r1: float, exact: bool) -> None:
    """Through attention, whose fused kernels have no second derivative."""
    parts = Parts(place, weight=0.3, r1=r1, r1_exact=exact)
    loss, gradients, _ = parts.learn()
    expected = expected_loss(parts, place, 0.3, r1, exact)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    agree(gradients, parts.gradients(expected))


@PLACES
@pytest.mark.parametrize("exact", [True, False])
def test_the_metrics_with_r1_are_the_terms_without_their_weights(place: str, exact: bool) -> None:
    the_metrics_add_up(place, 0.5, exact)


@PLACES
def test_the_metrics_are_the_terms_without_their_weights(place: str) -> None:
    the_metrics_add_up(place, 0.0, True)


def the_metrics_add_up(place: str, r1: float, exact: bool) -> None:
    loss, _, metrics = Parts(place, weight=0.3, r1=r1, r1_exact=exact).learn()
    names = ["discriminator_loss", "fake_loss", *(["gradient_penalty"] if r1 else [])]
    assert sorted(metrics) == names
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    total = metrics["fake_loss"] + 0.3 * (metrics["discriminator_loss"] + r1 / 2 * metrics.get("gradient_penalty", 0))
    assert total.item() == pytest.approx(loss, rel=1e-12)


@PLACES
@pytest.mark.parametrize(("r1", "exact"), [(0.0, True), (0.5, True), (0.5, False)])
def test_the_discriminator_trains_what_its_place_says(place: str, r1: float, exact: bool) -> None:
    """On the teacher: the heads alone; the fake score gets its denoising loss only. On the fake: its encoder too."""
    parts = Parts(place, weight=0.3, r1=r1, r1_exact=exact)
    _, gradients, _ = parts.learn()
    alone = parts.gradients(parts.denoising()().mean())
    added = [g - a for g, a in zip(gradients, alone, strict=True)]
    names = [name for name, _ in parts.fake.network.named_parameters()]
    of = {name: float(g.abs().max()) for name, g in zip(names, added[: len(names)], strict=True)}
    assert max(float(g.abs().max()) for g in added[len(names) :]) > 1e-3
    encoder = max(value for name, value in of.items() if name.startswith(("conv_in", "down_blocks", "mid_block")))
    decoder = max(value for name, value in of.items() if name.startswith(("up_blocks", "conv_norm_out", "conv_out")))
    assert decoder < 1e-12
    assert encoder > 1e-3 if place == "fake" else encoder < 1e-12
    assert all(p.grad is None for p in parts.teacher.parameters())


def test_heads_that_know_nothing_still_learn() -> None:
    """They start at 0, where only their last layers have a gradient: that of fair logistic regression."""
    parts = Parts("teacher")
    fresh = Discriminator([torch.zeros(1, 8, 8, 8), torch.zeros(1, 16, 4, 4)]).double()
    parts.adversary.heads = parts.adversary.train_heads = parts.heads = fresh
    _, gradients, metrics = parts.learn()
    assert metrics["discriminator_loss"].item() == pytest.approx(2 * math.log(2), rel=1e-12)
    of = dict(zip(parts.parameters(), gradients, strict=True))
    for head in fresh.heads:
        assert bool(of[head.layers[-1].weight].any())
        assert not any(bool(of[p].any()) for layer in head.layers[:-1] for p in layer.parameters())


def test_without_a_discriminator_the_fake_score_learns_to_denoise() -> None:
    parts, adversary = Parts("fake"), ScoreOnly()
    metrics: dict[str, Tensor] = {}
    noise = SampleNoise(7, range(3))
    (loss,) = adversary.learn(parts.denoising(), parts.x0(), SIGMA, LABELS, noise, metrics)
    expected = parts.denoising()().mean()
    assert torch.equal(loss, expected)
    agree(parts.gradients(loss), parts.gradients(expected), 1e-12)
    assert list(metrics) == ["fake_loss"]
    assert torch.equal(metrics["fake_loss"], expected.detach())
    x = parts.x0().requires_grad_()
    found = adversary.compare(parts.fake, parts.teacher, x, SIGMA, LABELS)
    assert found.logits is None
    assert found.pull is None
    assert not found.denoised_fake.requires_grad
    assert torch.equal(found.denoised_fake, parts.fake(x, SIGMA, LABELS))
    assert torch.equal(found.denoised_target, parts.teacher(x, SIGMA, LABELS))


# The ratio

LEVELS = (0.3, 1.0, 2.0)


P = two_modes()
Q = GaussianMixture(torch.ones(1), torch.tensor([[-0.7]]), torch.tensor([1.5]))


def trained_heads(
    place: str, seed: int, start: GaussianMixture | None = None, steps: int = 400, batch: int = 256
) -> tuple[TeacherHeads | FakeHeads, NetworkDenoiser]:
    """Heads trained to tell P from Q (and `start`, of a bridge, from Q), and the network that they read.

    Its features are those of a random toy network, frozen for the teacher's place.
    """
    torch.manual_seed(seed)
    network: NetworkDenoiser = networks(P, Toy(hidden=64, layers=4))[1]
    tap = Tap(network.network)
    with torch.no_grad():
        examples = tap.encode(lambda: network(torch.zeros(1, 1), torch.ones(1)))
    heads = Discriminator(examples, ratios=1 if start is None else 2)
    shared: dict[str, Any] = {"network": network, "tap": tap, "heads": heads, "train_heads": heads}
    shared |= {"reals": RealMixture(P), "starts": None if start is None else RealMixture(start)}

    def level(u: Tensor) -> Tensor:
        return 0.15 * (4 / 0.15) ** u

    adversary = TeacherHeads(**shared, level=level) if place == "teacher" else FakeHeads(**shared)
    if place == "teacher":
        network.requires_grad_(False)
    trained = [*heads.parameters(), *(network.parameters() if place == "fake" else ())]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99))
    noise, students = SampleNoise(seed, range(batch)), RealMixture(Q)
    for n in range(steps):
        x0, sigma = students(noise, None), level(noise.uniform()).float()
        eps = noise.normal((1,))
        denoising: Callable[[], Tensor] = partial(torch.zeros, 1, requires_grad=True)
        if place == "fake":
            denoising = partial(denoising_loss, network, x0, sigma, eps)
        optimizer.zero_grad()
        for loss in adversary.learn(denoising, x0, sigma, None, noise, {}):
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - n / steps)
        optimizer.step()
    return adversary, network


def correlation_and_slope(estimate: Tensor, exact: Tensor) -> tuple[float, float]:
    correlation = float(torch.corrcoef(torch.stack([estimate, exact.to(estimate)]))[0, 1])
    return correlation, correlation * float(estimate.std() / exact.std())


def learned_ratio(place: str, seed: int) -> list[tuple[float, float]]:
    """The correlation and the slope of the heads' ln r at three levels, at points half from either mixture.

    Seeds 0, 1, 2 gave correlations of .966 to .998 and slopes of .86 to 1.08.
    """
    adversary, network = trained_heads(place, seed)
    found = []
    generator = torch.Generator().manual_seed(0)
    for sigma in LEVELS:
        x = torch.cat([m.sample(2000, sigma, generator) for m in (P, Q)])
        level = torch.full((len(x),), sigma)
        logits = adversary.compare(network, network, x, level, None, adversarial=False).logits
        assert logits is not None
        exact = P.log_density(x, sigma) - Q.log_density(x, sigma)
        found.append(correlation_and_slope(log_ratio(logits), exact))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", ["teacher", "fake"])
def test_trained_heads_know_the_ratio_of_two_mixtures(place: str) -> None:
    for correlation, slope in learned_ratio(place, seed=0):
        assert correlation > 0.93
        assert 0.75 < slope < 1.25
