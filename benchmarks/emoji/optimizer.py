"""The optimizer of the training scripts: Muon for weight matrices, AdamW for all else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) takes the momentum of a matrix's gradient to the nearest
orthogonal matrix; the factor 0.2 sqrt(max(rows, columns)) gives its steps AdamW's size (Liu et al. 2025,
arXiv 2502.16982), so both share one learning rate. A convolution counts as the matrix (out, in * height * width).
"""

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by five Newton-Schulz steps. For parameters of two dimensions and more."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = dict[torch.Size, list[tuple[nn.Parameter, Tensor]]]()  # one alone is too small to be quick
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append((p, self._direction(p, p.grad, group["momentum"])))
            for shape, some in alike.items():
                scale = 0.2 * max(shape) ** 0.5
                matrices = orthogonalise(torch.stack([direction.flatten(1) for _, direction in some]))
                for (p, _), matrix in zip(some, matrices):
                    p.mul_(1.0 - group["lr"] * group["decay"])
                    p.add_(matrix.view_as(p).to(p.dtype), alpha=-group["lr"] * scale)

    def _direction(self, p: nn.Parameter, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean = state["momentum"].mul_(momentum).add_(grad)
        return torch.add(grad, mean, alpha=momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices `(B, m, n)` with all their singular values brought near 1, in bfloat16."""
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT.contiguous()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Both:
    """Muon and AdamW stepped together, one learning rate for both."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], decay: float) -> None:
        self.optimizers = (
            Muon(matrices, lr=0.0, decay=decay),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )

    def step(self, rate: float) -> None:
        """Take one step at learning rate `rate` and forget the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
