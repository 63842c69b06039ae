"""What happens beside a run's steps: its log, images, checkpoints, trackers and the result.

Each is a `Callback`, and a run calls them in the order of its list, as the learner of fast.ai's
miniai does: the loop knows only the moments, a callback only the run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dbcore.engines import checkpoint
from dbcore.engines.hub import push
from dbcore.engines.report import shown, write_report
from dbcore.engines.run_folder import LOG, LORA_FILE, read_log, replace_run
from dbcore.engines.trained import optional
from dbcore.models.base import free_memory
from dbcore.models.peft_adapters import save_adapter
from dbcore.utils.errors import Diverged
from dbcore.utils.files import whole_folder, write_whole

if TYPE_CHECKING:
    from dbcore.config import TrainConfig
    from dbcore.engines.trainer import Run

Record = dict[str, Any]  # of a step
Images = dict[str, list[Image.Image]]  # of prompts
SKIPS = 10  # steps in a row with gradients that are no numbers; fp16's scale is found after fewer


class Callback:
    """The moments of a run. Every process calls all of them; only the first one may write."""

    def before_train(self, run: Run) -> None:
        """The run is set up, new or resumed, and no step of this process is done."""

    def after_step(self, run: Run) -> None:
        """`run.trained.step` steps are done; their losses may still be on the device."""

    def on_log(self, run: Run, record: Record) -> None:
        """A step's numbers have been read: {"step", "loss", "lr", "timesteps", "losses"}."""

    def on_images(self, run: Run, images: Images) -> None:
        """Validation images of a step, {prompt: [PIL images]}; in the first process alone."""

    def on_error(self, run: Run, error: Exception) -> None:
        """A callback has failed after a step; the step itself is done."""

    def after_train(self, run: Run) -> None:
        """All steps are done."""


class Divergence(Callback):
    """Ends a run whose loss is no number, or whose gradients are none `SKIPS` times in a row."""

    def __init__(self):
        self.skips = 0

    def on_log(self, run: Run, record: Record) -> None:
        step, rate = record["step"], record["lr"]
        if not math.isfinite(record["loss"]):
            raise Diverged(blame(run, f"the loss is {record['loss']} at", step, rate))
        self.skips = self.skips + 1 if "skipped" in record else 0
        if self.skips:
            run.say(f"Step {step} changed nothing: a gradient was not a number.")
        if self.skips == SKIPS:
            what = f"gradients were no numbers {SKIPS} times in a row, up to"
            raise Diverged(blame(run, what, step, rate))


def blame(run: Run, what: str, step: int, rate: float) -> str:
    """What has happened, the likely cause, and the checkpoint to go back to."""
    # the weights after a step are proved by the next step's loss
    good = [path for done, path in checkpoint.checkpoints(run.folder) if done < step - 1]
    cause = "the learning rate is too high: try a third of it"
    if run.config.mixed_precision == "fp16":
        cause = "fp16 has overflowed: try --mixed_precision bf16 or no"
    last = f"{good[-1].name} is good" if good else "no checkpoint was saved before"
    return f"{what} step {step} (learning rate {rate:g}); most likely {cause}. {last}."


class Log(Callback):
    """log.jsonl: a line a step. A resumed run takes over the lines up to its checkpoint."""

    def before_train(self, run: Run) -> None:
        records = read_log(run.resume.parent) if run.resume else []
        if run.is_main:
            lines = [json.dumps(r) + "\n" for r in records if r["step"] <= run.trained.step]
            write_whole(run.folder / LOG, "".join(lines))

    def on_log(self, run: Run, record: Record) -> None:
        if run.is_main:
            with open(run.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


class Tracker(Callback):
    """TensorBoard or Weights & Biases, through accelerate."""

    def before_train(self, run: Run) -> None:
        options = {field.name: getattr(run.config, field.name)
                   for field in dataclasses.fields(run.config) if field.name != "hub_token"}
        run.accelerator.init_trackers("dbcore", config={
            name: value if isinstance(value, (int, float, bool)) else shown(value)
            for name, value in options.items()})

    def on_log(self, run: Run, record: Record) -> None:
        values = {name: record[name] for name in ("loss", "lr")}
        run.accelerator.log(values, step=record["step"])

    def on_images(self, run: Run, images: Images) -> None:
        arrays = {prompt: np.stack([np.asarray(image) for image in row])
                  for prompt, row in images.items()}
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(arrays, step=run.trained.step, **layout)

    def after_train(self, run: Run) -> None:
        run.accelerator.end_training()


def tracker_of(config: TrainConfig) -> str | None:
    """accelerate's name of the tracker, or None.

    TensorBoard, which nobody asked for by name, may be missing; Weights & Biases may not.
    """
    if config.report_to == "wandb":
        optional("wandb", "--report_to wandb")
        return "wandb"
    if config.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        print("TensorBoard is not installed (pip install tensorboard); the run is logged in "
              "log.jsonl alone.")
        return None
    return None if config.report_to == "none" else config.report_to


class Notify(Callback):
    """Calls a user's function, such as a dashboard's, with what is known after a step."""

    def __init__(self, function: Callable[[Record], Any]):
        self.function = function

    def on_log(self, run: Run, record: Record) -> None:
        self.call(run, step=record["step"], steps=run.config.max_train_steps,
                  loss=record["loss"], lr=record["lr"])

    def on_images(self, run: Run, images: Images) -> None:
        self.call(run, step=run.trained.step, images=images)

    def call(self, run: Run, **what: Any) -> None:
        if run.is_main:
            self.function({**what, "seconds": run.count_seconds()})


class Validation(Callback):
    """Images of the validation prompts every `validation_steps`, from the first process."""

    def after_step(self, run: Run) -> None:
        c = run.config
        if not c.validation_prompt or run.trained.step % c.validation_steps:
            return
        run.flush_log()
        if run.is_main:
            run.notify("on_images", self.generate(run))
        run.accelerator.wait_for_everyone()

    def generate(self, run: Run) -> Images:
        """{prompt: [PIL images]}, which are in the run's folder too."""
        c, step = run.config, run.trained.step
        seeds = [c.seed + k for k in range(c.num_validation_images)]
        prompts = [prompt for prompt in c.validation_prompt for _ in seeds]
        with run.trained.averaged():
            images = run.generate(prompts, seeds * len(c.validation_prompt), stream="validation")
        rows = [images[k:k + len(seeds)] for k in range(0, len(images), len(seeds))]
        folder = run.folder / "validation" / f"step-{step:06d}"
        save_validation(folder, c.validation_prompt, rows, step)
        return dict(zip(c.validation_prompt, rows))


def save_validation(folder: Path, prompts: list[str], rows: list[list[Image.Image]],
                    step: int) -> None:
    """Each image, and the grid of all; the folder appears whole."""
    from dbcore.utils.grids import save_grid  # matplotlib, which the first step need not wait for

    with whole_folder(folder) as partial:
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                image.save(partial / f"{y}-{x}.png")
        save_grid(partial / "grid.png", rows, prompts, title=f"step {step}")


class Checkpoints(Callback):
    """A checkpoint every `checkpointing_steps`, at the end, and when the run is told to stop."""

    def after_step(self, run: Run) -> None:
        step, c = run.trained.step, run.config
        if step % c.checkpointing_steps == 0 or step == c.max_train_steps or run.stopping:
            run.flush_log()
            self.save(run)

    def on_error(self, run: Run, error: Exception) -> None:
        """Where validation has filled the memory, the steps until then are not lost."""
        if isinstance(error, torch.OutOfMemoryError):
            free_memory()
            self.save(run)

    def save(self, run: Run) -> None:
        if not all(p.isfinite().all() for p in run.trained.parameters):
            rate = run.trained.optimizer.param_groups[0]["lr"]
            what = "the LoRA's weights are no longer numbers after"
            raise Diverged(blame(run, what, run.trained.step, rate))
        if run.is_main:
            run.count_seconds()
            checkpoint.save_checkpoint(run.folder, run.trained, run.notes, run.circumstances,
                                       run.config.checkpoints_total_limit)
        run.accelerator.wait_for_everyone()


class Result(Callback):
    """The LoRA under its final name and the report; if it was asked for, both on the hub."""

    def after_train(self, run: Run) -> None:
        if not run.is_main:
            return
        with run.trained.averaged():
            save_adapter(run.trained.modules, run.folder / LORA_FILE, run.notes)
            evidence = write_report(run.trained.modules, run.generate, run.config, run.folder,
                                    read_log(run.folder), run.count_seconds())
        if run.folder != Path(run.config.output_dir):
            replace_run(run.config.output_dir)
        print(evidence.verdict())
        if run.config.push_to_hub:
            push(run.config)
