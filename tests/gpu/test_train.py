"""Training on a GPU: in half precision as in float32, without waiting, in a T4's memory."""

import json

import pytest
import torch
from runs import empty_gpu, lora_gradients, make_base, read_run
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines import trainer
from dbcore.engines.memory import forecast
from dbcore.engines.trainer import train

pytestmark = pytest.mark.gpu
PHOTOS = "data/subjects/dog"
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog",
         "num_class_images": 5, "class_data_dir": "data/subjects/cat"}
TAKEN = {}  # {a run's LoRA file: (its options, bytes at its highest point, its own alone)}


def run(base, folder, **options):
    config = TrainConfig(**{
        "pretrained_model_name_or_path": str(base), "instance_data_dir": PHOTOS,
        "instance_prompt": "a photo of sks dog", "output_dir": str(folder), "report_to": "none",
        "num_report_images": 0, "max_train_steps": 8, "resolution": 512, "rank": 4,
        "mixed_precision": "bf16", **options})
    empty_gpu()
    before = torch.cuda.memory_allocated()
    path = train(config)
    TAKEN[path] = config, torch.cuda.max_memory_allocated() - before
    return path


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


@pytest.fixture(scope="module")
def low_vram(sd15, tmp_path_factory):
    return run(sd15, tmp_path_factory.mktemp("low_vram") / "run", low_vram=True, max_train_steps=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base of a few thousand weights, and the options that it needs."""
    return make_base(tmp_path_factory.mktemp("tiny")), {"resolution": 32}


@pytest.fixture(scope="module")
def gradients(sd15):
    """A step's, in float32."""
    return lora_gradients(sd15, device="cuda")


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_gradients_in_half_are_those_in_float32_but_for_rounding(sd15, gradients, dtype, scale):
    half = lora_gradients(sd15, dtype, "cuda", scale)
    assert torch.nn.functional.cosine_similarity(gradients, half, dim=0) > 0.99
    assert half.norm() == pytest.approx(float(gradients.norm()), rel=0.05)


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


def test_the_same_gpu_twice_gives_the_same_lora_but_for_the_order_of_sums(sd15, bf16, tmp_path):
    """The way back adds up in an order that varies, so that losses differ from the second step
    on."""
    again = run(sd15, tmp_path / "run")
    print(f"likeness {likeness(bf16, again)}")
    assert losses(bf16)[0] == losses(again)[0]
    assert losses(bf16) == pytest.approx(losses(again), rel=1e-3)
    assert likeness(bf16, again) > 0.999


def test_a_run_in_fp16_is_resumed_with_the_scale_of_its_loss(sd15, fp16, tmp_path):
    run(sd15, tmp_path / "run", mixed_precision="fp16", max_train_steps=4)
    resumed = run(sd15, tmp_path / "run", mixed_precision="fp16", resume_from_checkpoint="latest")
    assert losses(resumed) == pytest.approx(losses(fp16), rel=0.01)
    assert likeness(resumed, fp16) > 0.95


def test_low_vram_takes_less_than_two_gigabytes(low_vram):
    memory = TAKEN[low_vram][1] / 1e9
    print(f"{memory:.2f} GB")
    assert log(low_vram)[-1]["loss"] < 10
    assert memory < 2.0


@pytest.mark.parametrize("name", ["bf16", "fp16", "low_vram"])
def test_the_forecast_is_within_15_percent(name, request):
    """Both without what a CUDA context takes."""
    config, taken = TAKEN[request.getfixturevalue(name)]
    told = forecast(config, "cuda")
    print(f"{told.largest.name}: {told.allocated / 1e9:.2f} GB told, {taken / 1e9:.2f} taken")
    assert told.allocated == pytest.approx(taken, rel=0.15)


def test_a_step_whose_gradients_overflow_is_skipped_and_halves_the_scale(tiny, tmp_path,
                                                                         monkeypatch):
    step, seen = trainer.Run.step, []

    def overflowing(run, number):
        if number != 2:
            return step(run, number)
        scaler, weights = run.trained.scaler, [p.clone() for p in run.trained.parameters]
        usual = scaler.get_scale()
        scaler.update(2.0**120)
        record = step(run, number)
        seen.append((scaler.get_scale(), all(map(torch.equal, weights, run.trained.parameters))))
        scaler.update(usual)
        return record

    monkeypatch.setattr(trainer.Run, "step", overflowing)
    base, options = tiny
    path = run(base, tmp_path / "run", mixed_precision="fp16", max_train_steps=4, **options)
    assert seen == [(2.0**119, True)]
    assert [record.get("skipped") for record in log(path)] == [None, None, True, None]


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


def test_compiled_is_eager(tiny, tmp_path, monkeypatch):  # the last, as compiling takes a while
    monkeypatch.setattr(trainer, "COMPILE_FROM", 1)
    base, options = tiny
    eager, compiled = (run(base, tmp_path / str(compile), mixed_precision="no", compile=compile,
                           **options) for compile in (False, True))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
    assert likeness(compiled, eager) > 0.99
