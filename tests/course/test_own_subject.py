"""Notebook 09's helpers: the plan follows the card, a check-up sees what is wrong with a run, and
what is taken home is whole."""

import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dbcore.config import TrainConfig, write_yaml
from dbcore.course import own_subject
from dbcore.course.notebook import describe_subject, find_subject
from dbcore.course.own_subject import STARTS, TOY, examine_run, keep, pack_run, plan_run
from dbcore.models.adapter import Adapter, Layer

KLEIN, SDXL, SD15 = STARTS


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of so many GB, with bf16 or without; a base needs what `needs` says, by its name."""
    def pretend(gigabytes, needs, bf16=True):
        card = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        half = "bf16" if bf16 else "fp16"
        monkeypatch.setattr(own_subject, "best_precision", lambda device: half)

        def advise(config, memory):
            needed = needs[config.pretrained_model_name_or_path]
            changes = {} if needed * 1e9 <= memory else {"gradient_checkpointing": True}
            return changes if needed * 1e9 <= 2 * memory else None

        monkeypatch.setattr(own_subject, "advise", advise)
    return pretend


@pytest.mark.parametrize(("gigabytes", "bf16", "base", "changes"), [
    (24, True, KLEIN, {}),
    (24, False, SDXL, {}),
    (9, True, KLEIN, {"gradient_checkpointing": True}),
    (9, False, SDXL, {"gradient_checkpointing": True}),
    (4, True, SD15, {}),
])
def test_auto_takes_the_best_base_that_fits(gpu, capsys, gigabytes, bf16, base, changes):
    gpu(gigabytes, {KLEIN: 12, SDXL: 10, SD15: 4}, bf16)
    plan = plan_run(TrainConfig())
    assert plan.pretrained_model_name_or_path == base
    assert plan.max_train_steps == STARTS[base].steps
    assert all(getattr(plan, name) == value for name, value in changes.items())
    printed = capsys.readouterr().out
    assert (f"{STARTS[KLEIN].title}: needs bf16" in printed) != bf16
    assert f"{STARTS[base].title}: fits into {gigabytes} GB." in printed


def test_a_base_that_fits_only_at_a_lower_resolution_does_not_fit(gpu, monkeypatch, capsys):
    gpu(8, {})
    monkeypatch.setattr(own_subject, "advise", lambda config, memory: {"resolution": 384})
    assert plan_run(TrainConfig()).pretrained_model_name_or_path.endswith(TOY)
    assert "SDXL: does not fit into 8 GB." in capsys.readouterr().out


def test_without_a_gpu_it_is_the_toy_base(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_run(TrainConfig())
    assert plan.pretrained_model_name_or_path.endswith(TOY)
    assert plan.rank == "auto"
    assert f"{TOY}, {own_subject.TOY_STEPS} steps." in capsys.readouterr().out


def test_a_base_by_name_is_not_weighed_and_what_was_chosen_stays():
    plan = plan_run(TrainConfig(rank=4), SD15, 7)
    assert (plan.pretrained_model_name_or_path, plan.max_train_steps, plan.rank) == (SD15, 7, 4)
    assert plan_run(TrainConfig(), SD15).rank == 16


def test_every_real_base_starts_with_400_to_800_steps():
    assert all(400 <= start.steps <= 800 for start in STARTS.values())




def test_a_word_is_tested_beside_the_class_with_the_same_seeds(monkeypatch):
    asked = []
    monkeypatch.setattr(own_subject, "image_grid", lambda rows, *labels, **_: (rows, *labels))
    base = SimpleNamespace(generate=lambda prompts, seeds: asked.append((prompts, seeds))
                           or ["image"] * len(seeds))
    rows, labels, _ = own_subject.identifier_sheet(base, ["ohwx"], "owl", count=2, seed=3)
    assert labels == ["a photo of an owl", "a photo of ohwx owl"]
    assert asked == [(["a photo of an owl"] * 2, [3, 4]), (["a photo of ohwx owl"] * 2, [3, 4])]
    assert len(rows) == 2


@pytest.fixture
def run(tmp_path):
    """A run of two steps, and one validation of two prompts after each."""
    folder = tmp_path / "run"
    photos = tmp_path / "photos"
    config = TrainConfig(pretrained_model_name_or_path="base", max_train_steps=2, rank=4,
                         learning_rate=0.1, validation_prompt=["one", "two"],
                         instance_data_dir=photos)
    folder.mkdir(), photos.mkdir()
    Image.new("RGB", (8, 8), (0, 0, 250)).save(photos / "0.png")
    write_yaml(config, folder / "config.yaml")
    log(folder, [0.5, 0.25])
    for step in (1, 2):
        inside = folder / "validation" / f"step-{step:06d}"
        inside.mkdir(parents=True)
        for row in range(2):
            Image.new("RGB", (8, 8), (100 * step, 50 * row, 0)).save(inside / f"{row}-0.png")
        Image.new("RGB", (8, 8)).save(inside / "grid.png")
    (folder / "README.md").write_text("# x\n\n## Did it learn?\n\nYes, it did: by 20 of 255.\n")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return folder


def log(folder, losses, lr=0.1):
    lines = [json.dumps({"step": k, "loss": loss, "lr": lr}) for k, loss in enumerate(losses, 1)]
    (folder / "log.jsonl").write_text("\n".join(lines))


def test_a_healthy_run_is_told_so(run):
    assert examine_run(run) == [
        "steps: 2 of 2, all of them", "loss: a number at each step",
        "learning rate: 0.1 asked for, in force 0.1",
        "in force: resolution auto, rank 4, train_batch_size auto, mixed_precision auto",
        "validation images: 4, 0 of them black", "report: Yes, it did"]


def test_a_sick_run_is_told_what_it_has(run):
    log(run, [float("nan")], lr=0.05)
    Image.new("RGB", (8, 8)).save(run / "validation" / "step-000002" / "1-0.png")
    (run / "README.md").unlink()
    lines = examine_run(run)
    assert lines[0] == "steps: 1 of 2; cut short"
    assert lines[1] == "loss: not a number at step 1"
    assert lines[2] == "learning rate: 0.1 asked for, in force 0.05"
    assert lines[4] == "validation images: 4, 1 of them black"
    assert lines[5] == "report: none, the run did not end"


def test_the_sheet_has_the_photo_first_a_row_for_a_prompt_and_a_column_for_a_step(run, monkeypatch):
    monkeypatch.setattr(own_subject, "image_grid", lambda rows, *labels, **_: (rows, *labels))
    rows, prompts, columns = own_subject.validation_sheet(run)
    assert (prompts, columns) == (["one", "two"], ["your subject", "step 1", "step 2"])
    assert [[image and image.getpixel((0, 0)) for image in row] for row in rows] == [
        [(0, 0, 250), (100, 0, 0), (200, 0, 0)], [None, (100, 50, 0), (200, 50, 0)]]


def test_a_parcel_holds_the_lora_its_card_and_what_else_is_given(run, tmp_path):
    more = tmp_path / "other.safetensors"
    more.write_bytes(b"kohya")
    names = pack_run(run, tmp_path / "my.zip", [more])
    assert {"pytorch_lora_weights.safetensors", "README.md", "config.yaml", "other.safetensors",
            "validation/step-000001/grid.png"} <= set(names)
    assert "log.jsonl" not in names
    with zipfile.ZipFile(tmp_path / "my.zip") as file:
        assert file.read("pytorch_lora_weights.safetensors") == b"weights"


def test_it_goes_to_the_drive_where_there_is_one(tmp_path):
    archive = tmp_path / "my.zip"
    archive.write_bytes(b"zip")
    assert own_subject.mount_drive() is None
    assert keep(archive) == archive
    kept = keep(archive, tmp_path / "drive")
    assert kept == tmp_path / "drive" / "dbcore" / "my.zip"
    assert kept.read_bytes() == b"zip"


def test_in_colab_it_is_offered_for_download(tmp_path, monkeypatch):
    offered = []
    files = SimpleNamespace(download=offered.append)
    monkeypatch.setitem(own_subject.sys.modules, "google.colab", SimpleNamespace(files=files))
    keep(tmp_path / "my.zip")
    assert offered == [str(tmp_path / "my.zip")]


def test_a_prepared_folder_becomes_a_subject_of_the_other_notebooks(tmp_path):
    about = describe_subject("owl", "ohwx")
    own_subject.write_subject(tmp_path, about)
    assert find_subject(str(tmp_path)) == (tmp_path, about)


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_other_tools_get_the_names_that_they_read(run, tmp_path, monkeypatch, capsys, network):
    name = "blocks.0.attn.to_q"
    layer = Layer(down=torch.ones(4, 8), up=torch.ones(8, 4), scale=1.0)
    monkeypatch.setattr(own_subject, "read_adapter", lambda *_: Adapter({network: {name: layer}}))
    path = own_subject.for_other_tools(run, tmp_path / "my.safetensors", "sks owl")
    with safe_open(path, "pt") as file:
        (first, *_), notes = sorted(file.keys()), file.metadata()
    if network == "unet":
        assert first == "lora_unet_blocks_0_attn_to_q.alpha"
        assert notes["modelspec.trigger_phrase"] == "sks owl"
    else:
        assert first == f"transformer.{name}.lora_A.weight"
        assert "kohya has no names for a transformer" in capsys.readouterr().out
