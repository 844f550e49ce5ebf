"""What a folder would make images by, read from its small files: no network is loaded to know it.

Why: an evaluation names its results by what decides them (the files, the sampler and its settings), and finds out what
is wrong with twenty models before it spends a night on the first.
"""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.captions import read_prompts
from distill.export import is_plain_safetensors
from distill.folders import (
    FACTS,
    NETWORK,
    SUPPORTED,
    UNUSED,
    class_count,
    index_of,
    part_folder,
    pipeline_folder,
    read_facts,
    read_keys,
    sample_shape,
)
from distill.latents import PROMPTED, picture_shape, prompt_schedule
from distill.run import read_record
from distill.stock import CONSISTENCY, PIXELS, Steps, student_steps
from distill.student_run import StudentRun, is_checkpoint
from samplers import SOLVERS, Gaussian, karras_sigmas, nfe
from samplers.adapters import coordinates_of
from samplers.schedules import restarted

LANDING = 0.5  # of a jump (`samplers.teleported`)


@dataclass(frozen=True)
class Sampling:
    """How a diffusion model is sampled; a student takes no notice of it, but for the prompts.

    guidance: scale of classifier-free guidance; 1 is none. teleport: a Gaussian's file (`distill gaussian`), by which
    sampling begins with a jump to sigma_skip; None: to where the Gaussian's own bound is within the tolerance, in nats.
    prompts: a file of them (.txt, .csv, .jsonl; `column` of those), for models that are conditioned on words. height,
    width: of a pipeline's pictures, in pixels; None is its own.
    Raises ValueError for an unknown sampler, and numbers that cannot be right.
    """

    sampler: str = "heun"
    steps: int = 18
    guidance: float = 1.0
    teleport: str | None = None
    sigma_skip: float | None = None
    tolerance: float = 0.05
    prompts: str | None = None
    column: str = "caption"
    height: int | None = None
    width: int | None = None

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
    folder: where its networks lie; base: where those lie that a run's student shares with its teacher. files: all that
    decide its images, beside `settings` (JSON), the Gaussian and the prompts; each is below `folder` or `base`, and a
    run's first one is the checkpoint's. shape: [C, H, W] of an image. nfe: evaluations for one; a guided one counts
    two. sigmas: the schedule, before a jump. sigma_skip: the level jumped to. student: its steps. latent: whether a VAE
    makes its images; asked: what its pipeline is told of size and guidance embedding.
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
    student: Steps | None = None
    latent: bool = False
    asked: dict[str, Any] = field(default_factory=dict)
    base: Path | None = None

    def name_of(self, file: Path) -> str:
        """What one of `files` is called wherever its folder lies: its place below it."""
        if self.base is not None and file.is_relative_to(self.base):
            return f"base/{file.relative_to(self.base)}"
        return str(file.relative_to(self.folder))


def read_recipe(path: str | Path, sampling: Sampling | None = None) -> Recipe:
    """How a run folder, one checkpoint of a run of `distill train`, or a pipeline folder makes images.

    Raises ValueError for a folder that is neither, a pipeline that is not supported, and settings that do not fit it:
    guidance without a null label, a Gaussian of another shape, a jump that is none, prompts that are missing.
    """
    sampling = Sampling() if sampling is None else sampling
    try:
        return _recipe(path, sampling)
    except KeyError as error:
        raise ValueError(f"{path}: one of its configurations does not say {error}") from error


def _recipe(path: str | Path, sampling: Sampling) -> Recipe:
    if is_checkpoint(Path(path)) or read_record(Path(path)).get("command") == "train":
        return _student_run(Path(path), sampling)
    folder = pipeline_folder(path)
    index = index_of(folder)
    if read_facts(folder).get("kind") == "student":
        return _student_folder(folder, index, sampling)
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


def _student_run(path: Path, sampling: Sampling) -> Recipe:
    run = StudentRun.read(path)
    files = [run.checkpoint / "average.safetensors", *_of_parts(run.folder / NETWORK, (run.part, "scheduler"), False)]
    base = None
    if not run.in_pixels:
        base = run.base()
        files += _of_parts(base, [name for name in _parts(run.index) if name not in (run.part, "scheduler")])
    recipe = Recipe("run", run.folder, tuple(files), (0, 0, 0), None, 0, torch.empty(0), {}, base=base)
    return _student(recipe, replace(run.steps, call=run.call), run.network, run.facts, sampling)


def _student_folder(folder: Path, index: dict[str, Any], sampling: Sampling) -> Recipe:
    """An exported student, or a consistency model of others, which is sampled in one step."""
    kind, scheduler, facts = index.get("_class_name", ""), _scheduler(folder, index), read_facts(folder)
    part = PROMPTED.get(kind, "unet")
    network, coordinates = read_keys(part_folder(folder, part) / "config.json"), coordinates_of(scheduler)
    steps = student_steps(scheduler, coordinates, kind, None, 1, network)
    if "sigmas" in facts:
        try:
            # A float32 table of betas may end a rounding error below the level that it was made for.
            sigmas = tuple(min(float(sigma), coordinates.sigma_limit) for sigma in facts["sigmas"])
            steps = replace(steps, sigmas=sigmas, start=float(facts["start"]), floor=float(facts["floor"]))
            steps = replace(steps, call=dict(facts["call"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / FACTS}: does not say sigmas, start, floor and call of a student") from error
    files = _of_parts(folder, _parts(index))
    own = {"pipeline": {name: index[name] for name in _parts(index)}}
    recipe = Recipe("student", folder, files, (0, 0, 0), None, 0, torch.empty(0), own)
    return _student(recipe, steps, network, facts, sampling)


def _student(
    recipe: Recipe, steps: Steps, network: dict[str, Any], facts: dict[str, Any], sampling: Sampling
) -> Recipe:
    """The recipe with a student's steps, its conditions, and the shape of its images."""
    levels = {"sigmas": list(steps.sigmas), "start": steps.start, "floor": steps.floor}
    asked: dict[str, Any] = {}
    prompts = None
    n_classes = class_count(facts, network.get("num_class_embeds"))
    if steps.pipeline == PIXELS:
        if sampling.prompts is not None:
            raise ValueError(f"prompts: {sampling.prompts}; {recipe.folder} has no use for words")
        shape = sample_shape(network)
    else:
        vae = read_keys((recipe.base or recipe.folder) / "vae/config.json")
        asked |= {side: steps.call[side] for side in ("height", "width") if side in steps.call}
        shape = picture_shape(network, vae)[1]
        shape = (shape[0], asked.get("height", shape[1]), asked.get("width", shape[2]))
        n_classes, prompts = _conditions(steps.pipeline, network, sampling, recipe.folder)
        if network.get("guidance_embeds"):
            asked["guidance_embedding"] = steps.call["guidance_scale"]
    return replace(
        recipe,
        shape=shape,
        n_classes=n_classes,
        nfe=len(steps),
        sigmas=torch.tensor([*steps.sigmas, 0.0], dtype=torch.float64),
        settings=recipe.settings | {"kind": "student"} | levels | asked,
        prompts=prompts,
        student=steps,
        latent=steps.pipeline != PIXELS,
        asked=asked,
    )


def _conditions(
    kind: str, network: dict[str, Any], sampling: Sampling, folder: Path
) -> tuple[int | None, tuple[str, ...] | None]:
    """The number of classes of a pipeline of latents, or its prompts. Raises ValueError for too few or too many."""
    n_classes = network.get("num_embeds_ada_norm") if kind == "DiTPipeline" else None
    if (sampling.prompts is None) == (n_classes is None):
        needed = "has classes, and no use for words" if n_classes is not None else "needs a text file of them"
        raise ValueError(f"prompts: {sampling.prompts}; {folder} {needed}")
    return n_classes, None if sampling.prompts is None else read_prompts(Path(sampling.prompts), sampling.column)


def _parts(index: dict[str, Any]) -> list[str]:
    """The parts of a pipeline that samples are made by."""
    return [name for name, part in index.items() if isinstance(part, list) and part[0] and name not in UNUSED]


def _unconditional(folder: Path, index: dict[str, Any], sampling: Sampling) -> Recipe:
    """A UNet2DModel of pixels, with or without classes."""
    network = index.get("unet")
    name = network[1] if isinstance(network, list) and len(network) == 2 else None
    if not (isinstance(network, list) and network[0] == "diffusers" and name in SUPPORTED) or index.get("vqvae"):
        raise ValueError(
            f"{folder}: is a {index.get('_class_name')} with the network {name}; supported are pipelines of a "
            f"{' or '.join(SUPPORTED)} in pixels, and {', '.join(PROMPTED)}"
        )
    unet, facts = read_keys(part_folder(folder, "unet") / "config.json"), read_facts(folder)
    scheduler = _scheduler(folder, index)
    files = _of_parts(folder, ("unet", "scheduler"))
    n_classes = class_count(facts, unet.get("num_class_embeds"))
    own = {"pipeline": {part: index[part] for part in ("unet", "scheduler")}}
    coordinates = coordinates_of(scheduler)
    if "kind" not in facts and type(scheduler).__name__ == CONSISTENCY:
        return _student_folder(folder, index, sampling)
    if sampling.prompts is not None:
        raise ValueError(f"prompts: {sampling.prompts}; {folder} has no use for words")
    if sampling.guidance != 1 and facts.get("null_label") is None:
        raise ValueError(
            f"guidance: {sampling.guidance} needs a null label, and the model names none "
            f'(a file {FACTS} with "classes" and "null_label" beside model_index.json would)'
        )
    sigmas = karras_sigmas(sampling.steps, coordinates.sigma_min, coordinates.sigma_max)
    return _sampled(
        Recipe("teacher", folder, files, sample_shape(unet), n_classes, 0, sigmas, own), sampling, sample_shape(unet)
    )


def _prompted(folder: Path, index: dict[str, Any], sampling: Sampling) -> Recipe:
    """A DiT, Stable Diffusion (XL, 3): latents under classes or prompts."""
    kind = index["_class_name"]
    scheduler = _scheduler(folder, index)
    network = read_keys(folder / PROMPTED[kind] / "config.json")
    latent, shape = picture_shape(network, read_keys(folder / "vae/config.json"))
    n_classes, prompts = _conditions(kind, network, sampling, folder)
    asked = {side: size for side in ("height", "width") if (size := getattr(sampling, side)) is not None}
    if asked and n_classes is not None:
        raise ValueError(f"height, width: {asked}; {folder} makes pictures of {shape[1]} x {shape[2]} only")
    factor = shape[1] // latent[1]
    shape = (shape[0], asked.get("height", shape[1]), asked.get("width", shape[2]))
    latent = (latent[0], shape[1] // factor, shape[2] // factor)
    sigmas = prompt_schedule(scheduler, sampling.steps)
    own = {name: index[name] for name in index if not name.startswith("_") and name not in (*UNUSED, "id2label")}
    files = _of_parts(folder, _parts(index))
    own = {"pipeline": own} | asked
    recipe = Recipe(kind, folder, files, shape, n_classes, 0, sigmas, own, prompts=prompts, latent=True, asked=asked)
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


def _scheduler(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    file = part_folder(folder, "scheduler") / "scheduler_config.json"
    try:
        return getattr(diffusers, index["scheduler"][1]).from_config(read_keys(file))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder}: its model_index.json names no scheduler of diffusers") from error
    except ImportError as error:  # diffusers stands a dummy in for a class that needs what is not installed
        raise ValueError(f"{folder}: its scheduler needs a package that is not installed here") from error


def _of_parts(folder: Path, parts: Any, weights: bool = True) -> tuple[Path, ...]:
    """The files of a pipeline's parts that are read: configurations, vocabularies, and weights without a variant."""
    places = dict.fromkeys(part_folder(folder, part) for part in parts)
    files = [f for place in places for f in sorted(place.glob("*" if place == folder else "**/*")) if f.is_file()]
    chosen = [f for f in files if f.suffix in (".json", ".txt", ".model") or (weights and is_plain_safetensors(f.name))]
    own = [file for file in (folder / FACTS,) if file.is_file()]
    return tuple(dict.fromkeys([*chosen, *own]))
