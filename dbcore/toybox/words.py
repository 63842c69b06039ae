"""The toy base's tokenizer: an ordinary CLIPTokenizer whose vocabulary is the toy world's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from dbcore.toybox.scene import BUILD, CLASSES, COLORS, PLACES

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
    merges = merges_for(words())
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


def merges_for(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Pairs to merge, first ones first, that make every word one piece.

    A new pair comes last, so it changes nothing in the words before: they are whole without it.
    """
    merges: list[tuple[str, str]] = []
    for word in vocabulary:
        pieces = merged([*word[:-1], f"{word[-1]}</w>"], merges)
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
