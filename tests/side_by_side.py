"""What a training program computes in its first steps, on numbers that it is given.

Both programs of a comparison, this project's and diffusers' script of a family, are watched through
the libraries they share: peft puts the LoRA on, PyTorch goes backward, clips and steps. No line of
a script is copied, and none is changed. As a program, this file has two uses:

    python tests/side_by_side.py run RESULT SCRIPT --pretrained_model_name_or_path ...
        watches a script, with its options, and writes what it computed to RESULT.safetensors
    python tests/side_by_side.py store FOLDER
        runs the scripts in FOLDER (diffusers' examples/dreambooth), and stores side_by_side.json
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from pipelines import make_flux2_miniature, make_sdxl_miniature, make_tiny_pipeline
from safetensors.torch import load_file, save_file

STORED = Path(__file__).with_suffix(".json")
STEPS, SIDE = 3, 32
TIMESTEPS = [[412, 77], [903, 640], [150, 988]]  # [step][sample]: of 1000, the noisier the larger


@dataclass(frozen=True)
class Case:
    """A script on a miniature, with options of both programs, and some of one alone."""

    make: object
    script: str
    both: dict = field(default_factory=dict)
    script_alone: dict = field(default_factory=dict)
    ours_alone: dict = field(default_factory=dict)


SD, SDXL, FLUX2 = (f"train_dreambooth_lora{end}.py" for end in ("", "_sdxl", "_flux2_klein"))
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 1,
         "prior_loss_weight": 0.5}  # fmt: skip
TEXT = {"train_text_encoder": True}, {}, {"text_encoder_rank": 2, "text_encoder_lr": 1e-3}
ALPHA = {"lora_alpha": 4}  # which the other scripts keep at the rank
# the layers that the pipeline reads; the script's own default is others
QWEN = {"text_encoder_out_layers": [9, 18, 27]}
CASES = {
    "sd": Case(make_tiny_pipeline, SD),
    "sd, v-prediction": Case(lambda folder: make_tiny_pipeline(folder, "v_prediction"), SD),
    "sd, text encoder": Case(make_tiny_pipeline, SD, *TEXT),
    "sd, prior preservation": Case(make_tiny_pipeline, SD, PRIOR),
    "sdxl": Case(make_sdxl_miniature, SDXL),
    "sdxl, text encoders": Case(
        make_sdxl_miniature, SDXL, {"train_text_encoder": True, "text_encoder_lr": 1e-3},
        {"adam_weight_decay_text_encoder": 0.01}, {"text_encoder_rank": 2}),
    "sdxl, min-SNR": Case(make_sdxl_miniature, SDXL, {"snr_gamma": 0.5}),
    "flux2": Case(make_flux2_miniature, FLUX2, ALPHA, QWEN),
    "flux2, prior preservation": Case(make_flux2_miniature, FLUX2, {**ALPHA, **PRIOR}, QWEN),
}  # fmt: skip


def options(case, folder):
    """Options of both programs, on a miniature and photos that are made in `folder`."""
    base = case.make(folder / "base")
    for number, name in enumerate(("photos", "class")):
        (folder / name).mkdir()
        # twice as wide as high: the crop is pixels of the photo, and not at its corner
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "0.png")
    return {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(folder / "photos"),
        "instance_prompt": "a photo of sks dog", "output_dir": str(folder / "run"),
        "resolution": SIDE, "center_crop": True, "train_batch_size": 1, "max_train_steps": STEPS,
        "rank": 2, "learning_rate": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "adam_weight_decay": 0.01, "mixed_precision": "no", "seed": 0, **case.both,
        **({"class_data_dir": str(folder / "class")} if "class_prompt" in case.both else {}),
    }  # fmt: skip


def summary(tensors):
    """A few numbers that stand for a record: {part: [numbers]}.

    Of the losses all; of each first gradient and each last weight, in the order of the names, the
    norm and a projection on random numbers.
    """
    found = {"loss": tensors["loss"]}
    for part in ("gradient 0", "lora"):
        names = [name for name in sorted(tensors) if name.startswith(part)]
        found[part] = torch.stack([number for name in names for number in (
            tensors[name].norm(), (tensors[name] * numbers(name, tensors[name].shape)).sum())])
    return {part: [float(f"{number:.8g}") for number in values] for part, values in found.items()}


def given(kind, step, shape):
    """Standard normal numbers of a batch, each sample's by (kind, step, sample) alone."""
    names = [f"{kind} {step} {sample}" for sample in range(shape[0])]
    return torch.stack([numbers(name, shape[1:]) for name in names])


def numbers(name, shape):
    """Standard normal float32 numbers, another draw for each name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Record:
    """The loss of each step, every gradient before it is clipped, and the LoRA at the end."""

    def __init__(self):
        self.losses, self.gradients, self.lora = [], [], {}

    def tensors(self):
        """{"loss": (steps,), "gradient 0 <parameter>": ..., "lora <parameter>": ...}, float32."""
        found = {"loss": torch.stack(self.losses)}
        for step, gradients in enumerate(self.gradients):
            found |= {f"gradient {step} {name}": g for name, g in gradients.items()}
        return found | {f"lora {name}": p.detach().clone() for name, p in self.lora.items()}

    def add_lora(self, module):
        """Give a LoRA that was put on a network numbers that depend on its names alone."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                full = f"{type(module).__name__}.{name}"
                parameter.data = 0.1 * numbers(full, parameter.shape)
                self.lora[full] = parameter

    def add_loss(self, loss):
        self.losses.append(loss.detach().clone())

    def add_gradients(self):
        # of Stable Diffusion XL's first text encoder the last layer is not read, and has none
        self.gradients.append({name: p.grad.clone() for name, p in self.lora.items()
                               if p.grad is not None})


@contextlib.contextmanager
def watched():
    """A `Record` of what is trained in the block."""
    import diffusers
    from transformers.integrations import peft

    record = Record()
    with contextlib.ExitStack() as stack:
        def around(owner, name, before=None, after=None):
            own = getattr(owner, name)

            def call(*args, **words):
                if before:
                    before(*args)
                result = own(*args, **words)
                if after:
                    after(*args)
                return result

            stack.enter_context(mock.patch.object(owner, name, call))

        for owner in (diffusers.loaders.PeftAdapterMixin, peft.PeftAdapterMixin):
            around(owner, "add_adapter", after=lambda module, *_: record.add_lora(module))
        around(torch.Tensor, "backward", before=lambda loss, *_: record.add_loss(loss))
        around(torch.nn.utils, "clip_grad_norm_", before=lambda *_: record.add_gradients())
        yield record


# --- ours -----------------------------------------------------------------------------------------


def run_ours(case, folder):
    """The `Record.tensors` of this project's run of a case."""
    from dbcore.config import TrainConfig
    from dbcore.datasets import dreambooth
    from dbcore.engines.trainer import train
    from dbcore.models.process import Flow

    def normal(shape, seed, stream, step=0, samples=(0,)):
        return numbers(f"{stream.split()[-1]} {step} {int('class' in stream)}", shape)[None]

    def uniform(seed, stream, step=0, sample=0):
        return (TIMESTEPS[step]["class" in stream] + 0.5) / 1000

    def timestep(process, u, *_):  # one of the script's 1,000 levels of noise
        return ((1000 * u).floor() / 1000).float()

    config = TrainConfig(**options(case, folder), **case.ours_alone, report_to="none",
                         num_report_images=0)
    with (watched() as record, mock.patch.object(dreambooth, "normal", normal),
          mock.patch.object(dreambooth, "uniform", uniform),
          mock.patch.object(Flow, "timestep", timestep)):
        train(config)
    return record.tensors()


# --- a script -------------------------------------------------------------------------------------


@contextlib.contextmanager
def given_draws(record):
    """In the block, a script's posterior, noise and timesteps are `given`."""
    from diffusers import training_utils
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    def sample(posterior, generator=None):
        epsilon = given("posterior", len(record.losses), posterior.mean.shape)
        return posterior.mean + posterior.std * epsilon

    def timesteps(*_, **__):
        step = len(record.losses)
        return torch.tensor(TIMESTEPS[step])[:record.size]

    def noise(like):
        record.size = len(like)
        return given("noise", len(record.losses), like.shape)

    def density(weighting_scheme, batch_size, *_, **__):
        # u; the index is floor(1000 u), and the noise's share 1 - index / 1000
        return 1 - (torch.tensor(TIMESTEPS[len(record.losses)])[:batch_size] - 0.5) / 1000

    with (mock.patch.object(Posterior, "sample", sample), mock.patch("torch.randn_like", noise),
          mock.patch("torch.randint", timesteps),
          mock.patch.object(training_utils, "compute_density_for_timestep_sampling", density)):
        yield


def stand_in_for_torchvision():
    """What the scripts take from torchvision, for crops of the middle, as they are asked for."""
    from bench import watch

    watch.stand_in_for_torchvision()
    parts = watch.photo_transforms()
    functional = {
        "resize": lambda image, size, interpolation:
            parts["Resize"](min(size), interpolation)(image),
        "center_crop": lambda image, size: parts["CenterCrop"](size[0])(image),
        "crop": None, "hflip": None, "to_tensor": parts["ToTensor"](),
        "normalize": lambda pixels, mean, std: parts["Normalize"](mean, std)(pixels),
    }  # fmt: skip
    transforms = types.ModuleType("torchvision.transforms")
    vars(transforms).update(parts, RandomHorizontalFlip=lambda p: None,
                            functional=types.SimpleNamespace(**functional))
    sys.modules["torchvision"].transforms = transforms
    sys.modules["torchvision.transforms"] = transforms
    sys.modules["torchvision.transforms.functional"] = transforms.functional


def run_script(script, case, folder):
    """The `Record.tensors` of a script's run of a case. Raises RuntimeError with its last words."""
    words = []
    for name, value in {**options(case, folder), **case.script_alone}.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    result = folder / "result.safetensors"
    done = subprocess.run([sys.executable, __file__, "run", result, script, *words], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    if done.returncode:
        raise RuntimeError(f"{script} ended with code {done.returncode}:\n{done.stdout[-2000:]}")
    return load_file(result)


def store(folder):
    """Write the summary of every case's script to STORED."""
    stored = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            stored[name] = summary(run_script(Path(folder, case.script), case, Path(work)))
        print(name, stored[name]["loss"], flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in stored.items()]
    STORED.write_text("{" + ",\n ".join(lines) + "}\n")


def run(result, script, *words):
    if not importlib.util.find_spec("torchvision"):
        stand_in_for_torchvision()
    sys.argv = [script, *words]
    with watched() as record, given_draws(record):
        runpy.run_path(script, run_name="__main__")
    save_file(record.tensors(), result)


if __name__ == "__main__":
    {"run": run, "store": store}[sys.argv[1]](*sys.argv[2:])
