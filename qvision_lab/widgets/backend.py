"""Runs the model for the explorer, and caches what can be."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from PIL import Image

from qvision_lab.captioning import Caption, Captioner
from qvision_lab.captioning.decoding_step import copy_sharing_weights
from qvision_lab.interpretation.interventions import Intervention, mute
from qvision_lab.interpretation.maps import DEFAULT_METHOD, PatchMap, query_maps, word_maps
from qvision_lab.interpretation.trace import Trace, trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.confidence import Claim

CACHE_SIZE = 16  # captions and traces, so that a click on a word costs its map alone
ALTERNATIVES = 4  # tokens listed for a word


@dataclass(frozen=True)
class Request:
    """The state of all controls."""

    image: Callable[[], Image.Image]  # opens it
    search: tuple[tuple[str, object], ...]  # arguments of `Captioner.caption`
    muted: tuple[str, ...] = ()  # names of parts
    word: tuple[str, int] | None = None  # caption and index; else the longest, mostly a noun
    method: str = DEFAULT_METHOD
    token: int = 0  # of the visual tokens
    block: int | None = None  # None: the mean of all, as for `head`
    head: int | None = None
    caption: str = ""  # to read instead of the model's own


@dataclass(frozen=True, eq=False)
class Result:
    """Output of the model, whole or with parts muted, for an image."""

    caption: str  # the model's own
    trace: Trace  # of the caption that is read: one for the whole and the muted model
    word: int | None  # index of the mapped word in the trace
    maps: tuple[PatchMap, ...]  # of the word, if there is one, and of the visual token
    familiar: bool | None = None  # as in `Caption`


class Backend:
    """Runs requests on a copy of the model that shares its weights, so that mutes stay in it."""

    def __init__(self, captioner: Captioner):
        self.captioner = replace(captioner, model=copy_sharing_weights(captioner.model))
        mute(self.captioner.model)  # raises where the model lacks a part
        self.parts = parts(captioner.model)
        self._caption = lru_cache(CACHE_SIZE)(self._caption)
        self._trace = lru_cache(CACHE_SIZE)(self._trace)

    def run(self, request: Request) -> list[Result]:
        """Result of the whole model, then of the muted one if a part is muted."""
        caption = request.caption or self._caption(request.image, request.search, ()).text
        words = self._trace(request.image, caption, ()).words
        word = max(range(len(words)), key=lambda i: len(words[i].text), default=None)
        if request.word and request.word[0] == caption:
            word = request.word[1]
        results = []
        for muted in dict.fromkeys(((), request.muted)):  # one, if they are the same
            traced = self._trace(request.image, caption, muted)
            with self._muting(muted):
                maps = word_maps(traced, request.method, () if word is None else (words[word],))
            maps.append(query_maps(traced, request.block, request.head)[request.token])
            own = self._caption(request.image, request.search, muted)
            results.append(Result(own.text, traced, word, tuple(maps), own.familiar))
        return results

    @torch.no_grad()
    def alternatives(self, traced: Trace) -> tuple[list[str], list[Claim | None], float | None]:
        """For each word the most probable tokens where it begins, and the claim that it is in.

        Last the confidence in the caption, and no claims without a calibration.
        """
        decoder, first = traced.model.decoder, [word.tokens[0] for word in traced.words]
        states = traced.to_tensor(traced.text_states)[None]
        states, _ = decoder.bridge(states, traced.to_tensor(traced.visual_tokens)[None], False)
        logits = decoder.lm_head(states)[0].float().cpu()  # [T,V]
        top = logits[first].softmax(-1).topk(ALTERNATIVES)  # [W,k]
        decode = self.captioner.processor.tokenizer.decode
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        likely = [
            ", ".join(f"{decode([i]).strip()} {p:.0%}" for i, p in zip(*row, strict=True))
            for row in rows
        ]
        claims, whole = (), None
        if (confidence := self.captioner.confidence) is not None:
            ids = traced.token_ids.tolist()
            claims, whole = confidence.judge(ids, logits[:, confidence.tokens])
        within = {i: claim for claim in claims for i in range(*claim.tokens)}
        return likely, [within.get(i) for i in first], whole

    def mute_arguments(self, muted: Sequence[str]) -> dict[str, object]:
        """Arguments of `mute` for several parts together."""
        merged: dict[str, object] = {}
        for group in self.parts.values():
            for name in [name for name in group if name in muted]:
                for argument, value in group[name].items():
                    known = merged.get(argument, [])
                    merged[argument] = sorted(known + value) if isinstance(value, list) else value
        return merged

    def _caption(self, image: Callable, search: tuple, muted: tuple[str, ...]) -> Caption:
        with self._muting(muted), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pictures: the explorer has its own
            return self.captioner.caption(image(), **dict(search))

    def _trace(self, image: Callable, caption: str, muted: tuple[str, ...]) -> Trace:
        with self._muting(muted):
            return trace(self.captioner, image(), caption)

    def _muting(self, muted: tuple[str, ...]) -> Intervention:
        return mute(self.captioner.model, **self.mute_arguments(muted))


def parts(model: QVisionForConditionalGeneration) -> dict[str, dict[str, dict]]:
    """Arguments of `mute` for each part of a model, by kind and label."""
    config = model.config
    heads, blocks = range(config.num_attention_heads), range(config.num_qformer_blocks)
    tokens = [{"global_token": True}] if config.global_token != "none" else []
    groups = {"Queries": tokens + [{"queries": [q]} for q in range(config.num_query_tokens)]}
    for b in blocks:
        groups[f"Block {b}: heads on patches"] = [{"heads": [(b, h)]} for h in heads]
        groups[f"Block {b}: heads on queries"] = [{"self_heads": [(b, h)]} for h in heads]
    groups["Bridge: heads"] = [{"bridge_heads": [h]} for h in heads]
    groups["Blocks and bridge"] = [*({"blocks": [b]} for b in blocks), {"bridge": True}]
    return {kind: {mute(model, **part).label: part for part in g} for kind, g in groups.items()}
