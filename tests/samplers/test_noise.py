import math

import pytest
import torch

from samplers import SampleNoise, normal_like


def draws(noise: SampleNoise) -> list[torch.Tensor]:
    return [
        noise.normal((3, 2)),
        noise.uniform(),
        noise.normal((5,), torch.float64),
        noise.integers(1000),
        noise.normal((2,), torch.bfloat16),
    ]


def test_a_sample_has_the_same_noise_alone_in_a_batch_and_in_another_order() -> None:
    batch = draws(SampleNoise(7, range(6)))
    alone = draws(SampleNoise(7, [4]))
    shuffled = draws(SampleNoise(7, [5, 4, 0]))
    for in_batch, by_itself, reordered in zip(batch, alone, shuffled, strict=True):
        assert torch.equal(in_batch[4:5], by_itself)
        assert torch.equal(in_batch[[5, 4, 0]], reordered)


def test_the_same_seed_repeats_and_another_seed_or_sample_or_draw_does_not() -> None:
    noise = SampleNoise(7, [4])
    first, second = noise.normal((8,)), noise.normal((8,))
    assert torch.equal(first, SampleNoise(7, [4]).normal((8,)))
    for other in (second, SampleNoise(8, [4]).normal((8,)), SampleNoise(7, [5]).normal((8,))):
        assert not torch.isclose(first, other).any()
    assert not torch.isclose(SampleNoise(4, [7]).normal((8,)), first).any()  # (seed, sample) is not (sample, seed)


def test_the_largest_seed_and_index_are_accepted() -> None:
    assert SampleNoise(2**64 - 1, [2**64 - 1]).normal((4,)).isfinite().all()


def test_draws_have_the_documented_shapes_and_types() -> None:
    normal, uniform, double, integers, low = draws(SampleNoise(0, range(6)))
    assert (normal.shape, normal.dtype) == ((6, 3, 2), torch.float32)
    assert (uniform.shape, uniform.dtype) == ((6,), torch.float64)
    assert (double.shape, double.dtype) == ((6, 5), torch.float64)
    assert (integers.shape, integers.dtype) == ((6,), torch.int64)
    assert (low.shape, low.dtype) == ((6, 2), torch.bfloat16)
    assert SampleNoise(0, []).integers(3).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_have_the_moments_of_a_normal(dtype) -> None:
    x = SampleNoise(3, range(200)).normal((1000,), dtype).double()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n), power


def test_streams_of_neighbouring_samples_seeds_and_draws_are_uncorrelated() -> None:
    n = 4000
    noise, other = SampleNoise(3, range(12)), SampleNoise(4, range(12))
    rows = torch.cat([noise.normal((n,)), noise.normal((n,)), other.normal((n,))])
    correlation = (rows @ rows.T / n).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)


def test_uniform_and_whole_numbers_fill_their_range_evenly() -> None:
    noise, n = SampleNoise(5, range(20_000)), 20_000
    uniform, integers = noise.uniform(), noise.integers(4)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = integers.bincount(minlength=4)
    assert counts.numel() == 4
    assert float((counts - n / 4).abs().max()) < 5 * math.sqrt(n * 3 / 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_like_takes_every_kind_of_generator(dtype) -> None:
    x = torch.zeros((3, 2, 4), dtype=dtype)
    torch.manual_seed(1)
    unseeded = normal_like(x, None)
    torch.manual_seed(1)
    assert torch.equal(unseeded, torch.randn_like(x))
    expected = torch.randn((3, 2, 4), generator=torch.Generator().manual_seed(2), dtype=dtype)
    assert torch.equal(normal_like(x, torch.Generator().manual_seed(2)), expected)
    assert torch.equal(normal_like(x, SampleNoise(2, range(3))), SampleNoise(2, range(3)).normal((2, 4), dtype))


def test_a_batch_with_another_number_of_streams_raises() -> None:
    with pytest.raises(ValueError, match="2 sample streams for a batch of 3"):
        normal_like(torch.zeros(3, 1), SampleNoise(0, range(2)))


@pytest.mark.parametrize(
    ("seed", "index", "name"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "indices"), (0, 0.5, "indices")]
)
def test_a_seed_or_an_index_out_of_range_raises(seed, index, name) -> None:
    with pytest.raises(ValueError, match=name):
        SampleNoise(seed, [index])


def test_streams_of_one_seed_are_kept_apart() -> None:
    first, second = (SampleNoise(3, range(50), stream).normal((400,)) for stream in (0, 1))
    assert not bool((first == second).any())
    correlation = float((first.double() * second.double()).mean())
    assert abs(correlation) < 5 / first.numel() ** 0.5
    assert torch.equal(SampleNoise(3, [7]).normal((4,)), SampleNoise(3, [7], 0).normal((4,)))
    with pytest.raises(ValueError, match="stream: -1"):
        SampleNoise(3, [7], -1)
