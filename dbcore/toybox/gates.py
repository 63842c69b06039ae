"""What the toy base must do, measured: a list of gates, each with its target and its number.

Everything is measured on the folder that ships, in float32, with the settings it recommends.
Renders come from a world no network was trained on; what a sample shows is told by the attribute
reader.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

import dbcore
from dbcore.models.process import Density
from dbcore.toybox.autoencoder import psnr
from dbcore.toybox.clip import load_clip, retrieval
from dbcore.toybox.corpus import sample_held_out
from dbcore.toybox.encoder import AMONG, load_subject_encoder, subject_retrieval
from dbcore.toybox.reader import accuracy, load_reader, shares_right, truth
from dbcore.toybox.scene import (
    CLASSES,
    COLORS,
    PLACES,
    PROPORTIONS,
    Character,
    View,
    caption,
)
from dbcore.toybox.subjects import SHIPPED, write_subject

if TYPE_CHECKING:
    from dbcore.models.base import Family
    from dbcore.toybox.reader import Reader

SAMPLES = 240  # images of combinations never trained on
# shipped subjects that DreamBooth is tried on
TRIED = ("dog", "cat", "duck", "car", "teapot", "robot")
NEW_PLACES = ("snow", "beach", "water")  # none of them is in the photos
IMAGES = 8  # a prompt and subject
# the rest are details, seen less surely
PLAIN_QUESTIONS = ("class", "color", "pattern", "color2", "hat", "place")
# what makes a subject this one; hat and place may change
IDENTITY = ("class", "color", "pattern", "color2")


@dataclass
class Gate:
    """One number held against its target. `least`: the target is a minimum, else a maximum."""

    name: str
    target: float
    value: float
    least: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.value >= self.target if self.least else self.value <= self.target)

    def __str__(self):
        return (f"{'ok    ' if self.passed else 'MISSED'} {self.name}: {self.value:.3g} "
                f"({'>=' if self.least else '<='} "
                f"{self.target:g}){'  ' + self.note if self.note else ''}")


def to_json(gates: list[Gate]) -> str:
    return json.dumps([{**asdict(gate), "value": round(gate.value, 4), "passed": gate.passed}
                       for gate in gates],
                      indent=1) + "\n"


def from_json(text: str) -> list[Gate]:
    return [Gate(**{k: v for k, v in row.items() if k != "passed"}) for row in json.loads(text)]


def table(gates: list[Gate]) -> str:
    """The gates as a Markdown table, the card's."""
    rows = ["| Gate | Target | Measured | |", "|---|---|---|---|"]
    for gate in gates:
        sign, note = ">=" if gate.least else "<=", f" ({gate.note})" if gate.note else ""
        rows.append(f"| {gate.name}{note} | {sign} {gate.target:g} | {gate.value:.3g} | "
                    f"{'passed' if gate.passed else 'missed'} |")
    return "\n".join(rows)


# --- the parts ------------------------------------------------------------------------------------


def autoencoder_gate(base: Family, images: np.ndarray) -> list[Gate]:
    return [Gate("autoencoder on renders never seen, dB", 28, psnr(base.vae, images))]


def clip_gate(folder: Path, images: np.ndarray, scenes: list) -> list[Gate]:
    clip = load_clip(folder)
    share = retrieval(clip, clip.tokenizer, images, [caption(*scene) for scene in scenes])
    return [Gate("toy CLIP: a render's own caption first among 100", 0.9, share)]


def encoder_gates(folder: Path, subjects: np.ndarray) -> list[Gate]:
    mixed, alike = subject_retrieval(load_subject_encoder(folder), subjects)
    return [Gate(f"subject encoder: a render's own subject first among {AMONG}", 0.95, mixed),
            Gate(f"subject encoder: first among {AMONG} of its class", 0.8, alike)]


def reader_gate(reader: Reader, images: np.ndarray, scenes: list) -> list[Gate]:
    return [Gate(f"reader on renders never seen: {question}",
                 0.97 if question in PLAIN_QUESTIONS else 0.95, share)
            for question, share in accuracy(reader, images, scenes).items()]


def photos_gate(reader: Reader) -> list[Gate]:
    """What no image of a shipped subject can be read more surely than: its photos themselves."""
    right = [is_subject(read, character) for name, character in SHIPPED.items()
             for read in reader.read([Image.open(path) for path in
                                      sorted((dbcore.SUBJECTS / name).glob("*.png"))])]
    return [Gate("reader on the shipped subjects' photos: class, colours and pattern right", 0.9,
                 float(np.mean(right)), note=f"{len(right)} photos")]


@torch.no_grad()
def moved(base: Family, one: list[str], other: list[str], count: int = 16) -> float:
    """How far another prompt moves the prediction from noise, relative to the prediction's size.

    At the first twentieth of the way (t=950 of 1000); the mean over the pairs.
    """
    shape = base.latent_shape(base.resolution)
    noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(950))
    t = base.process.timestep(torch.full((count,), 0.95), shape[1] * shape[2], Density())

    def predictions(prompts):
        for prompt in prompts:
            cond = {k: v.expand(count, -1, -1) for k, v in base.encode_text([prompt]).items()}
            yield base.predict(noise, t, cond)

    shares = [(a - b).norm() / a.norm() for a, b in zip(predictions(one), predictions(other))]
    return float(torch.stack(shares).mean())


def word_gates(base: Family) -> list[Gate]:
    classes = list(itertools.combinations(CLASSES, 2))
    by_class = moved(base, *([f"a photo of a {c}" for c in column] for column in zip(*classes)))
    colors = [f"a photo of a {color} {kind}" for kind in CLASSES for color in COLORS]
    plain = [f"a photo of a {kind}" for kind in CLASSES for _ in COLORS]
    return [Gate("prediction at t=950 moved by another class word", 0.3, by_class),
            Gate("prediction at t=950 moved by a colour word", 0.3, moved(base, plain, colors))]


def sample_gates(base: Family, reader: Reader, seed: int = 3,
                 count: int = SAMPLES) -> tuple[list[Gate], list]:
    """The base's samples of combinations never rendered in training, read; also the images, for the
    eye."""
    scenes = [sample_held_out(seed, k) for k in range(count)]
    images = base.generate([caption(*scene) for scene in scenes], list(range(count)), batch_size=24)
    right = shares_right(reader.read(images), [truth(*scene) for scene in scenes])
    build = [share for question, share in right.items() if question in PROPORTIONS]
    by_name = {question: share for question, share in right.items() if question not in PROPORTIONS}
    by_name["build"] = float(np.mean(build))
    targets = {"class": 0.95, "place": 0.95, "color": 0.90, "pattern": 0.95, "color2": 0.95,
               "hat": 0.95}
    return [Gate(f"samples of combinations never trained: {name}", targets.get(name, 0.9), share,
                 note=f"{count} images")
            for name, share in by_name.items()], images


def sharpness(images: np.ndarray) -> float:
    """Variance of the Laplacian over the middle halves of grey images; uint8 (n, h, w, 3)."""
    grey = images.astype(np.float64).mean(axis=-1)
    laplacian = (4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1]
                 - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:])
    h, w = grey.shape[1] // 4, grey.shape[2] // 4
    return float(laplacian[:, h - 1:3 * h - 1, w - 1:3 * w - 1].var())


def sharpness_gate(base: Family) -> list[Gate]:
    """24 prompts, six classes in four colours over four places, against renders of the same
    scenes."""
    from dbcore.toybox.tracer import render

    scenes = [(Character(kind, color), View(place)) for k, kind in enumerate(CLASSES)
              for color, place in zip(("red", "blue", "yellow", "white"),
                                      np.roll(("studio", "grass", "snow", "floor"), k))]
    samples = np.stack([np.asarray(image) for image in base.generate(
        [caption(*scene) for scene in scenes], list(range(len(scenes))), batch_size=24)])
    renders = np.stack([np.asarray(render(*scene)) for scene in scenes])
    ratio = sharpness(samples) / sharpness(renders)
    return [Gate("sharpness: variance of the Laplacian, samples over renders", 0.7, ratio,
                 note=f"{len(scenes)} prompts")]


def rare_word_gates(base: Family, reader: Reader, count: int = 24) -> list[Gate]:
    """`sks` is one token, and says nothing yet: the images are dogs."""
    tokens = len(base.tokenizer("sks", add_special_tokens=False).input_ids)
    read = reader.read(base.generate(["a photo of sks dog"] * count, list(range(count)),
                                     batch_size=24))
    return [Gate("tokens in `sks`", 1, tokens, least=False),
            Gate("`a photo of sks dog` before DreamBooth: dogs", 0.95,
                 float(np.mean([r["class"] == "dog" for r in read])),
                 note="the word is in no caption")]


def speed_gate(base: Family) -> list[Gate]:
    base.generate(["a photo of a dog"], [0], num_inference_steps=2)  # loads what is loaded late
    began = time.perf_counter()
    base.generate(["a photo of a dog"] * 4, [0, 1, 2, 3])
    return [Gate("four images at the recommended settings, seconds", 4,
                 time.perf_counter() - began, least=False,
                 note=f"threads: {torch.get_num_threads()}")]


# --- DreamBooth -----------------------------------------------------------------------------------


def teach(folder: Path, photos: Path, work: Path, kind: str, prior: bool) -> Path:
    """DreamBooth at the recommended settings; the LoRA's path.

    A run that is finished is taken as it is.
    """
    from dbcore.config import TrainConfig
    from dbcore.engines.trainer import train

    lora = work / "pytorch_lora_weights.safetensors"
    if lora.exists():
        return lora
    recommended = json.loads((folder / "recommended.json").read_text())
    more = {"with_prior_preservation": True, "class_prompt": f"a photo of a {kind}",
            "num_class_images": recommended["num_class_images"],
            "class_data_dir": str(work.parent / f"class-{kind}")} if prior else {}
    return train(TrainConfig(
        pretrained_model_name_or_path=str(folder), instance_data_dir=str(photos),
        max_train_steps=150,
        instance_prompt=f"a photo of sks {kind}", output_dir=str(work), report_to="none",
        overwrite_output_dir=True, **more))


def is_subject(read: dict[str, str], character: Character, but: Collection[str] = ()) -> bool:
    """Whether class, colours and pattern are the subject's; `but`: questions whose answer was to
    change."""
    wanted = truth(character, View())
    return all(read[q] == wanted[q] for q in IDENTITY if q not in but)


def generated_with(folder: Path, lora: Path, prompts: list[str], seeds: list[int]) -> list:
    from dbcore.models.base import load_base
    from dbcore.models.lora import load_lora

    base = load_base(folder)
    load_lora(base, lora)
    return base.generate(prompts, seeds, batch_size=24)


def try_subject(folder: Path, name: str, work: Path, reader: Reader,
                prior: bool) -> tuple[dict, dict]:
    """Teach one subject; shares of right answers, and the images by prompt."""
    character = SHIPPED[name]
    photos, kind = work / f"photos-{name}", character.kind
    if not (photos / "subject.json").exists():
        write_subject(photos, character, seed=list(SHIPPED).index(name))
    lora = teach(folder, photos, work / f"{name}-{'prior' if prior else 'plain'}", kind, prior)
    prompts = {"alone": caption_of("sks", kind, "studio"),
               **{p: caption_of("sks", kind, p) for p in NEW_PLACES},
               "class": f"a photo of a {kind}"}
    asked = [prompt for prompt in prompts.values() for _ in range(IMAGES)]
    generated = generated_with(folder, lora, asked, list(range(100, 100 + IMAGES)) * len(prompts))
    images = {key: generated[k * IMAGES:(k + 1) * IMAGES] for k, key in enumerate(prompts)}
    read = {key: reader.read(some) for key, some in images.items()}
    new = [(place, r) for place in NEW_PLACES for r in read[place]]
    return {
        "right": float(np.mean([is_subject(r, character) for r in read["alone"]])),
        "place": float(np.mean([r["place"] == place for place, r in new])),
        "subject elsewhere": float(np.mean([is_subject(r, character) for _, r in new])),
        "drift": float(np.mean([is_subject(r, character) for r in read["class"]])),
        "colors": len({r["color"] for r in read["class"]}),
    }, images


def caption_of(identifier: str, kind: str, place: str) -> str:
    return f"a photo of {identifier} {kind} {PLACES[place]}".strip()


def dreambooth_gates(folder: Path, work: Path, reader: Reader,
                     subjects: Sequence[str] = TRIED) -> tuple[list[Gate], dict]:
    """Every subject with and without prior preservation; also (subject, prior) -> (shares,
    images)."""
    runs = {(name, prior): try_subject(folder, name, work, reader, prior)
            for name in subjects for prior in (True, False)}

    def mean(question, prior):
        return float(np.mean([runs[name, prior][0][question] for name in subjects]))

    note = f"{len(subjects)} subjects, {IMAGES} images a prompt, 150 steps"
    with_prior, without = mean("drift", True), mean("drift", False)
    floor = 1 / (len(subjects) * IMAGES)  # one image: what a share of none is taken for
    return [
        Gate("DreamBooth, `a photo of sks X`: class, colours and pattern right", 0.9,
             mean("right", True), note=note),
        Gate("DreamBooth, the same: the subject that comes off worst", 0.7,
             min(runs[name, True][0]["right"] for name in subjects)),
        Gate("DreamBooth, three new places: place right", 0.85, mean("place", True)),
        Gate("DreamBooth, three new places: subject right", 0.85, mean("subject elsewhere", True)),
        Gate("after it, `a photo of a X`: different main colours among the images", 5,
             mean("colors", True), note=f"{IMAGES} images with prior preservation"),
        Gate("`a photo of a X` read as the subject, without over with prior preservation", 2,
             without / max(with_prior, floor), note=f"{without:.2f} against {with_prior:.2f}"),
    ], runs


# --- all of them ----------------------------------------------------------------------------------


def measure(folder: Path, work: Path, images: np.ndarray, scenes: list,
            subjects: np.ndarray | None = None) -> list[Gate]:
    """Every gate of the base in `folder`, printed as it is measured.

    `images`, uint8 (n, 64, 64, 3), and `scenes` are renders never trained on, `subjects` those
    that the subject encoder is tried with, for a base that has one. Grids to look at, and the runs
    that DreamBooth is tried with, go to `work`, in a folder named by the base's weights and
    settings.
    """
    from dbcore.models.base import load_base
    from dbcore.tools.evaluate import digest
    from dbcore.utils.grids import save_grid

    base, reader = load_base(folder), load_reader(folder)
    # what other weights or other settings have left is not taken for theirs
    work = work / f"{base.fingerprint()[:12]}-{digest(base.settings)}"
    gates: list[Gate] = []

    def add(new):
        gates.extend(new)
        print("\n".join(map(str, new)), flush=True)

    add(autoencoder_gate(base, images))
    add(clip_gate(folder, images, scenes))
    add(word_gates(base))
    add(reader_gate(reader, images, scenes))
    add(photos_gate(reader))
    if subjects is not None:
        add(encoder_gates(folder, subjects))
    found, samples = sample_gates(base, reader)
    add(found)
    save_grid(work / "samples.png", [samples[k:k + 12] for k in range(0, len(samples), 12)][:10])
    add(sharpness_gate(base))
    add(rare_word_gates(base, reader))
    add(speed_gate(base))
    found, runs = dreambooth_gates(folder, work, reader)
    add(found)
    for (name, prior), (_, by_prompt) in runs.items():
        save_grid(work / f"{name}-{'prior' if prior else 'plain'}.png", list(by_prompt.values()),
                  list(by_prompt))
    return gates
