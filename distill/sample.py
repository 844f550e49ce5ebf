"""`distill sample`: its options made into generators of images, and those into pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from distill.particles import TargetChoice


def sample(arguments: Namespace) -> Iterator[str]:
    """Writes the pictures that the command's options ask for; yields what there is to say.

    Raises ValueError, naming the option, for what does not fit, before any file is read.
    """
    steps = 18 if arguments.steps is None else arguments.steps
    guidance = 1.0 if arguments.guidance is None else arguments.guidance
    if arguments.n < 1 or steps < 1:
        raise ValueError(f"--n, --steps: {arguments.n}, {steps}; both must be at least 1")
    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: {out} is not named .png")

    import torch

    from distill.generate import ImageGenerator, generator_of, usable_device
    from distill.particles import ParticleGenerator, load_particle_generator
    from distill.pictures import save_grid, side_by_side
    from distill.recipe import Sampling, read_recipe

    choice, grids = _target(arguments), []
    device = arguments.device
    usable_device(device)
    named = [_named(source) for source in arguments.sources]
    recipes = []
    if choice is None:
        words = {"prompts": arguments.prompts, "column": arguments.column}
        sizes = {"height": arguments.height, "width": arguments.width}
        sampling = Sampling(arguments.sampler or "heun", steps, guidance, **words, **sizes)
        recipes = [read_recipe(path, sampling) for _, path in named]
        own = ("sampler", "steps", "guidance", "height", "width")
        ignored = [f"--{name}: {getattr(arguments, name)}" for name in own if getattr(arguments, name) is not None]
        if ignored and all(recipe.student is not None for recipe in recipes):
            raise ValueError(f"{ignored[0]}; is for diffusion models: a student has steps and a size of its own")
        if len({recipe.shape for recipe in recipes}) > 1:
            told = ", ".join(f"{name} {list(r.shape)}" for (name, _), r in zip(named, recipes, strict=True))
            raise ValueError(
                f"sources: of pictures {told}; accepted is one shape (--height, --width: of a diffusion model's)"
            )
    for k, (name, path) in enumerate(named):
        generator: ImageGenerator | ParticleGenerator
        if choice is None:
            generator = generator_of(recipes[k], device)
        else:
            generator = load_particle_generator(path, choice, steps, guidance, device)
        rows = 8 if isinstance(generator, ImageGenerator) and generator.latents is not None else 500
        batches = [range(k, min(k + rows, arguments.n)) for k in range(0, arguments.n, rows)]
        grids.append((f"{name}, {generator.nfe} NFE", torch.cat([generator(arguments.seed, b) for b in batches])))
        if isinstance(generator, ParticleGenerator) and generator.choice.particles > 1:
            yield f"{name}: {generator.report}"
    if len(grids) == 1:
        save_grid(grids[0][1], out)
    else:
        side_by_side(grids, out)
    yield f"{out}: {arguments.n} samples each of {', '.join(title for title, _ in grids)}"


def _target(arguments: Namespace) -> "TargetChoice | None":
    """What the options of a corrector ask for; None without --target, which every other option needs."""
    names = ("particles", "beta", "classes", "reward", "scale")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.steer:
        given["steer"] = True
    if arguments.target is None:
        if given:
            raise ValueError(f"--{next(iter(given))}: is for --target guided, annealed, product or reward")
        return None
    if arguments.sampler is not None:
        raise ValueError(f"--sampler: {arguments.sampler} is not for --target, whose particles have steps of their own")
    for name in ("prompts", "height", "width"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: {getattr(arguments, name)} is not for --target, which is of pixels")
    uses = {"guided": (), "annealed": ("beta",), "product": ("beta", "classes"), "reward": ("reward", "scale", "steer")}
    for name in given:
        if name not in ("particles", *uses[arguments.target]):
            raise ValueError(f"--{name}: is not for --target {arguments.target}")

    from distill.particles import TargetChoice, import_reward

    if "reward" in given:
        given["reward"] = import_reward(given["reward"])
    if "classes" in given:
        given["classes"] = tuple(given["classes"])
    return TargetChoice(arguments.target, **given)


def _named(source: str) -> tuple[str, str]:
    """NAME=PATH, or a path that is named after its last part."""
    name, equals, path = source.partition("=")
    return (name, path) if equals and not Path(source).exists() else (Path(source).name, source)
