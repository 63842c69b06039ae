"""Full fine-tuning of the denoiser, as DreamBooth was first done (Ruiz et al. 2023): what a LoRA is
held against.

Photos, steps and random numbers are those of `train`; only what is trained, and therefore what is
written, differs: every weight of the denoiser, and a whole pipeline.
"""

import dataclasses
import shutil
from pathlib import Path

from accelerate import Accelerator

from dbcore.config import need
from dbcore.datasets.photos import gather_photos
from dbcore.engines.run_folder import held, holds_run, prepare_folder
from dbcore.engines.train import Run, tf32
from dbcore.engines.trained import in_training
from dbcore.models.base import SETTINGS_FILE, settle
from dbcore.utils.errors import Interrupted
from dbcore.utils.files import whole_folder

PIPELINE = "pipeline"  # in the run's folder


def finetune(config):
    """Teach the denoiser itself a subject as `config` (TrainConfig) says; returns the folder of the
    new pipeline.

    In float32, whatever `mixed_precision` and `low_vram` say: steps as small as these are lost in
    less. One that is finished is returned as it is; one that was stopped begins anew, for no
    checkpoints are kept. Raises ConfigError, and Interrupted after Ctrl-C or SIGTERM.
    """
    config.check()
    folder = Path(config.output_dir) / PIPELINE
    if folder.is_dir():
        return folder
    need(config.report_to == "none",
         f"--report_to {config.report_to}: full fine-tuning logs to log.jsonl alone")
    config = dataclasses.replace(settle(config), mixed_precision="no", low_vram=False)
    accelerator = Accelerator(mixed_precision="no")
    photos, _ = gather_photos(config.instance_data_dir, config.resolution, config.use_masks)
    try:
        with held(config.output_dir), tf32(config.allow_tf32):
            need(not holds_run(folder.parent),
                 f"--output_dir {folder.parent} holds the run of a LoRA: choose another folder")
            prepare_folder(config, accelerator, None, folder.parent)
            return FullRun(config, accelerator, photos).go(None, bool)
    except Interrupted:
        raise Interrupted(f"Stopped; nothing of {config.output_dir} is kept, and it begins "
                          "anew the next time.") from None


class FullRun(Run):
    """A run that trains the denoiser's own weights."""

    def inject(self):
        denoiser = {self.base.roles["denoiser"][0]: self.base.denoiser.requires_grad_(True)}
        return in_training(denoiser, self.config)

    def save(self, done):
        """Nothing: a checkpoint would hold the weights three times, and the runs compared here take
        a minute."""

    def finish(self):
        """The whole pipeline, with the base's recommendations; the folder appears whole."""
        folder, recommendations = self.folder / PIPELINE, Path(self.base.name) / SETTINGS_FILE
        self.base.text_encoders  # noqa: B018 - were let go once the prompts were encoded
        with self.trained.averaged(), whole_folder(folder) as partial:
            self.base.pipeline().save_pretrained(partial)
            if recommendations.is_file():
                shutil.copy(recommendations, partial)
        return folder
