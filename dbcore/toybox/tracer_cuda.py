"""The tracer on a GPU: one thread a pixel, many scenes a launch.

numba compiles the functions of `tracer` for the GPU as it does for the CPU; only the loop over
pixels is another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda

from dbcore.toybox.tracer import _pixel

if TYPE_CHECKING:
    import torch

if not hasattr(np, "row_stack"):  # NumPy 2.5 has it no longer; numba-cuda 0.30 asks for it
    np.row_stack = np.vstack

BLOCK = (8, 8, 1)  # pixels that are traced together: neighbours, which take about the same path


@cuda.jit(fastmath=True)
def _render_pixels(starts, prims, turn, eye, tilt, sun, materials, pattern, place, tint, flip, out):
    col, row, k = cuda.grid(3)
    size = out.shape[1]
    if col < size and row < size:
        r, g, b = _pixel(prims[starts[k]:starts[k + 1]], turn[k], eye[k], tilt[k], sun[k],
                         materials[k], pattern[k], place[k], tint[k], row, col, size)
        seen = size - 1 - col if flip[k] else col
        out[k, row, seen, 0], out[k, row, seen, 1], out[k, row, seen, 2] = r, g, b


def launch(packed: list, out: Any, stream: Any = 0) -> None:
    """Trace scenes, as `tracer.pack` gives them, into `out`, float32 (n, size, size, 3)."""
    count, size = out.shape[:2]
    blocks = -(-size // BLOCK[0])
    _render_pixels[(blocks, blocks, count), BLOCK, stream](*packed, out)


def render_packed_cuda(packed: list[np.ndarray], size: int,
                       device: torch.device | str) -> torch.Tensor:
    """Scenes, as `tracer.pack` gives them, to a tensor on the GPU, float32 (n, size, size, 3).

    Queued on torch's current stream; the host waits for nothing.
    """
    import torch

    from dbcore.toybox.fit import to_device

    out = torch.empty(len(packed[-1]), size, size, 3, device=device)
    held = [to_device(torch.from_numpy(a), device) for a in packed]
    stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
    launch([cuda.as_cuda_array(a) for a in held], cuda.as_cuda_array(out), stream)
    return out
