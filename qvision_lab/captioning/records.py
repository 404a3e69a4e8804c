"""A file of caption records, one a line and a picture, that outlives interruptions."""

from __future__ import annotations

import glob
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


class SeenNames:
    """Names met so far, on disk where they are many."""

    def __init__(self):
        self.names = sqlite3.connect("")  # a file of its own, gone when it is closed
        self.names.execute("CREATE TABLE names (name BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, name: str) -> bool:
        """Whether the name is new."""
        row = (name.encode("utf-8", "surrogatepass"),)  # a file may be called anything
        return self.names.execute("INSERT OR IGNORE INTO names VALUES (?)", row).rowcount == 1

    def close(self) -> None:
        self.names.close()


def gather_records(output: Path, settings: dict, *, failures: bool) -> None:
    """Bring the records of all processes into one file, one a picture; torn lines go.

    Args:
        output: the file; parts of it that processes wrote lie beside it, and are taken in.
        settings: what the records must have been made with.
        failures: whether pictures that could not be read stay, or go to be tried again.
    """
    parts = sorted(output.parent.glob(f"{glob.escape(output.name)}.part[0-9]*"))
    whole = output.with_name(output.name + ".partial")
    with closing(SeenNames()) as seen, open(whole, "w", encoding="utf-8") as file:
        for part in (output, *parts):
            for record, line in read_records(part, settings):
                if (failures or "caption" in record) and seen.add(record["source"]):
                    file.write(line)
    whole.replace(output)
    for part in parts:
        part.unlink()


def read_records(path: Path, settings: dict) -> Iterator[tuple[dict, str]]:
    """Records of an output file with their lines; one torn by an interruption is passed over.

    Raises:
        ValueError: for a line that is no record, or was made with other settings.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n") and line[:11] == '{"source": '[: len(line)]:
                return
            try:
                record = json.loads(line)
                _, earlier = record["source"], record["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no caption record; choose another output."
                ) from error
            changed = [
                f"{name} was {earlier.get(name)!r}, now {settings.get(name)!r}"
                for name in sorted(settings.keys() | earlier.keys())
                if settings.get(name) != earlier.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{path} was made with other settings ({'; '.join(changed)}): choose another "
                    "output, or delete this one to caption everything anew."
                )
            yield record, line
