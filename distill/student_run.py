"""A run of `distill train`, read from its folder: what its student is, and the student's averaged weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from distill import checkpoint
from distill.config import Train
from distill.folders import (
    NETWORK,
    index_of,
    part_folder,
    pipeline_folder,
    read_facts,
    read_keys,
    read_model,
    sample_shape,
    weight_files,
)
from distill.progress import note
from distill.run import read_record
from distill.stock import PIXELS, Steps, student_steps
from samplers.adapters import Coordinates, coordinates_of

NETWORKS = ("unet", "transformer")  # the part of a pipeline that is distilled
HUB_ID = "teacher.id"  # in a run's `network`: the id of the teacher's repository, where it has one
_ADAPTER = ".default.weight"  # how a name of a LoRA weight ends: <layer>.lora_A.default.weight


@dataclass(frozen=True)
class StudentRun:
    """What is known of a student before its weights are read.

    folder: the run's; checkpoint: the one that is read. index: the teacher's model_index.json. part: the name of its
    network, of the configuration `network`; scheduler: its own; facts: what its distill.json says.
    """

    folder: Path
    checkpoint: Path
    config: Train
    index: dict[str, Any]
    part: str
    network: dict[str, Any]
    scheduler: Any
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The newest checkpoint of a run, or the one that `path` is, below a run.

        Raises ValueError for a folder that is no run of `distill train`, is one of a toy, or has no checkpoint yet.
        """
        import diffusers

        path = Path(path)
        is_one = is_checkpoint(path)
        run = path.parent.parent if is_one else path
        record = read_record(run)
        if record.get("command") != "train":
            raise ValueError(f"{path}: is no run folder of `distill train`")
        config = Train.model_validate(record)
        if config.teacher.name != "pipeline":
            raise ValueError(
                f"{run}: is a run of the toy {config.teacher.name}, which is no pipeline; its pictures are in "
                f"{run}/samples"
            )
        if is_one and not checkpoint.is_whole(path):
            raise ValueError(f"{path}: is not whole, or not what was written (state.json has the SHA-256 of its files)")
        found = path if is_one else checkpoint.newest(run / "checkpoints")
        if found is None:
            raise ValueError(f"{run}: has no checkpoint yet")
        if harmed := [folder.name for folder in found.parent.glob("step-*") if folder.name > found.name]:
            note(f"{run}: {max(harmed)} is not whole, or not what was written; taken is {found.name}")
        kept = run / NETWORK
        index = index_of(kept)
        part = next((name for name in NETWORKS if (kept / name / "config.json").is_file()), None)
        if part is None:
            raise ValueError(f"{kept}: has no configuration of the teacher's network")
        network = read_keys(kept / part / "config.json")
        scheduler_config = read_keys(kept / "scheduler/scheduler_config.json")
        scheduler = getattr(diffusers, index["scheduler"][1]).from_config(scheduler_config)
        return cls(run, found, config, index, part, network, scheduler, read_facts(kept))

    @cached_property
    def coordinates(self) -> Coordinates:
        return coordinates_of(self.scheduler)

    @cached_property
    def steps(self) -> Steps:
        """What the student does, and the stock pipeline that does the same."""
        choice, teacher = self.config.student, self.config.teacher
        return student_steps(
            self.scheduler,
            self.coordinates,
            self.index["_class_name"],
            choice.sigma_init,
            choice.steps,
            self.network,
            teacher.guidance_embedding,
        )

    @property
    def in_pixels(self) -> bool:
        """Whether it samples pixels, and needs no other part than its network."""
        return self.steps.pipeline == PIXELS

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the stock pipeline's call, beside the conditions."""
        sizes = {"height": self.config.prompts.height, "width": self.config.prompts.width}
        return self.steps.call | {name: size for name, size in sizes.items() if size is not None}

    @property
    def hub_id(self) -> str | None:
        """The id of the teacher's repository; None where it was a folder."""
        file = self.folder / NETWORK / HUB_ID
        return file.read_text() if file.is_file() else None

    @property
    def has_adapters(self) -> bool:
        return self.config.student.lora.rank is not None

    def base(self, given: Path | None = None) -> Path:
        """The pipeline folder of the teacher: the run's own, or one that is `given` in its place.

        Raises ValueError where it is gone, or is a pipeline with another network.
        """
        try:
            folder = pipeline_folder(given or str(self.config.teacher.path))
        except ValueError as error:
            hint = "" if given else "; `distill export --base` names it where it is now"
            raise ValueError(f"{error} (of the teacher's pipeline, which is needed besides{hint})") from error
        index = index_of(folder)
        if index.get("_class_name") != self.index["_class_name"]:
            raise ValueError(f"--base: {folder} is a {index.get('_class_name')}; needed is the teacher's pipeline")
        file = part_folder(folder, self.part) / "config.json"
        if not file.is_file() or _settings(read_keys(file)) != _settings(self.network):
            raise ValueError(f"--base: {folder / self.part} is not the network of the teacher")
        return folder

    def load_network(self, base: Path | None = None) -> Any:
        """The averaged student, in float32; adapters are merged into the weights of the teacher in `base`.

        Of a network of pixels, what a student never uses is cut off, since its stock pipeline knows of neither: the
        null label, and the second half of the outputs, where that is a learned variance.
        """
        import diffusers

        kind = getattr(diffusers, self.index[self.part][1])
        average = {
            k.removeprefix("network."): v for k, v in checkpoint.load_weights(self.checkpoint, "average").items()
        }
        config = dict(self.network)
        weights = merged(self._frozen(self.base(base), kind), average, self._scale) if self.has_adapters else average
        null_label = self.facts.get("null_label")
        if null_label is not None and null_label == config["num_class_embeds"] - 1:
            config["num_class_embeds"] = null_label
            weights["class_embedding.weight"] = weights["class_embedding.weight"][:null_label].clone()
        if self.in_pixels:
            config["sample_size"] = sample_shape(config)[1]  # a number where it was a pair
            if config["out_channels"] != (channels := config["in_channels"]):
                config["out_channels"] = channels
                for name in ("conv_out.weight", "conv_out.bias"):
                    weights[name] = weights[name][:channels].clone()
        network = kind.from_config(config)
        network.load_state_dict(weights, strict=True)
        return network.eval().requires_grad_(False)

    def adapters(self) -> dict[str, Tensor]:
        """The averaged adapters by <layer>.lora_A.weight and lora_B, which the factor alpha / rank is part of."""
        weights = checkpoint.load_weights(self.checkpoint, "average")
        return {
            key.removeprefix("network.").removesuffix(_ADAPTER) + ".weight": value * self._scale
            if ".lora_B." in key
            else value
            for key, value in weights.items()
        }

    @property
    def _scale(self) -> float:
        lora = self.config.student.lora
        assert lora.rank is not None
        return 1.0 if lora.alpha is None else lora.alpha / lora.rank

    def _frozen(self, base: Path, kind: Any) -> dict[str, Tensor]:
        """The teacher's weights, float32. Raises ValueError where they are not those that the run began with."""
        identity = self.folder / "network/teacher.sha256"
        part = part_folder(base, self.part)
        files = weight_files(part)
        if identity.is_file() and identity.read_text() != " ".join(checkpoint.sha256(file) for file in files):
            raise ValueError(f"--base: the weights in {part} are not what the adapters were trained on")
        weights: dict[str, Tensor] = read_model(part, kind, torch.float32).state_dict()
        return weights


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint of a run, rather than the run."""
    return (path / "average.safetensors").is_file() and not (path / "config.yaml").is_file()


def merged(weights: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """weights [out, in, ...] + scale B A for every layer with adapters A [r, in, ...] and B [out, r, 1 ...].

    adapters: by <layer>.lora_A.default.weight and lora_B. Raises ValueError for one of a layer that is not there.
    """
    found = dict(weights)
    for key, inner in adapters.items():
        layer, is_inner, _ = key.partition(f".lora_A{_ADAPTER}")
        if not is_inner:
            continue
        if f"{layer}.weight" not in weights:
            raise ValueError(f"checkpoint: has an adapter of {layer}, which is no layer of the teacher")
        outer, weight = adapters[f"{layer}.lora_B{_ADAPTER}"], weights[f"{layer}.weight"]
        found[f"{layer}.weight"] = weight + scale * (outer.flatten(1) @ inner.flatten(1)).reshape(weight.shape)
    return found


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A network's configuration without what its file says of itself."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
