"""Stable Diffusion XL (Podell et al. 2023), and any pipeline folder of its shape."""

from typing import Any, ClassVar

import torch

from dbcore.config import need
from dbcore.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion with two text encoders, whose UNet is also told a prompt's pooled encoding
    and the size and crop of the photo (section 2.2): `geometry` of `Family.predict`.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    pipeline_extras: ClassVar = {"add_watermarker": False}
    roles: ClassVar = {**StableDiffusion.roles, "text_encoders": ("text_encoder", "text_encoder_2")}
    lora_targets: ClassVar = {
        **StableDiffusion.lora_targets,
        "text_encoder_2": StableDiffusion.lora_targets["text_encoder"],
    }
    embedding_keys: ClassVar = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    defaults: ClassVar = {
        **StableDiffusion.defaults, "learning_rate": 1e-4, "guidance_scale": 5.0}

    def check(self) -> None:
        super().check()
        kind = self.index["scheduler"][1]
        need(not kind.startswith("EDM"), f"--pretrained_model_name_or_path {self.name} was trained "
             f"as Karras et al. 2022 (EDM) do, by its {kind}, which is not supported: give a base "
             "such as stabilityai/stable-diffusion-xl-base-1.0")

    def precision(self, component: str) -> torch.dtype:
        """float32 for the autoencoder, which overflows in half, unless it is mended (fp16-fix)."""
        if component == "vae" and self.config_of("vae").get("force_upcast", True):
            return torch.float32
        return self.dtype

    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": (n, length, width), "text_embeds": (n, width of the second)}.

        No words are all zeros, in both, as where captions were left out when the base was trained.
        """
        outputs = [encoder(self.tokens(prompts, tokenizer), output_hidden_states=True)
                   for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values())]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self.index.get("force_zeros_for_empty_prompt", True):
            worded = torch.tensor([float(prompt != "") for prompt in prompts], device=self.device)
            hidden, pooled = hidden * worded[:, None, None], pooled * worded[:, None]
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def pooled_text(self, prompts: list[str]) -> torch.Tensor:
        return self.encode_text(prompts)["text_embeds"]

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor],
                geometry: torch.Tensor | None = None) -> torch.Tensor:
        if geometry is None:
            height, width = (side * self.downsampling for side in x_t.shape[2:])
            geometry = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device)
            geometry = geometry.expand(len(x_t), 6)
        x_t = x_t.to(self.dtype).contiguous(memory_format=self.layout)
        added = {"text_embeds": cond["text_embeds"].to(self.dtype), "time_ids": geometry}
        return self.unet(x_t, t, cond["encoder_hidden_states"].to(self.dtype),
                         added_cond_kwargs=added).sample.float()

    def pipeline_inputs(self, cond: dict[str, torch.Tensor],
                        negative: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            **super().pipeline_inputs(cond, negative),
            "pooled_prompt_embeds": cond["text_embeds"],
            "negative_pooled_prompt_embeds": negative["text_embeds"],
        }
