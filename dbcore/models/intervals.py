"""What acts in a part of the sampling steps only: guidance, and the LoRA.

Guidance harms while the image is nearly all noise, where it drives samples of one prompt to one
template, and is of no use at the end (Kynkäänniemi et al. 2024, arXiv 2404.07724). The paper gives
the interval in noise levels sigma; here it is in fractions of the steps, which mean the same for
every base and sampler: step k of n is in [low, high) where k / n is. 0 is pure noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

# A pipeline that began with guidance goes on to predict both halves, and its arguments have two
# halves: the smallest scale that it takes for guidance gives the prompt's own half.
NO_GUIDANCE = math.nextafter(1.0, 2.0)


class Intervals:
    """Guidance and LoRAs on in their intervals and off outside, over the steps of a pipeline call.

    `denoiser`: its adapters are switched; those of the text encoders, which have been used by then,
    are not. `guidance_scale`: within the interval. In the `with` block, `first_guidance` is the
    scale to call the pipeline with, and `after_step` its `callback_on_step_end`; after it the
    adapters are on again.
    """

    def __init__(self, denoiser: torch.nn.Module, steps: int, guidance_scale: float,
                 guidance_interval: Sequence[float], lora_interval: Sequence[float],
                 callback: Callable | None = None):
        self.layers = [module for module in denoiser.modules()
                       if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
        self.guidance_scale, self.callback = guidance_scale, callback
        self.guided, self.adapted = ([low <= k / steps < high for k in range(steps)]
                                     for low, high in (guidance_interval, lora_interval))

    def __enter__(self) -> None:
        self.switch(self.adapted[0])

    def __exit__(self, *_: object) -> None:
        self.switch(True)

    @property
    def first_guidance(self) -> float:
        return self.guidance(0)

    def guidance(self, step: int) -> float:
        return self.guidance_scale if self.guided[step] else min(self.guidance_scale, NO_GUIDANCE)

    def switch(self, on: bool) -> None:
        """Every adapter on the denoiser on or off; they stay frozen."""
        for layer in self.layers:
            if layer.disable_adapters == on:
                layer.enable_adapters(on)
                layer.requires_grad_(False)

    def after_step(self, pipeline: Any, step: int, t: Any,
                   inputs: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(self.guided):
            pipeline._guidance_scale = self.guidance(step + 1)
            self.switch(self.adapted[step + 1])
        return self.callback(pipeline, step, t, inputs) if self.callback else inputs
