"""How long a run is and how often it is validated, in steps."""

import dataclasses
from collections.abc import Callable

from dbcore.config import TrainConfig
from dbcore.datasets.dreambooth import steps_per_epoch

STEPS = 150
VALIDATIONS = 5  # over a run, unless told otherwise


def resolve_lengths(config: TrainConfig, photos: int, processes: int = 1) -> TrainConfig:
    """`config` (TrainConfig) with its length and its validations in steps.

    `photos`: how many; with the batch and the `processes`, they say how long an epoch is.
    """
    epoch = steps_per_epoch(config, photos, processes)
    steps = config.max_train_steps or (config.num_train_epochs or 0) * epoch or STEPS
    every = config.validation_steps or (config.validation_epochs or 0) * epoch
    return dataclasses.replace(config, max_train_steps=steps, num_train_epochs=None,
                               validation_steps=every or max(1, steps // VALIDATIONS),
                               validation_epochs=None)


def say_too_short(config: TrainConfig, say: Callable[[str], None]) -> None:
    """A line for each option that wants a longer run than this is."""
    steps = config.max_train_steps
    if config.lr_warmup_steps >= steps:
        say(f"--lr_warmup_steps {config.lr_warmup_steps}: the run has {steps} steps, so the "
            f"learning rate never reaches {config.learning_rate:g}. Give fewer, such as "
            f"{steps // 10}.")
    if config.validation_prompt and config.validation_steps > steps:
        say(f"--validation_steps {config.validation_steps}: the run has {steps} steps, so nothing "
            f"is generated before its end. Give fewer, such as {max(1, steps // VALIDATIONS)}.")
