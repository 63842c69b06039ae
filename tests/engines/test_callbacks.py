"""A run tells its callbacks of its moments, in their order, and leaves its options as they were."""

import dataclasses

import pytest
import yaml
from runs import leave_out_report, make_options, read_run

from dbcore.config import TrainConfig
from dbcore.engines import trainer
from dbcore.engines.callbacks import Callback
from dbcore.engines.lengths import resolve_lengths

MOMENTS = ("before_train", "after_step", "on_log", "on_images", "on_error", "after_train")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        yield make_options(tmp_path_factory.mktemp("world"), max_train_steps=2)


class Spy(Callback):
    """Notes each moment and the steps that are done then."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at, self.config = [], fails_at, None

    def note(self, name, run):
        self.seen.append((name, run.trained.step))
        self.config = run.config
        if name == self.fails_at:
            raise ZeroDivisionError


for moment in MOMENTS:
    setattr(Spy, moment, lambda spy, run, *_, name=moment: spy.note(name, run))


def train_with(spy, monkeypatch, **options):
    usual = trainer.make_callbacks
    monkeypatch.setattr(trainer, "make_callbacks", lambda *args: [*usual(*args), spy])
    return trainer.train(TrainConfig(**options))


def test_every_moment_comes_in_its_order(options, tmp_path, monkeypatch):
    spy = Spy()
    train_with(spy, monkeypatch, **options, output_dir=tmp_path, validation_prompt=["a red car"],
               validation_steps=2, num_validation_images=1)
    assert spy.seen == [
        ("before_train", 0), ("on_log", 1), ("after_step", 1), ("on_log", 2), ("on_images", 2),
        ("after_step", 2), ("after_train", 2)]  # fmt: skip


def test_a_callback_that_fails_is_an_error_and_all_are_told(options, tmp_path, monkeypatch):
    spy = Spy(fails_at="after_step")
    with pytest.raises(ZeroDivisionError):
        train_with(spy, monkeypatch, **options, output_dir=tmp_path)
    assert spy.seen[-2:] == [("after_step", 1), ("on_error", 1)]


def test_lengths_are_resolved_once_and_the_file_says_what_was_asked(options, tmp_path, monkeypatch):
    spy, asked = Spy(), {**options, "max_train_steps": None, "num_train_epochs": 1}
    path = train_with(spy, monkeypatch, **asked, output_dir=tmp_path)
    steps = len(read_run(path.parent)["log"])
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert spy.config.max_train_steps == steps == 3  # a photo a step
    assert (written["num_train_epochs"], written["max_train_steps"]) == (1, None)


def test_resolved_lengths_leave_the_options_that_were_given_alone():
    config = TrainConfig(num_train_epochs=2, train_batch_size=2, validation_epochs=1)
    before = dataclasses.replace(config)
    resolved = resolve_lengths(config, photos=5, processes=2)
    assert (resolved.max_train_steps, resolved.validation_steps) == (4, 2)
    assert config == before
