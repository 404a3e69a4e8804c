"""Stage 1: pixels [B,3,H,W] -> image tokens [B,P,D]."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.backends import cudnn
from transformers import CLIPVisionModel


class VisionEncoder(nn.Module):
    """CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020) and a projection to the width D.

    The tower stays frozen in QVision, so its output for an image never changes and can be cached:
    `encode` comes before such a cache, `project` after it.
    """

    def __init__(self, tower: CLIPVisionModel, width: int):
        super().__init__()
        self.tower = tower
        self.projection = nn.Linear(tower.config.hidden_size, width)

    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P C"]:
        """CLIP's last hidden state of each patch: before the final norm, without the CLS token."""
        before, cudnn.allow_tf32 = cudnn.allow_tf32, False  # cuDNN's default for float32 is TF32
        try:
            states = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state  # [B,1+P,C]
        finally:
            cudnn.allow_tf32 = before
        return states[:, 1:]  # [B,P,C]

    def project(self, vision_states: Float[Tensor, "B P C"]) -> Float[Tensor, "B P D"]:
        """Map CLIP's width C to the width D of all later stages."""
        return self.projection(vision_states.to(self.projection.weight.dtype))  # [B,P,D]

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        return self.project(self.encode(pixel_values))
