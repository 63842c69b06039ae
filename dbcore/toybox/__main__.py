"""`python -m dbcore.toybox`: make the toy base from nothing, in stages that a kill cannot undo.

render -> autoencoder -> toy CLIP -> UNet -> reader -> subject encoder -> the base's folder -> gates and card.
Each stage leaves its result in `--work_dir`; what is there is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import dbcore
from dbcore.toybox.corpus import render_corpus, sample_held_out, scenes

SEED, HELD_OUT_SEED = 0, 1  # two worlds: what is learnt from, and what is only tested on
COUNT, TEST_COUNT, READER_COUNT = 20_000, 1_000, 2_000
BATCH = 32
STAGES = ("render", "autoencoder", "clip", "unet", "reader", "subject", "save", "gates")


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m dbcore.toybox", description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, default=Path("work_dirs/toybox"), help="checkpoints and corpus")
    parser.add_argument("--output_dir", type=Path, default=dbcore.TOY_BASE, help="the base's folder")
    parser.add_argument("--count", type=int, default=COUNT, help="renders for all but the UNet, which asks for more as it goes (%(default)s)")
    parser.add_argument("--unet_steps", type=int, default=47_000, help="steps of the UNet, 32 samples each")
    parser.add_argument("--device", default=None, help="cpu or cuda; without it, cuda where there is one")
    parser.add_argument("--until", choices=STAGES, default="gates", help="stop after this stage")
    return parser.parse_args()


class Toybox:
    """The stages, each a property that makes what it needs first, or takes it from the work folder."""

    def __init__(self, work: Path, count: int, unet_steps: int, device: str):
        self.work, self.count, self.unet_steps, self.device = work, count, unet_steps, device

    def render(self):
        self.pictures = render_corpus(self.work / "corpus", SEED, self.count)
        self.world = scenes(SEED, self.count)

    def autoencoder(self):
        from dbcore.toybox.autoencoder import train_autoencoder

        self.vae = train_autoencoder(self.pictures, self.work, SEED, device=self.device)

    def clip(self):
        from transformers import CLIPTokenizer

        from dbcore.toybox.clip import train_clip
        from dbcore.toybox.words import train_tokenizer

        folder = self.work / "tokenizer"
        self.tokenizer = CLIPTokenizer.from_pretrained(folder if folder.exists() else train_tokenizer(folder))
        self.pair = train_clip(self.tokenizer, self.pictures, self.world, self.work, SEED, device=self.device)

    def unet(self):
        from dbcore.toybox.denoiser import Latents, train_unet

        latents = Latents(self.vae, self.work, SEED, BATCH)
        self.denoiser = train_unet(self.tokenizer, self.pair.text, latents, self.work, SEED,
                                   steps=self.unet_steps, device=self.device)

    def reader(self):
        from dbcore.toybox.reader import train_reader

        # the reader must know what the base never saw: it also learns from the combinations held out
        others = render_corpus(self.work / "reader", SEED, READER_COUNT, draw=sample_held_out)
        self.eye = train_reader(np.concatenate([self.pictures, others]),
                                self.world + [sample_held_out(SEED, k) for k in range(READER_COUNT)],
                                self.work, SEED, device=self.device)

    def subject(self):
        from dbcore.toybox.encoder import SUBJECTS, VIEWS, sample_view, train_subject_encoder

        views = render_corpus(self.work / "subjects", SEED, SUBJECTS * VIEWS, draw=sample_view)
        self.encoder = train_subject_encoder(views, self.work, SEED, device=self.device)

    def save(self, folder: Path):
        from dbcore.toybox.ship import save_base

        save_base(folder, self.tokenizer, self.pair, self.vae, self.denoiser, self.eye, self.encoder)

    def gates(self, folder: Path):
        from dbcore.toybox.encoder import TEST_SUBJECTS, VIEWS, sample_view
        from dbcore.toybox.gates import measure
        from dbcore.toybox.ship import write_card

        pictures = render_corpus(self.work / "corpus", HELD_OUT_SEED, TEST_COUNT)
        subjects = render_corpus(self.work / "subjects", HELD_OUT_SEED, TEST_SUBJECTS * VIEWS,
                                 draw=sample_view)
        gates = measure(folder, self.work / "gates", pictures, scenes(HELD_OUT_SEED, TEST_COUNT), subjects)
        write_card(folder, gates, self.work, self.count, self.device)


def main():
    import torch

    args = parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    toybox = Toybox(args.work_dir, args.count, args.unet_steps, device)
    for stage in STAGES[: STAGES.index(args.until) + 1]:
        getattr(toybox, stage)(*([args.output_dir] if stage in ("save", "gates") else []))


if __name__ == "__main__":
    main()
