"""What tests of whole runs share: a tiny base, photos, and the options of a run of a few steps."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pipelines import make_tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from dbcore.engines.callbacks import Result
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, multiply_in_half
from dbcore.utils.seeding import normal

LORA = "pytorch_lora_weights.safetensors"


def make_base(folder, **more):
    """A tiny pipeline whose pictures are drawn in two steps."""
    folder = make_tiny_pipeline(folder, **more)
    (folder / "recommended.json").write_text(json.dumps({"num_inference_steps": 2}))
    return folder


def empty_gpu():
    """Let go of what earlier runs of this process left on the GPU, and count its peak anew.

    cuBLAS keeps a work space for each thread and stream, 32 MiB on Hopper, and each run that
    captures a CUDA graph has streams of its own: after nine runs they held 0.7 GB.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def make_photos(folder, count=3, size=(48, 40), seed=0):
    """Coloured noise, no two alike; wider than high, so that a crop has a choice."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for k in range(count):
        pixels = numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def add_variant(base, other):
    """Beside a base's weights, those of another base as its `fp16` files."""
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        shutil.copy(other / part / f"{name}.safetensors", base / part / f"{name}.fp16.safetensors")


def make_hub(folder, patch, **revisions):
    """A hub's cache, all there is of a network, with `tiny/base` in several revisions: {name: a
    base's folder}."""
    for number, (revision, base) in enumerate(revisions.items()):
        shutil.copytree(base, folder / "models--tiny--base" / "snapshots" / (str(number) * 40))
        reference = folder / "models--tiny--base" / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(str(number) * 40)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make_options(folder, **more):
    """The options of a short run on a base and photos made in `folder`."""
    return {
        "pretrained_model_name_or_path": str(make_base(folder / "base")),
        "instance_data_dir": str(make_photos(folder / "photos")),
        "instance_prompt": "a photo of sks dog", "max_train_steps": 4, "report_to": "none", **more,
    }  # fmt: skip


def leave_out_report(patch):
    """The report at the end of a run costs more than a run of four steps: write a card without
    plots."""

    def card_alone(modules, draw, config, output_dir, history, seconds):
        Path(output_dir, "README.md").write_text("a card\n")
        return SimpleNamespace(verdict=lambda: "The report was left out.")

    patch.setattr("dbcore.engines.callbacks.write_report", card_alone)


def finished_runs(patch):
    """A list that each `Run` is put on when it has done its steps."""
    runs, finish = [], Result.after_train

    def finishing(result, run):
        runs.append(run)
        finish(result, run)

    patch.setattr(Result, "after_train", finishing)
    return runs


def read_run(folder):
    """What must be equal in equal runs: the bytes of the LoRA, of new tokens and of the validation
    pictures, and the log."""
    folder = Path(folder)
    return {
        "lora": (folder / LORA).read_bytes(),
        "tokens": [path.read_bytes() for path in folder.glob("learned_embeds.safetensors")],
        "log": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()],
        "pictures": {str(path.relative_to(folder)): path.read_bytes()
                     for path in sorted(folder.glob("validation/*/*.png"))},
    }  # fmt: skip


def files_of(folder):
    """{path: (bytes, time of change)} of every file in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}  # fmt: skip


class Copies(TorchDispatchMode):
    """Counts the copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            self.count += result.device != args[-1 if "copy_" in str(func) else 0].device
        return result


def lora_gradients(base, dtype=torch.float32, device="cpu", scale=1.0):
    """The gradient of a step's loss by all of a LoRA whose B is not 0, as one float32 vector.

    `scale`: of the loss, on its way back, as fp16 needs it.
    """
    base = load_base(base, device=device, dtype=dtype)
    parameters = add_lora(base.denoiser, 4, 4.0)
    for number, p in enumerate(parameters):
        p.data = (0.1 * normal(p.shape, number, "weights")[0]).to(device)
    multiply_in_half(base.denoiser)
    shape = base.latent_shape(base.resolution)
    x_t, target = (torch.cat([normal(shape, k, what) for k in (0, 1)]).to(device)
                   for what in ("latents", "target"))
    with torch.no_grad():
        cond = base.encode_text(["a photo of sks dog", "a red car"])
    prediction = base.predict(x_t, torch.tensor([10, 700], device=device), cond)
    (scale * (prediction - target).square().mean()).backward()
    return torch.cat([p.grad.flatten() for p in parameters]).cpu() / scale
