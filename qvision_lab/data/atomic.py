"""Atomic file writes, and the lock of a folder that one command writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it after the block, or deleted by an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> Path:
    """Write a text atomically; line ends are kept as in the text."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, `.lock` in it; ValueError if another command holds it."""
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another command is writing to {folder}: wait for its end, or choose another output."
        ) from None
    with lock:
        yield
