"""Several processes: how they are launched, and what they tell each other at each step."""

import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator

from dbcore.config import need

# The first process alone draws validation images and the report; NCCL would wait ten minutes.
PATIENCE = timedelta(hours=6)


def check_launch() -> None:
    """Raises ConfigError where `accelerate launch` has started one process of several.

    It does on a CPU, and says nothing.
    """
    if "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    import psutil

    words = " ".join(psutil.Process().parent().cmdline()).replace("=", " ")
    asked = re.search(r"--num[-_]processes (\d+)", words)
    need(not asked or int(asked[1]) < 2,
         f"accelerate launch --num_processes {asked and asked[1]} has started one process, as it "
         "does on CPUs: launch with `torchrun --nproc_per_node N -m dbcore train ...`, or leave "
         "the number out")


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    """One sum over the processes: a LoRA's gradients are a few megabytes, no module is wrapped."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    split_into(gradients, flat.div_(world))


@torch.no_grad()
def share_weights(parameters: list[torch.nn.Parameter], world: int) -> None:
    """All begin with the first process's numbers, even where another machine draws others."""
    if world == 1:
        return
    flat = torch.cat([p.flatten() for p in parameters])
    torch.distributed.broadcast(flat, 0)
    split_into(parameters, flat)


def split_into(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    """Copy the numbers of one long vector into tensors, one after the other."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def wait_for_all(accelerator: Accelerator, what: str) -> None:
    """Return when every process is here; the first one says what for, and how long it took."""
    if accelerator.num_processes == 1:
        return
    accelerator.print(f"{what}: this process has made its share, and waits for the others.")
    began = time.monotonic()
    accelerator.wait_for_everyone()
    accelerator.print(f"{what}: all there after {time.monotonic() - began:.0f} s.")


def gather(loss: torch.Tensor, t: torch.Tensor, losses: torch.Tensor, batch_size: int,
           world: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's losses over every process, as one process with the whole batch would have them.

    `loss`: (batches,), `t` and `losses`: (batches, samples of this process), of which the first
    `batch_size` are of the subject.
    """
    if world == 1:
        return loss, t, losses
    own, timesteps = torch.cat([loss[:, None], t, losses], dim=1), t.dtype
    everyones = [torch.empty_like(own) for _ in range(world)]
    torch.distributed.all_gather(everyones, own)
    # (process, batch, ...)
    loss, *samples = torch.stack(everyones).split([1, t.shape[1], t.shape[1]], dim=2)
    # the subject's samples of all processes come before the class's
    t, losses = (x.unflatten(2, (-1, batch_size)).movedim(0, 2).flatten(1) for x in samples)
    return loss, t.to(timesteps), losses


def agree(stop: bool, device: torch.device, world: int) -> bool:
    """Whether any process was told to stop: all leave at the same step."""
    if world == 1:
        return stop
    flag = torch.tensor([int(stop)], device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())
