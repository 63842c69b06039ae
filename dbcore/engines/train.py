"""Training: set up, then the loop, on one screen each.

photos -> class images -> latents and embeddings, once -> LoRA -> steps -> one file, and a report of
what it learned. Processes (accelerate) draw parts of one batch and average the LoRA's gradients;
there is no other state between them.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm.auto import tqdm

from dbcore.config import ConfigError, need
from dbcore.datasets.dreambooth import DreamBoothData, refuse_shared
from dbcore.datasets.photos import gather_photos
from dbcore.datasets.prompts import check_fit, texts_of
from dbcore.engines import checkpoint
from dbcore.engines.losses import dreambooth_loss
from dbcore.engines.prior import class_images, class_photos, own_folder
from dbcore.engines.processes import agree, average_gradients, gather
from dbcore.engines.report import report_prompts, shown, write_report
from dbcore.engines.resume import circumstances, compare, say_changes
from dbcore.engines.run_folder import (
    LORA_FILE,
    WRITTEN,
    complete,
    goes_on,
    held,
    holds_run,
    home,
    place,
    prepare_folder,
    replace_run,
)
from dbcore.engines.trained import PACKAGES, inject, optional, start_training
from dbcore.models.base import best_device, give_back, load_base, settle, torch_dtype
from dbcore.models.lora import save_lora, set_dropout
from dbcore.models.replay import Replay, can_replay, replayed
from dbcore.utils.console import printable
from dbcore.utils.errors import Diverged, Interrupted, MemoryFull
from dbcore.utils.files import is_of_files, whole_folder, write_whole
from dbcore.utils.seeding import key

STEPS = 150
VALIDATIONS = 5  # over a run, unless told otherwise
SKIPS = 10  # steps in a row with gradients that are no numbers; fp16's scale is found after fewer
SYNC_EVERY = 10  # steps between looks at the loss on a GPU, which waits for it each time


def train(config, callback=None, should_stop=None):
    """Teach the base a subject as `config` (TrainConfig) says; returns the path of the LoRA file.

    `callback`: called after each step with {"step", "steps", "loss", "lr", "seconds"}, and after a
    validation with {"step", "pictures": {prompt: [PIL images]}}. `should_stop()`: True ends the run
    after the step. Raises ConfigError (also for data), CheckpointError, Interrupted after Ctrl-C,
    SIGTERM or `should_stop`, and Diverged when the loss is no longer a number.
    """
    with printable():
        return check_and_train(config, callback, should_stop or bool)


def check_and_train(config, callback, should_stop):
    """Everything that needs no network is looked at first."""
    config.check()
    check_launch()
    if config.optimizer in PACKAGES:  # asked for now, and not after the class images are made
        optional(PACKAGES[config.optimizer], f"--optimizer {config.optimizer}")
    project = ProjectConfiguration(config.output_dir,
                                   logging_dir=str(Path(config.output_dir, config.logging_dir)))
    # several processes on CPUs are only taken for a group if accelerate is told that CPUs are meant
    on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and best_device() == "cpu"
    accelerator = Accelerator(cpu=on_cpus, mixed_precision="no", log_with=tracker(config),
                              project_config=project)
    say = accelerator.print
    config = settle(config, accelerator.device)
    say("Chosen for this base and machine: " + ", ".join(
        f"{name} {getattr(config, name)}"
        for name in ("resolution", "rank", "learning_rate", "lora_layers",
                                                       "train_batch_size", "mixed_precision"))
        + ".")
    photos, problems = gather_photos(config.instance_data_dir, config.resolution, config.use_masks)
    for problem in problems:
        say(f"  {problem}")
    base = load_base(config.pretrained_model_name_or_path, config.revision,
                     tokenizer_name=config.tokenizer_name,
                     tokenizer_max_length=config.tokenizer_max_length)  # for its tokenizers
    check_fit(base, texts_of(config, photos), config.instance_prompt, config.class_prompt, say)
    with held(config.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        return train_in_folder(config, accelerator, photos, callback, should_stop)


def check_launch():
    """Raises ConfigError where `accelerate launch` was asked for several processes and has started
    one, as on a CPU."""
    if "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    import psutil

    words = " ".join(psutil.Process().parent().cmdline()).replace("=", " ")
    asked = re.search(r"--num[-_]processes (\d+)", words)
    need(not asked or int(asked[1]) < 2,
         f"accelerate launch --num_processes {asked and asked[1]} has started one process, "
         "as it does on CPUs: launch with `torchrun --nproc_per_node N -m dbcore train ...`, "
         "or leave the number out")


def train_in_folder(config, accelerator, photos, callback, should_stop):
    """`train`, once the options and photos are good and no other run has the folder."""
    if accelerator.is_main_process:
        complete(config.output_dir)
    accelerator.wait_for_everyone()
    resume = find_resume(config, accelerator.print)
    if resume is not None and is_finished(config, resume, photos, accelerator.num_processes):
        accelerator.print(f"{config.output_dir} is finished ({resume.name}); nothing was changed. "
                          "Give more --max_train_steps to go on.")
        if config.push_to_hub and accelerator.is_main_process:
            push(config)
        return Path(config.output_dir) / LORA_FILE
    folder = place(config.output_dir, resume)
    prepare_folder(config, accelerator, resume, folder)
    try:
        with tf32(config.allow_tf32):
            return Run(config, accelerator, photos, callback, folder).go(resume, should_stop)
    except OSError as error:
        if not is_of_files(error):
            raise
        raise checkpoint.CheckpointError(f"the run has stopped: {getattr(error, 'fault', error)}. "
                                         f"{checkpoint.last_good(folder)}; put this right, then "
                                         "--resume_from_checkpoint latest") from error
    except torch.OutOfMemoryError as error:
        from dbcore.engines.memory import remedy  # what it traces with takes a while to import

        raise MemoryFull(f"the run has stopped: the memory of the {accelerator.device.type} "
                         f"device is full. {remedy(config, accelerator.device.type)}. "
                         f"{checkpoint.last_good(folder)}; give the same command with these "
                         "options and --resume_from_checkpoint latest") from error


@contextlib.contextmanager
def tf32(allowed):
    """TensorFloat-32 products within the block, if they are asked for; then the process has its own
    choice again."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn) if allowed else ()
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        yield
    finally:
        for switch, was in zip(switches, before):
            switch.allow_tf32 = was


class Run:
    """One run: what is trained, with what, and where it is written."""

    def __init__(self, config, accelerator, photos, callback=None, folder=None):
        self.accelerator, self.callback, self.began = accelerator, callback, time.monotonic()
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.folder = Path(folder or config.output_dir)
        self.config = config
        self.base = load_base(config.pretrained_model_name_or_path, config.revision, config.variant,
                              config.tokenizer_name, accelerator.device,
                              torch_dtype(config.mixed_precision),
                              config.tokenizer_max_length, config.low_vram)
        self.data = DreamBoothData(config, photos, self.make_class_photos())
        refuse_shared(self.data.photos, self.data.class_photos)
        self.config = self.data.config = with_lengths(config, self.data.steps_per_epoch(self.world))
        say_too_short(self.config, accelerator.print)
        self.circumstances = circumstances(self.config, photos, self.data.class_photos, self.world)
        self.notes = {"base": Path(self.base.name).name, "trigger_words": config.instance_prompt}
        # losses that have not been looked at; steps in a row that changed nothing
        self.pending, self.skips = [], 0

    # --- before the loop --------------------------------------------------------------------------

    def make_class_photos(self):
        c = self.config
        if not c.with_prior_preservation:
            return []
        folder = own_folder(c) or self.make_class_images()
        photos, problems = class_photos(folder, c)
        for problem in problems:
            if problem.skipped:
                self.accelerator.print(f"  class picture {problem}")
        if len(photos) < c.num_class_images:
            self.accelerator.print(f"{folder} holds {len(photos)} class pictures of "
                                   f"{c.num_class_images} asked for: these are used.")
        return photos

    def make_class_images(self):
        base = self.base
        apart = self.config.prior_generation_precision != self.config.mixed_precision
        if apart:
            base = load_base(base.name, base.revision, base.variant, self.config.tokenizer_name,
                             base.device,
                             torch_dtype(self.config.prior_generation_precision),
                             low_vram=base.low_vram)
        with replayed(base.denoiser):
            folder = class_images(base, self.config, self.rank, self.world,
                                  self.accelerator.wait_for_everyone,
                                  lambda batches: self.bar(batches, desc="class images"))
        if base.low_vram:
            base.release("denoiser")  # so that it is not there while photos are encoded
        return folder

    def prepare(self):
        """What is trained, and with what."""
        self.trained = start_training(self.base, self.inject(), self.config, self.world)
        self.predict = self.faster(self.base.predict)

    def inject(self):
        """{name: network} of what is trained: LoRAs; everything else stays frozen."""
        return inject(self.base, self.config)

    def faster(self, predict):
        """The same function of the denoiser, compiled if that was asked for, else without Python
        where that can be."""
        if self.config.compile:
            return torch.compile(predict)
        return Replay(predict, self.base.denoiser) if can_replay(self.base.denoiser) else predict

    def encode_ahead(self, start):
        """Latents and embeddings of everything the steps to come will meet; then the encoders are
        let go."""
        c = self.config
        if c.pre_compute_text_embeddings and not c.train_text_encoder:
            self.base.remember([*self.data.prompts(), *c.validation_prompt, *report_prompts(c), ""])
            self.base.release("text_encoders")
        if c.cache_latents:
            for step in self.bar(range(start, c.max_train_steps), desc="encoding photos"):
                self.data.encode(self.base, self.batch_samples(step))
            if not c.validation_prompt:
                self.base.release("autoencoder")

    def bar(self, items, **words):
        """A progress bar, of the first process alone, and of none where TQDM_DISABLE is set."""
        return tqdm(items, disable=self.rank > 0 or bool(os.environ.get("TQDM_DISABLE")), **words)

    def batch_samples(self, step):
        return [sample for micro in range(self.config.gradient_accumulation_steps)
                for sample in self.data.samples(step, micro, self.rank, self.world)]

    # --- the loop ---------------------------------------------------------------------------------

    def go(self, resume, should_stop):
        c, start = self.config, checkpoint.steps_done(resume) if resume else 0
        # before there is a denoiser, so that it and the encoders are not in memory together
        self.encode_ahead(start)
        self.prepare()
        if resume is not None:
            checkpoint.load_checkpoint(resume, self.trained)
            say_changes(checkpoint.circumstances_of(resume), self.circumstances, c,
                        self.accelerator.print)
            self.accelerator.print(f"Resuming from {resume.name}: "
                                   f"step {start} of {c.max_train_steps}.")
        self.log = Log(self.folder, start, self.rank, resume.parent if resume else self.folder)
        self.start_trackers()
        with Signals() as signals:
            self.loop(start, lambda: signals.caught or bool(should_stop()))
        return self.finish()

    def loop(self, start, should_stop):
        c = self.config
        bar = self.bar(range(start, c.max_train_steps), initial=start, total=c.max_train_steps,
                       desc="steps")
        for step in bar:
            record = self.step(step)
            done = step + 1
            self.pending.append(record)
            last = done == c.max_train_steps
            stop = agree(should_stop(), self.base.device, self.world)
            save, draw = done % c.checkpointing_steps == 0 or last or stop, self.validates(done)
            if self.base.device.type != "cuda" or done % SYNC_EVERY == 0 or save or draw:
                bar.set_postfix(loss=f"{self.look():.4f}")
            if draw:
                self.validate_or_keep(done)
            if save:
                self.save(done)
            if stop and not last:
                raise Interrupted(f"Stopped after step {done} of {c.max_train_steps}; "
                                  f"checkpoint-{done} is saved in {self.folder}. "
                                  "Go on with --resume_from_checkpoint latest.")

    def step(self, step):
        """One optimizer step over all its batches; returns its record for the log, still on the
        device."""
        c = self.config
        rates, records = self.trained.set_rates(step), []
        for micro in range(c.gradient_accumulation_steps):
            samples = self.data.samples(step, micro, self.rank, self.world)
            batch = self.data.batch(self.base, samples, step)
            x_t = self.base.process.corrupt(batch["x0"], batch["noise"], batch["t"])
            target = self.base.process.target(batch["x0"], batch["noise"], batch["t"])
            if c.lora_dropout:
                set_dropout(self.trained.modules,
                            [key(c.seed, ("class " if s.is_class else "") + "dropout", step,
                                                       s.number) for s in samples])
            prediction = self.predict(x_t, batch["t"], self.encode(batch["prompts"], step),
                                      batch["geometry"])
            weight = self.base.process.weight(batch["t"], c.snr_gamma)
            loss, losses = dreambooth_loss(prediction, target, batch["mask"], weight,
                                           c.train_batch_size, c.prior_loss_weight)
            self.trained.scaler.scale(loss / c.gradient_accumulation_steps).backward()
            records.append((loss.detach(), batch["t"], losses))
        average_gradients(self.trained.parameters, self.world)
        skipped = self.trained.update(self.trained.clip(c.max_grad_norm))
        self.trained.average_weights(c.ema_decay)
        loss, t, losses = gather(*map(torch.stack, zip(*records)), c.train_batch_size, self.world)
        return {"step": step + 1, "loss": loss.mean(), "lr": rates, "timesteps": t.flatten(),
                "losses": losses.flatten(),
                "skipped": skipped}

    def encode(self, prompts, step):
        """Embeddings of a batch; with gradients while the text encoder is being trained."""
        c = self.config
        with torch.set_grad_enabled(c.train_text_encoder
                                    and step < c.train_text_encoder_frac * c.max_train_steps):
            return self.base.encode_prompts(prompts)

    # --- between steps ----------------------------------------------------------------------------

    def look(self):
        """Read the losses of the steps since the last look, log them, and stop if one is no
        number."""
        for record in self.pending:
            record = {name: value.tolist() if torch.is_tensor(value) else value
                      for name, value in record.items()}
            if not math.isfinite(record["loss"]):
                self.pending.clear()
                raise Diverged(self.blame(f"the loss is {record['loss']} at", record["step"],
                                          record["lr"]))
            self.count_skipped(record)
            self.log.write(record)
            if self.accelerator.trackers:
                self.accelerator.log({"loss": record["loss"], "lr": record["lr"]},
                                     step=record["step"])
            self.tell(step=record["step"], steps=self.config.max_train_steps, loss=record["loss"],
                      lr=record["lr"])
        self.pending.clear()
        return record["loss"]

    def count_skipped(self, record):
        """Say so where a step changed nothing, mark it in its record, and stop after `SKIPS` in a
        row."""
        if not record.pop("skipped"):
            self.skips = 0
            return
        record["skipped"], self.skips = True, self.skips + 1
        self.accelerator.print(f"Step {record['step']} changed nothing: "
                               "a gradient was not a number.")
        if self.skips == SKIPS:
            self.pending.clear()
            raise Diverged(self.blame(f"gradients were no numbers {SKIPS} times in a row, up to",
                                      record["step"], record["lr"]))

    def blame(self, what, step, rate):
        # the weights after a step are proved by the next step's loss
        good = [path for done, path in checkpoint.checkpoints(self.folder) if done < step - 1]
        cause = ("fp16 has overflowed: try --mixed_precision bf16 or "
                 "no" if self.config.mixed_precision == "fp16" else
                 "the learning rate is too high: try a third of it")
        last = f"{good[-1].name} is good" if good else "no checkpoint was saved before"
        return f"{what} step {step} (learning rate {rate:g}); most likely {cause}. {last}."

    def tell(self, **what):
        if self.callback and self.rank == 0:
            self.callback({**what, "seconds": self.seconds()})

    def seconds(self):
        """That the run has taken, its earlier parts included."""
        return self.trained.seconds + time.monotonic() - self.began

    def validates(self, done):
        return bool(self.config.validation_prompt) and done % self.config.validation_steps == 0

    def validate_or_keep(self, done):
        """`validate`; where that fills the memory, the steps until then are saved before it ends
        the run."""
        try:
            self.validate(done)
        except torch.OutOfMemoryError:
            give_back()
            self.save(done)
            raise

    def validate(self, done):
        """Draw every validation prompt with the modules in memory; only the first process does."""
        c = self.config
        if self.rank == 0:
            seeds = [c.seed + k for k in range(c.num_validation_images)]
            prompts = [prompt for prompt in c.validation_prompt for _ in seeds]
            with self.trained.averaged():
                drawn = self.base.draw(prompts, seeds * len(c.validation_prompt),
                                       resolution=c.resolution, stream="validation")
            rows = [drawn[k:k + len(seeds)] for k in range(0, len(drawn), len(seeds))]
            save_validation(self.folder / "validation" / f"step-{done:06d}", c.validation_prompt,
                            rows, done)
            self.tell(step=done, pictures=dict(zip(c.validation_prompt, rows)))
            self.track(dict(zip(c.validation_prompt, rows)), done)
        self.accelerator.wait_for_everyone()

    def track(self, pictures, done):
        """Validation pictures into the tracker, under their prompt."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({prompt: np.stack(row) for prompt, row in pictures.items()},
                               step=done, **layout)

    def save(self, done):
        if not all(p.isfinite().all() for p in self.trained.parameters):
            rate = self.trained.optimizer.param_groups[0]["lr"]
            raise Diverged(self.blame("the LoRA's weights are no longer numbers after", done, rate))
        if self.rank == 0:
            self.trained.seconds = self.seconds()
            self.began = time.monotonic()
            checkpoint.save_checkpoint(self.folder, self.trained, self.notes, self.circumstances,
                                       self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def finish(self):
        """The LoRA under its final name, then the report; the first process writes."""
        output_dir = Path(self.config.output_dir)
        if self.rank == 0:
            with self.trained.averaged():
                save_lora(self.trained.modules, self.folder / LORA_FILE, self.notes)
                evidence = write_report(self.trained.modules, self.draw_for_report, self.config,
                                        self.folder, self.log.records, self.trained.seconds)
            if self.folder != output_dir:
                replace_run(output_dir)
            print(evidence.verdict())
            if self.config.push_to_hub:
                push(self.config)
        if self.accelerator.trackers:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        return output_dir / LORA_FILE

    def draw_for_report(self, prompts, seeds):
        return self.base.draw(prompts, list(seeds), resolution=self.config.resolution)

    def start_trackers(self):
        values = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)
                  if f.name != "hub_token"}
        self.accelerator.init_trackers("dbcore", config={
            name: value if isinstance(value, (int, float, bool)) else shown(value)
            for name, value in values.items()})


# --- setting up -----------------------------------------------------------------------------------


def with_lengths(config, steps_per_epoch):
    """`config` with its length and its validations in steps."""
    steps = config.max_train_steps or (config.num_train_epochs or 0) * steps_per_epoch or STEPS
    every = (config.validation_steps or (config.validation_epochs or 0) * steps_per_epoch
             or max(1, steps // VALIDATIONS))
    return dataclasses.replace(config, max_train_steps=steps, num_train_epochs=None,
                               validation_steps=every, validation_epochs=None)


def say_too_short(config, say):
    """A line for each option that wants a longer run than this is."""
    steps = config.max_train_steps
    if config.lr_warmup_steps >= steps:
        say(f"--lr_warmup_steps {config.lr_warmup_steps}: the run has {steps} steps, "
            f"so the learning rate never reaches {config.learning_rate:g}. "
            f"Give fewer, such as {steps // 10}.")
    if config.validation_prompt and config.validation_steps > steps:
        say(f"--validation_steps {config.validation_steps}: the run has {steps} steps, so nothing "
            f"is generated before its end. Give fewer, such as {max(1, steps // VALIDATIONS)}.")


def tracker(config):
    """accelerate's name of the tracker, or None; TensorBoard, which nobody asked for by name, may
    be missing."""
    import importlib.util

    if config.report_to == "wandb":
        optional("wandb", "--report_to wandb")
        return "wandb"
    if config.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        print("TensorBoard is not installed (pip install tensorboard); "
              "the run is logged in log.jsonl alone.")
        return None
    return None if config.report_to == "none" else config.report_to


def find_resume(config, say):
    """The checkpoint to go on from, or None.

    Refuses one of another shape, and a folder with another run in it.
    """
    folder, resume = Path(config.output_dir), None
    if config.resume_from_checkpoint:
        resume = checkpoint.find_checkpoint(home(folder), config.resume_from_checkpoint)
    if resume is not None:
        compare(config, resume, say)
    if not goes_on(place(folder, resume), resume):
        need(config.overwrite_output_dir or not holds_run(folder),
             f"--output_dir {folder} holds a run already: choose another folder, "
             "give --resume_from_checkpoint latest to go on with it, "
             "or --overwrite_output_dir to replace it")
        theirs = [name for name in WRITTEN if (folder / name).exists()]
        need((folder / "config.yaml").is_file() or not theirs,
             f"--output_dir {folder} is not the folder of a run, and its {', '.join(theirs)} would "
             "be overwritten: choose another folder")
    return resume




def is_finished(config, resume, photos, world):
    """Whether the checkpoint to go on from has all the steps that are asked for, and their LoRA and
    report stand."""
    folder, data = Path(config.output_dir), DreamBoothData(config, photos)
    there = goes_on(folder, resume) and (folder / LORA_FILE).is_file()
    steps = with_lengths(config, data.steps_per_epoch(world)).max_train_steps
    return (there and (folder / "README.md").is_file()
            and checkpoint.steps_done(resume) >= steps)


class Log:
    """log.jsonl: one record a step.

    A resumed run takes over those up to its checkpoint, from `source`'s log.
    """

    def __init__(self, folder, start, rank, source):
        self.path, self.rank = folder / "log.jsonl", rank
        self.records = ([r for r in self.read(source / "log.jsonl") if r["step"] <= start] if start
                        else [])
        if rank == 0:
            write_whole(self.path, "".join(json.dumps(r) + "\n" for r in self.records))

    def read(self, path):
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that a kill cut short
                    yield json.loads(line)

    def write(self, record):
        self.records.append(record)
        if self.rank == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


class Signals:
    """Ctrl-C and SIGTERM (a cluster's or Colab's time-out) end the run after the step; a second one
    at once."""

    def __init__(self):
        self.caught = False

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {name: signal.signal(name, self.catch)
                           for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True

    def __exit__(self, *error):
        for name, handler in self.before.items():
            signal.signal(name, handler)


def save_validation(folder, prompts, rows, step):
    """Each picture, and the grid of all; the folder appears whole."""
    from dbcore.utils.grids import save_grid  # matplotlib, which the first step need not wait for

    with whole_folder(folder) as partial:
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                image.save(partial / f"{y}-{x}.png")
        save_grid(partial / "grid.png", rows, prompts, title=f"step {step}")


def push(config):
    """Upload the LoRA and its card, but not config.yaml, which holds this machine's paths.

    The token comes from the login, or from `hub_token`, and is never shown.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=config.output_dir,
                          commit_message="Trained LoRA",
                          allow_patterns=[LORA_FILE, "README.md", "report/*",
                                          "validation/*/grid.png"])
    except Exception as error:  # noqa: BLE001
        # a network fails in many ways, and the LoRA is safe in all of them
        reason = (str(error).replace(config.hub_token or "\0", "***").splitlines()
                  or [type(error).__name__])[0]
        raise ConfigError(f"--push_to_hub: {name} could not be uploaded ({reason}); "
                          f"the LoRA is safe in {config.output_dir}. Log in with `hf auth login`, "
                          "then the same command with --resume_from_checkpoint "
                          "latest uploads it") from None
    print(f"Uploaded to {url}.")
