"""LoRA files of this and other tools, read into one plain form and written from it.

A LoRA, whoever saved it, is for each layer two thin matrices and a number:
    W' = W + scale * up @ down                      (Hu et al. 2021, equation 3, scale = alpha / rank)
and with DoRA one magnitude a row (Liu et al. 2024, equation 5):
    W' = magnitude * (W + scale * up @ down) / norm of its rows
Tools differ in how they name the layers and where they keep the number; here it is one float.

  diffusers  unet.<module>.lora_A.weight, alpha and rank in the file's header
  kohya      lora_unet_<module with _ for .>.lora_down.weight, alpha as a tensor; A1111 and ComfyUI too
  peft       one folder a component: adapter_config.json and adapter_model.safetensors
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dbcore.utils.errors import InputError
from dbcore.utils.files import write_whole

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps the LoraConfigs in a file's header
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class LoraFileError(InputError):
    """A LoRA file that cannot be read, or holds something that the wanted format cannot."""


@dataclass(frozen=True)
class Layer:
    """One layer's update. Linear: down [rank, in], up [out, rank]; convolution: with [.., k, k], [.., 1, 1]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None  # [out], DoRA only

    @property
    def rank(self):
        return self.down.shape[0]

    def delta(self):
        """scale * up @ down in float32, in the shape of the layer's weight (before DoRA's magnitude)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """A whole LoRA: layers["unet"]["down_blocks.0...to_q"] is a Layer. `notes`: the header's own words."""

    layers: dict[str, dict[str, Layer]]
    notes: dict[str, str] = field(default_factory=dict)

    def every(self):
        return [(c, name, layer) for c, named in self.layers.items() for name, layer in named.items()]

    @property
    def has_dora(self):
        return any(layer.magnitude is not None for _, _, layer in self.every())


# --- read ---------------------------------------------------------------------------------------------


def read_adapter(path, base=None):
    """Read a LoRA in any of the three formats.

    `path`: a .safetensors file, the folder of a run, or a peft folder. `base`: the pipeline (a folder or a name
    on the hub) it belongs to; only kohya's names need it, because they do not say where a module's name has its dots.
    Raises `LoraFileError` for a missing, damaged, pickled or unknown file.
    """
    path = Path(path)
    if path.is_dir() and (path / WEIGHT_NAME).is_file():
        path = path / WEIGHT_NAME
    if path.is_dir():
        return _read_peft(path)
    tensors, header = read_safetensors(path)
    if any(key.startswith(("lora_unet_", "lora_te")) for key in tensors):
        if base is None:
            raise LoraFileError(
                f"{path.name} has kohya's names: give --pretrained_model_name_or_path as well"
            )
        return _read_kohya(tensors, header, base)
    return _read_diffusers(tensors, header, path.name)


def read_safetensors(path):
    """({name: tensor}, header) of a safetensors file; anything else is refused, pickles first of all."""
    path = Path(path)
    if not path.is_file():
        raise LoraFileError(f"{path} is not there: give a .safetensors file or a folder with {WEIGHT_NAME}")
    if path.suffix != ".safetensors":
        raise LoraFileError(f"{path.name}: only .safetensors is read; a pickled file could run any program")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{path.name} is damaged or cut short ({error}): copy it again") from None


def _read_diffusers(tensors, header, name):
    configs = _configs(header, name)
    tensors, layers, used = _peft_names(tensors), {}, set()
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        component, _, inside = module.partition(".")
        inside = plain_name(component, inside)
        parts = {part: f"{module}.{part}" for part in ("lora_A.weight", "lora_B.weight")}
        magnitude = next((k for k in _magnitude_keys(module) if k in tensors), None)
        if component not in COMPONENTS or parts["lora_B.weight"] not in tensors:
            break
        down, up = (tensors[k] for k in parts.values())
        scale = _scale(configs.get(component, {}), inside, len(down))
        flat = None if magnitude is None else tensors[magnitude].flatten()
        layers.setdefault(component, {})[inside] = Layer(down, up, scale, flat)
        used |= {*parts.values(), magnitude}
    left = sorted(set(tensors) - used)
    if left or not layers:
        what = f"holds {left[0]}, which is" if left else "is empty:"
        raise LoraFileError(f"{name} {what} no LoRA key of diffusers, kohya or peft")
    return Adapter(layers, {k: v for k, v in header.items() if k not in (HEADER_KEY, "format")})


def _peft_names(tensors):
    """diffusers has named the factors in three ways over the years; its own converters know them."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {key: value for key, value in tensors.items() if key.startswith("unet.")}
    rest = {key: value for key, value in tensors.items() if key not in unet}
    if any("lora_linear_layer" in key or "to_out_lora" in key for key in rest):
        rest = convert_state_dict_to_peft(rest)
    return {**convert_unet_state_dict_to_peft(unet), **rest}


def _magnitude_keys(module):
    """peft has saved DoRA's magnitude under both of these names."""
    return f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight"


def _configs(header, name):
    """{component: the fields of its LoraConfig} from the header; empty where diffusers saved none."""
    try:
        flat = json.loads(header.get(HEADER_KEY, "{}"))
    except ValueError as error:
        raise LoraFileError(f"{name}: its header's {HEADER_KEY} is not JSON ({error})") from None
    configs = {}
    for key, value in flat.items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    return configs


def _scale(config, module, rank):
    """peft's rule: alpha / rank, or alpha / sqrt(rank) with rsLoRA; no config means alpha = rank."""
    patterns = config.get("alpha_pattern") or {}
    fitting = [value for name, value in patterns.items() if f".{module}".endswith(f".{name}")]
    alpha = fitting[0] if fitting else config.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_name(component, module):
    """A CLIP module's name without the `text_model.` that transformers had until version 5."""
    return module.removeprefix("text_model.") if component.startswith("text_encoder") else module


def _read_kohya(tensors, header, base):
    """Names are looked up among the base's own modules, so no underscore is ever guessed at."""
    names = {}
    for component, module in _module_names(base):
        for prefix in _kohya_prefixes(component):
            names[prefix + module.replace(".", "_")] = (component, module)
    layers = {}
    for key in sorted(tensors):
        flat, _, part = key.partition(".")
        if flat not in names:
            raise LoraFileError(f"{key} fits no module of the base: it was trained on another model family")
        if part != "lora_down.weight":
            continue
        component, module = names[flat]
        down, up = tensors[key], tensors.get(f"{flat}.lora_up.weight")
        if up is None:
            raise LoraFileError(f"{flat} has a lora_down and no lora_up: the file is incomplete")
        alpha = float(tensors.get(f"{flat}.alpha", len(down)))
        magnitude = tensors.get(f"{flat}.dora_scale")
        magnitude = None if magnitude is None else magnitude.flatten()
        layers.setdefault(component, {})[module] = Layer(down, up, alpha / len(down), magnitude)
    return Adapter(layers, {k: v for k, v in header.items() if k in ("base", "trigger_words")})


def _module_names(base):
    """(component, module) for every module of the base, from its configs alone: no weight is read."""
    from accelerate import init_empty_weights
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    index = DiffusionPipeline.load_config(str(base))
    for component in COMPONENTS:
        if component not in index:
            continue
        with init_empty_weights():
            if component == "unet":
                config = UNet2DConditionModel.load_config(str(base), subfolder=component)
                model = UNet2DConditionModel.from_config(config)
            else:
                kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
                model = kind(CLIPTextConfig.from_pretrained(str(base), subfolder=component))
        yield from ((component, plain_name(component, name)) for name, _ in model.named_modules() if name)


def _kohya_prefixes(component):
    if component == "unet":
        return ["lora_unet_"]
    if component == "text_encoder":
        return ["lora_te_text_model_", "lora_te1_text_model_"]
    return ["lora_te2_text_model_", "lora_te2_"]


def _read_peft(folder):
    layers, notes = {}, {}
    for component in COMPONENTS:
        if not (folder / component / "adapter_config.json").is_file():
            continue
        config = json.loads((folder / component / "adapter_config.json").read_text(encoding="utf-8"))
        tensors, header = read_safetensors(folder / component / "adapter_model.safetensors")
        tensors = {k.replace("base_model.model", component, 1): v for k, v in tensors.items()}
        flat = {f"{component}.{key}": value for key, value in config.items()}
        read = _read_diffusers(tensors, {**header, HEADER_KEY: json.dumps(flat)}, folder.name)
        layers.update(read.layers)
        notes.update(read.notes)
    if not layers:
        raise LoraFileError(f"{folder} holds neither {WEIGHT_NAME} nor unet/adapter_config.json")
    return Adapter(layers, notes)


# --- write --------------------------------------------------------------------------------------------


def save_diffusers(adapter, path):
    """One file that `load_lora_weights` of a stock pipeline reads, alpha and rank in its header."""
    tensors, configs = {}, {}
    for component, named in adapter.layers.items():
        # transformers' loader wants DoRA's magnitude with `.weight`, peft's own without
        magnitude = ".lora_magnitude_vector" + ".weight" * (component != "unet")
        tensors.update(_peft_tensors(named, f"{component}.", _text_prefix(component), magnitude))
        config = lora_config(named).to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        configs.update({f"{component}.{key}": value for key, value in config.items()})
    header = {**adapter.notes, HEADER_KEY: json.dumps(configs, indent=2, sort_keys=True)}
    return _save(tensors, path, header)


def save_peft(adapter, folder):
    """`folder`/unet and so on, each a folder for `PeftModel.from_pretrained(pipeline.unet, ...)`."""
    folder = Path(folder)
    for component, named in adapter.layers.items():
        prefix = _text_prefix(component) if _clip_has_text_model() else ""
        tensors = _peft_tensors(named, "base_model.model.", prefix)
        _save(tensors, folder / component / "adapter_model.safetensors", adapter.notes)
        lora_config(named).save_pretrained(folder / component)
    return folder


def save_kohya(adapter, path, notes=None):
    """One file in kohya's names, for A1111, ComfyUI, Forge, InvokeAI and kohya itself."""
    tensors, header = {}, kohya_header(adapter, {**adapter.notes, **(notes or {})})
    alpha = float(header["ss_network_alpha"])
    two_encoders = "text_encoder_2" in adapter.layers
    for component, module, layer in adapter.every():
        prefix = _kohya_prefixes(component)[two_encoders and component == "text_encoder"]
        if module.startswith("text_projection"):
            prefix = prefix.replace("text_model_", "")
        flat = prefix + module.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = layer.down
        # kohya divides alpha by the rank. It may differ by layer there, but diffusers misreads that, so
        # one alpha stands for all, and a layer with another scale has the difference in its factor
        ratio = layer.scale * layer.rank / alpha
        tensors[f"{flat}.lora_up.weight"] = layer.up if math.isclose(ratio, 1.0) else layer.up * ratio
        tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            shape = (-1, *[1] * (layer.up.dim() - 1))  # one magnitude an output row
            tensors[f"{flat}.dora_scale"] = layer.magnitude.reshape(shape)
    return _save(tensors, path, header)


def kohya_header(adapter, notes):
    """The `ss_` and `modelspec` fields that other tools show: network, base and trigger words."""
    every = [layer for _, _, layer in adapter.every()]
    rank, scale = Counter((layer.rank, layer.scale) for layer in every).most_common(1)[0][0]
    header = {
        **notes,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(scale * rank),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
    }
    # the width of the text embedding tells the families apart
    widths = {768: ("sd_v1", "v1"), 1024: ("sd_v2", "v2-512"), 2048: ("sdxl_base_v1-0", "xl-v1-base")}
    to_k = [layer for c, name, layer in adapter.every() if c == "unet" and name.endswith("attn2.to_k")]
    if to_k and to_k[0].down.shape[1] in widths:
        version, architecture = widths[to_k[0].down.shape[1]]
        header["ss_base_model_version"] = version
        header["modelspec.architecture"] = f"stable-diffusion-{architecture}/lora"
    if notes.get("base"):
        header["ss_sd_model_name"] = notes["base"]
    if notes.get("trigger_words"):
        header["modelspec.trigger_phrase"] = notes["trigger_words"]
        header["ss_tag_frequency"] = json.dumps({"instance": {notes["trigger_words"]: 1}})
    return header


def lora_config(named):
    """The peft `LoraConfig` under which {module: Layer} computes what the layers say."""
    from peft import LoraConfig

    ranks = {name: layer.rank for name, layer in named.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in named.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(named),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        use_dora=any(layer.magnitude is not None for layer in named.values()),
    )


def _peft_tensors(named, before, inside, magnitude=".lora_magnitude_vector"):
    tensors = {}
    for module, layer in named.items():
        module = before + ("" if module.startswith("text_projection") else inside) + module
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.up.dim() == 4 else (-1,)
            tensors[module + magnitude] = layer.magnitude.reshape(shape)
    return tensors


def _text_prefix(component):
    """Older transformers want `text_model.`; newer ones, through diffusers, take it off again."""
    return "text_model." if component.startswith("text_encoder") else ""


def _clip_has_text_model():
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def _save(tensors, path, header):
    """Written beside its name, then renamed: a file of this name is always whole."""
    path = Path(path)
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    notes = {"format": "pt", **{key: str(value) for key, value in header.items()}}
    write_whole(path, _in_order(save(whole, notes)))
    return path


def _in_order(data):
    """A safetensors file with its header's notes sorted: the library writes them in another order each time."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# --- merge and extract --------------------------------------------------------------------------------


def merge_adapters(adapters, weights, rank=None):
    """The LoRA whose update is sum_i weights[i] * adapters[i], and the error of shortening it.

    Exact without `rank`: the factors are laid side by side, [up_1 up_2] @ [down_1; down_2], so ranks add
    up. With `rank` each layer is cut to its best approximation (Eckart and Young 1936). Returns
    (Adapter, relative Frobenius error). Raises `LoraFileError` for DoRA, whose update depends on the base.
    """
    if len(adapters) != len(weights):
        raise LoraFileError(f"{len(weights)} weights for {len(adapters)} LoRAs: give one each")
    if any(adapter.has_dora for adapter in adapters):
        raise LoraFileError(
            "a DoRA does not add up with others: export it with --format merged, then extract"
        )
    layers, lost, whole = {}, 0.0, 0.0
    for component in COMPONENTS:
        modules = sorted({name for adapter in adapters for name in adapter.layers.get(component, {})})
        for module in modules:
            pairs = [(a.layers.get(component, {}).get(module), w) for a, w in zip(adapters, weights)]
            layer = _side_by_side([(layer, w) for layer, w in pairs if layer is not None], module)
            if rank is not None and layer.rank > rank:
                layer, dropped = shorten(layer, rank)
                lost += dropped
            whole += float(layer.delta().square().sum())
            layers.setdefault(component, {})[module] = layer
    words = [adapter.notes["trigger_words"] for adapter in adapters if adapter.notes.get("trigger_words")]
    notes = {"trigger_words": ", ".join(dict.fromkeys(words))} if words else {}
    bases = {adapter.notes["base"] for adapter in adapters if adapter.notes.get("base")}
    notes.update({"base": bases.pop()} if len(bases) == 1 else {})
    return Adapter(layers, notes), math.sqrt(lost / (lost + whole)) if lost else 0.0


def _side_by_side(pairs, module):
    shapes = {(layer.down.shape[1:], layer.up.shape[0]) for layer, _ in pairs}
    if len(shapes) > 1:
        raise LoraFileError(f"{module} has another size in one of the LoRAs: they belong to different bases")
    ups = [layer.up.float() * (weight * layer.scale) for layer, weight in pairs]
    return Layer(torch.cat([layer.down.float() for layer, _ in pairs]), torch.cat(ups, dim=1), 1.0)


def shorten(layer, rank):
    """(`layer` at `rank`, squared Frobenius norm of what fell away); the weight itself is never formed.

    With up = Q1 R1 and down^T = Q2 R2, the singular values of up @ down are those of the small R1 R2^T.
    """
    down, up = layer.down.float().flatten(1), layer.up.float().flatten(1) * layer.scale
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)  # a layer of few channels has no more than those
    root = s[:rank].sqrt()
    new_up = (q_up @ u[:, :rank]) * root
    new_down = root[:, None] * (vh[:rank] @ q_down.T)
    shaped = Layer(
        new_down.reshape(-1, *layer.down.shape[1:]), new_up.reshape(len(up), -1, *layer.up.shape[2:]), 1.0
    )
    return shaped, float(s[rank:].square().sum())


def extract_layer(difference, rank):
    """The `Layer` of `rank` nearest to a weight difference [out, in] or [out, in, k, k]."""
    flat = difference.float().flatten(1)
    rank = min(rank, *flat.shape)
    if min(flat.shape) <= 512:
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    else:  # a full decomposition of a large layer takes seconds; the leading part is enough
        u, s, v = torch.svd_lowrank(flat, q=min(rank + 16, *flat.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    if difference.dim() == 4:
        return Layer(down.reshape(-1, *difference.shape[1:]), up[:, :, None, None], 1.0)
    return Layer(down, up, 1.0)


def extract_adapter(base, tuned, rank):
    """A LoRA of `rank` out of two models of the same shape: (Adapter, figures).

    `base`, `tuned`: {component: torch module}. Figures: `error`, the relative Frobenius error over all
    layers a LoRA can hold, and `outside`, the share of the change (by squared norm) in biases, norms and
    embeddings, which it cannot. Raises `LoraFileError` if the shapes differ or nothing changed.
    """
    layers, change, lost, outside = {}, 0.0, 0.0, 0.0
    for component, model in base.items():
        after = tuned[component].state_dict()
        if {k: v.shape for k, v in model.state_dict().items()} != {k: v.shape for k, v in after.items()}:
            raise LoraFileError(
                f"the two {component}s differ in shape: the second is no fine-tune of the first"
            )
        fitting = {
            name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        }
        for key, before in model.state_dict().items():
            difference = after[key].float() - before.float()
            norm = float(difference.square().sum())
            module, _, kind = key.rpartition(".")
            if norm == 0.0:
                continue
            if kind != "weight" or module not in fitting:
                outside += norm
                continue
            layer = extract_layer(difference, rank)
            lost += float((difference - layer.delta()).square().sum())
            change += norm
            layers.setdefault(component, {})[plain_name(component, module)] = layer
    if not layers:
        raise LoraFileError("the fine-tuned model's layers equal the base's: there is nothing to extract")
    return Adapter(layers), {"error": math.sqrt(lost / change), "outside": outside / (outside + change)}
