"""Every option, once: a field here is a CLI flag, a keyword argument, a YAML key and a row of the
model card.

Names are those of diffusers' DreamBooth scripts where they have one. `auto` means: it depends on
the base or the hardware; `dbcore.models.base.resolve` replaces it before training and the run
prints what it chose. Nothing heavy is imported, so that `--help` and a mistake in an option answer
at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dbcore.utils.errors import InputError
from dbcore.utils.files import write_whole
from dbcore.utils.text import replace_word

AUTO = "auto"
OPTIMIZERS = ("AdamW", "AdamW8bit", "AdamWScheduleFree", "Prodigy", "Adafactor")
PRECISIONS = (AUTO, "no", "fp32", "fp16", "bf16")  # no and fp32 are one
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts",
             "polynomial")
SECRETS = {"hub_token"}
OF_THE_TEXT_ENCODER = {  # what says nothing without another option
    "text_encoder_rank": "train_text_encoder", "train_text_encoder_frac": "train_text_encoder",
    "token_abstraction": "train_text_encoder_ti", "initializer_concept": "train_text_encoder_ti",
    "num_new_tokens_per_abstraction": "train_text_encoder_ti",
    "train_text_encoder_ti_frac": "train_text_encoder_ti",
}
# For the reader of types an option is what it is once `check` and `resolve` have been through.
if TYPE_CHECKING:
    AutoInt: TypeAlias = int
    AutoFloat: TypeAlias = float
    Asked: TypeAlias = str
    Steps: TypeAlias = int
else:
    AutoInt, AutoFloat, Asked, Steps = int | str, float | str, str | None, int | None
PATHS = ("pretrained_model_name_or_path", "tokenizer_name", "instance_data_dir", "class_data_dir",
         "output_dir")


class ConfigError(InputError):
    """An option that cannot be: names it, what was found, and what to do."""


def option(default: Any, help: str, choices: tuple[str, ...] | None = None,
           low: float | None = None,
           high: float | None = None, above: float | None = None, secret: bool = False) -> Any:
    """A field with its help, and the values it may take; a secret one is never shown."""
    rules = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=rules)
    return dataclasses.field(default=default, metadata=rules, repr=not secret)


@dataclass
class TrainConfig:
    """One training run. Lists of one may be given as the one value."""

    # The model
    pretrained_model_name_or_path: Asked = option(None, "the base: a folder or a name on the hub")
    revision: str | None = option(
        None, "branch, tag or commit of the base on the hub; a commit keeps a run repeatable")
    variant: str | None = option(None, "which files of the base, such as fp16, to save download")
    tokenizer_name: str | None = option(
        None, "another tokenizer than the base's own; rarely needed")
    # The data
    instance_data_dir: Asked = option(None, "folder of photos of the subject, 3 to 10 of them")
    instance_prompt: Asked = option(
        None, "the words that will call the subject, such as 'a photo of sks dog'; "
        "a photo's own caption wins")
    class_data_dir: str | None = option(
        None, "folder of class images: your own are used as they are, an empty one is filled; "
        "without it they are made once and kept in a cache")
    class_prompt: str | None = option(None, "the class in words, such as 'a photo of a dog'")
    resolution: AutoInt = option(
        AUTO, "side of the training images in pixels; auto is the base's own, lower it when memory "
        "runs out", low=8)
    aspect_ratio_buckets: str | None = option(
        None, "sizes in place of squares, as 'height,width;height,width', for photos that prepare "
        "did not crop: each goes to the nearest in shape, each batch is of one, class images are "
        "cropped to it; auto: shapes from 1:2 to 2:1 of as many pixels as resolution, which is "
        "still the side of generated images")
    center_crop: bool = option(
        False, "crop the middle instead of a random place along the longer side, when the subject "
        "is always there")
    random_flip: bool = option(
        False, "mirror photos at random; not for subjects whose sides differ")
    image_interpolation_mode: str = option(
        "lanczos", "how photos are resized; nearest for pixel art",
        ("nearest", "bilinear", "bicubic", "lanczos"))
    use_masks: bool = option(
        True, "learn only what dog.mask.png leaves white, where a photo has one")
    caption_dropout: float = option(
        0.0, "share of the photos that are shown without words for a step, so that the empty "
        "prompt of classifier-free guidance learns the subject too (arXiv 2207.12598)",
        low=0, high=1)
    shuffle_tags: bool = option(
        False, "a new order of a photo's comma-separated tags at each step, the first of them kept "
        "(kohya's shuffle_caption), so that none is tied to its place; each order is encoded ahead")
    # Prior preservation
    with_prior_preservation: bool = option(
        False, "also learn from images of the class, so that it stays as it is")
    prior_prediction: bool = option(
        False, "keep the class without images of it: each photo, with class_prompt in place of "
        "instance_prompt, is to be predicted as the base without LoRA predicts it (output "
        "preservation, learning without forgetting, arXiv 1606.09282)")
    prior_loss_weight: float = option(
        1.0, "lambda of the loss of the class images, or of prior_prediction; higher keeps the "
        "class better", low=0)
    num_class_images: int = option(
        100, "class images to have; more keep more of the class's variety", low=1)
    sample_batch_size: int = option(
        4, "class images made at a time; lower it when memory runs out", low=1)
    prior_generation_precision: str = option(
        AUTO, "precision in which they are made; no where they come out black", PRECISIONS)
    # The LoRA
    adapter: str = option(
        "lora", "what is trained: lora; oft, rotations that keep more of the base (arXiv "
        "2306.07280); lokr, the smallest file (arXiv 2309.14859); loha (arXiv 2108.06098). All but "
        "lora are for generate, evaluate and peft, lokr and loha exported for ComfyUI too, and for "
        "no pipeline of diffusers",
        ("lora", "oft", "lokr", "loha"))
    rank: AutoInt = option(
        AUTO, "rank r of the update B A, for oft the side of its blocks; more learns more detail "
        "and forgets more", low=1)
    lora_alpha: AutoFloat = option(
        AUTO, "the update is scaled by alpha / rank; auto is alpha = rank, less learns more gently",
        above=0)
    lora_dropout: float = option(
        0.0, "share of the LoRA's inputs dropped in training, against overfitting",
        low=0, high=0.99)
    use_dora: bool = option(
        False, "DoRA: learn magnitude and direction apart; slower (arXiv 2402.09353)")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank), for high ranks")
    use_tlora: bool = option(
        False, "T-LoRA: fewer ranks at noisier timesteps, where few photos are soonest learnt by "
        "heart (arXiv 2507.05964); other programs use all of them at each step")
    tlora_alpha: float = option(
        1.0, "exponent a: at t of T timesteps ((T - t) / T)^a (rank - 1) + 1 ranks are active; "
        "more leaves fewer", above=0)
    lora_layers: str = option(
        AUTO, "where it goes: attention; for more detail attention+ff or all (linear and "
        "convolution); or module names with commas")
    # The text encoder
    train_text_encoder: bool = option(
        False, "also put a LoRA on the text encoder; see text_encoder_lr")
    train_text_encoder_ti: bool = option(
        False, "pivotal tuning: learn vectors for new tokens <s0><s1> too, as textual inversion "
        "does (TI, arXiv 2208.01618); always beside the adapter, never alone")
    token_abstraction: str = option(
        "TOK", "the word that stands for them: wherever it is in a prompt or a caption, the new "
        "tokens are read in its place")
    num_new_tokens_per_abstraction: int = option(
        2, "how many new tokens; more tell more and leave other words less room", low=1)
    initializer_concept: str | None = option(
        None, "words whose vectors they begin as, such as dog; without it they begin at random")
    train_text_encoder_ti_frac: AutoFloat = option(
        AUTO, "leave them as they are after this fraction of the steps, when only the adapter "
        "learns on; auto is 0.5", above=0, high=1)
    text_encoder_lr: AutoFloat = option(
        AUTO, "its learning rate, or that of new tokens; auto is a tenth of learning_rate, for new "
        "tokens ten times it, as they have far to go", above=0)
    text_encoder_rank: AutoInt = option(
        AUTO, "its rank; auto is rank, lower it where words lose their meaning", low=1)
    train_text_encoder_frac: float = option(
        1.0, "stop training it after this fraction of the steps, as it overfits first",
        above=0, high=1)
    tokenizer_max_length: int | None = option(
        None, "cut prompts to this many tokens instead of the tokenizer's; rarely needed", low=3)
    # Optimisation
    learning_rate: AutoFloat = option(
        AUTO, "step size; auto is the base's recommendation, else 2e-4; higher where nothing is "
        "learnt, lower where images break up", above=0)
    scale_lr: bool = option(
        False, "multiply it by processes, batch and accumulation: it was meant for one photo a "
        "step")
    lr_scheduler: str = option(
        "constant", "how the rate goes on over the run; only a constant one can be extended later",
        SCHEDULES)
    lr_warmup_steps: int = option(
        0, "steps over which the rate rises from 0, when the first steps do harm", low=0)
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts", low=1)
    lr_power: float = option(1.0, "exponent of polynomial", above=0)
    train_batch_size: AutoInt = option(
        AUTO, "photos a step and process; auto is the base's recommendation, else 1; "
        "more is steadier and slower", low=1)
    gradient_accumulation_steps: int = option(
        1, "batches a step: a larger batch in the memory of a small one", low=1)
    max_train_steps: Steps = option(None, "steps; without it and num_train_epochs, 150", low=1)
    num_train_epochs: int | None = option(
        None, "passes over the photos; max_train_steps wins where both are given", low=1)
    optimizer: str = option(
        "AdamW", "AdamW8bit needs bitsandbytes, Prodigy prodigyopt (and learning_rate 1), "
        "AdamWScheduleFree schedulefree: it keeps a mean of the weights, which is saved, instead "
        "of lowering the rate (arXiv 2405.15682)",
        OPTIMIZERS)
    adam_beta1: float = option(
        0.9, "decay of the gradient's mean; rarely changed", low=0, high=0.9999)
    adam_beta2: float = option(
        0.999, "decay of its square's mean; rarely changed", low=0, high=0.99999)
    adam_weight_decay: float = option(
        1e-2, "pull of the LoRA's weights to 0, against overfitting", low=0)
    adam_epsilon: float = option(
        1e-8, "added to the denominator; more where gradients are tiny", above=0)
    max_grad_norm: float = option(
        1.0, "longer gradients are shortened to this; less where the loss jumps", above=0)
    snr_gamma: float | None = option(
        None, "min-SNR-gamma weighting of the loss, meant for quicker learning; 5 is usual "
        "(arXiv 2303.09556)", above=0)
    weighting_scheme: str = option(
        AUTO, "which levels of noise are trained on: none, each as often; logit_normal or mode, "
        "the middle more often (arXiv 2403.03206); auto as the base was trained",
        (AUTO, "none", "logit_normal", "mode"))
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 more noise, below 0 less")
    logit_std: float = option(1.0, "width of logit_normal; more reaches the ends", above=0)
    mode_scale: float = option(
        1.29, "scale of mode; more takes the middle more often, below 0 the ends",
        low=-1, high=1.75)
    noise_offset: float = option(
        0.0, "shift of the noise a channel, for darker and brighter images", low=0)
    use_ema: bool = option(
        False, "save the running mean of the LoRA's weights instead of the last ones, which jitter")
    ema_decay: float = option(
        0.99, "decay of that mean; 0.99 looks back some 100 steps", low=0, high=0.99999)
    seed: int = option(
        0, "of everything random; another one is another try, and 0 is one like any other")
    # Memory and speed
    mixed_precision: str = option(
        AUTO, "precision of the frozen base; auto is bf16 or fp16 on a GPU, no elsewhere",
        PRECISIONS)
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory; slower, on a GPU "
        "by far, as it runs without a CUDA graph")
    cache_latents: bool = option(True, "encode each photo once, before training")
    pre_compute_text_embeddings: bool = option(True, "encode each prompt once, before training")
    low_vram: bool = option(
        False, "keep the frozen UNet in 8 bits, checkpoint gradients, generate images one at a "
        "time: for a GPU that is too small without it (dbcore doctor tells); much slower there")
    allow_tf32: bool = option(False, "faster, coarser float32 products on NVIDIA GPUs since Ampere")
    compile: bool = option(
        False, "torch.compile the UNet in runs of 1000 steps and more: minutes of compiling, then "
        "faster steps")
    # Following the run
    validation_prompt: list[str] = option(
        [], "generate these during the run, to see how long to train")
    num_validation_images: int = option(
        4, "images a validation prompt; fewer are sooner done", low=1)
    validation_steps: Steps = option(
        None, "generate every this many steps; without it, five times a run", low=1)
    validation_epochs: int | None = option(
        None, "generate every this many passes over the photos", low=1)
    num_report_images: int = option(
        4, "images a prompt in the report at the end, without the LoRA and with it; "
        "0 makes none, where that takes longer than training", low=0)
    report_to: str = option(
        "tensorboard", "tracker, if it is installed; log.jsonl is always written",
        ("tensorboard", "wandb", "none"))
    logging_dir: str = option("logs", "folder of the tracker's files, within output_dir")
    # Keeping it
    output_dir: str = option("lora-dreambooth-model", "the run's folder")
    overwrite_output_dir: bool = option(False, "replace a finished run that is there")
    checkpointing_steps: int = option(
        500, "save what resuming needs every this many steps; a kill loses the rest", low=1)
    checkpoints_total_limit: int | None = option(
        None, "keep only the newest of them, to save room", low=1)
    resume_from_checkpoint: str | None = option(None, "latest, or a checkpoint's folder")
    push_to_hub: bool = option(False, "upload the LoRA and its card to the hub at the end")
    hub_model_id: str | None = option(None, "name there; without it, the name of output_dir")
    hub_token: str | None = option(
        None, "better left out: log in with `hf auth login`", secret=True)

    def __post_init__(self):
        coerce_and_check(self)

    def check(self) -> None:
        """Stop on contradictions, before any model is loaded. Raises ConfigError."""
        for name in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt"):
            need(str(getattr(self, name) or "").strip(),
                 f"--{name} is missing: {help_of(TrainConfig, name)}")
        self.check_prior()
        if self.aspect_ratio_buckets not in (None, AUTO):
            parse_buckets(self.aspect_ratio_buckets)
        for given in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            need(self.optimizer != "Adafactor"
                 or getattr(self, given) == getattr(TrainConfig, given),
                 f"--{given} does nothing with --optimizer Adafactor: leave it out")
        for given, scheme in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"),
                              ("mode_scale", "mode")):
            need(self.weighting_scheme == scheme
                 or getattr(self, given) == getattr(TrainConfig, given),
                 f"--{given} does nothing without --weighting_scheme {scheme}: "
                 "add that, or leave this out")
        self.check_text_encoder()
        need(self.validation_steps is None or self.validation_epochs is None,
             "--validation_steps and --validation_epochs both say how often: give one")
        for given in ("validation_steps", "validation_epochs"):
            need(self.validation_prompt or getattr(self, given) is None,
                 f"--{given} does nothing without --validation_prompt")
        free = self.optimizer != "AdamWScheduleFree"
        need(free or not self.use_ema,
             "--use_ema with --optimizer AdamWScheduleFree is a mean of a mean: leave it out")
        need(free or self.lr_scheduler.startswith("constant"),
             f"--lr_scheduler {self.lr_scheduler} with --optimizer AdamWScheduleFree, which needs "
             "no schedule: choose constant or constant_with_warmup")
        need(not self.lr_warmup_steps or self.lr_scheduler != "constant",
             "--lr_warmup_steps does nothing with --lr_scheduler constant: "
             "choose constant_with_warmup")
        for given in ("output_dir", "class_data_dir"):
            need(not is_within(getattr(self, given), self.instance_data_dir),
                 f"--{given} {getattr(self, given)} lies in --instance_data_dir, so its images "
                 "would be learnt as photos of the subject: choose a folder outside")
        need(self.class_data_dir is None
             or not is_within(self.instance_data_dir, self.class_data_dir),
             f"--class_data_dir {self.class_data_dir} has --instance_data_dir "
             f"{self.instance_data_dir} in it, so the subject would be learnt as its class: "
             "choose a folder of class images alone")
        need(not Path(self.class_data_dir or "").is_file(),
             f"--class_data_dir {self.class_data_dir} is a file: give a folder, which may "
             "be empty or new")
        need(self.class_data_dir is None or not is_within(self.output_dir, self.class_data_dir),
             f"--output_dir {self.output_dir} lies in --class_data_dir {self.class_data_dir}, "
             "so images of the subject would be learnt as its class: choose a folder outside")
        need(self.use_tlora or self.tlora_alpha == TrainConfig.tlora_alpha,
             "--tlora_alpha does nothing without --use_tlora: add that, or leave this out")
        need(not (self.use_tlora and self.use_dora),
             "--use_tlora with --use_dora is not defined: DoRA's magnitude is that of all ranks; "
             "leave one out")
        for given in ("use_dora", "use_rslora", "use_tlora", "lora_dropout"):
            need(self.adapter == "lora" or not getattr(self, given),
                 f"--{given} belongs to --adapter lora and does nothing with {self.adapter}: "
                 "leave it out")
        need(self.adapter != "oft" or self.lora_alpha in (AUTO, self.rank),
             f"--lora_alpha {self.lora_alpha} does nothing with --adapter oft, whose rotations "
             "have no scale: leave it out")
        need(not (self.use_dora and self.use_rslora and self.lora_layers == "all"),
             "--use_dora with --use_rslora on convolutions is not supported by peft: leave one out")
        need(not self.hub_model_id or self.push_to_hub,
             "--hub_model_id does nothing without --push_to_hub")
        need(not (self.hub_token and self.report_to == "wandb"),
             "--hub_token would be sent to Weights & Biases with the options: "
             "log in with `hf auth login` instead")

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) in pixels that training images may have, once no option is `auto`."""
        if self.aspect_ratio_buckets is None:
            return [(self.resolution, self.resolution)]
        return parse_buckets(self.aspect_ratio_buckets)

    def check_text_encoder(self) -> None:
        """Raises ConfigError where what it is to learn is in doubt."""
        need(self.trains_text or self.text_encoder_lr == AUTO,
             "--text_encoder_lr does nothing without --train_text_encoder or "
             "--train_text_encoder_ti: add one of them, or leave this out")
        for given, owner in OF_THE_TEXT_ENCODER.items():
            need(getattr(self, owner) or getattr(self, given) == getattr(TrainConfig, given),
                 f"--{given} does nothing without --{owner}: add that, or leave this out")
        if self.train_text_encoder_ti:
            self.check_new_tokens()

    def check_new_tokens(self) -> None:
        """Raises ConfigError where new tokens would not be learnt, or not by the subject alone."""
        word = self.token_abstraction
        need(not self.train_text_encoder, "--train_text_encoder_ti and --train_text_encoder both "
             "change what words mean: give one")
        need(re.fullmatch(r"\w+", word),
             f"--token_abstraction {word!r}: give one word, such as TOK")
        need(replace_word(word, "", str(self.instance_prompt)) != self.instance_prompt,
             f"--instance_prompt {self.instance_prompt!r} lacks {word}, which stands for the new "
             "tokens: put it there, or name another word by --token_abstraction")
        need(replace_word(word, "", self.class_prompt or "") == (self.class_prompt or ""),
             f"--class_prompt {self.class_prompt!r} has {word} in it, which stands for the new "
             "tokens of the subject: leave it out there")
        need(self.optimizer != "AdamWScheduleFree", "--train_text_encoder_ti with --optimizer "
             "AdamWScheduleFree: the mean that it keeps knows nothing of how new tokens are scaled "
             "after each step; choose another optimizer")

    @property
    def trains_text(self) -> bool:
        """Whether what prompts are encoded as changes in the run."""
        return self.train_text_encoder or self.train_text_encoder_ti

    def trains_text_at(self, step: int) -> bool:
        """Whether it still changes in a step, counted from 0; `max_train_steps` must be known."""
        share = (self.train_text_encoder_ti_frac if self.train_text_encoder_ti
                 else self.train_text_encoder_frac)
        return self.trains_text and step < share * self.max_train_steps

    def check_prior(self) -> None:
        """Raises ConfigError where what keeps the class is said in part, or twice."""
        for prior in ("with_prior_preservation", "prior_prediction"):
            need(self.class_prompt or not getattr(self, prior),
                 f"--{prior} needs --class_prompt, such as 'a photo of a dog'")
        need(not (self.with_prior_preservation and self.prior_prediction),
             "--with_prior_preservation and --prior_prediction both keep the class: give one")
        need(self.with_prior_preservation or not self.class_data_dir,
             "--class_data_dir does nothing without --with_prior_preservation: "
             "add that, or leave this out")
        for given in ("class_prompt", "prior_loss_weight"):
            need(self.with_prior_preservation or self.prior_prediction
                 or getattr(self, given) == getattr(TrainConfig, given),
                 f"--{given} does nothing without --with_prior_preservation or "
                 "--prior_prediction: add one of them, or leave this out")


@dataclass
class SliderConfig:
    """A concept slider: a LoRA whose scale moves one attribute (arXiv 2311.12092).

    It learns in minutes, so it has neither checkpoints nor validation: begun again, the same seed
    makes the same file.
    """

    pretrained_model_name_or_path: Asked = option(None, "the base: a folder or a name on the hub")
    revision: str | None = option(None, "branch, tag or commit of the base on the hub")
    prompt: Asked = option(None, "what the slider is for, such as 'a photo of a dog'")
    positive: Asked = option(None, "words after it at scale 1, such as 'with long legs'")
    negative: Asked = option(None, "words after it at scale -1, such as 'with short legs'")
    slider_strength: float = option(
        1.0, "eta: how much of the two prompts' difference scale 1 is", above=0)
    num_images: int = option(8, "images of the prompt that it is learnt on, made first", low=1)
    max_train_steps: int = option(
        200, "steps, a few minutes of them: there are no checkpoints to resume from", low=1)
    train_batch_size: AutoInt = option(AUTO, "images a step", low=1)
    rank: AutoInt = option(AUTO, "rank of the LoRA", low=1)
    lora_layers: str = option(AUTO, "where it goes, as in train")
    learning_rate: AutoFloat = option(AUTO, "step size", above=0)
    resolution: AutoInt = option(AUTO, "side of the images in pixels", low=8)
    mixed_precision: str = option(AUTO, "precision of the frozen base", PRECISIONS)
    seed: int = option(0, "of everything random")
    output_dir: str = option("slider", "folder of the LoRA")

    def __post_init__(self):
        coerce_and_check(self)

    def check(self) -> None:
        """Raises ConfigError."""
        for name in ("pretrained_model_name_or_path", "prompt", "positive", "negative"):
            need(str(getattr(self, name) or "").strip(),
                 f"--{name} is missing: {help_of(SliderConfig, name)}")
        need(self.positive != self.negative,
             f"--positive and --negative are both {self.positive!r}: the slider has two ends")
        need(not (Path(self.output_dir) / "pytorch_lora_weights.safetensors").exists(),
             f"--output_dir {self.output_dir} holds a LoRA already: choose another folder")


@dataclass
class GenerateConfig:
    """Images from a base, with or without LoRAs."""

    pretrained_model_name_or_path: Asked = option(
        None, "the base; without it, the one the first LoRA's run was trained on")
    revision: str | None = option(None, "branch, tag or commit of the base on the hub")
    variant: str | None = option(None, "which files of the base, such as fp16")
    checkpoint_dir: list[str] = option(
        [], "runs, checkpoints or LoRA files to put on the base; none for the base alone")
    lora_scale: list[float] = option([1.0], "how much of each LoRA: 0 is none, 1 is as trained")
    prompt: list[str] = option([], "what to generate; several come in turn")
    negative_prompt: str = option("", "what to keep away from")
    num_images: int = option(4, "images a prompt", low=1)
    seed: int = option(0, "of the first image; the next has seed + 1, and so on")
    num_inference_steps: AutoInt = option(
        AUTO, "denoising steps; auto is the base's recommendation, else 25", low=1)
    guidance_scale: AutoFloat = option(
        AUTO, "pull towards the prompt; auto is the base's recommendation, else 7.5", low=0)
    guidance_interval: list[float] = option(
        [0.0, 1.0], "guide in this part of the steps only, two fractions of them: 0.1 0.8 leaves "
        "more variety (arXiv 2404.07724)")
    lora_interval: list[float] = option(
        [0.0, 1.0], "use the LoRAs of the denoiser in this part of the steps only: 0.2 1 leaves "
        "the composition to the base")
    scheduler: str = option(
        AUTO, "sampler: ddim, dpm++, euler, euler_a, unipc or ddpm; auto is the base's "
        "recommendation, else its own",
        (AUTO, "ddim", "dpm++", "euler", "euler_a", "unipc", "ddpm"))
    resolution: AutoInt = option(AUTO, "side of the images in pixels", low=8)
    batch_size: int = option(8, "images generated at a time", low=1)
    mixed_precision: str = option(
        AUTO, "precision; auto is bf16 or fp16 on a GPU, no elsewhere", PRECISIONS)
    low_vram: bool = option(
        False, "keep the denoiser in 8 bits, encode prompts before it is there, generate images "
        "one at a time: for a small GPU")
    output_dir: str = option("pictures", "where the images and a grid go")

    def __post_init__(self):
        coerce_and_check(self)

    def check(self) -> None:
        """Raises ConfigError."""
        need(self.pretrained_model_name_or_path or self.checkpoint_dir,
             "give --pretrained_model_name_or_path, --checkpoint_dir or both")
        need(self.prompt, "--prompt is missing: say what to generate")
        need(len(self.lora_scale) in (1, len(self.checkpoint_dir)) or not self.checkpoint_dir,
             f"{len(self.lora_scale)} values of --lora_scale for {len(self.checkpoint_dir)} of "
             "--checkpoint_dir: give one, or one each")
        check_interval("guidance_interval", self.guidance_interval)
        check_interval("lora_interval", self.lora_interval)


# Options of other scripts that no longer say anything; each is accepted and answered in one line.
ANSWERED: dict[type, dict[str, str]] = {SliderConfig: {}, TrainConfig: {
    "local_rank": "processes are counted by `accelerate launch`",
    "enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always "
    "on, and as fast",
    "dataloader_num_workers": "photos are encoded once before training, so no loader is "
    "left to speed up",
    "set_grads_to_none": "gradients are always freed between steps",
    "text_encoder_use_attention_mask": "Stable Diffusion's text encoder is trained and "
    "used without a mask",
    "validation_images": "it belongs to DeepFloyd IF's upscaler, which this does not train",
    "class_labels_conditioning": "it belongs to DeepFloyd IF, which this does not train",
    "offload_ema": "the running mean of a LoRA is a few megabytes",
}, GenerateConfig: {
    "device": "the fastest there is generates the images; "
    "an empty CUDA_VISIBLE_DEVICES leaves the CPU",
}}  # fmt: skip
ALIASES = {"use_8bit_adam": ("optimizer", "AdamW8bit"), "lora": ("checkpoint_dir", None),
           "use_aspect_ratio_buckets": ("aspect_ratio_buckets", AUTO)}


def need(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def is_within(folder: str | Path | None, other: str | Path | None) -> bool:
    """Whether `folder` is `other`, or somewhere in it; not where either is None."""
    if folder is None or other is None:
        return False
    return Path(folder).resolve().is_relative_to(Path(other).resolve())


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """[(height, width)] of "768,512;512,768". Raises ConfigError."""
    pairs = [re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", pair) for pair in text.split(";")]
    need(all(pairs), f"--aspect_ratio_buckets {text!r}: give height,width in pixels, with a ; "
         "between two of them and quotes around all, such as '768,512;512,768'; or auto")
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair]


def check_interval(name: str, interval: Sequence[float]) -> None:
    """Raises ConfigError unless it is a part of the sampling steps: two fractions, in order."""
    need(len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
         f"--{name} {' '.join(map(str, interval))}: give two fractions of the steps, the smaller "
         "first, of 0 (the first step) to 1 (all are done)")


def help_of(cls: type, name: str) -> str:
    return next(f.metadata["help"] for f in fields(cls) if f.name == name)


def coerce_and_check(config: Any) -> None:
    """Turn each field into its type (YAML and notebooks give text and numbers freely) and check its
    rule."""
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        value = coerce(field.name, getattr(config, field.name), hints[field.name])
        check_rules(field, value)
        setattr(config, field.name, value)


def coerce(name: str, value: object, hint: Any) -> Any:
    """`value` as `hint`; raises ConfigError where it is not one."""
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        return [coerce(name, item, inner) for item in values]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        need(type(None) in kinds, f"--{name} is empty: give a value")
        return None
    if value == AUTO and str in kinds:
        return AUTO
    if isinstance(value, Path):
        value = str(value)
    if (name in (*PATHS, "logging_dir", "resume_from_checkpoint", "checkpoint_dir")
        and isinstance(value, str) and value.startswith("~")):
        # YAML and Python leave it as it is, and a folder would be called ~
        value = os.path.expanduser(value)
    if value is False and bool not in kinds:
        value = "no"  # YAML's `mixed_precision: no`
    for kind in kinds:
        if kind in (int, float) and (number := as_number(value, kind)) is not None:
            return number
        if kind is bool and (truth := as_bool(value)) is not None:
            return truth
    if str in kinds and not {int, float} & set(kinds) and isinstance(value, str):
        return value
    wanted = " or ".join({int: "a whole number", float: "a number", bool: "true or false",
                          str: "text"}[k]
                         for k in kinds if k in (int, float, bool)
                         or (k is str and not {int, float} & set(kinds)))
    found = "(not shown)" if name in SECRETS else repr(value)
    raise ConfigError(f"--{name} {found}: give {wanted}"
                      + (" or auto" if {int, float, str} & set(kinds) > {str} else ""))


def as_number(value: Any, kind: type) -> float | None:
    if isinstance(value, bool):
        return None
    if kind is int:
        with contextlib.suppress(TypeError, ValueError):
            if isinstance(value, (int, str)):
                return int(value)  # a float would round a long seed
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return None
    return kind(number)


def as_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "1": True, "false": False, "no": False,
            "0": False}.get(str(value).lower())


def check_rules(field: dataclasses.Field, value: Any) -> None:
    rules, name = field.metadata, field.name
    if rules["choices"] and value not in rules["choices"]:
        raise ConfigError(f"--{name} {value!r}: choose one of {', '.join(rules['choices'])}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    for rule, holds, words in (("low", lambda limit: value >= limit, "at least"),
                               ("high", lambda limit: value <= limit, "at most"),
                               ("above", lambda limit: value > limit, "more than")):
        limit = rules[rule]
        need(limit is None or holds(limit), f"--{name} {value:g}: it must be {words} {limit:g}"
             if limit is not None else "")


# --- command line and YAML ------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """One flag a field; nothing has a default, so that what was given can be told from what was
    not."""
    hints = typing.get_type_hints(cls)
    parser.add_argument("--config", metavar="YAML",
                        help="file of these options, as a run's config.yaml; flags win")
    for field in fields(cls):
        extra: dict[str, Any] = {}
        if hints[field.name] is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hints[field.name]) is list:
            extra["nargs"] = "+"
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        shown = "" if default in (None, [], "") else f" (default: {default})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                            metavar=None if "action" in extra else "X",
                            help=(field.metadata["help"] + shown).replace("%", "%%"), **extra)
    names = {field.name for field in fields(cls)}
    for alias, (name, value) in ALIASES.items():
        if name in names:
            how: dict[str, Any] = {"action": "store_true"} if value else {"nargs": "+"}
            parser.add_argument(f"--{alias}", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                                **how)
    for name in ANSWERED[cls]:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)


def from_args(args: argparse.Namespace, cls: type) -> Any:
    """The config out of parsed arguments: the YAML file's values, then the flags.

    Raises ConfigError.
    """
    given = {name: value for name, value in vars(args).items()
             if name in {f.name for f in fields(cls)}}
    for name, answer in ANSWERED[cls].items():
        if name in vars(args):
            print(f"--{name} has no effect: {answer}.")
    for alias, (name, value) in ALIASES.items():
        if alias in vars(args) and not (value == AUTO and name in given):
            print(f"--{alias} is read as --{name}{f' {value}' if value else ''}.")
            given[name] = value or getattr(args, alias)
    for name, value in given.items():
        # a command that is passed around has --class_prompt==
        if isinstance(value, str) and value.startswith("="):
            print(f"--{name} has a second =, which is left out.")
            given[name] = value[1:]
    if args.config:
        given = {**read_yaml(args.config, cls), **given}
    return cls(**given)


def read_yaml(path: str | Path, cls: type) -> dict[str, Any]:
    """The options in a YAML file.

    Raises ConfigError for a file that is none, or an unknown name.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except yaml.YAMLError as error:
        # its own words would quote the line, and the line may hold a token
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {path} is no YAML{where}: "
                          "write one `name: value` a line") from None
    need(isinstance(found, dict), f"--config {path}: write one `name: value` a line")
    names = [field.name for field in fields(cls)]
    for name in found:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, 1)
            raise ConfigError(f"--config {path}: {name!r} is no option"
                              + (f"; did you mean {close[0]}?" if close else ""))
    return found


def read_run_config(folder: str | Path) -> dict[str, Any] | None:
    """The options of the run whose folder this is; None where its config.yaml is missing, empty or
    another tool's."""
    try:
        found = read_yaml(Path(folder) / "config.yaml", TrainConfig)
    except ConfigError:
        return None
    return found if found.get("pretrained_model_name_or_path") else None


def full_paths(config: Any) -> Any:
    """`config` with every path absolute, so that it means the same wherever it is read; a hub's
    names stay."""
    local = {name: getattr(config, name) for name in PATHS}
    for name in ("pretrained_model_name_or_path", "tokenizer_name"):
        if local[name] and not Path(local[name]).is_dir():
            local[name] = None
    return dataclasses.replace(config, **{name: os.path.abspath(path)
                                          for name, path in local.items() if path})


def write_yaml(config: Any, path: str | Path) -> None:
    """Every option but the secret ones, so that `--config` repeats the run."""
    import yaml

    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in SECRETS}
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
