"""Memory that a training step needs, estimated before it runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.training.recipe import Training


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs on each device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """Gradients come as activations go, so the larger of the two counts."""
        return self.weights + self.optimizer + max(self.gradients, self.activations)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items())
        return f"about {self.peak / 1e9:.1f} GB of memory at the peak, of {parts}"


def estimate_memory(
    model: QVisionForConditionalGeneration,
    settings: Training,
    images: int,
    lengths: Sequence[int] | None = None,
) -> MemoryEstimate:
    """Estimate a step's memory, `images` per batch on one device; within 25% if not captured.

    A transformer layer keeps 34 + 5 * heads * length / width bytes per value for its gradient in
    half precision, twice that in single (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2). GPT-Neo
    keeps nothing where none of it is trained. `lengths` of captions are in tokens; None: longest.
    """
    config, text = model.config, model.decoder.language_model
    lengths = lengths or [settings.max_tokens]
    rows, length = images * settings.captions_per_image, max(lengths)
    words = rows * (sum(lengths) / len(lengths) - 1)  # <START> is never scored
    width, heads = config.hidden_size, config.num_attention_heads
    half = settings.precision != "float32"

    def layer(sequences: int, length: int, heads: int) -> float:
        return sequences * length * (34 * width + 5 * heads * length) * (1 if half else 2)

    trained_layers = len(text.h) if text.num_parameters(only_trainable=True) else 0
    layers = trained_layers * layer(rows, length, config.text_config.num_heads)
    queries = 2 * config.num_qformer_blocks * layer(images, 1 + config.num_query_tokens, heads)
    logits = 3 * 4 * words * config.vocab_size  # three times, in single precision
    trained, all_of_it = model.num_parameters(only_trainable=True), model.num_parameters()
    # In half precision, the weights behind the tower are cast to it at each step.
    cast = 2 * (all_of_it - model.vision.tower.num_parameters()) if half else 0
    activations = int(layers + queries + layer(rows, length, heads) + logits + cast)
    return MemoryEstimate(4 * all_of_it, 4 * trained, 8 * trained, activations)
