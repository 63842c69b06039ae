"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), and any pipeline folder of their shape."""

from functools import cached_property
from typing import Any, ClassVar

import torch

from dbcore.config import need
from dbcore.models.base import INPAINTING, Family
from dbcore.models.lora import PRESETS
from dbcore.models.process import Diffusion


class StableDiffusion(Family):
    """A UNet on the latents of a KL autoencoder, with cross-attention to a CLIP text encoder."""

    pipeline_name = "StableDiffusionPipeline"
    pipeline_extras: ClassVar = {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    roles: ClassVar = {
        "denoiser": ("unet",), "autoencoder": ("vae",), "text_encoders": ("text_encoder",)}
    lora_targets: ClassVar = {"unet": PRESETS, "text_encoder": PRESETS}
    embedding_keys: ClassVar = {"text_encoder": "clip_l"}
    samplers: ClassVar = {
        "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler",
        "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
        "unipc": "UniPCMultistepScheduler", "ddpm": "DDPMScheduler",
    }

    @cached_property
    def process(self) -> Diffusion:
        return Diffusion.from_scheduler(self.noise_scheduler.config)

    @cached_property
    def noise_scheduler(self) -> Any:
        from diffusers import DDPMScheduler

        with self.reading("scheduler"):
            return DDPMScheduler.from_pretrained(
                self.name, subfolder="scheduler", revision=self.revision)

    def check(self) -> None:
        takes = self.config_of("unet").get("in_channels", 4)
        latents = self.config_of("vae").get("latent_channels", 4)
        need(takes == latents,
             f"--pretrained_model_name_or_path {self.name}: its UNet takes {takes} "
             f"channels and latents have {latents}. It {INPAINTING}")

    def native_resolution(self) -> int:
        return self.config_of("unet")["sample_size"] * self.downsampling

    @property
    def side_multiple(self) -> int:
        return max(8, self.downsampling)  # stock pipelines want multiples of 8 in any case

    @cached_property
    def downsampling(self) -> int:
        """Pixels to one latent, along a side."""
        return 2 ** (len(self.config_of("vae")["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        high, wide = (side // self.downsampling for side in (height, width or height))
        return self.config_of("vae").get("latent_channels", 4), high, wide

    def precision(self, component: str) -> torch.dtype:
        # in fp16 the decoder overflows on some images, and they come out black
        overflows = component == "vae" and self.dtype == torch.float16
        return torch.float32 if overflows else self.dtype

    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": (n, length, width)}."""
        return {"encoder_hidden_states": self.text_encoder(self.tokens(prompts))[0]}

    def pooled_text(self, prompts: list[str]) -> torch.Tensor:
        return self.text_encoder(self.tokens(prompts)).pooler_output

    def tokens(self, prompts: list[str], tokenizer: str = "tokenizer") -> torch.Tensor:
        """(n, length) token numbers, each prompt padded or cut to the same length."""
        tokenize = getattr(self, tokenizer)
        length = self.tokenizer_max_length or tokenize.model_max_length
        return tokenize(self.spell_out(prompts), padding="max_length", truncation=True,
                        max_length=length, return_tensors="pt").input_ids.to(self.device)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, 3, h, w) in [-1, 1] to the scaled posterior's (mean, std), float32."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        shift, scale = self.latent_scale
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (n, c, h, w) to images (n, 3, f h, f w) in [-1, 1]."""
        shift, scale = self.latent_scale
        latents = (latents / scale + shift).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    @property
    def latent_scale(self) -> tuple[float, float]:
        """(shift, scale) that give the autoencoder's latents mean 0 and variance 1."""
        return self.vae.config.get("shift_factor") or 0.0, self.vae.config.scaling_factor

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor],
                geometry: torch.Tensor | None = None) -> torch.Tensor:
        """The UNet's output for noisy latents x_t (n, c, h, w) at timesteps t (n,), float32."""
        x_t = x_t.to(self.dtype).contiguous(memory_format=self.layout)
        cond = {name: tensor.to(self.dtype) for name, tensor in cond.items()}
        return self.unet(x_t, t, **cond).sample.float()

    def pipeline_inputs(self, cond: dict[str, torch.Tensor],
                        negative: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": cond["encoder_hidden_states"],
                "negative_prompt_embeds": negative["encoder_hidden_states"]}
