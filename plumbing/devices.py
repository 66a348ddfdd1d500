"""Devices, precision, and random numbers that need no state."""

import math
import os
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.errors import check, reported_as


def rng_at(device, *numbers):
    """A random generator that is a function of numbers (seed, step, ...): nothing to save or restore."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def normal(rng, shape, device):
    """Standard normal numbers. rng: a generator, or a list with one for each row, on the CPU, so that a row
    does not depend on the others.
    """
    if isinstance(rng, list):
        return torch.stack([torch.randn(shape[1:], generator=each) for each in rng]).to(device)
    return torch.randn(shape, generator=rng, device=device)


def uniform(rng, shape, device):
    """Numbers between 0 and 1, 1 excluded. rng: see `normal`."""
    if isinstance(rng, list):
        return torch.stack([torch.rand(shape[1:], generator=each) for each in rng]).to(device)
    return torch.rand(shape, generator=rng, device=device)


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps ... -> a device name. Raises InputError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # under torchrun each process has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with reported_as(f"no device {name!r}, try --device=cpu"):
        torch.zeros(1, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)  # for pinning and synchronising, which take no device
    return name


def join_processes(device, batch_size):
    """Joins the processes that torchrun started, if any -> the rank of this one, and how many there are."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check(batch_size % world_size == 0, f"batch_size={batch_size} cannot be shared by {world_size} processes")
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size


def precision(device):
    """bf16 where the hardware has it, else fp32."""
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every torch
        native = device == "cpu" and supported is not None and supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    """Mixed precision where the hardware has bf16, else nothing."""
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype)


def attend(q, k, v, mask=None, causal=False):
    """torch's scaled_dot_product_attention: q (B, heads, T, head), k and v (B, heads, S, head) -> like q.

    mask: (B, 1, T, S), True where q looks. In bf16 on a CPU, torch's kernel is slower than the formula
    written out, and its gradient takes four times as long.
    """
    if v.dtype != torch.bfloat16 or not v.is_cpu or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores += torch.full(scores.shape[-2:], -math.inf, dtype=v.dtype).triu(1)
    return scores.softmax(-1).type_as(v) @ v
