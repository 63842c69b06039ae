"""What a run needs, what it hands to its optimizer and its tracker, and what its file says of
itself."""

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
from runs import LORA, finished_runs, leave_out_report, make_options, make_photos, read_run
from safetensors.torch import load_file

from dbcore.config import OPTIMIZERS, ConfigError, TrainConfig
from dbcore.engines.advice import remedy
from dbcore.engines.callbacks import Validation
from dbcore.engines.checkpoint import TRAINING
from dbcore.engines.losses import dreambooth_loss
from dbcore.engines.trained import PACKAGES
from dbcore.engines.trainer import Run, train
from dbcore.models.lora_files import HEADER_KEY, read_safetensors
from dbcore.models.stable_diffusion import StableDiffusion
from dbcore.toybench.finetune import finetune
from dbcore.utils.errors import Diverged, MemoryFull

PROMPTS = ["a photo of sks dog", "a red car"]
VALIDATED = {"validation_prompt": PROMPTS, "num_validation_images": 2, "validation_steps": 2}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        yield make_options(tmp_path_factory.mktemp("world"), learning_rate=1e-2, max_train_steps=2)


def test_one_photo_is_enough_whatever_the_batch(options, tmp_path):
    photos = make_photos(tmp_path / "photo", count=1)
    path = train(TrainConfig(**{**options, "instance_data_dir": photos}, train_batch_size=2,
                             output_dir=tmp_path / "run"))
    assert all(len(record["losses"]) == 2 for record in read_run(path.parent)["log"])


def test_the_file_says_its_rank_alpha_base_and_words(options, tmp_path):
    path = train(TrainConfig(**options, rank=2, lora_alpha=3, train_text_encoder=True,
                             text_encoder_rank=4, output_dir=tmp_path / "run"))
    _, header = read_safetensors(path)
    assert (header["base"], header["trigger_words"]) == ("base", "a photo of sks dog")
    said = json.loads(header[HEADER_KEY])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (2, 3)
    assert (said["text_encoder.r"], said["text_encoder.lora_alpha"]) == (4, 6)


def test_a_run_starts_without_what_it_needs_only_at_its_end():
    code = ("import sys, dbcore, dbcore.engines.trainer; from dbcore.models.base import load_base; "
            "load_base(dbcore.TOY_BASE).unet; print(*sys.modules)")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=True).stdout.split()
    assert "diffusers.models.modeling_utils" in there
    assert not {"matplotlib", "diffusers.pipelines.pipeline_utils"} & set(there)


@pytest.mark.parametrize(("more", "words"), [
    ({"lr_scheduler": "linear", "lr_warmup_steps": 500},
     "--lr_warmup_steps 500: the run has 2 steps, so the learning rate"),
    ({"validation_prompt": ["a dog"], "validation_steps": 500},
     "--validation_steps 500: the run has 2 steps, so nothing"),
], ids=["warm-up", "validation"])  # fmt: skip
def test_a_run_too_short_for_an_option_says_so(more, words, options, tmp_path, capsys):
    train(TrainConfig(**options, **more, output_dir=tmp_path))
    assert words in capsys.readouterr().out


# --- what is in memory when -----------------------------------------------------------------------


def loads_and_lets_go(config, monkeypatch):
    """What a run did, in order: "unet", "vae" or "text_encoder" loaded, "-unet" let go, "photos"
    encoded, "drawn" pictures."""
    order, draw = [], StableDiffusion.generate
    load, release = StableDiffusion.load_network, StableDiffusion.release
    encode = StableDiffusion.encode_images
    monkeypatch.setattr(StableDiffusion, "load_network",
                        lambda base, part: (order.append(part), load(base, part))[1])
    monkeypatch.setattr(StableDiffusion, "release", lambda base, *parts: (
        order.extend("-" + part for role in parts for part in base.networks(role)
                     if part in vars(base)), release(base, *parts)))
    monkeypatch.setattr(StableDiffusion, "encode_images",
                        lambda *a: (encode(*a), order.append("photos"))[0])
    monkeypatch.setattr(StableDiffusion, "generate",
                        lambda *a, **more: (draw(*a, **more), order.append("drawn"))[0])
    train(config)
    return list(dict.fromkeys(order))


def test_compiling_is_left_out_of_a_run_that_would_not_win_it_back(options, tmp_path, capsys,
                                                                   monkeypatch):
    monkeypatch.setattr("torch.compile", None)  # to call it would fail
    train(TrainConfig(**options, compile=True, output_dir=tmp_path))
    assert "--compile: 2 steps would not win back" in capsys.readouterr().out


def test_the_encoders_are_gone_when_the_unet_comes(options, tmp_path, monkeypatch):
    order = loads_and_lets_go(TrainConfig(**options, output_dir=tmp_path), monkeypatch)
    assert order == ["text_encoder", "-text_encoder", "vae", "photos", "-vae", "unet"]


def test_low_vram_lets_the_unet_go_between_class_images_and_steps(options, tmp_path, monkeypatch):
    config = TrainConfig(**options, low_vram=True, with_prior_preservation=True,
                         class_prompt="a photo of a dog",
                         num_class_images=1, class_data_dir=tmp_path / "class",
                         output_dir=tmp_path / "run")
    order = loads_and_lets_go(config, monkeypatch)
    assert order.index("-text_encoder") < order.index("drawn")
    assert order.index("unet") < order.index("drawn") < order.index("-unet") < order.index("photos")
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    learned = [t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name]
    assert learned
    assert all(learned)


def test_a_trained_text_encoder_is_heard_though_low_vram_had_remembered_the_frozen_one(
    options, tmp_path, monkeypatch):
    """For the prompt of the class images, which were drawn before there was a LoRA: else drift
    would be hidden."""
    seen = finished_runs(monkeypatch)
    train(TrainConfig(**options, low_vram=True, with_prior_preservation=True,
                      class_prompt="a photo of a dog",
                      num_class_images=1, train_text_encoder=True, text_encoder_lr=0.1,
                      class_data_dir=tmp_path / "class", output_dir=tmp_path / "run"))  # fmt: skip
    frozen_base = StableDiffusion(options["pretrained_model_name_or_path"])
    frozen, heard = (encode(["a photo of a dog"])["encoder_hidden_states"]
                     for encode in (frozen_base.encode_text, seen[0].prompts.encode))
    assert (heard - frozen).abs().max() > 0.01


def test_full_finetuning_has_whole_weights_whatever_low_vram_says(options, tmp_path):
    folder = finetune(TrainConfig(**options, low_vram=True, output_dir=tmp_path))
    assert {p.dtype for p in StableDiffusion(folder).unet.parameters()} == {torch.float32}


# --- a device whose memory is full ----------------------------------------------------------------


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_memory_that_is_full_ends_the_run_with_the_doctors_advice_and_its_checkpoints(
    options, tmp_path, monkeypatch):
    step = Run.step
    monkeypatch.setattr(Run, "step",
                        lambda run, number: full() if number == 1 else step(run, number))
    with pytest.raises(MemoryFull, match=r"full\. It takes less with --gradient_checkpointing; "
                       r".*checkpoint-1 is intact"):
        train(TrainConfig(**options, checkpointing_steps=1, output_dir=tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr("dbcore.engines.advice.there", lambda device: 1)
    assert "No option makes it small enough" in remedy(TrainConfig(**options), "cpu")


def test_memory_that_a_validation_fills_costs_no_step(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "generate", full)
    with pytest.raises(MemoryFull, match="checkpoint-2 is intact"):
        train(TrainConfig(**options, **VALIDATED, output_dir=tmp_path))
    monkeypatch.undo()
    leave_out_report(monkeypatch)
    assert train(TrainConfig(**options, resume_from_checkpoint="latest",
                             output_dir=tmp_path)).is_file()
    assert len(read_run(tmp_path)["log"]) == 2


# --- gradients that are no numbers ----------------------------------------------------------------


def poison(monkeypatch, steps):
    """In these steps the loss is as ever and every gradient is NaN: sqrt has an infinite slope at
    0."""
    counted, loss_of = [], dreambooth_loss

    def poisoned(prediction, *args):
        counted.append(1)
        loss, losses = loss_of(prediction, *args)
        return loss + (prediction.sum() * 0).sqrt() if len(counted) in steps else loss, losses

    monkeypatch.setattr("dbcore.engines.losses.dreambooth_loss", poisoned)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_without_a_number_changes_nothing_and_is_counted_and_said(optimizer, options,
                                                                         tmp_path, monkeypatch,
                                                                         capsys):
    """Whatever the device: neither the weights nor the optimizer's own numbers."""
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    poison(monkeypatch, {2})
    train(TrainConfig(**{**options, "max_train_steps": 3}, optimizer=optimizer,
                      checkpointing_steps=1, output_dir=tmp_path))
    first, second, third = ((tmp_path / f"checkpoint-{k}" / TRAINING).read_bytes()
                            for k in (1, 2, 3))
    assert first == second != third
    assert [record.get("skipped") for record in read_run(tmp_path)["log"]] == [None, True, None]
    assert capsys.readouterr().out.count("Step 2 changed nothing: a gradient was not a number") == 1


def test_a_step_that_the_scaler_skips_changes_nothing_but_its_scale(options, tmp_path,
                                                                    monkeypatch):
    made, make = [], torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: (
        made.append(make(device, init_scale=1024.0)) or made[-1]))
    poison(monkeypatch, {2})
    train(TrainConfig(**{**options, "max_train_steps": 3}, checkpointing_steps=1,
                      output_dir=tmp_path))
    first, second, third = (load_file(tmp_path / f"checkpoint-{k}" / LORA) for k in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    assert made[0].get_scale() == 512.0
    assert [record.get("skipped") for record in read_run(tmp_path)["log"]] == [None, True, None]


def test_many_such_steps_in_a_row_end_the_run_and_as_many_apart_do_not(options, tmp_path,
                                                                       monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(3, 20))
        with pytest.raises(Diverged, match="no numbers 10 times in a row, up to step 12"):
            train(TrainConfig(**{**options, "max_train_steps": 20}, output_dir=tmp_path / "row"))
    poison(monkeypatch, set(range(20)) - {9})
    train(TrainConfig(**{**options, "max_train_steps": 15}, output_dir=tmp_path / "apart"))


# --- the running mean of the weights --------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_running_mean_is_of_the_weights_of_every_step_and_not_of_those_before(decay, options,
                                                                                  tmp_path):
    more = {**options, "max_train_steps": 4}
    train(TrainConfig(**more, checkpointing_steps=1, output_dir=tmp_path / "each"))
    path = train(TrainConfig(**more, use_ema=True, ema_decay=decay, output_dir=tmp_path / "mean"))
    each = [load_file(tmp_path / "each" / f"checkpoint-{k}" / path.name) for k in (1, 2, 3, 4)]
    shares = torch.tensor([decay ** (4 - k) for k in (1, 2, 3, 4)])
    for name, mean in load_file(path).items():
        wanted = sum(share * weights[name] for share, weights in zip(shares / shares.sum(), each))
        assert torch.allclose(mean, wanted, rtol=1e-4, atol=1e-8), name


# --- packages that may be missing -----------------------------------------------------------------


@pytest.mark.parametrize(("option", "package"), [
    ({"optimizer": "AdamW8bit"}, "bitsandbytes"), ({"optimizer": "Prodigy"}, "prodigyopt"),
    ({"report_to": "wandb"}, "wandb"),
])  # fmt: skip
def test_a_missing_package_is_named_with_its_command_before_any_model_is_loaded(option, package,
                                                                                options, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("dbcore.engines.trainer.load_base",
                        lambda *args, **more: pytest.fail("a model was loaded"))
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"--{name} {value} needs one more package: "
                       f"pip install {package}$"):
        train(TrainConfig(**{**options, **option}, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_which_nobody_named_the_run_goes_on(options, tmp_path, monkeypatch,
                                                                capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name: None if name == "tensorboard" else find(name))
    path = train(TrainConfig(**{**options, "report_to": "tensorboard"},
                             output_dir=tmp_path / "run"))
    assert "pip install tensorboard" in capsys.readouterr().out
    assert len(read_run(path.parent)["log"]) == 2


@pytest.mark.parametrize("name", ["AdamW", *PACKAGES])
def test_the_options_reach_the_optimizer(name, options, tmp_path, monkeypatch):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    seen = finished_runs(monkeypatch)
    path = train(TrainConfig(**{**options, "learning_rate": 0.5}, optimizer=name, adam_beta1=0.8,
                             adam_beta2=0.99,
                             adam_weight_decay=0.2, adam_epsilon=1e-5, output_dir=tmp_path / "run"))
    (group,) = seen[0].trained.optimizer.param_groups
    assert {"betas": (0.8, 0.99), "weight_decay": 0.2, "eps": 1e-5}.items() <= group.items()
    assert type(seen[0].trained.optimizer).__name__ == name
    assert [record["lr"] for record in read_run(path.parent)["log"]] == [0.5, 0.5]


def test_a_schedule_free_optimizers_mean_is_saved_and_its_weights_come_back(options, tmp_path,
                                                                            monkeypatch):
    pytest.importorskip("schedulefree")
    seen = finished_runs(monkeypatch)
    path = train(TrainConfig(**options, optimizer="AdamWScheduleFree", output_dir=tmp_path / "run"))
    trained = seen[0].trained
    stepped = [p.detach().clone() for p in trained.parameters]
    with trained.averaged():
        mean = [p.detach().clone() for p in trained.parameters]
    assert all(torch.equal(p, before) for p, before in zip(trained.parameters, stepped))
    by_hand = [y + (1 - 1 / 0.9) * (trained.optimizer.state[p]["z"] - y)  # y = 0.9 x + 0.1 z
               for p, y in zip(trained.parameters, stepped)]
    assert all(torch.allclose(x, wanted, atol=1e-6) for x, wanted in zip(mean, by_hand))
    saved = load_file(path)
    assert sorted(float(x.sum()) for x in mean) == pytest.approx(
        sorted(float(t.sum()) for t in saved.values()), abs=1e-4)
    assert any(not torch.allclose(x, y, atol=1e-6) for x, y in zip(mean, stepped))


# --- trackers -------------------------------------------------------------------------------------


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
    wandb = SimpleNamespace(init=lambda project: run, Image=lambda array: array,
                            config=SimpleNamespace(
        update=lambda values, allow_val_change: seen.config.update(values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train(TrainConfig(**{**options, "report_to": "wandb"}, **VALIDATED,
                      output_dir=tmp_path / "run"))
    pictures, log = shown_in(tmp_path / "run")
    assert [(step, values) for step, values in seen.log if "loss" in values] == [
        (record["step"], {"loss": record["loss"], "lr": record["lr"]}) for record in log]
    shown = {name: images for step, values in seen.log if step == 2
             for name, images in values.items() if name in PROMPTS}
    assert all(np.array_equal(shown[prompt], pictures[prompt]) for prompt in PROMPTS)
    assert seen.finished
    assert seen.config["learning_rate"] == 1e-2
    assert "hub_token" not in seen.config
