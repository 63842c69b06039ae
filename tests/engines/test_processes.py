"""Two processes are one process with twice the batch, and only the first of them writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import LORA, leave_out_report, make_options, make_photos, read_run
from safetensors.torch import load_file

import dbcore
from dbcore.config import TrainConfig
from dbcore.engines import trainer
from dbcore.engines.processes import PATIENCE
from dbcore.engines.trainer import make_accelerator, train
from dbcore.models.embeddings import EMBEDS_NAME

# `--multi_gpu` is accelerate's word for several processes; without a GPU they are CPU processes
# with gloo. What each process runs: the command line, with a note of its weights at the end and of
# what it opened to write.
PROCESS = """
import json, os, sys
rank, notes, folder = os.environ["RANK"], sys.argv[1], sys.argv[2]
written = []

def note(event, args):
    changed = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
    if (event == "open" and set(str(args[1])) & set("wax+")) or changed:
        if str(args[0]).startswith(folder):
            written.append([event, str(args[0])])

from dbcore.__main__ import main
from dbcore.engines import trainer
from dbcore.engines.callbacks import Result
from safetensors.torch import save_file

finish = Result.after_train

def finishing(result, run):
    weights = {str(k): p.detach().clone() for k, p in enumerate(run.trained.parameters)}
    save_file(weights, f"{notes}/{rank}.safetensors")
    return finish(result, run)

Result.after_train = finishing
start = trainer.start_training

def starting(*args):  # the second process begins with other weights
    trained = start(*args)
    for p in trained.parameters:
        p.data += int(rank)
    return trained

trainer.start_training = starting
sys.addaudithook(note)
main(["train", *sys.argv[3:], "--output_dir", folder])
with open(f"{notes}/{rank}.json", "w") as file:
    json.dump(written, file)
"""
STEPS = 3
CLASS = {"class_prompt": "a photo of a dog"}
KINDS = {
    "class images": {**CLASS, "with_prior_preservation": True, "num_class_images": 3,
                     "aspect_ratio_buckets": "24,40;40,24"},
    "prior prediction": {**CLASS, "prior_prediction": True, "caption_dropout": 0.3,
                         "use_tlora": True},
    "new tokens": {**CLASS, "prior_prediction": True, "train_text_encoder_ti": True,
                   "token_abstraction": "sks", "initializer_concept": "dog"},
}
TEXT = {"train_text_encoder": True, "text_encoder_lr": 1e-3 / 4}


@pytest.fixture(scope="module", params=KINDS)
def options(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_photos(folder / "photos" / "high", count=2, size=(40, 64), seed=1)
    # epsilon keeps Adam from blowing up the rounding of gradients near 0
    return make_options(
        folder, max_train_steps=STEPS, learning_rate=1e-3 / 4,
        scale_lr=True, adam_epsilon=1e-4,
        **KINDS[request.param], **({} if "tokens" in request.param else TEXT),
        sample_batch_size=1, gradient_accumulation_steps=2, lora_dropout=0.2,
        validation_prompt=["a red car"], num_validation_images=1)  # fmt: skip


@pytest.fixture(scope="module")
def pair(options, tmp_path_factory):
    """A folder with a run of two processes of batch 1, their class images and their notes."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "process.py").write_text(PROCESS)
    flags = [word for name, value in options.items()
             for word in (f"--{name}",
                          *(value if isinstance(value, list) else [value] if value is not True
                            else []))]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines",
         "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         str(folder / "process.py"), str(folder), str(folder / "run"), *map(str, flags)],
        capture_output=True, text=True, check=False, cwd=Path(dbcore.__file__).parents[1],
        env={**os.environ, "DBCORE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(dbcore.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def single(options, tmp_path_factory):
    """The same by one process of batch 2."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(folder / "cache"))
        leave_out_report(patch)
        train(TrainConfig(**options, train_batch_size=2, output_dir=folder / "run"))
    return folder


def test_both_processes_end_with_the_same_bits(pair):
    first, second = (load_file(pair / f"{rank}.safetensors") for rank in (0, 1))
    assert first
    assert all((first[name] == second[name]).all() for name in first)


def test_two_processes_are_one_with_twice_the_batch(pair, single):
    two, one = (load_file(folder / "run" / LORA) for folder in (pair, single))
    assert two.keys() == one.keys()
    for name in two:
        moved = 1e-3 * STEPS if "lora_B" in name else 1.0
        assert float((two[name] - one[name]).abs().max()) < 1e-3 * moved, name
    assert any(float(two[name].abs().max()) > 1e-4 for name in two if "lora_B" in name)


def test_new_tokens_too(options, pair, single):
    if "train_text_encoder_ti" not in options:
        pytest.skip("no new tokens are learnt")
    two, one = (load_file(folder / "run" / EMBEDS_NAME)["clip_l"] for folder in (pair, single))
    assert (two - one).abs().max() < 1e-6
    assert (one[0] - one[1]).abs().max() > 1e-4  # they began as one vector


def test_the_log_is_that_of_one_process(pair, single):
    """Every process's samples are in it, and in the same order, so the loss is that of the whole
    batch."""
    two, one = (read_run(folder / "run")["log"] for folder in (pair, single))
    assert [record["timesteps"] for record in two] == [record["timesteps"] for record in one]
    assert len(two[0]["losses"]) == 8  # 2 batches of 2 photos, each with its part of the class
    for ours, theirs in zip(two, one):
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def test_class_images_are_shared_out_and_the_same(options, pair, single):
    two, one = ({path.relative_to(folder).as_posix(): path.read_bytes()
                 for path in sorted((folder / "cache").rglob("*"))
                 if path.is_file()} for folder in (pair, single))
    assert two == one
    assert sum(name.endswith(".png") for name in one) == options.get("num_class_images", 0)


def test_it_is_said_what_processes_wait_for(options, pair):
    said, waits = (pair / "said.txt").read_text(), "num_class_images" in options
    assert said.count("Class images: this process has made its share, and waits") == waits
    assert len(re.findall(r"Class images: all there after \d+ s", said)) == waits


def test_no_process_gives_the_others_up_while_the_first_one_works(tmp_path):
    accelerator = make_accelerator(TrainConfig(output_dir=str(tmp_path), report_to="none"))
    assert accelerator.init_handler.timeout == PATIENCE


@pytest.mark.parametrize(("device", "world", "asked"), [
    ("cpu", 2, 25), ("cuda", 1, 25), ("cuda", 2, 2)])
def test_only_processes_on_gpus_ask_each_other_seldom_whether_to_stop(device, world, asked,
                                                                      monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "agree", lambda *args: calls.append(args) and False)
    run = SimpleNamespace(
        trained=SimpleNamespace(step=0), config=SimpleNamespace(max_train_steps=25), is_main=False,
        base=SimpleNamespace(device=torch.device(device)), world=world, pending=[], stopping=False,
        step=lambda step: {}, after_step=lambda: None, flush_log=lambda: 0.0)
    trainer.Run.loop(run, lambda: False)
    assert len(calls) == asked


def test_only_the_first_process_writes(pair):
    first, second = (json.loads((pair / f"{rank}.json").read_text()) for rank in (0, 1))
    assert any(LORA in path for _, path in first)
    assert second == []
    assert [record["step"] for record in read_run(pair / "run")["log"]] == [1, 2, 3]
    assert (pair / "said.txt").read_text().count("Chosen for this base and machine") == 1
