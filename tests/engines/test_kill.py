"""Nothing is lost: whatever ends a run, a whole checkpoint is left to go on from, and it says
how."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import LORA, files_of, leave_out_report, make_options, read_run
from safetensors.torch import load_file

import dbcore
from dbcore.__main__ import main
from dbcore.config import ConfigError, TrainConfig
from dbcore.engines import checkpoint
from dbcore.engines.callbacks import Log
from dbcore.engines.checkpoint import CheckpointError, checkpoints, find_checkpoint, save_checkpoint
from dbcore.engines.trained import Trained
from dbcore.engines.trainer import Interrupted, Run, train
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora
from dbcore.utils import files

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(folder / "cache"))
        leave_out_report(patch)
        yield make_options(folder, learning_rate=1e-2, checkpointing_steps=1)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a run of 4 steps with a checkpoint after each; copy it before changing
    anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(TrainConfig(**options, output_dir=folder))
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flags(options, **more):
    return [word for name, value in {**options, **more}.items()
            for word in (f"--{name}", str(value))]


# --- killed inside a save -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(options):
    """What a checkpoint is made from: a LoRA and its optimizer after one step."""
    base = load_base(options["pretrained_model_name_or_path"])
    parameters = add_lora(base.unet, 4, 4.0)
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return Trained({"unet": base.unet}, optimizer, None, torch.amp.GradScaler("cpu", enabled=False),
                   seconds=1.0)


def save(folder, step, trained, limit=None):
    trained.step = step
    save_checkpoint(folder, trained, {}, {}, limit)


def save_for_ever(folder, run, report):
    """Save each step twice, every weight the step's number, and report each save that has
    returned."""
    for step in range(1, 10**6):
        for p in run.parameters:
            p.data.fill_(step)
        for _ in range(2):
            save(folder, step, run, limit=2)
            os.write(report, b"%d\n" % step)


def kill_a_saver(folder, run, seconds):
    """Fork a process that saves, kill it `seconds` after its first save; the last step it
    reported."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(folder, run, writes)
        finally:
            os._exit(1)
    os.close(writes)
    first = os.read(reads, 2)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reads, "rb") as rest:
        return int((first + rest.read()).split()[-1])


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_20_moments_of_saving_a_whole_checkpoint_is_left(small_run, tmp_path):
    moments, torn = random.Random(0), 0
    for number in range(20):
        folder = tmp_path / str(number)
        told = kill_a_saver(folder, small_run, moments.uniform(0, 0.1))
        left = find_checkpoint(folder, "latest")
        step = checkpoint.steps_done(left)
        assert step >= told
        weights = torch.load(left / checkpoint.TRAINING, weights_only=True)["weights"]
        assert weights
        assert all((w == step).all() for w in weights)
        assert all((t == step).all() for t in load_file(left / LORA).values())
        torn += any(path.suffix == ".partial" for path in folder.iterdir())
    assert torn  # some were killed with a checkpoint half-written


@posix
def test_a_replaced_checkpoint_is_there_at_every_moment(small_run, tmp_path, monkeypatch):
    save(tmp_path, 3, small_run)
    rename, seen = Path.rename, []

    def renamed(path, target):
        rename(path, target)
        seen.append(find_checkpoint(tmp_path, "latest"))

    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 3, small_run)
    assert [path.name for path in seen] == ["checkpoint-3.old", "checkpoint-3"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@posix
def test_a_real_run_killed_and_resumed_ends_in_the_same_bits(options, finished, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "dbcore", "train", *flags(options, output_dir=folder)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             cwd=Path(dbcore.__file__).parents[1])
    while len(checkpoints(folder)) < 2 and child.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(1).uniform(0, 0.1))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / LORA).exists()
    train(TrainConfig(**options, output_dir=folder, resume_from_checkpoint="latest"))
    assert read_run(folder) == read_run(finished)
    assert not list(folder.rglob("*.partial"))


# --- told to stop ---------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(number, options, finished, tmp_path,
                                                            monkeypatch, capsys):
    before = signal.getsignal(number)
    more = flags({**options, "checkpointing_steps": 500}, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_after(1, number, patch)  # it is seen at the end of the next step
        with pytest.raises(SystemExit) as ended:
            main(["train", *more])
    said = capsys.readouterr().out
    assert ended.value.code == 130
    assert "Stopped after step 2 of 4; checkpoint-2 is saved" in said
    assert "--resume_from_checkpoint latest" in said
    assert signal.getsignal(number) is before
    main(["train", *more, "--resume_from_checkpoint", "latest"])
    assert read_run(tmp_path / "run") == read_run(finished)


def signal_after(step, number, patch, times=1):
    write = Log.on_log

    def writing(log, run, record):
        write(log, run, record)
        if record["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(Log, "on_log", writing)


@posix
def test_a_second_signal_ends_at_once(options, tmp_path, monkeypatch):
    signal_after(2, signal.SIGINT, monkeypatch, times=2)
    with pytest.raises(SystemExit, match="stopped at once"):
        main(["train", *flags(options, output_dir=tmp_path / "run")])
    assert find_checkpoint(tmp_path / "run", "latest").name == "checkpoint-1"


def test_should_stop_ends_the_run_with_a_checkpoint(options, tmp_path):
    with pytest.raises(Interrupted, match="checkpoint-1 is saved in"):
        train(TrainConfig(**options, output_dir=tmp_path / "run"), should_stop=lambda: True)
    assert not (tmp_path / "run" / LORA).exists()


# --- damaged and foreign files --------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [checkpoint.TRAINING, LORA, checkpoint.STATE])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "removed"])
def test_a_damaged_checkpoint_is_skipped_by_latest_and_named_when_given(name, damage, run_folder):
    if (damage, name) == (flip, checkpoint.STATE):
        # whole JSON that vouches for nothing
        (run_folder / "checkpoint-4" / name).write_text('{"step": 4}')
    else:
        damage(run_folder / "checkpoint-4" / name)
    assert find_checkpoint(run_folder, "latest") == run_folder / "checkpoint-3"
    with pytest.raises(CheckpointError, match="checkpoint-4"):
        find_checkpoint(run_folder, "checkpoint-4")


def test_where_every_checkpoint_is_damaged_the_run_says_so(options, run_folder):
    for _, path in checkpoints(run_folder):
        cut(path / checkpoint.TRAINING)
    before = files_of(run_folder)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        train(TrainConfig(**options, output_dir=run_folder, resume_from_checkpoint="latest"))
    assert files_of(run_folder) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(options, run_folder):
    """It had its tensors in training.safetensors."""
    folder = run_folder / "checkpoint-4"
    (folder / checkpoint.TRAINING).rename(folder / "training.safetensors")
    state = json.loads((folder / checkpoint.STATE).read_text())
    state["sha256"]["training.safetensors"] = state["sha256"].pop(checkpoint.TRAINING)
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    before = files_of(run_folder)
    with pytest.raises(CheckpointError, match="checkpoint-4 was saved by an earlier version"):
        train(TrainConfig(**options, output_dir=run_folder, resume_from_checkpoint="latest"))
    assert files_of(run_folder) == before


def test_folders_that_are_no_checkpoint_are_left_alone(options, tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoint-foo", "checkpoint-", "checkpoint-7", ".checkpoint-9.0a1b2c3d.partial",
                 "my-checkpoint-3"):
        (folder / name).mkdir(parents=True)
        (folder / name / "note.txt").write_text("mine")
    assert checkpoints(folder) == []
    assert find_checkpoint(folder, "latest") is None
    train(TrainConfig(**options, output_dir=folder, resume_from_checkpoint="latest"))
    assert [step for step, _ in checkpoints(folder)] == [1, 2, 3, 4]
    for name in ("checkpoint-foo", "checkpoint-", "my-checkpoint-3"):
        assert (folder / name / "note.txt").read_text() == "mine"
    assert not list(folder.rglob("*.partial"))


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(options, run_folder):
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*checkpoint-1, checkpoint-2, "
                       "checkpoint-3, checkpoint-4"):
        train(TrainConfig(**options, output_dir=run_folder, resume_from_checkpoint="checkpoint-9"))


@pytest.mark.parametrize("more", [{"rank": 2}, {"seed": 1}, {"use_ema": True},
                                  {"lora_layers": "all"}], ids=str)
def test_a_checkpoint_of_another_lora_is_refused(more, options, run_folder):
    before = files_of(run_folder)
    with pytest.raises(ConfigError, match=f"--{next(iter(more))} was"):
        train(TrainConfig(**{**options, **more, "max_train_steps": 6}, output_dir=run_folder,
                          resume_from_checkpoint="latest"))
    assert files_of(run_folder) == before


def test_another_change_is_named_and_allowed(options, run_folder, capsys):
    train(TrainConfig(**{**options, "noise_offset": 0.1, "max_train_steps": 5},
                      output_dir=run_folder, resume_from_checkpoint="latest"))
    assert "--noise_offset was 0.0 in the run to resume and is 0.1 now" in capsys.readouterr().out


# --- the limit, the disk, the folder --------------------------------------------------------------


def test_the_limit_counts_from_the_newest(options, tmp_path):
    train(TrainConfig(**options, checkpoints_total_limit=2, output_dir=tmp_path / "run"))
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3, 4]


def fail(*args, **more):
    raise NO_SPACE


@contextmanager
def tiny_files():
    """Nothing larger than 1 kB can be written, as by a full disk: the system itself stops the
    write."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def broken(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(files if hasattr(files, name) else checkpoint, name, fail)
        yield


@pytest.mark.parametrize("where", ["save_adapter", "sync", "put_in_place", "the system"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(where, small_run, tmp_path, monkeypatch):
    if where == "the system" and os.name != "posix":
        pytest.skip("no file size limit")
    save(tmp_path, 1, small_run, limit=1)
    before = files_of(tmp_path)
    fault = tiny_files() if where == "the system" else broken(monkeypatch, where)
    with fault, pytest.raises(CheckpointError,
                              match=r"checkpoint-2 could not be written.*checkpoint-1 is intact"):
        save(tmp_path, 2, small_run, limit=1)
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    save(tmp_path, 2, small_run, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("where", ["Log.on_log", "save_validation", "save_adapter"])
def test_a_full_disk_elsewhere_is_reported_with_what_is_left(where, options, tmp_path, monkeypatch):
    more = {"validation_prompt": ["a red car"], "validation_steps": 3, "num_validation_images": 1,
            "output_dir": tmp_path / "run"}  # fmt: skip
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, **more), should_stop=lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(f"dbcore.engines.callbacks.{where}", fail)
        with pytest.raises(CheckpointError,
                           match=r"No space left on device. checkpoint-\d is intact"):
            train(TrainConfig(**options, **more, resume_from_checkpoint="latest"))
    assert not (tmp_path / "run" / LORA).exists()
    train(TrainConfig(**options, **more, resume_from_checkpoint="latest"))
    assert (tmp_path / "run" / LORA).exists()


@pytest.mark.parametrize("error",
                         [OSError("a library's own words"), ConnectionResetError(104, "reset"),
                                   ValueError("a bug")], ids=repr)  # fmt: skip
def test_what_is_no_fault_of_the_disk_is_no_checkpoint_problem(error, options, tmp_path,
                                                               monkeypatch):
    def break_off(*_):
        raise error

    monkeypatch.setattr(Run, "loop", break_off)
    with pytest.raises(type(error)) as caught:
        train(TrainConfig(**options, output_dir=tmp_path / "run"))
    assert caught.value is error


def test_a_folder_that_cannot_be_written_is_refused_before_training(options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"--output_dir .* cannot be written to"):
        train(TrainConfig(**options, output_dir=tmp_path / "file" / "run"))
    (tmp_path / "locked").mkdir(mode=0o500)
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write anywhere
        with pytest.raises(ConfigError,
                           match=r"--output_dir .* cannot be written to: Permission denied"):
            train(TrainConfig(**options, output_dir=tmp_path / "locked" / "run"))
    monkeypatch.setattr("dbcore.engines.run_folder.write_yaml", lambda *_: fail())
    with pytest.raises(ConfigError, match="cannot be written to: No space left"):
        train(TrainConfig(**options, output_dir=tmp_path / "run"))


def test_the_folder_of_another_run_is_refused(options, run_folder):
    before = files_of(run_folder)
    for more in ({}, {"instance_prompt": "a blue car"}):
        with pytest.raises(ConfigError, match=r"holds a run already.*--overwrite_output_dir"):
            train(TrainConfig(**{**options, **more}, output_dir=run_folder))
    for path in run_folder.glob("checkpoint-*"):
        shutil.rmtree(path)  # a finished LoRA alone is guarded too
    with pytest.raises(ConfigError, match="holds a run already"):
        train(TrainConfig(**options, output_dir=run_folder, resume_from_checkpoint="latest"))
    assert files_of(run_folder).items() <= before.items()


def test_a_folder_with_files_of_someones_own_is_refused(options, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(ConfigError,
                       match=r"not the folder of a run, and its README.md would be overwritten"):
        train(TrainConfig(**options, output_dir=tmp_path, overwrite_output_dir=True))
    assert (tmp_path / "README.md").read_text() == "my project"


def test_told_to_replace_a_run_everything_of_the_run_and_nothing_else_goes(options, run_folder):
    (run_folder / "notes.txt").write_text("mine")
    (run_folder / "checkpoint-foo").mkdir()
    more = {"max_train_steps": 2, "seed": 5, "overwrite_output_dir": True}
    train(TrainConfig(**{**options, **more}, output_dir=run_folder))
    assert [step for step, _ in checkpoints(run_folder)] == [1, 2]
    assert len(read_run(run_folder)["log"]) == 2
    assert (run_folder / "notes.txt").read_text() == "mine"
    assert (run_folder / "checkpoint-foo").is_dir()


# --- a loss that is no number ---------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_its_cause_and_what_is_good(options, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags({**options, "learning_rate": 1e30}, output_dir=folder)])
    for words in ("the loss is nan at step 2", "learning rate 1e+30", "too high",
                  "no checkpoint was saved before"):
        assert words in str(ended.value)
    assert not (folder / LORA).exists()


def test_the_last_good_checkpoint_is_the_one_before_the_weights_went_wrong(options, run_folder):
    with pytest.raises(FloatingPointError, match=r"at step 6 .*checkpoint-4 is good"):
        train(TrainConfig(**{**options, "learning_rate": 1e30, "max_train_steps": 9},
                          output_dir=run_folder, resume_from_checkpoint="latest"))
