"""Batches by the command, in processes of its own, and what is made of their results."""

import csv
import io
import json
from pathlib import Path

from PIL import Image

from tests.tools.batches import forked
from tools.digest import digest_json
from tools.results import Result


def result_of(batch: Path, name: str, **axes: object) -> Path:
    """The file of a source's result at some point of the matrix."""
    for file in sorted((batch / "results").glob("*.json")):
        result = Result.load(file)
        if result.name == name and result.axes | axes == result.axes:
            return file
    raise AssertionError(f"{name} has no result at {axes}")


def test_a_batch_prints_its_table_and_again_from_its_results(batch: Path) -> None:
    said = (batch.parents[1] / "said").read_text()
    lines = [line.split(" | ")[:2] for line in said.splitlines()[:6]]
    assert lines[2:] == [["| pics", "–"], ["| student", "–"], ["| teacher", "1"], ["| teacher", "2"]]
    again = forked("batch", "m.yaml", cwd=batch.parents[1])
    assert again.stdout == said
    assert again.stderr.splitlines() == ["4 of 4 results are there"]
    assert forked("report", batch, cwd=batch).stdout.splitlines()[0] == said.splitlines()[0]


def test_a_result_says_all_that_decided_it(batch: Path, inputs: Path) -> None:
    result = Result.load(result_of(batch, "teacher", steps=2))
    assert (result.n, result.nfe, result.axes["sampler"], result.axes["draw"]) == (24, 2, "euler", 0)
    assert result.facts["pairing"] == {"which": {"seed": 3}, "of": None}
    assert list(result.values) == ["digits", "pixels"]
    assert result.facts["references"]["digits"]["n"] == 60
    assert result.inputs["source"] == str(inputs / "teacher")
    how = result.provenance
    assert how["command"] == "distill-fid batch m.yaml"
    assert {"torch", "numpy", "python", "diffusers"} <= how["versions"].keys()
    assert how["processes"] == 1
    assert how["made_on"] == {space: [how["judged_on"]] for space in ("digits", "pixels")}
    assert how["judged_on"].endswith("full float32, one thread")
    assert how["seconds"] > 0


def test_report_writes_tables_and_pictures(batch: Path, tmp_path: Path) -> None:
    options = ("--csv", "new/all.csv", "--markdown", "new/all.md", "--plots", "plots", "--list")
    result = forked("report", batch, *options, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "new" / "all.md").read_text() in result.stdout
    assert f"{result_of(batch, 'student').name}: student (draw 0)" in result.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "all.csv").read_text())))
    assert len(rows) == 4 * 4
    by_key = {(row["key"], row["extractor"], row["metric"]): row for row in rows}
    for file in (batch / "results").iterdir():
        kept = Result.load(file)
        for space, metrics in kept.values.items():
            for metric, estimate in metrics.items():
                row = by_key[kept.key, kept.facts["extractors"][space], metric]
                assert float(row["value"]) == estimate.value
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [picture.name for picture in pictures] == ["digits-fd.png", "digits-kd.png", "pixels-fd.png",
                                                      "pixels-precision.png"]  # fmt: skip
    for picture in pictures:
        Image.open(picture).verify()
        assert f"plots/{picture.name}" in result.stdout.splitlines()


def test_report_says_where_there_is_nothing_to_draw(batch: Path, tmp_path: Path) -> None:
    result = forked("report", result_of(batch, "student"), "--plots", "plots", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr.startswith("plots: none")
    assert not list(tmp_path.iterdir())


def signed(content: dict) -> dict:
    """As one would who knows how a file is signed."""
    unsigned = {name: value for name, value in content.items() if name != "sha256"}
    return unsigned | {"sha256": digest_json(unsigned)}


def test_two_results_of_one_key_that_differ_are_refused_naming_both(batch: Path, tmp_path: Path) -> None:
    file = result_of(batch, "pics")
    content = json.loads(file.read_text())
    content["values"]["digits"]["kd"]["value"] += 1e-12
    (tmp_path / "other.json").write_text(json.dumps(signed(content)))
    result = forked("report", batch, "other.json", cwd=tmp_path)
    assert result.returncode == 2
    assert f"{file} and other.json have one key, {file.stem}, and other values" in result.stderr


def test_compare_says_whether_the_same_noise_became_better(batch: Path, tmp_path: Path) -> None:
    a, b = (result_of(batch, "teacher", steps=steps) for steps in (1, 2))
    result = forked("compare", a, b, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    head, _, *rows, blank, paired, _ = result.stdout.splitlines()
    assert head.startswith("|  | teacher (sampler euler, steps 1, ")
    assert [row.split(" | ")[0] for row in rows] == ["| digits fd", "| digits kd", "| pixels fd", "| pixels precision"]
    assert (blank, paired) == ("", "- paired by sample number")
    assert "not paired" in forked("compare", a, result_of(batch, "pics"), cwd=tmp_path).stdout


def test_verify_says_so_and_exits_with_1_where_it_is_not_so(batch: Path, tmp_path: Path) -> None:
    file = result_of(batch, "teacher", steps=2)
    good = forked("verify", file, cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines() == [
        f"key: {file.stem}, and the file is as it was written",
        "inputs: unchanged",
        "values: all 4 are the same to the bit",
    ]
    content = json.loads(file.read_text())
    content["values"]["digits"]["fd"]["value"] *= 2
    (tmp_path / "changed.json").write_text(json.dumps(signed(content)))
    bad = forked("verify", "changed.json", "--recompute", "--device", "cpu", cwd=tmp_path)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1].startswith("NOT VERIFIED: values: digits fd value is ")
    content["facts"]["n"] = 5
    (tmp_path / "forged.json").write_text(json.dumps(content))
    forged = forked("verify", "forged.json", cwd=tmp_path)
    assert (forged.returncode, forged.stderr.count("\n")) == (2, 1)
    assert "it was changed by hand" in forged.stderr


def test_shards_together_make_the_same_results(batch: Path, inputs: Path, tmp_path: Path) -> None:
    """Half of the jobs each: together they are what one command makes."""
    for shard in ("1/2", "2/2"):
        result = forked("batch", batch.parents[1] / "m.yaml", "--out", "halves", "--shard", shard, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.split("\n\n")[0].splitlines()) == 2 + 2
    whole = {f.name: Result.load(f).values for f in (batch / "results").iterdir()}
    assert {f.name: Result.load(f).values for f in (tmp_path / "halves" / "results").iterdir()} == whole
