"""Attention maps by word: which places of an image take how much from which word of the prompt.

A cross-attention layer compares the query of each place with the key of each token (Vaswani et al.
2017). Its weights, averaged over heads, layers and denoising steps, say where in the image a word
acts (DAAM, Tang et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from dbcore.models.base import Family


class Recording(AttnProcessor2_0):
    """Attention as always, that also keeps its weights: one (tokens, h, w) a call."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __call__(self, attn: Attention, hidden_states: torch.Tensor,
                 encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        queries, keys = (attn.head_to_batch_dim(part) for part in (
            attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)))
        weights = attn.get_attention_scores(queries, keys)  # (batch x heads, h x w, tokens)
        # of the batch the last: with guidance, the empty prompt comes first
        tokens = weights[-attn.heads:].float().mean(0).T
        side = round(tokens.shape[1] ** 0.5)
        self.maps.append(tokens.unflatten(1, (side, side)))
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


@contextmanager
def recording(denoiser: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, a list that every cross-attention layer adds its `Recording.maps` to."""
    before, recorder = denoiser.attn_processors, Recording()
    denoiser.set_attn_processor({name: recorder if "attn2" in name else processor
                                 for name, processor in before.items()})
    try:
        yield recorder.maps
    finally:
        denoiser.set_attn_processor(before)


def word_maps(base: Family, prompt: str, seed: int, words: list[str],
              **options: Any) -> list[Image.Image]:
    """The image of (prompt, seed), then a grey one for each of `words`, all of one size.

    A map is the word's share of the attention that each place gives to all words of the prompt,
    brought to its own range: white is where it is largest, black where it is least; a word that is
    cut off, because the prompt is too long, is black. `words`: some of the prompt's. `options`:
    those of `generate`. Returns [] for a denoiser without cross-attention, such as FLUX.2's, where
    words and image share one attention.
    """
    with recording(base.denoiser) as maps:
        (image,) = base.generate([prompt], [seed], **options)
    if not maps:
        return []
    side = max(one.shape[-1] for one in maps)
    mean = torch.stack([interpolate(one[None], (side, side), mode="bilinear")[0]
                        for one in maps]).mean(0)
    places = token_places(base.tokenizer, prompt)
    all_words = mean[1:1 + len(base.tokenizer.tokenize(prompt))][:len(mean) - 2].sum(0)
    return [image, *(grey(mean[places[word]].sum(0) / all_words, image.size) for word in words)]


def token_places(tokenizer: Any, prompt: str) -> dict[str, list[int]]:
    """{word: where its tokens are in the encoded prompt}, between the marks of start and end; none
    for what is cut off."""
    places: dict[str, list[int]] = {}
    first, end = 1, tokenizer.model_max_length - 1
    for word in prompt.split():
        count = len(tokenizer.tokenize(word))
        places[word] = list(range(first, min(first + count, end)))
        first += count
    return places


def grey(values: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """(h, w) numbers as an image of `size`, the least black and the largest white."""
    low, high = values.aminmax()
    levels = (values - low) / (high - low).clamp(min=1e-12) * 255
    image = Image.fromarray(levels.byte().cpu().numpy()).resize(size, Image.Resampling.BICUBIC)
    return image.convert("RGB")
