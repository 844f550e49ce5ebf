"""Words from files: what is read is what was written by Python's own writers, and every mistake has its line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.captions import captioned, read_prompts

WORDS = ("a red fox", 'a "green", hill', "bär, élan\nin two lines", "{not json")


def png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), len(path.name), np.uint8)).save(path)


def test_text_is_one_prompt_a_line_whatever_its_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    for text in (b"a fox\nred hill", b"\xef\xbb\xbfa fox\r\n red hill \r\n\r\n", b"a fox\rred hill\r"):
        file.write_bytes(text)
        assert read_prompts(file) == ("a fox", "red hill")
    file.write_text("bär", "utf-8")
    assert read_prompts(str(file)) == ("bär",)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_columns_are_read_as_they_were_written(tmp_path: Path, bom: str) -> None:
    with (tmp_path / "words.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(bom)
        csv.writer(file).writerows([("id", "caption", "text"), *((k, w, "other") for k, w in enumerate(WORDS))])
    rows = [json.dumps({"id": k, "caption": w, "text": "other"}, ensure_ascii=bool(k % 2)) for k, w in enumerate(WORDS)]
    (tmp_path / "words.jsonl").write_text(bom + "\n".join(rows) + "\n\n", "utf-8")
    for name in ("words.csv", "words.jsonl"):
        assert read_prompts(tmp_path / name) == WORDS
        assert read_prompts(tmp_path / name, "text") == ("other",) * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n", r"a\.txt is empty"),
        ("a.txt", b"a fox\n \nred hill", r"a\.txt has no words in line 2; needed is one prompt a line"),
        ("a.txt", b"\na fox", r"a\.txt has no words in line 1"),
        ("a.jsonl", b'{"caption": "a \\ud800 fox"}', r"a\.jsonl has no words in line 1, but half of a character"),
        ("a.txt", b"a fox\nred \xff hill\n", r"a\.txt cannot be read as text in UTF-8, by line 2"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"caption\n", r"a\.csv is empty"),
        ("a.csv", b"id,text\n1,fox\n", r"a\.csv, line 1: has no column 'caption'; there are id, text"),
        ("a.csv", b"caption,caption\na,b\n", r"line 1: has more than one column 'caption'"),
        ("a.csv", b'caption,id\n"a\nfox",1\n"b\nhill",2\n  ,3\n', r"a\.csv has no words in line 6"),
        ("a.csv", b'caption,id\n"a\nfox",1\nhill\n', r"a\.csv, line 4: has 1 fields; the header has 2"),
        ("a.csv", b'caption\nfox\n"hill\n', r"a\.csv, line 3: is not CSV"),
        ("a.csv", b"caption\nfox\n\xe4\n", r"UTF-8, by line 3"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"caption": "fox"}\n{"caption": \n', r"a\.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"caption": "fox"}\n\n{"caption": "hill"}\n', r"a\.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'["caption"]\n', r"a\.jsonl, line 1: is no JSON object"),
        ("a.jsonl", b'{"caption": "fox"}\n{"text": "hill"}\n', r"line 2: has no column 'caption'; there are text"),
        ("a.jsonl", b'{"caption": 7}\n', r"line 1: caption is 7; accepted is text"),
        ("a.jsonl", b'{"caption": "fox"}\n{"caption": " "}\n', r"a\.jsonl has no words in line 2"),
        ("a.json", b'["fox"]', r"a\.json; accepted are files named \.txt, \.csv, \.jsonl"),
    ],
)
def test_what_cannot_be_right_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert str(error.value).startswith("prompts: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere.csv", "."):
        with pytest.raises(ValueError, match="cannot be read"):
            read_prompts(tmp_path / name)


# --- folders of images


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        png(root / name)
    return root


def test_words_lie_beside_the_images(tmp_path: Path) -> None:
    pictures(tmp_path, "b.png", "00/a.png", "01/c.jpg")
    for name, words in (("b", "a fox,\n  red\n"), ("00/a", "hill"), ("01/c", "élan")):
        (tmp_path / f"{name}.txt").write_text(words, "utf-8")
    (tmp_path / "notes.txt").write_text("of nothing")
    files, words = captioned(tmp_path, 4)
    assert [f.relative_to(tmp_path).as_posix() for f in files.files] == ["00/a.png", "01/c.jpg", "b.png"]
    assert words == ("hill", "élan", "a fox, red")
    assert files.labels is None  # sub-folders are no classes here
    assert files.read([0]).shape == (1, 3, 4, 4)

    (tmp_path / "01/c.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"01/c\.txt has no words"):
        captioned(tmp_path, 4)
    (tmp_path / "01/c.txt").unlink()
    with pytest.raises(ValueError, match=r"01/c\.jpg has no c\.txt beside it, and others have"):
        captioned(tmp_path, 4)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_table_names_every_image(tmp_path: Path, kind: str, inside: bool) -> None:
    root = pictures(tmp_path / "images", "b.png", "00/a.png")
    table = root / f"metadata.{kind}" if inside else tmp_path / f"words.{kind}"
    given = None if inside else table

    def write(*rows: tuple[str, str]) -> None:
        if kind == "csv":
            with table.open("w", newline="") as file:
                csv.writer(file).writerows([("file_name", "caption"), *rows])
        else:
            table.write_text("\n".join(json.dumps({"file_name": n, "caption": c}) for n, c in rows))

    def refused(message: str, *rows: tuple[str, str]) -> None:
        write(*rows)
        with pytest.raises(ValueError, match=message):
            captioned(root, 4, metadata=given)

    write(("b.png", "fox"), ("./00/a.png", "hill"))
    files, words = captioned(root, 4, metadata=given)
    assert words == ("hill", "fox")
    assert [f.name for f in files.files] == ["a.png", "b.png"]
    line = 3 if kind == "csv" else 2
    refused(rf"line {line}: 'c\.png' is no image below", ("b.png", "fox"), ("c.png", "hill"))
    refused(rf"line {line}: b\.png had a line before", ("b.png", "fox"), ("b.png", "hill"))
    refused(r"has no line for .*00/a\.png", ("b.png", "fox"))
    refused(rf"has no words in line {line}", ("b.png", "fox"), ("00/a.png", ""))
    with pytest.raises(ValueError, match="has no column 'text'; there are file_name, caption"):
        captioned(root, 4, column="text", metadata=given)


def test_which_words_are_meant_is_never_guessed(tmp_path: Path) -> None:
    pictures(tmp_path, "ant/b.png", "zebra/a.png")
    files, words = captioned(tmp_path, 4)
    assert (words, files.classes) == (None, ("ant", "zebra"))
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"has metadata\.csv and metadata\.jsonl; accepted is one of them"):
        captioned(tmp_path, 4)
    (tmp_path / "words.txt").write_text("a fox\nhill")
    with pytest.raises(ValueError, match=r"words\.txt; words for images are in a \.csv or \.jsonl with the column"):
        captioned(tmp_path, 4, metadata=tmp_path / "words.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        captioned(tmp_path / "empty", 4)
