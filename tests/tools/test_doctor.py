"""The doctor names what is wrong, with nothing trained and nothing written."""

import numpy as np
import pytest
from PIL import Image
from pipelines import make_tiny_pipeline

from dbcore.__main__ import main
from dbcore.config import TrainConfig
from dbcore.engines.memory import Forecast, Phase
from dbcore.models.base import load_base
from dbcore.tools import doctor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def config(folder, photos, **more):
    return TrainConfig(pretrained_model_name_or_path=str(folder), instance_data_dir=str(photos),
                       instance_prompt="a photo of sks dog", class_prompt="a photo of a dog",
                       with_prior_preservation=True, **more)


@pytest.mark.parametrize(("instance", "given", "word"), [
    ("a photo of sks dog", "a photo of a dog", "sks"),
    ("a photo of my old dog", "a photo of a dog", "my old"),
    ("a photo of a dog", "a photo of a dog", ""),
])
def test_the_new_word_is_what_the_class_prompt_has_not(instance, given, word):
    assert doctor.new_word(instance, given) == word


def test_photos_are_counted_and_the_bad_one_is_named(folder, photos):
    lines = doctor.photos(config(folder, photos))
    assert lines[0] == "3 can be used, 1 are skipped."
    assert any("broken.jpg" in line and "[skipped]" in line for line in lines)


def test_no_photo_at_all_is_a_finding_and_no_crash(folder, tmp_path):
    (lines,) = doctor.photos(config(folder, tmp_path))
    assert lines.startswith("No run is possible: no image in")


def test_an_identifier_of_several_tokens_is_advised_against(folder):
    base = load_base(folder)
    one = doctor.describe_word(base, "sks", "a photo of sks dog")
    many = doctor.describe_word(base, "xyzzy", "a photo of xyzzy dog")
    assert one[0] == "'sks' is 1 token: sks</w>"
    assert not any("rare token" in line for line in one)
    assert many[0].startswith("'xyzzy' is 5 tokens: x y z z y</w>")
    assert any("rare token" in line for line in many)


def test_a_word_that_moves_the_prompt_more_than_ordinary_ones_is_pointed_out(folder, monkeypatch):
    base = load_base(folder)
    for own, warned in ((0.9, True), (0.1, False)):
        monkeypatch.setattr(doctor, "weight_of", lambda base, word, prompt, other=None, own=own: 0.5
                            if other else own)
        lines = doctor.describe_word(base, "sks", "a photo of sks dog")
        assert any("already says more" in line for line in lines) == warned


def test_the_weight_of_a_word_is_nought_where_it_makes_no_difference(folder):
    base = load_base(folder)
    assert doctor.weight_of(base, "sks", "a photo of sks dog") > 1e-4
    # it is not in there
    assert doctor.weight_of(base, "cat", "a photo of sks dog") == pytest.approx(0, abs=1e-6)


def test_the_nearest_words_are_others_in_falling_order(folder):
    near = doctor.neighbours(load_base(folder), "dog</w>")
    assert len(near) == doctor.NEIGHBOURS
    assert "dog" not in [name for name, _ in near]
    assert [c for _, c in near] == sorted((c for _, c in near), reverse=True)


def test_a_prompt_without_a_new_word_is_a_finding(folder, photos):
    c = config(folder, photos)
    c.instance_prompt = "a photo of a dog"
    (line,) = doctor.identifier(c)
    assert "the subject would take the whole class" in line


def test_the_table_shows_each_phase_and_the_highest():
    lines = doctor.table(Forecast([Phase("steps", 5_000_000, 1_200_000, 400_000)], 10_000_000))
    assert "| steps | 5.0 | 1.2 | 0.4 | 6.6 |" in lines
    assert "| highest (steps) with 10 before the first tensor | | | | 16.6 |" in lines


def test_the_verdict_asks_for_advice_only_where_the_run_does_not_fit():
    def fail():
        raise AssertionError

    assert doctor.verdict(3e9, 8e9, fail) == "It fits: 3.0 of 8.0 GB."
    advised = doctor.verdict(9e9, 8e9, lambda: {"gradient_checkpointing": True, "resolution": 384})
    assert advised.endswith("It would with --gradient_checkpointing --resolution 384.")
    assert "take a larger card" in doctor.verdict(9e9, 8e9, lambda: None)


def test_the_whole_report_stands_and_nothing_is_written(folder, photos, tmp_path, monkeypatch,
                                                        capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    main(["doctor", "--pretrained_model_name_or_path", str(folder), "--instance_data_dir",
          str(photos),
          "--instance_prompt", "a photo of sks dog", "--class_prompt", "a photo of a dog",
          "--with_prior_preservation"])
    said = capsys.readouterr().out
    for part in ("## Machine", "torch ", "## What auto becomes", "rank: 4", "## Photos",
                 "broken.jpg", "## Identifier",
                 "'sks' is 1 token", "## Memory", "| class images |", "It fits",
                 "| T4 | 16 | fp16 |"):
        assert part in said
    assert ": auto" not in said  # what stays auto, as the family has it, has not become anything
    assert sorted(tmp_path.rglob("*")) == before


def test_options_that_are_missing_leave_their_part_out(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    assert "## Machine" in said
    assert "## Photos" not in said
    assert "Not looked at: give --instance_prompt" in said
