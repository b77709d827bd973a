"""One process of a distributed BinaryDM run; spawned by a test, so it lives in a module of its own."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from binary_models import tiny_denoiser, tiny_inputs
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dq_plugins.passes.binarization import BinaryDMCallback, LayerChoice, train_quantized


def train_worker(rank: int, port: int, folder: str) -> None:
    """Train four steps with the transition in the middle; write the state to ``folder``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    teacher = tiny_denoiser()
    names = [n for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model = train_quantized(copy.deepcopy(teacher), {n: LayerChoice("evolvable") for n in names})
    callback = BinaryDMCallback(model, teacher, blocks=("down.0", "middle"), evolve_at=1)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(4):
        loss = callback.step(wrapped(**tiny_inputs(seed=10 * i + rank)).square().mean())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step(i)
    state = {**model.state_dict(), **callback.state_dict()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()
