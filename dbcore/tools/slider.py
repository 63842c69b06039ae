"""`dbcore slider`: a LoRA whose scale moves one attribute, from two prompts and no photos."""

import argparse

from dbcore.config import SliderConfig, add_options, from_args

HELP = "learn a concept slider from two prompts, without photos (arXiv 2311.12092)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, SliderConfig)


def main(args: argparse.Namespace) -> None:
    config = from_args(args, SliderConfig)
    config.check()
    from dbcore.engines.slider import train_slider

    path = train_slider(config)
    print(f"The slider is in {path}. Use it with generate --lora_scale, from -1 "
          f"({config.negative}) to 1 ({config.positive}).")
