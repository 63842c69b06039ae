"""LoRA files of this and other tools, read into the plain form of `adapter.py`, and written for diffusers and peft.

  diffusers  unet.<module>.lora_A.weight; peft's LoraConfigs, with alpha and rank, in the file's header
  kohya      lora_unet_<module with _ for .>.lora_down.weight, alpha a tensor; for A1111 and ComfyUI too
  peft       one folder a network: adapter_config.json and adapter_model.safetensors

Names are translated by diffusers' own converters. Every key of a file is used, or the file is refused by it.
"""

import importlib
import json
import math
import re
from collections import Counter
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dbcore.models.adapter import Adapter, Layer, LoraFileError, plain_name
from dbcore.models.base import read_index
from dbcore.utils.files import write_whole

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps the LoraConfigs in a file's header
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # as diffusers' pipelines call them
PARTS = {  # how a key ends, by what its tensor is
    "down": (".lora_A.weight", ".lora_down.weight", "_lora.down.weight", ".lora.down.weight",
             ".lora_linear_layer.down.weight"),
    "up": (".lora_B.weight", ".lora_up.weight", "_lora.up.weight", ".lora.up.weight",
           ".lora_linear_layer.up.weight"),
    "alpha": (".alpha",),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"),
}  # fmt: skip
OTHERS = {  # what else such files hold: a pattern of the key, what it is part of, and who reads that
    r"\.hada_t|\.lokr_t|\.lora_mid\.": ("a Tucker decomposition", "ComfyUI, A1111 or LyCORIS"),
    r"\.hada_": ("a LoHa", "ComfyUI, A1111 or LyCORIS"),
    r"\.lokr_": ("a LoKr", "ComfyUI, A1111 or LyCORIS"),
    r"\.b?oft_": ("an OFT", "ComfyUI, LyCORIS or peft"),
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$": ("a GLoRA", "ComfyUI or LyCORIS"),
    r"\.ia3_|\.on_input$": ("an IA3", "A1111, LyCORIS or peft"),
    r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$": ("a full weight or bias, no LoRA", "ComfyUI or LyCORIS"),
    r"\.lora_(A|B|down|up)\.bias$": ("a LoRA with biases", "ComfyUI or peft"),
    r"\.lora_embedding_": ("a LoRA of an embedding", "peft"),
    r"^bundle_emb\.": ("an embedding that is bundled with a LoRA", "OneTrainer or A1111"),
    r"^(emb_params|clip_[lg]|string_to_param)": ("a textual inversion embedding", "A1111 or ComfyUI"),
    r"^(model|first_stage_model|cond_stage_model|conditioner)\.": ("a whole model", "from_single_file of diffusers"),
}  # fmt: skip


# --- read ---------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, base: str | Path | None = None) -> Adapter:
    """Read a LoRA in any of the three formats.

    `path`: a .safetensors file, the folder of a run, or a peft folder. `base`: the pipeline (a folder or a
    name on the hub) it belongs to; only other tools' names need it, which do not say where a module's name
    has its dots. Raises `LoraFileError` for a file that is missing, damaged, pickled, or not used to its last
    key.
    """
    path = Path(path)
    if (path / WEIGHT_NAME).is_file():
        path = path / WEIGHT_NAME
    try:
        return _read_peft(path) if path.is_dir() else _read_file(path, base)
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: tensor}, header) of a safetensors file; anything else is refused, pickles first of all."""
    path = Path(path)
    if not path.is_file():
        raise LoraFileError(f"it is not there: give a .safetensors file or a folder with {WEIGHT_NAME}")
    if path.suffix.lower() != ".safetensors":
        raise LoraFileError("only .safetensors is read; a pickled file could run any program")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"it is damaged or cut short ({error}): copy it again") from None


def _read_file(path, base):
    tensors, header = read_safetensors(path)
    configs = {}
    for key, value in _json_object(header.get(HEADER_KEY, "{}"), HEADER_KEY).items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    return Adapter(_read_layers(tensors, configs, Names(base)), _notes(header))


def _read_peft(folder):
    layers, notes = {}, {}
    for path in sorted(folder.glob("*/adapter_config.json")):
        component = path.parent.name
        config = _json_object(path.read_bytes(), path.name)
        if config.get("peft_type", "LORA") != "LORA":
            raise LoraFileError(f"its {component} is a {config['peft_type']}, which peft reads; give a LoRA")
        tensors, header = read_safetensors(path.with_name("adapter_model.safetensors"))
        tensors = {key.replace("base_model.model", component, 1): value for key, value in tensors.items()}
        layers |= _read_layers(tensors, {component: config}, Names(None))
        notes |= _notes(header)
    if not layers:
        raise LoraFileError(f"it holds neither {WEIGHT_NAME} nor a network's folder with adapter_config.json")
    return Adapter(layers, notes)


def _json_object(text, what):
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LoraFileError(f"its {what} is no JSON object: copy the file again")
    return found


def _notes(header):
    """What a file says of itself, without what would be wrong in a copy: its configs and its hashes."""
    return {key: value for key, value in header.items() if key not in (HEADER_KEY, "format") and "hash" not in key}


def _read_layers(tensors, configs, names):
    """{component: {module: Layer}} of a file's tensors, every one of them used."""
    layers, configs = {}, {component: _peft_config(fields) for component, fields in configs.items()}
    for keys in _grouped(tensors):
        magnitude = keys.pop("magnitude", None)
        renamed, alpha = names.to_diffusers({key: tensors[key] for key in keys.values()})
        for (component, module), (down, up) in _halves(renamed).items():
            scale = _scale(configs.get(component), module, len(down)) if alpha is None else alpha / len(down)
            rows = None if magnitude is None else _rows(tensors[magnitude], len(up), magnitude)
            named, module = layers.setdefault(component, {}), plain_name(component, module)
            if module in named:
                raise LoraFileError(f"{keys['down']} is there twice, under two names")
            named[module] = Layer(down, up, scale, rows)
            names.check(component, module, named[module], keys["down"])
    for component, named in layers.items():
        _check_dora(component, named, configs.get(component))
    return layers


def _grouped(tensors):
    """[{part: key}], one for each module as the file names it, with both halves and finite numbers."""
    groups = {}
    for key in sorted(tensors):
        module, part = _split(key)
        if part in groups.setdefault(module, {}):
            raise LoraFileError(f"{key} and {groups[module][part]} are two names of one thing")
        if not torch.isfinite(tensors[key].float()).all():
            raise LoraFileError(f"{key} has numbers that are not finite: the training diverged")
        groups[module][part] = key
    for keys in groups.values():
        if missing := {"down", "up"} - keys.keys():
            found = keys.get("down") or keys.get("up") or next(iter(keys.values()))
            raise LoraFileError(f"{found} has no lora_{' and no lora_'.join(sorted(missing))} beside it: the file is incomplete")
    if not groups:
        raise LoraFileError("it is empty: train again, or copy it again")
    return groups.values()


def _split(key):
    """("lora_unet_x", "down") of "lora_unet_x.lora_down.weight"."""
    for pattern, (what, reader) in OTHERS.items():
        if re.search(pattern, key):
            raise LoraFileError(f"it holds {key}, which belongs to {what}: use it in {reader}, "
                                "or give a LoRA or DoRA without it")
    for part, endings in PARTS.items():
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), part
    raise LoraFileError(f"it holds {key}, which is no LoRA key of diffusers, kohya or peft")


class Names:
    """What the modules of one base are called, by the converter of its diffusers pipeline class."""

    def __init__(self, base):
        self.base = base

    @cached_property
    def index(self):
        return read_index(self.base)

    @cached_property
    def networks(self):
        """{component: network without weights}, for the names and sizes of its modules."""
        networks, name = {}, str(self.base)
        for component in (c for c in self.pipeline._lora_loadable_modules if c in self.index):
            library, kind = self.index[component]
            model = getattr(importlib.import_module(library), kind)
            with torch.device("meta"):
                if library == "diffusers":
                    networks[component] = model.from_config(model.load_config(name, subfolder=component))
                else:
                    networks[component] = model(model.config_class.from_pretrained(name, subfolder=component))
        return networks

    @property
    def pipeline(self):
        import diffusers

        return getattr(diffusers, self.index["_class_name"])

    @cached_property
    def modules(self):
        return modules_by_name(self.networks)

    def to_diffusers(self, halves):
        """One layer's tensors under diffusers' names, and its alpha: None where there is none beside them."""
        key = next(iter(halves))
        if self.are_known(key):
            return halves, None
        if self.base is None:
            raise LoraFileError(f"{key} is another tool's name: give --pretrained_model_name_or_path as well")
        unet = getattr(self.networks.get("unet"), "config", None)  # SDXL's blocks are numbered by it
        try:
            found = self.pipeline.lora_state_dict(dict(halves), unet_config=unet)
        except (ValueError, KeyError, IndexError, RuntimeError):
            found = {}
        renamed, alphas = found if isinstance(found, tuple) else (found, None)
        if not renamed or not all(map(self.are_known, renamed)):
            raise self.stranger(key)
        return renamed, next(iter((alphas or {}).values()), None)

    def check(self, component, module, layer, key):
        """Names that were guessed at must be there, and of the layer's size."""
        if not self.are_known(key) and not fits(self.modules.get((component, module)), layer):
            raise self.stranger(key)

    @staticmethod
    def are_known(key):
        return key.partition(".")[0] in COMPONENTS

    def stranger(self, key):
        return LoraFileError(f"{key} fits no module of {self.base}: it was trained on another model family")


def modules_by_name(networks: dict) -> dict[tuple[str, str], torch.nn.Module]:
    """{(component, plain name): module} of all that a LoRA can be put on, with one on it or without."""
    return {(component, plain_name(component, name.removesuffix(".base_layer"))): module
            for component, network in networks.items() for name, module in network.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}  # fmt: skip


def fits(module: torch.nn.Module | None, layer: Layer) -> bool:
    """Whether a layer's update has the shape of the module's weight."""
    return module is not None and module.weight.shape == (len(layer.up), *layer.down.shape[1:])


def _halves(tensors):
    """{("unet", "<module>"): (down, up)} of one layer's tensors in any of diffusers' own names."""
    halves = {}
    for key, tensor in _peft_names(tensors).items():
        module, part = _split(key)
        component, _, inside = module.partition(".")
        if part not in ("down", "up"):
            raise LoraFileError(f"it holds {key}, which is no LoRA key of diffusers, kohya or peft")
        halves.setdefault((component, inside), {})[part] = tensor
    pairs = {name: (parts["down"], parts["up"]) for name, parts in halves.items()}
    for (component, module), (down, up) in pairs.items():
        kernel = up.shape[2:].numel()
        if down.dim() not in (2, 4) or down.dim() != up.dim() or up.shape[1] != len(down) or not len(down) or kernel != 1:
            raise LoraFileError(f"{component}.{module} has halves of shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                                "which do not go together: the file is damaged")
    return pairs


def _peft_names(tensors):
    """diffusers has named the halves in several ways over the years; its own converters know them."""
    from diffusers.utils import state_dict_utils as U

    text = {key: value for key, value in tensors.items() if key.startswith("text_encoder")}
    rest = {key: value for key, value in tensors.items() if key not in text}
    text = U.convert_state_dict_to_peft(text, U.StateDictType.DIFFUSERS_OLD)
    return U.convert_unet_state_dict_to_peft({**rest, **text})


def _peft_config(fields):
    """What peft computes with, out of a LoraConfig's fields; the rest of them is about training."""
    start = fields.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        raise LoraFileError(f"it began with init_lora_weights {start}, which changes the base as well: save it with "
                            "peft's path_initial_model_for_weight_conversion")
    used = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    return LoraConfig(**{name: fields[name] for name in used if name in fields})


def _scale(config, module, rank):
    """peft's rule: alpha / rank, or alpha / sqrt(rank) with rsLoRA; no config means alpha = rank."""
    if config is None:
        return 1.0
    try:
        r, alpha = (
            patterns.get(get_pattern_key(patterns, module), default)  # the keys are regular expressions
            for patterns, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (TypeError, AttributeError, re.error) as error:
        raise LoraFileError(f"its LoraConfig cannot be used ({error}): copy the file again") from None
    if r != rank or not math.isfinite(scale):
        raise LoraFileError(f"its LoraConfig gives {module} rank {r} and alpha {alpha}, its tensors rank {rank}")
    return scale


def _rows(magnitude, out, key):
    """DoRA's magnitudes [out]: peft has [out] or [1, out, 1, 1], LyCORIS [out, 1] or [out, 1, 1, 1]."""
    shapes = [(out,), (out, 1), (out, 1, 1, 1)] if key.endswith("dora_scale") else [(out,), (1, out, 1, 1)]
    if magnitude.shape not in shapes:
        raise LoraFileError(f"{key} of shape {tuple(magnitude.shape)} is not one DoRA magnitude for each of {out} "
                            "outputs: ComfyUI and LyCORIS know magnitudes for each input")
    return magnitude.flatten()


def _check_dora(component, named, config):
    """peft has DoRA on all layers of a network or on none."""
    plain = [module for module, layer in named.items() if layer.magnitude is None]
    if plain and len(plain) < len(named):
        raise LoraFileError(f"{component}.{plain[0]} has no DoRA magnitude, other layers have: ComfyUI reads that")
    if config is not None and bool(config.use_dora) == bool(plain):
        raise LoraFileError(f"its LoraConfig says use_dora {config.use_dora}, its {component} says otherwise")


# --- write --------------------------------------------------------------------------------------------


def save_diffusers(adapter: Adapter, path: str | Path) -> Path:
    """One file that `load_lora_weights` of a stock pipeline reads, alpha and rank in its header."""
    tensors, configs = {}, {}
    for component, named in adapter.layers.items():
        text = component.startswith("text_encoder")
        # transformers' loader wants DoRA's magnitude with `.weight`, peft's own without; older transformers
        # want CLIP's `text_model.`, newer ones, through diffusers, take it off again
        magnitude = ".lora_magnitude_vector" + ".weight" * text
        tensors |= _peft_tensors(named, f"{component}.", "text_model." * text, magnitude)
        config = lora_config(named).to_dict()
        configs |= {f"{component}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return save_safetensors(tensors, path, {**adapter.notes, HEADER_KEY: json.dumps(configs, indent=2, sort_keys=True)})


def save_peft(adapter: Adapter, folder: str | Path) -> Path:
    """`folder`/unet and so on, each a folder for `PeftModel.from_pretrained(pipeline.unet, ...)`.

    Networks of an earlier export that this LoRA has not are removed from the folder.
    """
    folder = Path(folder)
    for component, named in adapter.layers.items():
        tensors = _peft_tensors(named, "base_model.model.", _installed_prefix(component))
        save_safetensors(tensors, folder / component / "adapter_model.safetensors", adapter.notes)
        lora_config(named).save_pretrained(folder / component)
    for stale in folder.glob("*/adapter_config.json"):
        if stale.parent.name not in adapter.layers:
            stale.with_name("adapter_model.safetensors").unlink(missing_ok=True)
            stale.unlink()
    return folder


def lora_config(named: dict[str, Layer]) -> LoraConfig:
    """The peft `LoraConfig` under which {module: Layer} computes what the layers say."""
    # patterns are expressions that match endings too: "^" where a name is another one's ending
    keys = {name: "^" * any(other.endswith(f".{name}") for other in named) + name for name in named}
    ranks = {keys[name]: layer.rank for name, layer in named.items()}
    alphas = {keys[name]: layer.scale * layer.rank for name, layer in named.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(named),
        rank_pattern={key: value for key, value in ranks.items() if value != rank},
        alpha_pattern={key: value for key, value in alphas.items() if value != alpha},
        use_dora=any(layer.magnitude is not None for layer in named.values()),
    )


def _peft_tensors(named, before, inside, magnitude=".lora_magnitude_vector"):
    tensors = {}
    for module, layer in named.items():
        name = before + ("" if module == "text_projection" else inside) + module
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            tensors[name + magnitude] = layer.magnitude.reshape((1, -1, 1, 1) if layer.up.dim() == 4 else (-1,))
    return tensors


def _installed_prefix(component):
    """What stands before a CLIP module's name in the transformers that is installed."""
    import transformers

    flat = component == "text_encoder" and int(transformers.__version__.split(".")[0]) >= 5
    return "text_model." if component.startswith("text_encoder") and not flat else ""


def save_safetensors(tensors, path, header):
    """Tensors of finite numbers, and a header of texts, as a file that is whole or absent; returns its path."""
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    for key, tensor in whole.items():
        if not torch.isfinite(tensor).all():
            raise LoraFileError(f"{path}: {key} would have numbers that are not finite: nothing is saved")
    write_whole(path, _in_order(save(whole, {"format": "pt", **{key: str(value) for key, value in header.items()}})))
    return Path(path)


def _in_order(data):
    """A safetensors file with its header's notes sorted: the library writes them in another order each time."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
