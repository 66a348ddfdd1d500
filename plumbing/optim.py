"""The optimizers and the learning rate of both trainings."""

import math

import torch
import torch.nn as nn

from plumbing.devices import precision


def configure_optimizers(module, learning_rate, betas, decay_per_step, muon):
    """-> AdamW and, if muon > 0, Muon (Jordan et al. 2024) at that rate for the matrices of linear layers.

    Only matrices decay: a step at the peak rate multiplies them by 1 - decay_per_step.
    """
    linear = []
    if muon:
        linear = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in module.parameters() if all(p is not matrix for matrix in linear)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay_per_step / learning_rate},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if muon:
        optimizers.append(Muon(linear, {"lr": muon, "weight_decay": decay_per_step / muon}))
    return optimizers


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose update of each matrix is made orthogonal (Jordan et al. 2024).

    Equal to torch.optim.Muon, which computes in bf16 even where the hardware is many times slower in it.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = self.state[matrix]["momentum_buffer"]
                momentum.lerp_(matrix.grad, 0.05)
                update = orthogonalise(matrix.grad.lerp(momentum, 0.95))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = matrix.shape
                matrix.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(matrix):
    """U S V^T -> about U V^T: five Newton-Schulz steps bring the singular values S between 0.7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(precision(str(matrix.device)))
    if tall:
        x = x.T  # the products below are then smaller
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    if tall:
        x = x.T
    return x.type_as(matrix)


def schedule(step, warmup, max_iters):
    """The learning rate at a step, as a share of its peak: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_iters - warmup)))
