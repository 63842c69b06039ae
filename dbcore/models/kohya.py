"""A LoRA in the names of kohya's scripts, which A1111, ComfyUI, Forge and InvokeAI read as well.

    lora_unet_<module with _ for .>.lora_down.weight, .lora_up.weight, .alpha, with DoRA .dora_scale
A LoHa or LoKr in those of LyCORIS, from which peft has its own: .hada_w1_a, .lokr_w1, ..., .alpha
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dbcore.models.adapter import Adapter, LoraFileError
from dbcore.models.lora_files import save_safetensors

if TYPE_CHECKING:
    from dbcore.models.peft_adapters import PeftAdapter

# where diffusers' converters know a module only by the original SDXL's name
ORIGINAL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
# the width of the text embedding tells the families apart: what kohya and what modelspec call them
FAMILIES = {
    768: ("sd_v1", "stable-diffusion-v1/lora"),
    1024: ("sd_v2", "stable-diffusion-v2-512/lora"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}


def save_kohya(adapter: Adapter, path: str | Path) -> Path:
    """One file in kohya's names, for A1111, ComfyUI, Forge, InvokeAI and kohya itself.

    Raises `LoraFileError` for networks that have no such names.
    """
    header = kohya_header(adapter)
    alpha, tensors = float(header["ss_network_alpha"]), {}
    is_xl = "sdxl" in header.get("ss_base_model_version", "") or "text_encoder_2" in adapter.layers
    for component, module, layer in adapter.every():
        flat = kohya_name(component, module, is_xl)
        tensors[f"{flat}.lora_down.weight"] = layer.down
        # kohya divides alpha by the rank. It may differ by layer, but diffusers misreads that:
        # one alpha stands for all, and a layer with another scale has the difference in its factor
        ratio = layer.scale * layer.rank / alpha
        up = layer.up if math.isclose(ratio, 1.0) else layer.up * ratio
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            tensors[f"{flat}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.up.dim() - 1))
    return save_safetensors(tensors, path, header)


def save_lycoris(adapter: PeftAdapter, path: str | Path) -> Path:
    """A LoHa or LoKr as one file in LyCORIS's names, for ComfyUI, A1111, Forge and LyCORIS itself.

    Raises `LoraFileError` for an OFT: peft rotates the inputs of a layer, LyCORIS its outputs.
    """
    if adapter.kind == "oft":
        raise LoraFileError("--format kohya: it is an OFT of peft, which rotates the inputs of a "
                            "layer, and LyCORIS's rotates the outputs: give --format peft")
    tensors, is_xl = {}, "text_encoder_2" in adapter.settings
    for component, found in adapter.tensors.items():
        alpha, rank = (float(adapter.settings[component][name]) for name in ("alpha", "rank"))
        for name, tensor in found.items():
            module, _, part = name.rpartition(".")
            flat = kohya_name(component, module, is_xl)
            # of two whole factors LyCORIS knows no rank, and does not scale their product
            whole = part == "lokr_w1" and f"{module}.lokr_w2" in found
            tensors[f"{flat}.{part}"] = tensor * (alpha / rank) if whole else tensor
            tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    header = {**adapter.notes, "ss_network_module": "lycoris.kohya",
              "ss_network_args": json.dumps({"algo": adapter.kind})}
    return save_safetensors(tensors, path, header)


def kohya_name(component: str, module: str, is_xl: bool) -> str:
    """What kohya calls a module; SDXL's first text encoder has another name than the only one."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if is_xl else "lora_te_",
                "text_encoder_2": "lora_te2_"}  # fmt: skip
    if component not in prefixes:
        raise LoraFileError(f"kohya has no names for a {component}: "
                            "give --format diffusers, which ComfyUI reads too")
    inside = "" if component == "unet" or module == "text_projection" else "text_model_"
    return prefixes[component] + inside + ORIGINAL.get(module, module.replace(".", "_"))


def kohya_leaves_out(adapter: Adapter) -> list[str]:
    """Layers that kohya's own scripts pass over in a file: those outside of the networks' blocks.

    A1111, ComfyUI and diffusers use all of them.
    """
    inside = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.")
    return [module for _, module, _ in adapter.every() if not module.startswith(inside)]


def kohya_header(adapter: Adapter) -> dict[str, str]:
    """`adapter.notes`, with what other tools show: network, base and trigger words."""
    notes = adapter.notes
    every = [layer for _, _, layer in adapter.every()]
    rank, scale = Counter((layer.rank, layer.scale) for layer in every).most_common(1)[0][0]
    header = {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers"}
    to_k = next((one for _, name, one in adapter.every() if name.endswith("attn2.to_k")), None)
    if to_k and (family := FAMILIES.get(to_k.down.shape[1])):
        header["ss_base_model_version"], header["modelspec.architecture"] = family
    if notes.get("base"):
        header["ss_sd_model_name"] = notes["base"]
    if notes.get("trigger_words"):
        header["ss_tag_frequency"] = json.dumps({"instance": {notes["trigger_words"]: 1}})
        notes = {**notes, "modelspec.trigger_phrase": notes["trigger_words"]}
    return {**header, **notes, "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
            "ss_network_alpha": str(scale * rank or 1.0)}  # fmt: skip
