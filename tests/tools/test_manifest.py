"""What a manifest may say, and in which words it is told what it may not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.manifest import AXES, DEFAULT_METRICS, METRIC_NAMES, Manifest, Point, manifest_of, read_manifest
from tools.presets import PRESET_NAMES

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "configs").glob("*evaluation.yaml"))
LEAST: dict[str, Any] = {"reference": "digits", "features": "digits", "matrix": {"source": "digits"}}


def of(matrix: dict[str, Any] | None = None, **fields: Any) -> Manifest:
    return manifest_of(LEAST | fields | {"matrix": LEAST["matrix"] | (matrix or {})}, "m.yaml")


def axes(manifest: Manifest, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(point.axes[name] for name in names) for point in manifest.points()]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_a_manifest_of_ours_is_read_and_read_again_the_same(file: Path, tmp_path: Path) -> None:
    manifest = read_manifest(file)
    assert not any(Path(path).is_absolute() for path in manifest.matrix.source.values())
    record = tmp_path / "m.yaml"
    record.write_text(yaml.safe_dump(manifest.model_dump(mode="json"), sort_keys=False))
    assert read_manifest(record) == manifest
    assert list(read_manifest(record).points()) == list(manifest.points())


def test_the_table_of_the_demo_has_a_manifest() -> None:
    assert "digits-evaluation" in [file.stem for file in MANIFESTS]


def test_the_least_manifest_has_one_job_and_the_default_metrics() -> None:
    manifest = of()
    assert manifest.features == {"digits": DEFAULT_METRICS}
    (point,) = manifest.points()
    assert point == Point("digits", "digits", point.axes)
    assert list(point.axes) == [axis for axis in AXES if axis != "source"]
    assert (point.axes["sampler"], point.axes["steps"], point.axes["draw"]) == ("heun", 18, 0)
    assert (manifest.n, manifest.chunk, manifest.batch) == (2000, 500, 100)


def test_a_manifest_is_frozen_and_closed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        of().n = 3  # type: ignore[misc]


def test_the_matrix_is_the_product_of_its_axes_sources_slowest_and_draws_fastest() -> None:
    manifest = of({"source": {"a": "x", "b": "y"}, "steps": [4, 2], "draw": [1, 0]})
    assert [(p.name, p.path, p.axes["steps"], p.axes["draw"]) for p in manifest.points()] == [
        (name, path, steps, draw) for name, path in (("a", "x"), ("b", "y")) for steps in (4, 2) for draw in (1, 0)
    ]


def test_every_axis_takes_one_value_or_a_list() -> None:
    one = {"sampler": "euler", "steps": 3, "guidance": 2, "teleport": "g.npz", "sigma_skip": 1.5, "tolerance": 0.5,
           "prompts": "p.txt", "draw": 7}  # fmt: skip
    assert {"source", *one} == set(AXES)
    assert list(of(one).points()) == list(of({axis: [value] for axis, value in one.items()}).points())
    (point,) = of(one).points()
    assert point.axes == one


def test_null_is_a_value_of_an_axis() -> None:
    assert axes(of({"teleport": [None, "g.npz"]}), "teleport") == [(None,), ("g.npz",)]


# Exclude


def test_a_point_is_left_out_where_all_axes_of_an_entry_agree() -> None:
    matrix = {"source": {"a": "x", "b": "y"}, "steps": [2, 4], "guidance": [1, 3]}
    kept = of(matrix, exclude=[{"source": "b", "steps": [2, 4], "guidance": 3}, {"source": "a", "steps": 4}])
    assert [(p.name, p.axes["steps"], p.axes["guidance"]) for p in kept.points()] == [
        ("a", 2, 1), ("a", 2, 3), ("b", 2, 1), ("b", 4, 1),
    ]  # fmt: skip


def test_null_can_be_excluded() -> None:
    manifest = of({"teleport": [None, "g.npz"], "steps": [2, 4]}, exclude=[{"teleport": None, "steps": 2}])
    assert axes(manifest, "teleport", "steps") == [("g.npz", 2), (None, 4), ("g.npz", 4)]


# Sources


def test_sources_are_named_after_the_last_part_of_their_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of({"source": ["runs/a", "runs/b/", "c.zip"]}).matrix.source == {
        "a": "runs/a", "b": "runs/b/", "c.zip": "c.zip",
    }  # fmt: skip
    assert of({"source": "."}).matrix.source == {tmp_path.name: "."}


def test_a_pattern_stands_for_what_it_matches_in_order(tmp_path: Path) -> None:
    for name in ("run-b", "run-a", "other", "run-c"):
        (tmp_path / name).mkdir()
    found = of({"source": [f"{tmp_path}/run-[ab]", "digits"]}).matrix.source
    assert list(found.items()) == [
        ("run-a", f"{tmp_path}/run-a"), ("run-b", f"{tmp_path}/run-b"), ("digits", "digits"),
    ]  # fmt: skip


# Features and metrics


@pytest.mark.parametrize(
    "spec", [*PRESET_NAMES, "inception-clean:weights/a.pth", "package.module:attribute", "module:attribute"]
)
def test_an_extractor_is_a_preset_or_ones_own(spec: str) -> None:
    assert of(features=spec).features == of(features=[spec]).features == {spec: DEFAULT_METRICS}
    assert of(features={spec: "fd"}).features == {spec: ("fd",)}


@pytest.mark.parametrize("metric", [*METRIC_NAMES, "vendi@0", "vendi@0.5", "vendi@inf"])
def test_a_metric_is_one_of_the_names_or_a_vendi_score_of_an_order(metric: str) -> None:
    assert of(features={"digits": [metric]}).features["digits"] == (metric,)


def test_a_reference_may_be_the_statistics_of_every_extractor() -> None:
    files = {"digits": "d.npz", "pixels": "p.npz"}
    assert of(features=list(files), reference=files).reference == files


# Mistakes


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ({"nfe": [3]}, "matrix: unknown axis 'nfe'; axes are source, sampler, steps"),
        ({5: [3], "nfe": 1}, "matrix: unknown axis '5'; axes are source"),
        ({"source": []}, "matrix.source: []: "),
        ({"source": {}}, "matrix.source"),
        ({"source": "nowhere/*"}, "matrix.source: 'nowhere/*' matches nothing"),
        ({"source": ["x/a", "y/a"]}, "matrix.source: two sources have one name; write them as NAME: PATH"),
        ({"source": 5}, "Input should be a valid string"),
        ({"sampler": "ddim"}, "matrix.sampler.0: 'ddim': Input should be 'euler', 'heun'"),
        ({"steps": 0}, "matrix.steps.0: 0: Input should be greater than or equal to 1"),
        ({"steps": [2, 4, 2]}, "matrix: steps: [2, 4, 2]; needed are values, each once"),
        ({"guidance": [1, 1.0]}, "matrix: guidance: [1.0, 1.0]; needed are values, each once"),
        ({"steps": []}, "matrix: steps: []; needed are values"),
        ({"steps": "few"}, "matrix.steps.0: 'few'"),
        ({"guidance": float("nan")}, "matrix.guidance.0: nan"),
        ({"guidance": -1}, "matrix.guidance.0: -1"),
        ({"tolerance": 0}, "matrix.tolerance.0: 0"),
        ({"sigma_skip": -1}, "matrix.sigma_skip.0: -1"),
        ({"draw": -1}, "matrix.draw.0: -1"),
    ],
)
def test_a_matrix_that_is_none_is_told_so(matrix: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^manifest: m\.yaml: ") as error:
        of(matrix)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": [{"nfe": 3}]}, "exclude: unknown axis 'nfe'; axes are source"),
        ({"exclude": [{"steps": 19}]}, "exclude: steps 19 is not in the matrix: [18]"),
        ({"exclude": [{"steps": [18, 19]}]}, "exclude: steps 19 is not in the matrix: [18]"),
        ({"exclude": [{"source": "b"}]}, "exclude: source 'b' is not in the matrix: ['digits']"),
        ({"exclude": [{"steps": 18}]}, "exclude: leaves no job"),
        ({"exclude": [{}]}, "exclude: leaves no job"),
        ({"exclude": {"steps": 18}}, "exclude: Input should be a valid list"),
        ({"features": {}}, "features: needed is an extractor"),
        ({"features": {"digits": []}}, "features: needed is an extractor with at least one metric"),
        ({"features": "inception"}, "features.inception.[key]: 'inception'; accepted are digits, pixels, inception"),
        ({"features": "inception"}, "package.module:attribute of your own"),
        ({"features": "inceptin-clean:w.pth"}, "'inceptin-clean:w.pth'; accepted are"),
        ({"features": "package.module"}, "'package.module'; accepted are"),
        ({"features": "module:"}, "'module:'; accepted are"),
        ({"features": {"digits": "fld"}}, "features.digits.0: 'fld'; accepted are fd, relative-fd"),
        ({"features": {"digits": ["fd", "kd", "fd"]}}, "features: digits: 'fd' is there twice"),
        ({"features": {"digits": "vendi@-1"}}, "'vendi@-1'; accepted are"),
        ({"features": {"digits": "vendi@nan"}}, "'vendi@nan'; accepted are"),
        ({"features": {"digits": "vendi@"}}, "'vendi@'; accepted are"),
        ({"features": {"digits": "fd@2"}}, "'fd@2'; accepted are"),
        ({"features": {"digits": None}}, "digits.0: None; accepted are"),
        ({"features": None}, "features"),
        ({"features": ["digits", "digits"]}, "features: 'digits' is there twice"),
        ({"reference": None}, "reference"),
        ({"reference": {"pixel": "p.npz"}}, "'pixel'; accepted are digits, pixels, inception"),
        ({"reference": {"pixels": "p.npz"}}, "reference: has ['pixels']; needed are those of features: ['digits']"),
        ({"n": 3}, "n: 3: Input should be greater than or equal to 4"),
        ({"n": "many"}, "n: 'many'"),
        ({"batch": 300}, "batch: 300 does not divide chunk: 500"),
        ({"chunk": 0}, "chunk: 0"),
        ({"seed": 2**32}, "seed: 4294967296"),
        ({"sede": 3}, "unknown setting 'sede'; settings are reference, features, n"),
        ({7: 3}, "unknown setting '7'; settings are"),
        ({"matrix": None}, "matrix"),
        ({"matrix": [1]}, "matrix"),
    ],
)
def test_settings_that_are_none_are_told_so(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^manifest: m\.yaml: ") as error:
        manifest_of(LEAST | fields, "m.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["reference", "features", "matrix"])
def test_what_is_needed_is_asked_for(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"m\.yaml: {missing}: Field required"):
        manifest_of({name: value for name, value in LEAST.items() if name != missing}, "m.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n:\t5\n\tseed: 3", "cannot be read"),
        (b"features: [digits", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"!!python/object/apply:os.system [ls]", "cannot be read"),
        (b"n: 100\nn: 200", "'n' is there twice"),
        (b"matrix:\n  steps: 3\n  steps: 4", "'steps' is there twice"),
        (b"", "is not a mapping"),
        (b"- a\n- b", "is not a mapping"),
        (b"just words", "is not a mapping"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_manifest_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path)


def test_the_schema_loads_no_torch() -> None:
    code = "import sys, tools.manifest; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_what_everybody_calls_them_is_understood() -> None:
    asked = manifest_of(
        {"reference": "digits", "features": {"pixels": ["fid", "kid"]}, "matrix": {"source": "digits"}}, "m"
    )
    assert asked.features == {"pixels": ("fd", "kd")}
