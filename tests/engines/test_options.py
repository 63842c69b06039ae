"""No option is dead: change each field of TrainConfig, and something that a user sees must change with it."""

import contextlib
import dataclasses
import io
import json
import os
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_tokenizer
from runs import add_variant, leave_out_report, make_base, make_hub, make_options, make_photos
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines.report import write_report
from dbcore.engines.train import Run, train
from dbcore.models.stable_diffusion import StableDiffusion

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 3}
TEXT = {"train_text_encoder": True}
VALIDATED = {"validation_prompt": ["a photo of sks dog"], "num_validation_images": 1}
HUB = {"push_to_hub": True}
FINISHED = {"output_dir": "finished"}

# field: (changed value, what must differ, options of both runs). `weights`: the LoRA's tensors, bit for bit;
# `files`: the names in the working folder; `losses`: the log; `error`: what the run stops with; others: `Facts`.
EFFECTS = {
    "pretrained_model_name_or_path": ("{world}/other base", "weights", {}),
    "revision": ("second", "weights", {"pretrained_model_name_or_path": "tiny/base"}),
    "variant": ("fp16", "weights", {}),
    "tokenizer_name": ("{world}/tokenizer", "weights", {}),
    "instance_data_dir": ("{world}/other photos", "weights", {}),
    "instance_prompt": ("a blue car", "weights", {}),
    "class_data_dir": ("{world}/class photos", "weights", PRIOR),
    "class_prompt": ("a red car", "weights", PRIOR),
    "resolution": (24, "weights", {}),
    "center_crop": (True, "weights", {}),
    "random_flip": (True, "weights", {}),
    "image_interpolation_mode": ("nearest", "weights", {}),
    "use_masks": (False, "weights", {}),
    "with_prior_preservation": (True, "error", {"class_prompt": "a photo of a dog", "num_class_images": 3}),
    "prior_loss_weight": (0.5, "weights", PRIOR),
    "num_class_images": (1, "weights", PRIOR),
    "sample_batch_size": (1, "class_batches", {**PRIOR, "class_data_dir": "classes"}),
    "prior_generation_precision": ("bf16", "weights", PRIOR),
    "rank": (2, "weights", {}),
    "lora_alpha": (1, "weights", {}),
    "lora_dropout": (0.5, "weights", {}),
    "use_dora": (True, "weights", {}),
    "use_rslora": (True, "weights", {}),
    "lora_layers": ("attention+ff", "weights", {}),
    "train_text_encoder": (True, "weights", {}),
    "text_encoder_lr": (0.1, "weights", TEXT),
    "text_encoder_rank": (2, "weights", TEXT),
    "train_text_encoder_frac": (0.4, "weights", TEXT),
    "tokenizer_max_length": (4, "weights", {}),
    "learning_rate": (2e-2, "weights", {}),
    "scale_lr": (True, "weights", {"train_batch_size": 2}),
    "lr_scheduler": ("linear", "weights", {}),
    "lr_warmup_steps": (2, "weights", {"lr_scheduler": "constant_with_warmup"}),
    "lr_num_cycles": (2, "weights", {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (2, "weights", {"lr_scheduler": "polynomial"}),
    "train_batch_size": (2, "weights", {}),
    "gradient_accumulation_steps": (2, "weights", {}),
    "max_train_steps": (2, "losses", {}),
    "num_train_epochs": (1, "losses", {"num_train_epochs": 2, "max_train_steps": None}),
    "optimizer": ("Adafactor", "weights", {}),
    "adam_beta1": (0.5, "weights", {}),
    "adam_beta2": (0.9, "weights", {}),
    "adam_weight_decay": (0.5, "weights", {}),
    "adam_epsilon": (1e-2, "weights", {}),
    "max_grad_norm": (1e-7, "weights", {}),
    "snr_gamma": (5, "weights", {}),
    "noise_offset": (0.1, "weights", {}),
    "use_ema": (True, "weights", {}),
    "ema_decay": (0.5, "weights", {"use_ema": True}),
    "seed": (1, "weights", {}),
    "mixed_precision": ("bf16", "weights", {}),
    "gradient_checkpointing": (True, "checkpointing", {}),
    "cache_latents": (False, "latents", {}),
    "pre_compute_text_embeddings": (False, "prompts", {}),
    "low_vram": (True, "weights", {"gradient_checkpointing": True}),
    "allow_tf32": (True, "tf32", {}),
    "compile": (True, "compiled", {}),
    "validation_prompt": (["a photo of sks dog"], "files", {}),
    "num_validation_images": (2, "files", VALIDATED),
    "validation_steps": (2, "files", VALIDATED),
    "validation_epochs": (1, "files", VALIDATED),
    "num_report_images": (0, "files", {"num_report_images": 1}),
    "report_to": ("tensorboard", "files", {}),
    "logging_dir": ("curves", "files", {"report_to": "tensorboard"}),
    "output_dir": ("elsewhere", "files", {}),
    "overwrite_output_dir": (True, "error", FINISHED),
    "checkpointing_steps": (1, "files", {}),
    "checkpoints_total_limit": (1, "files", {"checkpointing_steps": 1}),
    "resume_from_checkpoint": ("latest", "error", FINISHED),
    "push_to_hub": (True, "uploads", {}),
    "hub_model_id": ("me/dog", "uploads", HUB),
    "hub_token": ("hf_sentinel", "uploads", HUB),
}  # fmt: skip


class Hub:
    """huggingface_hub's HfApi, as far as `push` calls it."""

    uploads: ClassVar = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, exist_ok):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
        self.uploads.append((repo_id, self.token, folder_path))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with bases, photos and a hub's cache; every run's base and photos are there."""
    world = tmp_path_factory.mktemp("world")
    make_options(world)
    other = make_base(world / "other base", seed=1)
    make_photos(world / "other photos", seed=1)
    make_photos(world / "class photos", seed=2)
    Image.fromarray(np.eye(40, 48, dtype=np.uint8) * 255).save(world / "photos" / "0.mask.png")
    make_tokenizer(world / "tokenizer")
    vocabulary = json.loads((world / "tokenizer" / "vocab.json").read_text())
    turned = dict(zip(vocabulary, list(vocabulary.values())[::-1]))
    (world / "tokenizer" / "vocab.json").write_text(json.dumps(turned))
    add_variant(world / "base", other)
    return world


@pytest.fixture(scope="module")
def outcome(world, tmp_path_factory):
    """A function: train with some options in a new working folder, and return what a user sees of it."""
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        patch.setenv("DBCORE_CACHE", str(world / "cache"))
        patch.setattr("huggingface_hub.HfApi", Hub)
        make_hub(world / "hub", patch, main=world / "base", second=world / "other base")

        def run(**more):
            key = repr(sorted(more.items()))
            if key not in known:
                known[key] = watch(world, tmp_path_factory.mktemp("here"), more, patch)
            return known[key]

        yield run


def watch(world, here, more, patch):
    options = {"pretrained_model_name_or_path": f"{world}/base", "instance_data_dir": f"{world}/photos",
               "instance_prompt": "a photo of sks dog", "learning_rate": 1e-2, "max_train_steps": 3,
               "report_to": "none", **more}  # fmt: skip
    options = {name: value.format(world=world) if isinstance(value, str) else value for name, value in options.items()}
    patch.chdir(here)
    if options.get("output_dir") == "finished":
        train(TrainConfig(**{**options, "overwrite_output_dir": True, "resume_from_checkpoint": None}))
    facts, seen = SimpleNamespace(error=None, path=None, class_batches=[], compiled=0), []
    with spies(facts, seen), contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as back:
        if "num_report_images" in more:
            back.setattr("dbcore.engines.train.write_report", write_report)
        try:
            facts.path = train(TrainConfig(**options))
        except ValueError as error:
            facts.error = str(error)
    facts.files = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    facts.files = {name for name in facts.files if "tfevents" not in name} | {
        os.path.dirname(name) for name in facts.files}
    facts.uploads = Hub.uploads[:]
    if facts.path:
        facts.weights = {name: (t.shape, t.numpy().tobytes()) for name, t in load_file(facts.path).items()}
        facts.losses = [json.loads(line)["loss"] for line in (facts.path.parent / "log.jsonl").read_text().splitlines()]
    for run in seen:
        facts.latents, facts.prompts = len(run.data.latents.where), len(run.base.known.where)
        facts.checkpointing = run.base.unet.is_gradient_checkpointing
    return facts


@contextlib.contextmanager
def spies(facts, seen):
    """Note what a run does that leaves no trace in its folder."""
    finish, draw = Run.finish, StableDiffusion.draw
    Hub.uploads.clear()

    def drawing(base, prompts, *args, stream="picture", **more):
        if stream == "class image":
            facts.class_batches.append(len(prompts))
        return draw(base, prompts, *args, stream=stream, **more)

    def compiling(function):
        facts.compiled += 1
        return function

    def finishing(run):
        seen.append(run)
        facts.tf32 = torch.backends.cuda.matmul.allow_tf32
        return finish(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", finishing)
        patch.setattr(StableDiffusion, "draw", drawing)
        patch.setattr(torch, "compile", compiling)
        yield


def test_every_field_is_in_the_table():
    assert list(EFFECTS) == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize("name", EFFECTS)
def test_changing_an_option_changes_something_to_see(name, outcome):
    value, what, both = EFFECTS[name]
    before, after = outcome(**both), outcome(**{**both, name: value})
    if what != "error":
        assert before.error is after.error is None
    assert getattr(before, what) != getattr(after, what)
