"""`dbcore evaluate`: the DreamBooth paper's protocol for one run or many, as a table.

Subjects x prompts x images (Ruiz et al. 2023, section 4.1), with a floor (the base without
adapter, the same prompts and seeds) and a ceiling (the real photos against each other), without
which no number says anything. Images that are there are not generated again, so an evaluation that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dbcore
from dbcore.config import (
    ConfigError,
    GenerateConfig,
    check_interval,
    help_of,
    need,
    read_run_config,
)
from dbcore.datasets.prompts import check_fit
from dbcore.utils.files import save_png, sweep, write_beside, write_whole
from dbcore.utils.text import read_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dbcore.engines.evaluate import Encoder
    from dbcore.models.base import Family

HELP = ("measure runs after the DreamBooth paper: subject and prompt fidelity, PRES, DIV (1 - "
        "cosine; the paper's LPIPS with --lpips), with floor and ceiling")
LISTS = dbcore.DATA / "prompts"
STREAM = "evaluation"
DAY = 86_400.0
PROMPT_FORM = '{"scenes": ["in the snow", ...], "looks": ["red", ...]}'
ARTICLES = ("a", "an", "the", "my")
# parts of the sampling steps: all of them
WHOLE = {"guidance_interval": [0.0, 1.0], "lora_interval": [0.0, 1.0]}
IDENTIFIERS = ("sks", "ohwx", "zwx", "tok")  # that can be nothing else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_dir", nargs="+", required=True, metavar="RUN",
                        help="runs to measure, one subject each: folders that train wrote")
    parser.add_argument("--class_prompt", nargs="+", default=[], metavar="TEXT",
                        help="the class in words, such as 'a "
                        "photo of a dog', one for all runs or one each; without it, what the run "
                        "was trained with")
    parser.add_argument("--prompts", metavar="LIST",
                        help="objects, live (the paper's), toy, or a JSON file like them; "
                        "without it, what the base recommends, else objects")
    parser.add_argument("--num_prompts", type=int, metavar="N",
                        help="only N of them, spread over the list")
    parser.add_argument("--num_images", type=int, default=4, help="images a prompt (%(default)s)")
    parser.add_argument("--encoder", nargs="+", metavar="NAME",
                        help="metric encoders instead of the base's own, CLIP "
                        "first: names of transformers, such as openai/clip-vit-large-patch14")
    parser.add_argument("--lpips", action="store_true",
                        help="also measure DIV by LPIPS, as the paper does; needs pip "
                        "install lpips, which loads AlexNet's weights once")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the first image of each prompt (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8,
                        help="images generated at a time (%(default)s)")
    for name in WHOLE:
        parser.add_argument(f"--{name}", nargs=2, type=float, metavar=("LOW", "HIGH"),
                            default=[0.0, 1.0], help=help_of(GenerateConfig, name))
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"),
                        help="images, evaluation.json and evaluation.md go there (%(default)s)")


def main(args: argparse.Namespace) -> None:
    runs, classes = args.checkpoint_dir, args.class_prompt
    need(len(classes) in (0, 1, len(runs)),
         f"{len(classes)} values of --class_prompt for {len(runs)} of "
         "--checkpoint_dir: give one each, or one for all")
    classes = classes if len(classes) == len(runs) else (classes or [None]) * len(runs)
    subjects = [read_run(path, class_prompt) for path, class_prompt in zip(runs, classes)]
    for subject in subjects:
        print(f"{subject.name}: {subject.instance_prompt!r}, compared with its class, "
              f"{subject.class_prompt!r}.")
    result = evaluate(subjects, args.output_dir, args.prompts, args.num_prompts, args.num_images,
                      args.encoder, args.seed, args.batch_size, args.lpips,
                      {name: getattr(args, name) for name in WHOLE})
    print(result_table(result))
    print(f"\nPictures, and these numbers as .json and .md, are in {args.output_dir}.")


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A run, and what it was trained on."""

    name: str
    lora: Path | None  # None for the base alone
    base: str
    photos: str
    instance_prompt: str
    class_prompt: str
    revision: str | None = None


def read_run(folder: str | Path, class_prompt: str | None = None) -> Subject:
    """The `Subject` of a run's folder.

    Raises ConfigError where it is not a finished run, or its class is in doubt.
    """
    folder = Path(folder)
    path, lora = folder / "config.yaml", folder / "pytorch_lora_weights.safetensors"
    for needed in (path, lora):
        need(needed.is_file(), f"--checkpoint_dir {folder} has no {needed.name}: "
             "give the folder of a finished run")
    run = read_run_config(folder) or {}
    need({"instance_data_dir", "instance_prompt"} <= run.keys(),
         f"--checkpoint_dir {folder}: its {path.name} is not a run's; "
         "give the folder of a finished run")
    of_class = class_prompt or run.get("class_prompt") or bare_class(run["instance_prompt"]) or ""
    need(of_class, f"--checkpoint_dir {folder} was trained without a class prompt, "
         f"and {run['instance_prompt']!r} does not tell its class for certain: "
         "give --class_prompt, such as 'a photo of a dog'")
    return Subject(folder.resolve().name, lora, run["pretrained_model_name_or_path"],
                   run["instance_data_dir"], run["instance_prompt"], of_class, run.get("revision"))


def bare_class(instance_prompt: str) -> str | None:
    """'a photo of sks dog' -> 'a photo of a dog'; None where it is in doubt which words are the
    class."""
    *start, identifier, noun = ["", "", *instance_prompt.split()]
    if identifier.lower() not in IDENTIFIERS or not noun.isalpha():
        return None
    if start[-1].lower() in ARTICLES:
        start.pop()
    return " ".join([*start, "an" if noun[0].lower() in "aeiou" else "a", noun]).strip()


def read_prompts(name: str | None, base: str) -> dict[str, list[str]]:
    """{"scenes", "looks"}: the list of that name or file, by default the base's.

    Raises ConfigError.
    """
    from dbcore.models.base import recommended

    name = name or recommended(base).get("prompts", "objects")
    path = LISTS / f"{name}.json" if (LISTS / f"{name}.json").is_file() else Path(name)
    known = ", ".join(sorted(p.stem for p in LISTS.glob("*.json")))
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {name}: give {known}, or a JSON file "
                          f"{PROMPT_FORM} ({error})") from None
    return check_prompts(found, f"--prompts {name}")


def check_prompts(found: Any, option: str) -> dict[str, list[str]]:
    """The two lists of a prompt file.

    Raises ConfigError for other names, and for what is no list of texts.
    """
    need(isinstance(found, dict), f"{option} holds a {type(found).__name__} of JSON: "
         f"write {PROMPT_FORM}")
    strange = sorted(set(found) - {"scenes", "looks", "source"})
    need(not strange, f"{option} has {strange[0] if strange else ''!r}, which is neither scenes "
         f"nor looks: write {PROMPT_FORM}")
    lists = {kind: found.get(kind, []) for kind in ("scenes", "looks")}
    for kind, phrases in lists.items():
        need(isinstance(phrases, list)
             and all(isinstance(phrase, str) and phrase.strip() for phrase in phrases),
             f"{option}: {kind} is {json.dumps(phrases)[:60]}, and should be a list of texts: "
             f"write {PROMPT_FORM}")
    need(any(lists.values()), f"{option} holds no prompt: write {PROMPT_FORM}")
    return lists


def compose(phrases: dict[str, list[str]], instance_prompt: str,
            class_prompt: str) -> list[tuple[str, str]]:
    """[(prompt, what CLIP is asked)]: scenes come after the subject, looks before it.

    The identifier is left out of what CLIP is asked, which has never heard it.
    """
    start, noun = split_class(instance_prompt, class_prompt)
    ours, subject = split_subject(instance_prompt, class_prompt)
    return [*((f"{instance_prompt} {scene}", f"{class_prompt} {scene}")
              for scene in phrases["scenes"]),
            *((f"{ours} {look} {subject}".strip(), f"{start} {look} {noun}".strip())
              for look in phrases["looks"])]


def split_class(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """'a photo of a golden retriever' -> ('a photo of a', 'golden retriever'): the noun is what
    both prompts end with."""
    ours, words = instance_prompt.lower().split(), class_prompt.split()
    shared = 0
    for own, word in zip(reversed(ours), reversed(words)):
        if own != word.lower() or word.lower() in ARTICLES:
            break
        shared += 1
    cut = len(words) - (shared if 0 < shared < len(ours) else 1)
    return " ".join(words[:cut]), " ".join(words[cut:])


def split_subject(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """'a photo of sks dog' -> ('a photo of', 'sks dog'): the subject begins with a new word, or
    with the class's noun."""
    words, known = instance_prompt.split(), {*class_prompt.lower().split(), *ARTICLES}
    noun = split_class(instance_prompt, class_prompt)[1].lower().split()[0]
    first = next((k for k, word in enumerate(words) if word.lower() not in known
                  or word.lower() == noun), len(words) - 1)
    return " ".join(words[:first]), " ".join(words[first:])


def spread(prompts: Sequence[Any], count: int | None) -> Sequence[Any]:
    """`count` of them at even distances, the first among them."""
    if count is None or count >= len(prompts):
        return prompts
    need(count > 0, f"--num_prompts {count}: it must be at least 1")
    return [prompts[k * len(prompts) // count] for k in range(count)]


# --- the protocol ---------------------------------------------------------------------------------


def evaluate(subjects: list[Subject], output_dir: str | Path, prompts: str | None = None,
             num_prompts: int | None = None, num_images: int = 4, encoder: list[str] | None = None,
             seed: int = 0, batch_size: int = 8, lpips: bool = False,
             intervals: dict[str, list[float]] = WHOLE) -> dict[str, Any]:
    """Generate what is missing, measure everything, write evaluation.json and .md; returns the
    result, a dict.

    Numbers that are there already, of other runs or prompts, stay: the new files get a number,
    evaluation-2.json.

    {"encoders": {name: note}, "class_prompts": {name: text}, "prompts", "num_images", "subjects":
    {name: {"floor", "adapter", "ceiling"}}, "mean": {"floor": {measure: [mean, low, high]}, ...}};
    the intervals are over subjects, 95 %. Raises ConfigError.
    """
    from dbcore.engines.evaluate import load_encoder, load_encoders, load_lpips

    need(num_images >= 2, f"--num_images {num_images}: diversity needs 2 or more")
    for name, interval in intervals.items():
        check_interval(name, interval)
    output_dir, scores = Path(output_dir), {}
    encoders = [load_encoder(name) for name in encoder or ()]
    names = [subject.name for subject in subjects]
    need(len(set(names)) == len(names), f"two runs are named {max(names, key=names.count)}: "
         "rename one of the folders")
    lists = {subject.name: check_subject(subject, prompts, num_prompts) for subject in subjects}
    distance = load_lpips() if lpips else None
    for subject in subjects:
        asked = lists[subject.name]
        encoders = encoders or load_encoders(subject.base)
        how = asked, output_dir, num_images, seed, batch_size, intervals
        generated = {which: generate_all(subject, which, *how) for which in ("floor", "adapter")}
        scores[subject.name] = measure(subject, generated, asked, num_images, encoders, distance)
    result = {"encoders": {e.name: e.note for e in encoders},
              "class_prompts": {subject.name: subject.class_prompt for subject in subjects},
              "prompts": len(asked), "num_images": num_images,
              "seed": seed, "subjects": scores, "mean": means(scores, seed)}
    files = {"evaluation.json": json.dumps(result, indent=1), "evaluation.md": result_table(result)}
    if mark := write_beside(output_dir,
                            {name: f"{text}\n".encode() for name, text in files.items()}):
        print("Other numbers are in evaluation.json already: "
              f"the new ones are in evaluation{mark}.json and .md.")
    return result


def check_subject(subject: Subject, prompts: str | None,
                  num_prompts: int | None) -> Sequence[tuple[str, str]]:
    """The prompts of a subject and what CLIP is asked, as `compose` gives them.

    Raises InputError for what hours would end with.
    """
    from dbcore.models.base import load_base

    read_photos(subject)
    asked = spread(compose(read_prompts(prompts, subject.base), subject.instance_prompt,
                           subject.class_prompt), num_prompts)
    check_fit(load_base(subject.base, subject.revision),
              [("--prompts", prompt) for prompt, _ in asked],
              subject.instance_prompt, subject.class_prompt)
    return asked


def generate_all(subject: Subject, which: str, asked: Sequence[tuple[str, str]], output_dir: Path,
                 num_images: int, seed: int, batch_size: int,
                 intervals: dict[str, list[float]] = WHOLE) -> list[Image.Image]:
    """PIL images, `num_images` a prompt and then as many of the class, from the disk where they are
    there."""
    from PIL import Image

    texts = [prompt for prompt, _ in asked] + [subject.class_prompt]
    what = about(subject, which, texts, seed, intervals)
    folder = output_dir / "pictures" / (subject.name if which == "adapter"
                                        else f"base-{digest(what)}")
    refuse_others(folder, what)
    paths = {(p, k): folder / f"{p:03d}-{k}.png" for p in range(len(texts))
             for k in range(num_images)}
    missing = [place for place, path in paths.items() if not path.is_file()]
    if missing:
        base = load_subject(subject, which)
    for first in range(0, len(missing), batch_size):
        places = missing[first:first + batch_size]
        images = base.generate([texts[p] for p, _ in places], [seed + k for _, k in places],
                               stream=STREAM, batch_size=batch_size, **intervals)
        for place, image in zip(places, images):
            save_png(image, paths[place])
    return [Image.open(path).convert("RGB") for path in paths.values()]


def about(subject: Subject, which: str, texts: list[str], seed: int,
          intervals: dict[str, list[float]]) -> dict[str, Any]:
    """All that the images depend on, but their number; intervals where they are not whole."""
    from dbcore.models.embeddings import beside

    file = subject.lora if which == "adapter" else None
    lora = hashlib.sha256(file.read_bytes()).hexdigest() if file else None
    tokens = file and beside(file)
    if tokens and tokens.is_file():
        lora = hashlib.sha256(f"{lora} {tokens.read_bytes().hex()}".encode()).hexdigest()
    parts = {name: interval for name, interval in intervals.items()
             if list(interval) != WHOLE[name] and (file or name != "lora_interval")}
    return {"base": subject.base, "revision": subject.revision, "lora": lora, "prompts": texts,
            "seed": seed, **parts}


def digest(what: dict[str, Any]) -> str:
    """A short name, so that runs of one subject share the base's images."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def refuse_others(folder: Path, what: dict[str, Any]) -> None:
    """Write down what a folder's images depend on, or compare.

    Raises ConfigError where it has changed.
    """
    path = folder / "about.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**what, **before} if before.get(name) != what.get(name)]
        need(not changed, f"{folder} holds images of another {' and '.join(changed)}: "
             "remove it, or give another --output_dir")
    sweep(folder, age=DAY)
    write_whole(path, json.dumps(what, indent=1))


def load_subject(subject: Subject, which: str) -> Family:
    from dbcore.engines.sample import base_with_loras
    from dbcore.models.base import resolve

    loras = [str(subject.lora)] if which == "adapter" else []
    return base_with_loras(resolve(GenerateConfig(pretrained_model_name_or_path=subject.base,
                                                  checkpoint_dir=loras, revision=subject.revision)))


# --- the measures ---------------------------------------------------------------------------------


def read_photos(subject: Subject) -> list[Image.Image]:
    """The photos of a subject as PIL images. Raises ConfigError where they are gone."""
    from dbcore.datasets.photos import PhotoError, gather_photos

    try:
        return [photo.load() for photo in gather_photos(subject.photos)[0]]
    except PhotoError as error:
        raise ConfigError(f"the photos of {subject.name} are needed to compare with: {error}. "
                          "Put them back, or correct instance_data_dir in "
                          "its config.yaml") from None


def measure(subject: Subject, generated: dict[str, list[Image.Image]],
            asked: Sequence[tuple[str, str]], num_images: int, encoders: list[Encoder],
            distance: Callable | None = None) -> dict[str, dict[str, float | None]]:
    """{"floor": {measure: value}, "adapter": ..., "ceiling": ...} of one subject; None where there
    is no value."""
    from dbcore.engines.evaluate import lpips_diversity, real_against_real

    photos = read_photos(subject)
    rows: dict[str, dict[str, float | None]] = {which: {} for which in (*generated, "ceiling")}
    for encoder in encoders:
        real = encoder.images(photos)
        for which, images in generated.items():
            rows[which] |= measure_images(encoder, encoder.images(images), real, asked,
                                          num_images)
        alike = real_against_real(real, encoder) if len(photos) > 1 else None
        rows["ceiling"][f"subject, {encoder.name}"] = alike
    for which, images in generated.items() if distance else ():
        of_prompts = [images[k:k + num_images]
                      for k in range(0, len(asked) * num_images, num_images)]
        rows[which]["DIV, LPIPS"] = sum(lpips_diversity(same, distance)
                                        for same in of_prompts) / len(of_prompts)
    return {which: {name: rows[which].get(name) for name in rows["floor"]} for which in rows}


def measure_images(encoder: Encoder, vectors: torch.Tensor, real: torch.Tensor,
                   asked: Sequence[tuple[str, str]], num_images: int) -> dict[str, float]:
    """{measure: value} of one subject's images under one encoder; the last `num_images` are of
    the class."""
    from dbcore.engines.evaluate import (
        diversity,
        nearest_photo,
        prior_preservation_metric,
        prompt_fidelity,
        subject_fidelity,
    )

    own, of_class = vectors[:-num_images], vectors[-num_images:]
    values = {f"subject, {encoder.name}": subject_fidelity(own, real, encoder)}
    if encoder.embed_texts is not None:
        plain = [text for _, text in asked for _ in range(num_images)]
        values[f"prompt, {encoder.name}"] = prompt_fidelity(own, plain, encoder)
    each = own.split(num_images)
    values[f"PRES, {encoder.name}"] = prior_preservation_metric(of_class, real, encoder)
    values[f"DIV, {encoder.name}"] = sum(diversity(same, encoder) for same in each) / len(each)
    nearest = nearest_photo(own, real, encoder)[1]
    values[f"nearest photo, {encoder.name}"] = sum(nearest) / len(nearest)
    return values


def means(scores: dict[str, dict[str, dict[str, Any]]],
          seed: int) -> dict[str, dict[str, list[float] | None]]:
    """{row: {measure: [mean, low, high]}} over subjects, by bootstrap; None where a subject has no
    value."""
    from dbcore.engines.evaluate import bootstrap_interval

    subjects = list(scores.values())
    rows: dict[str, dict[str, list[float] | None]] = {}
    for which in subjects[0]:
        rows[which] = {}
        for name in subjects[0][which]:
            values = [subject[which][name] for subject in subjects]
            known = None not in values
            rows[which][name] = ([sum(values) / len(values), *bootstrap_interval(values, seed)]
                                 if known else None)
    return rows


def result_table(result: dict[str, Any]) -> str:
    """Markdown: the mean over subjects with its interval, then each subject."""
    names = list(result["mean"]["floor"])
    count = len(result["subjects"])
    size = (f"{count} subject{'s' * (count > 1)} x {result['prompts']} prompts x "
            f"{result['num_images']} images")
    lines = [f"{size}; in brackets 95 % intervals over subjects (bootstrap).", "",
             "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    rows = [("**all**", result["mean"])] if count > 1 else []
    for subject, row in [*rows, *result["subjects"].items()]:
        for which, label in (("floor", "base alone"), ("adapter", "with LoRA"),
                             ("ceiling", "photos")):
            lines.append(f"| {subject}, {label} | "
                         + " | ".join(cell(row[which][name]) for name in names) + " |")
    notes = [f"{name} is compared with {prompt!r}."
             for name, prompt in result["class_prompts"].items()]
    notes += [f"{name}: {note}." for name, note in result["encoders"].items() if note]
    return "\n".join([*lines, "", *notes, ("DIV is 1 - the mean cosine of two images of one "
                      "prompt; the paper's is LPIPS.")])


def cell(value: float | list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else "{:.3f} [{:.3f}, {:.3f}]".format(*value)
