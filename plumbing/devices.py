"""Devices, precision, and random numbers that need no state."""

import os
from contextlib import nullcontext

import numpy as np
import torch

from plumbing.config import check, reported_as


def generator_at(device, *numbers):
    """A random generator that is a function of numbers (seed, step, ...): nothing to save or restore."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


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
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(batch_size % world_size == 0, f"batch_size={batch_size} cannot be shared by {world_size} processes")
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size


def precision(device):
    """bf16 where the hardware has it, else fp32."""
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype)
