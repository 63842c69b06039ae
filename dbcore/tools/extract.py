"""`dbcore extract`: a fine-tuned pipeline minus its base -> a LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dbcore.tools.export import add_overwrite, free_path
from dbcore.utils.errors import InputError

if TYPE_CHECKING:
    import torch

HELP = "take a LoRA out of a fine-tuned pipeline, by singular values"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="the base the tuning began with"
    )
    parser.add_argument("--tuned", required=True, help="the fine-tuned pipeline's folder")
    parser.add_argument("--output", required=True,
                        help="the new .safetensors file, in diffusers' format")
    parser.add_argument("--rank", type=int, default=16, help="more keeps more of the tuning")
    add_overwrite(parser)


def main(args: argparse.Namespace) -> None:
    from dbcore.models.adapter import Adapter, extract_adapter
    from dbcore.models.lora_files import save_diffusers

    if args.rank < 1:
        raise InputError(f"--rank {args.rank}: give 1 or more")
    output = free_path(args.output, args.overwrite)
    base = load_networks("--pretrained_model_name_or_path", args.pretrained_model_name_or_path)
    tuned = load_networks("--tuned", args.tuned)
    adapter, figures = extract_adapter(base, tuned, args.rank)
    save_diffusers(Adapter(adapter.layers, {"base": Path(args.pretrained_model_name_or_path).name}),
                   output)
    print(f"rank {args.rank} of {len(adapter.every())} layers -> {output}")
    print(f"relative Frobenius error {figures['error']:.4f}; a higher rank lowers it")
    print(
        f"{100 * figures['outside']:.2f} % of the change is in biases, norms and embeddings, "
        "and stays behind"
    )


def load_networks(option: str, folder: str) -> dict[str, torch.nn.Module]:
    """{component: network} of a pipeline folder, all that a LoRA can be put on, in float32."""
    import torch

    from dbcore.models.reading import load_pipeline

    pipeline = load_pipeline(option, folder, torch_dtype=torch.float32)
    networks = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    return {name: network for name, network in networks.items() if network is not None}
