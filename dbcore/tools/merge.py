"""`dbcore merge`: several LoRAs of one base -> one LoRA that is their weighted sum."""

import argparse

from dbcore.tools.export import add_overwrite, finite, free_path
from dbcore.utils.errors import InputError

HELP = "add several LoRAs, each with a weight, into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", required=True, nargs="+",
                        help="two or more run folders or LoRA files")
    parser.add_argument(
        "--weights", type=finite, nargs="+", help="one number for each LoRA; 1 each if left out"
    )
    parser.add_argument("--output", required=True,
                        help="the new .safetensors file, in diffusers' format")
    parser.add_argument(
        "--rank", type=int,
        help="truncate to this rank by SVD; without it the ranks add up, exactly"
    )
    parser.add_argument("--pretrained_model_name_or_path",
                        help="the base's folder, to read kohya's names")
    add_overwrite(parser)


def main(args: argparse.Namespace) -> None:
    from dbcore.models.adapter import merge_adapters
    from dbcore.models.lora_files import read_adapter, save_diffusers

    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank {args.rank}: give 1 or more, or leave it out to add the ranks up")
    output = free_path(args.output, args.overwrite)
    weights = args.weights if args.weights is not None else [1.0] * len(args.lora)
    adapters = [read_adapter(path, args.pretrained_model_name_or_path) for path in args.lora]
    merged, error = merge_adapters(adapters, weights, args.rank)
    save_diffusers(merged, output)
    ranks = sorted({layer.rank for _, _, layer in merged.every()})
    terms = " + ".join(f"{weight:g} x {path}" for path, weight in zip(args.lora, weights))
    print(f"{terms} -> {output}: rank {ranks[-1]}, relative error {error:.4f}")
