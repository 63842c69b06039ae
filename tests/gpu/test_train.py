"""Training on a GPU: in half precision as in float32, without waiting, in a T4's memory."""

import json

import pytest
import torch
from runs import read_run
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines import trainer
from dbcore.engines.trainer import train

pytestmark = pytest.mark.gpu
PHOTOS = "data/subjects/dog"
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog",
         "num_class_images": 5, "class_data_dir": "data/subjects/cat"}


def run(base, folder, **options):
    return train(TrainConfig(**{
        "pretrained_model_name_or_path": str(base), "instance_data_dir": PHOTOS,
        "instance_prompt": "a photo of sks dog", "output_dir": str(folder), "report_to": "none",
        "num_report_images": 0, "max_train_steps": 8, "resolution": 512, "rank": 4,
        "mixed_precision": "bf16", **options}))


def log(path):
    return read_run(path.parent)["log"]


def losses(path):
    return [record["loss"] for record in log(path)]


@pytest.fixture(scope="module")
def whole(sd15, tmp_path_factory):
    """Eight steps in float32."""
    return run(sd15, tmp_path_factory.mktemp("whole") / "run", mixed_precision="no")


@pytest.fixture(scope="module")
def bf16(sd15, tmp_path_factory):
    return run(sd15, tmp_path_factory.mktemp("bf16") / "run")


@pytest.fixture(scope="module")
def fp16(sd15, tmp_path_factory):
    return run(sd15, tmp_path_factory.mktemp("fp16") / "run", mixed_precision="fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_learn_in_half_what_they_learn_in_float32(whole, request, precision):
    path = request.getfixturevalue(precision)
    assert not any("skipped" in record for record in log(path))
    assert losses(path) == pytest.approx(losses(whole), rel=0.05)
    assert likeness(path, whole) > 0.5  # of unrelated updates it is 0


def likeness(path, other):
    """The cosine of two LoRAs' B matrices, which begin at 0: 1 where both have learned the same."""
    one, two = (torch.cat([t.flatten() for name, t in sorted(load_file(file).items())
                           if "lora_B" in name])
                for file in (path, other))
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "fp16", **PRIOR},
                                     {"gradient_checkpointing": True}],
                         ids=["plain", "fp16 and class images", "checkpointing"])
def test_no_step_waits_for_the_gpu(sd15, tmp_path, monkeypatch, options):
    step, checked = trainer.Run.step, []

    def unwaiting(run, number):
        if number < 2:  # a graph is captured, and the optimizer makes its state
            return step(run, number)
        checked.append(number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(run, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Run, "step", unwaiting)
    run(sd15, tmp_path / "run", max_train_steps=5, **options)
    assert checked == [2, 3, 4]


def test_a_cuda_graph_is_captured_once(sd15, tmp_path, monkeypatch):
    captured, capture = [], torch.cuda.make_graphed_callables
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda *args, **more: captured.append(1) or capture(*args, **more))
    path = run(sd15, tmp_path / "run", max_train_steps=3)
    assert captured == [1]
    assert len(log(path)) == 3


def test_a_cuda_graph_learns_what_python_does(sd15, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("dbcore.models.replay.can_replay", lambda module: False)
    eager = run(sd15, tmp_path / "run")
    assert losses(bf16) == pytest.approx(losses(eager), rel=0.01)
    assert likeness(bf16, eager) > 0.95


def test_the_same_gpu_twice_gives_the_same_file(sd15, bf16, tmp_path):
    again = run(sd15, tmp_path / "run")
    print(f"likeness {likeness(bf16, again)}")
    assert losses(bf16) == losses(again)
    assert bf16.read_bytes() == again.read_bytes()


def test_a_run_in_fp16_is_resumed_with_the_scale_of_its_loss(sd15, fp16, tmp_path):
    run(sd15, tmp_path / "run", mixed_precision="fp16", max_train_steps=4)
    resumed = run(sd15, tmp_path / "run", mixed_precision="fp16", resume_from_checkpoint="latest")
    assert losses(resumed) == pytest.approx(losses(fp16), rel=0.01)
    assert likeness(resumed, fp16) > 0.95


def test_low_vram_takes_less_than_two_gigabytes(sd15, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    path = run(sd15, tmp_path / "run", low_vram=True, max_train_steps=3)
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(f"{memory:.2f} GB")
    assert log(path)[-1]["loss"] < 10
    assert memory < 2.0


def test_a_whole_run_with_its_pictures_fits_a_t4(sd15, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in sd15.iterdir():
        (base / path.name).symlink_to(path)
    (base / "recommended.json").write_text(json.dumps({"num_inference_steps": 2}))
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(15e9 / whole)
    try:
        path = run(base, tmp_path / "run", mixed_precision="fp16", max_train_steps=2, **{
            **PRIOR, "num_class_images": 4, "class_data_dir": str(tmp_path / "class"),
            "validation_prompt": ["a photo of sks dog"], "num_report_images": 4})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (path.parent / "validation" / "step-000002" / "grid.png").is_file()
