"""`make bench`: dbcore and diffusers' own DreamBooth script do the same work in turn; one report.

Each run is a process of its own (watch.py). The script is fetched as it is needed, or given with
--script; its options are dbcore's too, so both get the same words.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import dbcore
from bench import memory as forecast
from bench.memory import PRIOR
from bench.report import SIDES, words, write
from bench.watch import rate, stages, watch
from dbcore.config import need
from dbcore.utils.errors import DBCoreError

HELP = ("measure dbcore against diffusers' own DreamBooth script: speed and memory, "
        "the same work in turn")
SCRIPT = "https://raw.githubusercontent.com/huggingface/diffusers/v{}/examples/dreambooth/train_dreambooth_lora.py"
BOTH = {"instance_prompt": "a photo of sks dog", "train_batch_size": 1, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "seed": 0, "pre_compute_text_embeddings": True}
# the layers that the script trains, and its report, which has no pictures
ALONE = {"dbcore": {"lora_layers": "attention", "num_report_images": 0}, "script": {}}
GROWTH = {"photos": (5, 50, 500, 5000), "num_class_images": (5, 20, 80), "rank": (4, 16, 64),
          "resolution": (64, 128, 256), "train_batch_size": (1, 2, 4, 8)}


@dataclass
class Case:
    """One piece of work: the options of both programs, and what one alone needs for the same."""

    name: str
    title: str
    base: str  # toy, or sd15
    options: dict
    alone: dict = field(default_factory=dict)  # {side: options}
    photos: int = 5


def add_arguments(parser):
    parser.add_argument("--script", type=Path, metavar="PATH",
                        help="diffusers' train_dreambooth_lora.py; fetched for the installed "
                        "version if not given")
    parser.add_argument("--cases", nargs="+", metavar="NAME",
                        help="only these: toy, prior, validation, sd15, answers; "
                        "with --gpu: sd15, prior, checkpointing, low_vram")
    parser.add_argument("--rounds", type=int, default=3,
                        help="runs of each program and case (%(default)s)")
    parser.add_argument("--gpu", action="store_true",
                        help="Stable Diffusion 1.5's shape at 512 pixels, on a GPU")
    parser.add_argument("--growth", action="store_true",
                        help="how costs grow with photos, class images, rank, resolution "
                        "and batch, instead")
    parser.add_argument("--memory", action="store_true",
                        help="the memory forecast against what runs take, over a grid of "
                        "options, instead")
    parser.add_argument("--smoke", action="store_true",
                        help="two steps a case: does it run? Times mean nothing")
    parser.add_argument("--toy", type=Path, default=dbcore.TOY_BASE, metavar="BASE",
                        help="another small base")
    parser.add_argument("--sd15", type=Path, metavar="BASE",
                        help="a folder with Stable Diffusion 1.5; without it, "
                        "one of its shape with random weights is made, which costs the same "
                        "time and memory")
    parser.add_argument("--output_dir", type=Path, default=Path("work_dirs/bench"),
                        help="where report.md, report.json and the programs' words "
                        "go (%(default)s)")


def main(argv=None):
    """Run the cases that are asked for; what cannot be run ends the program with a line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=HELP)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except DBCoreError as error:
        sys.exit(f"bench: {error}")


def run(args):
    need(args.rounds > 0, f"--rounds {args.rounds}: it must be at least 1")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.memory:
        print("\n".join([*machine(), "", memory(args)]))
        return
    script = find_script(args.script, args.output_dir)
    cases = [*(growth_cases if args.growth else gpu_cases if args.gpu else cpu_cases)(args)]
    names = [case.name for case in cases] + ["answers"]
    unknown = set(args.cases or []) - set(names)
    need(not unknown, f"--cases {' '.join(sorted(unknown))}: choose from {', '.join(names)}")
    cases = [case for case in cases if not args.cases or case.name in args.cases]
    report = {"machine": machine(), "script": about(script), "growth": args.growth, "cases": []}
    need(not args.gpu or any("GPU 0" in line for line in report["machine"]),
         "--gpu: PyTorch finds no NVIDIA GPU here")
    for case in cases:
        report["cases"].append(compare(case, script, args))
        write(report, args.output_dir)  # what is known stays, whatever comes after
    if not args.growth and not args.gpu and (not args.cases or "answers" in args.cases):
        report["answers"] = answers(script, args.rounds, args.output_dir)
    if args.gpu:
        report["flops"] = matmul_flops()
    print(write(report, args.output_dir))


# --- the work -------------------------------------------------------------------------------------


def cpu_cases(args):
    steps, made = (2, 2) if args.smoke else (150, 40)
    wished = json.loads((args.toy / "recommended.json").read_text(encoding="utf-8"))
    toy = {**{name: wished.get(name, other) for name, other in (("resolution", 64), ("rank", 4),
                                                               ("learning_rate", 2e-4))},
           "mixed_precision": "no", "max_train_steps": steps}
    drawn = {"validation_prompt": "a photo of sks dog", "num_validation_images": 4}
    words = f"toy base, {steps} steps, batch 1"
    yield Case("toy", words, "toy", toy)
    yield Case("prior", f"{words}, prior preservation with {made} class images", "toy",
               {**toy, **PRIOR, "num_class_images": made})
    # the script draws after its first epoch, in 50 sampler steps, and at its end
    yield Case("validation", f"{words}, 4 pictures drawn twice on the way", "toy", {**toy, **drawn},
               {"dbcore": {"validation_steps": max(1, steps // 2)}})
    if not args.smoke:
        yield Case("sd15", "Stable Diffusion 1.5's shape, 256 x 256, 6 steps, batch 1", "sd15",
                   {"resolution": 256, "rank": 4, "learning_rate": 2e-4, "mixed_precision": "no",
                    "max_train_steps": 6})


def gpu_cases(args):
    steps, made = (2, 2) if args.smoke else (150, 100)
    options = {"resolution": 512, "rank": 4, "learning_rate": 2e-4, "mixed_precision": "bf16",
               "max_train_steps": steps}
    words = f"Stable Diffusion 1.5's shape, 512 x 512, bf16, {steps} steps, batch 1"
    yield Case("sd15", words, "sd15", options)
    yield Case("prior", f"{words}, prior preservation with {made} class images", "sd15",
               {**options, **PRIOR, "num_class_images": made, "prior_generation_precision": "bf16"})
    yield Case("checkpointing", f"{words}, gradient checkpointing", "sd15",
               {**options, "gradient_checkpointing": True})
    yield Case("low_vram", f"{words}, gradient checkpointing, dbcore with --low_vram", "sd15",
               {**options, "gradient_checkpointing": True}, {"dbcore": {"low_vram": True}})


def growth_cases(args):
    """One knob turned at a time, the others as in the plain case, 20 steps."""
    plain = next(iter(gpu_cases(args) if args.gpu else cpu_cases(args)))
    for knob, values in GROWTH.items():
        for value in values[:2] if args.smoke else values:
            value *= 2 if args.gpu and knob == "resolution" else 1
            more = {} if knob == "photos" else {knob: value,
                                                **(PRIOR if knob == "num_class_images" else {})}
            steps = 2 if args.smoke else 20
            yield Case(f"{knob}-{value}", f"{knob} {value}", plain.base,
                       {**plain.options, "max_train_steps": steps, **more},
                       photos=value if knob == "photos" else 5)


def photos(folder, count):
    """A folder of `count` pictures: those of a shipped subject, then fields of colour, no two
    alike."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    shipped = sorted((dbcore.SUBJECTS / "dog").glob("*.png"))[:count]
    for path in shipped:
        shutil.copy(path, folder / path.name)
    for k in range(len(shipped), count):
        if not (folder / f"{k:05d}.jpg").is_file():
            colours = np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((256, 256),
                                            Image.Resampling.BICUBIC).save(folder / f"{k:05d}.jpg")
    return folder


def sd15_base(folder):
    """A pipeline of Stable Diffusion 1.5's shape, written once (2 GB) by the tests' own helper."""
    tests = Path(dbcore.__file__).parents[1] / "tests"
    need((tests / "pipelines.py").is_file(),
         "the sd15 cases need --sd15 outside a clone of the project")
    if not (folder / "model_index.json").is_file():
        code = ("import sys; from pipelines import make_sd15_pipeline; "
                "make_sd15_pipeline(sys.argv[1])")
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True,
                       env={**os.environ, "PYTHONPATH": str(tests)})
    return folder


# --- the other side -------------------------------------------------------------------------------


def find_script(path, folder):
    """The script that was given, or that of the installed diffusers.

    Raises ConfigError where there is none.
    """
    if path:
        need(path.is_file(),
             f"--script {path}: not there; give the path of diffusers' train_dreambooth_lora.py")
        return path
    from urllib.request import urlopen

    version = importlib.metadata.version("diffusers")
    path, error = folder / f"train_dreambooth_lora-{version}.py", None
    if not path.is_file():
        try:
            with urlopen(SCRIPT.format(version), timeout=60) as answer:
                path.write_bytes(answer.read())
        except OSError as failure:
            error = failure
    need(not error, f"diffusers' script for {version} could not be fetched ({error}): "
         "give your copy with --script, "
                    f"from {SCRIPT.format(version)}")
    return path


def about(script):
    """What the script is, and what stands in for packages that it wants and this machine has
    not."""
    text = script.read_bytes()
    wants = re.search(rb'check_min_version\("([^"]+)"\)', text)
    there = importlib.util.find_spec("torchvision")
    return {"name": script.name, "sha256": hashlib.sha256(text).hexdigest(),
            "asks for diffusers": wants and wants[1].decode(),
            "diffusers": importlib.metadata.version("diffusers"),
            "torchvision": "installed" if there else "not installed: five transforms of dbcore's "
            "own stand in for it"}


def machine():
    """Lines on the computer and its packages; another process asks, so that this one stays
    light."""
    code = "from dbcore.tools.doctor import machine; print(*machine(), sep='\\n')"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=True).stdout
    threads = os.environ.get("OMP_NUM_THREADS", "as many as PyTorch chooses")
    return [f"- {line}" for line in [*lines.splitlines(), f"CPU threads: {threads}"]]


# --- the forecast ---------------------------------------------------------------------------------


def memory(args):
    """The table of `forecast`, over the toy base and, unless it is to be quick, Stable Diffusion
    1.5's shape."""
    bases = {args.toy: dict([*forecast.TOY.items()][:2] if args.smoke else forecast.TOY)}
    if not args.smoke:
        bases[args.sd15 or sd15_base(args.output_dir / "sd15")] = forecast.SD15
    pictures = photos(args.output_dir / "photos-5", 5)
    plain = {"instance_prompt": BOTH["instance_prompt"], "max_train_steps": forecast.STEPS,
             "report_to": "none"}
    runs = {(base, name): {"pretrained_model_name_or_path": base, "instance_data_dir": pictures,
                           **plain, **options}
            for base, grid in bases.items() for name, options in grid.items()}

    def measure(options, name):
        print(name, flush=True)
        folder = args.output_dir / "runs" / "memory"
        where = {"DBCORE_CACHE": str(folder / "cache"),
                 **({} if args.gpu else {"ACCELERATE_USE_CPU": "true"})}
        seen = costs(["dbcore", "train", *words({**options, "output_dir": folder / "run"})], folder,
                     where)
        return 1e9 * seen["GPU memory, GB" if args.gpu else "resident memory, GB"]

    return forecast.check(runs, measure, args.output_dir, args.gpu)


# --- one case -------------------------------------------------------------------------------------


def compare(case, script, args, tell=lambda side, found: None):
    """The case's record: settings, every run of both programs in turn, and the medians.

    `tell` is called after each run, as the next one may never end.
    """
    base = args.toy if case.base == "toy" else args.sd15 or sd15_base(args.output_dir / "sd15")
    pictures = photos(args.output_dir / f"photos-{case.photos}", case.photos)
    record = {"name": case.name, "title": case.title, "both": {**BOTH, **case.options},
              **{side: {**ALONE[side], **case.alone.get(side, {})} for side in SIDES}, "runs": {}}
    rounds = 1 if args.smoke or args.growth else args.rounds
    for turn in range(rounds):
        for side in SIDES:
            print(f"{case.name}: round {turn + 1} of {rounds}, {side}", flush=True)
            folder = args.output_dir / "runs" / f"{case.name}-{side}-{turn}"
            options = {"pretrained_model_name_or_path": base, "instance_data_dir": pictures,
                       "output_dir": folder / "run", **record["both"], **record[side]}
            if "with_prior_preservation" in options:
                options.setdefault("class_data_dir", folder / "class")
            program = ["dbcore", "train"] if side == "dbcore" else [str(script)]
            # both ask accelerate for their device
            where = {} if args.gpu else {"ACCELERATE_USE_CPU": "true"}
            found = costs(program + words(options), folder, where)
            record["runs"].setdefault(side, []).append(found)
            tell(side, found)
    record["medians"] = {side: medians(runs) for side, runs in record["runs"].items()}
    return record


def costs(program, folder, environment):
    """What one run in a fresh folder cost; of what it leaves, only its words (log.txt) are kept.

    Raises ConfigError, with its last words, if it ends in an error or leaves no LoRA.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen = watch(program, folder, environment)
    lora = folder / "run" / "pytorch_lora_weights.safetensors"
    saved = lora.stat().st_mtime - seen["began"] if lora.is_file() else None
    last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-1500:]
    need(seen["code"] == 0 and saved is not None and "steps" in seen["marks"],
         f"{Path(program[0]).name} ended with code {seen['code']}, "
         f"{'no' if saved is None else 'a'} LoRA and {'a' if 'steps' in seen['marks'] else 'no'} "
         f"progress bar of steps; its last words:\n{last}")
    for path in (folder / "run", folder / "class"):
        shutil.rmtree(path, ignore_errors=True)
    found = {"until the LoRA is saved, s": saved, "whole command, s": seen["seconds"],
             "steps/s": rate(seen["marks"]["steps"]),
             **{f"{name}, s": value
                for name, value in stages(seen["marks"], seen["seconds"]).items()},
             "resident memory, GB": seen["resident"] and seen["resident"] / 1e9,
             "GPU memory, GB": seen["gpu_memory"] and seen["gpu_memory"] / 1e9}
    return {name: value for name, value in found.items() if value is not None}


def medians(runs):
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def answers(script, rounds, folder):
    """Median seconds until --help and a wrong option are answered."""
    asked = {"dbcore --help": ["dbcore", "--help"],
             "dbcore train --rank 0": ["dbcore", "train", "--rank", "0"],
             "script --help": [str(script), "--help"]}
    times = {name: [] for name in asked}
    for _ in range(rounds):
        for name, program in asked.items():
            times[name].append(watch(program, folder)["seconds"])
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_flops():
    """What the GPU does in bf16 in matrix products alone, in FLOP/s, by a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.flops"], capture_output=True, text=True,
                          check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
