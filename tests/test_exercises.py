"""Exercises: plausible wrong answers are rejected, ours and other right forms are accepted."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import qvision_lab as ql
from qvision_lab.exercises import grade
from qvision_lab.exercises.answers import exercises


def block_size(c):
    return 24 * c.hidden_size**2 + 26 * c.hidden_size


def greedy_recursive(next_logits, start, end, most, ids=()):
    ids = ids or (start,)
    if ids[-1] == end or len(ids) > most:
        return torch.tensor(ids)
    new = max(range(9), key=lambda i: next_logits(list(ids))[i])
    return greedy_recursive(next_logits, start, end, most, (*ids, new))


def search(ends=True, longest=lambda most: most, read=lambda ids: ids, choose=np.argmax):
    """Greedy search with one thing wrong."""

    def attempt(logits, start, end, most):
        ids = [start]
        while not (ends and ids[-1] == end) and len(ids) <= longest(most):
            ids.append(int(choose(logits(read(ids)))))
        return ids[1:]

    return attempt


def fused(q, k, v, heads):
    split = [x.reshape(len(x), heads, -1).permute(1, 0, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*split).permute(1, 0, 2).reshape(len(q), -1)


def looped(q, k, v, heads):
    read = []
    for each in zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True):
        a, b, c = (x.numpy() for x in each)
        weights = np.exp(a @ b.T / np.sqrt(a.shape[1]))
        read.append(weights / weights.sum(1, keepdims=True) @ c)
    return np.concatenate(read, 1)


def attend(scale=None, dim=-1, split=None):
    """Attention with one thing wrong."""

    def attempt(q, k, v, heads):
        parts = [split(x, heads) if split else x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        a, b, c = (x.transpose(0, 1) for x in parts)
        scores = a @ b.mT / (scale(q, a) if scale else a.shape[-1] ** 0.5)
        return (scores.softmax(dim) @ c).transpose(0, 1).flatten(1)

    return attempt


def filled(x, muted, value, dim=-1):
    return x.index_fill(dim, torch.tensor(muted, dtype=torch.long), value)


def in_place(scores, muted):
    scores[..., muted] = -torch.inf
    return scores.softmax(-1)


def bleu(clip=max, brevity=True, join=lambda a, b: (a * b) ** 0.5, length=None):
    """BLEU-2, with one thing wrong or in another form."""

    def attempt(caption, references):
        words, others = caption.split(), [r.split() for r in references]
        precisions = []
        for grams in (lambda x: [*x], lambda x: [*pairwise(x)]):
            count, theirs = Counter(grams(words)), [Counter(grams(o)) for o in others]
            most = {
                g: clip(t[g] for t in theirs) if clip else 9 * any(g in t for t in theirs)
                for g in count
            }
            precisions.append(
                sum(min(n, most[g]) for g, n in count.items()) / max(1, len(grams(words)))
            )
        closest = sorted((abs(len(o) - len(words)), len(o)) for o in others)[0][1]
        shortest = length(len(o) for o in others) if length else closest
        return join(*precisions) * (
            np.exp(1 - shortest / len(words)) if brevity and shortest > len(words) else 1
        )

    return attempt


def train_only(*prefixes, thaw=True):
    def attempt(model):
        for name, weights in model.named_parameters():
            if not name.startswith(prefixes):
                weights.requires_grad_(False)
            elif thaw:
                weights.requires_grad_(True)

    return attempt


def by_modules(model):
    model.requires_grad_(False)
    model.qformer.requires_grad_(True)
    model.decoder.bridge.requires_grad_(True)


def attribute_of_modules(model):
    model.requires_grad = False
    model.qformer.requires_grad = model.decoder.bridge.requires_grad = True


def interval(quantile=None, ddof=1, root=True, sign=1):
    def attempt(ours, base):
        d = sign * (np.array(ours) - np.array(base))
        q = quantile or stats.t.ppf(0.975, len(d) - 1)
        half = q * d.std(ddof=ddof) / (len(d) ** 0.5 if root else 1)
        return d.mean() - half, d.mean() + half

    return attempt


RIGHT = {
    "01": [block_size],
    "02": [greedy_recursive, search()],
    "03": [fused, looped],
    "04": [lambda s, muted: F.normalize(filled(s.softmax(-1), muted, 0), p=1, dim=-1)],
    "05": [bleu()],
    "06": [by_modules, train_only("qformer.", "decoder.bridge.")],
    "07": [lambda a, b: stats.ttest_rel(a, b).confidence_interval(), interval()],
    "08": [lambda n, size, speed, tokens, batch: tokens / (speed / (n * size) * batch)],
}
WRONG = {
    "01": [
        lambda c: 24 * c.hidden_size**2,  # no biases, no norms
        lambda c: 24 * c.hidden_size**2 + 18 * c.hidden_size,  # no norms
        lambda c: 16 * c.hidden_size**2 + 17 * c.hidden_size,  # one feed-forward layer
        lambda c: block_size(ql.QVisionConfig()),  # of any model
        lambda c: c.num_qformer_blocks * block_size(c),  # of all blocks
        lambda c: str(block_size(c)),
    ],
    "02": [
        search(ends=False),
        search(longest=lambda most: 29),
        search(longest=lambda most: most + 1),
        search(read=lambda ids: ids[-1:]),
        search(choose=np.argmin),
    ],
    "03": [
        attend(scale=lambda q, a: 1),
        attend(scale=lambda q, a: q.shape[-1] ** 0.5),
        attend(scale=lambda q, a: a.shape[-1]),
        attend(dim=-2),
        attend(split=lambda x, heads: x.unflatten(-1, (-1, heads)).transpose(-1, -2)),
        lambda q, k, v, heads: attend()(q, k, v, 1),
        lambda q, k, v, heads: v.mean(0).expand(len(q), -1),
    ],
    "04": [
        lambda s, muted: filled(s.softmax(-1), muted, 0),
        lambda s, muted: filled(s, muted, 0).softmax(-1),
        lambda s, muted: filled(s, muted, -torch.inf, dim=0).softmax(-1),  # rows instead
        lambda s, muted: s.where(filled(0 * s, muted, 1) > 0, -torch.inf).softmax(-1),
        in_place,
    ],
    "05": [
        bleu(clip=None),
        bleu(clip=sum),
        bleu(brevity=False),
        bleu(join=lambda a, b: (a + b) / 2),
        bleu(join=lambda a, b: b),
        bleu(length=max),
        bleu(length=min),
        lambda caption, references: 100 * bleu()(caption, references),
    ],
    "06": [
        train_only("qformer."),
        train_only("qformer.", "decoder."),
        train_only("qformer.blocks.", "decoder.bridge."),
        train_only("vision.projection.", "qformer.", "decoder.bridge."),
        train_only("qformer.", "decoder.bridge.", thaw=False),
        attribute_of_modules,
        lambda model: model.vision.requires_grad_(False),
    ],
    "07": [
        lambda a, b: stats.ttest_ind(a, b).confidence_interval(),  # unpaired
        interval(quantile=1.96),
        interval(quantile=stats.t.ppf(0.975, 4)),
        interval(ddof=0),
        interval(root=False),
        interval(sign=-1),
        lambda a, b: np.mean(np.subtract(a, b)),
    ],
    "08": [
        lambda n, size, speed, tokens, batch: n * size / speed,
        lambda n, size, speed, tokens, batch: n * tokens / speed / batch,
        lambda n, size, speed, tokens, batch: n * size * tokens / speed,
        lambda n, size, speed, tokens, batch: n * size * tokens * batch / speed,
        lambda n, size, speed, tokens, batch: 8 * n * size * tokens / speed / batch,
    ],
}
NUMBERS = sorted(RIGHT)


@pytest.mark.parametrize("number", NUMBERS)
def test_right_answers_are_accepted(number):
    assert grade(number, exercises()[number][0]) == "right"
    assert [grade(number, attempt) for attempt in RIGHT[number]] == ["right"] * len(RIGHT[number])


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_answers_get_a_hint(number):
    assert len(WRONG[number]) >= 4
    for i, attempt in enumerate(WRONG[number]):
        sentence = grade(number, attempt)
        assert sentence.startswith("not yet: "), (i, sentence)
        assert sentence.endswith((".", "?"))


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_there_is_not_wrong(number, capsys):
    ql.exercises.check(number, ...)
    assert capsys.readouterr().out == "not attempted\n"
    assert grade(number, lambda *arguments: None).startswith("not yet: ")
    assert "raises ZeroDivisionError" in grade(number, lambda *arguments: 1 / 0)
    assert "not callable" in grade(number, 7)


def test_an_exercise_that_does_not_exist():
    with pytest.raises(ValueError, match="choose one of 01, 02"):
        ql.exercises.check("9", ...)
