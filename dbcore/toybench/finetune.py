"""Full fine-tuning of the denoiser, as DreamBooth was first done: what a LoRA is held against.

Ruiz et al. 2023. Photos, steps and random numbers are those of `train`; only what is trained, and
therefore what is written, differs: every weight of the denoiser, and a whole pipeline.
"""

import dataclasses
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from dbcore.config import TrainConfig, need
from dbcore.datasets.photos import Photo, gather_photos
from dbcore.engines.callbacks import Callback, Divergence, Log, Validation
from dbcore.engines.lengths import resolve_lengths
from dbcore.engines.run_folder import held, holds_run, prepare_folder
from dbcore.engines.trained import in_training
from dbcore.engines.trainer import Run, tf32
from dbcore.models.base import SETTINGS_FILE, Family, resolve
from dbcore.utils.errors import Interrupted
from dbcore.utils.files import whole_folder

PIPELINE = "pipeline"  # in the run's folder


def finetune(config: TrainConfig) -> Path:
    """Teach the denoiser itself a subject as `config` (TrainConfig) says.

    Returns the folder of the new pipeline.
    In float32, whatever `mixed_precision` and `low_vram` say: steps as small as these are lost in
    less. One that is finished is returned as it is; one that was stopped begins anew, for no
    checkpoints are kept: they would hold the weights three times, and the runs compared here take
    a minute. Raises ConfigError, and Interrupted after Ctrl-C or SIGTERM.
    """
    config.check()
    folder = Path(config.output_dir)
    if (folder / PIPELINE).is_dir():
        return folder / PIPELINE
    need(config.report_to == "none",
         f"--report_to {config.report_to}: full fine-tuning logs to log.jsonl alone")
    config = dataclasses.replace(resolve(config), mixed_precision="no", low_vram=False)
    photos, _ = gather_photos(config.instance_data_dir, config.resolution, config.use_masks)
    try:
        with held(folder), tf32(config.allow_tf32):
            train_whole(config, photos, folder)
    except Interrupted:
        raise Interrupted(f"Stopped; nothing of {config.output_dir} is kept, and it begins anew "
                          "the next time.") from None
    return folder / PIPELINE


def train_whole(config: TrainConfig, photos: list[Photo], folder: Path) -> None:
    """A run of the denoiser's own weights in its folder. Raises ConfigError for a LoRA's folder."""
    need(not holds_run(folder),
         f"--output_dir {folder} holds the run of a LoRA: choose another folder")
    accelerator = Accelerator(mixed_precision="no")
    prepare_folder(config, accelerator, None, folder)
    callbacks = [Divergence(), Log(), Validation(), WholePipeline()]
    config = resolve_lengths(config, len(photos))
    Run(config, accelerator, photos, folder, callbacks, inject=thaw).train(bool)


def thaw(base: Family, config: TrainConfig) -> dict[str, torch.nn.Module]:
    """What is trained, {name: network}: the denoiser itself."""
    denoiser = {base.roles["denoiser"][0]: base.denoiser.requires_grad_(True)}
    return in_training(denoiser, config)


class WholePipeline(Callback):
    """The whole pipeline, with the base's recommendations; its folder appears whole."""

    def after_train(self, run: Run) -> None:
        recommendations = Path(run.base.name) / SETTINGS_FILE
        run.base.text_encoders  # noqa: B018 - were let go once the prompts were encoded
        with run.trained.averaged(), whole_folder(run.folder / PIPELINE) as partial:
            run.base.pipeline().save_pretrained(partial)
            if recommendations.is_file():
                shutil.copy(recommendations, partial)
