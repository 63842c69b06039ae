"""The toy bases' tokenizers: an ordinary CLIPTokenizer and an ordinary Qwen2Tokenizer, with the toy
world's vocabulary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dbcore.toybox.scene import BUILD, CLASSES, COLORS, PLACES

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

MAX_LENGTH = 56
IDENTIFIERS = ("sks", "ohwx", "zwx")  # one token each, in no caption: rare words to teach
OTHERS = [
    "a", "an", "the", "photo", "of", "with", "wearing", "and", "hat", "hats", "spots", "stripes",
    "plain", "big",
    "small", "shiny", "wet", "toy", "picture", "top", "house", "city", "mountain", "tree", "wheat",
    "field",
    "street", "jungle", "water", "pink", "scarf", "glasses", "animal", "from", "left", "right",
    "side", "front",
    "close", "up", "far", "away", "low", "sun",
]


def words() -> list[str]:
    builds = [phrase for names in BUILD.values() for pair in names.values() for phrase in pair]
    phrases = " ".join([*PLACES.values(), *builds]).split()
    return sorted({*CLASSES, *COLORS, *phrases, *OTHERS, *IDENTIFIERS})


def train_tokenizer(folder: Path) -> Path:
    """Write a CLIPTokenizer folder in which every one of `words()` is one token.

    Byte-pair merges (Sennrich et al. 2016) are added until each word is whole; any other word falls
    into pieces, as in the real tokenizer. The same list gives the same ids every time.
    """
    from transformers import CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")
    merges = merges_for([*word[:-1], f"{word[-1]}</w>"] for word in words())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters,
              *(f"{letter}</w>" for letter in letters),
              *("".join(merge) for merge in merges)]
    vocab = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges)
                                       + "\n")
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH).save_pretrained(folder)
    return folder


# A message is lower case, and begins with a space as any word within it does.
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "<|im_start|> {{ message.content | lower }}<|im_end|>{% endfor %}")
SPACE = "\u0120"  # what stands for a space in a byte-level vocabulary


def make_chat_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2Tokenizer, as FLUX.2's is: every one of `words()` is one token, and so is it after a
    space.

    Any other word falls into pieces, bytes in the end. Its chat template is all but empty: two
    tokens around the prompt.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = [*map(list, words()), *([SPACE, *word] for word in words())]
    merges, special = merges_for(pieces), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *bytes_to_unicode().values(), *("".join(merge) for merge in merges)]
    tokenizer = Qwen2Tokenizer({token: k for k, token in enumerate(dict.fromkeys(tokens))}, merges,
                               pad_token=special[0], eos_token=special[2],
                               additional_special_tokens=special[1:],
                               model_max_length=MAX_LENGTH)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def merges_for(vocabulary: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Pairs to merge, first ones first, that make every word, given as its letters, one piece.

    A new pair comes last, so it changes nothing in the words before: they are whole without it.
    """
    merges: list[tuple[str, str]] = []
    for letters in vocabulary:
        pieces = merged(letters, merges)
        merges += [("".join(pieces[:k]), pieces[k]) for k in range(1, len(pieces))]
    return merges


def merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Pieces after all the merges that apply, the earliest in the list first."""
    rank = {pair: k for k, pair in enumerate(merges)}
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in rank]:
        pair = min(pairs, key=lambda pair: rank[pair])
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == pair:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces
