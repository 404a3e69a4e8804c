"""The original's generation method, the baseline of every faster one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvision_lab.model.captioner import QVisionForConditionalGeneration


@torch.no_grad()
def generate_the_original_way(
    model: QVisionForConditionalGeneration,
    pixel_values: Float[Tensor, "1 3 H W"],
    *,
    max_new_tokens: int = 30,
    min_length: int = 5,
) -> Int[Tensor, "1 T"]:
    """Greedy ids of one image, without any cache, as the published code generates them.

    CLIP runs once; each step runs the Q-Former and all words so far again, and scores the next
    word of every one of them. The settings mean what they mean in `generate`.
    """
    image_tokens = model.vision(pixel_values)  # [1,P,D]
    ids = torch.full((1, 1), model.config.start_token_id, device=image_tokens.device)
    for length in range(1, 1 + max_new_tokens):
        logits = model(ids, image_tokens=image_tokens).logits[:, -1]  # [1,V]
        if length < min_length:
            logits[:, model.config.end_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == model.config.end_token_id:
            break
    return ids
