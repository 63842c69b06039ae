"""Photos made to look like a phone's have what makes a phone's photos difficult."""

import numpy as np
import pytest
from PIL import Image

import dbcore
from dbcore.course.phone import ORIENTATION, phone_photos, private_tags
from dbcore.datasets.photos import gather_photos
from dbcore.tools.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return phone_photos(dbcore.SUBJECTS / "dog", tmp_path_factory.mktemp("phone"))


def test_they_are_large_of_several_shapes_and_stored_turned(folder):
    paths = sorted(folder.glob("*.JPG"))
    photos, _ = gather_photos(folder)
    assert [path.name for path in paths] == [f"IMG_{k:04d}.JPG" for k in range(1, 7)]
    assert min(min(photo.size) for photo in photos) >= 1024
    assert len({photo.size for photo in photos}) >= 4
    turns = [Image.open(path).getexif()[ORIENTATION] for path in paths]
    assert {1, 3, 6, 8} == {*turns}
    stored = [Image.open(path).size for path in paths]
    assert any(one != photo.size for one, photo in zip(stored, photos))


def test_upright_they_show_what_the_originals_show(folder):
    originals = gather_photos(dbcore.SUBJECTS / "dog")[0]
    for photo, original in zip(gather_photos(folder)[0], originals):
        image, side = photo.load(), min(photo.size)
        left, top = ((length - side) // 2 for length in image.size)
        middle = image.crop((left, top, left + side, top + side)).resize((16, 16))
        apart = np.abs(np.asarray(middle, int) - np.asarray(original.load().resize((16, 16)), int))
        assert apart.mean() < 3


def test_the_doctor_finds_the_second_shot_and_the_film(folder):
    kinds = {problem.path.name: problem.kind for problem in gather_photos(folder)[1]}
    assert kinds["IMG_0006.JPG"] == "near-duplicate"
    assert "IMG_0007.MOV" in kinds


def test_prepared_they_tell_nothing_of_their_owner(folder, tmp_path):
    assert private_tags(folder / "IMG_0001.JPG") == ["camera", "place"]
    prepare(folder, tmp_path / "ready", resolution=64)
    assert private_tags(tmp_path / "ready" / "0000.png") == []


def test_a_folder_that_is_filled_stays_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert phone_photos(dbcore.SUBJECTS / "cat", folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
