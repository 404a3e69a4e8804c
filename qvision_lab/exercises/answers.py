"""Our answers to the notebooks' exercises, and the cases that attempts are graded on."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from scipy.stats import t
from torch import Tensor, nn
from torch.nn import functional as F

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.qformer import QFormerBlock


def count_parameters(config: QVisionConfig) -> int:
    with torch.device("meta"):
        return sum(weights.numel() for weights in QFormerBlock(config).parameters())


def greedy_search(next_logits: Callable, start: int, end: int, most: int) -> list[int]:
    ids = [start]
    while len(ids) <= most and ids[-1] != end:
        ids.append(int(np.argmax(next_logits(ids))))
    return ids[1:]


def cross_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)  # [N,D]


def knock_out(scores: Tensor, muted: Sequence[int]) -> Tensor:
    return scores.index_fill(-1, torch.tensor(muted, dtype=torch.long), -torch.inf).softmax(-1)


def bleu2(caption: str, references: Sequence[str]) -> float:
    return BleuScorer(caption, references, n=2).compute_score("closest")[0][1]


def freeze(model: nn.Module) -> None:
    for name, weights in model.named_parameters():
        weights.requires_grad = name.startswith(("qformer.", "decoder.bridge."))


def paired_interval(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    pairs = np.subtract(ours, base)
    half = t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / len(pairs) ** 0.5
    return pairs.mean() - half, pairs.mean() + half


def memory_floor(weights: float, bytes_each: int, bandwidth: float, tokens: int, batch: int):
    return weights * bytes_each * tokens / bandwidth / batch


def _ids(returned: Sequence[int], arguments: tuple) -> str:
    """New tokens as text: the start token in front and the end token at the end are optional."""
    ids = [int(i) for i in returned]
    ids = ids[1:] if ids[:1] == [arguments[1]] else ids
    return " ".join(map(str, ids[:-1] if ids[-1:] == [arguments[2]] else ids))


def _trained(returned: object, arguments: tuple) -> str:
    return " ".join(n for n, weights in arguments[0].named_parameters() if weights.requires_grad)


READ = {"02": _ids, "06": _trained}  # what to compare of a result; else all of it


def exercises() -> dict[str, tuple[Callable, list[tuple]]]:
    """By notebook: our answer, and arguments of growing difficulty to compare an attempt on."""
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 48, "num_layers": 1, "attention_types": [[["global"], 1]]}
    configs = {"vision_config": vision, "text_config": text | {"vocab_size": 50259}}
    small = QVisionConfig(**configs, num_attention_heads=3)
    with torch.device("meta"):
        model, frozen = (QVisionForConditionalGeneration(small) for _ in range(2))
    frozen.requires_grad_(False)
    table = -np.random.default_rng(0).random((9, 9)) - 1  # all negative, as log-probabilities are
    table[range(8), range(1, 9)] = -0.5
    follow, stop = (lambda ids: table[ids[-1]]), (lambda ids: np.eye(9)[8])
    searches = [(stop, 0, 8, 5), (follow, 0, 8, 20), (follow, 0, 8, 3)]
    searches.append((lambda ids: np.eye(9)[(1 + sum(ids)) % 7], 3, 8, 6))  # reads all tokens
    q, k, v = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    alike = k[:1].repeat(5, 1)
    dog, cat = "a dog on a beach", "two cats in a green room at night"
    captions = [(dog, [dog]), ("a red dog on a beach", [f"{dog} now"]), ("a a a a dog", [dog])]
    captions += [("a a dog", ["a dog runs", "a cat sits"]), ("a dog", [dog])]
    captions += [(dog, [cat, "a dog", f"{dog} now"]), ("beach a", [dog])]
    base, near = [50.0, 80.0, 20.0, 60.0, 41.0], [54.0, 82.0, 26.0, 61.0, 47.0]
    sizes = [(1e9, 4, 1e9, 1, 1), (1e9, 2, 4e9, 1, 1), (1e9, 4, 1e9, 20, 1), (1e9, 4, 1e9, 20, 16)]
    return {
        "01": (count_parameters, [(QVisionConfig(),), (small,)]),
        "02": (greedy_search, searches),
        "03": (cross_attention, [(q[:3], alike, v, 1), (q[:3], k, v, 1), (q[:3], k, v, 4)]),
        "04": (knock_out, [(k, []), (torch.zeros(2, 5), [1]), (k, [0, 3])]),
        "05": (bleu2, captions),
        "06": (freeze, [(model,), (frozen,)]),
        "07": (
            paired_interval,
            [([x + 3 for x in base], base), (near, base), (near[:3], base[:3])],
        ),
        "08": (memory_floor, sizes),
    }
