"""The optimizers and the learning rate of both trainings."""

import math

import torch
import torch.nn as nn


def configure_optimizers(module, learning_rate, betas, decay_per_step, muon):
    """AdamW and, where muon > 0, Muon (Jordan et al. 2024) at that rate for the matrices of linear layers.

    Only matrices decay: a step at the peak rate multiplies them by 1 - decay_per_step. Returns a list.
    """
    linear = [m.weight for m in module.modules() if isinstance(m, nn.Linear)] if muon else []
    rest = [p for p in module.parameters() if all(p is not matrix for matrix in linear)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay_per_step / learning_rate},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if muon:
        options = {"lr": muon, "weight_decay": decay_per_step / muon, "adjust_lr_fn": "original"}
        optimizers.append(torch.optim.Muon(linear, momentum=0.95, **options))
    return optimizers


def schedule(step, warmup, max_iters):
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_iters - warmup)))
