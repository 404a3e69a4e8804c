"""Atomic file writes."""

from __future__ import annotations

from pathlib import Path


def write_atomic(path: Path, text: str) -> Path:
    """Write a temporary file next to `path`, then rename it; line ends are kept as in the text."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    return partial.replace(path)
