"""`make bench BENCH=--memory`: the memory forecast held against what runs took, over a grid of
options."""

import json

from bench.report import words
from dbcore.config import TrainConfig

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
LARGE = {"resolution": 256, "train_batch_size": 4}  # activations of several times the weights
TOY = {
    "plain": {},
    "batch 32": {"train_batch_size": 32},
    "256 pixels, batch 4": LARGE,
    "the same, gradient checkpointing": {**LARGE, "gradient_checkpointing": True},
    "the same, LoRA on all layers": {**LARGE, "lora_layers": "all"},
    "the same, prior preservation": {**LARGE, **PRIOR, "num_class_images": 4},
    "the same, text encoder": {**LARGE, "train_text_encoder": True},
}
SD15 = {
    "Stable Diffusion 1.5's shape, 256 pixels": {"resolution": 256, "num_report_images": 0},
    "the same, gradient checkpointing, batch 4": {"resolution": 256, "num_report_images": 0,
                                                  "train_batch_size": 4,
                                                 "gradient_checkpointing": True},
    "the same, low VRAM, batch 1": {"resolution": 256, "num_report_images": 0, "low_vram": True},
}
STEPS = 3


def check(runs, measure, folder, gpu=False):
    """Measure each run, then forecast it; writes memory.json and memory.md, and returns the
    latter's text.

    `runs`: {(base, name): options}; `measure(options, name)`: bytes. On a CPU these are the
    process's highest resident memory, on a GPU what PyTorch's allocator gave out, of which a CUDA
    context is no part.
    """
    taken = {place: measure(options, place[1]) for place, options in runs.items()}
    from dbcore.engines.memory import (
        forecast,  # heavy: the processes above are to be forked from a light one
    )

    rows = []
    for place, options in runs.items():
        told = forecast(TrainConfig(**{name: str(value) if name.endswith(("path", "dir")) else value
                                       for name, value in options.items()}),
                        "cuda" if gpu else "cpu")
        rows.append({"run": place[1], "forecast": told.allocated if gpu else told.peak,
                     "phase": told.largest.name,
                     "measured": taken[place]})
    (folder / "memory.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = ["| run | options | highest in | forecast, MB | measured, MB | forecast / measured |",
             "|---|---|---|---:|---:|---:|"]
    for row, options in zip(rows, runs.values()):
        shown = " ".join(words({name: value for name, value in options.items()
                                if not name.endswith(("path", "dir"))}))
        lines.append(f"| {row['run']} | `{shown}` | {row['phase']} | "
                     f"{row['forecast'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f} | "
                     f"{row['forecast'] / row['measured']:.2f} |")
    text = "\n".join(lines)
    (folder / "memory.md").write_text(text + "\n", encoding="utf-8")
    return text
