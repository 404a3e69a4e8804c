"""Files to write: their paths, atomic writes, and the lock of what one command writes to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def find_path(path: str | os.PathLike) -> Path:
    """The path itself where it exists, also of a file named `~b.png`; else `~` is a home folder."""
    return Path(path if os.path.lexists(path) else os.path.expanduser(path))


def output_file(path: str | os.PathLike) -> Path:
    """The file to write, which may not exist yet, behind any links; ValueError for all else."""
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"{path} is no regular file: choose another output.")
    return target


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it after the block, or deleted by an error.

    It is on the disk before it is renamed, and takes the mode of the file that it replaces.
    """
    path = output_file(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> Path:
    """Write a text atomically; line ends are kept as in the text."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
    return path


def is_main_process() -> bool:
    """Whether this process is the first of a launcher's, or alone, where a RANK means nothing."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK") == "0"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of a folder, `.lock` in it, or of a file; ValueError if another command does.

    Of the processes of a launcher the main one holds it.
    """
    if not is_main_process():
        yield
        return
    folder, name = (output, ".lock") if output.is_dir() else (output.parent, f".{output.name}.lock")
    try:
        lock = FileLock(folder / name).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another command is writing to {output}: wait for its end, or choose another output."
        ) from None
    with lock:
        yield
