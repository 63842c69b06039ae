"""A LoRA in the names of kohya's scripts, which A1111, ComfyUI, Forge and InvokeAI read as well.

lora_unet_<module with _ for .>.lora_down.weight, .lora_up.weight and .alpha; DoRA's magnitudes in .dora_scale
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch

from dbcore.models.adapter import Adapter, LoraFileError
from dbcore.models.lora_files import save_safetensors

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
    two_encoders = "text_encoder_2" in adapter.layers or "sdxl" in header.get("ss_base_model_version", "")
    for component, module, layer in adapter.every():
        flat = kohya_name(component, module, two_encoders)
        tensors[f"{flat}.lora_down.weight"] = layer.down
        # kohya divides alpha by the rank. It may differ by layer there, but diffusers misreads that, so one
        # alpha stands for all, and a layer with another scale has the difference in its factor
        ratio = layer.scale * layer.rank / alpha
        tensors[f"{flat}.lora_up.weight"] = layer.up if math.isclose(ratio, 1.0) else layer.up * ratio
        tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            tensors[f"{flat}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.up.dim() - 1))
    return save_safetensors(tensors, path, header)


def kohya_name(component, module, two_encoders):
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two_encoders else "lora_te_",
                "text_encoder_2": "lora_te2_"}  # fmt: skip
    if component not in prefixes:
        raise LoraFileError(f"kohya has no names for a {component}: --format diffusers is read by ComfyUI too")
    inside = "" if component == "unet" or module == "text_projection" else "text_model_"
    module = module.replace("add_embedding.linear_1", "label_emb.0.0").replace("add_embedding.linear_2", "label_emb.0.2")
    return prefixes[component] + inside + module.replace(".", "_")


def kohya_leaves_out(adapter: Adapter) -> list[str]:
    """Layers that kohya's own scripts pass over when they load a LoRA: those outside of the networks' blocks.

    A1111, ComfyUI and diffusers take all of them.
    """
    inside = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.")
    return [module for _, module, _ in adapter.every() if not module.startswith(inside)]


def kohya_header(adapter: Adapter) -> dict[str, str]:
    """`adapter.notes`, and the `ss_` and `modelspec` fields that other tools show: network, base, trigger words."""
    notes = adapter.notes
    every = [layer for _, _, layer in adapter.every()]
    rank, scale = Counter((layer.rank, layer.scale) for layer in every).most_common(1)[0][0]
    header = {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers"}
    widths = [layer.down.shape[1] for _, name, layer in adapter.every() if name.endswith("attn2.to_k")]
    if widths and widths[0] in FAMILIES:
        header["ss_base_model_version"], header["modelspec.architecture"] = FAMILIES[widths[0]]
    if notes.get("base"):
        header["ss_sd_model_name"] = notes["base"]
    if notes.get("trigger_words"):
        header["ss_tag_frequency"] = json.dumps({"instance": {notes["trigger_words"]: 1}})
        notes = {**notes, "modelspec.trigger_phrase": notes["trigger_words"]}
    return {**header, **notes, "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
            "ss_network_alpha": str(scale * rank or 1.0)}  # fmt: skip
