"""Taps on real diffusers networks: what is read is checked with hooks of the test's own, placed elsewhere.

A down block's deepest state before it is halved is what goes into its downsampler; the image's tokens after a block
are what goes into the next one as `hidden_states`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor, nn

from distill.discriminator import frozen
from distill.export import teacher_scheduler
from distill.taps import Tap
from distill.toy import ToyNetwork
from samplers import Guided, denoiser_from
from tests.distill.tiny import unet
from tests.truth import relative_error

BATCH, TEXT = 2, 6


@dataclass
class Case:
    """A network and its inputs, all float64 with weights that do not train.

    sources: where the features of each level are found, by the name of a module: ("out", name) is what comes out of
    it, ("in", name) the states that go into it. shapes: of those features. last: the module that runs last of what
    the default levels need. after: modules that run later.
    """

    network: nn.Module
    x: Tensor
    cond: dict[str, Any]
    sources: list[tuple[Literal["in", "out"], str]]
    shapes: list[tuple[int, ...]]
    after: tuple[str, ...]
    default: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network.double().eval().requires_grad_(False)
        self.default = self.default or list(range(len(self.sources)))

    def __call__(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return self.network(x, timestep=torch.tensor([5.0, 40.0]), return_dict=False, **self.cond)[0]

    def found(self, x: Tensor | None = None) -> list[Tensor]:
        """The features of all levels, from a whole pass, by hooks at `sources`."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            kept[name] = value

        handles = []
        for kind, name in self.sources:
            module = self.network.get_submodule(name)
            if kind == "out":
                handles.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, out)))
            else:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: keep(name, kwargs.get("hidden_states", (*args, None)[0])),
                        with_kwargs=True,
                    )
                )
        self(x)
        for handle in handles:
            handle.remove()
        states = [kept[name] for _, name in self.sources]
        return [state.transpose(1, 2) if state.ndim == 3 else state for state in states]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(width: int = 12, length: int = TEXT) -> Tensor:
    return normal(BATCH, length, width, seed=1)


MAPS = [(8, 16, 16), (16, 8, 8), (16, 4, 4)]
DOWN: list[tuple[Literal["in", "out"], str]] = [
    ("in", "down_blocks.0.downsamplers.0"),
    ("in", "down_blocks.1.downsamplers.0"),
    ("out", "mid_block"),
]
DECODER = ("up_blocks", "conv_norm_out", "conv_out")


def unet_2d() -> Case:
    network = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return Case(network, normal(BATCH, 3, 16, 16), {}, DOWN, MAPS, DECODER)


def unet_2d_without_middle() -> Case:
    """The published form of resolution changes inside residual blocks; the last level is the last down block."""
    network = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type=None,
    )
    sources = [DOWN[0], ("out", "down_blocks.1.resnets.0")]
    return Case(network, normal(BATCH, 3, 16, 16), {}, sources, [(8, 16, 16), (16, 8, 8)], DECODER)


def unet_2d_with_skips() -> Case:
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    sources: list[tuple[Literal["in", "out"], str]] = [("in", "down_blocks.0.resnet_down"), ("out", "mid_block")]
    return Case(network, normal(BATCH, 3, 8, 8), {}, sources, [(32, 8, 8), (32, 4, 4)], DECODER)


def unet_2d_condition() -> Case:
    network = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    cond = {"encoder_hidden_states": text()}
    return Case(network, normal(BATCH, 4, 16, 16), cond, [DOWN[0], DOWN[2]], MAPS[:2], DECODER)


def blocks(first: int, last: int, name: str = "transformer_blocks") -> list[tuple[Literal["in", "out"], str]]:
    """The tokens after blocks first .. last - 1: what goes into the next."""
    return [("in", f"{name}.{k + 1}") for k in range(first, last)]


def later(first: int, last: int, name: str = "transformer_blocks") -> tuple[str, ...]:
    return tuple(f"{name}.{k}" for k in range(first, last))


def dit() -> Case:
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        sample_size=8,
        num_embeds_ada_norm=10,
        dropout=0.0,
    )
    cond = {"class_labels": torch.tensor([1, 2])}
    shapes = [(16, 16)] * 4
    return Case(network, normal(BATCH, 4, 8, 8), cond, blocks(0, 4), shapes, (*later(3, 5), "proj_out_2"), [1, 2])


def pixart() -> Case:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    cond = {"encoder_hidden_states": text(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    after = (*later(2, 3), "proj_out")
    return Case(network, normal(BATCH, 4, 8, 8), cond, blocks(0, 2), [(16, 16)] * 2, after, [0, 1])


def sana() -> Case:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )
    cond = {"encoder_hidden_states": text()}
    after = (*later(2, 3), "proj_out")
    return Case(network, normal(BATCH, 4, 8, 8), cond, blocks(0, 2), [(16, 64)] * 2, after, [0, 1])


def sd3(length: int = TEXT) -> Case:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    cond = {"encoder_hidden_states": text(length=length), "pooled_projections": normal(BATCH, 8, seed=2)}
    after = (*later(2, 4), "proj_out")
    return Case(network, normal(BATCH, 4, 8, 8), cond, blocks(0, 3), [(16, 16)] * 3, after, [0, 1])


def flux(length: int = TEXT) -> Case:
    network = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    cond = {
        "encoder_hidden_states": text(length=length),
        "pooled_projections": normal(BATCH, 8, seed=2),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(length, 3),
    }
    single = "single_transformer_blocks"
    sources = [*blocks(0, 1), ("in", f"{single}.0"), *blocks(0, 2, single)]
    after = (*later(1, 3, single), "proj_out")
    return Case(network, normal(BATCH, 16, 4), cond, sources, [(16, 16)] * 4, after, [1, 2])


def qwen_image() -> Case:
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    cond = {
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }
    after = (*later(2, 3), "proj_out")
    return Case(network, normal(BATCH, 16, 4), cond, blocks(0, 2), [(16, 16)] * 2, after, [0, 1])


def cogview4(length: int = TEXT) -> Case:
    """Its blocks return the image first, those of SD3 and Flux the text."""
    network = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    size = torch.full((BATCH, 2), 64.0, dtype=torch.float64)
    cond = {
        "encoder_hidden_states": text(length=length),
        "original_size": size,
        "target_size": size,
        "crop_coords": 0 * size,
    }
    after = (*later(2, 3), "proj_out")
    return Case(network, normal(BATCH, 4, 8, 8), cond, blocks(0, 2), [(16, 16)] * 2, after, [0, 1])


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        unet_2d,
        unet_2d_without_middle,
        unet_2d_with_skips,
        unet_2d_condition,
        dit,
        pixart,
        sana,
        sd3,
        flux,
        qwen_image,
        cogview4,
    )
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def runs(network: nn.Module, call: Callable[[], object]) -> list[str]:
    """The names of the modules that a call runs, in order."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: names.append(name))
        for name, module in network.named_modules()
    ]
    call()
    for handle in handles:
        handle.remove()
    return names


def equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_the_features_are_what_the_next_layer_sees(case: Case) -> None:
    """Every level, read from a whole pass and from one that is left early, against hooks placed elsewhere."""
    tap = Tap(case.network, range(len(case.sources)))
    expected = case.found()
    with tap.record() as features:
        output = case()
    encoded = tap.encode(case)
    assert [tuple(f.shape) for f in features] == [(BATCH, *shape) for shape in case.shapes]
    equal(features, expected)
    equal(encoded, expected)
    assert torch.equal(output, case())
    assert all(relative_error(a[:1], a[1:]) > 1e-3 for a in features)  # the samples differ at all


def test_unless_told_a_tap_reads_the_default_levels(case: Case) -> None:
    tap = Tap(case.network)
    assert len(tap) == len(case.default)
    equal(tap.encode(case), [case.found()[level] for level in case.default])


def test_what_is_decided_after_the_last_layer_is_never_run(case: Case) -> None:
    tap = Tap(case.network)
    whole, encoded = runs(case.network, case), runs(case.network, lambda: tap.encode(case))
    assert whole[: len(encoded)] == encoded
    for name in case.after:
        assert any(ran.startswith(name) for ran in whole)
        assert not any(ran.startswith(name) for ran in encoded)


def saved(call: Callable[[], object]) -> int:
    """How many tensors a call keeps for its backward pass."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return count


def nothing(features: list[Tensor]) -> None:
    """The graph ends; nobody looks."""


def pull(features: list[Tensor]) -> Tensor:
    return sum((f * normal(*f.shape, seed=3)).sum() for f in features)


def test_the_graph_ends_at_the_last_layer_and_gives_the_gradients_of_the_whole(case: Case) -> None:
    tap, x = Tap(case.network), case.x.clone().requires_grad_()
    with tap.record() as features:
        output = case(x)
        assert output.requires_grad
    (expected,) = torch.autograd.grad(pull(features), x)

    found: list[Tensor] = []

    def end(features: list[Tensor]) -> None:
        assert all(f.requires_grad for f in features)
        found.extend(torch.autograd.grad(pull(features), x))

    with tap.record(end=end) as features:
        ended = case(x)
        assert not ended.requires_grad
        assert not features
    assert torch.is_grad_enabled()
    assert torch.equal(ended, output)
    assert float(expected.abs().max()) > 0
    assert relative_error(found[0], expected) < 1e-12

    (gradient,) = torch.autograd.grad(pull(tap.encode(lambda: case(x))), x)
    assert relative_error(gradient, expected) < 1e-12


def test_the_graph_that_ends_keeps_no_more_than_a_call_that_ends(case: Case) -> None:
    tap, x = Tap(case.network), case.x.clone().requires_grad_()

    def recorded() -> None:
        with tap.record(end=nothing):
            case(x)

    encoded = saved(lambda: tap.encode(lambda: case(x)))
    assert saved(recorded) == encoded
    assert 0 < encoded < saved(lambda: case(x))


def test_a_frozen_network_gets_no_gradient_from_its_features(case: Case) -> None:
    case.network.requires_grad_(True)
    tap, x = Tap(case.network), case.x.clone().requires_grad_()
    with frozen(case.network), tap.record(end=lambda features: pull(features).backward()):
        case(x)
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None and p.requires_grad for p in case.network.parameters())
    pull(tap.encode(case)).backward()
    assert any(p.grad is not None for p in case.network.parameters())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", [None, "function", "call"])
def test_modes_and_hooks_are_left_as_they_were(kind: Literal["function", "call"] | None, mode: bool) -> None:
    torch.manual_seed(0)
    case = unet_2d()
    tap, x = Tap(case.network), case.x.clone().requires_grad_()
    given: list[Tensor] = []
    with torch.set_grad_enabled(mode):
        reached = False
        with tap.record(end=given.extend if kind == "function" else kind) as features:
            assert hooks(case.network) == len(tap)
            case(x)
            reached = True
            assert torch.is_grad_enabled() == (mode and kind != "function")
        assert reached == (kind != "call")
        assert torch.is_grad_enabled() == mode
        assert hooks(case.network) == 0
        assert len(given) + len(features) == len(tap)
        assert bool(given) == (kind == "function")
        assert all(f.requires_grad == mode for f in [*given, *features])


class Mishap(Exception):
    pass


@pytest.mark.parametrize("where", ["down_blocks.1", "conv_out"])
@pytest.mark.parametrize("end", [None, nothing])
def test_an_error_inside_is_passed_on_and_leaves_nothing_behind(
    end: Callable[[list[Tensor]], None] | None, where: str
) -> None:
    torch.manual_seed(0)
    case = unet_2d()
    tap = Tap(case.network)

    def fail(*_: Any) -> None:
        raise Mishap

    handle = case.network.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(Mishap), tap.record(end=end):
        case()
    handle.remove()
    assert torch.is_grad_enabled()
    assert hooks(case.network) == 0
    equal(tap.encode(case), case.found())  # and it can be used again

    with pytest.raises(Mishap):
        tap.encode(lambda: fail())
    assert hooks(case.network) == 0

    with pytest.raises(Mishap), tap.record(end=fail):
        case()
    assert torch.is_grad_enabled()
    assert hooks(case.network) == 0


def test_a_guided_pass_has_the_conditional_rows_first() -> None:
    network = unet(10, channels=(8, 16)).double().requires_grad_(False)
    denoiser, tap = denoiser_from(network, teacher_scheduler(0.75, 0.01, 20.0)), Tap(network)
    x, sigma, labels = normal(3, 1, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([1, 4, 7])
    with torch.no_grad():
        both: list[Tensor] = []
        with tap.record(end=both.extend):
            Guided(denoiser, 2.0, 10)(x, sigma, labels)
        conditional = tap.encode(lambda: denoiser(x, sigma, labels))
        unconditional = tap.encode(lambda: denoiser(x, sigma, torch.tensor([10, 10, 10])))
    for twice, with_label, without in zip(both, conditional, unconditional, strict=True):
        assert len(twice) == 6
        assert relative_error(twice[:3], with_label) < 1e-12
        assert relative_error(twice[3:], without) < 1e-12
        assert relative_error(with_label, without) > 1e-3


@pytest.mark.parametrize("build", [sd3, flux])
def test_text_of_the_length_of_the_image_is_told_apart(build: Callable[[int], Case]) -> None:
    torch.manual_seed(0)
    case = build(16)
    equal(Tap(case.network).encode(case), [case.found()[level] for level in case.default])


def test_the_toys_layers_are_vectors() -> None:
    torch.manual_seed(0)
    network = ToyNetwork(2, 16, 4)
    x, time = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(5)
    tap = Tap(network, [-1])
    (last,) = tap.encode(lambda: network(x, time))
    assert last.shape == (5, 16)
    nn.init.eye_(network.leave.weight)
    torch.testing.assert_close(network(x, time)[0], last[:, :2])
    assert [f.shape for f in Tap(network).encode(lambda: network(x, time))] == [(5, 16), (5, 16)]


@pytest.mark.parametrize(
    ("down", "up", "middle", "length", "shapes"),
    [
        (
            ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            ("AttnUpBlock1D", "UpBlock1DNoSkip"),
            None,
            32,
            [(2, 32, 32), (2, 32, 16)],
        ),
        (
            ("DownResnetBlock1D", "DownResnetBlock1D"),
            ("UpResnetBlock1D",),
            "MidResTemporalBlock1D",
            16,
            [(2, 32, 8), (2, 32, 8)],
        ),
    ],
)
def test_signals_are_read_as_the_blocks_leave_them(
    down: tuple[str, ...], up: tuple[str, ...], middle: str | None, length: int, shapes: list[tuple[int, ...]]
) -> None:
    """UNet1DModel: features [B, C, L]. Its blocks return no state from before their halving."""
    torch.manual_seed(0)
    options: dict[str, Any] = (
        {"extra_in_channels": 64, "sample_rate": 16}
        if middle is None
        else {
            "mid_block_type": middle,
            "out_block_type": "OutConv1DBlock",
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "act_fn": "mish",
        }
    )
    network = diffusers.UNet1DModel(
        sample_size=length, block_out_channels=(32, 32), down_block_types=down, up_block_types=up, **options
    )
    network.eval().requires_grad_(False)
    found: list[Tensor] = []
    network.down_blocks[0].register_forward_hook(lambda m, args, out: found.append(out[0]))
    network.mid_block.register_forward_hook(lambda m, args, out: found.append(out))
    x = normal(2, 2, length).float()
    features = Tap(network).encode(lambda: network(x, torch.tensor([1.0, 2.0])))
    assert [tuple(f.shape) for f in features] == shapes
    network(x, torch.tensor([1.0, 2.0]))
    equal(features, found[-2:])


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 28])
def test_a_transformer_is_read_at_a_quarter_and_a_half_of_its_depth(depth: int) -> None:
    network = ToyNetwork(2, 4, depth)
    chosen: list[int] = []
    for k, block in enumerate(network.blocks):
        block.register_forward_hook(lambda m, args, out, k=k: chosen.append(k))
    Tap(network).encode(lambda: network(torch.zeros(1, 2), torch.zeros(1)))
    levels = {1: [0], 2: [0], 4: [0, 1], 12: [2, 5], 28: [6, 13]}[depth]
    assert len(Tap(network)) == len(levels)
    assert chosen == list(range(levels[-1] + 1))


def test_levels_are_sorted_counted_from_either_end_and_read_once() -> None:
    torch.manual_seed(0)
    case = dit()
    found = case.found()
    equal(Tap(case.network, [3, 0, -2, -5]).encode(case), [found[0], found[3]])
    assert len(Tap(case.network, range(5))) == 5


@pytest.mark.parametrize("levels", [[], [3], [-4], [0, 7]])
def test_levels_that_do_not_exist_are_refused(levels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"levels: .*UNet2DModel .*0 \.\. 2 \(or -3 \.\. -1\)"):
        Tap(unet_2d().network, levels)


@pytest.mark.parametrize(
    "network",
    [
        nn.Linear(2, 2),
        diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        nn.ModuleDict({"down_blocks": nn.ModuleList(), "blocks": nn.ModuleList()}),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_network_of_neither_form_is_refused_by_name(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"a {type(network).__name__} has no layers that are known here"):
        Tap(network)


def upscaler(layers: int) -> Case:
    """The latent upscaler's blocks return their states without the halved one."""
    down, up = "KCrossAttnDownBlock2D", "KCrossAttnUpBlock2D"
    network = diffusers.UNet2DConditionModel(
        in_channels=8,
        out_channels=5,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=layers,
        norm_num_groups=None,
        down_block_types=("KDownBlock2D", down, down, down),
        up_block_types=(up, up, up, "KUpBlock2D"),
        mid_block_type=None,
        attention_head_dim=8,
        cross_attention_dim=12,
        only_cross_attention=False,
        act_fn="gelu",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        resnet_time_scale_shift="scale_shift",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )
    sources: list[tuple[Literal["in", "out"], str]] = [("in", f"down_blocks.{k}.downsamplers.0") for k in range(3)]
    sources += [("out", f"down_blocks.3.attentions.{layers - 1}")]
    shapes = [(32, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2)]
    return Case(network, normal(BATCH, 8, 16, 16), {"encoder_hidden_states": text()}, sources, shapes, DECODER)


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_that_keep_their_halved_state_to_themselves(layers: int) -> None:
    torch.manual_seed(0)
    case = upscaler(layers)
    equal(Tap(case.network).encode(case), case.found())


def test_text_of_the_length_of_the_image_is_told_apart_where_the_image_comes_first() -> None:
    torch.manual_seed(0)
    case = cogview4(16)
    equal(Tap(case.network).encode(case), case.found())


def test_the_tokens_of_a_block_that_carries_text_as_well_are_the_images() -> None:
    torch.manual_seed(0)
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    case = Case(network, normal(BATCH, 4, 8, 8), {"encoder_hidden_states": text()}, [], [], (), [1])
    assert [f.shape[2] for f in Tap(network, range(4)).encode(case)] == [16] * 4


def test_a_unet_whose_down_blocks_are_no_blocks_is_refused() -> None:
    network = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=8,
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=8,
        switch_level=(False,),
    )
    x, level, pooled = normal(2, 4, 16, 16).float(), torch.tensor([0.1, 0.2]), normal(2, 1, 8).float()
    with pytest.raises(ValueError, match="StableCascadeUNet"):
        Tap(network).encode(lambda: network(x, level, pooled))
