"""FLUX.2 [klein] (Black Forest Labs 2026), and any pipeline folder of its shape."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dbcore.config import need
from dbcore.models.base import Family, read_json
from dbcore.models.process import Flow

MAX_TOKENS = 512  # the pipeline's own max_sequence_length
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # of the blocks that keep text and image apart
# of the blocks that hold both in one stream: queries, keys, values and feed-forward in one layer
SINGLE_STREAM = ["to_qkv_mlp_proj", "attn.to_out"]
TEXT_STREAM = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]


class Flux2Klein(Family):
    """A transformer on patches of latents and tokens of a Qwen3 language model, by rectified flow.

    What is called latents here is what the transformer sees: patches of 2 x 2 of the autoencoder's,
    as channels, each brought to mean 0 and variance 1.
    """

    pipeline_name = "Flux2KleinPipeline"
    roles: ClassVar = {
        "denoiser": ("transformer",), "autoencoder": ("vae",), "text_encoders": ("text_encoder",)}
    lora_targets: ClassVar = {"transformer": {
        "attention": ATTENTION + SINGLE_STREAM,
        "attention+ff": ATTENTION + SINGLE_STREAM + TEXT_STREAM + FEED_FORWARD,
    }}
    defaults: ClassVar = {
        **Family.defaults, "learning_rate": 1e-4, "num_inference_steps": 50, "guidance_scale": 4.0}

    @property
    def pipeline_extras(self) -> dict[str, Any]:  # type: ignore[override]
        return {"is_distilled": self.index.get("is_distilled", False)}

    @cached_property
    def process(self) -> Flow:
        return Flow(mu=self.resolution_shift)

    def resolution_shift(self, positions: int) -> float:
        """mu of n patches, on the line through two points that the scheduler's config names."""
        c = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
             "max_image_seq_len": 4096, **self.scheduler_config}
        (few, low), (many, high) = ((c[f"{end}_image_seq_len"], c[f"{end}_shift"])
                                    for end in ("base", "max"))
        return low + (high - low) * (positions - few) / (many - few)

    @cached_property
    def scheduler_config(self) -> dict:
        return read_json(self.name, "scheduler_config.json", subfolder="scheduler",
                         revision=self.revision)

    def check(self) -> None:
        need(not self.config_of("transformer").get("guidance_embeds", False),
             f"--pretrained_model_name_or_path {self.name}: its transformer is told the guidance "
             "scale, as FLUX.2 [dev]'s is, which is not supported: give a FLUX.2 [klein]")

    @cached_property
    def downsampling(self) -> int:
        """Pixels a patch of latents, along one side."""
        return 2 * 2 ** (len(self.config_of("vae")["block_out_channels"]) - 1)

    @property
    def side_multiple(self) -> int:
        return self.downsampling

    def native_resolution(self) -> int:
        return self.config_of("vae")["sample_size"]

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        high, wide = (side // self.downsampling for side in (height, width or height))
        return 4 * self.config_of("vae")["latent_channels"], high, wide

    def precision(self, component: str) -> torch.dtype:
        half = component == "vae" and self.dtype == torch.float16
        return torch.float32 if half else self.dtype

    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{"prompt_embeds": (n, length, 3 x width)}: three layers of the language model."""
        pipeline = self.pipeline_class(scheduler=None, vae=None, transformer=None,
                                       tokenizer=self.tokenizer, text_encoder=self.text_encoder)
        length = self.token_limit("tokenizer")
        return {"prompt_embeds": pipeline.encode_prompt(prompts, max_sequence_length=length)[0]}

    def token_limit(self, tokenizer: str) -> int:
        """The language model reads far more than the transformer was trained with."""
        limit = super().token_limit(tokenizer)
        return self.tokenizer_max_length or min(limit, MAX_TOKENS)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior's mode, as the base was trained; its std is 0."""
        mode = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        latents = self.patches(mode.float())
        return latents, torch.zeros_like(latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self.patch_scale
        latents = pixel_shuffle(latents * std + mean, 2)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def patches(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents (n, c, 2h, 2w) as patches (n, 4c, h, w)."""
        mean, std = self.patch_scale
        return (pixel_unshuffle(latents, 2) - mean) / std

    @property
    def patch_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) of each channel of a patch, as the autoencoder keeps them."""
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, variance = (statistic.float().view(1, -1, 1, 1)
                          for statistic in (norm.running_mean, norm.running_var))
        return mean, (variance + eps).sqrt()

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor],
                geometry: torch.Tensor | None = None) -> torch.Tensor:
        height, width = x_t.shape[2:]
        words, device = cond["prompt_embeds"].to(self.dtype), x_t.device
        prediction = self.transformer(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(self.dtype), timestep=t,
            encoder_hidden_states=words, img_ids=places(device, 1, height, width, 1),
            txt_ids=places(device, 1, 1, 1, words.shape[1]), return_dict=False)[0]
        return prediction.transpose(1, 2).unflatten(2, (height, width)).float()

    def pipeline_inputs(self, cond: dict[str, torch.Tensor],
                        negative: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": cond["prompt_embeds"],
                "negative_prompt_embeds": negative["prompt_embeds"]}

    def run_pipeline(self, pipeline: Any, cond: dict[str, torch.Tensor],
                     negative: dict[str, torch.Tensor], latents: torch.Tensor,
                     **options: Any) -> torch.Tensor:
        """The pipeline hands back the autoencoder's own latents."""
        found = super().run_pipeline(pipeline, cond, negative, latents, **options)
        return self.patches(found.float())


def places(device: torch.device | str, *sizes: int) -> torch.Tensor:
    """Coordinates (time x rows x columns x tokens, 4), from which the transformer tells places."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
