"""A frozen network's weights in 8 bits: a quarter of float32's memory, half of float16's.

    W ~ s q,    s = max |W| / 127,    q = round(W / s)

with one s for each output channel, a row of W: absmax quantization with vector-wise constants
(Dettmers et al. 2022, LLM.int8(), section 2.1). What is multiplied and added stays in the network's
own precision: a layer's weights are made from q each time they are used, and are gone again after
it. Convolutions, two thirds of Stable Diffusion's weights, are quantized too, which libraries for
language models leave alone.
"""

import torch
from torch.nn.utils import parametrize


def quantize(module: torch.nn.Module) -> torch.nn.Module:
    """Put the weights of every linear layer and convolution of a frozen network in 8 bits, in
    place; returns it.

    Raises RuntimeError if a weight is to be trained: integers have no gradient.
    """
    layers = [m for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Int8())
    return module


class Int8(torch.nn.Module):
    """A weight (out, ...) as int8 of its shape and one scale an output channel, (out, 1, ...), of
    its own dtype."""

    def forward(self, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return q.to(scale.dtype) * scale

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # a row may be all 0
        rows = weight.flatten(1).abs().amax(1).float().clamp(min=torch.finfo(torch.float16).tiny)
        scale = (rows / 127).to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
        # a scale rounded down would reach 128
        q = (weight.float() / scale.float()).round().clamp(-127, 127)
        return q.to(torch.int8), scale
