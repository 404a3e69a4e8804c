"""The fast way to caption: one loop over fixed buffers, captured in CUDA graphs, or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from threading import Lock
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from qvision_lab.captioning.decoding_step import (
    Buffers,
    join_projections,
    padded_head,
    score_next_word,
)
from qvision_lab.captioning.sampling import Choice
from qvision_lab.model.captioner import QVisionForConditionalGeneration

INDUCTOR = {"realize_reads_threshold": 1}  # what a product reads for each row is made once
CAPTURED, GRAPHS = 4, 32  # sizes of batches whose buffers are kept, and graphs
CHECK_EVERY = 4  # steps on CUDA between two looks at whether all captions have ended


class FastDecoding:
    """Captions by greedy search or sampling, as `generate` finds them, without its overhead.

    The picture is encoded once. A step scores the next word and chooses it, over buffers of fixed
    size. On CUDA both are captured in graphs at the first batch of a size, and later batches are
    padded up to a size that is there; on a CPU the same loop runs uncaptured. Graphs read the
    weights where they lie, so weights that change in place are seen, and everything is captured
    anew where they moved.

    Args:
        model: whose captions they are. On CUDA the query, key and value matrices of each layer
            become views of one matrix, and the tied embedding one of a matrix with more rows.
        rows: captions at once that the step is compiled for by inductor; None: not compiled.
        length: tokens of a caption that the compiled step has room for.

    Attributes:
        compile_seconds: what compiling took, where it was asked for.
    """

    def __init__(
        self, model: QVisionForConditionalGeneration, rows: int | None = None, length: int = 32
    ):
        self.model = model
        self.rows, self.length = rows, length
        self.compile_seconds: float | None = None
        self._lock = Lock()  # two threads would share the buffers
        self._refused = False  # whether CUDA failed to capture
        self._forget()
        if rows is not None:
            if not self._knows_architecture():
                raise ValueError(
                    f"the compiled step knows no bridge={model.config.bridge!r} with global_token="
                    f"{model.config.global_token!r}; caption with the model as it is."
                )
            self._compiled = torch.compile(
                score_next_word, fullgraph=True, dynamic=False, options=INDUCTOR
            )
            start, config = perf_counter(), model.config
            shape = rows, len(config.visual_token_labels), config.hidden_size
            tokens = torch.zeros(shape, dtype=model.dtype, device=model.device)
            self.run(Choice(1.0, min_length=0, sampling=None), 2, visual_tokens=tokens)
            self.compile_seconds = perf_counter() - start

    def __reduce__(self):
        return FastDecoding, (self.model, self.rows, self.length)

    def _forget(self) -> None:
        """Drop buffers and graphs: the weights that they read are elsewhere, or they are many."""
        self._placed = None
        self._captures = self.model.device.type == "cuda" and not self._refused
        self._buffers: dict[tuple[int, int], Buffers] = {}
        self._graphs: dict[tuple, Callable[[], object]] = {}
        self._pixels: dict[int, tuple[Tensor, Tensor]] = {}

    def release(self) -> None:
        """Give back the memory of buffers and graphs; they are made again where they are needed."""
        self._forget()
        if self._captures:
            torch.cuda.empty_cache()

    def can_run(self, steps: int) -> bool:
        """Whether captions of so many tokens can be made this way, with the model as it is now.

        Not where hooks change what its parts compute (interventions do), nor for variants of the
        architecture, nor on devices other than CPU and CUDA: transformers' `generate` can.
        """
        positions = self.model.config.text_config.max_position_embeddings
        if not self._knows_architecture() or not 1 <= steps <= positions:
            return False
        if self.model.device.type not in ("cpu", "cuda"):
            return False
        return not any(
            hook.__module__ != "transformers.utils.output_capturing"  # they only look on
            for module in self.model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )

    def _knows_architecture(self) -> bool:
        config = self.model.config
        return config.bridge != "prefix" and config.global_token != "added"

    @torch.no_grad()
    def run(
        self,
        choice: Choice,
        steps: int,
        draws: Int[Tensor, "R 2"] | None = None,
        captions_per_image: int = 1,
        **image: Tensor,
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"]]:
        """Caption images, in evaluation mode.

        Args:
            steps: new tokens of a caption, at most.
            draws: `row_keys` of the captions, of which an image's stand together; for sampling.
            image: one of the inputs of the model's `encode`.

        Returns:
            Ids without `<START>`, padded behind `<END>`, and the log-probabilities (nats) that the
            model gave them, before penalties and what narrows the choice; both on the CPU.
        """
        with self._lock:
            return self._run(choice, steps, draws, captions_per_image, image)

    def _run(
        self,
        choice: Choice,
        steps: int,
        draws: Int[Tensor, "R 2"] | None,
        k: int,
        image: dict[str, Tensor],
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"]]:
        self.follow_weights()
        (images,) = {len(values) for values in image.values()}
        used = images * k
        compiled = self.rows is not None and self.rows // 2 < used <= self.rows
        compiled = compiled and steps <= self.length and self.rows % k == 0
        size, length = self._size(images, k, steps, compiled)
        buffers = self._buffers_for(size * k, length)
        self._encode(image, size, k, buffers)
        step = self._step(buffers, choice, compiled)
        buffers.begin(self.model.config.start_token_id, used, draws)
        every = CHECK_EVERY if self._captures else 1
        taken = 0
        while taken < steps:
            step()
            taken += 1
            if taken % every == 0 and buffers.finished.all():
                break
        ids, logprobs = buffers.ids[:used, 1 : taken + 1], buffers.logprobs[:used, :taken]
        return ids.to("cpu", copy=True), logprobs.to("cpu", copy=True)  # the next batch writes here

    def _size(self, images: int, k: int, steps: int, compiled: bool) -> tuple[int, int]:
        """Images and positions that a batch is padded to."""
        if compiled:
            return self.rows // k, self.length
        positions = self.model.config.text_config.max_position_embeddings
        length = min(-(-steps // 16) * 16, positions)
        if not self._captures:
            return images, length
        there = [rows // k for rows, room in self._buffers if rows % k == 0 and room == length]
        near = [size for size in there if images <= size <= 1.5 * images]
        step = 8 if images > 8 else 1
        return min(near, default=-(-images // step) * step), length

    def follow_weights(self) -> None:
        """Begin anew where the weights are not where they were; join matrices on CUDA."""
        if self._placed == self._places():
            return
        self._forget()
        layers = [block.attn.attention for block in self.model.decoder.language_model.h]
        if self._captures:
            self._projections = [[join_projections(layer)] for layer in layers]
            self._head = padded_head(self.model.decoder.lm_head)
            self._pool = torch.cuda.graph_pool_handle()
        else:
            self._projections = [[layer.q_proj, layer.k_proj, layer.v_proj] for layer in layers]
            self._head = self.model.decoder.lm_head
        self._placed = self._places()

    def _places(self) -> list[int]:
        modules = self.model.modules()
        weights = (weight for module in modules for weight in module._parameters.values())
        return [weight.data_ptr() for weight in weights if weight is not None]

    def _buffers_for(self, rows: int, length: int) -> Buffers:
        if (rows, length) not in self._buffers:
            if len(self._buffers) == CAPTURED:
                self._forget()
                self.follow_weights()
            self._buffers[rows, length] = Buffers.allocate(self.model, rows, length)
        return self._buffers[rows, length]

    def _encode(self, image: dict[str, Tensor], size: int, k: int, buffers: Buffers) -> None:
        """Put the bridge's keys and values of the images into the buffers."""
        ((name, values),) = image.items()
        if self._captures and name == "pixel_values":
            if size not in self._pixels:
                shape = size, *values.shape[1:]
                pixels = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
                self._pixels[size] = pixels, torch.empty_like(buffers.bridge[:, :size])
            pixels, made = self._pixels[size]
            pixels[: len(values)].copy_(values, non_blocking=True)
            encode = partial(self._read_pixels, pixels, made)
            self._captured((size, "encode"), encode)()
        else:
            made = self._read_image(**{name: values.to(self.model.device)})
        rows = buffers.bridge[:, : made.shape[1] * k]
        rows.unflatten(1, (-1, k)).copy_(made[:, :, None])

    def _read_pixels(self, pixels: Tensor, made: Float[Tensor, "2 B H N C"]) -> None:
        made.copy_(self._read_image(pixel_values=pixels))

    def _read_image(self, **image: Tensor) -> Float[Tensor, "2 B H N C"]:
        """Keys and values that the bridge makes of an image's visual tokens."""
        tokens = self.model.encode(**image)[1].visual_tokens.to(
            self.model.decoder.language_model.dtype
        )
        attention = self.model.decoder.bridge.attention
        weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        made = [F.linear(tokens, weight[part], bias[part]) for part in (1, 2)]  # [B,N,D] each
        heads = torch.stack(made).unflatten(-1, (attention.num_heads, -1))  # [2,B,N,H,C]
        return heads.transpose(2, 3)

    def _step(self, buffers: Buffers, choice: Choice, compiled: bool) -> Callable[[], None]:
        step = partial(
            self._choose, buffers, choice, self._compiled if compiled else score_next_word
        )
        if not self._captures:
            return step
        return self._captured((*buffers.logprobs.shape, choice, compiled), step, buffers)

    def _captured(
        self, key: tuple, function: Callable[[], object], buffers: Buffers | None = None
    ) -> Callable[[], object]:
        """A function of the buffers as a CUDA graph, which is kept under the key."""
        if key in self._graphs:
            return self._graphs[key]
        if not self._captures:
            return function
        if len(self._graphs) == GRAPHS:
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
        if buffers is not None:
            buffers.position.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled, chosen or allocated at first happens here
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
            self._graphs[key] = graph.replay
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"CUDA captured no graph ({error}); captions are made without, more slowly.",
                stacklevel=2,
            )
            self._captures, self._refused = False, True
            return function
        return self._graphs[key]

    def _choose(self, buffers: Buffers, choice: Choice, score: Callable) -> None:
        """One step: score the next word of every row, choose it, and note it."""
        config, position = self.model.config, buffers.position
        logits = score(self.model.decoder, self._projections, self._head, buffers).float()  # [R,V]
        chosen = choice.words(logits, buffers.ids, position + 1, config.end_token_id, buffers.draws)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])  # [R,1]
        buffers.logprobs.index_copy_(1, position, logprobs)
        words = chosen.masked_fill(buffers.finished, config.pad_token_id)
        buffers.finished |= words == config.end_token_id
        position += 1
        buffers.ids.index_copy_(1, position, words[:, None])
