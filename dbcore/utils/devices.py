"""Numbers on their way to a GPU, for which nobody waits."""

from typing import Any

import torch


def to_device(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """{name: tensor} of CPU tensors on a device, in one copy, which a GPU makes when it can.

    Each copy from ordinary memory would stop the program until the GPU has done all that it was
    given before; one from page-locked memory does not, and PyTorch keeps that memory until it is
    done.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return tensors
    packed, places = pack(tensors)
    if kind == "cuda":
        packed = packed.pin_memory()
    return unpack(packed.to(device, non_blocking=kind == "cuda"), places)


def pack(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """(bytes of all tensors, one after the other, {name: (dtype, shape, how many bytes)}).

    The widest numbers come first, so that each tensor begins at a multiple of its numbers' width.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    parts = [tensors[name].contiguous().flatten().view(torch.uint8) for name in names]
    places = {name: (tensors[name].dtype, tensors[name].shape, len(part))
              for name, part in zip(names, parts)}
    return torch.cat(parts), places


def unpack(packed: torch.Tensor, places: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors again, as views of `packed`."""
    parts = packed.split([count for _, _, count in places.values()])
    return {name: part.view(dtype).view(shape)
            for (name, (dtype, shape, _)), part in zip(places.items(), parts)}
