"""Training: set up, then the loop.

photos -> class images -> latents and embeddings, once -> LoRA -> steps -> one file, and a report.
Processes (accelerate) take parts of one batch and average the LoRA's gradients; there is no other
state between them. All that is not the steps themselves is a callback (callbacks.py).
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from PIL import Image

from dbcore.config import TrainConfig
from dbcore.datasets.dreambooth import DreamBoothData, Sample, refuse_shared
from dbcore.datasets.photos import Photo, describe_buckets, gather_photos
from dbcore.datasets.prompts import check_abstraction, check_fit, check_identifier, texts_of
from dbcore.datasets.store import PromptCache
from dbcore.engines import checkpoint
from dbcore.engines.callbacks import (
    Callback,
    Checkpoints,
    Divergence,
    Log,
    Notify,
    Result,
    Tracker,
    Validation,
    tracker_of,
)
from dbcore.engines.hub import push
from dbcore.engines.lengths import resolve_lengths, say_too_short
from dbcore.engines.losses import batch_loss
from dbcore.engines.prior import gather_class
from dbcore.engines.processes import (
    PATIENCE,
    agree,
    average_gradients,
    check_launch,
    gather,
    share_weights,
)
from dbcore.engines.report import report_prompts
from dbcore.engines.resume import circumstances, find_resume, is_finished, say_changes
from dbcore.engines.run_folder import LORA_FILE, complete, held, place, prepare_folder
from dbcore.engines.trained import PACKAGES, Modules, inject, optional, start_training
from dbcore.models import embeddings
from dbcore.models.base import (
    Family,
    best_device,
    load_base,
    resolve,
    torch_dtype,
    without_bf16,
)
from dbcore.models.lora import adapters_off, set_dropout
from dbcore.models.replay import faster
from dbcore.models.tlora import NOTE
from dbcore.utils.console import printable, progress
from dbcore.utils.errors import Interrupted, MemoryFull
from dbcore.utils.files import is_of_files
from dbcore.utils.seeding import key
from dbcore.utils.signals import Signals

CHOSEN = ("resolution", "rank", "learning_rate", "lora_layers", "train_batch_size",
          "mixed_precision")  # options that are told before the run
SYNC_EVERY = 10  # steps between readings of the loss on a GPU, which waits for it each time
COMPILE_FROM = 1000  # steps that may win back the minute, or minutes, of compiling


def train(config: TrainConfig, callback: Callable[[dict[str, Any]], Any] | None = None,
          should_stop: Callable[[], Any] | None = None) -> Path:
    """Teach the base a subject as `config` (TrainConfig) says; returns the path of the LoRA file.

    `callback`: called after each step with {"step", "steps", "loss", "lr", "seconds"}, and after a
    validation with {"step", "images": {prompt: [PIL images]}, "seconds"}. `should_stop()`: True
    ends the run after the step. Raises ConfigError (also for data), CheckpointError, Interrupted
    after Ctrl-C, SIGTERM or `should_stop`, Diverged when the loss is no longer a number, and
    MemoryFull.
    """
    with printable():
        config, accelerator, photos = check(config)
        lock = held(config.output_dir) if accelerator.is_main_process else contextlib.nullcontext()
        with lock:
            return train_in_folder(config, accelerator, photos, callback, should_stop or bool)


def check(config: TrainConfig) -> tuple[TrainConfig, Accelerator, list[Photo]]:
    """(config without any `auto`, Accelerator, photos): all that needs no network is looked at."""
    config.check()
    if config.prior_prediction:
        check_identifier(config.instance_prompt, str(config.class_prompt))
    check_launch()
    if config.optimizer in PACKAGES:  # now, and not after the class images are made
        optional(PACKAGES[config.optimizer], f"--optimizer {config.optimizer}")
    accelerator = make_accelerator(config)
    config = without_bf16(resolve(config, accelerator.device), accelerator.device)
    chosen = ", ".join(f"{name} {getattr(config, name)}" for name in CHOSEN)
    accelerator.print(f"Chosen for this base and machine: {chosen}.")
    photos, problems = gather_photos(config.instance_data_dir, use_masks=config.use_masks,
                                     buckets=config.buckets)
    for problem in problems:
        accelerator.print(f"  {problem}")
    if config.aspect_ratio_buckets:
        accelerator.print(describe_buckets(photos, config.buckets))
    base = load_base(config.pretrained_model_name_or_path, config.revision,
                     tokenizer_name=config.tokenizer_name,
                     tokenizer_max_length=config.tokenizer_max_length)  # for its tokenizers
    if config.train_text_encoder_ti:
        check_abstraction(config, photos)
        embeddings.name_tokens(base, config.token_abstraction,
                               config.num_new_tokens_per_abstraction)
    check_fit(base, texts_of(config, photos), config.instance_prompt, config.class_prompt,
              accelerator.print)
    return config, accelerator, photos


def make_accelerator(config: TrainConfig) -> Accelerator:
    logs = Path(config.output_dir, config.logging_dir)
    project = ProjectConfiguration(config.output_dir, logging_dir=str(logs))
    # several processes on CPUs are a group only if accelerate is told that CPUs are meant
    on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and best_device() == "cpu"
    return Accelerator(cpu=on_cpus, mixed_precision="no", log_with=tracker_of(config),
                       project_config=project,
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def train_in_folder(config: TrainConfig, accelerator: Accelerator, photos: list[Photo],
                    callback: Callable | None, should_stop: Callable[[], Any]) -> Path:
    """`train`, once the options and photos are good and no other run has the folder."""
    output_dir, say = Path(config.output_dir), accelerator.print
    if accelerator.is_main_process:
        complete(output_dir)
    accelerator.wait_for_everyone()
    resume = find_resume(config, say)
    asked, config = config, resolve_lengths(config, len(photos), accelerator.num_processes)
    if resume and is_finished(config, resume):
        say(f"{output_dir} is finished ({resume.name}); nothing was changed. "
            "Give more --max_train_steps to go on.")
        if config.push_to_hub and accelerator.is_main_process:
            push(config)
        return output_dir / LORA_FILE
    folder = place(output_dir, resume)
    prepare_folder(asked, accelerator, resume, folder)
    say_too_short(config, say)
    with explained(config, accelerator.device.type, folder), tf32(config.allow_tf32):
        callbacks = make_callbacks(accelerator, callback)
        Run(config, accelerator, photos, folder, callbacks, resume).train(should_stop)
    return output_dir / LORA_FILE


def make_callbacks(accelerator: Accelerator, function: Callable | None = None) -> list[Callback]:
    """What follows a usual run, in the order in which it is called."""
    notify = [Notify(function)] if function else []
    tracker = [Tracker()] if accelerator.log_with else []
    return [Divergence(), Log(), *notify, Validation(), Checkpoints(), Result(), *tracker]


@contextlib.contextmanager
def explained(config: TrainConfig, device: str, folder: Path) -> Iterator[None]:
    """A full disk or a full memory ends the block with what is left and what to do."""
    try:
        yield
    except OSError as error:
        if not is_of_files(error):
            raise
        raise checkpoint.CheckpointError(
            f"the run has stopped: {getattr(error, 'fault', error)}. "
            f"{checkpoint.last_good(folder)}; put this right, then "
            "--resume_from_checkpoint latest") from error
    except torch.OutOfMemoryError as error:
        from dbcore.engines.advice import remedy  # what it traces with takes a while to import

        raise MemoryFull(
            f"the run has stopped: the memory of the {device} device is full. "
            f"{remedy(config, device)}. {checkpoint.last_good(folder)}; give the same command "
            "with these options and --resume_from_checkpoint latest") from error


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TensorFloat-32 products in the block, if asked for; then the switches are as they were."""
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
    """One run: a base, its data, what is trained, and the callbacks that follow it.

    `config`: a TrainConfig with every value resolved. `resume`: a checkpoint's folder, or None.
    `inject(base, config)`: puts on the base what is trained; returns {name: network}.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, photos: list[Photo],
                 folder: str | Path, callbacks: list[Callback], resume: Path | None = None,
                 inject: Callable[[Family, TrainConfig], Modules] = inject):
        self.began = time.monotonic()
        self.config, self.accelerator, self.callbacks = config, accelerator, callbacks
        self.folder, self.resume = Path(folder), resume
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main, self.say = accelerator.is_main_process, accelerator.print
        self.stopping = False
        self.pending: list[dict[str, Any]] = []  # steps whose losses were not read yet
        self.base = load_base(
            config.pretrained_model_name_or_path, config.revision, config.variant,
            config.tokenizer_name, accelerator.device, torch_dtype(config.mixed_precision),
            config.tokenizer_max_length, config.low_vram)
        class_photos = gather_class(self.base, config, accelerator)
        self.data = DreamBoothData(config, photos, class_photos)
        self.prompts = PromptCache(self.base)
        refuse_shared(photos, class_photos)
        self.circumstances = circumstances(config, photos, class_photos, self.world)
        self.notes = {"base": Path(self.base.name).name, "trigger_words": config.instance_prompt}
        if config.use_tlora:
            self.notes[NOTE] = str(config.tlora_alpha)
        if config.train_text_encoder_ti:
            self.notes[embeddings.NOTE] = config.token_abstraction
        # before there is a denoiser, so that it and the encoders are not in memory together
        self.encode_ahead(checkpoint.steps_done(resume) if resume else 0)
        self.trained = start_training(self.base, inject(self.base, config), config, self.world)
        share_weights(self.trained.parameters, self.world)
        self.predict = faster(self.base.predict, self.base.denoiser, self.compiles(),
                              config.gradient_accumulation_steps, len(self.data.photos_of))
        if resume is not None:
            self.load(resume)

    def encode_ahead(self, start: int) -> None:
        """Latents and embeddings of all that the steps from `start` on meet, once.

        Then the encoders that are needed no more are let go.
        """
        c, steps = self.config, range(start, self.config.max_train_steps)
        if c.pre_compute_text_embeddings and not c.trains_text:
            self.encode_prompts(start)
            self.base.release("text_encoders")
        if c.cache_latents:
            for step in progress(steps, self.is_main, desc="encoding photos"):
                self.data.encode(self.base, self.all_samples(step))
            if not c.validation_prompt:
                self.base.release("autoencoder")

    def encode_prompts(self, start: int) -> None:
        """Embeddings of all prompts that the steps from `start` on meet, once."""
        c = self.config
        met = (sample.prompt for step in range(start, c.max_train_steps)
               for sample in self.all_samples(step))
        self.prompts.add([*met, *c.validation_prompt, *report_prompts(c), ""])

    def compiles(self) -> bool:
        """Whether to compile: it is asked for, and the run is long enough to gain by it."""
        c = self.config
        if c.compile and c.max_train_steps < COMPILE_FROM:
            self.say(f"--compile: {c.max_train_steps} steps would not win back the time that "
                     f"compiling takes, {COMPILE_FROM} may; nothing is compiled.")
        return c.compile and c.max_train_steps >= COMPILE_FROM

    def load(self, resume: Path) -> None:
        c = self.config
        checkpoint.load_checkpoint(resume, self.trained)
        say_changes(checkpoint.circumstances_of(resume), self.circumstances, c, self.say)
        self.say(f"Resuming from {resume.name}: step {self.trained.step} of {c.max_train_steps}.")

    # --- the loop ---------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], Any]) -> None:
        """All steps that are left. Raises Interrupted after a signal, or if `should_stop()`."""
        self.notify("before_train")
        with Signals() as signals:
            self.loop(lambda: signals.caught or bool(should_stop()))
        self.notify("after_train")
        self.accelerator.wait_for_everyone()

    def loop(self, should_stop: Callable[[], bool]) -> None:
        start, end = self.trained.step, self.config.max_train_steps
        bar = progress(range(start, end), self.is_main, initial=start, total=end, desc="steps")
        for step in bar:
            self.pending.append(self.step(step))
            waits = self.base.device.type != "cuda" or (step + 1) % SYNC_EVERY == 0
            if waits or self.world == 1:  # several processes wait for their GPUs to agree
                self.stopping = agree(should_stop(), self.base.device, self.world)
            if waits:
                bar.set_postfix(loss=f"{self.flush_log():.4f}")
            self.after_step()
            if self.stopping and step + 1 < end:
                raise Interrupted(
                    f"Stopped after step {step + 1} of {end}; checkpoint-{step + 1} is saved in "
                    f"{self.folder}. Go on with --resume_from_checkpoint latest.")
        self.flush_log()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step over all its batches; returns its record, still on the device."""
        c, rate = self.config, self.trained.set_rates(step)
        if not c.trains_text_at(step):
            self.keep_tokens(step)
        records = [self.backward(step, micro) for micro in range(c.gradient_accumulation_steps)]
        average_gradients(self.trained.parameters, self.world)
        skipped = self.trained.update(self.trained.clip(c.max_grad_norm))
        self.trained.average_weights(c.ema_decay)
        loss, t, losses = (torch.stack(column) for column in zip(*records))
        loss, t, losses = gather(loss, t, losses, c.train_batch_size, self.world)
        return {"step": step + 1, "loss": loss.mean(), "lr": rate, "timesteps": t.flatten(),
                "losses": losses.flatten(), "skipped": skipped}

    def backward(self, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add one batch's gradients; returns (its loss, timesteps, each sample's loss)."""
        c, samples = self.config, self.samples(step, micro)
        batch = self.data.batch(self.base, samples, step)
        if c.lora_dropout:
            set_dropout(self.trained.modules, [dropout_key(c.seed, step, s) for s in samples])
        cond = self.encode(batch["prompts"], step)
        loss, losses = batch_loss(self.base.process, batch, cond, self.predict, c,
                                  self.predict_frozen if c.prior_prediction else None)
        self.trained.scaler.scale(loss / c.gradient_accumulation_steps).backward()
        return loss.detach(), batch["t"], losses

    def samples(self, step: int, micro: int) -> list[Sample]:
        """This process's samples of one batch."""
        return self.data.samples(step, micro, self.rank, self.world)

    def all_samples(self, step: int) -> list[Sample]:
        """This process's samples of all batches of a step."""
        batches = range(self.config.gradient_accumulation_steps)
        return [sample for micro in batches for sample in self.samples(step, micro)]

    def encode(self, prompts: list[str], step: int) -> dict[str, torch.Tensor]:
        """Embeddings of a batch; with gradients while they are being trained."""
        with torch.set_grad_enabled(self.config.trains_text_at(step)):
            return self.prompts.encode(prompts)

    def keep_tokens(self, step: int) -> None:
        """New tokens stay as they are from this step on, so prompts can be encoded ahead.

        With a running mean of the weights they cannot, which takes the tokens' place in images.
        """
        learnt = [part for part in self.trained.tokens if part.rows.requires_grad]
        for part in learnt:
            part.requires_grad_(False)
        if learnt and self.config.pre_compute_text_embeddings and self.trained.mean is None:
            self.encode_prompts(step)

    @torch.no_grad()
    def predict_frozen(self, x_t: torch.Tensor, t: torch.Tensor, prompts: list[str],
                       geometry: torch.Tensor) -> torch.Tensor:
        """As `Family.predict`, without what is trained: of strings, whose encoder may be too."""
        with adapters_off(self.trained.modules):
            return self.base.predict(x_t, t, self.prompts.encode(prompts), geometry)

    # --- between steps ----------------------------------------------------------------------

    def notify(self, moment: str, *what: Any) -> None:
        """Call each callback's method of that name."""
        for callback in self.callbacks:
            getattr(callback, moment)(self, *what)

    def after_step(self) -> None:
        try:
            self.notify("after_step")
        except Exception as error:
            self.notify("on_error", error)
            raise

    def flush_log(self) -> float | None:
        """Read the losses that are still on the device, and log them; returns the last one."""
        pending, self.pending = self.pending, []
        record = {}
        for record in map(to_numbers, pending):
            self.notify("on_log", record)
        return record.get("loss")

    def generate(self, prompts: list[str], seeds: Iterable[int], **more: Any) -> list[Image.Image]:
        """PIL images with the modules as they are, one for each (prompt, seed) pair."""
        return self.base.generate(prompts, list(seeds), resolution=self.config.resolution,
                                  encode=self.prompts.encode, **more)

    def count_seconds(self) -> float:
        """Seconds that the run has taken, its earlier parts included."""
        now = time.monotonic()
        self.trained.seconds += now - self.began
        self.began = now
        return self.trained.seconds


def dropout_key(seed: int, step: int, sample: Sample) -> int:
    return key(seed, ("class " if sample.is_class else "") + "dropout", step, sample.number)


def to_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A step's record as JSON takes it; `skipped` is in it only where the step changed nothing."""
    numbers = {name: value.tolist() if torch.is_tensor(value) else value
               for name, value in record.items()}
    if not numbers["skipped"]:
        del numbers["skipped"]
    return numbers
