"""A run is a function of its options: repeated, stopped, resumed or watched, it ends in the same
bits."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import (
    LORA,
    files_of,
    finished_runs,
    leave_out_report,
    make_base,
    make_options,
    make_photos,
    read_run,
)
from safetensors.torch import load_file

from dbcore.config import ConfigError, GenerateConfig, TrainConfig, read_yaml
from dbcore.engines.checkpoint import STATE, TRAINING
from dbcore.engines.sample import with_base
from dbcore.engines.trained import PACKAGES
from dbcore.engines.trainer import Interrupted, train
from dbcore.models.embeddings import EMBEDS_NAME

VALIDATED = {"validation_prompt": ["a photo of sks dog"], "num_validation_images": 1,
             "validation_steps": 2}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 2}
TOKENS = {"train_text_encoder_ti": True, "token_abstraction": "sks"}
KINDS = {
    "plain": {},
    # 4 of 3 photos a step: mid-epoch
    "accumulation": {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    "prior preservation": PRIOR,
    "buckets": {**PRIOR, "aspect_ratio_buckets": "24,40;40,24", "instance_data_dir": "oblongs",
                "train_batch_size": 2, "gradient_accumulation_steps": 2},
    "prior prediction": {"prior_prediction": True, "class_prompt": "a photo of a dog"},
    "words": {"caption_dropout": 0.5, "shuffle_tags": True, "instance_prompt": "sks dog, red, blue",
              "train_batch_size": 2},
    "EMA": {"use_ema": True, "ema_decay": 0.5},
    "text encoder": {"train_text_encoder": True, "train_text_encoder_frac": 0.75},
    "new tokens": {**TOKENS, "use_ema": True},
    "new tokens, kept from the middle on": {**TOKENS, **PRIOR, "initializer_concept": "a dog",
                                            "gradient_accumulation_steps": 2},
    "new tokens in buckets": {**TOKENS, "aspect_ratio_buckets": "24,40;40,24",
                              "instance_data_dir": "oblongs", "train_batch_size": 2},
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
    "T-LoRA": {"use_tlora": True, "train_batch_size": 2, "prior_prediction": True,
               "class_prompt": "a photo of a dog"},
    "OFT": {"adapter": "oft", "train_text_encoder": True},
    "LoKr": {"adapter": "lokr", "rank": 2},
    "LoHa": {"adapter": "loha"},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "uncached": {"cache_latents": False, "pre_compute_text_embeddings": False,
                 "train_batch_size": 2},
    "Adafactor": {"optimizer": "Adafactor"},
    "Prodigy": {"optimizer": "Prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "AdamWScheduleFree"},
    "8-bit AdamW": {"optimizer": "AdamW8bit", "rank": 256},  # smaller matrices keep float32 states
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        leave_out_report(patch)
        for size in ((48, 30), (30, 48)):
            make_photos(folder / "oblongs" / str(size), count=2, size=size)
        yield make_options(folder, learning_rate=1e-2)


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """A function: the outcome of a run that nothing disturbs, kept for the tests that compare with
    it."""
    known = {}

    def outcome(**more):
        key = repr(sorted(more.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            train(TrainConfig(**{**options, **more}, output_dir=folder))
            known[key] = folder
        return known[key]

    return outcome


def one_step_at_a_time(options, folder, steps=4):
    """Stop after every step, and go on with `latest`, as often as it takes."""
    for done in range(1, steps):
        with pytest.raises(Interrupted, match=f"Stopped after step {done} of {steps}"):
            train(TrainConfig(**options, output_dir=folder, resume_from_checkpoint="latest"),
                  should_stop=lambda: True)
    train(TrainConfig(**options, output_dir=folder, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_step_and_resumed_is_uninterrupted(kind, options, uninterrupted,
                                                               tmp_path):
    more = {**KINDS[kind], **VALIDATED}
    if more.get("optimizer") in PACKAGES:
        pytest.importorskip(PACKAGES[more["optimizer"]])
    one_step_at_a_time({**options, **more}, tmp_path / "run")
    expected = read_run(uninterrupted(**more))
    assert len(expected["log"]) == 4
    assert len(expected["pictures"]) == 4
    assert read_run(tmp_path / "run") == expected


def test_the_same_seed_is_the_same_bytes_and_another_is_not(options, uninterrupted, tmp_path):
    first = read_run(uninterrupted(**VALIDATED))
    train(TrainConfig(**options, **VALIDATED, seed=0, output_dir=tmp_path / "again"))
    assert read_run(tmp_path / "again") == first  # and 0, the default, is a seed
    other = read_run(uninterrupted(**VALIDATED, seed=1))
    assert other["lora"] != first["lora"]
    assert other["log"] != first["log"]
    assert all(other["pictures"][name] != first["pictures"][name] for name in first["pictures"])


# options at the value at which they change nothing, and what they are beside
NEUTRAL = {
    "caption_dropout": ({"caption_dropout": 1e-12}, {}),
    "shuffle_tags": ({"shuffle_tags": True}, {}),  # of a prompt that is one tag
    "aspect_ratio_buckets": ({"aspect_ratio_buckets": "32,32"}, {}),
    "use_tlora": ({"use_tlora": True}, {"rank": 1}),
    "use_rslora": ({"use_rslora": True}, {"rank": 1}),
    "weighting_scheme": ({"weighting_scheme": "none"}, {}),
    "snr_gamma": ({"snr_gamma": 1e12}, {}),
    "use_ema": ({"use_ema": True, "ema_decay": 0.0}, {}),
    "lr_scheduler": ({"lr_scheduler": "constant_with_warmup"}, {}),
    "cache_latents": ({"cache_latents": False, "pre_compute_text_embeddings": False}, {}),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_option_at_its_neutral_value_is_no_option(name, options, uninterrupted, tmp_path):
    more, beside = NEUTRAL[name]
    train(TrainConfig(**{**options, **beside, **more}, output_dir=tmp_path))
    plain, found = load_file(uninterrupted(**beside) / LORA), load_file(tmp_path / LORA)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[key], found[key]) for key in plain)
    assert read_run(tmp_path)["log"] == read_run(uninterrupted(**beside))["log"]


def test_the_text_encoder_stops_after_its_share_of_the_steps(uninterrupted):
    folder = uninterrupted(**KINDS["text encoder"], checkpointing_steps=1)
    second, third, last = (load_file(folder / f"checkpoint-{step}" / LORA) for step in (2, 3, 4))
    words = {name for name in last if name.startswith("text_encoder.")}
    assert words
    assert last.keys() - words
    for name in last:
        moves = name not in words
        assert (second[name] != third[name]).any(), name
        assert bool((third[name] != last[name]).any()) == moves, name


def test_new_tokens_stay_as_they_are_after_their_share_of_the_steps(uninterrupted):
    folder = uninterrupted(**TOKENS, train_text_encoder_ti_frac=0.75, checkpointing_steps=1)
    rows = [load_file(folder / f"checkpoint-{step}" / EMBEDS_NAME)["clip_l"]
            for step in (1, 2, 3, 4)]
    assert (rows[0] != rows[1]).all()
    assert (rows[1] != rows[2]).all()
    assert torch.equal(rows[2], rows[3])
    assert torch.equal(rows[3], load_file(folder / EMBEDS_NAME)["clip_l"])


@pytest.mark.parametrize("which", ["checkpoint-2", "{folder}/checkpoint-2"])
def test_a_checkpoint_is_resumed_by_name_or_path(which, options, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output_dir=folder), should_stop=stop_after(2))
    train(TrainConfig(**options, output_dir=folder,
                      resume_from_checkpoint=which.format(folder=folder)))
    assert read_run(folder) == read_run(uninterrupted())


def test_a_checkpoint_is_resumed_in_another_folder(options, uninterrupted, tmp_path):
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output_dir=tmp_path / "first"), should_stop=stop_after(2))
    before = files_of(tmp_path / "first")
    train(TrainConfig(**options, output_dir=tmp_path / "second",
                      resume_from_checkpoint=tmp_path / "first" / "checkpoint-2"))
    assert read_run(tmp_path / "second") == read_run(uninterrupted())
    assert files_of(tmp_path / "first") == before
    # another run's LoRA is not run over
    with pytest.raises(ConfigError, match="holds a run already"):
        train(TrainConfig(**options, output_dir=uninterrupted(),
                          resume_from_checkpoint=tmp_path / "first" / "checkpoint-2"))


def stop_after(steps):
    left = iter(range(1, steps + 1))
    return lambda: next(left) == steps


@pytest.mark.parametrize("kind", ["plain", "EMA"])
def test_extended_from_4_to_6_steps_is_a_run_of_6(kind, options, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted(**KINDS[kind], **VALIDATED), tmp_path / "run")
    longer = {**options, **KINDS[kind], **VALIDATED, "max_train_steps": 6}
    train(TrainConfig(**longer, output_dir=folder, resume_from_checkpoint="latest"))
    assert read_run(folder) == read_run(uninterrupted(**KINDS[kind], **VALIDATED,
                                                      max_train_steps=6))


@pytest.mark.parametrize("length", [{}, {"max_train_steps": None, "num_train_epochs": 1}],
                         ids=["steps", "epochs"])
def test_a_finished_run_resumed_says_so_and_changes_nothing(length, options, uninterrupted, capsys):
    folder = uninterrupted(**length)
    before = files_of(folder)
    train(TrainConfig(**{**options, **length}, output_dir=folder, resume_from_checkpoint="latest"))
    assert "is finished" in capsys.readouterr().out
    assert files_of(folder) == before


@pytest.mark.parametrize("more", [
    VALIDATED, {**VALIDATED, "validation_steps": 1, "num_validation_images": 3,
                "validation_prompt": ["a red car", "a"]},
    {"checkpointing_steps": 1}, {"checkpointing_steps": 1, "checkpoints_total_limit": 1},
    {"report_to": "tensorboard"},
], ids=["validated", "often", "checkpoints", "limited", "tracked"])  # fmt: skip
def test_watching_and_saving_change_no_weight(more, options, uninterrupted):
    watched, plain = read_run(uninterrupted(**more)), read_run(uninterrupted())
    assert (watched["lora"], watched["log"]) == (plain["lora"], plain["log"])


def test_making_the_class_images_changes_no_weight(options, uninterrupted, tmp_path, monkeypatch):
    made = read_run(uninterrupted(**PRIOR))
    train(TrainConfig(**options, **PRIOR, output_dir=tmp_path / "reused"))
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "empty"))
    train(TrainConfig(**options, **PRIOR, output_dir=tmp_path / "made again"))
    assert len(list((tmp_path / "empty").rglob("*.png"))) == 2
    assert read_run(tmp_path / "reused") == read_run(tmp_path / "made again") == made


# --- resumed with other options -------------------------------------------------------------------

CHANGED = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_weight_decay": 0.5, "adam_epsilon": 1e-3}


def resumed_with(folder, options, monkeypatch, **changed):
    """The `Run` that goes on after 2 steps with other options, for 1 step more."""
    seen = finished_runs(monkeypatch)
    with pytest.raises(Interrupted):
        train(TrainConfig(**{**options, "checkpointing_steps": 1}, output_dir=folder),
              should_stop=stop_after(2))
    train(TrainConfig(**{**options, **changed, "max_train_steps": 3}, output_dir=folder,
                      resume_from_checkpoint="latest"))
    return seen[0]


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Prodigy"])
def test_what_is_announced_as_changed_is_in_force(optimizer, options, tmp_path, monkeypatch,
                                                  capsys):
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    run = resumed_with(tmp_path, {**options, "optimizer": optimizer}, monkeypatch, **CHANGED)
    said = capsys.readouterr().out
    assert all(f"--{name} was " in said and f"is {value} now" in said
               for name, value in CHANGED.items())
    wanted = {"betas": (0.5, 0.9), "weight_decay": 0.5, "eps": 1e-3}
    assert all(wanted.items() <= group.items() for group in run.trained.optimizer.param_groups)


def test_adamws_step_after_resuming_is_that_of_the_options_now(options, tmp_path, monkeypatch):
    """m, v and w after the step from those before it, by the paper (Loshchilov & Hutter 2019)."""
    resumed_with(tmp_path, options, monkeypatch, **CHANGED)
    before, after = (torch.load(tmp_path / f"checkpoint-{step}" / TRAINING, weights_only=True)
                     for step in (2, 3))
    rate, step = options["learning_rate"], 3
    for number, (w0, w) in enumerate(zip(before["weights"], after["weights"])):
        states = (saved["optimizer"]["state"][number] for saved in (before, after))
        (m0, v0), (m, v) = ((state["exp_avg"], state["exp_avg_sq"]) for state in states)
        g = (m - 0.5 * m0) / 0.5
        assert torch.allclose(v, 0.9 * v0 + 0.1 * g ** 2, rtol=1e-3, atol=1e-12)
        moved = (m / (1 - 0.5 ** step)) / ((v / (1 - 0.9 ** step)).sqrt() + 1e-3)
        assert torch.allclose(w, w0 * (1 - rate * 0.5) - rate * moved, rtol=1e-4, atol=1e-7)


def test_a_run_in_another_precision_goes_on_in_fp16(options, tmp_path, monkeypatch):
    """Its gradient scaler is begun anew: a run without one has saved nothing for it."""
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output_dir=tmp_path), should_stop=stop_after(2))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler",
                        lambda device, enabled: scaler(device, enabled=True))
    train(TrainConfig(**options, output_dir=tmp_path, resume_from_checkpoint="latest"))
    assert len(read_run(tmp_path)["log"]) == 4


# --- resumed elsewhere, or with other data --------------------------------------------------------


def begun(options, folder):
    """A run of 4 steps, stopped after 2."""
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output_dir=folder), should_stop=stop_after(2))
    return folder


def resume(options, folder):
    train(TrainConfig(**options, output_dir=folder, resume_from_checkpoint="latest"))
    return read_run(folder)


def test_base_and_photos_may_lie_elsewhere_and_nothing_is_said(options, uninterrupted, tmp_path,
                                                               monkeypatch, capsys):
    """Begun with relative paths, resumed from another folder, and with copies of both."""
    world = Path(options["instance_data_dir"]).parent
    monkeypatch.chdir(world)
    run = begun({**options, "pretrained_model_name_or_path": "base",
                 "instance_data_dir": "./photos/"}, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "photos"):
        shutil.copytree(world / name, tmp_path / "elsewhere" / name)
    capsys.readouterr()
    moved = {"pretrained_model_name_or_path": "elsewhere/base",
             "instance_data_dir": "elsewhere/photos"}
    assert resume({**options, **moved}, run) == read_run(uninterrupted())
    assert "differs" not in capsys.readouterr().out


def test_a_run_stores_full_paths_so_that_generate_finds_the_base_from_any_folder(options, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.chdir(Path(options["instance_data_dir"]).parent)
    here = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos",
            "max_train_steps": 1}
    train(TrainConfig(**{**options, **here}, output_dir=tmp_path / "run"))
    stored = read_yaml(tmp_path / "run" / "config.yaml", TrainConfig)
    for name in ("pretrained_model_name_or_path", "instance_data_dir"):
        assert stored[name] == str(Path(here[name]).absolute())
    monkeypatch.chdir(tmp_path)
    config = with_base(GenerateConfig(checkpoint_dir=["run"]))
    assert Path(config.pretrained_model_name_or_path).is_dir()


def test_another_base_in_the_same_place_is_refused(options, tmp_path):
    world = Path(options["instance_data_dir"]).parent
    more = {**options,
            "pretrained_model_name_or_path": str(shutil.copytree(world / "base",
                                                                 tmp_path / "base"))}
    run = begun(more, tmp_path / "run")
    make_base(tmp_path / "base", seed=1)
    before = files_of(run)
    with pytest.raises(ConfigError,
                       match=r"--pretrained_model_name_or_path .*/base: its weights are not those"):
        resume(more, run)
    assert files_of(run) == before


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: Image.new("RGB", (40, 40), "red").save(folder / "new.png"),
     "1 added (new.png)"),
    (lambda folder: (folder / "1.png").unlink(), "1 taken away (1.png)"),
    (lambda folder: Image.new("RGB", (40, 40), "red").save(folder / "1.png"), "1 changed (1.png)"),
    (lambda folder: (folder / "1.txt").write_text("a dog asleep"), "1 changed (1.png)"),
    (lambda folder: Image.new("L", (48, 40), 255).save(folder / "1.mask.png"), "1 changed (1.png)"),
], ids=["added", "taken away", "other pixels", "captioned", "masked"])  # fmt: skip
def test_other_photos_are_named(change, words, options, tmp_path, capsys):
    photos = shutil.copytree(options["instance_data_dir"], tmp_path / "photos")
    more = {**options, "instance_data_dir": str(photos)}
    run = begun(more, tmp_path / "run")
    change(photos)
    resume(more, run)
    assert ("The photos are not those of the run to resume "
            f"({words}): the rest" in capsys.readouterr().out)


def test_other_class_photos_are_named(options, tmp_path, capsys):
    more = {**options, **PRIOR, "class_data_dir": str(make_photos(tmp_path / "class", seed=2))}
    run = begun(more, tmp_path / "run")
    (tmp_path / "class" / "2.png").unlink()
    resume(more, run)
    assert ("The class photos are not those of the run to resume (1 "
            "taken away (2.png))" in capsys.readouterr().out)


def test_another_number_of_processes_is_said(options, tmp_path, capsys):
    run = begun(options, tmp_path / "run")
    state = json.loads((run / "checkpoint-2" / STATE).read_text())
    state["circumstances"]["processes"] = 2
    (run / "checkpoint-2" / STATE).write_text(json.dumps(state))
    resume(options, run)
    assert ("The number of processes was 2 in the run to "
            "resume and is 1 now" in capsys.readouterr().out)


@pytest.mark.parametrize(("more", "said"), [
    ({}, False), ({"lr_scheduler": "cosine"}, True),
    ({"train_text_encoder": True, "train_text_encoder_frac": 0.5}, True), (TOKENS, True),
    ({**TOKENS, "train_text_encoder_ti_frac": 1}, False),
], ids=str)
def test_another_length_is_said_where_something_depends_on_it(more, said, options, tmp_path,
                                                              capsys):
    run = begun({**options, **more}, tmp_path / "run")
    resume({**options, **more, "max_train_steps": 3}, run)
    assert ("was to have 4 steps and has 3 now, on which --" in capsys.readouterr().out) == said


# --- learning rates -------------------------------------------------------------------------------

RATE, STEPS, WARMUP = 1e-3, 8, 2


def progress(step):
    return (step - WARMUP) / (STEPS - WARMUP)


SCHEDULES = {  # the factor of a step after the warm-up
    "constant_with_warmup": lambda step: 1,
    "linear": lambda step: 1 - progress(step),
    "cosine": lambda step: (1 + math.cos(math.pi * progress(step))) / 2,
    "cosine_with_restarts": lambda step: (1 + math.cos(math.pi * (2 * progress(step) % 1))) / 2,
    "polynomial": lambda step: (1 - progress(step)) ** 3 * (1 - 1e-7 / RATE) + 1e-7 / RATE,
}


def rates(folder):
    return [record["lr"] for record in read_run(folder)["log"]]


def test_a_constant_rate_is_constant(uninterrupted):
    assert rates(uninterrupted(learning_rate=RATE)) == [RATE] * 4


def test_scale_lr_counts_the_photos_of_a_step(uninterrupted):
    scaled = uninterrupted(learning_rate=RATE, scale_lr=True, train_batch_size=2,
                           gradient_accumulation_steps=3)
    assert rates(scaled) == pytest.approx([6 * RATE] * 4)


@pytest.mark.parametrize(("name", "accumulation"),
                         [*((name, 1) for name in SCHEDULES), ("linear", 4)])
def test_the_rate_at_every_step(name, accumulation, uninterrupted):
    more = {"lr_scheduler": name, "lr_warmup_steps": WARMUP, "lr_num_cycles": 2, "lr_power": 3}
    found = rates(uninterrupted(**more, learning_rate=RATE, max_train_steps=STEPS,
                                gradient_accumulation_steps=accumulation))
    factors = [step / WARMUP if step < WARMUP else SCHEDULES[name](step) for step in range(STEPS)]
    assert found == pytest.approx([RATE * factor for factor in factors])
