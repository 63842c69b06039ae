"""FLUX.2 [klein] in miniature: a flow transformer with random weights, for notebook 10 and tests.

It has the original's parts and names and a few thousand parameters, so the same functions train it
and generate with it in seconds. It has learned nothing: its images are noise.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = ["a", "photo", "of", "the", "sks", "dog", "cat", "car", "red", "blue", "on", "in", "grass",
         "snow", "beach"]  # one token each
# Qwen3's template for one message of the user, an answer asked for, without thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_qwen_tokenizer() -> Qwen2TokenizerFast:
    """A byte-level Qwen2TokenizerFast: a token for each byte, and for each of WORDS after a
    space."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols, merges = list(bytes_to_unicode().values()), []
    for word in WORDS:
        parts = ["\u0120", *word]  # the symbol that stands for a space
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            symbols.append(parts[0])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys([*symbols, *special]))}
    tokenizer = Qwen2TokenizerFast(vocab, list(dict.fromkeys(merges)), pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", additional_special_tokens=special[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_flux2_miniature(folder: str | Path, seed: int = 0) -> Path:
    """Write FLUX.2 [klein] in miniature: its parts and names, a few channels, random weights.

    Images are 32 x 32, latents 16 x 16 x 4, in patches of 2 x 2 8 x 8 x 16. The text encoder has as
    many layers as are read (9, 18 and 27), and one more.
    """
    torch.manual_seed(seed)
    tokenizer, width = make_qwen_tokenizer(), 8
    text = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.1,
    ))
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32,
    )
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.1, 0.3)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=3 * width, timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    )
    Flux2KleinPipeline(scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tokenizer,
                       transformer=transformer).save_pretrained(folder)
    return Path(folder)
