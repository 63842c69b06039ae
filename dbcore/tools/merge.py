"""`dbcore merge`: several LoRAs of one base -> one LoRA that is their weighted sum, or another
merge."""

import argparse

from dbcore.tools.export import add_overwrite, finite, free_path
from dbcore.utils.errors import InputError

HELP = "add several LoRAs, each with a weight, into one"
METHODS = {
    "sum": "the plain sum",
    "ties": "the largest numbers of each, where most agree in sign (arXiv 2306.01708)",
    "dare_linear": "random numbers of each, scaled up to make good for the rest (arXiv 2311.03099)",
    "dare_ties": "such random ones, where most agree in sign",
    "magnitude_prune": "the largest numbers of each, added",
}


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
        help="truncate to this rank by SVD; without it ranks add up, exactly; with a --method "
        "other than sum it is the largest rank of the LoRAs"
    )
    methods = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    parser.add_argument("--method", choices=METHODS, default="sum",
                        help=f"{methods} (default: %(default)s)")
    parser.add_argument("--density", type=finite,
                        help="the share of numbers that a method other than sum keeps, more than 0 "
                        "and less than 1; 0.5 if left out")
    parser.add_argument("--seed", type=int, default=0, help="which ones dare keeps (%(default)s)")
    parser.add_argument("--pretrained_model_name_or_path",
                        help="the base's folder, to read kohya's names")
    add_overwrite(parser)


def main(args: argparse.Namespace) -> None:
    from dbcore.models.adapter import merge_adapters
    from dbcore.models.embeddings import beside, read_tokens
    from dbcore.models.lora_files import read_adapter, save_diffusers
    from dbcore.models.tlora import what_is_lost

    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank {args.rank}: give 1 or more, or leave it out to add the ranks up")
    if args.density is not None and args.method == "sum":
        raise InputError("--density does nothing with --method sum, which keeps all numbers: "
                         "leave it out, or choose another method")
    density = 0.5 if args.density is None else args.density
    if not 0 < density < 1:
        raise InputError(f"--density {density:g}: give more than 0 and less than 1")
    output = free_path(args.output, args.overwrite)
    weights = args.weights if args.weights is not None else [1.0] * len(args.lora)
    for path in args.lora:
        if read_tokens(path):
            raise InputError(f"--lora {path} has new tokens in {beside(path).name}, which do not "
                             "add up with another LoRA: give the LoRA's file alone in another "
                             "folder to merge it without them")
    adapters = [read_adapter(path, args.pretrained_model_name_or_path) for path in args.lora]
    merged, error = merge_adapters(adapters, weights, args.rank, args.method, density, args.seed)
    save_diffusers(merged, output)
    ranks = sorted({layer.rank for _, _, layer in merged.every()})
    terms = " + ".join(f"{weight:g} x {path}" for path, weight in zip(args.lora, weights))
    for lost in {what_is_lost(adapter.notes) for adapter in adapters} - {None}:
        print(lost)
    print(f"{terms} -> {output}: rank {ranks[-1]}, relative error {error:.4f}")
