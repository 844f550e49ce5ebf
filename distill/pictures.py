"""The pictures that a run leaves: grids of samples and training curves, as PNG."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from samplers.atomic import atomic_write


def save_grid(images: Tensor, path: Path | None, columns: int = 10, shortest: int = 32) -> None:
    """Writes images [N, C, H, W] in [-1, 1] as one PNG; small ones are enlarged to at least `shortest` pixels.

    path: None, here and in `save_points`, on a process that helped to make them and has nothing to write.
    """
    if path is None:
        return
    from PIL import Image
    from torchvision.utils import make_grid

    factor = math.ceil(shortest / images.shape[-1])
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(to_uint8(large), nrow=columns, padding=max(2, factor // 2), pad_value=128)
    _write_png(Image.fromarray(grid.permute(1, 2, 0).numpy()), path)


def side_by_side(rows: list[tuple[str, Tensor]], path: Path, columns: int = 10) -> None:
    """Writes titled grids of images [N, C, H, W] in [-1, 1] next to each other as one PNG."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    figure = Figure(figsize=(4.2 * len(rows), 4.6), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        grid = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=128)
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    save_figure(figure, path)


def save_points(points: Tensor, reference: Tensor, path: Path | None) -> None:
    """Draws points [N, d] over reference points [M, d] as one PNG: a scatter of the plane, or histograms of a line."""
    if path is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    sets = ((reference, "lightgrey", "target"), (points, "tab:blue", "student"))
    for data, color, label in sets:
        columns = data.detach().cpu().float().T.numpy()
        if len(columns) == 1:
            axes.hist(columns[0], bins=100, density=True, color=color, alpha=0.7, label=label)
        else:
            axes.scatter(columns[0], columns[1], s=2, color=color, label=label)
    axes.legend(loc="upper right")
    save_figure(figure, path)


def save_curves(metrics_file: Path, path: Path) -> None:
    """Draws every metric of a metrics.jsonl against the step, one panel each, four to a row, as one PNG; none where
    there are no metrics yet.

    Where the lines have a `node`, dotted lines mark the switches of the target.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()] if metrics_file.is_file() else []
    names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "seconds")))
    if not names:
        return
    switches = node_switches(lines)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1, marker="." if len(points) < 10 else None)
        for step in switches:
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if min(values) > 0:
            axes.set_yscale("log")
    save_figure(figure, path)


def node_switches(lines: list[dict[str, float]]) -> list[float]:
    """The steps at which a run's target has become another one: the node, rounded up, is another than a line before."""
    nodes = [(line["step"], math.ceil(line["node"])) for line in lines if "node" in line]
    return [after[0] for before, after in pairwise(nodes) if before[1] != after[1]]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a PNG holds them: 127.5 x + 128, clipped, rounded down."""
    return (127.5 * images.detach().cpu().float() + 128).clamp(0, 255).to(torch.uint8)


def save_figure(figure: object, path: Path) -> None:
    """Writes a figure of matplotlib as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)  # type: ignore[attr-defined]


def _write_png(image: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        image.save(file, format="PNG")  # type: ignore[attr-defined]
