"""`dbcore train`: teach a base a subject."""

import argparse

from dbcore.config import TrainConfig, add_options, from_args

HELP = "teach a base a subject from a few photos, with DreamBooth and LoRA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, TrainConfig)


def main(args: argparse.Namespace) -> None:
    config = from_args(args, TrainConfig)
    config.check()  # before the heavy imports, so that a mistake is answered at once
    from dbcore.engines.trainer import train

    print(f"The LoRA is in {train(config)}.")
