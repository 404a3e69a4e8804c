"""Atomic file writes, and the lock of a folder that one command writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 to a temporary file and rename it; line ends stay as they are in the text."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    return partial.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder, `.lock` in it, which ends with the process too.

    Raises:
        ValueError: another command holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another command is writing to {folder}: wait for its end, or choose another output."
        ) from None
    try:
        yield
    finally:
        lock.release()
