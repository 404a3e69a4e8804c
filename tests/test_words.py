"""Docs, comments and messages use the field's terms; others are found, with replacements."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = r"(?:bridge|captioner|clip|decoder|head|model|network|q-former|queries|query|tower)s?"
INSTEAD = {
    r"told|tells?|telling": "supervision, record; identifies, captions, says, shows",
    r"hangs? on": "depends on",
    r"ways": "variants, candidates, methods",
    r"(?-i:is none)|by halves|to its end": "invalid, does not exist; atomic; complete",
    r"one's own|by the hand of": "the owner's name",
    r"goe?s? on where|anew": "resumes; recomputed, redrawn, again",
    r"learn(?:s|ed|t)? to see": "is trained to encode",
    r"is worth|what (?:\w+ ){1,3}(?:is|are) worth": "quality, score, contribution",
    r"whom": "source, reader, owner",
    rf"{PARTS} looks?(?! up)|look(?:s|ed|ing)? at|sees|saw|gaze": "encodes, attends to, reads",
    r"(?:never|not|what is|as|name) seen": "held out, not trained on; input",
    r"beside (?!their)|twins?": "next to, with; duplicate",
}
SKIPPED = {"coco_words.yaml", "run.yaml"}  # words of captions; the record of an earlier run
KINDS = ["qvision_lab/**/*.py", "tests/**/*.py", "notebooks/*.ipynb", "*.md"]
KINDS += ["qvision_lab/**/*.md", "qvision_lab/**/*.yaml"]


def read_prose(path: Path) -> str:
    """The text of a file; of Python comments, strings (of tests docstrings) and names."""
    text, parts = path.read_text(encoding="utf-8"), []
    if path.suffix == ".ipynb":
        return " | ".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix != ".py":
        return text
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, string = tokenize.tok_name[token.type], token.string
        if kind == "NAME":
            parts.append(f"| name {string.replace('_', ' ')} |")
        elif kind == "COMMENT" or '"""' in string or ("tests" not in path.parts and "STR" in kind):
            parts.append(string.lstrip("#"))
    return " ".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_those_of_the_field(kind):
    paths = [p for p in ROOT.glob(kind) if p.name not in SKIPPED]
    texts = {path.relative_to(ROOT): " ".join(read_prose(path).split()) for path in paths}
    found = [
        f"{path}: {match!r}: write {instead}"
        for path, text in texts.items()
        for word, instead in INSTEAD.items()
        for match in re.findall(rf"(?i)\b(?:{word})\b.{{,40}}", text)
    ]
    assert texts
    assert not found, "\n".join(found)
