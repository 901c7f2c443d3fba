"""A point's directory: what it is, every sample's row as it was made, and a mark when all are there.

| file | content |
|---|---|
| config.json | the point; written before anything is computed, never changed |
| environment.jsonl | one line per session: versions, commit, hardware |
| samples.jsonl | one line per sample, appended when it is answered |
| finished.json | samples, failures and mean score, when no sample is missing |
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

CONFIG, ENVIRONMENT, ROWS, FINISHED, LOCK = (
    "config.json",
    "environment.jsonl",
    "samples.jsonl",
    "finished.json",
    ".lock",
)


class StoreError(RuntimeError):
    """A directory that cannot be read or written; the message names it and the remedy."""


class PointStore:
    """The directory of one point.

    Attributes:
        rows: index -> the sample's latest row, as far as they are known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, Any]] = {}

    @property
    def finished(self) -> dict[str, Any] | None:
        """What the mark says, if there is one."""
        path = self.folder / FINISHED
        return read_json(path) if path.is_file() else None

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Within the block no other process writes here; False if one does already."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.folder / LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def open(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Begin a session, with the lock held: check or write what the point is, and take up the rows that are there.

        Raises:
            StoreError: the directory belongs to another point, a row is broken, or nothing can be written.
        """
        path = self.folder / CONFIG
        if not path.exists():
            write_whole(path, json.dumps(config, indent=1) + "\n")
        elif read_json(path).get("definition") != config["definition"]:
            raise StoreError(
                f"{path} is of another point than {config['id']}; move the folder away, or choose another out"
            )
        for name in (ENVIRONMENT, ROWS):
            drop_torn_line(self.folder / name)
        self.rows = read_rows(self.folder)
        append(self.folder / ENVIRONMENT, environment)

    def add(self, row: dict[str, Any]) -> None:
        """Append a sample's row: it is in the file, whole, when this returns."""
        append(self.folder / ROWS, row)
        self.rows[row["index"]] = row

    def finish(self, samples: int) -> None:
        """Mark the point as done."""
        scores = [row["score"] for row in self.rows.values() if row["error"] is None]
        content = {
            "samples": samples,
            "failed": len(self.rows) - len(scores),
            "score": sum(scores) / len(scores) if scores else None,
        }
        write_whole(self.folder / FINISHED, json.dumps(content) + "\n")


def read_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Index -> the latest row of each sample; a torn last line is passed over.

    Raises:
        StoreError: another line is broken.
    """
    rows = {}
    for number, line in enumerate(_whole_lines(folder / ROWS), 1):
        try:
            row = json.loads(line)
            rows[int(row["index"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder / ROWS}, line {number}: no row of a sample; delete the line to run it again"
            ) from error
    return rows


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The environment of each session, in order."""
    return [json.loads(line) for line in _whole_lines(folder / ENVIRONMENT)]


def find_points(folders: list[Path]) -> list[Path]:
    """The points' directories in and below these folders, each once.

    Raises:
        StoreError: a folder that is not there, or none with a point.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise StoreError(f"there is no folder {folder}; give one that kvpress ablate or eval wrote")
        inside = sorted(path.parent for path in folder.rglob(CONFIG) if (path.parent / ENVIRONMENT).is_file())
        if not inside:
            raise StoreError(f"there are no results in {folder}; give a folder that kvpress ablate or eval wrote")
        found |= {path.resolve(): path for path in inside if path.resolve() not in found}
    return list(found.values())


def is_locked(folder: Path) -> bool:
    """Whether a process is writing to a point's directory now."""
    lock = FileLock(str(folder / LOCK))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path} ({error}); move its folder away to run the point anew") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds no JSON object; move its folder away to run the point anew")
    return content


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it has all of the text or is as it was.

    Raises:
        StoreError: it cannot be written.
    """
    with _writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            os.chmod(name, 0o644)  # mkstemp's own is the owner's alone
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path} ({error.strerror}); choose another") from error


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """One or more rows with the same names as comma-separated values, names first."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def append(path: Path, content: dict[str, Any]) -> None:
    """Append one line of JSON, whole or not at all.

    Raises:
        StoreError: it cannot be written; the file is as it was.
    """
    line = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
    with _writing(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]  # a disk that fills up takes a part first
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process did not finish."""
    if path.is_file():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with _writing(path):
                os.truncate(path, end)


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.decode(errors="replace") for line in path.read_bytes().split(b"\n")[:-1]]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path} ({error.strerror}); nothing is lost: put that right and start it again"
        ) from error
