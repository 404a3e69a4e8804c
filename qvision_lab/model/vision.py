"""Stage 1: pixels [B,3,H,W] -> image tokens [B,P,D]."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.backends import cudnn
from transformers import PreTrainedModel


class VisionEncoder(nn.Module):
    """A frozen vision tower and a projection to the width D.

    In the published model CLIP's (Radford et al. 2021, arXiv:2103.00020). The tower stays frozen in
    QVision, so its output for an image never changes and can be cached: `encode` comes before such
    a cache, `project` after it.
    """

    def __init__(self, tower: PreTrainedModel, num_patches: int, width: int):
        super().__init__()
        self.tower = tower
        self.num_patches = num_patches
        self.projection = nn.Linear(tower.config.hidden_size, width)

    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P C"]:
        """The tower's last hidden state of each patch, without prefix tokens such as CLIP's CLS.

        Raises:
            ValueError: if the tower gives other states than its configuration says.
        """
        before, cudnn.allow_tf32 = cudnn.allow_tf32, False  # cuDNN's default for float32 is TF32
        try:
            states = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state
        finally:
            cudnn.allow_tf32 = before
        is_map, width = states.ndim == 4, self.projection.in_features
        if is_map:  # [B,C,h,w]
            states = states.flatten(2).transpose(1, 2)
        prefix = states.shape[1] - self.num_patches
        if prefix < 0 or (prefix and is_map) or states.shape[2] != width:
            raise ValueError(
                f"the tower gives {states.shape[1]} states of width {states.shape[2]}, but "
                f"vision_config says {self.num_patches} patches of width {width}: set its "
                "image_size, patch_size and hidden_size to what the tower has."
            )
        return states[:, prefix:]  # [B,P,C]

    def project(self, vision_states: Float[Tensor, "B P C"]) -> Float[Tensor, "B P D"]:
        """Map the tower's width C to the width D of all later stages."""
        return self.projection(vision_states.to(self.projection.weight.dtype))  # [B,P,D]

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        return self.project(self.encode(pixel_values))

    def train(self, mode: bool = True) -> "VisionEncoder":
        """A frozen tower keeps its batch statistics: it stays in evaluation mode."""
        super().train(mode)
        self.tower.train(mode and any(weight.requires_grad for weight in self.tower.parameters()))
        return self
