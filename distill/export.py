"""Teachers and students as ordinary diffusers pipeline folders, which load where this library is not installed.

A student's folder is its teacher's pipeline with the student's network and a stock scheduler, by which the pipeline's
own call takes exactly the student's steps (`distill.stock`). The other parts are copied, file by file. Students with
adapters are merged into the teacher's weights, or written as the adapters alone, as a stock LoRA file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.card import lora_card, student_card
from distill.folders import FACTS, UNUSED, index_of, is_plain_safetensors, read_facts
from distill.student_run import NETWORKS, StudentRun
from samplers.atomic import atomic_folder

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's own, where diffusers has no loader
_PARTS = (
    *NETWORKS,
    *UNUSED,
    "scheduler",
    "vae",
    *(f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")),
)
_WRITTEN = ("README.md", FACTS, "model_index.json", LORA_FILE, *_ADAPTER_FILES, *_PARTS)
_SHARDS = "diffusion_pytorch_model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pt", ".pth")


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
        _describe(draft, facts, card)


def check_replaceable(folder: Path, kind: str) -> None:
    """Raises ValueError where `folder` holds anything but a pipeline of that kind that this library wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder")
    held = sorted((entry.name for entry in folder.iterdir()), key=lambda name: (name.startswith("."), name))
    foreign = [name for name in held if name not in _WRITTEN]
    if foreign:
        raise ValueError(f"{folder}: holds {foreign[0]}, which would be lost; choose another folder")
    if held and read_facts(folder).get("kind") != kind:
        raise ValueError(f"{folder}: holds a pipeline that is no {kind} of this library; choose another folder")


def export_student(run: str | Path, folder: str | Path, base: str | Path | None = None) -> str:
    """Writes the student of a run as a stock pipeline folder, and returns the name of its class.

    run: of `distill train`, or one checkpoint of it. base: the teacher's pipeline folder, where it is not where the run
    found it (students of pixels without adapters need none). The folder is moved into place when complete.
    Raises ValueError for a run without a checkpoint, a base that is not the teacher's, parts of it without safetensors,
    and a `folder` that holds anything but an earlier export; OSError if it cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder, "student")
    student = StudentRun.read(run)
    steps, facts = student.steps, student_facts(student)
    given = None if base is None else Path(base)
    if student.in_pixels:
        card = student_card(student, student.index)
        save_pipeline(folder, student.load_network(given), steps.scheduler, facts, card)
        return steps.pipeline
    source = student.base(given)
    index, files = _copied(source, student.part)
    network = student.load_network(source)
    with atomic_folder(folder) as draft:
        for file in files:
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, draft / file)
        network.save_pretrained(draft / student.part, safe_serialization=True)
        steps.scheduler.save_pretrained(draft / "scheduler")
        index["scheduler"] = ["diffusers", type(steps.scheduler).__name__]
        (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        _describe(draft, facts, student_card(student, index))
    return steps.pipeline


def export_lora(run: str | Path, folder: str | Path) -> str:
    """Writes the adapters of a run's student as a stock LoRA file beside its scheduler, and returns the file's name.

    The factor alpha / rank is part of the weights. Families for which diffusers has no loader of LoRA files (DiT,
    PixArt, UNet2DModel) get peft's own files. Raises ValueError for a student without adapters, otherwise what
    `export_student` raises.
    """
    folder = Path(folder)
    check_replaceable(folder, "student adapters")
    student = StudentRun.read(run)
    if not student.has_adapters:
        raise ValueError(f"{run}: its student has no adapters (student.lora.rank); --lora is for those that have")
    if student.in_pixels and student.network["out_channels"] != student.network["in_channels"]:
        raise ValueError(
            "--lora: the teacher's network learned a variance, which the student's stock pipeline knows nothing of; "
            "accepted is an export without --lora, whose network has none"
        )
    with atomic_folder(folder) as draft:
        name = _write_adapters(draft, student, student.adapters())
        student.steps.scheduler.save_pretrained(draft / "scheduler")
        _describe(draft, student_facts(student) | {"kind": "student adapters"}, lora_card(student, name))
    return name


def student_facts(student: StudentRun) -> dict[str, Any]:
    """What a student's distill.json says: its classes, its steps, and what its pipeline is called with."""
    facts = {"kind": "student", "classes": student.facts.get("classes", []), "null_label": None}
    return facts | student.steps.facts | {"call": student.call}


def _describe(draft: Path, facts: dict[str, Any], card: str) -> None:
    (draft / FACTS).write_text(json.dumps(facts, indent=1))
    (draft / "README.md").write_text(card)


def _copied(source: Path, part: str) -> tuple[dict[str, Any], list[Path]]:
    """The model_index.json of a student of a pipeline, and the files that it shares with it, below the folder.

    A part that no sample is made by is left out where it has no safetensors. Raises ValueError for another one.
    """
    index, files = dict(index_of(source)), []
    for name, entry in index.items():
        if name in (part, "scheduler") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        held = sorted(file for file in (source / name).rglob("*") if file.is_file())
        weights = [file for file in held if file.suffix in _WEIGHTS]
        safe = [file for file in weights if is_plain_safetensors(file.name)]
        if held and (safe or not weights):
            kept = [file for file in held if file in safe or file not in weights]
            files += [file.relative_to(source) for file in kept if not _index_of_variant(file)]
        elif name in UNUSED:
            index[name] = [None, None]
        else:
            raise ValueError(f"{source / name}: has no safetensors (without a variant), which a student needs")
    index.pop("_name_or_path", None)
    return index, files


def _index_of_variant(file: Path) -> bool:
    """Whether a file says which weights of a variant lie in which shard: those are not copied."""
    return ".index." in file.name and file.name not in ("model.safetensors.index.json", _SHARDS)


def _write_adapters(draft: Path, student: StudentRun, adapters: dict[str, Tensor]) -> str:
    """Writes adapters as the pipeline's class does; where it has no loader for them, as peft does."""
    import diffusers

    save = getattr(getattr(diffusers, student.steps.pipeline), "save_lora_weights", None)
    if save is not None:
        save(draft, **{f"{student.part}_lora_layers": adapters}, safe_serialization=True)
        return LORA_FILE

    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = student.config.student.lora.rank or 1
    layers = sorted(name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight"))
    LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).save_pretrained(str(draft))
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(prefixed, draft / _ADAPTER_FILES[1], metadata={"format": "pt"})
    return _ADAPTER_FILES[1]
