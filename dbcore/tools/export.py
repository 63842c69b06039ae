"""`dbcore export`: a LoRA for other programs, or merged into a whole pipeline."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dbcore.utils.errors import InputError
from dbcore.utils.files import whole_folder, writing

if TYPE_CHECKING:
    import torch

    from dbcore.models.adapter import Adapter
    from dbcore.models.embeddings import TokenFile
    from dbcore.models.peft_adapters import PeftAdapter

HELP = "write a LoRA in another tool's format, or merge it into its base"
MANIFEST = "export.json"  # in a folder: the files that an export wrote there
RUN_FILE = "pytorch_lora_weights.safetensors"
FORMATS = {
    "kohya": "one file for A1111, ComfyUI, Forge, InvokeAI and kohya's scripts",
    "diffusers": "one file for load_lora_weights of a diffusers pipeline",
    "peft": "a folder with one adapter for each network",
    "merged": "a whole pipeline folder with the LoRA in its weights",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--trigger_words",
                        help="words that call the subject, shown by A1111 and ComfyUI")
    parser.add_argument(
        "--lora_scale", type=finite, default=1.0, help="merged only: how much of the LoRA, 1 is all"
    )
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the output if it is there already")


def finite(text: str) -> float:
    """A number from the command line that is neither infinite nor nan."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return number


def main(args: argparse.Namespace) -> None:
    from dbcore.models import peft_adapters
    from dbcore.models.adapter import Adapter
    from dbcore.models.embeddings import beside, read_tokens
    from dbcore.models.kohya import kohya_leaves_out, save_kohya
    from dbcore.models.lora_files import read_adapter, save_diffusers, save_peft
    from dbcore.models.tlora import what_is_lost

    output = free_path(args.output, args.overwrite, is_file=args.format in ("kohya", "diffusers"))
    tokens = read_tokens(args.lora)
    if tokens and output.suffix.lower() == ".safetensors":
        free_path(str(beside(output)), args.overwrite)
    if other := peft_adapters.read(args.lora):
        export_other(other, args.format, output, tokens)
        return
    adapter = read_adapter(args.lora, args.pretrained_model_name_or_path)
    if args.trigger_words:
        adapter = Adapter(adapter.layers, {**adapter.notes, "trigger_words": args.trigger_words})
    if args.format == "merged":
        save_merged(adapter, args.pretrained_model_name_or_path, output, args.lora_scale, tokens)
    elif args.format == "peft":
        with export_folder(output) as folder:
            save_peft(adapter, folder)
            take_along(tokens, folder)
    else:
        {"kohya": save_kohya, "diffusers": save_diffusers}[args.format](adapter, output)
        take_along(tokens, output)
    counts = ", ".join(f"{len(named)} layers of the {name}"
                       for name, named in adapter.layers.items())
    print(f"{args.format}: {counts} -> {output}")
    if lost := what_is_lost(adapter.notes):
        print(lost)
    if args.format == "kohya" and (left_out := kohya_leaves_out(adapter)):
        print("A1111, ComfyUI and diffusers use all of them; "
              f"kohya's scripts leave out {', '.join(left_out)}")
    if args.format == "kohya" and adapter.has_dora:
        print("diffusers leaves DoRA's magnitudes out of such a file: "
              "give it one of --format diffusers")


def take_along(tokens: TokenFile | None, output: Path) -> None:
    """Write the new tokens of a run beside its LoRA's new file, or into its new folder."""
    from dbcore.models.embeddings import beside
    from dbcore.models.lora_files import save_safetensors

    if tokens is None:
        return
    path = save_safetensors(tokens.rows, beside(output), tokens.notes)
    print(f"{tokens.word} stands for new tokens, {''.join(tokens.names)}, which are in {path.name} "
          "beside it: diffusers' load_textual_inversion reads that; for A1111 and ComfyUI put it "
          f"into their folder of embeddings, and write {path.stem} in place of {tokens.word}")


def export_other(adapter: PeftAdapter, format: str, output: Path,
                 tokens: TokenFile | None = None) -> None:
    """Write an adapter that is no LoRA for peft, or for LyCORIS in kohya's format.

    Raises InputError for another format.
    """
    from dbcore.models.kohya import save_lycoris
    from dbcore.models.peft_adapters import NAMES, save_peft_folder

    if format not in ("peft", "kohya"):
        raise InputError(f"--format {format}: it is {NAMES[adapter.kind]}, which {format} has no "
                         "place for: give --format peft, or for a LoHa or LoKr kohya")
    if format == "kohya":
        save_lycoris(adapter, output)
        take_along(tokens, output)
    else:
        with export_folder(output) as partial:
            save_peft_folder(adapter, partial)
            take_along(tokens, partial)
    print(f"{format}: {NAMES[adapter.kind]} of {', '.join(adapter.settings)} -> {output}")


def free_path(text: str, overwrite: bool = False, is_file: bool = True) -> Path:
    """The path to write to. Raises InputError if it must not be replaced, or names no LoRA file."""
    path = Path(text)
    if is_file and path.suffix.lower() != ".safetensors":
        raise InputError(f"--output {path}: give a name that ends in .safetensors, "
                         "or it is not read")
    if path.exists() and not overwrite:
        raise InputError(f"--output {path} exists: choose another name, or add --overwrite")
    if path.exists() and (theirs := what_no_export_wrote(path)):
        raise InputError(f"--output {path}: {theirs}, and --overwrite replaces no more than an "
                         "export: choose another name")
    return path


def what_no_export_wrote(path: Path) -> str | None:
    """Words for what would be lost if `path` were replaced; None where it is a LoRA file, or an
    export's folder alone."""
    if path.is_dir():
        ours = {MANIFEST, *written(path)}
        found = (Path(folder, name).relative_to(path).as_posix()
                 for folder, _, names in os.walk(path) for name in names)
        other = next((name for name in found if name not in ours), None)
        return f"{other} in it was written by no export" if other else None
    if path.name == RUN_FILE and any((path.parent / name).is_file()
                                     for name in ("config.yaml", "state.json")):
        return "it is a run's own LoRA"
    return None if is_lora(path) else "it is no LoRA file"


def is_lora(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = {*file.keys()}
            return "clip_l" in keys or any("lora" in key for key in keys)
    except (SafetensorError, OSError):
        return False


def written(folder: Path) -> list[str]:
    """The names of the files that an export wrote into a folder, as it noted them."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return []


@contextlib.contextmanager
def export_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, with a note of what was written, in the place of an earlier export."""
    with whole_folder(path) as partial:
        yield partial
        files = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*")
                       if file.is_file())
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def save_merged(adapter: Adapter, base: str | None, folder: Path, lora_scale: float = 1.0,
                tokens: TokenFile | None = None) -> None:
    """Write `folder`: the pipeline `base` with `lora_scale` of `adapter` added to its weights, and
    the new tokens to its words.

    Added in float32, then rounded once to the precision the base is stored in. Raises InputError
    without a base.
    """
    from dbcore.datasets.store import scratch
    from dbcore.models.embeddings import load_into_pipeline
    from dbcore.models.lora_files import save_diffusers
    from dbcore.models.reading import check_finite, load_pipeline

    if base is None:
        raise InputError("--format merged: give the base with --pretrained_model_name_or_path")
    pipeline = load_pipeline("--pretrained_model_name_or_path", base)
    stored = stored_precision(base, next(iter(adapter.layers)))
    with writing(scratch()), tempfile.TemporaryDirectory() as temporary:
        path = save_diffusers(adapter, Path(temporary) / "lora.safetensors")
        pipeline.load_lora_weights(temporary, weight_name=path.name)
    pipeline.fuse_lora(lora_scale=lora_scale)
    pipeline.unload_lora_weights()
    if tokens:
        load_into_pipeline(pipeline, tokens)
        print(f"{tokens.word} stands for new tokens: write {''.join(tokens.names)} for it")
    check_finite(pipeline.to(dtype=stored), f"--lora_scale {lora_scale:g} in {stored}")
    with export_folder(folder) as partial:
        pipeline.save_pretrained(partial)
        if (Path(base) / "recommended.json").is_file():
            shutil.copy(Path(base) / "recommended.json", partial)


def stored_precision(base: str, component: str) -> torch.dtype:
    """The dtype of a network's file in a pipeline folder, float32 where there is none to look
    at."""
    import torch
    from safetensors import safe_open

    files = sorted((Path(base) / component).glob("*.safetensors"))
    if not files:
        return torch.float32
    with safe_open(files[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype
