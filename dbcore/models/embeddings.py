"""New tokens for a base's text encoders: textual inversion (Gal et al. 2022, arXiv 2208.01618).

    v* = argmin_v E |w (y - y_theta(x_t, t, c(v)))|^2                                  equation 2
c(v) encodes a prompt in which one word stands for the tokens <s0><s1>, and v are their vectors, the
only ones of the table of words that are trained. With a LoRA beside them it is pivotal tuning
(Roich et al. 2021, arXiv 2106.05744, on images of a GAN).

Their file holds one tensor (tokens, width) for each text encoder, under the names of diffusers'
advanced scripts, which A1111 and ComfyUI know too: clip_l and, with SDXL, clip_g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import embedding

from dbcore.config import TrainConfig, need
from dbcore.models.adapter import LoraFileError
from dbcore.models.lora_files import WEIGHT_NAME, read_safetensors, save_safetensors
from dbcore.utils.seeding import normal
from dbcore.utils.text import replace_word

if TYPE_CHECKING:
    from dbcore.models.base import Family

EMBEDS_NAME = "learned_embeds.safetensors"  # as `load_textual_inversion` looks for it in a folder
NOTE = "token_abstraction"  # in its header: the word that stands for the tokens
PULL = 0.1  # of `keep_spread`
# {key in a file: (text encoder, tokenizer)} of stock pipelines
OF_PIPELINES = {"clip_l": ("text_encoder", "tokenizer"),
                "clip_g": ("text_encoder_2", "tokenizer_2")}


class NewTokens(torch.nn.Module):
    """A text encoder's table of words, frozen, and the rows of new tokens, float32.

    `first`: the number of the first new token; the others follow. `key`: the rows' name in a file.
    """

    def __init__(self, table: torch.nn.Embedding, first: int, rows: torch.Tensor, key: str):
        super().__init__()
        self.table, self.first, self.key, self.is_on = table, first, key, True
        self.rows = torch.nn.Parameter(rows.clone())
        self.register_buffer("initial", rows, persistent=False)
        self.register_buffer("spread", table.weight.float().std(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token numbers (n, length) to vectors (n, length, width), in the table's precision."""
        place = ids - self.first
        is_new = place >= 0
        known = self.table(ids.masked_fill(is_new, 0))
        # where no token is new too, so that the rows' gradient is 0 there, and not missing
        new = embedding(place.clamp(min=0), self.rows if self.is_on else self.initial)
        return torch.where(is_new[..., None], new.to(known.dtype), known)

    @property
    def varies(self) -> bool:
        """Whether the rows are being learnt, or are switched off for a while."""
        return self.rows.requires_grad or not self.is_on

    @torch.no_grad()
    def keep_spread(self, skipped: torch.Tensor) -> None:
        """After a step, pull the rows' standard deviation towards that of the table.

        By the factor (theirs / the rows') ^ 0.1, as diffusers' advanced scripts do after each step,
        so that the new tokens do not drown the other words. `skipped`: the step changed nothing, a
        bool on the device.
        """
        if self.rows.grad is not None:
            factor = (self.spread / self.rows.std()) ** PULL
            self.rows.mul_(torch.where(skipped, torch.ones_like(factor), factor))


def tokens_of(modules: Mapping[str, torch.nn.Module]) -> list[NewTokens]:
    """The new tokens of {component: network}, one for each text encoder that has any."""
    return [part for module in modules.values() for part in module.modules()
            if isinstance(part, NewTokens)]


# --- put on a base --------------------------------------------------------------------------------


def add_tokens(base: Family, config: TrainConfig) -> None:
    """Put the tokens that `config` asks for on a base, to be trained.

    They begin as the vectors of `initializer_concept`, one after the other and over again, or at
    random with the table's standard deviation.
    """
    c, count = config, config.num_new_tokens_per_abstraction
    name_tokens(base, c.token_abstraction, count)
    for encoder, tokenizer in zip(base.text_encoders, base.tokenizers):
        weight = base.text_encoders[encoder].get_input_embeddings().weight
        if c.initializer_concept is None:
            noise = normal(weight.shape[1:], c.seed, f"new tokens of {encoder}", 0, range(count))
            rows = noise.to(weight.device) * weight.float().std()
        else:
            ids = getattr(base, tokenizer)(c.initializer_concept, add_special_tokens=False)
            rows = weight[[id for id, _ in zip(cycle(ids.input_ids), range(count))]]
        put_rows(base, encoder, rows)


def name_tokens(base: Family, word: str, count: int) -> None:
    """Have a base's tokenizers know <s0>, <s1> ..., and the base read `word` as them.

    Raises ConfigError where there are tokens of these names.
    """
    names = [f"<s{k}>" for k in range(count)]
    for tokenizer in base.tokenizers:
        there = {*names} & {*getattr(base, tokenizer).get_vocab()}
        need(not there, f"{base.name} has new tokens ({', '.join(sorted(there))}) already, as a "
             "pipeline has that some were merged into: give the base without them, or use them "
             "alone")
        getattr(base, tokenizer).add_tokens(names)
    base.new_tokens = word, "".join(names)


def put_rows(base: Family, encoder: str, rows: torch.Tensor) -> NewTokens:
    """Put the vectors (tokens, width) of tokens that are named beside a text encoder's table."""
    network, tokenizer = getattr(base, encoder), dict(zip(base.text_encoders, base.tokenizers))
    table = network.get_input_embeddings()
    first = getattr(base, tokenizer[encoder]).convert_tokens_to_ids("<s0>")
    part = NewTokens(table, first, rows.detach().to(table.weight.device, torch.float32, copy=True),
                     base.embedding_keys[encoder])
    network.set_input_embeddings(part)
    return part


def remove_tokens(base: Family) -> None:
    """The base without new tokens."""
    if base.new_tokens is None:
        return
    for network in base.loaded("text_encoders").values():
        network.set_input_embeddings(network.get_input_embeddings().table)
    base.new_tokens = None
    for tokenizer in base.tokenizers:
        vars(base).pop(tokenizer, None)  # read anew, without them


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """New tokens as their file holds them.

    `rows`: {a key of `Family.embedding_keys`: (tokens, width)}. `word`: stands for them in prompts.
    `notes`: as an `Adapter`'s.
    """

    rows: dict[str, torch.Tensor]
    word: str
    notes: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [f"<s{k}>" for k in range(len(next(iter(self.rows.values()))))]

    def spell(self, prompt: str) -> str:
        """A prompt as a stock pipeline reads it."""
        return replace_word(self.word, "".join(self.names), prompt)

    def loading(self) -> str:
        """Lines of Python that put them on a stock pipeline, for a model card."""
        lines = ["from safetensors.torch import load_file", f'rows = load_file("{EMBEDS_NAME}")']
        lines += [f'pipeline.load_textual_inversion(rows["{key}"], token={self.names}, '
                  f"text_encoder=pipeline.{encoder}, tokenizer=pipeline.{tokenizer})"
                  for key, (encoder, tokenizer) in OF_PIPELINES.items() if key in self.rows]
        return "\n".join([*lines, ""])


def beside(lora: str | Path) -> Path:
    """Where the new tokens of a LoRA are: in its folder, or with x.safetensors in
    x_emb.safetensors."""
    path = Path(lora)
    if path.is_dir():
        return path / EMBEDS_NAME
    return path.with_name(EMBEDS_NAME if path.name == WEIGHT_NAME
                          else f"{path.stem}_emb.safetensors")


def save_tokens(modules: Mapping[str, torch.nn.Module], path: str | Path,
                notes: Mapping[str, Any]) -> None:
    """Write the new tokens of {component: network}, where there are any."""
    if parts := tokens_of(modules):
        save_safetensors({part.key: part.rows for part in parts}, path, dict(notes))


def read_tokens(lora: str | Path) -> TokenFile | None:
    """The new tokens beside a LoRA (a run's folder, or a file); None where there are none.

    Raises LoraFileError for a file that is damaged, or is none of new tokens.
    """
    path = beside(lora)
    if not path.is_file():
        return None
    try:
        rows, header = read_safetensors(path)
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None
    good = all(tensor.dim() == 2 and tensor.isfinite().all() for tensor in rows.values())
    if not rows or not good or len({len(tensor) for tensor in rows.values()}) > 1:
        raise LoraFileError(f"{path} does not hold one vector of finite numbers for each new token "
                            "and text encoder: copy it again, or train again")
    header.pop("format", None)
    return TokenFile(rows, header.get(NOTE, TrainConfig.token_abstraction), header)


def load_into_pipeline(pipeline: Any, tokens: TokenFile) -> None:
    """Put new tokens on a stock pipeline of diffusers."""
    for key, rows in tokens.rows.items():
        encoder, tokenizer = (getattr(pipeline, part) for part in OF_PIPELINES[key])
        pipeline.load_textual_inversion(rows, token=tokens.names, text_encoder=encoder,
                                        tokenizer=tokenizer)


def check_tokens(base: Family, tokens: TokenFile, lora: str | Path) -> None:
    """Raises LoraFileError where new tokens do not fit a base, or it has others."""
    path, keys = beside(lora), base.embedding_keys
    widths = {key: tensor.shape[1] for key, tensor in tokens.rows.items()}
    if widths != {keys[name]: getattr(base, name).get_input_embeddings().embedding_dim
                  for name in keys}:
        found = ", ".join(f"{key} of width {width}" for key, width in widths.items())
        raise LoraFileError(f"{path} holds new tokens ({found}) that do not fit this base: give "
                            "the base that they were trained on")
    if base.new_tokens is not None:
        raise LoraFileError(f"{path}: there would be new tokens of two runs, both called <s0>: "
                            "give one --checkpoint_dir that has any")


def load_tokens(base: Family, tokens: TokenFile) -> None:
    """Put new tokens on a base, frozen."""
    name_tokens(base, tokens.word, len(tokens.names))
    for encoder, key in base.embedding_keys.items():
        put_rows(base, encoder, tokens.rows[key]).requires_grad_(False)
