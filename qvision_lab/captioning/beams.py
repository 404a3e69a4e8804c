"""Beam search over the buffers of a decoding step, with the results of transformers' `generate`."""

import torch
from jaxtyping import Float
from torch import Tensor

from qvision_lab.captioning.decoding_step import NO_SCORE, Buffers
from qvision_lab.captioning.sampling import Choice


def extend_beams(
    choice: Choice, logits: Float[Tensor, "R V"], buffers: Buffers, end_token_id: int
) -> None:
    """One step: the likeliest continuations of each image's beams become its beams.

    Of 2n candidates for n beams, those among the first n that end may join the n best captions,
    which are ranked by the sum of their log-probabilities over length ** `length_penalty`; the
    first n of the others go on. As `_beam_search` of transformers 5 does, whose captions these are:
    https://huggingface.co/docs/transformers/generation_strategies#beam-search
    """
    best, n, position = buffers.best, choice.beams, buffers.position
    images, length = len(best.scores), position + 1
    raw = logits.log_softmax(-1)
    scores = choice.penalise(raw, buffers.ids, length, end_token_id)
    totals = (scores.unflatten(0, (images, n)) + best.running[:, :, None]).flatten(1)  # [B,n*V]
    totals, index = totals.topk(2 * n)  # [B,2n]
    first = torch.arange(images, device=index.device)[:, None]
    rows, tokens = (index // logits.shape[1] + n * first).flatten(), index % logits.shape[1]
    ended = (tokens == end_token_id) | (length >= best.limit)  # [B,2n]
    tokens = tokens.flatten()

    kept = logits.index_select(1, buffers.kept).index_select(0, rows)  # [2R,K]
    made = [x.index_select(0, rows) for x in buffers.history]
    made[0].index_copy_(1, length, tokens[:, None])
    made[1].index_copy_(1, position, raw[rows, tokens][:, None])
    made[2].index_copy_(1, position, kept[:, None])

    running, going_on = totals.masked_fill(ended, NO_SCORE).topk(n)  # [B,n]
    best.running.copy_(running)
    going_on = (going_on + 2 * n * first).flatten()
    for held, candidates in zip(buffers.history, made, strict=True):
        held.copy_(candidates.index_select(0, going_on))
    came_from = rows.index_select(0, going_on)
    for cache in buffers.cache:
        cache.copy_(cache.index_select(0, came_from))

    joins = ended & best.open
    joins[:, n:] = False
    if choice.early_stopping is True:
        joins &= ~best.full
    if joins.is_cuda or joins.any():  # a GPU would have to be waited for
        scores = (totals / length**choice.length_penalty).masked_fill(~joins, -torch.inf)
        scores, taken = torch.cat([best.scores, scores], dim=1).topk(n)  # [B,n] of [B,3n]
        best.scores.copy_(scores)
        taken = (taken + 3 * n * first).flatten()
        for held, candidates in zip(best.history, made, strict=True):
            both = [x.unflatten(0, (images, -1)) for x in (held, candidates)]
            held.copy_(torch.cat(both, dim=1).flatten(0, 1).index_select(0, taken))

    longest = choice.early_stopping == "never" and choice.length_penalty > 0
    possible = best.running[:, :1] / (best.limit if longest else length) ** choice.length_penalty
    best.open &= possible > best.scores[:, -1:]
    stopped = ~best.open | best.full if choice.early_stopping is True else ~best.open
    buffers.finished.copy_(stopped.expand(-1, n).flatten())
    position += 1
