"""The flow base's text encoder: a small language model of the toy world's captions.

FLUX.2 [klein] reads prompts with Qwen3, a language model that has never seen an image; so does the
toy base of its family. It learns to say which word of a caption comes next, and nothing else, and
is frozen from then on. A CLIP would be nearer to images, but the pipeline reads three layers of a
causal model at every word, and such a model learns from captions alone: as many as one likes, with
no render, in minutes. What the words look like is left to the transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from dbcore.toybox.clip import tokenize
from dbcore.toybox.corpus import sample
from dbcore.toybox.denoiser import training_caption
from dbcore.toybox.fit import fit, step_rng, to_device
from dbcore.toybox.scene import mirror

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

LAYERS = (9, 18, 27)  # that Flux2KleinPipeline reads
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}


def make_language_model(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """As deep as the pipeline asks for, and narrow."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=LAYERS[-1] + 1, tie_word_embeddings=True,
        max_position_embeddings=tokenizer.model_max_length, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **SHAPE))
    # wide word vectors keep words apart through the layers, the rare and never seen ones too
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def encode_tokens(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (n, length) to what the pipeline reads of them, (n, length, 3 x width).

    The mask is the pipeline's, words before each that are not padding; given whole, since
    transformers would look at one of two dimensions, and a GPU would be waited for.
    """
    length, real = ids.shape[1], ids != model.config.pad_token_id
    before = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    states = model.model(ids, attention_mask=before & real[:, None, None, :], use_cache=False,
                         output_hidden_states=True).hidden_states
    return torch.cat([states[k] for k in LAYERS], dim=-1)


def random_captions(seed: int, step: int, batch: int) -> list[str]:
    """Captions of `batch` scenes that no other step has, worded as the transformer's are."""
    rng, _ = step_rng(seed, "captions", step)
    scenes = (sample(seed, k) for k in range(step * batch, (step + 1) * batch))
    return [training_caption(mirror(*scene) if rng.random() < 0.5 else scene, rng)
            for scene in scenes]


def train_language_model(tokenizer: Qwen2Tokenizer, folder: Path, seed: int, steps: int = 2000,
                         minutes: float | None = None, batch: int = 32, lr: float = 1e-3,
                         device: str = "cpu") -> Qwen3ForCausalLM:
    """Cross-entropy of each next token, the end mark's included, over random captions.

    In float32: matrices of this size are multiplied no faster in half.
    """
    torch.manual_seed(seed + 5)
    model = make_language_model(tokenizer)

    def loss_at(step, progress):
        ids = tokenize(tokenizer, random_captions(seed, step, batch))
        longest = int((ids != tokenizer.pad_token_id).sum(1).max())
        ids = to_device(ids[:, :longest], device)
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        following = ids[:, 1:].flatten()
        real = following != tokenizer.pad_token_id
        loss = F.cross_entropy(logits, following, ignore_index=tokenizer.pad_token_id)
        right = (logits.detach().argmax(-1) == following)[real]
        return {"loss": loss, "right": right.float().mean()}

    return fit("language", folder, model, loss_at, steps, lr, minutes, muon=True, ema=0.99,
               device=device)
