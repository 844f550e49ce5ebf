"""Pipeline folders of diffusers, from local safetensors and JSON only; one line for what is wrong with them."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from samplers.prompts import PIPELINES

NETWORK = "network"  # in a folder of `distill train`: its teacher's configuration without weights
FACTS = "distill.json"  # beside model_index.json: what a diffusers folder has no place for
SUPPORTED = ("UNet2DModel",)  # networks of pixels
UNUSED = ("feature_extractor", "image_encoder", "safety_checker")  # parts that no sample is made by
_LIBRARIES = ("diffusers", "transformers")
LEFT_OVER = (
    "caption_projection.y_embedding",
)  # in published files (PixArt), and of no use to any network of diffusers
_VOCABULARIES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))  # a tokenizer has one of these
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def pipeline_folder(path: str | Path) -> Path:
    """The folder with a model_index.json: `path`, `path`/model where `path` is a run of `distill teach`, or where the
    hub's cache keeps the repository of that id. Nothing is downloaded. Raises ValueError where there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "model_index.json").is_file():
            return folder
    if not Path(path).is_dir():
        return _cached(str(path))
    hint = ""
    if (Path(path) / "config.yaml").is_file():
        hint = " (this run has not finished: continue it with --resume)"
        if (Path(path) / NETWORK).is_dir():
            hint = " (this is a run of `distill train`, whose student knows its own noise levels only)"
        elif (Path(path) / "model").is_dir():
            hint = " (this run learned a toy, which teacher.name names)"
    raise ValueError(f"{path}: is no pipeline folder of diffusers, there is no model_index.json in it{hint}")


def _cached(name: str) -> Path:
    """Where the hub's cache keeps a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name}: there is no such folder")
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name}: there is no such folder, and the hub's cache has none of this name; "
            f"`hf download {name}` would fetch it"
        ) from error
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name}: is no pipeline of diffusers, there is no model_index.json in {folder}")
    return folder


def sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The shape [C, H, W] of a UNet2DModel's samples, by its configuration.

    Raises ValueError where it names no size.
    """
    size = config.get("sample_size")
    if size is None:
        raise ValueError("sample_size: null in the network's config.json; needed is the side of its samples in pixels")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return config["in_channels"], height, width


def read_facts(folder: Path) -> dict[str, Any]:
    """What the `distill.json` of a pipeline folder says; empty if there is none.

    Raises ValueError for classes that are not a list of names, and a null label that is no label beside theirs.
    """
    file = folder / FACTS
    if not file.is_file():
        return {}
    facts = read_keys(file)
    classes, null = facts.get("classes") or [], facts.get("null_label")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file}: classes: {classes!r}; accepted is a list of names, in the order of their labels")
    if null is not None and (isinstance(null, bool) or not isinstance(null, int) or null < len(classes)):
        raise ValueError(
            f"{file}: null_label: {null!r}; accepted are null, and numbers from {len(classes)}, the classes"
        )
    return facts


def index_of(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder: its class, and parts as [library, class], [None, None] if absent.

    Raises ValueError for one that is no object of JSON, and entries of another form.
    """
    index = read_keys(folder / "model_index.json", f"{folder}: its model_index.json")
    if not isinstance(name := index.get("_class_name"), str | None):
        raise ValueError(f"{folder}: its model_index.json says _class_name: {name!r}; accepted is a name")
    for name, part in index.items():
        if isinstance(part, list) and not (len(part) == 2 and all(isinstance(word, str | None) for word in part)):
            raise ValueError(f"{folder}: its model_index.json says {name}: {part}; accepted is [library, class]")
    return index


def part_folder(folder: Path, part: str) -> Path:
    """Where a part of a pipeline lies: in the folder of its name, or, as the first that were published (the DDPMs of
    2022), beside model_index.json."""
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    return folder if not (folder / part).is_dir() and (folder / file).is_file() else folder / part


def read_keys(file: Path, called: str | None = None) -> dict[str, Any]:
    """A file's object of JSON. Raises ValueError, calling it `called` (None: by its name), for anything else."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{called or f'{file}:'} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{called or f'{file}:'} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{called or f'{file}:'} holds no keys")
    return content


def pixel_classes(folder: Path) -> tuple[str, str]:
    """The classes of the network and the scheduler of a pipeline of pixels.

    Raises ValueError for one that is not supported, naming it and those that are.
    """
    index = index_of(folder)
    try:
        library, network_class = index["unet"]
        _, scheduler_class = index["scheduler"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: is a {index.get('_class_name')}, and its model_index.json names no unet and scheduler; "
            f"{_supported()}"
        ) from error
    if library != "diffusers" or network_class not in SUPPORTED or index.get("vqvae"):
        raise ValueError(f"{folder}: is a {index.get('_class_name')} with a {network_class}; {_supported()}")
    return network_class, scheduler_class


def _supported() -> str:
    latent = [name for name, kind in PIPELINES.items() if kind.embeddings or kind.network != "unet"]
    return f"supported are pipelines of a {' or '.join(SUPPORTED)} in pixels, and {', '.join(latent)}"


def read_pipeline(folder: Path) -> tuple[Any, Any]:
    """The network and the scheduler of a pipeline folder. Reads safetensors and JSON only."""
    import diffusers

    network_class, scheduler_class = pixel_classes(folder)
    if not hasattr(diffusers, scheduler_class):
        raise ValueError(f"{folder}: its scheduler {scheduler_class} is not one of diffusers")

    network_in, scheduler_in = (part_folder(folder, part) for part in ("unet", "scheduler"))
    _check_there(network_in)
    _check_there(scheduler_in)
    scheduler = _read(scheduler_in, getattr(diffusers, scheduler_class).from_pretrained)
    if scheduler is None:  # diffusers stands a dummy in for a class that needs what is not installed
        raise ValueError(f"scheduler: {scheduler_class} needs a package that is not installed here")
    return read_model(network_in, getattr(diffusers, network_class)), scheduler


def class_count(facts: dict[str, Any], labels: int | None) -> int | None:
    """The number of classes of a network with so many labels: those that have names, or all but a null label at the
    end."""
    if facts.get("classes"):
        return len(facts["classes"])
    return labels - 1 if labels is not None and facts.get("null_label") == labels - 1 else labels


def is_plain_safetensors(name: str) -> bool:
    """Whether a file of a pipeline's part holds weights that are read by default: of no variant, whole or a shard."""
    stem, _, shard = name.removesuffix(".safetensors").partition("-")
    return (
        name.endswith(".safetensors")
        and stem in ("model", "diffusion_pytorch_model")
        and (not shard or "-of-" in shard)
    )


def weight_files(part: Path) -> list[Path]:
    """The safetensors of a part of a pipeline folder that are read: none of a variant."""
    return [file for file in sorted(part.glob("*.safetensors")) if is_plain_safetensors(file.name)]


def unread_weights(part: Path) -> list[str]:
    """The names of the files of weights in a part that are not read: variants, and what would be unpickled."""
    files = (file for file in sorted(part.glob("*")) if file.suffix in (".safetensors", ".bin"))
    return [file.name for file in files if not is_plain_safetensors(file.name)]


def missing_text_part(folder: Path) -> str | None:
    """The first part that a pipeline folder does not name and its class cannot embed words without."""
    index = index_of(folder)
    kind = PIPELINES.get(str(index.get("_class_name")))
    needed = () if kind is None else kind.text_parts
    return next((part for part in needed if not (index.get(part) or [None])[0]), None)


def network_part(folder: Path) -> str:
    """The part of a pipeline folder that its denoising network lies in: unet or transformer."""
    kind = PIPELINES.get(str(index_of(folder).get("_class_name")))
    return "unet" if kind is None else kind.network


def read_model(part: Path, kind: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of a diffusers class in a part of a pipeline folder, from safetensors, in its own dtype or another.

    Raises ValueError, naming the part, for files that cannot be read, and weights that are not those of the config.
    """
    _check_weights_there(part)
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    options |= {} if dtype is None else {"torch_dtype": dtype}
    model, loaded = _read(part, kind.from_pretrained, **options)
    unknown = [key for key in loaded["unexpected_keys"] if key not in LEFT_OVER]
    wrong = [*loaded["missing_keys"], *unknown, *loaded["mismatched_keys"]]
    if wrong:  # diffusers would go on with random weights
        raise ValueError(f"{part}: its weights are not those of its config.json: {wrong[0]} and {len(wrong) - 1} more")
    return model


def load_pipeline(folder: Path, without: Sequence[str] = (), text_dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from local safetensors, in float32, without the parts that are not used, and those named `without`.

    text_dtype: of its text encoders. Raises ValueError, naming the part, for what cannot be read, or is not of
    diffusers or transformers.
    """
    import diffusers

    index = index_of(folder)
    needed = {PIPELINES[str(index["_class_name"])].network, "scheduler", "vae"}
    parts: dict[str, Any] = {}
    for name, part in index.items():
        if not isinstance(part, list):
            continue
        library, kind = part
        if name in UNUSED or name in without or library is None:
            parts[name] = None
        else:
            _check_there(folder / name)
            with _silent():
                parts[name] = _part(folder / name, library, kind, text_dtype)
    missing = sorted(name for name in needed - set(without) if parts.get(name) is None)
    if missing:
        raise ValueError(f"{folder}: is a {index['_class_name']} without its {missing[0]}")
    with _silent(), _named(folder):
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_words(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline as far as it turns words into embeddings; some ask the network's settings for a size."""
    from diffusers.configuration_utils import FrozenDict

    network = network_part(folder)
    pipe = load_pipeline(folder, ("vae", network), dtype)
    config = folder / network / "config.json"
    if config.is_file():
        setattr(pipe, network, SimpleNamespace(config=FrozenDict(json.loads(config.read_text()))))
    return pipe


def _part(folder: Path, library: str, name: str, text_dtype: torch.dtype) -> Any:
    if library not in _LIBRARIES or find_spec(library) is None or not hasattr(import_module(library), name):
        raise ValueError(
            f"{folder}: is a {library}.{name}, which is not here; read are parts of {' and '.join(_LIBRARIES)}"
        )
    kind = getattr(import_module(library), name)
    is_network = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    if not is_network:
        if "Tokenizer" in name and not any(all((folder / f).is_file() for f in files) for files in _VOCABULARIES):
            known = ", ".join(" and ".join(files) for files in _VOCABULARIES)
            raise ValueError(f"{folder}: is a {name} without its vocabulary; needed is one of {known}")
        with _named(folder):
            return kind.from_pretrained(folder, local_files_only=True)
    if library == "diffusers":
        return read_model(folder, kind, torch.float32).requires_grad_(False).eval()
    _check_weights_there(folder)
    options = {"use_safetensors": True, "output_loading_info": True, "torch_dtype": text_dtype}
    with _named(folder):
        model, loaded = kind.from_pretrained(folder, local_files_only=True, **options)
    wrong = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if wrong:  # transformers would go on with random weights
        raise ValueError(f"{folder}: its weights are not those of its config.json: {wrong[0]}")
    return model.requires_grad_(False).eval()


def _check_there(part: Path) -> None:
    """Some readers make something empty of a folder that is not there, others look for it on the hub."""
    if not part.is_dir():
        raise ValueError(f"{part}: is missing, and model_index.json names it")


def _check_weights_there(part: Path) -> None:
    if not weight_files(part) and (others := unread_weights(part)):
        raise ValueError(
            f"{part}: has no safetensors that are read, only {others[0]} and {len(others) - 1} more: variants and "
            "pickles are not; `save_pretrained` of the pipeline that diffusers loads writes those that are"
        )


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """The libraries raise a different type for each thing that can be wrong with a folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Neither library draws bars for the loading of each part, or tells what is told in our one line."""
    logs = [import_module(f"{library}.utils.logging") for library in _LIBRARIES if find_spec(library) is not None]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity(log.CRITICAL)
            log.disable_progress_bar()
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


@contextmanager
def _quiet() -> Iterator[None]:
    """What diffusers would log about a folder is told in our one line instead."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)


def _read(part: Path, load: Callable[..., Any], **options: Any) -> Any:
    try:
        with _quiet():
            return load(part, local_files_only=True, **options)
    except Exception as error:  # diffusers raises a different type for each thing that can be wrong with a folder
        raise ValueError(f"{part}: cannot be read ({' '.join(str(error).split())[:300]})") from error
