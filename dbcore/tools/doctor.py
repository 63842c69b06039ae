"""`dbcore doctor`: look at a run before it starts, and write nothing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dbcore.config import AUTO, TrainConfig, add_options, from_args

if TYPE_CHECKING:
    from dbcore.engines.memory import Forecast
    from dbcore.models.base import Family

HELP = ("look at photos, words, memory and machine before a run; takes train's options "
        "and writes nothing")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors",
            "bitsandbytes", "xformers")
# Ordinary words in the identifier's place: how far a word that means something moves an encoding.
ORDINARY = ("red", "small", "old", "wet", "white")
NEIGHBOURS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, TrainConfig)


def main(args: argparse.Namespace) -> None:
    config = from_args(args, TrainConfig)
    for title, lines in examine(config):
        print(f"\n## {title}")
        print("\n".join(lines))


def examine(config: TrainConfig) -> Iterator[tuple[str, list[str]]]:
    """[(title, lines)], one part of the report after another, as each is known.

    `config`: TrainConfig; what is missing in it leaves its part out, with a line that says which
    option to give.
    """
    yield "Machine", machine()
    if config.pretrained_model_name_or_path:
        yield "What auto becomes", chosen(config)
    if config.instance_data_dir:
        yield "Photos", photos(config)
    yield "Identifier", identifier(config)
    if config.pretrained_model_name_or_path:
        yield "Memory", memory(config)


# --- the machine ----------------------------------------------------------------------------------


def machine() -> list[str]:
    import torch

    computer = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    lines = [(f"Python {platform.python_version()} on {computer}, "
              f"{total_memory() / 1e9:.0f} GB of memory")]
    lines.append(", ".join(f"{name} {version}" for name in PACKAGES
                           if (version := installed(name))))
    for k in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(k)
        lines.append(f"GPU {k}: {card.name}, {card.total_memory / 1e9:.0f} GB")
    if not torch.cuda.is_available():
        apple = torch.backends.mps.is_available()
        lines.append("GPU: Apple's (mps)" if apple else "GPU: none that PyTorch can use; "
                     "the CPU does the work")
    return lines


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def total_memory() -> int:
    """Bytes of the machine's memory, or of the container's share of it."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return psutil.virtual_memory().total


# --- the options ----------------------------------------------------------------------------------


def chosen(config: TrainConfig) -> list[str]:
    """Each `auto` that becomes something for this base and machine, and what."""
    from dbcore.models.base import resolve

    resolved = resolve(config)
    names = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == AUTO]
    return [f"{name}: {getattr(resolved, name)}" for name in names
            if getattr(resolved, name) != AUTO]


def photos(config: TrainConfig) -> list[str]:
    """What is wrong with each photo, with its number of problems first."""
    from dbcore.datasets.photos import PhotoError, describe_buckets, gather_photos
    from dbcore.models.base import resolve

    buckets = resolve(config).buckets if config.pretrained_model_name_or_path else []
    try:
        found, problems = gather_photos(config.instance_data_dir, use_masks=config.use_masks,
                                        buckets=buckets)
    except PhotoError as error:
        return [f"No run is possible: {error}"]
    skipped = sum(problem.skipped for problem in problems)
    lines = [f"{len(found)} can be used, {skipped} are skipped."]
    if config.aspect_ratio_buckets and buckets:
        lines.append(describe_buckets(found, buckets))
    if len(found) < 3:
        lines.append("Three to ten photos from several sides teach a subject; "
                     "fewer teach one view of it.")
    return lines + [f"- {problem}" for problem in problems]


# --- the words ------------------------------------------------------------------------------------


def identifier(config: TrainConfig) -> list[str]:
    """Whether the word that will call the subject already means something to the base."""
    if not (config.instance_prompt and config.class_prompt
            and config.pretrained_model_name_or_path):
        return [("Not looked at: give --instance_prompt, --class_prompt and "
                 "--pretrained_model_name_or_path.")]
    word = new_word(config.instance_prompt, config.class_prompt)
    if not word:
        return [(f"{config.instance_prompt!r} has no word that {config.class_prompt!r} has not, "
                 "so the subject would take the whole class: put a rare word before the class, "
                 "such as 'a photo of sks dog'.")]
    from dbcore.models.base import load_base

    base = load_base(config.pretrained_model_name_or_path, config.revision, config.variant,
                     config.tokenizer_name)
    return describe_word(base, word, config.instance_prompt)


def new_word(instance_prompt: str, class_prompt: str) -> str:
    """The words of the instance prompt that the class prompt has not, in their order: 'sks'."""
    known = class_prompt.lower().split()
    return " ".join(word for word in instance_prompt.split() if word.lower() not in known)


def describe_word(base: Family, word: str, prompt: str) -> list[str]:
    """The report on one identifier: its pieces, its weight in the prompt, and the words next to
    it."""
    # as within a prompt: to some, a space is part of it
    pieces = base.tokenizer.tokenize(f" {word}")
    moved, ordinary = weight_of(base, word, prompt), [weight_of(base, word, prompt, other)
                                                      for other in ORDINARY]
    lines = [f"{word!r} is {len(pieces)} token{'s' * (len(pieces) > 1)}: {' '.join(pieces)}"]
    if len(pieces) > 1:
        lines.append("  Each piece brings a meaning of its own and a place that training must "
                     "move: one rare token is learnt faster. Try sks or ohwx.")
    lines.append(f"it moves the prompt's encoding by {moved:.2f}; "
                 f"words such as {', '.join(ORDINARY[:3])} move it by {min(ordinary):.2f} to "
                 f"{max(ordinary):.2f}")
    if moved > max(ordinary):
        lines.append("  It already says more than an ordinary word: generate with it "
                     "first, and choose another if the base has an image for it.")
    near = ", ".join(f"{name} {cosine:.2f}" for name, cosine in neighbours(base, pieces[-1]))
    lines.append(f"nearest in the base's vocabulary (cosine): {near}")
    return lines


def weight_of(base: Family, word: str, prompt: str, other: str | None = None) -> float:
    """Distance of the pooled encodings of `prompt` with `word` (or `other` in its place) and
    without it, in [0, 2]."""
    import torch

    said = prompt if other is None else prompt.replace(word, other)
    texts = [said, " ".join(prompt.replace(word, " ").split())]
    with torch.no_grad():
        pooled = base.pooled_text(texts)
    return 1 - torch.cosine_similarity(pooled[0], pooled[1], dim=0).item()


def neighbours(base: Family, token: str) -> list[tuple[str, float]]:
    """[(token, cosine)]: the nearest in the first text encoder's own table of word vectors."""
    import torch

    encoder = next(iter(base.text_encoders.values()))
    table = torch.nn.functional.normalize(encoder.get_input_embeddings().weight, dim=1)
    own = base.tokenizer.convert_tokens_to_ids(token)
    cosines, ids = (table @ table[own]).topk(NEIGHBOURS + 1)
    names = base.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [(name.replace("</w>", ""), c)
            for name, c, k in zip(names, cosines.tolist(), ids.tolist()) if k != own][
        :NEIGHBOURS]


# --- the memory -----------------------------------------------------------------------------------


def memory(config: TrainConfig) -> list[str]:
    """The forecast for this machine, whether it fits, and a line for each well-known card."""
    import torch

    from dbcore.engines.advice import advise, by_card
    from dbcore.engines.memory import forecast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else total_memory()
    here = forecast(config, device)
    lines = [*table(here), "", verdict(here.peak, there, lambda: advise(config, there, device))]
    lines += ["", "| card | GB | precision | needs | |", "|---|---:|---|---:|---|"]
    for card, (size, precision, needed) in by_card(config).items():
        fits = "fits" if needed.peak <= size else "does not fit"
        lines.append(f"| {card} | {size / 1e9:.0f} | {precision} | "
                     f"{needed.peak / 1e9:.1f} | {fits} |")
    return lines


def table(forecast: Forecast) -> list[str]:
    """Lines of Markdown, in MB of 10^6 bytes; the last one is the run's highest point."""
    columns = ("weights", "activations", "optimizer", "total")
    lines = ["| MB | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for phase in forecast.phases:
        cells = (f"{getattr(phase, name) / 1e6:,.1f}" for name in columns)
        lines.append(f"| {phase.name} | " + " | ".join(cells) + " |")
    kernels = f" and {forecast.workspace / 1e6:,.0f} for kernels" if forecast.workspace else ""
    lines.append(f"| highest ({forecast.largest.name}) with {forecast.overhead / 1e6:,.0f} before "
                 f"the first tensor{kernels} | | | | {forecast.peak / 1e6:,.1f} |")
    return lines


def verdict(needed: float, there: float, advice: Callable[[], dict[str, Any] | None]) -> str:
    """One sentence; `advice()` is asked only if the run does not fit."""
    if needed <= there:
        return f"It fits: {needed / 1e9:.1f} of {there / 1e9:.1f} GB."
    from dbcore.engines.advice import flags

    changes = advice()
    return f"It does not fit: {needed / 1e9:.1f} of {there / 1e9:.1f} GB. " + (
        f"It would with {flags(changes)}." if changes else "No option makes it small enough: "
        "take a larger card.")
