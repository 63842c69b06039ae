"""`dbcore generate`: images from a base, with or without LoRAs."""

import argparse

from dbcore.config import GenerateConfig, add_options, from_args

HELP = "generate images with a base and any number of LoRAs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, GenerateConfig)


def main(args: argparse.Namespace) -> None:
    config = from_args(args, GenerateConfig)
    config.check()
    from dbcore.engines.sample import generate_and_save

    folder = generate_and_save(config)
    print(f"{len(config.prompt) * config.num_images} images and a grid are in {folder}.")
