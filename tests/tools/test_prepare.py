"""prepare: what it writes, what it leaves alone, what it refuses."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from dbcore.datasets.photos import PhotoError, gather_photos
from dbcore.tools import prepare as tool
from dbcore.tools.prepare import prepare


def bands(path, exif=None):
    """Red, green, blue, each 40 x 40, side by side."""
    image = Image.new("RGB", (120, 40), "red")
    image.paste("lime", (40, 0, 80, 40))
    image.paste("blue", (80, 0, 120, 40))
    image.save(path, **({"exif": exif} if exif else {}))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    bands(folder / "a.png")
    bands(folder / "собака b.png")
    (folder / "a.txt").write_text("three bands")
    Image.new("L", (120, 40), 255).save(folder / "a.mask.png")
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def run(*words):
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    tool.main(parser.parse_args([str(word) for word in words]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def colour(path):
    return tuple(int(v) for v in np.asarray(Image.open(path)).reshape(-1, 3).mean(0).round())


def test_the_command_writes_a_folder_ready_to_train_on(folder, tmp_path, capsys):
    before = contents(folder)
    out = tmp_path / "new" / "ready"
    run("--instance_data_dir", folder, "--output_dir", out, "--resolution", 32, "--center_crop")
    expected = {"0000.png", "0000.txt", "0000.mask.png", "0001.png"}
    assert set(contents(out)) == expected | {"contact_sheet.png", "report.json", "report.md"}
    assert contents(folder) == before
    assert not list(tmp_path.glob("**/*.partial"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [row["from"] for row in report["photos"]] == ["a.png", "собака b.png"]
    assert report["skipped"] == [{"from": "bad.jpg",
                                  "why": "the file is empty (0 bytes): copy it again"}]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert "long and narrow" in text
    assert "has a mask" in text
    assert str(tmp_path) not in text
    assert Image.open(out / "0000.png").size == (32, 32)
    assert colour(out / "0000.png") == (0, 255, 0)


def test_what_was_prepared_is_found_and_the_sheet_is_not_taken_for_a_photo(folder, tmp_path):
    prepare(folder, tmp_path / "out", resolution=32)
    photos, _ = gather_photos(tmp_path / "out", resolution=32)
    found = [(photo.path.name, photo.caption) for photo in photos]
    assert found == [("0000.png", "three bands"), ("0001.png", None)]
    assert photos[0].load_mask().getextrema() == (255, 255)


def test_no_place_of_exif_is_left(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Camera of a certain owner"
    (tmp_path / "in").mkdir()
    bands(tmp_path / "in/a.jpg", exif=exif)
    prepare(tmp_path / "in", tmp_path / "out", resolution=16)
    assert b"certain owner" in (tmp_path / "in/a.jpg").read_bytes()
    assert b"certain owner" not in (tmp_path / "out/0000.png").read_bytes()


def test_random_is_by_seed(folder, tmp_path):
    boxes = {}
    for name, seed in [("x", 0), ("y", 0), ("z", 1)]:
        report = prepare(folder, tmp_path / name, resolution=32, crop="random", seed=seed)
        boxes[name] = [row["box"] for row in report["photos"]]
    assert boxes["x"] == boxes["y"] != boxes["z"]
    assert boxes["x"][0] != boxes["x"][1]


def test_boxes_for_all_or_by_name(folder, tmp_path):
    run(
        "--instance_data_dir",
        folder,
        "--output_dir",
        tmp_path / "x",
        "--resolution",
        16,
        "--crop_box",
        "2,2,38,38",
    )
    assert colour(tmp_path / "x/0000.png") == colour(tmp_path / "x/0001.png") == (255, 0, 0)
    (tmp_path / "boxes.json").write_text('{"a.png": [82, 2, 118, 38]}')
    words = ["--output_dir", tmp_path / "y", "--resolution", 16, "--crop_box",
             tmp_path / "boxes.json"]
    run("--instance_data_dir", folder, *words)
    assert colour(tmp_path / "y/0000.png") == (0, 0, 255)
    assert colour(tmp_path / "y/0001.png") == (0, 255, 0)


@pytest.mark.parametrize("text", ["1,2,3", "0,0,200,200", "a,b,c,d", "no/such/file.json"])
def test_a_bad_box_names_the_photo_and_writes_nothing(folder, tmp_path, text):
    with pytest.raises(PhotoError, match=r"a.png: crop box"):
        prepare(folder, tmp_path / "out", boxes=tool.read_boxes(text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", '{"other.png": [0, 0, 9, 9]}'])
def test_a_bad_box_file_is_named(folder, tmp_path, text):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(PhotoError, match="--crop_box"):
        prepare(folder, tmp_path / "out", boxes=tool.read_boxes(str(tmp_path / "boxes.json")))


def test_the_photo_folder_and_a_full_folder_are_never_written_to(folder, tmp_path):
    for target in [folder, folder / "ready"]:
        with pytest.raises(PhotoError, match="lies in the photo folder"):
            prepare(folder, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep me")
    with pytest.raises(PhotoError, match="not empty"):
        prepare(folder, tmp_path / "full")
    assert set(contents(tmp_path / "full")) == {"mine.txt"}


def test_the_sheet_shows_square_and_result(folder, tmp_path):
    prepare(folder, tmp_path / "out", resolution=32)
    sheet = Image.open(tmp_path / "out/contact_sheet.png").convert("RGB")
    colours = {c for _, c in sheet.getcolors(1 << 20)}
    assert {(0xD5, 0x5E, 0x00), (0, 255, 0), (255, 0, 0), (0, 0, 255)} <= colours


def test_the_sheet_says_what_is_wrong_with_a_photo(folder, tmp_path):
    report = prepare(folder, tmp_path / "out", resolution=32)
    assert all(row["problems"] for row in report["photos"])
    sheet = np.asarray(Image.open(tmp_path / "out/contact_sheet.png").convert("L"))
    for head in np.hsplit(sheet[:50], 2):
        assert np.argwhere(head < 128)[:, 1].max() > 200, "a mark alone does not say what is wrong"


def test_a_bad_mask_does_not_show_as_good_and_other_files_are_named(folder, tmp_path):
    Image.new("L", (90, 40), 255).save(folder / "собака b.mask.png")
    (folder / "O.txt").write_text("nobody's")
    report = prepare(folder, tmp_path / "out", resolution=32)
    assert "has not the shape of its photo" in "".join(report["photos"][1]["problems"])
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "собака b.png" in line)
    assert "собака b.mask.png: 90 x 40 has not the shape" in row
    assert "good" not in row
    assert "Other files:\n- O.txt: no photo has this name" in text


def test_boxes_saved_by_windows_are_read(folder, tmp_path):
    (tmp_path / "boxes.json").write_text('{"a.png": [82, 2, 118, 38]}', encoding="utf-16")
    assert tool.read_boxes(str(tmp_path / "boxes.json")) == {"a.png": [82, 2, 118, 38]}
    (tmp_path / "boxes.json").write_bytes('{"é.png": [82, 2, 118, 38]}'.encode("cp1252"))
    with pytest.raises(PhotoError, match=r"--crop_box .* is not UTF-8 text"):
        tool.read_boxes(str(tmp_path / "boxes.json"))
