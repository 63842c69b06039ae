"""ToyBench: its definition, what prompts ask for, settings, and a whole bench on a tiny
base."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import make_tiny_pipeline
from runs import leave_out_report

from dbcore import TOY_BASE
from dbcore.__main__ import main
from dbcore.config import ANSWERED, ConfigError, TrainConfig, option, read_yaml
from dbcore.engines import evaluate as engine
from dbcore.engines.trainer import Run
from dbcore.models.stable_diffusion import StableDiffusion
from dbcore.tools import evaluate
from dbcore.toybench import bench as toybench
from dbcore.toybox.scene import CLASSES, Character
from dbcore.toybox.subjects import HELD_OUT, bench_subjects, write_bench


def test_the_definition_is_what_its_seed_makes(tmp_path):
    write_bench(tmp_path / "bench.json")
    assert (tmp_path / "bench.json").read_text() == toybench.BENCH.read_text()


def test_thirty_bareheaded_subjects_five_of_a_class_in_colours_of_their_own():
    subjects = list(bench_subjects().values())
    assert [s.kind for s in subjects] == [kind for kind in CLASSES for _ in range(5)]
    assert len({(s.kind, s.color) for s in subjects} - HELD_OUT) == 30
    assert not any(s.hat or s.color == s.color2 for s in subjects)


# --- what prompts ask for -------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "answers"), [
    ("a photo of a dog", {}),
    ("a photo of a dog in the snow", {"place": "snow"}),
    ("a photo of a dog on a red carpet", {"place": "carpet"}),
    ("a photo of a dog wearing a red hat", {"hat": "red"}),
    ("a photo of a dog wearing a green hat at night", {"hat": "green", "place": "night"}),
    ("a photo of a purple dog", {"color": "purple"}),
])  # fmt: skip
def test_a_prompt_asks_for_what_it_says(prompt, answers):
    assert toybench.asked_for(prompt, "dog") == answers


def test_every_prompt_of_the_bench_asks_for_something():
    plain = [text for _, text in evaluate.compose(evaluate.read_prompts("toy", "no-base"),
                                                  "a photo of sks teapot",
                                                  "a photo of a teapot")]
    asked = [tuple(sorted(toybench.asked_for(text, "teapot").items())) for text in plain]
    assert len(set(asked)) == 25
    assert () not in asked


class Reads:
    """Tells what it was told to tell."""

    def __init__(self, *answers):
        self.answers = answers

    def read(self, images):
        return [self.answers[p] for p in images]


def test_a_colour_that_was_asked_for_is_no_fault_of_the_subject():
    dog = {"class": "dog", "color": "red", "pattern": "spotted", "color2": "blue", "hat": "none",
           "place": "snow"}
    asked = [("a photo of sks dog in the snow", "a photo of a dog in the snow"),
             ("a photo of red sks dog", "a photo of a red dog")]
    reader = Reads(dog, {**dog, "color": "green", "place": "beach"}, {**dog, "pattern": "plain"})
    is_it, shows = toybench.tell(reader, [0, 1, 0, 2, 0, 0], asked,
                                 Character("dog", "green", "spotted", "blue"), 2)
    # red unasked; green; red as asked; red as asked, but no spots
    assert is_it == [False, True, True, False]
    assert shows == [True, False, True, True]


# --- settings --------------------------------------------------------------------------------


def test_a_way_to_train_is_a_name_and_options_of_train():
    assert toybench.read_setting("rank 4=--rank 4 --with_prior_preservation") == (
        "rank 4", {"rank": "4", "with_prior_preservation": True})
    assert toybench.read_setting("no noun=--instance_prompt 'a photo of sks'") == (
        "no noun", {"instance_prompt": "a photo of sks"})
    assert toybench.read_setting("plain=") == ("plain", {})
    assert (toybench.read_setting("one photo=--num_photos 1 --rank 4")
            == ("one photo", {"num_photos": 1, "rank": "4"}))


@pytest.mark.parametrize(("text", "complaint"), [
    ("--rank 4", "give NAME=OPTIONS"),
    ("floor=", "give NAME=OPTIONS"),
    ("a/b=", "give NAME=OPTIONS"),
    ("low=--rnk 4", "low: --rnk 4 is no option of train"),
    ("mine=--output_dir here",
     "mine: --output_dir is no option of train, or one that toybench sets itself"),
    ("none=--num_photos 0", "none: --num_photos 0 is less than one"),
    ("all=--full_finetuning --rank 4", "all: --rank does nothing with --full_finetuning"),
    ("all=--full_finetuning --low_vram", "all: --low_vram does nothing with --full_finetuning"),
])  # fmt: skip
def test_a_way_that_is_none_is_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        toybench.read_setting(text)


def test_a_base_without_a_reader_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="has no reader/, which tells the truth"):
        toybench.toybench(make_tiny_pipeline(tmp_path / "base"), {"plain": {}}, tmp_path / "out", 1,
                          1, 2)
    assert not (tmp_path / "out").exists()


# --- the bench ------------------------------------------------------------------------------------


def colours(images):
    small = [np.asarray(image.resize((2, 2)), dtype=np.float32).flatten() for image in images]
    return torch.tensor(np.stack(small)) - 128


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A function that runs the command on a tiny base, two subjects, two prompts, two images;
    gives the JSON."""
    pytest.importorskip("numba")
    base = make_tiny_pipeline(tmp_path / "base")
    (base / "recommended.json").write_text(json.dumps({"num_inference_steps": 2,
                                                       "num_class_images": 2, "rank": 2}))
    shutil.copytree(TOY_BASE / "reader", base / "reader")
    stand_in = engine.Encoder("colours", colours, lambda prompts: torch.ones(len(prompts), 12),
                              "a stand-in")
    monkeypatch.setattr(engine, "load_encoders", lambda base: [stand_in])
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    leave_out_report(monkeypatch)

    def run(*more):
        main(["toybench", "--pretrained_model_name_or_path", str(base), "--num_subjects", "2",
              "--num_prompts", "2",
              "--num_images", "2", "--output_dir", str(tmp_path / "out"), *more])
        return json.loads((tmp_path / "out" / "toybench.json").read_text())

    return run


WAYS = ("--vary", "slow=--max_train_steps 1 --learning_rate 1e-6", "--vary",
        "prior=--max_train_steps 2 --learning_rate 0.05 --with_prior_preservation")


def test_a_bench_trains_draws_measures_and_compares(bench, tmp_path):
    result = bench(*WAYS)
    assert list(result["subjects"]) == ["dog1", "car1"]
    for columns in result["subjects"].values():
        assert list(columns) == ["floor", "slow", "prior", "ceiling"]
        assert (columns["slow"]["subject, colours"]
                == pytest.approx(columns["floor"]["subject, colours"], abs=0.01))
        assert 0 <= columns["floor"][toybench.PROMPT] <= 1
        assert columns["ceiling"][toybench.SUBJECT] is not None
        assert columns["ceiling"][toybench.PROMPT] is None
        assert 0 <= columns["prior"][toybench.COPIES] <= 1
    apart = [columns["prior"]["DIV, colours"] - columns["slow"]["DIV, colours"]
             for columns in result["subjects"].values()]
    assert result["differences"]["prior"]["DIV, colours"][0] == pytest.approx(np.mean(apart))
    assert set(result["agreement"]) == {"subject, colours", "prompt, colours"}
    table = (tmp_path / "out" / "toybench.md").read_text()
    assert "| | base alone | slow | prior | photos |" in table
    assert "Difference from slow, subject by subject:" in table


def test_a_bench_that_is_there_is_not_made_again(bench, tmp_path, monkeypatch):
    first = bench(*WAYS)
    runs = {path: path.stat().st_mtime_ns
            for path in (tmp_path / "out").glob("*/runs/*/*.safetensors")}
    assert len(runs) == 4
    monkeypatch.setattr(StableDiffusion, "generate", None)  # whoever draws or trains fails
    assert bench(*WAYS) == first
    assert {path: path.stat().st_mtime_ns
            for path in (tmp_path / "out").glob("*/runs/*/*.safetensors")} == runs


def test_a_new_option_of_train_leaves_what_is_there(bench, monkeypatch):
    way = "--vary", "plain=--max_train_steps 1"
    first = bench(*way)
    newer = dataclasses.make_dataclass("Newer", [("new_option", int, option(0, "a new one"))],
                                       bases=(TrainConfig,))
    monkeypatch.setitem(ANSWERED, newer, {})
    monkeypatch.setattr(toybench, "TrainConfig", newer)
    monkeypatch.setattr(StableDiffusion, "generate", None)
    assert bench(*way) == first


def test_the_subject_is_drawn_in_the_words_that_it_was_taught_with(bench, tmp_path):
    bench("--vary", "noun=--max_train_steps 1", "--vary",
          "two nouns=--max_train_steps 1 --instance_prompt 'a photo of sks {class} cat'")
    told = [json.loads(path.read_text())
            for path in (tmp_path / "out").glob("*/pictures/*/about.json")]
    first = {about["prompts"][0] for about in told if about["lora"]}
    assert first == {f"a photo of sks {kind}{more} on the beach" for kind in ("dog", "car")
                     for more in ("", " cat")}


def test_a_way_has_the_number_of_photos_that_it_asks_for(bench, tmp_path):
    few = "one photo=--max_train_steps 1 --num_photos 1"
    result = bench("--vary", "usual=--max_train_steps 1", "--vary", few, "--vary",
                   few.replace("one", "some"))
    work = next((tmp_path / "out").glob("*/photos")).parent
    trained = {run.name.rpartition("-")[0]: read_yaml(run / "config.yaml",
                                                      TrainConfig)["instance_data_dir"]
               for run in (work / "runs").iterdir()}
    # two subjects; one photo twice is one run
    assert len(trained) == len(list((work / "runs").iterdir())) == 4
    counts = {run: sorted(photo.name for photo in Path(folder).glob("*.png"))
              for run, folder in trained.items()}
    usual = [f"{k:02d}.png" for k in range(5)]
    assert counts == {"dog1": usual, "car1": usual, "dog1-1-photos": usual[:1],
                      "car1-1-photos": usual[:1]}
    for folder in ("dog1", "car1"):  # the one photo is the first of the five
        few, many = (work / "photos" / name / "00.png" for name in (f"{folder}-1-photos", folder))
        assert few.read_bytes() == many.read_bytes()
    # and all are measured against the same five: with one there is no ceiling
    columns = result["subjects"]["dog1"]
    assert columns["ceiling"]["subject, colours"] is not None
    assert columns["one photo"] == columns["some photo"] != columns["usual"]


def test_full_finetuning_moves_the_unet_itself_over_the_same_photos_and_noise(bench, tmp_path):
    result = bench("--vary", "lora=--max_train_steps 3", "--vary",
                   "full=--max_train_steps 3 --full_finetuning")
    runs = {run.name.endswith("-full"): run for run in (tmp_path / "out").glob("*/runs/dog1-*")}
    losses = [[json.loads(line)["losses"] for line in (run / "log.jsonl").read_text().splitlines()]
              for run in runs.values()]
    # the first step, where nothing has been learnt
    assert np.allclose(losses[0][0], losses[1][0], rtol=1e-5)
    assert not np.allclose(losses[0][2], losses[1][2], rtol=1e-5)
    base, tuned = (StableDiffusion(folder)
                   for folder in (tmp_path / "base", runs[True] / "pipeline"))
    same = [[torch.equal(a, b)
             for a, b in zip(*(getattr(one, part).parameters() for one in (base, tuned)))]
            for part in ("unet", "text_encoder", "vae")]
    assert not any(same[0])
    assert all(same[1])
    assert all(same[2])
    assert tuned.settings == base.settings
    assert result["subjects"]["dog1"]["full"] != result["subjects"]["dog1"]["floor"]


def test_full_finetuning_that_is_there_is_not_done_again(bench, monkeypatch):
    setting = "--vary", "full=--max_train_steps 1 --full_finetuning"
    first = bench(*setting)
    monkeypatch.setattr(StableDiffusion, "generate", None)
    monkeypatch.setattr(StableDiffusion, "predict", None)
    assert bench(*setting) == first


def test_full_finetuning_that_is_stopped_does_not_claim_a_checkpoint(bench, monkeypatch, capsys):
    really = Run.step

    def stop(self, step):
        signal.raise_signal(signal.SIGTERM)
        return really(self, step)

    monkeypatch.setattr(Run, "step", stop)
    with pytest.raises(SystemExit, match="130"):
        bench("--vary", "full=--max_train_steps 3 --full_finetuning")
    said = capsys.readouterr().out
    assert "begins anew the next time" in said
    assert "checkpoint" not in said
