"""`dbcore toybench`: training settings, compared over thirty subjects of which the truth is known.

The subjects are characters of the toy world (data/toybench.json), so what an image shows can be
held against what was asked: the base's attribute reader tells, and each learned metric is held
against that truth too. All settings get the same subjects, prompts and seeds, and differences
are taken subject by subject. What is done stays in the output folder: a bench that was stopped goes
on where it was.

A setting has the options of `train`, and two of the bench's own: --num_photos, how many photos
of the subject it gets, and --full_finetuning, which trains the denoiser's own weights instead of a
LoRA. Whatever a setting was taught with, its images are measured against the same photos.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dbcore
from dbcore.config import TrainConfig, add_options, need
from dbcore.tools.evaluate import (
    Subject,
    cell,
    compose,
    digest,
    generate_all,
    means,
    measure,
    read_prompts,
    spread,
    write_whole,
)

if TYPE_CHECKING:
    from PIL import Image

    from dbcore.engines.evaluate import Encoder
    from dbcore.toybox.reader import Reader
    from dbcore.toybox.scene import Character

HELP = "compare training settings over thirty subjects of the toy world, whose truth is known"
BENCH = dbcore.DATA / "toybench.json"
FULL, QUICK = (30, 25, 4), (6, 10, 2)  # subjects, prompts, images of each
DEFAULT = "prior=--with_prior_preservation"
PATHS = {"pretrained_model_name_or_path", "instance_data_dir", "output_dir",
         "resume_from_checkpoint"}
OURS = {*PATHS, "seed"}
# the bench's own options of a setting
NUM_PHOTOS, FULL_FINETUNING = OWN = "num_photos", "full_finetuning"
LORA_ALONE = ("adapter", "rank", "lora_alpha", "lora_dropout", "use_dora", "use_rslora",
              "use_tlora", "lora_layers", "train_text_encoder", "prior_prediction", "low_vram")
SUBJECT, PROMPT, PRES = "truth: subject", "truth: prompt", "truth: PRES"
COPIES = "share of copies"  # under the first encoder, which also sees the place and the light
LABELS = {"floor": "base alone", "ceiling": "photos"}  # beside the names of the settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vary", action="append", metavar="NAME=OPTIONS",
                        help="a setting: a name, and options of train, "
                        "{class} standing for dog, cat, ..., --num_photos N and "
                        "--full_finetuning; give it once for each; the others are compared with "
                        f"the first (without it: '{DEFAULT}')")
    parser.add_argument("--quick", action="store_true",
                        help="{} subjects, {} prompts and {} images each, not {}, "
                        "{} and {}".format(*QUICK, *FULL))
    parser.add_argument("--num_subjects", type=int, metavar="N",
                        help="only N of them, spread over the classes")
    parser.add_argument("--num_prompts", type=int, metavar="N",
                        help="only N of them, spread over the list")
    parser.add_argument("--num_images", type=int, metavar="N", help="images a prompt")
    parser.add_argument("--pretrained_model_name_or_path", default=str(dbcore.TOY_BASE),
                        metavar="BASE", help="a base of the toy world; the toy base if not given")
    parser.add_argument("--seed", type=int, default=0,
                        help="of training and of the first image (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8,
                        help="images generated at a time (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("work_dirs/toybench"),
                        help="runs, images, toybench.json and toybench.md go there (%(default)s)")


def main(args: argparse.Namespace) -> None:
    settings = dict(map(read_setting, args.vary or [DEFAULT]))
    need(len(settings) == len(args.vary or [DEFAULT]), "--vary: two settings have one name")
    subjects, prompts, images = (given if given is not None else usual for given, usual in zip(
        (args.num_subjects, args.num_prompts, args.num_images), QUICK if args.quick else FULL))
    result = toybench(args.pretrained_model_name_or_path, settings, args.output_dir, subjects,
                      prompts, images, args.seed, args.batch_size)
    print(result_table(result))
    print(f"\nRuns, images, toybench.json and toybench.md are in {args.output_dir}.")


def read_setting(text: str) -> tuple[str, dict[str, Any]]:
    """'NAME=OPTIONS' to (name, {option: value}).

    Raises ConfigError; a missing value ends the program (argparse).
    """
    name, equals, words = text.partition("=")
    need(equals and re.fullmatch(r"\w[\w .+-]*", name) and name not in LABELS,
         f"--vary {text!r}: give NAME=OPTIONS, such as 'rank 4=--rank 4'; the name is letters, "
         "digits and spaces")
    parser = argparse.ArgumentParser(usage=f"--vary '{name}=OPTIONS of train'", allow_abbrev=False,
                                     add_help=False)
    add_options(parser, TrainConfig)
    parser.add_argument(f"--{NUM_PHOTOS}", type=int, default=argparse.SUPPRESS)
    parser.add_argument(f"--{FULL_FINETUNING}", action="store_true", default=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(shlex.split(words))
    options = {option: value for option, value in vars(given).items() if option != "config"}
    known = {field.name for field in dataclasses.fields(TrainConfig)} - OURS | {*OWN}
    wrong = [*unknown, *(f"--{option}" for option in options if option not in known)]
    need(not wrong, f"--vary {name}: {' '.join(wrong)} is no option of train, or one that "
         "toybench sets itself")
    need(options.get(NUM_PHOTOS, 1) >= 1,
         f"--vary {name}: --{NUM_PHOTOS} {options.get(NUM_PHOTOS)} is less than one")
    idle = [f"--{option}" for option in LORA_ALONE if option in options
            and FULL_FINETUNING in options]
    need(not idle, f"--vary {name}: {' '.join(idle)} does nothing with --{FULL_FINETUNING}, "
         "which trains no LoRA")
    return name, options


# --- the bench ------------------------------------------------------------------------------------


def toybench(base: str | Path, settings: dict[str, dict[str, Any]], output_dir: str | Path,
             num_subjects: int | None, num_prompts: int | None, num_images: int, seed: int = 0,
             batch_size: int = 8) -> dict[str, Any]:
    """Train, generate and measure what is missing; write toybench.json and .md; returns the result,
    a dict.

    `settings`: {name: options of train, and num_photos}. The result: {"settings", "encoders",
    "subjects": {name: {column: {measure: value}}}, "mean": {column: {measure: [mean, low, high]}},
    "differences": {setting: the same, less the first setting}, "agreement": {measure: [mean, low,
    high, subjects]}}; a column is "floor", a setting, or "ceiling"; intervals are over subjects, 95
    %. Raises ConfigError.
    """
    from dbcore.engines.evaluate import load_encoders
    from dbcore.models.base import load_base

    need((Path(base) / "reader").is_dir(),
         f"--pretrained_model_name_or_path {base} has no reader/, which tells the "
         "truth: give the toy base, or one made by python -m dbcore.toybox")
    need(num_images >= 2, f"--num_images {num_images}: diversity needs 2 or more")
    bench = json.loads(BENCH.read_text(encoding="utf-8"))
    # what another base has generated is left alone
    work = Path(output_dir) / load_base(base).fingerprint()[:12]
    encoders, scores, agreements = load_encoders(base), {}, {}
    names = spread(list(bench["subjects"]), num_subjects)
    for k, name in enumerate(names, start=1):
        print(f"{name}, subject {k} of {len(names)}", flush=True)
        one = Case(base, name, bench, work, num_prompts, seed)
        generated, asked = one.generate(settings, num_images, batch_size), one.ask(one.alone)
        scores[name], agreements[name] = score(one, generated, asked, num_images, encoders)
    result = {"settings": settings, "encoders": {e.name: e.note for e in encoders},
              "prompts": len(asked),
              "num_images": num_images, "seed": seed, "subjects": scores,
              "mean": means(scores, seed),
              "differences": differences(scores, list(settings), seed),
              "agreement": pool(agreements, seed)}
    write_whole(Path(output_dir) / "toybench.json", json.dumps(result, indent=1) + "\n")
    write_whole(Path(output_dir) / "toybench.md", result_table(result) + "\n")
    return result


class Case:
    """One subject: its photos, its runs, its images."""

    def __init__(self, base: str | Path, name: str, bench: dict[str, Any], work: Path,
                 num_prompts: int | None, seed: int):
        from dbcore.toybox.scene import Character

        self.base, self.name, self.work, self.seed = str(base), name, work, seed
        self.character, self.usual = Character(**bench["subjects"][name]), bench["photos"]
        photos = self.photos(self.usual)
        about = json.loads((photos / "subject.json").read_text(encoding="utf-8"))
        self.alone = Subject(name, None, self.base, str(photos), about["instance_prompt"],
                             about["class_prompt"])
        self.phrases, self.num_prompts = read_prompts(bench["prompts"], self.base), num_prompts

    def photos(self, count: int) -> Path:
        """The folder of that many photos of it, rendered if they are not there; few are the first
        of many."""
        from dbcore.toybox.subjects import write_subject

        folder = self.work / "photos" / (self.name if count == self.usual
                                         else f"{self.name}-{count}-photos")
        if not (folder / "subject.json").is_file():  # written last
            write_subject(folder, self.character, seed=self.seed, count=count)
        return folder

    def ask(self, subject: Subject) -> Sequence[tuple[str, str]]:
        """[(prompt, what CLIP is asked)] of the subject, in the words that it was taught
        with."""
        return spread(compose(self.phrases, subject.instance_prompt, subject.class_prompt),
                      self.num_prompts)

    def generate(self, settings: dict[str, dict[str, Any]], num_images: int,
                 batch_size: int) -> dict[str, list[Image.Image]]:
        """{"floor" or setting: PIL images}, trained and generated where they are not on the disk;
        see `generate_all`."""
        subjects = {"floor": self.alone,
                    **{setting: self.run(options) for setting, options in settings.items()}}
        return {column: generate_all(subject, "adapter" if subject.lora else "floor",
                                     self.ask(subject), self.work,
                                     num_images, self.seed, batch_size)
                for column, subject in subjects.items()}

    def run(self, options: dict[str, Any]) -> Subject:
        """`alone` after a run of these options, taken up where it was; named by all that it depends
        on."""
        from dbcore.engines.trainer import train
        from dbcore.models.base import resolve
        from dbcore.toybench.finetune import finetune

        config, full = self.config(options), FULL_FINETUNING in options
        usual = dataclasses.asdict(TrainConfig())  # left out: a new option changes no run's name
        what = {name: value for name, value in dataclasses.asdict(resolve(config)).items()
                if name not in PATHS and value != usual[name]}
        name = f"{Path(str(config.instance_data_dir)).name}-{digest(what)}{'-full' * full}"
        config.output_dir, config.resume_from_checkpoint = str(self.work / "runs" / name), "latest"
        taught: dict[str, Any] = ({"base": str(finetune(config))} if full
                                  else {"lora": train(config)})
        return dataclasses.replace(self.alone, name=name,
                                   instance_prompt=str(config.instance_prompt), **taught)

    def config(self, options: dict[str, Any]) -> TrainConfig:
        from dbcore.models.base import recommended

        given: dict[str, Any] = {"instance_prompt": self.alone.instance_prompt, "report_to": "none",
                                 "num_report_images": 0}
        if options.get("with_prior_preservation") or options.get("prior_prediction"):
            given |= {"class_prompt": self.alone.class_prompt}
        if options.get("with_prior_preservation"):
            given |= {"num_class_images": recommended(self.base).get("num_class_images", 100)}
        given |= {option: value.replace("{class}", self.character.kind) if isinstance(value, str)
                  else value
                  for option, value in options.items() if option not in OWN}
        photos = self.photos(options.get(NUM_PHOTOS, self.usual))
        return TrainConfig(pretrained_model_name_or_path=self.base, instance_data_dir=str(photos),
                           seed=self.seed, **given)


# --- the truth ------------------------------------------------------------------------------------


def asked_for(plain: str, kind: str) -> dict[str, str]:
    """{question of the reader: answer}: 'a photo of a dog wearing a red hat' asks for {'hat':
    'red'}."""
    from dbcore.toybox.scene import COLORS, PLACES

    before, _, after = plain.partition(kind)
    colors = [word for word in before.split() if word in COLORS]
    hats = re.findall(r"wearing an? (\w+) hat", after)
    places = [place for place, phrase in PLACES.items() if phrase and after.endswith(phrase)]
    found = {"color": colors, "hat": hats, "place": places}
    return {question: answers[0] for question, answers in found.items() if answers}


def tell(reader: Reader, images: list[Image.Image], asked: Sequence[tuple[str, str]],
         character: Character, num_images: int) -> tuple[list[bool], list[bool]]:
    """(is it the subject?, does it show what was asked?), a boolean for each image of the
    prompts."""
    from dbcore.toybox.gates import is_subject

    wanted = [asked_for(plain, character.kind) for _, plain in asked for _ in range(num_images)]
    read = reader.read(images[:len(wanted)])
    return ([is_subject(answers, character, but=want) for answers, want in zip(read, wanted)],
            [all(answers[q] == want[q] for q in want) for answers, want in zip(read, wanted)])


def score(one: Case, generated: dict[str, list[Image.Image]], asked: Sequence[tuple[str, str]],
          num_images: int,
          encoders: list[Encoder]) -> tuple[dict[str, Any], dict[str, float | None]]:
    """One subject's ({column: {measure: value}}, the truth's too, {measure: agreement with the
    truth})."""
    from dbcore.datasets.photos import gather_photos
    from dbcore.engines.evaluate import share_of_copies
    from dbcore.toybox.gates import is_subject
    from dbcore.toybox.reader import load_reader

    reader, photos = load_reader(one.base), [photo.load()
                                             for photo in gather_photos(one.alone.photos)[0]]
    columns = measure(one.alone, generated, asked, num_images, encoders)
    truths = {}
    for column, images in generated.items():
        truths[column] = tell(reader, images, asked, one.character, num_images)
        of_class = [is_subject(answers, one.character)
                    for answers in reader.read(images[-num_images:])]
        columns[column] |= dict(zip((SUBJECT, PROMPT, PRES),
                                    map(mean, (*truths[column], of_class))))
        columns[column][COPIES] = share_of_copies(images[:-num_images], photos, encoders[0])
    real = [is_subject(answers, one.character) for answers in reader.read(photos)]
    columns["ceiling"] |= {SUBJECT: mean(real), PROMPT: None, PRES: None, COPIES: None}
    return columns, agree(generated, truths, photos, asked, num_images, encoders)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def agree(generated: dict[str, list[Image.Image]], truths: dict[str, tuple[list[bool], list[bool]]],
          photos: list[Image.Image], asked: Sequence[tuple[str, str]], num_images: int,
          encoders: list[Encoder]) -> dict[str, float | None]:
    """{measure: agreement} over one subject's images, the base's and every setting's; None where
    there is none."""
    from dbcore.engines.evaluate import agreement

    images = [image for column in generated for image in generated[column][:-num_images]]
    is_it, shows = ([truth for column in generated for truth in truths[column][which]]
                    for which in (0, 1))
    plain = [text for _, text in asked for _ in range(num_images)] * len(generated)
    found: dict[str, float | None] = {}
    for encoder in encoders:
        vectors = encoder.images(images)
        found[f"subject, {encoder.name}"] = agreement(
            (vectors @ encoder.images(photos).T).mean(dim=1), is_it)
        if encoder.embed_texts is not None:
            found["prompt, "
                  f"{encoder.name}"] = agreement((vectors * encoder.texts(plain)).sum(dim=1), shows)
    return found


# --- over subjects --------------------------------------------------------------------------------


def differences(scores: dict[str, Any], settings: list[str],
                seed: int) -> dict[str, dict[str, list[float] | None]]:
    """{setting: {measure: [mean, low, high]}}: what a setting adds to the first, subject by
    subject."""
    first = settings[0]
    apart = {name: {setting: {measure: columns[setting][measure] - columns[first][measure]
                              for measure in columns[setting]}
                    for setting in settings[1:]} for name, columns in scores.items()}
    return means(apart, seed)


def pool(agreements: dict[str, dict[str, float | None]],
         seed: int) -> dict[str, list[float] | None]:
    """{measure: [mean, low, high, number of subjects]}, of those that had right and wrong
    images."""
    from dbcore.engines.evaluate import bootstrap_interval

    found = {}
    for name in next(iter(agreements.values())):
        values = [value for each in agreements.values() if (value := each[name]) is not None]
        found[name] = ([mean(values), *bootstrap_interval(values, seed), len(values)] if values
                       else None)
    return found


def result_table(result: dict[str, Any]) -> str:
    """Markdown: the measures, the differences from the first setting, and the metrics' agreement
    with the truth."""
    settings, count = list(result["settings"]), len(result["subjects"])
    size = (f"{count} subject{'s' * (count > 1)} x {result['prompts']} prompts x "
            f"{result['num_images']} images")
    lines = [f"{size}; in brackets 95 % intervals over subjects (bootstrap).", "",
             *measure_table(result["mean"])]
    if len(settings) > 1:
        lines += ["", f"Difference from {settings[0]}, subject by subject:", "",
                  *measure_table(result["differences"])]
    told = ("the chance that an image the reader calls right scores above one that it calls wrong "
            "(0.5 is a coin)")
    lines += ["", f"Agreement with the truth, {told}:", "", "| metric | agreement | subjects |",
              "|---|---:|---:|"]
    for name, found in result["agreement"].items():
        lines.append(f"| {name} | {cell(found and found[:3])} | {found[3] if found else 0} |")
    return "\n".join(lines + [""] + [f"{name}: {note}." for name, note in result["encoders"].items()
                                     if note])


def measure_table(columns: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown, a measure a row."""
    rows = next(iter(columns.values()))
    head = "| | " + " | ".join(LABELS.get(name, name) for name in columns) + " |"
    return [head, "|---|" + "---:|" * len(columns),
            *(f"| {row} | " + " | ".join(cell(column[row]) for column in columns.values()) + " |"
              for row in rows)]
