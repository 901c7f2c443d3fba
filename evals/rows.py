"""Where data comes from: local JSON lines, the hub, and text files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpress.evals.task import TaskError
from kvpress.haystack import book_text, split_sentences

Kind = type | tuple[type, ...]  # as isinstance takes it
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


def read_rows(path: Path, required: Mapping[str, Kind], how_to_get: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file.

    Args:
        path: the file.
        required: fields that every row must have, and their types.
        how_to_get: ends the message about a missing file.

    Raises:
        TaskError: as `located_rows`, or a row that is no JSON object or lacks a field.
    """
    for where, row in located_rows(path, how_to_get):
        yield check_row(row, required, where)


def located_rows(path: Path, how_to_get: str) -> Iterator[tuple[str, Any]]:
    """What stands on each line of a JSON lines file, and where: "file, line 7".

    Raises:
        TaskError: no such file, nothing in it, or a line that is no UTF-8 text or no JSON; with the line's number.
    """
    if not path.is_file():
        raise TaskError(f"there is no file {path}; {how_to_get}")
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TaskError(
                    f"{where}: no UTF-8 text (byte {error.start + 1} is {line[error.start]:#04x}); save the file as UTF-8"
                ) from error
            if not text.strip():
                continue
            is_empty = False
            try:
                row = json.loads(text)
            except ValueError as error:
                raise TaskError(f"{where}: not valid JSON ({error}); one object per line is needed") from error
            yield where, row
    if is_empty:
        raise TaskError(f"{path} has no rows; put one JSON object on each line")


def hub_rows(
    what: str, required: Mapping[str, Kind], how_to_get: str, path: str, *args: str, **options: Any
) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the hub; `path`, `args` and `options` are those of `datasets.load_dataset`.

    Raises:
        TaskError: the library is missing, the hub cannot be reached, or a row lacks a field.
    """
    for where, row in located_hub_rows(what, how_to_get, path, *args, **options):
        yield check_row(row, required, where)


def located_hub_rows(
    what: str, how_to_get: str, path: str, *args: str, **options: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set, and where each is: "name, row 7"; the arguments are those of `hub_rows`.

    Raises:
        TaskError: the library is missing, the hub cannot be reached, or there are no rows.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError(
            f"{what} comes through datasets; run: pip install 'kvpress-toolkit[eval]', or {how_to_get}"
        ) from error
    try:
        rows = load_dataset(path, *args, **options)
    except Exception as error:  # no network, no such revision, a full disk: they have no common class
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskError(f"cannot load {what} from the hub ({first}); {how_to_get}") from error
    number = 0
    for number, row in enumerate(rows, 1):
        yield f"{what}, row {number}", dict(row)
    if not number:
        raise TaskError(f"{what} has no rows; {how_to_get}")


def check_row(row: Any, required: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """The row, if it is an object with the required fields.

    Raises:
        TaskError: if not; the message begins with `where`.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where}: {str(row)[:40]!r} is no JSON object; give one with {', '.join(required)}")
    for name, kind in required.items():
        if name not in row:
            raise TaskError(f"{where}: no field {name!r}; a row has {', '.join(required)}")
        if not isinstance(row[name], kind) or row[name] == []:
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise TaskError(f"{where}: {name} is {str(row[name])[:40]!r}; give a {wanted} (a list must not be empty)")
    return row


def read_text(source: str) -> str:
    """A text by name: "books" (shipped chapters of three novels), a text file, or a folder whose .txt files are joined.

    Raises:
        TaskError: nothing there, or no text in it.
    """
    if source == "books":
        return book_text()
    path = Path(source).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"cannot read the text {source!r} ({error}); give 'books', a text file or a folder of them"
        ) from error
    if not text.strip():
        raise TaskError(f"there is no text in {path}; give 'books', a text file or a folder with .txt files")
    return text


def haystack_sentences(source: str) -> list[str]:
    """The sentences to hide something in: of `read_text(source)`, or "noise", five short ones that repeat.

    Raises:
        TaskError: as `read_text`.
    """
    return list(NOISE) if source == "noise" else split_sentences(read_text(source))
