"""LoRA on a base's networks: put on, count, save, load, merge. The layers are peft's.

    y = W x + (alpha / r) B A x        Hu et al. 2021, equation 3; B starts at 0, so at first
                                       nothing changes
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.parametrize import is_parametrized

from dbcore.config import need
from dbcore.models.adapter import Adapter, Layer, LoraFileError, plain_name
from dbcore.models.embeddings import remove_tokens, tokens_of
from dbcore.models.lora_files import (
    fits,
    lora_config,
    modules_by_name,
    read_adapter,
    save_diffusers,
)
from dbcore.models.tlora import exponent_of, is_masked, mask_ranks
from dbcore.utils.seeding import key

if TYPE_CHECKING:
    from dbcore.models.base import Family

# How diffusers' denoisers and transformers' text encoders call their projections: no network has
# both.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "fc1", "fc2"]
PRESETS = {"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD, "all": [""]}


class KeepsFloat32(LoraLayer):
    """A peft layer that leaves A, drawn in float32, unrounded on a base in half precision.

    So a run in half precision starts where one in float32 does.
    """

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str,
                                              device: torch.device | None = None) -> None:
        device = device or self.get_base_layer().weight.device
        for parts in (getattr(self, kind) for kind in self.adapter_layer_names):
            if adapter_name in parts and not any(p.is_meta for p in parts.parameters()):
                parts[adapter_name] = parts[adapter_name].to(device)


class LoraLinear(KeepsFloat32, peft_lora.Linear):
    """peft's LoRA on a linear layer, in float32."""


class LoraConv2d(KeepsFloat32, peft_lora.Conv2d):
    """The same on a convolution."""


class LoraConfig(peft.LoraConfig):
    """peft's, with these layers."""

    def __post_init__(self):
        super().__post_init__()
        self._register_custom_module({torch.nn.Linear: LoraLinear,
                                      torch.nn.Conv2d: LoraConv2d})


def target_modules(module: torch.nn.Module, layers: str,
                   presets: Mapping[str, Sequence[str]] = PRESETS) -> list[str]:
    """Names of the linear layers and convolutions of a network that a choice of `lora_layers`
    means.

    `layers`: "attention", "attention+ff" (see `presets`), "all" of them, or endings of names with
    commas. Raises ConfigError if nothing in the network has such a name.
    """
    named = [name.strip() for name in layers.split(",") if name.strip()]
    wanted = {**PRESETS, **presets}.get(layers) or named
    endings = tuple("." + name for name in wanted)
    found = [name for name, m in module.named_modules()
             if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
             and ("" in wanted or f".{name}".endswith(endings))]
    need(found, f"--lora_layers {layers}: no linear layer or convolution of "
         f"{type(module).__name__} has such a name; choose {', '.join(PRESETS)}, or endings such "
         f"as {', '.join(ATTENTION[:3])}")
    return found


def add_lora(module, rank, alpha, layers="attention", dropout=0.0, use_dora=False, use_rslora=False, seed=0,
             name="default", presets=PRESETS):
    """Put a LoRA on a network in place; the base's weights are frozen, A and B are float32.

    A is drawn from N(0, 1 / rank^2) by `seed`, B is 0, as in diffusers' scripts. `presets`: what names of
    choices mean in this network (`Family.lora_targets`). Returns the trainable parameters in a fixed order.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=use_dora, use_rslora=use_rslora,
                        init_lora_weights="gaussian", target_modules=target_modules(module, layers, presets))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the seed below is every device's
        torch.manual_seed(key(seed, "lora", sample=type(module).__name__))
        module.add_adapter(config, adapter_name=name)
    for parameter in lora_parameters(module):
        parameter.data = parameter.data.float()
    for path, layer in lora_layers(module) if dropout else []:
        layer.lora_dropout[name] = SampleDropout(dropout, path)
    return lora_parameters(module)


class MixedLinear(torch.nn.Linear):
    """A linear layer whose weights are float32, and whose products are in its input's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class MixedConv2d(torch.nn.Conv2d):
    """The same of a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias)


MIXED = {torch.nn.Linear: MixedLinear, torch.nn.Conv2d: MixedConv2d}


def multiply_in_half(module: torch.nn.Module, name: str = "default") -> None:
    """Let a LoRA on a network in half precision multiply in it; weights and gradients stay float32.

    peft would make a float32 copy of each input, keep it for the gradient, and multiply without a
    GPU's tensor cores. torch.autocast would not, but has norms in float32, which a frozen base does
    without. DoRA is left as it is: the norms that it divides by need float32.
    """
    for _, layer in lora_layers(module):
        if name in layer.lora_A and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            for part in (layer.lora_A[name], layer.lora_B[name]):
                part.__class__ = MIXED.get(type(part), type(part))


class SampleDropout(torch.nn.Module):
    """Dropout in which a sample loses the same inputs whoever else is in its batch, and on
    whichever process.

    PyTorch's own draws one mask for the whole batch from a state that is carried along; here each
    row has its key, and the layer its name, so that gradient checkpointing, too, sees the same mask
    twice.
    """

    def __init__(self, p: float, name: str):
        super().__init__()
        self.p, self.name = p, name
        self.keys: Sequence[int] | None = None

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (n, ...), for n keys from `set_dropout`; without keys PyTorch's own dropout."""
        if not self.training or self.keys is None:
            return torch.nn.functional.dropout(x, self.p, self.training)
        generators = [torch.Generator(x.device).manual_seed(key(own, self.name))
                      for own in self.keys]
        drawn = torch.stack([torch.rand(x.shape[1:], device=x.device, generator=one)
                             for one in generators])
        return x * (drawn >= self.p) / (1 - self.p)


def set_dropout(modules: Mapping[str, torch.nn.Module], keys: Sequence[int]) -> None:
    """Give the dropout of {component: network} the keys of the next batch, one integer a sample."""
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, SampleDropout):
                part.keys = keys


def lora_layers(module: torch.nn.Module) -> list[tuple[str, LoraLayer]]:
    """[(name, peft layer)] of a network, in its own order."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def adapter_layers(module: torch.nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """[(name, peft layer)] of a network, of LoRA or any other kind of adapter."""
    return [(name, layer) for name, layer in module.named_modules()
            if isinstance(layer, BaseTunerLayer)]


def lora_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters of a network's LoRA."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a network."""
    return sum(p.numel() for p in lora_parameters(module)), sum(p.numel()
                                                                for p in module.parameters())


def read_lora(modules: Mapping[str, torch.nn.Module], name: str = "default") -> Adapter:
    """The LoRA on {component: network} as a plain `Adapter`, float32 copies on the CPU."""
    layers: dict[str, dict[str, Layer]] = {}
    for component, module in modules.items():
        for path, layer in lora_layers(module):
            if name not in layer.lora_A:
                continue
            parts = [layer.lora_A[name].weight, layer.lora_B[name].weight]
            if name in layer.lora_magnitude_vector:
                parts.append(layer.lora_magnitude_vector[name].weight.flatten())
            down, up, *rows = (part.detach().float().cpu().clone() for part in parts)
            named = layers.setdefault(component, {})
            named[plain_name(component, path)] = Layer(down, up, layer.scaling[name], *rows)
    return Adapter(layers)


def save_lora(modules: Mapping[str, torch.nn.Module], path: str | Path,
              notes: Mapping[str, Any] | None = None, name: str = "default") -> Path:
    """Write the LoRA on {component: network} as one file that a stock pipeline's load_lora_weights
    reads."""
    adapter = read_lora(modules, name)
    return save_diffusers(Adapter(adapter.layers, dict(notes or {})), path)


def load_lora(base: Family, path: str | Path, scale: float = 1.0, name: str = "default") -> Family:
    """Put a saved LoRA (a run's folder; a file of diffusers, kohya or peft) on a base, beside
    others.

    It is then used alone; `set_scale` mixes several. Raises LoraFileError for a file that cannot be
    used, or was trained on a base of another shape; then nothing has changed.
    """
    adapter = read_adapter(path, base.name)
    networks = {name: getattr(base, name) for name in base.lora_targets if name in adapter.layers}
    check_fit(adapter, networks, path)
    for component, module in networks.items():
        layers = adapter.layers[component]
        with warnings.catch_warnings():  # a second LoRA beside the first is meant
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            module.add_adapter(lora_config(layers), adapter_name=name)
        for plain, layer in ((plain_name(component, n), found) for n, found in lora_layers(module)):
            if plain in layers:
                copy_weights(layer, layers[plain], name)
        module.requires_grad_(False)
    if (exponent := exponent_of(adapter.notes)) is not None:
        mask_ranks(base, exponent, name)
    set_scale(base, {name: scale})
    return base


def check_fit(adapter: Adapter, modules: Mapping[str, torch.nn.Module], path: str | Path) -> None:
    """Raises LoraFileError unless each layer is of the size of a layer of {component: network}."""
    own = modules_by_name(modules)
    for component, name, layer in adapter.every():
        if not fits(own.get((component, name)), layer):
            size = f"{tuple(layer.down.shape[1:])} to {len(layer.up)}"
            raise LoraFileError(f"{path} does not fit this base, which has no "
                                f"{component}.{name} of size {size}; "
                                "give the base that it was trained on")


@torch.no_grad()
def copy_weights(peft_layer: LoraLayer, layer: Layer, name: str) -> None:
    """Copy a saved layer's numbers into one peft layer."""
    like = peft_layer.get_base_layer().weight
    for linear, values in ((peft_layer.lora_A[name], layer.down),
                           (peft_layer.lora_B[name], layer.up)):
        linear.weight.data = values.to(like.device, torch.float32).reshape(linear.weight.shape)
    if layer.magnitude is not None:
        vector = peft_layer.lora_magnitude_vector[name]
        vector.weight.data = layer.magnitude.to(like.device,
                                                torch.float32).reshape(vector.weight.shape)
    peft_layer.scaling[name] = layer.scale


def set_scale(base, scales):
    """{name: scale}: use just these LoRAs, each `scale` times as strong as it was trained (0 is off).

    Raises ConfigError for a name that is not there, a scale that is not finite, and while a LoRA is
    merged into the weights.
    """
    layers = [layer for module in base.loaded().values() for _, layer in lora_layers(module)]
    known = sorted({name for layer in layers for name in layer.lora_A})
    for name in scales:
        need(name in known, f"there is no LoRA named {name!r}; there is {', '.join(known) or 'none'}")
    need(all(map(math.isfinite, scales.values())), f"{scales}: give finite numbers as scales")
    need(not any(layer.merged for layer in layers), "a LoRA is merged into the weights: unmerge_lora it first")
    for layer in layers:
        # a DoRA at scale 0 would still rescale the weights' rows, so 0 takes the LoRA out
        there = [name for name in scales if name in layer.lora_A and scales[name]]
        for name in there:
            layer.trained_scaling = {**getattr(layer, "trained_scaling", {})}
            layer.trained_scaling.setdefault(name, layer.scaling[name])
            layer.scaling[name] = layer.trained_scaling[name] * scales[name]
        layer.set_adapter(there)
        layer.requires_grad_(False)


@contextmanager
def adapters_off(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """In the block, {component: network} answer as the frozen base does.

    New tokens have the vectors that they began with.
    """
    layers = [layer for module in modules.values() for _, layer in adapter_layers(module)]
    tokens = tokens_of(modules)
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    for part in tokens:
        part.is_on = False
    try:
        yield
    finally:
        for part in tokens:
            part.is_on = True
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained:  # peft's switch also thaws and freezes
            parameter.requires_grad_(was)


def merge_lora(module: torch.nn.Module) -> None:
    """W <- W + (alpha / r) B A in every layer: the same images, no extra work.

    Raises ConfigError for weights in 8 bits, in which most of a LoRA would be rounded away, and for
    a T-LoRA.
    """
    layers = [layer for _, layer in lora_layers(module)]
    need(not any(is_parametrized(layer.get_base_layer()) for layer in layers),
         "a LoRA cannot be merged into weights in 8 bits: load the base without low_vram")
    need(not any(map(is_masked, layers)), "a T-LoRA cannot be merged into the weights, as it has "
         "other ranks at each timestep: use it as it is")
    for layer in layers:
        layer.merge()


def unmerge_lora(module: torch.nn.Module) -> None:
    """Take the merged LoRA out again."""
    for _, layer in lora_layers(module):
        layer.unmerge()


def remove_lora(base: Family) -> None:
    """The base as it was: every adapter is dropped (a merged one is taken out first), and new
    tokens are."""
    remove_tokens(base)
    in_memory = [part for part in vars(base).values() if isinstance(part, torch.nn.Module)]
    for module in in_memory:
        for path, layer in adapter_layers(module):
            if layer.merged:
                layer.unmerge()
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
        module._hf_peft_config_loaded = False
        vars(module).pop("peft_config", None)
