"""`dbcore export`: a LoRA for other programs, or merged into a whole pipeline."""

import argparse
import math
import shutil
import tempfile
from pathlib import Path

from dbcore.utils.errors import InputError

HELP = "write a LoRA in another tool's format, or merge it into its base"
FORMATS = {
    "kohya": "one file for A1111, ComfyUI, Forge, InvokeAI and kohya's scripts",
    "diffusers": "one file for load_lora_weights of a diffusers pipeline",
    "peft": "a folder with one adapter for each network",
    "merged": "a whole pipeline folder with the LoRA in its weights",
}


def add_arguments(parser):
    parser.add_argument(
        "--lora", required=True, help="run folder, .safetensors file (also kohya's) or peft folder"
    )
    parser.add_argument(
        "--output", required=True, help="the new file (kohya, diffusers) or folder (peft, merged)"
    )
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", required=True, choices=FORMATS, help=formats)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="the base's folder: needed to merge, and to read kohya's names",
    )
    parser.add_argument("--trigger_words", help="words that call the subject, shown by A1111 and ComfyUI")
    parser.add_argument(
        "--lora_scale", type=finite, default=1.0, help="merged only: how much of the LoRA, 1 is all"
    )
    add_overwrite(parser)


def add_overwrite(parser):
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")


def finite(text):
    """A number from the command line that is neither infinite nor nan."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return number


def main(args):
    from dbcore.models.adapter import Adapter
    from dbcore.models.kohya import kohya_leaves_out, save_kohya
    from dbcore.models.lora_files import read_adapter, save_diffusers, save_peft

    output = free_path(args.output, args.overwrite, is_file=args.format in ("kohya", "diffusers"))
    adapter = read_adapter(args.lora, args.pretrained_model_name_or_path)
    if args.trigger_words:
        adapter = Adapter(adapter.layers, {**adapter.notes, "trigger_words": args.trigger_words})
    if args.format == "merged":
        save_merged(adapter, args.pretrained_model_name_or_path, output, args.lora_scale)
    else:
        {"kohya": save_kohya, "diffusers": save_diffusers, "peft": save_peft}[args.format](adapter, output)
    counts = ", ".join(f"{len(named)} layers of the {name}" for name, named in adapter.layers.items())
    print(f"{args.format}: {counts} -> {output}")
    if args.format == "kohya" and (left_out := kohya_leaves_out(adapter)):
        print(f"A1111, ComfyUI and diffusers use all of them; kohya's own scripts leave out {', '.join(left_out)}")


def free_path(text, overwrite=False, is_file=True):
    """The path, if nothing is there or it may be replaced, and a LoRA file can be called so; else InputError."""
    path = Path(text)
    if is_file and path.suffix.lower() != ".safetensors":
        raise InputError(f"--output {path}: give a name that ends in .safetensors, as every tool wants it")
    if path.exists() and not overwrite:
        raise InputError(f"--output {path} exists: choose another name, or add --overwrite")
    return path


def save_merged(adapter, base, folder, lora_scale=1.0):
    """Write `folder`: the pipeline `base` with `lora_scale` of `adapter` added to its weights.

    Added in float32, then rounded once to the precision the base is stored in. Raises InputError
    without a base.
    """
    from diffusers import DiffusionPipeline

    from dbcore.models.lora_files import save_diffusers

    if base is None:
        raise InputError("--format merged: give the base with --pretrained_model_name_or_path")
    pipeline = DiffusionPipeline.from_pretrained(base)
    stored = stored_precision(base, next(iter(adapter.layers)))
    with tempfile.TemporaryDirectory() as scratch:
        path = save_diffusers(adapter, Path(scratch) / "lora.safetensors")
        pipeline.load_lora_weights(scratch, weight_name=path.name)
    pipeline.fuse_lora(lora_scale=lora_scale)
    pipeline.unload_lora_weights()
    partial = Path(folder).with_name(Path(folder).name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(dtype=stored).save_pretrained(partial)
    if (Path(base) / "recommended.json").is_file():
        shutil.copy(Path(base) / "recommended.json", partial)
    if Path(folder).exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def stored_precision(base, component):
    """The dtype of a network's file in a pipeline folder, float32 where there is none to look at."""
    import torch
    from safetensors import safe_open

    files = sorted((Path(base) / component).glob("*.safetensors"))
    if not files:
        return torch.float32
    with safe_open(files[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype
