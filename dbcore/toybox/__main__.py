"""`python -m dbcore.toybox`: make the toy base from nothing, in stages that outlive a kill.

render -> autoencoder -> its decoder -> toy CLIP -> UNet -> reader -> subject encoder -> the base's
folder -> gates and card. Each stage leaves its result in `--work_dir`; what is there is not made
again.

With `--minutes` each stage gets its share of them, and the UNet learns from scenes that are made
while it trains: for a GPU, which sees millions of samples in minutes.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import dbcore
from dbcore.toybox.corpus import render_corpus, sample_held_out, scenes

if TYPE_CHECKING:
    from dbcore.toybox.denoiser import Latents
    from dbcore.toybox.fresh import FreshLatents

SEED, HELD_OUT_SEED = 0, 1  # two worlds: what is learnt from, and what is only tested on
COUNT, TEST_COUNT = 20_000, 1_000
BATCH, GPU_BATCH = 32, 512
STAGES = ("render", "autoencoder", "decoder", "clip", "unet", "reader", "subject", "save", "gates")
SHARES = {"autoencoder": 1.1 / 8, "decoder": 0.4 / 8, "clip": 1 / 8, "unet": 4.5 / 8,
          "reader": 0.5 / 8, "subject": 0.5 / 8}  # of the minutes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dbcore.toybox",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("work_dirs/toybox"), help="checkpoints and corpus")
    add("--output_dir", type=Path, default=dbcore.TOY_BASE, help="the base's folder")
    add("--count", type=int, default=COUNT,
        help="renders for most stages; the UNet asks for more as it goes, the reader has four "
             "times as many (%(default)s)")
    add("--unet_steps", type=int, default=47_000, help="steps of the UNet (%(default)s)")
    add("--unet_batch", type=int, default=None,
        help=f"samples a step of the UNet ({BATCH}; with --minutes on a GPU {GPU_BATCH})")
    add("--minutes", type=float, default=None,
        help="minutes of training of all stages together, over all runs, "
             "setting up not counted; without it, steps alone count")
    add("--weights_dir", type=Path, default=None,
        help="where each stage's weights are put in half precision, in files under 16 MiB; "
             "what is there at the start is used")
    add("--device", default=None, help="cpu or cuda; without it, cuda where there is one")
    add("--until", choices=STAGES, default="gates", help="stop after this stage")
    return parser.parse_args(argv)


class Toybox:
    """The stages, each a property that makes what it needs first, or takes it from the work
    folder."""

    def __init__(self, work: Path, count: int, unet_steps: int, unet_batch: int,
                 minutes: float | None, device: str):
        self.work, self.count, self.device = work, count, device
        self.unet_steps, self.unet_batch, self.minutes = unet_steps, unet_batch, minutes

    def budget(self, stage: str) -> dict:
        """What `fit` is to know of a stage's time and device."""
        return {"minutes": self.minutes and self.minutes * SHARES[stage], "device": self.device}

    def render(self) -> None:
        self.images = render_corpus(self.work / "corpus", SEED, self.count, device=self.device)
        self.world = scenes(SEED, self.count)

    def autoencoder(self) -> None:
        from dbcore.toybox.autoencoder import train_autoencoder

        batch = max(BATCH, self.unet_batch // 4)  # a GPU has room for more
        self.vae = train_autoencoder(self.images, self.work, SEED, batch=batch,
                                     **self.budget("autoencoder"))

    def decoder(self) -> None:
        from dbcore.toybox.autoencoder import train_decoder

        self.vae = train_decoder(self.vae, self.images, self.work, SEED,
                                 batch=max(BATCH, self.unet_batch // 4), **self.budget("decoder"))

    def clip(self) -> None:
        from transformers import CLIPTokenizer

        from dbcore.toybox.clip import train_clip
        from dbcore.toybox.words import train_tokenizer

        folder = self.work / "tokenizer"
        self.tokenizer = CLIPTokenizer.from_pretrained(folder if folder.exists()
                                                       else train_tokenizer(folder))
        self.pair = train_clip(self.tokenizer, self.images, self.world, self.work, SEED,
                               **self.budget("clip"))

    def unet(self) -> None:
        from dbcore.toybox.denoiser import train_unet

        with closing(self.latents()) as latents:
            self.denoiser = train_unet(self.pair.text, latents, self.work, SEED, self.unet_steps,
                                       **self.budget("unet"))

    def latents(self) -> Latents | FreshLatents:
        from dbcore.toybox.denoiser import Latents
        from dbcore.toybox.fit import steps_done
        from dbcore.toybox.fresh import FreshLatents

        if self.minutes is None:
            return Latents(self.vae, self.tokenizer, self.work, SEED, self.unet_batch)
        return FreshLatents(self.vae, self.work / "tokenizer", SEED, self.unet_batch, self.count,
                            25 * self.count, steps_done(self.work, "unet"))

    def reader(self) -> None:
        from dbcore.toybox.reader import train_reader

        # it learns fewer renders by heart, and must know what the base never saw
        seen, held_out = 4 * self.count, 2 * self.count // 5
        images = [render_corpus(self.work / "corpus", SEED, seen, device=self.device),
                  render_corpus(self.work / "reader", SEED, held_out, sample_held_out,
                                self.device)]
        world = scenes(SEED, seen) + [sample_held_out(SEED, k) for k in range(held_out)]
        self.eye = train_reader(np.concatenate(images), world, self.work, SEED,
                                **self.budget("reader"))

    def subject(self) -> None:
        from dbcore.toybox.encoder import SUBJECTS, VIEWS, sample_view, train_subject_encoder

        views = render_corpus(self.work / "subjects", SEED, SUBJECTS * VIEWS, sample_view,
                              self.device)
        self.encoder = train_subject_encoder(views, self.work, SEED, **self.budget("subject"))

    def save(self, folder: Path) -> None:
        from dbcore.toybox.ship import save_base

        save_base(folder, self.tokenizer, self.pair, self.vae, self.denoiser, self.eye,
                  self.encoder)

    def gates(self, folder: Path) -> None:
        from dbcore.toybox.encoder import TEST_SUBJECTS, VIEWS, sample_view
        from dbcore.toybox.gates import measure
        from dbcore.toybox.ship import write_card

        images = render_corpus(self.work / "corpus", HELD_OUT_SEED, TEST_COUNT)
        subjects = render_corpus(self.work / "subjects", HELD_OUT_SEED, TEST_SUBJECTS * VIEWS,
                                 draw=sample_view)
        gates = measure(folder, self.work / "gates", images, scenes(HELD_OUT_SEED, TEST_COUNT),
                        subjects)
        write_card(folder, gates, self.work, self.count, self.unet_batch, self.device)


def main(argv: list[str] | None = None) -> None:
    import torch

    from dbcore.toybox.weights import weights_kept

    args = parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.unet_batch or (GPU_BATCH if args.minutes and device != "cpu" else BATCH)
    torch.backends.cudnn.benchmark = True  # few shapes, each met thousands of times
    toybox = Toybox(args.work_dir, args.count, args.unet_steps, batch, args.minutes, device)
    with weights_kept(args.work_dir, args.weights_dir):
        for stage in STAGES[: STAGES.index(args.until) + 1]:
            getattr(toybox, stage)(*([args.output_dir] if stage in ("save", "gates") else []))


if __name__ == "__main__":
    main()
