"""What a run needs, what it hands to its optimizer and its tracker, and what its file says of itself."""

import importlib.util
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from PIL import Image
from runs import leave_out_report, make_options, make_photos, read_run
from safetensors.torch import load_file

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines.finetune import finetune
from dbcore.engines.train import train
from dbcore.models.base import StableDiffusion
from dbcore.models.export import HEADER_KEY, read_safetensors

PROMPTS = ["a photo of sks dog", "a red car"]
VALIDATED = {"validation_prompt": PROMPTS, "num_validation_images": 2, "validation_steps": 2}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        yield make_options(tmp_path_factory.mktemp("world"), learning_rate=1e-2, max_train_steps=2)


def test_one_photo_is_enough_whatever_the_batch(options, tmp_path):
    photos = make_photos(tmp_path / "photo", count=1)
    path = train(TrainConfig(**{**options, "instance_data_dir": photos}, train_batch_size=2, output_dir=tmp_path / "run"))
    assert all(len(record["losses"]) == 2 for record in read_run(path.parent)["log"])


def test_the_file_says_its_rank_alpha_base_and_words(options, tmp_path):
    path = train(TrainConfig(**options, rank=2, lora_alpha=3, train_text_encoder=True, text_encoder_rank=4,
                             output_dir=tmp_path / "run"))
    _, header = read_safetensors(path)
    assert (header["base"], header["trigger_words"]) == ("base", "a photo of sks dog")
    said = json.loads(header[HEADER_KEY])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (2, 3)
    assert (said["text_encoder.r"], said["text_encoder.lora_alpha"]) == (4, 6)


def test_a_run_starts_without_what_it_needs_only_at_its_end():
    code = ("import sys, dbcore, dbcore.engines.train; from dbcore.models.base import load_base; "
            "load_base(dbcore.TOY_BASE).unet; print(*sys.modules)")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "diffusers.models.modeling_utils" in there
    assert not {"matplotlib", "diffusers.pipelines.pipeline_utils"} & set(there)


# --- what is in memory when ---------------------------------------------------------------------------


def loads_and_lets_go(config, monkeypatch):
    """What a run did, in order: "unet", "vae" or "text_encoder" loaded, "-unet" let go, "photos" encoded, "drawn" pictures."""
    order, draw = [], StableDiffusion.draw
    load, release, encode = StableDiffusion._load, StableDiffusion.release, StableDiffusion.encode_images
    monkeypatch.setattr(StableDiffusion, "_load", lambda base, cls, part, *a: (order.append(part), load(base, cls, part, *a))[1])
    monkeypatch.setattr(StableDiffusion, "release", lambda base, *parts: (
        order.extend("-" + part for part in parts if part in vars(base)), release(base, *parts)))
    monkeypatch.setattr(StableDiffusion, "encode_images", lambda *a: (encode(*a), order.append("photos"))[0])
    monkeypatch.setattr(StableDiffusion, "draw", lambda *a, **more: (draw(*a, **more), order.append("drawn"))[0])
    train(config)
    return list(dict.fromkeys(order))


def test_the_encoders_are_gone_when_the_unet_comes(options, tmp_path, monkeypatch):
    order = loads_and_lets_go(TrainConfig(**options, output_dir=tmp_path), monkeypatch)
    assert order == ["text_encoder", "-text_encoder", "vae", "photos", "-vae", "unet"]


def test_low_vram_lets_the_unet_go_between_class_images_and_steps(options, tmp_path, monkeypatch):
    config = TrainConfig(**options, low_vram=True, with_prior_preservation=True, class_prompt="a photo of a dog",
                         num_class_images=1, class_data_dir=tmp_path / "class", output_dir=tmp_path / "run")
    order = loads_and_lets_go(config, monkeypatch)
    assert order.index("-text_encoder") < order.index("drawn")
    assert order.index("unet") < order.index("drawn") < order.index("-unet") < order.index("photos")
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    learned = [t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name]
    assert learned and all(learned)


def test_full_finetuning_has_whole_weights_whatever_low_vram_says(options, tmp_path):
    folder = finetune(TrainConfig(**options, low_vram=True, output_dir=tmp_path))
    assert {p.dtype for p in StableDiffusion(folder).unet.parameters()} == {torch.float32}


# --- packages that may be missing ---------------------------------------------------------------------


@pytest.mark.parametrize(("option", "package"), [
    ({"optimizer": "AdamW8bit"}, "bitsandbytes"), ({"optimizer": "Prodigy"}, "prodigyopt"),
    ({"report_to": "wandb"}, "wandb"),
])  # fmt: skip
def test_a_missing_package_is_named_with_its_command_before_any_model_is_loaded(option, package, options, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("dbcore.engines.train.load_base", lambda *args, **more: pytest.fail("a model was loaded"))
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"--{name} {value} needs one more package: pip install {package}$"):
        train(TrainConfig(**{**options, **option}, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_which_nobody_named_the_run_goes_on(options, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else find(name))
    path = train(TrainConfig(**{**options, "report_to": "tensorboard"}, output_dir=tmp_path / "run"))
    assert "pip install tensorboard" in capsys.readouterr().out and len(read_run(path.parent)["log"]) == 2


OPTIMIZERS = {
    "AdamW8bit": ("bitsandbytes", lambda cls: SimpleNamespace(optim=SimpleNamespace(AdamW8bit=cls))),
    "Prodigy": ("prodigyopt", lambda cls: SimpleNamespace(Prodigy=cls)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_options_reach_the_optimizer_of_another_package(name, options, tmp_path, monkeypatch):
    """A stand-in that takes the packages' arguments; test_exact.py runs those that are installed."""
    given, (package, stand_in) = {}, OPTIMIZERS[name]

    class Optimizer(torch.optim.SGD):
        def __init__(self, params, lr=None, **more):
            given.update(more)
            super().__init__(params, lr=lr or 0.0)

    monkeypatch.setitem(sys.modules, package, stand_in(Optimizer))
    path = train(TrainConfig(**{**options, "learning_rate": 0.5}, optimizer=name, adam_beta1=0.8, adam_beta2=0.99,
                             adam_weight_decay=0.2, adam_epsilon=1e-5, output_dir=tmp_path / "run"))
    assert {"betas": (0.8, 0.99), "weight_decay": 0.2, "eps": 1e-5}.items() <= given.items()
    assert [record["lr"] for record in read_run(path.parent)["log"]] == [0.5, 0.5]


# --- trackers -----------------------------------------------------------------------------------------


def shown_in(folder):
    """({prompt: pictures as arrays}, log) of a run's own folder, to compare a tracker's with."""
    found = read_run(folder)
    names = sorted(name for name in found["pictures"] if "grid" not in name)
    arrays = [np.asarray(Image.open(folder / name)) for name in names]
    return {prompt: arrays[2 * k:2 * k + 2] for k, prompt in enumerate(PROMPTS)}, found["log"]


def test_tensorboard_has_the_losses_and_the_validation_pictures(options, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    train(TrainConfig(**{**options, "report_to": "tensorboard"}, **VALIDATED, output_dir=folder))
    pictures, log = shown_in(folder)
    events = accumulator.EventAccumulator(str(folder / "logs" / "dbcore")).Reload()
    for name in ("loss", "lr"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (record["step"], pytest.approx(record[name])) for record in log]
    for prompt in PROMPTS:
        (event,) = events.Images(prompt)
        assert event.step == 2
        side_by_side = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(side_by_side, np.hstack(pictures[prompt]))


def test_weights_and_biases_has_them_too_and_no_token(options, tmp_path, monkeypatch):
    """A stand-in for the package, as far as accelerate calls it."""
    seen = SimpleNamespace(log=[], config={}, finished=False)
    run = SimpleNamespace(log=lambda values, step: seen.log.append((step, values)),
                          finish=lambda: setattr(seen, "finished", True))
    wandb = SimpleNamespace(init=lambda project: run, Image=lambda array: array, config=SimpleNamespace(
        update=lambda values, allow_val_change: seen.config.update(values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train(TrainConfig(**{**options, "report_to": "wandb"}, **VALIDATED, output_dir=tmp_path / "run"))
    pictures, log = shown_in(tmp_path / "run")
    assert [(step, values) for step, values in seen.log if "loss" in values] == [
        (record["step"], {"loss": record["loss"], "lr": record["lr"]}) for record in log]
    shown = {name: images for step, values in seen.log if step == 2 for name, images in values.items() if name in PROMPTS}
    assert all(np.array_equal(shown[prompt], pictures[prompt]) for prompt in PROMPTS)
    assert seen.finished and seen.config["learning_rate"] == 1e-2 and "hub_token" not in seen.config
