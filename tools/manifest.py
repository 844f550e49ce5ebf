"""What a batch of evaluations is: a reference, feature spaces with their metrics, and a matrix of samples; no torch.

Every axis of the matrix is a list; jobs are their product, without the points that `exclude` names. The axes say how
samples are made, so a job is one set of images, judged by all metrics at once.
"""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from distill.sections import Count, Positive, Scale, Section, Seed, SolverName
from tools.presets import PRESET_NAMES

METRIC_NAMES = (
    "fd", "relative-fd", "kd", "precision", "recall", "density", "coverage", "vendi", "inception-score", "clip-mmd",
    "class-entropy", "class-accuracy",
)  # fmt: skip
DEFAULT_METRICS = ("fd", "kd", "precision", "recall", "density", "coverage")


def known_metric(name: Any) -> Any:
    """The name, which may be vendi@2, the Vendi score of order 2. Raises ValueError for what is no metric."""
    base, at, order = str(name).partition("@")
    if at and base == "vendi":
        try:
            if float(order) >= 0:
                return name
        except ValueError:
            pass
    if at or base not in METRIC_NAMES:
        raise ValueError(f"{name!r}; accepted are {', '.join(METRIC_NAMES)} and vendi@ORDER, of order 0 to inf")
    return name


def _extractor(spec: Any) -> Any:
    preset, _, rest = str(spec).partition(":")
    own = rest and all(part.isidentifier() for part in preset.split("."))
    if preset not in PRESET_NAMES and not own:
        raise ValueError(
            f"{spec!r}; accepted are {', '.join(PRESET_NAMES)}, PRESET:WEIGHTS, or package.module:attribute of your own"
        )
    return spec


def _several(value: Any) -> Any:
    """An axis may be written as one value."""
    return value if isinstance(value, list | tuple | dict) else (value,)


def _named(value: Any) -> Any:
    """Sources as {name: path}; a path is named after its last part, a pattern stands for what it matches, sorted."""
    if isinstance(value, Mapping):
        return value
    paths = []
    for path in _several(value):
        found = sorted(glob.glob(path)) if isinstance(path, str) and any(c in path for c in "*?[") else [path]
        if not found:
            raise ValueError(f"{path!r} matches nothing")
        paths += found
    named = {Path(str(path)).resolve().name if path != "digits" else "digits": path for path in paths}
    if len(named) < len(paths):
        raise ValueError("two sources have one name; write them as NAME: PATH")
    return named


def _each_once(names: Sequence[Any], where: str) -> None:
    for k, name in enumerate(names):
        if name in names[:k]:
            raise ValueError(f"{where}: {name!r} is there twice")


ALIASES = {"fid": "fd", "kid": "kd"}  # what everybody calls them with Inception

Metric = Annotated[str, BeforeValidator(lambda name: known_metric(ALIASES.get(str(name), name)))]
ExtractorSpec = Annotated[str, BeforeValidator(_extractor)]


class Matrix(Section):
    """The axes: values of each, one or a list."""

    source: Annotated[dict[str, str], BeforeValidator(_named), Field(min_length=1)] = Field(
        description="run folders, pipeline folders, folders or archives of images, as {name: path} or paths; or digits"
    )
    sampler: Annotated[tuple[SolverName, ...], BeforeValidator(_several)] = ("heun",)
    steps: Annotated[tuple[Count, ...], BeforeValidator(_several)] = (18,)
    guidance: Annotated[tuple[Scale, ...], BeforeValidator(_several)] = (1.0,)
    teleport: Annotated[tuple[str | None, ...], BeforeValidator(_several)] = Field(
        (None,), description="files of Gaussians (`distill gaussian`) to jump with; null is no jump"
    )
    sigma_skip: Annotated[tuple[Positive | None, ...], BeforeValidator(_several)] = Field(
        (None,), description="noise levels to jump to; null is where the Gaussian's own bound says"
    )
    tolerance: Annotated[tuple[Positive, ...], BeforeValidator(_several)] = Field(
        (0.05,), description="nats that such a jump may cost"
    )
    prompts: Annotated[tuple[str | None, ...], BeforeValidator(_several)] = Field(
        (None,), description="files of prompts, one a line, for text-to-image pipelines"
    )
    draw: Annotated[tuple[Seed, ...], BeforeValidator(_several)] = Field(
        (0,), description="repetitions: draw j of a generator is made from seed + j, of a folder its j-th n images"
    )

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for axis in AXES[1:]:
            values = getattr(self, axis)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{axis}: {list(values)}; needed are values, each once")
        return self


AXES = tuple(Matrix.model_fields)


@dataclass(frozen=True)
class Point:
    """One point of the matrix: a named source and a value of every other axis."""

    name: str
    path: str
    axes: dict[str, Any]


class Manifest(Section):
    """A batch of evaluations."""

    reference: str | dict[ExtractorSpec, str] = Field(
        description="images to compare with, or the statistics (.npz with mu and sigma) of every extractor"
    )
    features: dict[ExtractorSpec, Annotated[tuple[Metric, ...], BeforeValidator(_several)]] = Field(
        description="extractors, each with its metrics"
    )
    n: Annotated[int, Field(ge=4)] = Field(2000, description="samples of a job; all of a smaller folder")
    seed: Seed = Field(0, description="sample k of draw j is a function of (seed + j, k)")
    chunk: Count = Field(500, description="samples that are computed and kept at once: what a killed run loses")
    batch: Count = Field(100, description="samples that a network sees at once; divides chunk")
    keep: bool = Field(False, description="keep the generated samples as PNG files")
    matrix: Matrix
    exclude: tuple[dict[str, Any], ...] = Field((), description="points to leave out: {axis: value or values}")

    @model_validator(mode="before")
    @classmethod
    def _default_metrics(cls, given: Any) -> Any:
        """`features: [a, b]` gives each the default metrics."""
        if isinstance(given, dict) and isinstance(given.get("features"), str | list | tuple):
            names = _several(given["features"])
            _each_once(names, "features")
            return given | {"features": {str(name): DEFAULT_METRICS for name in names}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.chunk % self.batch:
            raise ValueError(f"batch: {self.batch} does not divide chunk: {self.chunk}")
        if not self.features or not all(self.features.values()):
            raise ValueError("features: needed is an extractor with at least one metric")
        for spec, metrics in self.features.items():
            _each_once(metrics, f"features: {spec}")
        if isinstance(self.reference, dict) and self.reference.keys() != self.features.keys():
            raise ValueError(
                f"reference: has {list(self.reference)}; needed are those of features: {list(self.features)}"
            )
        for excluded in self.exclude:
            for axis, values in excluded.items():
                if axis not in AXES:
                    raise ValueError(f"exclude: unknown axis {axis!r}; axes are {', '.join(AXES)}")
                for value in _several(values):
                    if value not in _values(self.matrix, axis):
                        raise ValueError(
                            f"exclude: {axis} {value!r} is not in the matrix: {_values(self.matrix, axis)}"
                        )
        if not list(self.points()):
            raise ValueError("exclude: leaves no job")
        return self

    def points(self) -> Iterator[Point]:
        """The jobs, sources slowest and draws fastest."""
        for values in product(*(_values(self.matrix, axis) for axis in AXES)):
            point = dict(zip(AXES, values, strict=True))
            if not any(all(point[a] in _several(v) for a, v in excluded.items()) for excluded in self.exclude):
                name = point.pop("source")
                yield Point(name, self.matrix.source[name], point)


def _values(matrix: Matrix, axis: str) -> list[Any]:
    return list(getattr(matrix, axis))


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys, and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value]
        for k, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:k]]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
        return node


def read_manifest(path: str | Path) -> Manifest:
    """Reads a YAML manifest. Raises ValueError, naming the file, the field and what is accepted, if it is not one."""
    return manifest_of(read_content(path), str(path))


def read_content(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML manifest, as they are. Raises ValueError, naming the file, for what is no mapping."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"manifest: {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"manifest: {path} is not a mapping of settings to values")
    return content


def manifest_of(content: dict[str, Any], where: str) -> Manifest:
    """A manifest from its fields. Raises ValueError, in one line, as `read_manifest` does."""
    matrix = content.get("matrix")
    _refuse_unknown(content, Manifest.model_fields, f"{where}: unknown setting", "settings")
    _refuse_unknown(matrix if isinstance(matrix, dict) else (), AXES, f"{where}: matrix: unknown axis", "axes")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "value_error")  # our words before pydantic's
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
        given = "" if first["type"] == "value_error" or isinstance(first["input"], dict) else f": {first['input']!r}"
        raise ValueError(f"manifest: {where}: {field}{given}{': ' if field else ''}{message}") from error


def _refuse_unknown(given: Iterable[Any], known: Iterable[str], what: str, these: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"manifest: {what} {str(unknown[0])!r}; {these} are {', '.join(known)}")
