"""Prompts and captions against what a base reads of them: a limited number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dbcore.datasets.images import shown
from dbcore.utils.errors import InputError

if TYPE_CHECKING:
    from dbcore.config import TrainConfig
    from dbcore.datasets.photos import Photo
    from dbcore.models.base import Family

COMMON = {  # words that never call a subject
    "a", "an", "and", "at", "by", "image", "in", "my", "of", "on", "photo", "photograph",
    "picture", "the", "to", "with",
}  # fmt: skip
LONGEST = 200  # characters of a text that are shown


class PromptError(InputError):
    """A text whose words for the subject no text encoder sees."""


def check_fit(base: Family, texts: Iterable[tuple[str, str]], instance_prompt: str,
              class_prompt: str | None = None, say: Callable[[str], Any] = print) -> None:
    """Say of each text what lies beyond the base's token limit.

    `texts`: [(where it comes from, text)]; `base`: a Family. Raises PromptError where a word that
    calls the subject is cut off: training or generating with it would be for nothing.
    """
    calling = calling_words(instance_prompt, class_prompt)
    for where, text in texts:
        cut = base.cut_off(text)
        if not cut:
            continue
        lost = calling & words(cut) - words(text[: len(text) - len(cut)])
        end = f"the end of {where} is cut off, as it is too long for the base: {shortened(cut)!r}"
        if lost:
            raise PromptError(
                f"{end}. {' and '.join(sorted(lost))}, which calls the subject, is in it: "
                "shorten the text, or put that first"
            )
        say(f"  {end}")


def texts_of(config: TrainConfig, photos: Iterable[Photo]) -> list[tuple[str, str]]:
    """[(where it comes from, text)] of all that a run with these photos says to its base."""
    texts = [
        ("--instance_prompt", config.instance_prompt),
        ("--class_prompt", config.class_prompt or ""),
    ]
    texts += [("--validation_prompt", prompt) for prompt in config.validation_prompt]
    return texts + [
        (f"{shown(photo.path.name)}'s caption", photo.caption) for photo in photos if photo.caption
    ]


def calling_words(instance_prompt: str, class_prompt: str | None = None) -> set[str]:
    """The words of the instance prompt that are neither common nor the class's."""
    return words(instance_prompt) - COMMON - words(class_prompt or "")


def check_identifier(instance_prompt: str, class_prompt: str) -> None:
    """Raises PromptError where nothing of the instance prompt calls the subject alone."""
    if not calling_words(instance_prompt, class_prompt):
        raise PromptError(
            f"--instance_prompt {instance_prompt!r} has no word that --class_prompt "
            f"{class_prompt!r} has not, so --prior_prediction would forbid what is to be learnt: "
            "put an identifier, such as sks, into the instance prompt alone"
        )


def check_abstraction(config: TrainConfig, photos: Iterable[Photo]) -> None:
    """Raises PromptError where no photo's caption has the word for new tokens, which would learn
    nothing."""
    word = config.token_abstraction
    texts = [photo.caption or config.instance_prompt for photo in photos]
    if not any(word.lower() in words(text) for text in texts):
        raise PromptError(
            f"--token_abstraction {word}: no photo's caption has this word, which stands for the "
            f"new tokens (the first is {shortened(texts[0])!r}): put it into the captions"
        )


def without_identifier(text: str, instance_prompt: str, class_prompt: str) -> str:
    """A photo's words without those that call the subject.

    The class prompt stands for the instance prompt, and for a caption of no other words or without
    the identifier.
    """
    calling = calling_words(instance_prompt, class_prompt)
    kept = " ".join(word for word in text.split() if not words(word) & calling)
    return class_prompt if text == instance_prompt or kept in ("", text) else kept


def words(text: str) -> set[str]:
    return {word.strip(".,;:!?\"'()").lower() for word in text.split()}


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
