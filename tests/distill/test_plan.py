"""A dry run of models that this machine could not hold, and its numbers beside what the trainer really takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import ModuleList

from distill.blueprint import blueprint
from distill.budget import Networks, budget, largest_fitting
from distill.config import Train
from distill.export import teacher_scheduler
from distill.hardware import Hardware
from distill.plan import plan
from distill.skeleton import META, Skeleton, read_skeleton
from tests.distill import published
from tests.distill.families import save
from tests.distill.tiny import TRAIN, save_teacher, write_config
from tests.some import some

ONE = Hardware()
PARAMETERS = {  # as their publishers count them
    "StableDiffusionPipeline": (859_520_964, (4, 64, 64)),
    "StableDiffusionXLPipeline": (2_567_463_684, (4, 128, 128)),
    "StableDiffusion3Pipeline": (2_028_328_000, (16, 128, 128)),
    "FluxPipeline": (11_901_408_320, (16, 128, 128)),
}
LARGE = tuple(PARAMETERS)


def config(path: object, **changes: Any) -> Train:
    prompts = {"prompts": {"file": "words.txt"}}  # which need not be here
    return Train.model_validate(TRAIN | {"teacher": {"path": str(path)}} | prompts | changes)


@pytest.mark.parametrize("name", some(LARGE))
def test_a_published_model_is_built_without_weights_or_memory(name: str, tmp_path: Path) -> None:
    skeleton = read_skeleton(published.save(name, tmp_path / name))
    parameters = list(skeleton.network.parameters())
    assert (sum(p.numel() for p in parameters), skeleton.shape) == PARAMETERS[name]
    assert all(p.device == META for p in (*parameters, *skeleton.vae.parameters()))
    clip = skeleton.encoders["text_encoder"]
    assert clip == pytest.approx(123_000_000, rel=0.01)
    call, _ = skeleton.call(2)
    assert call().shape[0] == 2


@pytest.mark.slow
def test_sdxl_is_planned_whole_and_fits_where_adapters_share_its_weights(tmp_path: Path) -> None:
    """Weights 2.57e9: float32 student, fake score, average and Adam's two moments are 28 bytes for each of them."""
    folder = published.save("StableDiffusionXLPipeline", tmp_path / "sdxl")
    full = config(folder, student={"sigma_init": None}, noise={}, memory={"checkpointing": True})
    on = Hardware.parse("8xH100,bf16")
    lines = "\n".join(plan(full, on))
    assert "student: 2,567,463,684 parameters\n" in lines
    assert "which does not fit into 74.5 GiB; not even one sample does" in lines
    gib = 2_567_463_684 / 2**30
    for name, size in (("teacher", 2), ("student", 4), ("fake score", 4), ("average", 4), ("Adam", 16)):
        assert f"  {name}: {size * gib:.2f} GiB\n" in lines
    assert f"while each process makes its networks: {12 * gib:.2f} GiB" in lines
    lora = {"rank": 64}
    adapters = config(folder, student={"sigma_init": None, "lora": lora}, fake={"lora": lora}, noise={},
                      memory={"checkpointing": True})  # fmt: skip
    lines = "\n".join(plan(adapters, on))
    assert "which fits into 74.5 GiB" in lines
    assert "of them are adapters" in lines


def networks(configured: Train, on: Hardware = ONE) -> Networks:
    return blueprint(configured, on).networks


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["teacher", "fake"])
def test_an_update_needs_what_the_allocator_hands_out_to_the_trainer(heads: str) -> None:
    """The trainer's own update, on a UNet of 1.6 million weights, heads on either encoder; peaks beside weights and
    optimizers agree to a quarter, where the student's graph alone is three quarters."""
    from tools.bench_arms import DATA, HIGH, LOW, Sizes, arms
    from tools.bench_cost import flops, peak_bytes

    sizes = Sizes(batch=8, fake_steps=2)
    arm = next(arm for arm in arms(sizes) if arm.name.startswith("(b)" if heads == "fake" else "(c)"))
    arm.step(0)  # makes the states of the optimizers
    measured = peak_bytes(arm, 1)
    real = {name: getattr(arm.nets, name).network for name in ("teacher", "student")}
    with META:
        copies = {name: type(network).from_config(network.config) for name, network in real.items()}
    skeletons = {
        name: Skeleton(Path(), "ConsistencyModelPipeline", network, teacher_scheduler(DATA, LOW, HIGH))
        for name, network in copies.items()
    }
    copies["teacher"].requires_grad_(False)
    tap = arm.nets.bottleneck(type("Denoiser", (), {"network": copies["teacher" if heads == "teacher" else "student"]}))
    parts = Networks(skeletons["teacher"], skeletons["student"], skeletons["student"], arm.nets.heads, tap)
    configured = config("x", real={"name": "data"}, divergence={"name": "jensen-shannon"}, adversarial_weight=0.1,
                        discriminator={"features": heads}, fake={"steps": 2}, batch_size=8)  # fmt: skip
    told = budget(configured, parts, ONE, 8)
    assert max(told.moments.values()) == pytest.approx(measured, rel=0.25)
    assert sum(told.update.values()) == pytest.approx(flops(lambda: arm.step(4)), rel=0.1)


def test_real_samples_are_held_and_not_read(place: Path) -> None:
    """Images as bytes, which need not be images yet; the digits and the teacher's samples in float32."""
    for label in range(10):
        (place / f"images/{label}").mkdir(parents=True)
        for k in range(3):
            (place / f"images/{label}/{k}.png").write_bytes(b"not read")
    folder = {"name": "folder", "path": str(place / "images"), "size": 8, "channels": 1}
    for real, size in (
        ({"name": "data", "data": folder}, 30 * 64),
        ({"name": "data"}, 899 * 64 * 4),
        ({"name": "teacher", "count": 50}, 50 * 64 * 4),
    ):
        configured = config(place / "pipeline", prompts={}, real=real)
        assert budget(configured, networks(configured), ONE, 8).held["real samples"] == size
    (place / "images/10").mkdir()
    (place / "images/10/0.png").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"real: class '2' of the data has label 3, and the teacher's 2"):
        networks(config(place / "pipeline", prompts={}, real={"name": "data", "data": folder}))


@pytest.mark.slow
def test_peaks_fall_with_the_samples_at_once_and_the_most_that_fit_do(tmp_path: Path) -> None:
    configured = config(save("sd15", tmp_path / "p"), noise={}, student={"sigma_init": None})
    parts = networks(configured)
    found = {rows: budget(configured, parts, ONE, rows) for rows in (1, 4, 16)}
    assert found[1].peak < found[4].peak < found[16].peak
    assert found[1].update == pytest.approx(found[16].update)  # a batch costs the same in any parts
    limit = (found[4].peak + found[16].peak) / 2
    fitting = largest_fitting(lambda rows: budget(configured, parts, ONE, rows), found[16], limit)
    assert 4 < fitting < 16
    assert budget(configured, parts, ONE, fitting).peak <= limit
    assert largest_fitting(lambda rows: found[rows], found[16], found[1].peak / 2) == 0


@pytest.mark.slow
def test_shares_and_adapters_hold_what_they_should(tmp_path: Path) -> None:
    folder = save("sd15", tmp_path / "p")
    more = {"noise": {}, "prompts": {"file": "words.txt"}}
    plain = config(folder, **more, student={"sigma_init": None})
    lora = config(folder, **more, student={"sigma_init": None, "lora": {"rank": 2}}, fake={"lora": {"rank": 2}})
    sharded = Hardware.parse("4xH100,fsdp")
    whole, shared = (budget(plain, networks(plain, on), on, 2).held for on in (ONE, sharded))
    for name in ("student", "fake score", "average", "Adam"):
        assert shared[name] == whole[name] / 4
    assert shared["teacher"] == whole["teacher"]
    # Weights are gathered in float32, and their casts kept, as they are where nothing is shared out.
    low = [Hardware.parse(text) for text in ("4xH100,bf16", "4xH100,bf16,fsdp")]
    full, part = (budget(plain, networks(plain, on), on, 2).moments["a fake step"] for on in low)
    weights = networks(plain).student.network
    blocks = [block for m in weights.modules() if isinstance(m, ModuleList) for block in m]
    block = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    assert part == full - 4 * (3 / 4) * sum(p.numel() for p in weights.parameters()) + 2 * block
    assert "buckets of gradients (DDP)" in budget(plain, networks(plain), Hardware(processes=2), 2).held
    adapted = networks(lora)
    held = budget(lora, adapted, ONE, 2).held
    trained = sum(p.numel() for p in adapted.student.network.parameters() if p.requires_grad)
    assert held["student"] == held["average"] == 4 * trained
    assert held["Adam"] == 2 * 8 * trained
    assert held["teacher"] == whole["teacher"]


def test_what_a_plan_advises_is_accepted(tmp_path: Path) -> None:
    """14 samples at a time might fit, and no 14 are a part of 64."""
    configured = config(save("sd15", tmp_path / "p"), noise={}, student={"sigma_init": None}, batch_size=64)
    parts = networks(configured)
    limit = budget(configured, parts, ONE, 14).peak
    (line,) = [line for line in plan(configured, Hardware(own=limit)) if "does not fit" in line]
    rows, accumulation = map(int, re.findall(r"; (\d+) samples at a time would: memory\.accumulation (\d+)", line)[0])
    assert (rows, accumulation) == (8, 8)
    more = {"batch_size": 64, "memory": {"accumulation": 8}}
    again = config(tmp_path / "p", noise={}, student={"sigma_init": None}, **more)
    assert any("which fits into" in line for line in plan(again, Hardware(own=limit)))


@pytest.mark.parametrize("features", ["teacher", "fake"])
def test_a_penalty_of_the_discriminator_is_in_the_plan(features: str, tmp_path: Path) -> None:
    folder, found = save("ddpm", tmp_path / "p"), {}
    for name, more in (("none", {}), ("difference", {"r1": 1.0, "r1_form": "difference"}), ("exact", {"r1": 1.0})):
        real = {"name": "teacher", "count": 8, "cache": "unused"}
        made = config(folder, noise={}, student={"sigma_init": None}, real=real, adversarial_weight=0.1,
                      discriminator={"features": features} | more)  # fmt: skip
        found[name] = budget(made, networks(made), ONE, 4)
    flops = {name: f.update["discriminator"] for name, f in found.items()}
    assert flops["none"] < flops["difference"] < flops["exact"]
    assert found["none"].moments["a fake step"] <= found["exact"].moments["a fake step"]


def test_a_dry_run_reads_no_weights_but_their_names(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "pipeline")
    weights = next((folder / "unet").glob("*.safetensors"))
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    lines = plan(config(folder), ONE)
    weights.unlink()
    assert plan(config(folder), ONE) == lines

    renamed = {("other" if key == "conv_in.weight" else key): value for key, value in header.items()}
    text = json.dumps(renamed).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match=r"unet: its weights are not those of its config.json: conv_in.weight"):
        plan(config(folder), ONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"sigma_init": 100.0}}, "student.sigma_init: 100.0 is outside the teacher's range"),
        ({"noise": {"sigma_max": 30.0}}, "is not a range inside the teacher's"),
        ({"real": {"name": "data"}, "discriminator": {"levels": [9]}}, "levels: \\[9\\]; a UNet2DModel"),
        ({"teacher": {"path": "{}", "guidance": 2.0}}, None),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "pipeline")
    if "teacher" in changes:
        changes = {"teacher": changes["teacher"] | {"path": str(folder)}}
    if message is None:
        assert plan(config(folder, **changes), ONE)
        return
    with pytest.raises(ValueError, match=message):
        plan(config(folder, **changes), ONE)


@pytest.mark.parametrize("text", ["", "8xT4", "0xH100", "H100,fp16", "H100;bf16"])
def test_hardware_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--hardware: "):
        Hardware.parse(text)


def test_hardware_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    found = Hardware.present()
    assert (found.processes, found.autocast, found.sharded, found.parts) == (4, torch.bfloat16, True, 2)
    assert Hardware.parse("2xh100,bf16").speed == pytest.approx(0.35 * 2 * 989e12)


def test_a_gpu_that_is_not_in_the_table_has_its_own_memory() -> None:
    """Its speed is another's, and the plan says so."""
    found = Hardware(2, torch.bfloat16, own=24e9)
    assert found.memory == 24e9
    assert found.speed == Hardware(2, torch.bfloat16).speed
    assert str(found) == "2 x 24 GB, as fast as H100, bfloat16 autocast"


@pytest.mark.slow
def test_the_command_plans_for_hardware_that_is_not_here(place: Path) -> None:
    from tests.distill.command import distill

    file = write_config(place, TRAIN)
    dry = distill("train", "--config", file, "--dry-run", "--hardware", "2xA100,bf16", cwd=place)
    assert dry.code == 0, dry.err
    assert "on 2 x A100, bfloat16 autocast; 4 samples at a time" in dry.out
    wrong = distill("train", "--config", file, "--dry-run", "--hardware", "2xT4", cwd=place)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    idle = distill("train", "--config", file, "--hardware", "A100", cwd=place)
    assert idle.code == 2
    assert "only --dry-run has a use for it" in idle.err
