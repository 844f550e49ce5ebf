"""DisBack from a configuration: the path is recorded, and walked back by the target of the one trainer.

Degradation Recording and Distribution Backtracking (arXiv 2408.15991). The path's folder is that of a run (its own
configuration, metrics, pictures), with the nodes and, when stage 1 is done, manifest.json.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save
from torch import Tensor

from distill import checkpoint, sharding
from distill.config import FirstStage, Train
from distill.degradation import Degrader, Plateau, Probe, Recording, choose, mismatches, probe
from distill.launch import check_launch, launched
from distill.lora import shared_copy
from distill.methods import Degradation
from distill.mismatch import SAMPLES, score_mismatch
from distill.nodes import MANIFEST, DegradationPath, Node, Weights, load_own, write_node
from distill.noise import DEGRADATION, MISMATCH, PROBE, Share, student_level
from distill.optim import prepare, run_in
from distill.progress import Progress, is_first
from distill.run import Run, completed, differences, drive, read_record
from distill.subject import Subject, checked_subject, sampled
from distill.targets import Backtracking, Fixed, Target, walk_of
from samplers import Denoiser, SampleNoise
from samplers.atomic import atomic_write
from samplers.schedules import karras_sigma

CANDIDATES = "candidates"  # in a path's folder, until the nodes are chosen
PROBED = 256  # samples that stage 1 is judged by
PLACES = (0.25, 0.5, 0.75)  # where in the student's noise levels (Karras index) a mismatch is measured


def degrade(
    config: Train, resume: bool = True, progress: Callable[[int, dict[str, float]], None] | None = None
) -> DegradationPath:
    """Records a run's degradation path in `config.path`; one that was begun is continued if `resume`.

    Raises ValueError where the folder holds a path already and `resume` is off, or one that does not fit the run.
    """
    stage = config.first_stage()
    folder = Path(stage.run)
    if progress is None:
        with Progress(stage.degradation.steps, "degradation step") as shown:
            return degrade(config, resume, shown)
    accelerator = launched(stage)
    check_launch(accelerator, config)
    subject, low, high = checked_subject(stage, accelerator.device, accelerator.mixed_precision)
    if (folder / MANIFEST).is_file():
        if not resume:
            raise ValueError(f"target.path: {folder} holds a path already; remove it or choose another")
        path = DegradationPath.read(folder)
        path.check(**subject.prints)
        _refuse_other_settings(config, complete=True)
        return path

    share = Share(
        stage.seed, stage.batch_size, accelerator.process_index, accelerator.num_processes, stream=DEGRADATION
    )
    teacher = _start_of(subject)
    run = Run(stage, resume, accelerator)
    student = subject.as_student(_frozen(subject.student, subject).to(accelerator.device))
    denoiser, update = prepare(accelerator, subject.fake, stage.degradation.optimizer, stage.degradation.steps)
    level = partial(student_level, config=stage.noise, sigma_min=low, sigma_max=high)
    parts = stage.memory.accumulation or accelerator.gradient_accumulation_steps
    rows = len(share.numbers(0, 0, parts))
    noise = SampleNoise(stage.seed, range(PROBED), PROBE)
    probed = probe(student, level, noise, subject.shape, subject.conditions, rows, accelerator.device)
    plateau = Plateau(stage.degradation.tolerance, stage.degradation.patience)
    degrader = Degrader(
        student,
        denoiser,
        update,
        level,
        share,
        subject.shape,
        subject.conditions,
        subject.fake.sigma_data,
        accelerator.device,
        parts,
    )

    def keep(done: int, prediction: Tensor) -> None:
        weights = sharding.whole_state(subject.fake, keep=accelerator.is_main_process) if done else {}
        if accelerator.is_main_process:
            _keep(folder / CANDIDATES, done, prediction, weights, teacher, stage.degradation)

    def agree(loss: float) -> float:
        return float(broadcast(torch.tensor([loss], device=accelerator.device)))

    recording = Recording(degrader, subject.fake, probed, plateau, stage.degradation.check_every, keep, agree)
    recording.record(0)
    done = drive(
        run,
        recording,
        stage.degradation.steps,
        stage.logging,
        {"fake": subject.fake, "plateau": plateau},
        {"fake": update.optimizer},
        lambda path: subject.preview(sampled(subject.fake), path),
        stage.seed,
        progress,
        stop=lambda done: plateau.reached,
    )
    recording.record(done)
    if accelerator.is_main_process:
        _finish(folder, stage, subject.prints, done, probed)
    accelerator.wait_for_everyone()
    return DegradationPath.read(folder)


def _keep(folder: Path, done: int, prediction: Tensor, weights: Weights, teacher: Weights, config: Degradation) -> None:
    """Writes a candidate and what it says of the probe; of the teacher, which `done` is 0 of, only that."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{done:08d}.probe") as file:
        file.write(save({"denoised": prediction.cpu().contiguous()}))
    if done:
        write_node(folder / f"{done:08d}.safetensors", weights, teacher, config.storage, config.rank)


def _finish(folder: Path, stage: FirstStage, prints: dict[str, str], done: int, probed: Probe) -> None:
    """Makes nodes of the candidates up to `done`, writes the manifest, and clears away what only a resume needs."""
    steps = [0, *sorted(int(f.stem) for f in (folder / CANDIDATES).glob("*.safetensors") if int(f.stem) <= done)]
    denoised = [load_file(folder / CANDIDATES / f"{step:08d}.probe")["denoised"] for step in steps]
    mismatch_of = mismatches(denoised, probed.x_sigma.cpu(), probed.sigma.cpu())
    nodes = []
    for k, index in enumerate(choose(mismatch_of, steps, stage.degradation), start=1):
        source, name = folder / CANDIDATES / f"{steps[index]:08d}.safetensors", f"node-{k:03d}.safetensors"
        with atomic_write(folder / name) as file, source.open("rb") as candidate:
            shutil.copyfileobj(candidate, file)
        sha256, size = checkpoint.sha256(folder / name), (folder / name).stat().st_size
        nodes.append(Node(name, steps[index], mismatch_of[index], sha256, size))
    DegradationPath(folder, **prints, storage=stage.degradation.storage, nodes=tuple(nodes)).write()
    _clear(folder)


def _clear(folder: Path) -> None:
    """Removes from a complete path what only a resume of stage 1 would need."""
    for leftover in (CANDIDATES, "checkpoints"):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def _refuse_other_settings(config: Train, complete: bool) -> None:
    """Raises ValueError where the path of a run was recorded, or begun, as the run does not say."""
    folder = Path(config.path)
    record, stage = read_record(folder), config.first_stage()
    changed = sorted(differences(completed(stage, record), stage.model_dump(mode="json"))) if record else []
    changed = [key for key in changed if key != "memory.accumulation"]  # nothing is normalised there
    if changed:
        use = "name it in target.path of a run to use it as it is" if complete else "choose another folder"
        raise ValueError(
            f"{', '.join(changed)}: {folder} was recorded with other values; remove it to record it anew, or {use}"
        )


def recorded_path(config: Train, subject: Subject) -> DegradationPath | None:
    """The run's path, if it needs one and it is recorded. Raises ValueError for one that does not fit the run."""
    if config.target.name == "fixed":
        return None
    folder = Path(config.path)
    path = DegradationPath.read(folder) if (folder / MANIFEST).is_file() else None
    if path is not None:
        path.check(**subject.prints)
    if config.target.path is None or path is None:  # another run's path is taken as it is
        _refuse_other_settings(config, complete=path is not None)
    between = (config.degradation.nodes if path is None else len(path)) - 1
    if config.target.name == "nodes" and config.target.updates < between:
        raise ValueError(
            f"target.updates: {config.target.updates} are less than one for each of the {between} targets of "
            f"{folder} before the teacher"
        )
    if path is not None and is_first():
        _clear(folder)  # left by a kill after the manifest
    return path


def target(config: Train, subject: Subject, path: DegradationPath | None, accelerator: Accelerator) -> Target:
    """The target that a configuration names; where it has a path, the fake score is set to its last node.

    Until the teacher is reached, a path holds one network (score interpolation; nodes, and another while one is read)
    or two (weight interpolation).
    """
    if path is None:
        return Fixed(subject.target)
    choice, device = config.target, accelerator.device
    teacher = _start_of(subject)
    for k in sorted({1, len(path)}):
        last = path.weights(k, teacher)
        if all(bool((last[key] == teacher[key].cpu()).all()) for key in last):
            raise ValueError(f"target.path: node {k} of {path.folder} is the teacher itself")
    load_own(subject.fake, last)
    if choice.name == "warm":
        return Fixed(subject.target)

    # In float32, as nodes may differ by less than bfloat16 tells apart; it runs as the networks that learn do.
    network: Any = shared_copy(subject.fake).requires_grad_(False).eval().to(device)
    run_in(accelerator, network)
    load = partial(path.weights, teacher=teacher)
    walk = walk_of(choice.name, network, load, len(path), teacher, subject.target)
    adaptive = choice.schedule == "adaptive"
    stages = (len(path) - 1 if choice.name == "nodes" else choice.stages) if adaptive else None
    average = partial(accelerator.reduce, reduction="mean")
    return Backtracking(walk, subject.target, choice.updates, stages, average=average, device=device)


def _start_of(subject: Subject) -> Weights:
    """What differences of a path are taken to: the teacher, or of an exact one the untrained network that learns in its
    place. The frozen teacher's own tensors where it is held in the precision that is trained; copies otherwise."""
    held = {} if subject.network is None else subject.network.state_dict()
    start = sharding.state(subject.fake)
    return {
        key: held[key] if key in held and held[key].dtype == tensor.dtype else tensor.detach().cpu().clone()
        for key, tensor in start.items()
    }


def _frozen(network: torch.nn.Module, subject: Subject) -> Any:
    """A copy that never learns, in the precision of the frozen teacher; one with adapters has its base already so."""
    made = shared_copy(network).requires_grad_(False).eval()
    if subject.network is None or hasattr(network, "shared_keys"):
        return made
    return made.to(next(subject.network.parameters()).dtype)


def start_samples(config: Train, subject: Subject, device: torch.device) -> Callable[[SampleNoise, Any], Tensor] | None:
    """Samples of the first student, kept frozen, where a bridge needs them."""
    if config.target.ratio != "bridge":
        return None
    start = subject.as_student(_frozen(subject.student, subject).to(device))

    @torch.no_grad()
    def draw(noise: SampleNoise, cond: Any) -> Tensor:
        return start(noise.normal(subject.shape, device=device), cond, noise)

    return draw


def measured(
    config: Train,
    subject: Subject,
    denoisers: Mapping[str, Denoiser],
    levels: tuple[float, float],
    rows: int,
    device: torch.device,
) -> dict[str, float]:
    """Mismatch to target and teacher and the fake score's error, as they are: means over three noise levels.

    Of a class-conditional model, a sample's law is that of its class: SAMPLES over the number of classes.
    """
    student = subject.as_student(subject.student)
    low, high = levels
    sigmas = [float(karras_sigma(torch.tensor(place), low, high, config.noise.rho)) for place in PLACES]
    noise = SampleNoise(config.seed, range(SAMPLES), MISMATCH)
    found = score_mismatch(denoisers, student, sigmas, noise, subject.shape, subject.conditions, device, rows)
    names = {"target": "mismatch_target", "teacher": "mismatch_teacher", "fake": "fake_error"}
    return {names[name]: sum(values) / len(values) for name, values in found.items()}
