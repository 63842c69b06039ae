"""LoRA files of this and other tools, to and from the plain form of `adapter.py`.

  diffusers  unet.<module>.lora_A.weight; peft's LoraConfig, with alpha, in the file's header
  kohya      lora_unet_<module with _ for .>.lora_down.weight; alpha is a tensor
  peft       one folder a network: adapter_config.json and adapter_model.safetensors

diffusers' own converters translate the names. Every key of a file is used, or the file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dbcore.models.adapter import Adapter, Layer, LoraFileError, plain_name
from dbcore.models.base import FAMILIES, family_of, load_base
from dbcore.utils.files import write_whole

if TYPE_CHECKING:
    from dbcore.models.base import Family

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps the LoraConfigs in a file's header
PARTS = {  # how a key ends, and what its tensor is; peft, kohya, and diffusers over the years
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha", ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
OTHERS = {  # what else such files hold, by a pattern of the key
    r"\.hada_t|\.lokr_t|\.lora_mid\.": "a Tucker decomposition, which ComfyUI and LyCORIS read",
    r"\.hada_": "a LoHa, which ComfyUI, A1111 and LyCORIS read",
    r"\.lokr_": "a LoKr, which ComfyUI, A1111 and LyCORIS read",
    r"\.b?oft_": "an OFT, which ComfyUI, LyCORIS and peft read",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$": "a GLoRA, which ComfyUI and LyCORIS read",
    r"\.ia3_|\.on_input$": "an IA3, which A1111, LyCORIS and peft read",
    r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$": "full weights, which ComfyUI and LyCORIS read",
    r"\.lora_(A|B|down|up)\.bias$": "a LoRA with biases, which ComfyUI and peft read",
    r"\.lora_embedding_": "a LoRA of an embedding, which peft reads",
    r"^bundle_emb\.": "an embedding bundled with a LoRA, which OneTrainer and A1111 read",
    r"^(emb_params|clip_[lg]|string_to_param)": "a textual inversion, which A1111 and ComfyUI read",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.":
        "a whole model, which from_single_file of a diffusers pipeline reads",
    r"^base_model\.model\.": "one network of a peft folder: give the folder above it",
}  # fmt: skip


# --- read -------------------------------------------------------------------------------------


def read_adapter(path: str | Path, base: str | Path | None = None) -> Adapter:
    """Read a LoRA in any of the three formats.

    `path`: a .safetensors file, the folder of a run, or a peft folder. `base`: the pipeline (a
    folder or a name on the hub) it belongs to; only other tools' names need it, which do not say
    where a module's name has its dots. Raises `LoraFileError` for a file that is missing, damaged
    or pickled, or holds what cannot be used.
    """
    path = Path(path)
    if (path / WEIGHT_NAME).is_file():
        path = path / WEIGHT_NAME
    try:
        return _read_peft(path) if path.is_dir() else _read_file(path, base)
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: tensor}, header) of a safetensors file; anything else, pickles too, is refused."""
    path = Path(path)
    if not path.is_file():
        raise LoraFileError(f"it is not there: give a LoRA file or a folder with {WEIGHT_NAME}")
    if path.suffix.lower() != ".safetensors":
        raise LoraFileError("only .safetensors is read; a pickled file could run any program")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
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
        component, config = path.parent.name, _json_object(path.read_bytes(), path.name)
        if config.get("peft_type", "LORA") != "LORA":
            raise LoraFileError(f"its {component} is a {config['peft_type']}, which peft reads. "
                                "Here LoRA and DoRA are read")
        tensors, header = read_safetensors(path.with_name("adapter_model.safetensors"))
        tensors = {key.replace("base_model.model", component, 1): t for key, t in tensors.items()}
        layers |= _read_layers(tensors, {component: config}, Names(None))
        notes |= _notes(header)
    if not layers:
        raise LoraFileError(f"it holds neither {WEIGHT_NAME} nor a folder with adapter_config.json")
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
    """What a file says of itself, without what is wrong in a copy: its configs, its hashes."""
    own = (HEADER_KEY, "format")
    return {key: value for key, value in header.items() if key not in own and "hash" not in key}


def _read_layers(tensors, configs, names):
    """{component: {module: Layer}} of a file's tensors, every one of them used."""
    layers, configs = {}, {component: _peft_config(fields) for component, fields in configs.items()}
    for keys in _grouped(tensors):
        magnitude = keys.pop("magnitude", None)
        renamed, alpha = names.to_diffusers({key: tensors[key] for key in keys.values()})
        for (component, module), (down, up) in _halves(renamed).items():
            rank, named = len(down), layers.setdefault(component, {})
            config = configs.get(component)
            scale = _scale(config, module, rank) if alpha is None else alpha / rank
            rows = magnitude and _rows(tensors[magnitude], len(up), magnitude)
            module = plain_name(component, module)
            if module in named:
                raise LoraFileError(f"{keys['down']} is there twice, under two names")
            named[module] = Layer(down, up, scale, rows)
            names.check(component, module, named[module], keys["down"])
    if strange := configs.keys() - layers.keys():
        raise LoraFileError(f"its header has a LoraConfig of {min(strange)!r}, "
                            "a network that none of its tensors belongs to, so their scale is in "
                            "doubt: copy it again")
    for component, named in layers.items():
        _check_dora(component, named, configs.get(component))
    return layers


def _grouped(tensors):
    """[{part: key}], one for each module of the file, with both halves and finite numbers."""
    groups = {}
    for key in sorted(tensors):
        module, part = _split(key)
        if part in groups.setdefault(module, {}):
            raise LoraFileError(f"{key} and {groups[module][part]} are two names of one thing")
        if not torch.isfinite(tensors[key].float()).all():
            raise LoraFileError(f"{key} has numbers that are not finite: the training diverged")
        if part == "alpha" and tensors[key].numel() != 1:
            raise LoraFileError(f"{key} of shape {tuple(tensors[key].shape)} is not one number: "
                                "the file is damaged")
        groups[module][part] = key
    for keys in groups.values():
        if missing := [f"lora_{half}" for half in ("down", "up") if half not in keys]:
            found = keys.get("down") or keys.get("up") or next(iter(keys.values()))
            missing = " and no ".join(missing)
            raise LoraFileError(f"{found} has no {missing}: the file is incomplete")
    if not groups:
        raise LoraFileError("it is empty: train again, or copy it again")
    return groups.values()


def _split(key):
    """("lora_unet_x", "down") of "lora_unet_x.lora_down.weight"."""
    for pattern, what in OTHERS.items():
        if re.search(pattern, key):
            raise LoraFileError(f"it holds {key}, of {what}. Here LoRA and DoRA are read")
    for ending, part in PARTS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    raise LoraFileError(f"it holds {key}, which is no LoRA key of diffusers, kohya or peft")


class Names:
    """The names of one base's modules, by the converter of its diffusers pipeline class."""

    def __init__(self, base: str | Path | None):
        self.base = base
        families = [family_of({"_class_name": kind}) for kind in FAMILIES]
        self.components = {component for family in families for component in family.lora_targets}

    @cached_property
    def family(self) -> Family:
        return load_base(str(self.base), device="meta")  # names and shapes, no numbers

    @cached_property
    def modules(self) -> dict[tuple[str, str], torch.nn.Module]:
        return modules_by_name(self.family.modules)

    def are_diffusers(self, key: str) -> bool:
        """Whether a key begins as diffusers' do, with the name of a network."""
        return key.partition(".")[0] in self.components

    def to_diffusers(self, halves: dict[str, torch.Tensor]) -> tuple[dict, float | None]:
        """One layer's tensors under diffusers' names, and its alpha where it is not in them.

        Raises `LoraFileError` where the base has no such layer, as far as the names tell.
        """
        key = next(iter(halves))
        if self.are_diffusers(key):
            return halves, None
        if self.base is None:
            raise LoraFileError(f"{key} is another tool's name: give the base as well, by "
                                "--pretrained_model_name_or_path")
        blocks = self.family.denoiser.config  # by which SDXL's original blocks are numbered
        try:
            found = self.family.pipeline_class.lora_state_dict(dict(halves), unet_config=blocks)
        except (ValueError, KeyError, IndexError, RuntimeError):
            found = {}
        renamed, alphas = found if isinstance(found, tuple) else (found, None)
        if not renamed or not all(map(self.are_diffusers, renamed)):
            raise self.stranger(key)
        return renamed, next(iter((alphas or {}).values()), None)

    def check(self, component: str, module: str, layer: Layer, key: str) -> None:
        """A name that the converter has guessed must be there, and of the layer's size."""
        if not self.are_diffusers(key) and not fits(self.modules.get((component, module)), layer):
            raise self.stranger(key)

    def stranger(self, key: str) -> LoraFileError:
        module = _split(key)[0]
        if bare := [component for component, name in self.modules if name == module]:
            return LoraFileError(f"{key} does not say which network it is of, "
                                 "as one that a network alone has saved: "
                                 f"rename each key to {bare[0]}.{key}")
        return LoraFileError(f"{key} fits no module of {self.base}: "
                             "it was trained on another model family")


def modules_by_name(
        networks: Mapping[str, torch.nn.Module]) -> dict[tuple[str, str], torch.nn.Module]:
    """{(component, plain name): module} of all that a LoRA can be put on, or has been."""
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
        if part not in ("down", "up"):
            raise LoraFileError(f"it holds {key}, which is no LoRA key of diffusers, kohya or peft")
        component, _, module = module.partition(".")
        halves.setdefault((component, module), {})[part] = tensor
    for (component, module), parts in halves.items():
        down, up = parts["down"], parts["up"]
        rank, pointwise = len(down), [1] * (down.dim() - 2)
        if not rank or down.dim() not in (2, 4) or list(up.shape[1:]) != [rank, *pointwise]:
            shapes = " and ".join(str(tuple(half.shape)) for half in (down, up))
            raise LoraFileError(f"{component}.{module} has halves of shapes {shapes}, which do not "
                                "go together: the file is damaged")
    return {name: (parts["down"], parts["up"]) for name, parts in halves.items()}


def _peft_names(tensors):
    """diffusers has named the halves in several ways over the years; its converters know them."""
    from diffusers.utils import state_dict_utils as U

    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in text}
    text = U.convert_state_dict_to_peft(text, U.StateDictType.DIFFUSERS_OLD)
    return U.convert_unet_state_dict_to_peft({**rest, **text})


def _peft_config(fields):
    """What peft computes with, out of a LoraConfig's fields; the rest of them is about training."""
    start = fields.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        raise LoraFileError(f"it began with init_lora_weights {start}, which changes the base too: "
                            "save it with peft's path_initial_model_for_weight_conversion")
    used = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    return LoraConfig(**{name: fields[name] for name in used if name in fields})


def _scale(config, module, rank):
    """peft's rule: alpha / rank, with rsLoRA alpha / sqrt(rank); no config means alpha = rank."""
    if config is None:
        return 1.0
    ranks, alphas = config.rank_pattern, config.alpha_pattern  # their keys are regular expressions
    try:
        r = ranks.get(get_pattern_key(ranks, module), config.r)
        alpha = alphas.get(get_pattern_key(alphas, module), config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (TypeError, AttributeError, re.error) as error:
        raise LoraFileError(f"its LoraConfig cannot be used ({error}): copy it again") from None
    if r != rank or not math.isfinite(scale):
        raise LoraFileError(f"its LoraConfig gives {module} rank {r} and alpha {alpha}, "
                            f"its tensors have rank {rank}")
    return scale


def _rows(magnitude, out, key):
    """DoRA's magnitudes [out]: from peft's [out] or [1, out, 1, 1], or LyCORIS's [out, 1, ...]."""
    lycoris, peft = ((out,), (out, 1), (out, 1, 1, 1)), ((out,), (1, out, 1, 1))
    if magnitude.shape not in (lycoris if key.endswith("dora_scale") else peft):
        raise LoraFileError(f"{key} of shape {tuple(magnitude.shape)} is not one magnitude for each"
                            f" of {out} outputs; ComfyUI and LyCORIS read DoRA along inputs")
    return magnitude.flatten()


def _check_dora(component, named, config):
    """peft has DoRA on all layers of a network or on none."""
    plain = [module for module, layer in named.items() if layer.magnitude is None]
    if plain and len(plain) < len(named):
        raise LoraFileError(f"{component}.{plain[0]} has no DoRA magnitude and others have: "
                            "ComfyUI reads that")
    if config is not None and bool(config.use_dora) == bool(plain):
        raise LoraFileError(f"its LoraConfig says use_dora {config.use_dora}, "
                            f"the tensors of its {component} say otherwise")


# --- write ------------------------------------------------------------------------------------


def save_diffusers(adapter: Adapter, path: str | Path) -> Path:
    """One file that `load_lora_weights` of a stock pipeline reads, alpha and rank in its header."""
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, object] = {}
    for component, named in adapter.layers.items():
        # a text encoder's loader wants DoRA's magnitude with `.weight`, peft's own without; older
        # transformers want CLIP's `text_model.`, newer ones, through diffusers, take it off again
        text = component.startswith("text_encoder")
        magnitude = ".lora_magnitude_vector" + ".weight" * text
        tensors |= _peft_tensors(named, f"{component}.", "text_model." * text, magnitude)
        fields = lora_config(named).to_dict()
        configs |= {f"{component}.{option}": value for option, value in fields.items()}
    text = json.dumps(configs, indent=2, sort_keys=True, default=sorted)  # JSON has no sets
    return save_safetensors(tensors, path, {**adapter.notes, HEADER_KEY: text})


def save_peft(adapter: Adapter, folder: str | Path) -> Path:
    """`folder`/unet and so on, each a folder for `PeftModel.from_pretrained(pipeline.unet, ...)`.

    Of an earlier export in the folder nothing is left.
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
    # a pattern also fits where it is the end of a name: "^" keeps it to its own
    keys = {name: "^" * any(n.endswith(f".{name}") for n in named) + name for name in named}
    ranks = {keys[name]: layer.rank for name, layer in named.items()}
    alphas = {keys[name]: layer.scale * layer.rank for name, layer in named.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
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
            shape = (1, -1, 1, 1) if layer.up.dim() == 4 else (-1,)
            tensors[name + magnitude] = layer.magnitude.reshape(shape)
    return tensors


def _installed_prefix(component):
    """What stands before a CLIP module's name in the transformers that is installed."""
    import transformers

    flat = component == "text_encoder" and int(transformers.__version__.split(".")[0]) >= 5
    return "text_model." if component.startswith("text_encoder") and not flat else ""


def save_safetensors(tensors: dict, path: str | Path, header: dict[str, str]) -> Path:
    """Tensors of finite numbers, and a header of texts, as a file that is whole or absent."""
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    for key, tensor in whole.items():
        if not torch.isfinite(tensor).all():
            raise LoraFileError(f"{path}: {key} would not be finite numbers, so nothing is saved")
    notes = {"format": "pt", **{key: str(value) for key, value in header.items()}}
    write_whole(path, _in_order(save(whole, notes)))
    return Path(path)


def _in_order(data):
    """A safetensors file with its header's notes sorted; the library orders them anew each time."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
