"""Fast decoding: one loop over fixed buffers, captured in CUDA graphs, or compiled."""

import warnings
from collections.abc import Callable
from functools import partial
from threading import Lock
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qvision_lab.captioning.beams import extend_beams
from qvision_lab.captioning.decoding_step import Buffers, join, score_next_token
from qvision_lab.captioning.sampling import Choice
from qvision_lab.model.captioner import QVisionForConditionalGeneration

INDUCTOR = {"realize_reads_threshold": 1}  # the input of a product is computed once, not per row
CAPTURED, GRAPHS = 4, 32  # numbers of buffers (one a batch size) and of graphs that are kept
CHECK_EVERY = 4  # steps on CUDA between two checks of whether all captions have ended


def is_hooked(model: nn.Module) -> bool:
    """Whether hooks may change what the model computes."""
    return any(
        hook.__module__ != "transformers.utils.output_capturing"  # they only record
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


class FastDecoding:
    """Greedy search, beam search or sampling with the results of `generate`, without its overhead.

    A step scores the next token and chooses it, over buffers of fixed size. On CUDA encoding and
    step are captured in graphs at the first batch of a size, and later batches are padded up to an
    existing size. Graphs read the weights by address, so changes in place take effect, and
    everything is captured again where they moved. There the query, key and value matrices of each
    layer become views of one matrix, and the tied embedding one of a matrix with more rows.

    Inductor compiles a step for batches of `rows` captions of at most `length` tokens.
    """

    def __init__(
        self, model: QVisionForConditionalGeneration, rows: int | None = None, length: int = 32
    ):
        self.model, self.rows, self.length = model, rows, length
        self.compile_seconds: float | None = None
        self._lock = Lock()  # two threads would share the buffers
        self._refused = False  # whether CUDA failed to capture
        self._forget()
        if rows is not None:
            if not self._supports_architecture():
                raise ValueError(
                    f"the compiled step does not support bridge={model.config.bridge!r} with "
                    f"global_token={model.config.global_token!r}; caption with the model as it is."
                )
            how = {"fullgraph": True, "dynamic": False, "options": INDUCTOR}
            self._compiled = torch.compile(score_next_token, **how)
            start, config = perf_counter(), model.config
            shape = rows, len(config.visual_token_labels), config.hidden_size
            tokens = torch.zeros(shape, dtype=model.dtype, device=model.device)
            self.run(Choice(), 2, visual_tokens=tokens)
            self.compile_seconds = perf_counter() - start

    def __reduce__(self):
        return FastDecoding, (self.model, self.rows, self.length)

    def _forget(self) -> None:
        """Drop buffers and graphs."""
        self._placed = None
        self._captures = self.model.device.type == "cuda" and not self._refused
        self._buffers: dict[tuple[int, int, int, int], Buffers] = {}
        self._graphs: dict[tuple, Callable[[], object]] = {}
        self._pixels: dict[int, tuple[Tensor, Tensor]] = {}

    def release(self) -> None:
        """Free the memory of buffers and graphs; they are made again where they are needed."""
        self._forget()
        if self._captures:
            torch.cuda.empty_cache()

    def can_run(self) -> bool:
        """Whether this can run the model as it is now: not with hooks, as of interventions."""
        supported = self._supports_architecture() and self.model.device.type in ("cpu", "cuda")
        return supported and not is_hooked(self.model)

    def _supports_architecture(self) -> bool:
        config = self.model.config
        return config.bridge != "prefix" and config.global_token != "added"

    @torch.inference_mode(False)  # buffers outlive the caller's mode
    @torch.no_grad()
    def run(
        self,
        choice: Choice,
        steps: int,
        draws: Int[Tensor, "R 2"] | None = None,
        captions_per_image: int = 1,
        kept: Int[Tensor, " K"] | None = None,
        **image: Tensor,
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"], Float[Tensor, "R T K"]]:
        """Caption images, one of the inputs of `encode`, with a model in evaluation mode.

        At most `steps` tokens are chosen; sampling takes the captions' `row_keys` as draws, an
        image's next to each other. Returns ids (padded after `<END>`), log-probabilities, and the
        logits of the tokens `kept`, on the CPU, as `Search.run` does.
        """
        with self._lock:
            self.follow_weights()
            kept = torch.zeros(0, dtype=torch.long) if kept is None else kept
            (images,) = {len(values) for values in image.values()}
            k = max(captions_per_image, choice.beams)  # rows of an image
            used = images * k
            compiled = self.rows is not None and self.rows // 2 < used <= self.rows
            compiled = compiled and steps <= self.length and self.rows % k == 0
            size, length = self._size(images, k, steps, compiled)
            if (shape := (size * k, length, len(kept), choice.beams)) not in self._buffers:
                if len(self._buffers) == CAPTURED:
                    self._forget()
                    self.follow_weights()
                self._buffers[shape] = Buffers.allocate(self.model, *shape)
            buffers = self._buffers[shape]
            self._encode(image, size, k, buffers)
            score = self._compiled if compiled else score_next_token
            step = partial(self._choose, buffers, choice, score)
            buffers.kept.copy_(kept)
            step = self._captured((*shape, choice, compiled), step, buffers)
            buffers.begin(self.model.config.start_token_id, used, steps, draws)
            every = CHECK_EVERY if self._captures else 1
            taken = 0
            while taken < steps:
                step()
                taken += 1
                if taken % every == 0 and buffers.finished.all():
                    break
            ids, logprobs, logits = (
                x.unflatten(0, (size, k))[:images, :captions_per_image].flatten(0, 1)
                for x in (buffers.best or buffers).history
            )
            ids = ids[:, 1 : taken + 1]
            ends = ids == self.model.config.end_token_id
            ids = ids.masked_fill(ends.cumsum(1) > ends.long(), self.model.config.pad_token_id)
            made = ids, logprobs[:, :taken], logits[:, :taken]
            return tuple(x.to("cpu", copy=True) for x in made)  # buffers are reused

    def _size(self, images: int, k: int, steps: int, compiled: bool) -> tuple[int, int]:
        """Images and positions that a batch is padded to."""
        if compiled:
            return self.rows // k, self.length
        positions = self.model.config.text_config.max_position_embeddings
        length = min(-(-steps // 16) * 16, positions)
        if not self._captures:
            return images, length
        sizes = [rows // k for rows, room, *_ in self._buffers if rows % k == 0 and room == length]
        near = [size for size in sizes if images <= size <= 1.5 * images]
        step = 8 if images > 8 else 1
        return min(near, default=-(-images // step) * step), length

    def follow_weights(self) -> None:
        """Drop everything where the weights have moved in memory; join matrices on CUDA."""
        if self._placed == self._places():
            return
        self._forget()
        decoder = self.model.decoder
        layers = [block.attn.attention for block in decoder.language_model.h]
        self._projections = [[layer.q_proj, layer.k_proj, layer.v_proj] for layer in layers]
        self._head = decoder.lm_head
        if self._captures:
            self._projections = [[join(parts)] for parts in self._projections]  # [3*D,D] each
            # Aligned: on an H100 256 rows took five times as long with an odd vocabulary.
            self._head = join([self._head], multiple=64)
            self._pool = torch.cuda.graph_pool_handle()
        self._placed = self._places()

    def _places(self) -> list[int]:
        modules = self.model.modules()
        weights = (weight for module in modules for weight in module._parameters.values())
        return [weight.data_ptr() for weight in weights if weight is not None]

    def _encode(self, image: dict[str, Tensor], size: int, k: int, buffers: Buffers) -> None:
        """Write the bridge's keys and values of the images into the buffers."""
        ((name, values),) = image.items()
        if self._captures and name == "pixel_values":
            if size not in self._pixels:
                shape = size, *values.shape[1:]
                pixels = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
                self._pixels[size] = pixels, torch.empty_like(buffers.bridge[:, :size])
            pixels, made = self._pixels[size]
            pixels[: len(values)].copy_(values, non_blocking=True)
            encode = lambda: made.copy_(self._bridge_states(pixel_values=pixels))  # noqa: E731
            self._captured((size, "encode"), encode)()
        else:
            made = self._bridge_states(**{name: values.to(self.model.device)})
        rows = buffers.bridge[:, : made.shape[1] * k]
        rows.unflatten(1, (-1, k)).copy_(made[:, :, None])

    def _bridge_states(self, **image: Tensor) -> Float[Tensor, "2 B H N C"]:
        """Keys and values of the visual tokens in the bridge."""
        tokens = self.model.encode(**image)[1].visual_tokens
        tokens = tokens.to(self.model.decoder.language_model.dtype)
        attention = self.model.decoder.bridge.attention
        weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        made = [F.linear(tokens, weight[part], bias[part]) for part in (1, 2)]  # [B,N,D] each
        heads = torch.stack(made).unflatten(-1, (attention.num_heads, -1))  # [2,B,N,H,C]
        return heads.transpose(2, 3)

    def _captured(
        self, key: tuple, function: Callable[[], object], buffers: Buffers | None = None
    ) -> Callable[[], object]:
        """A function of the buffers as a CUDA graph, which is kept under the key."""
        if not self._captures:
            return function
        if key in self._graphs:
            return self._graphs[key]
        if len(self._graphs) == GRAPHS:
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
        if buffers is not None:
            buffers.position.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, selects kernels and allocates
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"CUDA captured no graph ({error}); captions are made without, more slowly.",
                stacklevel=2,
            )
            self._captures, self._refused = False, True
            return function
        return self._graphs.setdefault(key, graph.replay)

    def _choose(self, buffers: Buffers, choice: Choice, score: Callable) -> None:
        """One step: score the next token of every row, choose it, and append it."""
        end, position = self.model.config.end_token_id, buffers.position
        logits = score(self.model.decoder, self._projections, self._head, buffers).float()  # [R,V]
        if choice.beams > 1:
            return extend_beams(choice, logits, buffers, end)
        chosen = choice.next_tokens(logits, buffers.ids, position + 1, end, buffers.draws)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])  # [R,1]
        buffers.logprobs.index_copy_(1, position, logprobs)
        buffers.logits.index_copy_(1, position, logits.index_select(1, buffers.kept)[:, None])
        buffers.finished |= chosen == end
        position += 1
        buffers.ids.index_copy_(1, position, chosen[:, None])
