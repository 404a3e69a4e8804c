"""Optimizers: Muon for hidden matrices, AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, except that all matrices of one shape are batched, in float32 on a CPU.

    A GPU takes fewer launches so. A CPU without instructions for bfloat16, torch's precision for
    these products, took four times as long for them as for the rest of a step. The state is the
    same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        alike = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[number, weight.shape].append(weight)
        for (number, (rows, columns)), weights in alike.items():  # each [rows,columns]
            group, states = self.param_groups[number], [self.state[weight] for weight in weights]
            for state, weight in zip(states, weights, strict=True):
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights]
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
            x = torch.stack(updates)  # [n,rows,columns]
            x = x.bfloat16() if x.is_cuda else x
            x = x.mT if rows > columns else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            a, b, c = group["ns_coefficients"]
            for _ in range(group["ns_steps"]):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = x.mT if rows > columns else x
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, (x.float() * -rate).contiguous().unbind())
        return loss


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of a network and AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is meant for hidden
    matrices; embeddings, heads, biases and norms stay with AdamW, as its authors advise. For the
    bridge both rates are multiplied by `bridge_rate`.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        matrix_rate: float,
        weight_decay: float,
        bridge_rate: float = 1.0,
    ):
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices, others = defaultdict(list), defaultdict(list)  # by the factor of their rate
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and "head" not in name and id(parameter) not in embeddings
            if parameter.requires_grad:
                factor = bridge_rate if "bridge" in name else 1.0
                (matrices if hidden else others)[factor].append(parameter)
        groups = [{"params": part, "lr": x * matrix_rate} for x, part in matrices.items()]
        self.muon = BatchedMuon(groups, matrix_rate, weight_decay, momentum=0.95)
        groups = [{"params": part, "lr": x * rate} for x, part in others.items()]
        self.adamw = torch.optim.AdamW(
            groups, rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
        )
        super().__init__(self.muon.param_groups + self.adamw.param_groups, defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        # The parts have new groups now; those that the schedule writes rates into must be theirs.
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
