"""Words from files: lists of prompts, and what is said of the images of a folder.

A list is text (one prompt a line), CSV (with a header) or JSON lines. A folder of images has a `metadata.csv` or
`metadata.jsonl` with a column `file_name` (the convention of the ImageFolder of `datasets`), or a NAME.txt beside each
image. What cannot be right is named with its file and its line.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from distill.data import ImageFiles, found_images, image_files

FORMATS = (".txt", ".csv", ".jsonl")
_NAME = "file_name"
_METADATA = ("metadata.csv", "metadata.jsonl")


def read_prompts(file: str | Path, column: str = "caption") -> tuple[str, ...]:
    """The prompts of a .txt (one a line), .csv or .jsonl (of a column), UTF-8, in their order.

    Raises ValueError, naming the file and the line, for an empty file, a prompt without words, what is not UTF-8, a
    row that is none, and a missing column (with those there are).
    """
    file = Path(file)
    prompts = [
        _words(row[column], f"prompts: {file} has no words in line {number}; needed is one prompt a line")
        for number, row in _rows(file, column)
    ]
    if not prompts:
        raise ValueError(f"prompts: {file} is empty; needed is a prompt or more")
    return tuple(prompts)


def captioned(
    path: str | Path, size: int, channels: int = 3, column: str = "caption", metadata: str | Path | None = None
) -> tuple[ImageFiles, tuple[str, ...] | None]:
    """The images below `path`, and the words for each: of `metadata`, else the folder's own, else None.

    A folder with captions may have sub-folders, which are no classes then; without, they are (`distill.data`). Raises
    ValueError, naming the file, for an image without words, and words without an image.
    """
    root = Path(path)
    files = found_images(root)
    own = [root / name for name in _METADATA if (root / name).is_file()]
    if metadata is None and len(own) > 1:
        raise ValueError(f"data.path: {root} has {' and '.join(_METADATA)}; accepted is one of them")
    table = Path(metadata) if metadata is not None else own[0] if own else None
    beside = [file.with_suffix(".txt") for file in files]
    if table is not None:
        words = _by_name(table, column, root, files)
    elif any(text.is_file() for text in beside):
        words = tuple(_beside(file, text) for file, text in zip(files, beside, strict=True))
    else:
        return image_files(root, size, channels), None
    return ImageFiles(files, size, channels), words


def _by_name(table: Path, column: str, root: Path, files: tuple[Path, ...]) -> tuple[str, ...]:
    """The captions of images, by a table that names each of them once."""
    if table.suffix not in FORMATS[1:]:
        raise ValueError(f"prompts: {table}; words for images are in a .csv or .jsonl with the column {_NAME}")
    known = {file.relative_to(root).as_posix() for file in files}
    found: dict[str, str] = {}
    for number, row in _rows(table, column, _NAME):
        name = Path(row[_NAME]).as_posix()
        if name not in known:
            raise ValueError(f"prompts: {table}, line {number}: {row[_NAME]!r} is no image below {root}")
        if name in found:
            raise ValueError(f"prompts: {table}, line {number}: {name} had a line before")
        found[name] = _words(row[column], f"prompts: {table} has no words in line {number}")
    for file in files:
        if file.relative_to(root).as_posix() not in found:
            raise ValueError(f"prompts: {table} has no line for {file}; needed is one for each image")
    return tuple(found[file.relative_to(root).as_posix()] for file in files)


def _beside(image: Path, text: Path) -> str:
    if not text.is_file():
        raise ValueError(
            f"prompts: {image} has no {text.name} beside it, and others have; needed is one for each image"
        )
    return _words(" ".join(_text(text).split()), f"prompts: {text} has no words")


def _words(text: str, otherwise: str) -> str:
    stripped = text.strip()
    if not stripped:
        raise ValueError(otherwise)
    try:
        stripped.encode()
    except UnicodeEncodeError as error:  # JSON can say half a character
        raise ValueError(f"{otherwise.partition(';')[0]}, but half of a character ({error.reason})") from error
    return stripped


def _rows(file: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a file, each row with these columns; of text, every line is the first column."""
    if file.suffix == ".csv":
        yield from _csv(file, columns)
    elif file.suffix == ".jsonl":
        yield from _jsonl(file, columns)
    elif file.suffix == ".txt" or not file.is_file():
        for number, line in _lines(file):
            yield number, {columns[0]: line}
    else:
        raise ValueError(f"prompts: {file}; accepted are files named {', '.join(FORMATS)}")


def _csv(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(_text(file).rstrip("\r\n"), newline=""), strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for row in reader:
            number, before = before + 1, reader.line_num  # a quoted prompt may have several lines: its first
            if header is None:
                header = [name.strip() for name in row]
                _check(file, number, columns, header)
            elif len(row) != len(header):
                raise ValueError(f"prompts: {file}, line {number}: has {len(row)} fields; the header has {len(header)}")
            else:
                yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"prompts: {file}, line {before + 1}: is not CSV ({error})") from error


def _jsonl(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"prompts: {file}, line {number}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"prompts: {file}, line {number}: is no JSON object, which has keys")
        _check(file, number, columns, list(row))
        for name in columns:
            if not isinstance(row[name], str):
                raise ValueError(f"prompts: {file}, line {number}: {name} is {row[name]!r}; accepted is text")
        yield number, row


def _check(file: Path, number: int, columns: tuple[str, ...], there: list[str]) -> None:
    for name in columns:
        if there.count(name) != 1:
            how = "no" if name not in there else "more than one"
            raise ValueError(f"prompts: {file}, line {number}: has {how} column {name!r}; there are {', '.join(there)}")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text, numbered from 1, without those after the last word."""
    text = _text(file).replace("\r\n", "\n").replace("\r", "\n").rstrip()
    yield from enumerate(text.split("\n") if text else [], start=1)


def _text(file: Path) -> str:
    """What is in a file. Raises ValueError, naming the line, for what is not UTF-8."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"prompts: {file} cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(f"prompts: {file} cannot be read as text in UTF-8, by line {number} ({error})") from error
