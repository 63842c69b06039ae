"""Small random-weight pipelines for tests: the shape of Stable Diffusion, a few thousand
parameters."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
)

from dbcore.course.miniature import WORDS, make_flux2_miniature, make_qwen_tokenizer  # noqa: F401

MAX_TOKENS = 16


def make_tokenizer(folder, max_tokens=MAX_TOKENS, **config):
    """A CLIPTokenizer with letters and WORDS; each known word is one token, others are spelt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    symbols, merges = letters + [c + "</w>" for c in letters], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            symbols.append(parts[0])
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": max_tokens,
                "do_lower_case": True,
                **config,
            }
        )
    )
    return CLIPTokenizer.from_pretrained(folder)


def make_tiny_pipeline(folder, prediction_type="epsilon", seed=0):
    """Write a StableDiffusionPipeline of 32 x 32 pictures and 16 x 16 x 4 latents; return its
    folder."""
    folder = Path(folder)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=16,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(prediction_type=prediction_type, steps_offset=1, clip_sample=False)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd15_pipeline(folder, seed=0):
    """Write a pipeline of Stable Diffusion 1.5's true shape (0.86 billion in the UNet), random
    weights, fp16."""
    folder = Path(folder)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
            sample_size=512,
        )  # fmt: skip
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd15_miniature(folder, seed=0):
    """Write Stable Diffusion 1.5 in miniature: its parts, layers, names and sampler, a few
    channels, random weights.

    Pictures are 128 x 128, latents 16 x 16 x 4. Like the original it has a safety checker, and no
    settings of ours.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", 77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        norm_num_groups=4, sample_size=128,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=2,
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    # as the original has it, for DDIM
    _edit(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    add_safety_checker(folder)
    return folder


def make_sdxl_miniature(folder, seed=0):
    """Write Stable Diffusion XL in miniature: its parts, names and sampler, a few channels.

    Images are 32 x 32, latents 16 x 16 x 4. As in the original, the two text encoders differ in
    width and in what they pad with, and the UNet's blocks have 0, 1 and 2 transformer layers.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    tokenizers = [make_tokenizer(folder / "tokenizer"),
                  make_tokenizer(folder / "tokenizer_2", pad_token="!")]  # fmt: skip
    text, text_2 = (
        kind(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, hidden_act=activation,
        ))
        for tokenizer, kind, width, activation in zip(
            tokenizers, (CLIPTextModel, CLIPTextModelWithProjection), (16, 24),
            ("quick_gelu", "gelu")
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32, scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, cross_attention_dim=40, block_out_channels=(8, 16, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=text, text_encoder_2=text_2, tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sdxl_shape(folder):
    """Write the configs of Stable Diffusion XL at its true size, without weights: for forecasts."""
    folder = Path(folder)
    index = {"_class_name": "StableDiffusionXLPipeline",
             "scheduler": ["diffusers", "EulerDiscreteScheduler"]}  # fmt: skip
    for number, (width, layers, kind) in enumerate(
        [(768, 12, "CLIPTextModel"), (1280, 32, "CLIPTextModelWithProjection")]
    ):
        end = "_2" * number
        tokenizer = make_tokenizer(folder / f"tokenizer{end}", 77)
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=width,
            eos_token_id=tokenizer.eos_token_id,
        ).save_pretrained(folder / f"text_encoder{end}")  # fmt: skip
        index |= {f"text_encoder{end}": ["transformers", kind],
                  f"tokenizer{end}": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=1024,
            scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + 1280,
        )  # fmt: skip
    for name, network in (("vae", vae), ("unet", unet)):
        network.save_config(folder / name)
        index[name] = ["diffusers", type(network).__name__]
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    ).save_config(folder / "scheduler")  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_flux2_shape(folder):
    """Write the configs of FLUX.2 [klein] 4B at its true size, without weights."""
    folder, tokenizer = Path(folder), make_qwen_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        transformer = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24,
            joint_attention_dim=3 * 2560, guidance_embeds=False,
        )  # fmt: skip
    index = {"_class_name": "Flux2KleinPipeline",
             "tokenizer": ["transformers", "Qwen2TokenizerFast"],
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "text_encoder": ["transformers", "Qwen3ForCausalLM"]}  # fmt: skip
    for name, network in (("vae", vae), ("transformer", transformer)):
        network.save_config(folder / name)
        index[name] = ["diffusers", type(network).__name__]
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    ).save_config(folder / "scheduler")  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def add_safety_checker(folder):
    """Stable Diffusion 1.5 comes with a judge of its pictures: the file of one, with random
    weights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    config = CLIPConfig(vision_config=small, text_config=small, projection_dim=16)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    _edit(folder / "feature_extractor" / "preprocessor_config.json", crop_size=224,
          do_center_crop=True,
          do_convert_rgb=True, do_normalize=True, do_resize=True,
          feature_extractor_type="CLIPFeatureExtractor",
          image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28], resample=3, size=224)
    _edit(folder / "model_index.json",
          safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
          feature_extractor=["transformers", "CLIPImageProcessor"], requires_safety_checker=True)


def _edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
