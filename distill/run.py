"""A run folder and the loop that fills it: metrics, checkpoints, pictures; killed, it resumes bit for bit.

config.yaml     the resolved configuration; `--config RUN/config.yaml` repeats the run
versions.json   of Python and the libraries             inputs.json   SHA-256 of the words and images that it names
.lock           held by the process that writes the folder
metrics.jsonl   one line per interval: step, seconds, the mean of every metric
checkpoints/    step-00000100/ ...     samples/  step-00000100.png ...     curves.png
snapshots/      step-00001000/average.safetensors, state.json ... which stay, for a job that evaluates them
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from distill import checkpoint, pictures, sharding
from distill.data import found_images, images_identity
from distill.encoded import MANIFEST
from distill.folders import read_keys
from distill.progress import note
from distill.sections import Logging, Section
from distill.together import together
from distill.trainer import Stepper, train
from samplers.atomic import atomic_write

LIBRARIES = ("torch", "diffusers", "accelerate", "safetensors", "numpy")


def read_record(folder: Path) -> dict[str, Any]:
    """The config.yaml of a run folder; empty if there is none. Raises ValueError for one that is no configuration."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    try:
        record = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not YAML ({error})") from error
    if not isinstance(record, dict) or "command" not in record:
        raise ValueError(f"{file}: is not the configuration of a run")
    return record


class Run:
    """A run folder, new or resumed.

    Raises ValueError where the folder already holds a run and `resume` is off, or where the configuration of a
    resumed run has changed (it names the keys; those of `logging` and `memory` but accumulation may change), or the
    words and images that it names, or where another process writes the folder.
    """

    def __init__(self, config: Section, resume: bool, accelerator: Accelerator) -> None:
        self.folder = Path(str(config.model_dump()["run"]))
        self.accelerator, self.config = accelerator, config.model_dump(mode="json")
        self._started = time.monotonic()
        record = self.config
        file = self.folder / "config.yaml"
        self._lock = together(_claim, self.folder, accelerator, only_first=True)
        before = read_record(self.folder)
        if not resume and (before or self._checkpoints.exists()):
            raise ValueError(f"run: {self.folder} holds a run already; continue it with --resume or choose another")
        if not before and self._checkpoints.exists():
            raise ValueError(f"--resume: {self.folder} has checkpoints but no config.yaml that says of what")
        if before:
            changed = sorted(differences(completed(config, before), record))
            if changed:
                raise ValueError(f"--resume: the configuration of {self.folder} has changed in {', '.join(changed)}")
        inputs = inputs_of(self.config)
        kept = self.folder / "inputs.json"
        known = read_keys(kept) if kept.is_file() else inputs
        if changed := sorted(name for name in known.keys() | inputs.keys() if known.get(name) != inputs.get(name)):
            raise ValueError(f"--resume: {', '.join(changed)}: its files are not those that {self.folder} began with")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for left in (*self.folder.glob(".*.tmp"), *self.folder.glob("samples/.*.tmp")):  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            _write(file, yaml.safe_dump(record, sort_keys=False))
            versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
            _write(self.folder / "versions.json", json.dumps(versions, indent=1))
            if inputs:
                _write(kept, json.dumps(inputs, indent=1))

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def restore(self, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> int:
        """Loads the newest whole checkpoint, if there is one, and returns the number of steps done.

        Raises ValueError where not all processes see the one that the first does.
        """
        newest = together(checkpoint.newest, self._checkpoints, self.accelerator, only_first=True)
        found = broadcast_object_list([None if newest is None else (newest.name, checkpoint.identity(newest))])[0]
        together(self._check_seen, found, self.accelerator)
        step = checkpoint.load(self._checkpoints / found[0], modules, optimizers) if found else 0
        if self.accelerator.is_main_process and self.metrics_file.is_file():
            lines = [
                line for line in self.metrics_file.read_text(errors="replace").splitlines() if _step_of(line) <= step
            ]
            _write(self.metrics_file, "".join(f"{line}\n" for line in lines))
            if lines:
                self._started -= json.loads(lines[-1]).get("seconds") or 0  # the time goes on where the lines end
        return step

    def _check_seen(self, found: tuple[str, str] | None) -> None:
        """Raises ValueError where this process does not have the checkpoint that the first one found."""
        if found is None or self.accelerator.is_main_process:
            return
        folder = self._checkpoints / found[0]
        if not checkpoint.is_whole(folder) or checkpoint.identity(folder) != found[1]:
            raise ValueError(
                f"--resume: process {self.accelerator.process_index} does not see {folder} as the first process does; "
                "needed is the run's folder on a disk that all machines share, or a copy of it on each"
            )

    def track(self, step: int) -> None:
        """Opens the trackers that accelerate was given, at the number of steps done; the run goes on in theirs."""
        if self.accelerator.log_with:
            name = self.folder.resolve().name
            identity = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
            known = {
                "tensorboard": {"purge_step": step + 1},
                "wandb": {"id": identity, "name": name, "resume": "allow"},
            }
            self.accelerator.init_trackers("distill", _flat(self.config), known)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl, and to the trackers."""
        line = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(values, step=step)


def drive(
    run: Run,
    stepper: Stepper,
    steps: int,
    logging: Logging,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    preview: Callable[[Path | None], None],
    seed: int,
    progress: Callable[[int, dict[str, float]], None],
    measure: Callable[[], dict[str, float]] | None = None,
    stop: Callable[[int], bool] = lambda done: False,
) -> int:
    """Runs a stepper from where the run stands to `steps`, writes everything that the run folder holds, and returns
    the updates that are done.

    modules, optimizers: the state that checkpoints keep. preview(path): draws the present state; where processes share
    a network out all of them take part, and those that are given None draw nothing. progress(step, metrics) is called
    once an interval. measure(): what `logging.mismatch_every` asks for, by the same processes. stop(done): whether to
    end before `steps`, a function of what checkpoints keep. Between intervals nothing is copied from the device. Raises
    FloatingPointError, naming the step, for a metric or a weight that is not finite; the last checkpoint is then from
    before it.
    """
    start = done = run.restore(modules, optimizers)
    accelerator = run.accelerator
    run.track(start)
    first = accelerator.is_main_process
    takes_part = first or any(sharding.is_sharded(module) for module in modules.values())
    average = {name: module for name, module in modules.items() if name == "average"}
    updates = train(stepper, steps, start)
    waiting: list[dict[str, Tensor]] = []
    for n in range(start, steps):
        if stop(done):
            break
        # Dropout is the only user of the global generator; like all other noise it is a function of the step.
        torch.manual_seed((seed << 32) + n * accelerator.num_processes + accelerator.process_index)
        waiting.append(next(updates))

        done = n + 1
        last = done == steps or stop(done)
        measures = measure is not None and done % (logging.mismatch_every or steps) == 0
        if last or measures or any(done % every == 0 for every in (logging.log_every, logging.checkpoint_every)):
            values = _means(waiting, done, accelerator, run.folder)
            waiting = []
            if measures and measure is not None and takes_part:
                values |= measure()
            if first:
                run.record(done, values)
                progress(done, values)
        saves = last or done % logging.checkpoint_every == 0
        keeps = logging.keep_every is not None and done % logging.keep_every == 0 and bool(average)
        if saves or keeps:
            _check_weights(modules, done, run)
        if (last or done % logging.sample_every == 0) and takes_part:
            preview(run.folder / "samples" / f"step-{done:08d}.png" if first else None)
            if first:
                pictures.save_curves(run.metrics_file, run.folder / "curves.png")
        # After the pictures: what comes before the newest checkpoint is there when a run is resumed.
        if keeps:
            checkpoint.save(run.folder / "snapshots", done, average, {}, keep=None, write=first)
        if saves:
            checkpoint.save(run.folder / "checkpoints", done, modules, optimizers, write=first)
            accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # `end_training` would end the processes' group too
        tracker.finish()
    return done


def _means(waiting: list[dict[str, Tensor]], done: int, accelerator: Accelerator, folder: Path) -> dict[str, float]:
    """The mean of each metric over those steps of the interval that have it, and the processes: one copy from the
    device. All processes have the same metrics at a step."""
    names = list(dict.fromkeys(name for metrics in waiting for name in metrics))
    missing = torch.zeros(())
    rows = [[metrics[n].float() if n in metrics else missing for n in names] for metrics in waiting]
    device = next(iter(waiting[0].values())).device
    table = torch.stack([torch.stack([value.to(device) for value in row]) for row in rows])
    table = accelerator.reduce(table, reduction="mean").cpu()
    for row, values in enumerate(table):
        if not bool(values.isfinite().all()):
            name, value = next((n, v) for n, v in zip(names, values.tolist(), strict=True) if not abs(v) < float("inf"))
            raise _not_finite(f"{name} is {value}", done - len(table) + row + 1, folder)
    counts = [sum(name in metrics for metrics in waiting) for name in names]
    return {name: total / n for name, total, n in zip(names, table.sum(0).tolist(), counts, strict=True)}


def _check_weights(modules: dict[str, nn.Module], done: int, run: Run) -> None:
    for name, module in modules.items():
        if not sharding.all_finite(run.accelerator, module):
            raise _not_finite(f"a weight of the {name} is not finite", done, run.folder)


def _not_finite(what: str, step: int, folder: Path) -> FloatingPointError:
    kept = checkpoint.newest(folder / "checkpoints")
    return FloatingPointError(
        f"step {step}: {what}; stopped. The last good checkpoint is {kept.name if kept else 'none'}"
    )


def _claim(folder: Path) -> FileLock:
    """The folder, made and held until the run is let go or its process ends, however it does.

    One lock a folder within a process: stage 2 resumes the run whose stage 1 it was. A launcher that is killed leaves
    its processes at work, so a resume would write beside them. On a disk that knows no locks nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"run: {folder} is being written by another process; wait for it or end it first") from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) not in (None, ENOSYS, ENOLCK, EOPNOTSUPP):
            raise
        note(f"{folder} is on a disk without locks: that no other process writes it is yours to see to")
    return lock


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def inputs_of(record: Mapping[str, Any]) -> dict[str, str]:
    """A SHA-256 of each of the words, encoded rows and images that a run's configuration names: of the file, the
    manifest, the names and sizes of the images."""

    def at(key: str) -> Any:
        found: Any = record
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    files = {key: path for key in ("prompts.file", "prompts.encoded", "real.encoded") if (path := at(key)) is not None}
    hashes = {}
    for key, path in files.items():
        file = Path(path) / MANIFEST if key.endswith("encoded") else Path(path)
        if file.is_file():
            hashes[key] = checkpoint.sha256(file)
    for key in ("data.path", "real.data.path"):
        if at(key) is not None and Path(at(key)).is_dir():
            hashes[key] = images_identity(found_images(Path(at(key))), Path(at(key)))
    return hashes


def completed(config: Section, record: dict[str, Any]) -> dict[str, Any]:
    """A record with the defaults of what its version did not know yet; itself where it is of another form."""
    try:
        return type(config).model_validate(record).model_dump(mode="json")
    except ValidationError:
        return record


_FREE = ("logging", "run", "memory.checkpointing", "memory.ema")


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """The dotted keys at which two configurations differ, those that decide nothing left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if f"{prefix}{key}" not in _FREE]
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{prefix}{key}.")]
    return [] if before == after else [prefix.rstrip(".")]


def _flat(config: Any, prefix: str = "") -> dict[str, str | float]:
    """A configuration by its dotted keys, as trackers take it: numbers, and words for everything else."""
    if not isinstance(config, dict):
        return {prefix: config if isinstance(config, int | float) else str(config)}
    return {k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short
