"""Adapters other than LoRA, which peft computes: OFT, LoKr and LoHa, and what chooses among all.

  oft   W' = W R, R a rotation in blocks of side r     Qiu et al. 2023, arXiv 2306.07280
  lokr  W' = W + (alpha / r) A kron (B C)              Yeh et al. 2023, arXiv 2309.14859
  loha  W' = W + (alpha / r) (A B) * (C D)             Hyeon-Woo et al. 2021, arXiv 2108.06098

OFT keeps the angles between neurons, and with them more of the base; LoKr's files are the smallest.
No pipeline of diffusers reads them: their file has a header of its own, `save_peft_folder` writes
what `PeftModel.from_pretrained` reads, and `kohya.save_lycoris` what ComfyUI does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from dbcore.config import need
from dbcore.models import lora
from dbcore.models.adapter import LoraFileError, plain_name
from dbcore.models.embeddings import (
    beside,
    check_tokens,
    load_tokens,
    read_tokens,
    save_tokens,
)
from dbcore.models.lora_files import WEIGHT_NAME, read_adapter, read_safetensors, save_safetensors
from dbcore.utils.seeding import key

if TYPE_CHECKING:
    from dbcore.models.base import Family

CONFIGS = {"oft": OFTConfig, "lokr": LoKrConfig, "loha": LoHaConfig}
NAMES = {"oft": "an OFT", "lokr": "a LoKr", "loha": "a LoHa"}
HEADER_KEY = "peft_adapter"  # {network: {"kind", "rank", "alpha", "target_modules"}}


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that is no LoRA, as its file holds it.

    `settings`: {network: {"kind", "rank", "alpha", "target_modules"}}. `tensors`: {network: {name:
    tensor}}, in the names of `get_peft_model_state_dict`. `notes`: as an `Adapter`'s.
    """

    settings: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, torch.Tensor]]
    notes: dict[str, str]

    @property
    def kind(self) -> str:
        return next(iter(self.settings.values()))["kind"]


def peft_config(kind: str, rank: int, alpha: float, target_modules: Sequence[str]) -> PeftConfig:
    """peft's config of a kind of `CONFIGS`."""
    if kind == "oft":
        return OFTConfig(oft_block_size=rank, target_modules=list(target_modules))
    return CONFIGS[kind](r=rank, alpha=alpha, target_modules=list(target_modules))


def add_peft_adapter(module: torch.nn.Module, kind: str, rank: int, alpha: float, layers: str,
                     seed: int, presets: Mapping[str, Sequence[str]]) -> None:
    """Put an adapter of a kind of `CONFIGS` on a network in place, float32, as `add_lora` does.

    An OFT goes on linear layers alone: peft rotates a convolution's patches and adds up those that
    overlap, so that it would not begin as the base.
    """
    targets = lora.target_modules(module, layers, presets)
    if kind == "oft":
        targets = [name for name in targets
                   if isinstance(module.get_submodule(name), torch.nn.Linear)]
        need(targets, f"--lora_layers {layers}: an OFT goes on linear layers, and these are none")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(key(seed, f"{kind} {type(module).__name__}"))
        module.add_adapter(peft_config(kind, rank, alpha, targets), adapter_name="default")
    for parameter in lora.lora_parameters(module):
        parameter.data = parameter.data.float()
    for _, layer in lora.adapter_layers(module):
        if isinstance(layer, LycorisLayer):  # a layer is left out where rand() > 0 is not so
            layer.module_dropout["default"] = -1.0


def kind_on(module: torch.nn.Module) -> str | None:
    """The kind of `CONFIGS` that a network's adapter is; None for LoRA, or no adapter."""
    configs = getattr(module, "peft_config", None) or {}
    kinds = (config.peft_type.lower() for config in configs.values())
    return next((kind for kind in kinds if kind in CONFIGS), None)


def weight_change(layer: BaseTunerLayer, name: str) -> torch.Tensor:
    """W' - W of an adapted layer, float32 of the weight's shape."""
    delta = layer.get_delta_weight(name).float()
    if isinstance(layer, OFTLayer):  # its delta is the rotation, of a weight's inputs
        weight = layer.get_base_layer().weight.float()
        return (weight.flatten(1) @ delta.T).reshape(weight.shape) - weight
    return delta


# --- files ----------------------------------------------------------------------------------------


def save_adapter(modules: Mapping[str, torch.nn.Module], path: str | Path,
                 notes: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter on {component: network} as one file, `save_lora`'s for a LoRA; new tokens
    go into another beside it."""
    save_tokens(modules, beside(path), notes or {})
    kinds = {name: kind for name, module in modules.items() if (kind := kind_on(module))}
    if not kinds:
        return lora.save_lora(modules, path, notes)
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        config, found = modules[name].peft_config["default"], weights_on(modules[name], name)
        tensors |= {f"{name}.{key}": tensor.float() for key, tensor in found.items()}
        settings[name] = {
            "kind": kind, "rank": config.oft_block_size if kind == "oft" else config.r,
            "alpha": getattr(config, "alpha", None),
            "target_modules": sorted(plain_name(name, module) for module in config.target_modules)}
    return save_safetensors(tensors, path,
                            {**dict(notes or {}), HEADER_KEY: json.dumps(settings, sort_keys=True)})


def weights_on(module: torch.nn.Module, component: str,
               name: str = "default") -> dict[str, torch.Tensor]:
    """{plain name: tensor} of the adapter on a network; its own memory, to be copied into."""
    return {plain_name(component, key): tensor
            for key, tensor in get_peft_model_state_dict(module, adapter_name=name).items()}


def read(path: str | Path) -> PeftAdapter | None:
    """The `PeftAdapter` in a run's folder or file; None for a LoRA, and whatever else it is."""
    path = Path(path)
    path = path / WEIGHT_NAME if (path / WEIGHT_NAME).is_file() else path
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return None  # `read_adapter` says what is wrong
    try:
        found, header = read_safetensors(path)
        if HEADER_KEY not in header:
            return None
        settings = json.loads(header.pop(HEADER_KEY))
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in settings}
        for name, tensor in found.items():
            component, _, rest = name.partition(".")
            tensors[component][rest] = tensor
        known = all(one["kind"] in CONFIGS and one["target_modules"] for one in settings.values())
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known or not settings:
        raise LoraFileError(f"{path}: its header {HEADER_KEY} cannot be used: copy it again")
    return PeftAdapter(settings, tensors, header)


def components(path: str | Path, base: Family) -> set[str]:
    """Names of the networks that an adapter's file, or the new tokens beside it, change."""
    words = base.roles["text_encoders"] if read_tokens(path) else ()
    other = read(path)
    return {*words, *(other.settings if other else read_adapter(path, base.name).layers)}


def load(base: Family, path: str | Path, name: str = "default") -> Family:
    """Put a saved adapter on a base, a LoRA beside others, any other kind alone; and the new tokens
    beside it.

    Raises LoraFileError, as `load_lora`; then nothing has changed.
    """
    tokens = read_tokens(path)
    if tokens:
        check_tokens(base, tokens, path)
    load_weights(base, path, name)
    if tokens:
        load_tokens(base, tokens)
    return base


def load_weights(base: Family, path: str | Path, name: str) -> None:
    """`load`, of the adapter alone."""
    other = read(path)
    networks = base.loaded().values()
    there = next(filter(None, map(kind_on, networks)), None)
    taken = there or (other and any(getattr(module, "peft_config", None) for module in networks))
    if taken:
        kind = NAMES[there or other.kind]  # type: ignore[union-attr]
        raise LoraFileError(f"{path}: {kind} is used alone, and there would be two adapters: give "
                            "one --checkpoint_dir")
    if other is None:
        lora.load_lora(base, path, name=name)
        return
    strange = sorted({*other.settings} - {*base.lora_targets})
    try:
        need(not strange, f"no network {', '.join(strange)}")
        for component, settings in other.settings.items():
            put_on(getattr(base, component), component, settings, other.tensors[component], name)
    except (ValueError, TypeError, RuntimeError) as error:  # also peft's, of names that fit nothing
        lora.remove_lora(base)
        reason = str(error).splitlines()[0]
        raise LoraFileError(f"{path} does not fit this base ({reason}); "
                            "give the base that it was trained on") from None


@torch.no_grad()
def put_on(module: torch.nn.Module, component: str, settings: dict[str, Any],
           tensors: dict[str, torch.Tensor], name: str) -> None:
    """One network's adapter, frozen. Raises LoraFileError where names or sizes are others."""
    module.add_adapter(peft_config(**settings), adapter_name=name)
    for parameter in lora.lora_parameters(module):
        parameter.data = parameter.data.float()
    module.requires_grad_(False)
    own = weights_on(module, component, name)
    sizes, saved = ({key: tuple(tensor.shape) for key, tensor in found.items()}
                    for found in (own, tensors))
    if sizes != saved:
        first = min(key for key in {**sizes, **saved} if sizes.get(key) != saved.get(key))
        raise LoraFileError(f"{component}.{first} is {saved.get(first)} in the file and "
                            f"{sizes.get(first)} here")
    for key_of, tensor in tensors.items():
        own[key_of].copy_(tensor)


def set_scales(base: Family, scales: dict[str, float]) -> None:
    """`set_scale` for any kind. Raises ConfigError for an OFT that is to be used in part."""
    layers = [layer for module in base.loaded().values() if kind_on(module)
              for _, layer in lora.adapter_layers(module)]
    if not layers:
        lora.set_scale(base, scales)
        return
    ((name, scale),) = scales.items()  # it is alone
    for layer in layers:
        need(scale in (0, 1) or not isinstance(layer, OFTLayer),
             f"--lora_scale {scale:g}: an OFT is a rotation, on (1) or off (0)")
        if scale and not isinstance(layer, OFTLayer):
            layer.set_scale(name, scale)
        layer.enable_adapters(bool(scale))
        layer.requires_grad_(False)


def save_peft_folder(adapter: PeftAdapter, folder: str | Path) -> Path:
    """`folder`/unet and so on, as `save_peft` writes them for a LoRA."""
    for component, settings in adapter.settings.items():
        tensors = {f"base_model.model.{name}": tensor
                   for name, tensor in adapter.tensors[component].items()}
        save_safetensors(tensors, Path(folder) / component / "adapter_model.safetensors",
                         adapter.notes)
        peft_config(**settings).save_pretrained(Path(folder) / component)
    return Path(folder)
