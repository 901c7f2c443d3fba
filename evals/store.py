"""What is kept of runs: a directory for each while it is made, and one file for many that are finished.

| file of a run's directory | content |
|---|---|
| config.json | the run; written before anything is computed, never changed |
| environment.jsonl | one line per session: versions, commit, hardware |
| samples.jsonl | one line per sample, appended when it is answered |
| finished.json | samples, failures and mean score, when no sample is missing |

`pack` moves the directories of a folder into its runs.jsonl: a line per run with the four contents under `config`,
`sessions`, `samples` and `finished`. All that reads runs reads both. Where a run has both, its directory counts: it began
with what the line says.
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
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
PACKED = "runs.jsonl"


class StoreError(RuntimeError):
    """A directory or file that cannot be read or written; the message names it and the remedy."""


@dataclass(frozen=True)
class SavedRun:
    """What is kept of one run.

    Attributes:
        path: its directory, or the runs.jsonl that it is a line of.
        config: what was run, `kvpress.evals.config.Run.to_dict`.
        sessions: the environment of each session, in order.
        all_rows: the samples' rows in the order in which they were written; a sample that was retried has several.
        finished: samples, failures and mean score; None where samples are missing.
    """

    path: Path
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    all_rows: list[dict[str, Any]]
    finished: dict[str, Any] | None

    @cached_property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Index -> the latest row of each sample."""
        return {int(row["index"]): row for row in self.all_rows}

    def to_line(self) -> str:
        """The run as a line of runs.jsonl."""
        content = {
            "config": self.config,
            "sessions": self.sessions,
            "samples": self.all_rows,
            "finished": self.finished,
        }
        return json.dumps(content, ensure_ascii=False) + "\n"


class RunStore:
    """The directory of one run.

    Attributes:
        rows: index -> the sample's latest row, as far as they are known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, Any]] = {}

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
        """Begin a session, with the lock held: check or write what the run is, and take up the rows that are there.

        A run that is only a line of the runs.jsonl beside the directory is written into the directory first.

        Raises:
            StoreError: the directory belongs to another run, a row is broken, or nothing can be written.
        """
        path = self.folder / CONFIG
        if not path.exists():
            packed = read_packed(self.folder.parent / PACKED).get(self.folder.name)
            if packed is not None:
                for name, contents in ((ROWS, packed.all_rows), (ENVIRONMENT, packed.sessions)):
                    write_whole(self.folder / name, "".join(map(_line, contents)))
            # Last: a directory counts from when it has this file.
            write_whole(path, json.dumps(config if packed is None else packed.config, indent=1) + "\n")
        if read_json(path).get("definition") != config["definition"]:
            raise StoreError(
                f"{path} is of another run than {config['id']}; move the folder away, or choose another out"
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
        """Mark the run as done."""
        scores = [row["score"] for row in self.rows.values() if row["error"] is None]
        content = {
            "samples": samples,
            "failed": len(self.rows) - len(scores),
            "score": sum(scores) / len(scores) if scores else None,
        }
        write_whole(self.folder / FINISHED, json.dumps(content) + "\n")


class ResultsFolder:
    """A folder that runs are written to, each found by its id in its directory or in runs.jsonl.

    Raises:
        StoreError: runs.jsonl is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._packed = read_packed(path / PACKED)

    def finished(self, run: str) -> dict[str, Any] | None:
        """Samples, failures and mean score of a finished run, else None."""
        if self._is_packed(run):
            return self._packed[run].finished
        path = self.path / run / FINISHED
        return read_json(path) if path.is_file() else None

    def rows(self, run: str) -> dict[int, dict[str, Any]]:
        """Index -> the latest row of each sample of the run that is there."""
        return self._packed[run].rows if self._is_packed(run) else read_rows(self.path / run)

    def _is_packed(self, run: str) -> bool:
        return run in self._packed and not (self.path / run / CONFIG).exists()


def read_directory(folder: Path) -> SavedRun:
    """The run that a directory holds.

    Raises:
        StoreError: a file is broken.
    """
    mark = folder / FINISHED
    return SavedRun(
        folder,
        read_json(folder / CONFIG),
        [json.loads(line) for line in _whole_lines(folder / ENVIRONMENT)],
        _read_all_rows(folder),
        read_json(mark) if mark.is_file() else None,
    )


def read_packed(path: Path) -> dict[str, SavedRun]:
    """Id -> run, of a runs.jsonl; empty if there is none.

    Raises:
        StoreError: a line is broken.
    """
    runs = {}
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            content = json.loads(line)
            run = SavedRun(path, content["config"], content["sessions"], content["samples"], content["finished"])
            runs[str(run.config["id"])] = run
            _ = run.rows  # every row has an index
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number}: no run; restore the file, or delete the line") from error
    return runs


def read_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Index -> the latest row of each sample in a run's directory; a torn last line is passed over.

    Raises:
        StoreError: another line is broken.
    """
    return {int(row["index"]): row for row in _read_all_rows(folder)}


def _read_all_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_whole_lines(folder / ROWS), 1):
        try:
            row = json.loads(line)
            int(row["index"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder / ROWS}, line {number}: no row of a sample; delete the line to run it again"
            ) from error
        rows.append(row)
    return rows


def run_paths(folder: Path) -> list[Path]:
    """The runs' directories in and below a folder, then the runs.jsonl files there; none for a folder that is not there."""
    directories = sorted(path.parent for path in folder.rglob(CONFIG) if (path.parent / ENVIRONMENT).is_file())
    return directories + sorted(folder.rglob(PACKED))


def find_runs(folders: Sequence[Path]) -> list[SavedRun]:
    """The runs in and below these folders, those in directories before packed ones, each path read once.

    Raises:
        StoreError: a folder that is not there or has no run, or a broken file.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise StoreError(f"there is no folder {folder}; give one that kvpress ablate or eval wrote")
        inside = run_paths(folder)
        if not inside:
            raise StoreError(f"there are no results in {folder}; give a folder that kvpress ablate or eval wrote")
        for path in inside:
            paths.setdefault(path.resolve(), path)
    directories = [read_directory(path) for path in paths.values() if path.name != PACKED]
    packed = [run for path in paths.values() if path.name == PACKED for run in read_packed(path).values()]
    return directories + packed


def pack(folder: Path) -> int:
    """Move each run's directory below a folder into the runs.jsonl beside it; how many were moved.

    Every row is kept. A directory that a process is writing, or that is not named by its run's id, is left as it is, and so
    is a file that is no part of a run.

    Raises:
        StoreError: a file is broken or cannot be written, or a directory lacks rows that its run's line has; no directory is
            removed before its run is in the file.
    """
    moved = 0
    beside: dict[Path, list[Path]] = {}
    for path in run_paths(folder):
        if path.name != PACKED and path != folder and path.name == read_json(path / CONFIG).get("id"):
            beside.setdefault(path.parent, []).append(path)
    for parent, directories in beside.items():
        runs = read_packed(parent / PACKED)
        with ExitStack() as locks:
            free = [path for path in directories if locks.enter_context(RunStore(path).locked())]
            for path in free:
                run, line = read_directory(path), runs.get(path.name)
                if line is not None and line.all_rows != run.all_rows[: len(line.all_rows)]:
                    raise StoreError(
                        f"{path} and its line in {parent / PACKED} have different rows; move the directory away, or delete the line"
                    )
                runs[path.name] = run
            write_whole(parent / PACKED, "".join(runs[name].to_line() for name in sorted(runs)))
            for path in free:
                for name in (CONFIG, ENVIRONMENT, ROWS, FINISHED, LOCK):  # without CONFIG the line counts
                    (path / name).unlink(missing_ok=True)
        for path in free:
            with suppress(OSError):  # something else is in it
                path.rmdir()
        moved += len(free)
    return moved


def is_locked(folder: Path) -> bool:
    """Whether a process is writing to a run's directory now; a packed run has none."""
    if not folder.is_dir():
        return False
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
        raise StoreError(f"cannot read {path} ({error}); move its folder away to make the run anew") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds no JSON object; move its folder away to make the run anew")
    return content


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it has all of the text or is as it was.

    Raises:
        StoreError: it cannot be written.
    """
    with _writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
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
    line = _line(content).encode(errors="backslashreplace")
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


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


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
