"""What the parts of `make gpu-check` measure, a process each: `python -m bench.gpu_parts NAME`."""

import argparse
import contextlib
import json
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import dbcore

PHOTOS = dbcore.SUBJECTS / "dog"
PROMPT = "a photo of sks dog"
PRIOR = {
    "with_prior_preservation": True,
    "class_prompt": "a photo of a dog",
    "num_class_images": 5,
    "class_data_dir": str(dbcore.SUBJECTS / "cat"),
}
WARM_UP, MEASURED = 10, 30  # steps; on a GPU the losses are read every tenth
# Settings of dbcore, the most telling first: options, and what is put in the place of its own code.
EAGER = {"dbcore.models.replay.can_replay": lambda *args: False}
VARIANTS = {
    "plain": ({}, {}),
    "no CUDA graph": ({}, EAGER),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "low_vram": ({"low_vram": True}, {}),
    "prior preservation": (PRIOR, {}),
    "the other memory layout": ({}, {"dbcore.models.base.Family.layout": "contiguous_format"}),
    "fp16": ({"mixed_precision": "fp16"}, {}),
    "batch 4": ({"train_batch_size": 4}, {}),
    "float32": ({"mixed_precision": "no"}, {}),
}


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    failed = PARTS[args.part](Rows(args.work / f"{args.part}.jsonl"), args)
    sys.exit(1 if failed else 0)


class Rows:
    """A part's rows, written as they come; work that fails is a row too."""

    def __init__(self, path):
        self.path, self.failed = path, False

    def write(self, **row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def attempt(self, name, work, **about):
        """Write what `work()` returns, a dict."""
        began = time.perf_counter()
        try:
            found = work()
        except Exception:  # noqa: BLE001 - whatever it is, the other measurements are wanted
            traceback.print_exc()
            self.failed, found = True, {"error": traceback.format_exc()[-1500:]}
        self.write(name=name, **about, **found, seconds=round(time.perf_counter() - began, 1))


# --- the bases ----------------------------------------------------------------------------------


def bases(rows, args):
    """Stable Diffusion 1.5's shape with weights, for the script; of larger ones the configs."""
    import pipelines

    kind = "miniature" if args.tiny else "shape"
    makers = {
        "sd15": pipelines.make_tiny_pipeline if args.tiny else pipelines.make_sd15_pipeline,
        "sdxl": getattr(pipelines, f"make_sdxl_{kind}"),
        "flux2": getattr(pipelines, f"make_flux2_{kind}"),
    }
    for name, make in makers.items():
        rows.attempt(name, lambda make=make, name=name: make(args.work / name) and {})
    rows.attempt("machine", machine)
    return rows.failed


def machine():
    """The computer, and what its GPU does in matrix products alone."""
    import torch

    from bench.flops import matmul_flops
    from dbcore.tools.doctor import machine

    lines = [str(line) for line in machine()]
    return {"machine": lines, **({"flops": matmul_flops()} if torch.cuda.is_available() else {})}


@contextlib.contextmanager
def random_weights():
    """In the block, a base's networks get random weights on the device, and no file is read."""
    from dbcore.models.base import Family

    with (
        mock.patch.object(Family, "read_network", random_network),
        mock.patch.object(Family, "fingerprint", lambda base: base.name),
    ):
        yield


def random_network(base, component):
    """In the place of `Family.read_network`: numbers that keep activations near 1.

    Made on the device, which is faster, one after the other: of a denoiser that low_vram will
    quantize no two weights are on the GPU together, as none is of one that is read.
    """
    import torch

    module = base.shapes_of(component)
    home = "cpu" if base.low_vram and component in base.roles["denoiser"] else base.device
    for owner in module.modules():
        for name, weight in owner.named_parameters(recurse=False):
            value = torch.empty_like(weight, device=base.device)
            if weight.ndim > 1:
                value.normal_(std=weight[0].numel() ** -0.5)
            else:
                value.fill_(0.0 if name == "bias" else 1.0)
            setattr(owner, name, torch.nn.Parameter(value.to(home)))
    getattr(module, "tie_weights", tuple)()  # a language model's head is its table
    return module


# --- dbcore against the script ------------------------------------------------------------------


def plain(rows, args):
    """Both programs as whole commands, the plain case."""
    return in_turn(rows, args, {"plain": {}})


def script(rows, args):
    """Both programs as whole commands, the other cases."""
    return in_turn(
        rows, args, {"checkpointing": {"gradient_checkpointing": True}, "prior preservation": PRIOR}
    )


def in_turn(rows, args, cases):
    from bench.__main__ import Case, compare, find_script

    script = find_script(args.script, args.work)
    steps = 12 if args.tiny else 60
    for name, more in cases.items():
        options = {
            "resolution": 32 if args.tiny else 512,
            "rank": 4,
            "learning_rate": 2e-4,
            "max_train_steps": steps,
            "mixed_precision": "no" if args.tiny else "bf16",
            **more,
        }
        case = Case(name, name, "sd15", options)
        settings = argparse.Namespace(
            sd15=args.work / "sd15",
            toy=args.work / "sd15",
            smoke=True,
            growth=False,
            rounds=1,
            output_dir=args.work / "bench",
            gpu=not args.tiny,
        )

        def both(case=case, settings=settings):
            tell = partial(told, rows, case.name)
            return compare(case, script, settings, tell) and {}

        rows.attempt(name, both)
    return rows.failed


def told(rows, name, side, found):
    """A row for one program's run, as it ends."""
    rows.write(name=name, **{side: found})


# --- dbcore alone -------------------------------------------------------------------------------


def variants(rows, args):
    base = args.work / "sd15"
    for name, (options, places) in VARIANTS.items():
        rows.attempt(
            name, lambda options=options, places=places: speed(base, args, 512, options, places)
        )
    return rows.failed


def sdxl(rows, args):
    base = args.work / "sdxl"
    for name, options in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "low_vram": {"low_vram": True},
    }.items():
        rows.attempt(name, lambda options=options: speed(base, args, 1024, options, {}))
    return rows.failed


def flux2(rows, args):
    base = args.work / "flux2"
    for name, options in {"plain": {}, "low_vram": {"low_vram": True}}.items():
        rows.attempt(name, lambda options=options: speed(base, args, 512, options, {}))
    return rows.failed


def compiled(rows, args):
    base = args.work / "sd15"
    for name, places in {"compile": {}, "compile, no CUDA graph": EAGER}.items():
        options = {"compile": True, "max_train_steps": 2000}  # a shorter run compiles nothing
        rows.attempt(
            name, lambda options=options, places=places: speed(base, args, 512, options, places)
        )
    return rows.failed


def speed(base, args, resolution, options, places):
    """Steps a second and bytes of one run of dbcore, which is stopped after some steps.

    The first steps, in which kernels are chosen and graphs captured, are left out of the speed.
    """
    import torch
    from runs import empty_gpu

    from dbcore.config import TrainConfig
    from dbcore.engines.trainer import train
    from dbcore.utils.errors import Interrupted

    config = TrainConfig(
        **run_options(base, args, resolution, options),
        output_dir=str(args.work / "run"),
        overwrite_output_dir=True,
    )
    watch, on_gpu = Watch(4 if args.tiny else WARM_UP + MEASURED), torch.cuda.is_available()
    if on_gpu:
        empty_gpu()
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_weights())
        stack.enter_context(contextlib.suppress(Interrupted))
        for place, value in places.items():
            value = getattr(torch, value) if isinstance(value, str) else value
            stack.enter_context(mock.patch(place, value))
        train(config, watch, watch.stop)
    found = {
        "steps/s": watch.rate(),
        "steps began after, s": watch.began_after(),
        "loss": watch.loss,
    }
    if on_gpu:
        found |= {
            "GPU memory, GB": max(watch.peak, torch.cuda.max_memory_allocated()) / 1e9,
            "GPU memory of the steps, GB": torch.cuda.max_memory_allocated() / 1e9,
            "GPU memory reserved, GB": torch.cuda.max_memory_reserved() / 1e9,
        }
    return found


def run_options(base, args, resolution, options):
    """Options of a run, whose length is a usual one: what dbcore chooses may depend on it."""
    plain = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(PHOTOS),
        "instance_prompt": PROMPT,
        "resolution": 32 if args.tiny else resolution,
        "mixed_precision": "no" if args.tiny else "bf16",
        "rank": 4,
        "learning_rate": 2e-4,
        "lora_layers": "attention",
        "max_train_steps": 150,
        "num_report_images": 0,
        "report_to": "none",
        **options,
    }
    return {**plain, "mixed_precision": "no"} if args.tiny else plain


class Watch:
    """What a run tells while it goes on; it is stopped after `steps`."""

    def __init__(self, steps):
        self.steps, self.asked, self.clock, self.loss, self.peak = steps, 0, {}, None, 0
        self.created = time.perf_counter()

    def __call__(self, event):
        import torch

        if "loss" not in event:
            return
        if event["step"] == WARM_UP and torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.clock[event["step"]], self.loss = time.perf_counter(), event["loss"]

    def stop(self):
        """Asked once a step."""
        self.asked += 1
        return self.asked >= self.steps

    def rate(self):
        first, last = min(WARM_UP, self.steps // 2), max(self.clock)
        return (last - first) / (self.clock[last] - self.clock[first])

    def began_after(self):
        """Seconds until the first losses are known: loading, encoding, capturing, some steps."""
        return self.clock[1] - self.created


# --- the forecast -------------------------------------------------------------------------------


def forecasts(rows, args):
    """What `dbcore doctor` says of the same runs on a GPU, in bytes."""
    wait_for(args.work / "bases.jsonl", "flux2")
    for family, resolution, names in (
        ("sd15", 512, list(VARIANTS)),
        ("sdxl", 1024, ["plain", "checkpointing", "low_vram"]),
        ("flux2", 512, ["plain", "low_vram"]),
    ):
        for name in names:
            options, places = VARIANTS[name]
            if not places:
                rows.attempt(
                    name,
                    lambda options=options, family=family, resolution=resolution: foretell(
                        run_options(args.work / family, args, resolution, options)
                    ),
                    family=family,
                )
    return rows.failed


def foretell(options):
    from dbcore.config import TrainConfig
    from dbcore.engines.memory import forecast

    told = forecast(TrainConfig(**options), "cuda")
    return {
        "largest": told.largest.name,
        **{phase.name: (told.workspace + phase.total) / 1e9 for phase in told.phases},
    }


def wait_for(path, name):
    """Until the other process has written the row."""
    while not (path.is_file() and f'"name": "{name}"' in path.read_text(encoding="utf-8")):
        time.sleep(0.2)


PARTS = {
    "bases": bases,
    "forecast": forecasts,
    "plain": plain,
    "variants": variants,
    "sdxl": sdxl,
    "script": script,
    "flux2": flux2,
    "compile": compiled,
}

if __name__ == "__main__":
    main()
