"""`python -m dbcore.toybox.flow`: make a toy base of the flow family, FLUX.2 [klein] in miniature.

A transformer on 2 x 2 patches of latents and on words, trained by rectified flow. The world, its
words and all that looks at images are the toy base's, and come from its folder: the autoencoder,
the toy CLIP, the reader and the subject encoder. Two networks are made here: a language model that
reads prompts (`language.py`), and the transformer. The base's folder is written first, with random
numbers in the transformer, and read again as any base: what trains it is the `process` and the
`predict` that will train LoRAs on it and generate with it.

With `--steps 0 --language_steps 0 --until save` the folder of random weights is all that is made.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

import dbcore
from dbcore.models.base import SETTINGS_FILE, load_base
from dbcore.toybox.autoencoder import CHANNELS, to_pixels
from dbcore.toybox.autoencoder import SHAPE as AUTOENCODER
from dbcore.toybox.corpus import SIZE, render_corpus, scenes
from dbcore.toybox.denoiser import Latents, train_denoiser
from dbcore.toybox.fit import steps_done
from dbcore.toybox.fresh import FreshLatents
from dbcore.toybox.language import LAYERS, encode_tokens, train_language_model
from dbcore.toybox.language import SHAPE as LANGUAGE
from dbcore.toybox.ship import RECOMMENDED, size_mib
from dbcore.toybox.weights import weights_kept
from dbcore.toybox.words import make_chat_tokenizer
from dbcore.utils.files import whole_folder

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

    from dbcore.models.flux2 import Flux2Klein

SEED, HELD_OUT_SEED, TEST_COUNT = 0, 1, 1_000
BATCH, GPU_BATCH, FIRST = 32, 512, 20_000
STAGES = ("language", "transformer", "save", "gates")
LANGUAGE_SHARE = 0.1  # of the minutes
LIMIT_MIB = 25
SHAPE = {  # of the transformer, with FLUX.2's ratio of blocks, more or less
    "num_layers": 2, "num_single_layers": 5, "num_attention_heads": 6, "attention_head_dim": 32,
    "axes_dims_rope": (8, 8, 8, 8), "rope_theta": 100, "timestep_guidance_channels": 128}
MU = 0.5  # log of the shift towards noise, for 8 x 8 patches


# --- the parts ------------------------------------------------------------------------------------


def make_transformer(seed: int) -> Flux2Transformer2DModel:
    """A transformer that predicts 0, and whose blocks change nothing yet (Peebles & Xie 2023)."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(seed + 6)
    net = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, joint_attention_dim=len(LAYERS) * LANGUAGE["hidden_size"],
        guidance_embeds=False, **SHAPE)
    for name, weight in net.named_parameters():
        if "modulation" in name or "norm_out" in name or "proj_out" in name:
            nn.init.zeros_(weight)
    return net


@torch.no_grad()
def make_autoencoder(toy: AutoencoderKL, pixels: torch.Tensor) -> AutoencoderKLFlux2:
    """The toy base's autoencoder in FLUX.2's class, which also keeps the mean and the variance of
    each channel of a patch of latents: those of images (n, 3, 64, 64) in [-1, 1]."""
    from diffusers import AutoencoderKLFlux2

    net = AutoencoderKLFlux2(**AUTOENCODER)
    net.load_state_dict({**net.state_dict(), **toy.state_dict()})
    patches = pixel_unshuffle(net.encode(pixels).latent_dist.mean, 2)
    net.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    net.bn.running_var.copy_(patches.var((0, 2, 3)))
    return net.eval()


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Generates with the shift that the transformer is trained with.

    The pipeline's own, from the number of patches and steps, is meant for large images: it would
    leave a fifth of the noise to the last of 20 steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=math.exp(MU), base_shift=MU,
                                           base_image_seq_len=64, max_image_seq_len=1024)


def toy_autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(dbcore.TOY_BASE, subfolder="vae")


def some_renders(count: int = 128) -> torch.Tensor:
    """(count, 3, 64, 64) in [-1, 1]."""
    from dbcore.toybox.tracer import pack, render_packed

    return to_pixels(render_packed(pack(scenes(SEED, count)), SIZE))


# --- the folder -----------------------------------------------------------------------------------


def save_base(folder: Path, tokenizer: Qwen2Tokenizer, language: Qwen3ForCausalLM,
              autoencoder: AutoencoderKLFlux2, transformer: Flux2Transformer2DModel) -> Path:
    """Write the whole base beside `folder`, then put it in its place; in half precision, as
    `ship.save_base` does, and with the same things beside the pipeline.

    The toy CLIP brings its own text tower here, in `clip_image/`.
    """
    from diffusers import Flux2KleinPipeline
    from transformers import CLIPTextModel

    with whole_folder(folder) as beside:
        Flux2KleinPipeline(
            tokenizer=tokenizer, text_encoder=language.half().float(), vae=autoencoder.half(),
            transformer=transformer.half(), scheduler=make_scheduler()).save_pretrained(beside)
        for name in ("reader", "subject", "clip_image"):
            shutil.copytree(dbcore.TOY_BASE / name, beside / name)
        words = CLIPTextModel.from_pretrained(dbcore.TOY_BASE / "text_encoder")
        words.half().save_pretrained(beside / "clip_image" / "text_encoder")
        shutil.copytree(dbcore.TOY_BASE / "tokenizer", beside / "clip_image" / "tokenizer")
        settings = {name: value for name, value in RECOMMENDED.items() if name != "scheduler"}
        (beside / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def write_card(folder: Path, samples: int, gates: list) -> None:
    """`README.md` and, once gates are measured, `gates.json` in the base's folder."""
    from dbcore.toybox import gates as measured

    if gates:
        (folder / "gates.json").write_text(measured.to_json(gates))
    (folder / "README.md").write_text(CARD.format(
        trained=trained(samples), size=size_mib(folder),
        gates=measured.table(gates) if gates else "Not measured."))


def trained(samples: int) -> str:
    """What to expect of a transformer that has seen so many samples."""
    if not samples:
        return ("**It is not trained: the transformer's weights are random, and what it generates "
                "is noise.** It shows the shape of the family, and nothing else.")
    seen = f"Its transformer has seen {samples:,} samples."
    if samples < 1_000_000:
        return (f"**{seen} One of this size wants millions: it is hardly trained, and its images "
                "are not what prompts ask for.**")
    return seen


CARD = """---
license: cc0-1.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [toy, flux2, dreambooth, lora]
---
# The toy base of the flow family

{trained}

Every picture it learnt from and every weight was made by this repository's code: the transformer
and the text encoder by `python -m dbcore.toybox.flow`, all else by `python -m dbcore.toybox`.

FLUX.2 [klein] in miniature: a Qwen2 tokenizer and a Qwen3 language model that has read nothing but
captions, an autoencoder (64 x 64 pictures to 16 x 16 x 8 latents, taken in patches of 2 x 2), a
transformer trained by rectified flow, and an Euler scheduler. Its world is the toy base's, and so
are its autoencoder, `clip_image/`, `reader/` and `subject/`.

    from diffusers import Flux2KleinPipeline
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline("a photo of a red dog in the snow", height=64, width=64, max_sequence_length=56)

It was trained with 56 tokens of text; with the pipeline's 512 it gives another image. The settings
in `recommended.json` are the toy base's.

Size: {size:.1f} MiB in half precision.

## Gates
{gates}
"""


# --- training -------------------------------------------------------------------------------------


def train_transformer(base: Flux2Klein, data: Latents | FreshLatents, folder: Path,
                      steps: int = 100_000, minutes: float | None = None, lr: float = 1e-3,
                      device: str = "cpu") -> Flux2Transformer2DModel:
    """The transformer of `base` after `train_denoiser`; the velocity is noise - x0.

    `data` gives the toy autoencoder's latents, and u, of which the family's process makes t: logit
    normal, shifted as its scheduler says.
    """
    net, scale = base.transformer.requires_grad_(True), data.autoencoder.config.scaling_factor
    positions = math.prod(base.latent_shape(SIZE)[1:])

    def example(step):
        """What the transformer is given (noisy patches, t, encoded captions), and the velocity."""
        z, noise, u, ids = (part.to(device) for part in data.inputs(step))
        x0, noise = base.patches(z / scale), pixel_unshuffle(noise, 2)
        t = base.process.timestep(u, positions)
        with torch.no_grad():
            words = encode_tokens(base.text_encoder, ids)
        return (base.process.corrupt(x0, noise, t), t, words), base.process.target(x0, noise, t)

    def predict(x_t, t, words):
        return base.predict(x_t, t, {"prompt_embeds": words})

    return train_denoiser("transformer", folder, net, predict, example, steps, minutes, lr,
                          data.batch, device)


def latents(work: Path, tokenizer: Qwen2Tokenizer, batch: int, minutes: float | None,
            device: str) -> Latents | FreshLatents:
    """What the transformer learns from; by the minute, scenes made while it trains."""
    autoencoder = toy_autoencoder().to(device)
    if minutes is None:
        return Latents(autoencoder, tokenizer, work, SEED, batch)
    tokenizer.save_pretrained(work / "tokenizer")
    return FreshLatents(autoencoder, work / "tokenizer", SEED, batch, FIRST, 25 * FIRST,
                        steps_done(work, "transformer"))


def measure_gates(folder: Path, work: Path) -> list:
    from dbcore.toybox.encoder import TEST_SUBJECTS, VIEWS, sample_view
    from dbcore.toybox.gates import measure

    images = render_corpus(work / "corpus", HELD_OUT_SEED, TEST_COUNT)
    subjects = render_corpus(work / "subjects", HELD_OUT_SEED, TEST_SUBJECTS * VIEWS, sample_view)
    return measure(folder, work / "gates", images, scenes(HELD_OUT_SEED, TEST_COUNT), subjects)


# --- the command ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dbcore.toybox.flow",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("work_dirs/flow"),
        help="checkpoints, and renders and latents as `python -m dbcore.toybox` keeps them")
    add("--output_dir", type=Path, default=dbcore.DATA / "flow_base", help="the base's folder")
    add("--steps", type=int, default=100_000, help="steps of the transformer (%(default)s)")
    add("--language_steps", type=int, default=2_000,
        help="steps of the language model (%(default)s)")
    add("--batch", type=int, default=None,
        help=f"samples a step ({BATCH}; with --minutes on a GPU {GPU_BATCH})")
    add("--minutes", type=float, default=None,
        help="minutes of training of both together, over all runs, setting up not counted; "
             "without it, steps alone count")
    add("--weights_dir", type=Path, default=None,
        help="where both networks' weights are put in half precision, in files under 16 MiB; "
             "what is there at the start is used")
    add("--device", default=None, help="cpu or cuda; without it, cuda where there is one")
    add("--until", choices=STAGES, default="gates", help="stop after this stage")
    return parser.parse_args(argv)


def make_base(args: argparse.Namespace, device: str, batch: int) -> None:
    """The stages, each of which goes on from its checkpoint, up to `args.until`."""
    work, last = args.work_dir, STAGES.index(args.until)
    tokenizer, minutes = make_chat_tokenizer(), args.minutes
    language = train_language_model(tokenizer, work, SEED, args.language_steps,
                                    minutes and minutes * LANGUAGE_SHARE, device=device)
    if last < 1:
        return
    autoencoder = make_autoencoder(toy_autoencoder(), some_renders())
    parts = tokenizer, language.cpu(), autoencoder
    untrained = save_base(work / "untrained", *parts, make_transformer(SEED))
    base = cast("Flux2Klein", load_base(untrained, device=device))
    with closing(latents(work, tokenizer, batch, minutes, device)) as data:
        transformer = train_transformer(base, data, work, args.steps,
                                        minutes and minutes * (1 - LANGUAGE_SHARE), device=device)
    if last < 2:
        return
    save_base(args.output_dir, *parts, transformer.cpu())
    samples = batch * steps_done(work, "transformer")
    write_card(args.output_dir, samples, [])
    if last == 3:
        write_card(args.output_dir, samples, measure_gates(args.output_dir, work))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (GPU_BATCH if args.minutes and device != "cpu" else BATCH)
    with weights_kept(args.work_dir, args.weights_dir):
        make_base(args, device, batch)


if __name__ == "__main__":
    main()
