"""The toy base's folder: an ordinary diffusers pipeline in half precision, and what travels beside
it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dbcore.toybox.clip import save_clip
from dbcore.toybox.denoiser import make_pipeline
from dbcore.toybox.encoder import SUBJECTS, VIEWS
from dbcore.toybox.fit import save_half
from dbcore.utils.files import whole_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    from dbcore.toybox.clip import ToyCLIP
    from dbcore.toybox.encoder import SubjectEncoder
    from dbcore.toybox.reader import Reader

RECOMMENDED = {  # a config's `auto` takes them up; `prompts`, evaluate does
    "resolution": 64,
    "learning_rate": 3e-3,
    "rank": 16,
    "lora_layers": "attention",
    "train_batch_size": 4,
    "guidance_scale": 4.0,
    "scheduler": "dpm++",
    "num_inference_steps": 20,
    "num_class_images": 40,
    "prompts": "toy",
}
LIMIT_MIB = 30


def save_base(folder: Path, tokenizer: CLIPTokenizer, clip: ToyCLIP, autoencoder: AutoencoderKL,
              unet: UNet2DConditionModel, reader: Reader | None = None,
              encoder: SubjectEncoder | None = None) -> Path:
    """Write the whole base beside `folder`, then put it in its place. Weights are rounded to half
    precision.

    The text encoder's are stored as float32 all the same: transformers loads it in the precision it
    finds, and a pipeline loaded without a `torch_dtype` would mix two.
    `clip_image/` holds the toy CLIP's image tower and projections, `reader/` the attribute reader,
    `subject/` the subject encoder.
    """
    with whole_folder(folder) as beside:
        make_pipeline(tokenizer, clip.text.half().float(), autoencoder.half(),
                      unet.half()).save_pretrained(beside)
        for name in ("vocab.json", "merges.txt"):  # which older versions of transformers read
            shutil.copy(Path(tokenizer.name_or_path) / name, beside / "tokenizer" / name)
        save_clip(clip, beside / "clip_image")
        for name, network in (("reader", reader), ("subject", encoder)):
            if network is not None:
                save_half(network, beside / name)
        (beside / "recommended.json").write_text(json.dumps(RECOMMENDED, indent=2) + "\n")
    return folder


def size_mib(folder: Path) -> float:
    """Size of everything in a folder, in MiB."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20


def hours(work: Path) -> dict[str, float]:
    """Machine-hours of each training, from the checkpoints."""
    names = ("autoencoder", "decoder", "clip", "unet", "reader", "subject")
    files = {name: torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)
             for name in names}
    return {name: file["seconds"] / 3600 for name, file in files.items()}


def write_card(folder: Path, gates: list, work: Path, count: int, batch: int, machine: str) -> Path:
    """`README.md` and `gates.json` in the base's folder."""
    from dbcore.toybox import gates as measured

    (folder / "gates.json").write_text(measured.to_json(gates))
    cost = hours(work)
    unet = torch.load(work / "unet.pt", map_location="cpu", weights_only=True)
    path = folder / "README.md"
    path.write_text(CARD.format(
        count=count, cost=", ".join(f"{name} {h:.2f}" for name, h in cost.items()),
        total=sum(cost.values()),
        steps=unet["step"], batch=batch, samples=unet["step"] * batch, machine=machine,
        size=size_mib(folder),
        parameters=sum(v.numel() for v in unet["module"].values()) / 1e6,
        table=measured.table(gates), subjects=SUBJECTS, views=VIEWS))
    return path


CARD = """---
license: cc0-1.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [toy, stable-diffusion, dreambooth, lora]
provenance: Every image it learnt from and every weight was made by dbcore's own code, `python -m dbcore.toybox`.
---
# The toy base

Provenance: every image it learnt from and every weight was made by this repository's code, `python -m dbcore.toybox`.

The whole Stable Diffusion stack in miniature: a CLIP tokenizer and text encoder, a KL autoencoder (64 x 64 images
to 16 x 16 x 8 latents), a UNet of {parameters:.1f} M parameters that predicts v, and a DDIM scheduler. It generates small
3-D characters (dog, cat, duck, car, teapot, robot) in eleven colours, plain, spotted or striped, with or without a
hat, in eleven places; seen from any side, near or far, under a high or a low sun, and of many builds: whatever varies
has words. It exists so that personalising a text-to-image model can be learnt and tested on a laptop.

    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline.from_pretrained("data/toy_base")("a photo of a red dog with white spots in the snow")

`recommended.json` holds the settings that suit it. Beside the pipeline lie `clip_image/`, the toy CLIP's image tower
(`dbcore.toybox.clip.load_clip`), `reader/`, a network that tells what an image shows
(`dbcore.toybox.reader.load_reader`), and `subject/`, one that tells which individual it is
(`dbcore.toybox.encoder.load_subject_encoder`).

## Data
{count:,} images of 64 x 64 pixels from a sphere tracer, each of its own random scene, for the autoencoder and CLIP; the
UNet and the reader see more (below). The captions are exact; attributes are left out of them at random (15 % each
for the UNet, 10 % for CLIP). Six pairs of class and colour were never
rendered; the gates ask for them. `sks`, `ohwx` and `zwx` are one token each and occur in no caption.

## Recipe
1. Autoencoder: first to follow a whitened PCA of 4 x 4 patches, then free, then on whole images; squared and
   absolute error, a light KL term. Then its decoder alone, for edges as strong as the renders'.
2. Toy CLIP: contrastive, batch 128; its text tower is frozen from then on.
3. UNet: {steps:,} steps of {batch} images ({samples:,} in all), v-prediction, one caption in ten
   empty, Muon and AdamW with a rate that falls at the end, running mean of the weights.
4. Reader: cross-entropy on what is in a render; four times as many renders, mirrored and moved.
5. Subject encoder: supervised contrastive, on {subjects:,} characters of its own, {views} views of each.

Cost in machine-hours ({machine}): {cost}; {total:.2f} in all, without rendering.
Size: {size:.1f} MiB in half precision.

## Gates
Measured on these weights; "never seen" renders come from another seed. What a sample shows is told by the reader.

{table}

## Limits
It knows these six things, these words and this one way of looking, in English captions of one form. Eyes and small marks
are soft. A hat on a character that never wore one, or a pattern in the dark, can come out as patches, and seen from the
front or far away legs run together. Two characters in one image, numbers and relations it has never seen. The reader
misses some marks on clean renders too, as the table states: no sample can be read more surely than that.
"""
