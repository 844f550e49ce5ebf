"""Teachers and students as ordinary diffusers pipeline folders, which load where this library is not installed.

A class-conditional EDM denoiser fits one stock pipeline: ConsistencyModelPipeline with CMStochasticIterativeScheduler,
whose scalings are EDM's up to the boundary sigma_min and whose timestep is 250 ln sigma. One step of it from
sigma_max = sigma_init returns D(sigma_init z, sigma_init), clip_denoised being off: the student, exactly.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from distill import checkpoint
from distill.card import student_card
from distill.config import Train
from distill.folders import FACTS, read_facts
from distill.run import read_record
from samplers.atomic import atomic_folder

EXPORTABLE = "CMStochasticIterativeScheduler"
_WRITTEN = ("README.md", FACTS, "model_index.json", "scheduler", "unet")


def teacher_scheduler(sigma_data: float, sigma_min: float, sigma_max: float) -> Any:
    """The scheduler that records an EDM denoiser's coordinates, with D(x, sigma_min) = x."""
    from diffusers import CMStochasticIterativeScheduler

    return CMStochasticIterativeScheduler(
        sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, clip_denoised=False
    )


def save_pipeline(folder: Path, network: nn.Module, scheduler: Any, facts: dict[str, Any], card: str) -> None:
    """Writes a ConsistencyModelPipeline folder with safetensors and a model card, moved into place when complete.

    Raises OSError if it cannot be written, ValueError where `folder` holds anything but an earlier pipeline of this
    function and the same kind: that is replaced.
    """
    from diffusers import ConsistencyModelPipeline

    check_replaceable(folder, facts["kind"])
    with atomic_folder(folder) as draft:
        ConsistencyModelPipeline(network, scheduler).save_pretrained(draft, safe_serialization=True)
        (draft / FACTS).write_text(json.dumps(facts, indent=1))
        (draft / "README.md").write_text(card)


def check_replaceable(folder: Path, kind: str) -> None:
    """Raises ValueError where `folder` holds anything but a pipeline of that kind that this library wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder")
    held = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in held if name not in _WRITTEN]
    if foreign:
        raise ValueError(f"{folder}: holds {foreign[0]}, which would be lost; choose another folder")
    if held and read_facts(folder).get("kind") != kind:
        raise ValueError(f"{folder}: holds a pipeline that is no {kind} of this library; choose another folder")


def load_student_network(run: Path) -> tuple[Any, Any, dict[str, Any], Train]:
    """The averaged student of a run's newest checkpoint: its network, scheduler, facts and configuration.

    The null label, which a student never sees, is cut from the class embedding. Raises ValueError for a folder that is
    no run of `distill train`, or has no checkpoint yet.
    """
    import diffusers

    record = read_record(run)
    if record.get("command") != "train":
        raise ValueError(f"{run}: is no run folder of `distill train`")
    config = Train.model_validate(record)
    if config.teacher.name != "pipeline":
        raise ValueError(
            f"{run}: is a run of the toy {config.teacher.name}, which is no pipeline; its pictures are in {run}/samples"
        )
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run}: has no checkpoint yet")

    network_config = json.loads((run / "network/unet/config.json").read_text())
    index = json.loads((run / "network/model_index.json").read_text())
    scheduler_config = json.loads((run / "network/scheduler/scheduler_config.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_config(scheduler_config)
    facts = read_facts(run / "network")

    weights = {k.removeprefix("network."): v for k, v in checkpoint.load_weights(found, "average").items()}
    if facts.get("null_label") is not None:
        network_config["num_class_embeds"] = facts["null_label"]
        weights["class_embedding.weight"] = weights["class_embedding.weight"][: facts["null_label"]].clone()
    network = diffusers.UNet2DModel.from_config(network_config)
    network.load_state_dict(weights, strict=True)
    facts = {"kind": "student", "classes": facts.get("classes", []), "null_label": None}
    return network.eval(), scheduler, facts, config


def export_student(run: Path, folder: Path) -> None:
    """Writes the student of a run as a stock pipeline folder: one step gives the student's images.

    Raises ValueError for a teacher in coordinates for which no stock pipeline gives exactly the student.
    """
    from diffusers import CMStochasticIterativeScheduler

    check_replaceable(folder, "student")
    network, scheduler, facts, config = load_student_network(run)
    if type(scheduler).__name__ != EXPORTABLE:
        raise ValueError(
            f"{run}: its teacher has a {type(scheduler).__name__}; a stock pipeline that gives exactly the one-step "
            f"student is known for {EXPORTABLE}"
        )
    settings = {"sigma_max": config.student.sigma_init, "clip_denoised": False}
    one_step = CMStochasticIterativeScheduler.from_config(scheduler.config, **settings)
    save_pipeline(folder, network, one_step, facts, student_card(config, facts["classes"]))
