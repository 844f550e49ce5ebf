"""What a folder would make images by, read from its small files: no network is loaded to know it.

Why: an evaluation names its results by what decides them (the files, the sampler and its settings), and finds out what
is wrong with twenty models before it spends a night on the first.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import checkpoint
from distill.captions import read_prompts
from distill.config import Train
from distill.folders import FACTS, SUPPORTED, UNUSED, pipeline_folder, read_facts
from distill.prompts import PROMPTED, picture_shape, prompt_schedule
from distill.run import read_record
from samplers import SOLVERS, Gaussian, karras_sigmas, nfe
from samplers.adapters import coordinates_of
from samplers.schedules import restarted

LANDING = 0.5  # of a jump (`samplers.teleported`)
_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Sampling:
    """How a diffusion model is sampled; a one-step student takes no notice of it.

    guidance: scale of classifier-free guidance; 1 is none. teleport: a Gaussian's file (`distill gaussian`), by which
    sampling begins with a jump to sigma_skip; None: to where the Gaussian's own bound is within the tolerance, in nats.
    prompts: a text file, one prompt a line, for models that are conditioned on words.
    Raises ValueError for an unknown sampler, and numbers that cannot be right.
    """

    sampler: str = "heun"
    steps: int = 18
    guidance: float = 1.0
    teleport: str | None = None
    sigma_skip: float | None = None
    tolerance: float = 0.05
    prompts: str | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SOLVERS:
            raise ValueError(f"sampler: {self.sampler!r}; accepted are {', '.join(SOLVERS)}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: {self.steps!r}; accepted are whole numbers from 1")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: {self.guidance}; accepted are finite scales from 0")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance: {self.tolerance}; accepted are positive nats")
        if self.sigma_skip is not None and (self.teleport is None or not 0 < self.sigma_skip < math.inf):
            raise ValueError(f"sigma_skip: {self.sigma_skip}; accepted are positive levels, with a Gaussian to jump by")


@dataclass(frozen=True)
class Recipe:
    """What is known of a generator before it is loaded.

    kind: "run" (of a student), "student" (a pipeline's), "teacher", or the class of a pipeline with prompts or classes.
    folder: where its networks lie. files: all that decide its images, beside `settings` (JSON), the Gaussian and the
    prompts; each is below `folder`. shape: [C, H, W] of an image. nfe: evaluations for one; a guided one counts two.
    sigmas: the schedule, before a jump. sigma_skip: the level jumped to.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    n_classes: int | None
    nfe: int
    sigmas: Tensor
    settings: dict[str, Any]
    gaussian: Path | None = None
    sigma_skip: float | None = None
    prompts: tuple[str, ...] | None = None

    @property
    def one_step(self) -> bool:
        """Whether it is a student."""
        return self.kind in ("run", "student")


def read_recipe(path: str | Path, sampling: Sampling | None = None) -> Recipe:
    """How a run folder or a pipeline folder makes images.

    Raises ValueError for a folder that is neither, a pipeline that is not supported, and settings that do not fit it:
    guidance without a null label, a Gaussian of another shape, a jump that is none, prompts that are missing.
    """
    sampling = Sampling() if sampling is None else sampling
    if read_record(Path(path)).get("command") == "train":
        return _student_run(Path(path))
    folder = pipeline_folder(path)
    index = _json(folder / "model_index.json")
    if index.get("_class_name") in PROMPTED:
        return _prompted(folder, index, sampling)
    return _unconditional(folder, index, sampling)


@lru_cache(maxsize=2)
def read_gaussian(path: Path, mtime_ns: int) -> Gaussian:
    """A Gaussian's file, read once for all that jump by it. Raises ValueError for a file that is none."""
    return Gaussian.load(path)


def gaussian_of(path: Path) -> Gaussian:
    """The Gaussian in a file as it is now. Raises ValueError, naming it, for a file that is none."""
    if not path.is_file():
        raise ValueError(f"teleport: {path} is not a file")
    return read_gaussian(path, path.stat().st_mtime_ns)


def _student_run(run: Path) -> Recipe:
    config = Train.model_validate(read_record(run))
    if config.teacher.name != "pipeline":
        raise ValueError(f"{run}: is a run of the toy {config.teacher.name}, which is no pipeline")
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run}: has no checkpoint yet")
    network = run / "network"
    unet, facts = _json(network / "unet/config.json"), read_facts(network)
    files = (found / "average.safetensors", *_of_parts(network, ("unet", "scheduler"), weights=False))
    n_classes = len(facts.get("classes", [])) or unet.get("num_class_embeds")
    sigma = config.student.sigma_init
    settings = {"kind": "student", "sigma_init": sigma}
    return Recipe("run", run, files, _shape(unet), n_classes, 1, _levels(sigma), settings)


def _unconditional(folder: Path, index: dict[str, Any], sampling: Sampling) -> Recipe:
    """A UNet2DModel of pixels, with or without classes."""
    network = index.get("unet")
    name = network[1] if isinstance(network, list) and len(network) == 2 else None
    if not (isinstance(network, list) and network[0] == "diffusers" and name in SUPPORTED) or index.get("vqvae"):
        raise ValueError(
            f"{folder}: is a {index.get('_class_name')} with the network {name}; supported are pipelines of a "
            f"{' or '.join(SUPPORTED)} in pixels, and {', '.join(PROMPTED)}"
        )
    unet, facts, scheduler = _json(folder / "unet/config.json"), read_facts(folder), _scheduler(folder, index)
    files = _of_parts(folder, ("unet", "scheduler"))
    n_classes = len(facts["classes"]) if facts.get("classes") else unet.get("num_class_embeds")
    own = {"pipeline": {part: index[part] for part in ("unet", "scheduler")}}
    coordinates = coordinates_of(scheduler)
    consistency = type(scheduler).__name__ == "CMStochasticIterativeScheduler"
    if facts.get("kind", "student" if consistency else "teacher") == "student":
        levels = _levels(coordinates.sigma_max)
        settings = own | {"kind": "student", "sigmas": levels.tolist()}
        return Recipe("student", folder, files, _shape(unet), n_classes, 1, levels, settings)
    if sampling.prompts is not None:
        raise ValueError(f"prompts: {sampling.prompts}; {folder} has no use for words")
    if sampling.guidance != 1 and facts.get("null_label") is None:
        raise ValueError(
            f"guidance: {sampling.guidance} needs a null label, and the model names none "
            f'(a file {FACTS} with "classes" and "null_label" beside model_index.json would)'
        )
    sigmas = karras_sigmas(sampling.steps, coordinates.sigma_min, coordinates.sigma_max)
    return _sampled(Recipe("teacher", folder, files, _shape(unet), n_classes, 0, sigmas, own), sampling, _shape(unet))


def _prompted(folder: Path, index: dict[str, Any], sampling: Sampling) -> Recipe:
    """A DiT, Stable Diffusion (XL, 3): latents under classes or prompts."""
    kind = index["_class_name"]
    scheduler = _scheduler(folder, index)
    network = _json(folder / PROMPTED[kind] / "config.json")
    parts = [name for name, part in index.items() if isinstance(part, list) and part[0] and name not in UNUSED]
    latent, shape = picture_shape(network, _json(folder / "vae/config.json"))
    n_classes = network.get("num_embeds_ada_norm") if kind == "DiTPipeline" else None
    if (sampling.prompts is None) == (n_classes is None):
        needed = "has classes, and no use for words" if n_classes is not None else "needs a text file of them"
        raise ValueError(f"prompts: {sampling.prompts}; {folder} {needed}")
    prompts = None if sampling.prompts is None else read_prompts(Path(sampling.prompts))
    sigmas = prompt_schedule(scheduler, sampling.steps)
    own = {name: index[name] for name in index if not name.startswith("_") and name not in (*UNUSED, "id2label")}
    files = _of_parts(folder, parts)
    recipe = Recipe(kind, folder, files, shape, n_classes, 0, sigmas, {"pipeline": own}, prompts=prompts)
    return _sampled(recipe, sampling, latent)


def _sampled(recipe: Recipe, sampling: Sampling, shape: tuple[int, ...]) -> Recipe:
    """The recipe with its sampler's settings. shape: of what is sampled, pixels or latents."""
    solver, sigmas, skip = SOLVERS[sampling.sampler], recipe.sigmas, None
    settings = recipe.settings | {"kind": recipe.kind, "sampler": sampling.sampler, "steps": sampling.steps}
    settings |= {"guidance": float(sampling.guidance), "sigmas": sigmas.tolist()}
    gaussian = None if sampling.teleport is None else Path(sampling.teleport)
    if gaussian is not None:
        skip = _sigma_skip(gaussian_of(gaussian), recipe, sampling, shape)
        sigmas = restarted(sigmas, skip)
        settings |= {"sigma_skip": skip, "landing": LANDING}
    count = nfe(solver, sigmas) * (1 if sampling.guidance == 1 else 2)
    return replace(recipe, nfe=count, settings=settings, gaussian=gaussian, sigma_skip=skip)


def _sigma_skip(gaussian: Gaussian, recipe: Recipe, sampling: Sampling, shape: tuple[int, ...]) -> float:
    """The level to jump to. Raises ValueError for a Gaussian of something else, and a jump that would be none."""
    if gaussian.shape != shape:
        raise ValueError(f"teleport: the Gaussian is of {list(gaussian.shape)}; what is sampled is {list(shape)}")
    if gaussian.n_classes not in (None, recipe.n_classes):
        raise ValueError(f"teleport: the Gaussian has {gaussian.n_classes} classes; the model {recipe.n_classes}")
    if recipe.kind == "teacher" and [float(v) for v in gaussian.facts.get("range") or (-1, 1)] != [-1.0, 1.0]:
        raise ValueError(
            f"teleport: the Gaussian is of pixels in {gaussian.facts['range']}; the model's are in [-1, 1]"
        )
    if gaussian.n_classes is not None and sampling.guidance == 0:
        raise ValueError("teleport: the Gaussian is of classes, which guidance 0 takes away")
    if (gaussian.facts.get("vae") is None) != (recipe.kind == "teacher"):
        of = "latents" if recipe.kind == "teacher" else "pixels"
        raise ValueError(f"teleport: the Gaussian was fitted to {of}; the model samples the other")
    skip = sampling.sigma_skip
    if skip is None:
        if gaussian.bound is None:
            raise ValueError("sigma_skip: is None, and the Gaussian has no bound that would say where to")
        skip = gaussian.bound.sigma_skip(sampling.tolerance)
    low, high = float(recipe.sigmas[recipe.sigmas > 0][-1]), float(recipe.sigmas[0])
    if not low <= skip < high:
        raise ValueError(f"sigma_skip: {skip:.6g}; accepted are levels of the schedule, [{low:.6g}, {high:.6g})")
    return float(skip)


def _levels(sigma: float) -> Tensor:
    return torch.tensor([sigma, 0.0], dtype=torch.float64)


def _shape(config: dict[str, Any]) -> tuple[int, int, int]:
    size = config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    return config["in_channels"], height, width


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds no keys")
    return value


def _scheduler(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    try:
        return getattr(diffusers, index["scheduler"][1]).from_config(_json(folder / "scheduler/scheduler_config.json"))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder}: its model_index.json names no scheduler of diffusers") from error
    except ImportError as error:  # diffusers stands a dummy in for a class that needs what is not installed
        raise ValueError(f"{folder}: its scheduler needs a package that is not installed here") from error


def _of_parts(folder: Path, parts: Any, weights: bool = True) -> tuple[Path, ...]:
    """The files of a pipeline's parts that are read: configurations, vocabularies, and weights without a variant."""
    files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
    chosen = [f for f in files if f.suffix in (".json", ".txt", ".model") or (weights and _is_weights(f.name))]
    own = folder / FACTS
    return tuple([*chosen, own] if own.is_file() else chosen)


def _is_weights(name: str) -> bool:
    stem, _, shard = name.removesuffix(".safetensors").partition("-")
    return f"{stem}.safetensors" in _WEIGHTS and name.endswith(".safetensors") and (not shard or "-of-" in shard)
