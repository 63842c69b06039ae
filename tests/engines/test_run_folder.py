"""One run at a time has a folder, and a run that is there goes when its successor's LoRA stands,
not before."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import LORA, files_of, leave_out_report, make_options

import dbcore
from dbcore.config import ConfigError, TrainConfig, read_yaml
from dbcore.engines import run_folder
from dbcore.engines.checkpoint import checkpoints
from dbcore.engines.processes import check_launch
from dbcore.engines.run_folder import HOLDER, REPLACEMENT, complete, held
from dbcore.engines.trainer import Interrupted, train
from dbcore.toybench.finetune import finetune
from dbcore.utils.errors import DBCoreError


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        yield make_options(tmp_path_factory.mktemp("world"), max_train_steps=2,
                           checkpointing_steps=1)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(TrainConfig(**options, output_dir=folder))
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def again(options, run, **more):
    return TrainConfig(**{**options, "overwrite_output_dir": True, "seed": 7, **more},
                       output_dir=run)


# --- a run in place of another --------------------------------------------------------------------


@pytest.mark.parametrize("typo",
                         [{"lora_layers": "no_such_module"}, {"instance_data_dir": "nowhere"},
                                  {"variant": "fp61"}, {"learning_rate": 1e30}], ids=str)
def test_a_run_that_fails_leaves_the_one_before(typo, options, run):
    before = files_of(run)
    with pytest.raises(DBCoreError):
        train(again(options, run, **typo))
    assert before.items() <= files_of(run).items()


def test_the_run_before_stands_until_the_new_lora_does(options, run):
    before, seen = files_of(run), []
    train(again(options, run),
          callback=lambda record: seen.append(before.items() <= files_of(run).items()))
    assert seen == [True, True]
    assert (run / LORA).read_bytes() != before[run / LORA][0]
    assert read_yaml(run / "config.yaml", TrainConfig)["seed"] == 7
    assert (run / "notes.txt").read_text() == "mine"
    assert [step for step, _ in checkpoints(run)] == [1, 2]
    assert not (run / REPLACEMENT).exists()
    assert {path.name for path in run.iterdir()} == {
        LORA, "README.md", "config.yaml", "log.jsonl", "notes.txt", "checkpoint-1", "checkpoint-2"}


def test_a_replacement_that_was_stopped_is_gone_on_with(options, run, tmp_path):
    before = files_of(run)
    with pytest.raises(Interrupted, match=f"checkpoint-1 is saved in .*{REPLACEMENT}"):
        train(again(options, run), should_stop=lambda: True)
    assert before.items() <= files_of(run).items()
    resumed = train(again(options, run, overwrite_output_dir=False,
                          resume_from_checkpoint="latest"))
    straight = train(again(options, tmp_path / "other"))
    assert resumed == run / LORA
    assert resumed.read_bytes() == straight.read_bytes()
    assert not (run / REPLACEMENT).exists()


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_while_one_takes_the_others_place_is_made_good(moment, options, run, monkeypatch):
    calls, replace = [], os.replace

    def killed(*names):
        if len(calls) == moment and Path(names[0]).parent.name == run_folder.FINISHED:
            raise KeyboardInterrupt
        calls.append(names) if Path(names[0]).parent.name == run_folder.FINISHED else None
        return replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train(again(options, run))
    complete(run)
    assert read_yaml(run / "config.yaml", TrainConfig)["seed"] == 7
    assert (run / LORA).is_file()
    assert not (run / run_folder.FINISHED).exists()
    assert [step for step, _ in checkpoints(run)] == [1, 2]


def test_a_full_fine_tune_does_not_take_a_loras_folder(options, run):
    before = files_of(run)
    with pytest.raises(ConfigError, match="holds the run of a LoRA"):
        finetune(TrainConfig(**options, output_dir=run))
    assert files_of(run) == before


# --- one at a time --------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_told_who_has_it(options, tmp_path):
    folder = tmp_path / "run"
    with held(folder), pytest.raises(ConfigError, match="written to by another run .process "
                                     f"{os.getpid()} on .*wait"):
        train(TrainConfig(**options, output_dir=folder))
    assert not folder.exists()  # nothing was written there
    assert train(TrainConfig(**options, output_dir=folder)).is_file()
    assert not (folder / HOLDER).exists()


def test_a_run_that_was_killed_holds_nothing(options, tmp_path):
    code = ("import sys, os, signal; from dbcore.engines.run_folder import held\n"
            "with held(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"],
                   cwd=Path(dbcore.__file__).parents[1], check=False)
    assert (tmp_path / "run" / HOLDER).is_file()
    with held(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


# --- what belongs to the process ------------------------------------------------------------------


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("asked", [False, True])
def test_tf32_is_the_processs_own_again(asked, options, tmp_path):
    before, during = switches(), []
    train(TrainConfig(**options, allow_tf32=asked, output_dir=tmp_path / "run"),
          callback=lambda record: during.append(switches()))
    assert during[0] == ((True, True) if asked else before)
    assert switches() == before


def test_a_tracker_that_is_missing_is_not_written_into_the_config(options, tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainConfig(**{**options, "report_to": "tensorboard"}, output_dir=tmp_path / "run")
    train(config)
    assert "TensorBoard is not installed" in capsys.readouterr().out
    assert config.report_to == read_yaml(tmp_path / "run" / "config.yaml",
                                         TrainConfig)["report_to"] == "tensorboard"


# --- how it was launched --------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "refused"), [
    ("accelerate launch --num_processes 2 -m dbcore train", True),
    ("accelerate launch --num-processes=4 x.py", True),
    ("accelerate launch --num_processes 1 -m dbcore train", False),
    ("accelerate launch -m dbcore train", False),
])  # fmt: skip
def test_processes_that_were_asked_for_and_not_started_are_missed(words, refused, monkeypatch):
    parent = SimpleNamespace(cmdline=words.split)
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as the launcher sets it
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError,
                       match=r"started one process.*torchrun") if refused else nullcontext():
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch()  # there they are
