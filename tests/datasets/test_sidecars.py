"""Captions and masks by the names that people's tools give them: read right, or named."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from dbcore.datasets import photos as P
from dbcore.datasets.sidecars import mask_owners


@pytest.fixture
def folder(tmp_path):
    """Three photos that differ."""
    for k in range(3):
        small = np.random.default_rng(k).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 40), Image.Resampling.BICUBIC).save(
            tmp_path / f"{k}.png"
        )
    return tmp_path


def captions(folder):
    photos, problems = P.gather_photos(folder)
    return [photo.caption for photo in photos], [str(problem) for problem in problems]


def table(folder, *rows, name="metadata.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


# --- captions -------------------------------------------------------------------------------------


def test_encodings_are_read_or_named(folder):
    (folder / "0.txt").write_text("sks dog, café", encoding="utf-16")
    (folder / "1.txt").write_bytes("the owner’s café".encode("cp1252"))
    (folder / "2.txt").write_bytes(b"\xef\xbb\xbfsks dog\r\nin the snow\r\n")
    found, notes = captions(folder)
    assert found == ["sks dog, café", None, "sks dog in the snow"]
    assert notes[0].startswith("1.txt: is not UTF-8 text")
    assert "not used as a caption" in notes[0]


@pytest.mark.parametrize(
    "text", [None, ["a", "b"], {"a": 1}, 3, True, "half \ud800", "nul \0", "x" * 5000]
)
def test_only_strings_are_captions(folder, text):
    table(folder, {"file_name": "0.png", "text": text}, {"file_name": "1.png", "text": "sks dog"})
    found, notes = captions(folder)
    assert found == [None, "sks dog", None]
    assert notes[0].startswith("metadata.jsonl: line 1 holds no file_name with a caption")


@pytest.mark.parametrize("name", ["0.caption", "0.TXT", "0.png.txt"])
def test_other_tools_caption_files_are_read(folder, name):
    (folder / name).write_text("sks dog in the snow")
    assert captions(folder)[0] == ["sks dog in the snow", None, None]


def test_a_txt_goes_before_a_caption_file_and_both_before_a_table(folder):
    (folder / "0.txt").write_text("first")
    (folder / "0.caption").write_text("second")
    table(folder, *({"file_name": f"{k}.png", "text": "third"} for k in range(3)))
    assert captions(folder)[0] == ["first", "third", "third"]


@pytest.mark.parametrize("head", ["file_name,text", "\ufefffile_name,caption", "prompt,file_name"])
def test_a_metadata_csv_is_read(folder, head):
    row = '"sks dog, red",0.png' if head.startswith("prompt") else '0.png,"sks dog, red"'
    (folder / "metadata.csv").write_text(f"{head}\n{row}\n", encoding="utf-8")
    assert captions(folder)[0] == ["sks dog, red", None, None]


@pytest.mark.parametrize("text", ["image;words\n0.png;sks dog\n", "0.png,sks dog\n", ""])
def test_a_csv_of_other_columns_is_named_once(folder, text):
    (folder / "metadata.csv").write_text(text)
    found, notes = captions(folder)
    assert found == [None] * 3
    assert len(notes) == 1
    assert f"metadata.csv: begins with {text.split(chr(10))[0]!r}: write file_name,text" in notes[0]


@pytest.mark.parametrize("comma", [";", "\t"])
def test_a_csv_of_another_comma_is_read(folder, comma):
    (folder / "metadata.csv").write_text(f'file_name{comma}text\n0.png{comma}"sks dog{comma}red"\n')
    assert captions(folder)[0] == [" ".join(f"sks dog{comma}red".split()), None, None]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028"])
def test_a_caption_of_several_lines_keeps_its_words_apart(folder, end):
    text = f'file_name,text\r\n0.png,"sks dog{end}in the snow"\r\n'
    (folder / "metadata.csv").write_bytes(text.encode())
    assert captions(folder)[0] == ["sks dog in the snow", None, None]
    (folder / "metadata.csv").unlink()
    line = json.dumps({"file_name": "0.png", "text": f"sks dog{end}in"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert captions(folder)[0] == ["sks dog in", None, None]


def test_many_lines_without_a_caption_are_counted(folder):
    table(folder, *({"image": f"{k}.png", "text": "sks dog"} for k in range(500)))
    _, notes = captions(folder)
    assert len(notes) == 11
    assert notes[-1].startswith("metadata.jsonl: 490 more lines hold none")


@pytest.mark.parametrize("name", ["0.txt", "metadata.jsonl"])
def test_a_broken_link_or_a_pipe_in_a_captions_place_is_named(folder, name):
    (folder / name).symlink_to("nowhere")
    found, notes = captions(folder)
    assert found == [None] * 3
    assert notes[0].startswith(f"{name}: is not an ordinary file")
    (folder / name).unlink()
    os.mkfifo(folder / name)  # which would wait for ever
    assert captions(folder)[1] == notes


@pytest.mark.parametrize("name", ["./0.png", "0.png", "sub\\0.png", "sub/caf\u0065\u0301.png"])
def test_spellings_of_one_name_are_one(folder, name):
    (folder / "sub").mkdir()
    (folder / "0.png").rename(
        folder
        / ("sub/caf\u00e9.png" if "caf" in name else "sub/0.png" if "sub" in name else "0.png")
    )
    table(folder, {"file_name": name, "text": "sks dog"})
    assert "sks dog" in captions(folder)[0]


def test_a_row_without_a_photo_and_a_photo_without_a_row_are_named(folder):
    table(
        folder,
        {"file_name": "0.png", "text": "sks dog"},
        {"file_name": "O1.png", "text": "sks dog"},
        {"file_name": "0.png", "text": "again"},
    )
    found, notes = captions(folder)
    assert found == ["sks dog", None, None]
    assert "metadata.jsonl: has a caption for O1.png, which is no photo here" in notes
    assert any("line 3 names 0.png again" in note for note in notes)
    assert [note[:5] for note in notes if "the instance prompt stands in" in note] == [
        "1.png",
        "2.png",
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_that_names_no_photo_stops(folder, name):
    if name.endswith("csv"):
        (folder / name).write_text("file_name,text\nimages/0.png,sks dog\n")
    else:
        table(folder, {"file_name": "images/0.png", "text": "sks dog"})
    with pytest.raises(
        P.PhotoError, match=f"{name} names none of the photos: its first row is for images/0.png"
    ):
        P.gather_photos(folder)


@pytest.mark.parametrize(
    "name",
    ["O.txt", "0.json", "captions.json", "meta_cap.json", "metadata.parquet", "notes.caption"],
)
def test_captions_that_are_not_read_are_named(folder, name):
    (folder / name).write_text("{}")
    found, notes = captions(folder)
    assert found == [None] * 3
    assert [note.split(":")[0] for note in notes] == [name]


# --- masks ----------------------------------------------------------------------------------------


def white_middle(size=(60, 40), mode="L"):
    mask = Image.new(mode, size, 0)
    mask.paste(255, (15, 10, 45, 30))
    return mask


@pytest.mark.parametrize(
    "name",
    [
        "0-masklabel.png",
        "0_mask.png",
        "0-mask.jpg",
        "0.mask.png",
        "mask_0.png",
        "0.png-mask.png",
        "masks/0.png",
        "Mask/0_mask.png",
        "0.mask.gif",
    ],
)
def test_masks_by_other_tools_names_are_masks(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    white_middle().save(folder / name)
    photos, problems = P.gather_photos(folder)
    assert [photo.path.name for photo in photos] == ["0.png", "1.png", "2.png"]
    assert problems == []
    assert photos[0].mask_path == folder / name
    assert (
        photos[0].load_mask().getpixel((30, 20)) > 250
    )
    assert (
        photos[0].load_mask().getpixel((2, 2)) < 5
    )


def test_a_photo_of_a_mask_is_a_photo():
    assert mask_owners(["venice-mask.png", "dog.png"], {"dog", "dog.png"}) == {}
    assert mask_owners(["dog-mask.png", "dog.png"], {"dog", "dog.png"}) == {"dog-mask.png": "dog"}


@pytest.mark.parametrize("name", ["9.mask.png", "masks/9.png", "0-condlabel.png"])
def test_a_mask_of_no_use_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    white_middle().save(folder / name)
    photos, problems = P.gather_photos(folder)
    assert len(photos) == 3
    assert not any(photo.mask_path for photo in photos)
    assert [problem.path for problem in problems] == [folder / name]


@pytest.mark.parametrize("value", [0, 1, 10])  # labels of 0 and 1 look black too
def test_a_black_mask_is_named_and_all_black_stop(folder, value):
    Image.new("L", (60, 40), value).save(folder / "0.mask.png")
    white_middle().save(folder / "1.mask.png")
    photos, problems = P.gather_photos(folder)
    assert [bool(photo.mask_path) for photo in photos] == [False, True, False]
    assert f"black (its brightest value is {value} of 255)" in problems[0].message
    assert problems[0].photo == photos[0].path
    (folder / "1.mask.png").unlink()
    with pytest.raises(P.PhotoError, match=r"all 1 masks are black.*or give --no-use_masks"):
        P.gather_photos(folder)
    assert len(P.gather_photos(folder, use_masks=False)[0]) == 3


def test_a_mask_that_is_all_but_black_is_named(folder):
    mask = Image.new("L", (600, 400), 0)
    mask.putpixel((300, 200), 255)
    mask.save(folder / "0.mask.png")
    white_middle().save(folder / "1.mask.png")
    photos, problems = P.gather_photos(folder)
    assert [bool(photo.mask_path) for photo in photos] == [False, True, False]
    assert "black but for 0.00 %" in problems[0].message


@pytest.mark.parametrize("name", ["0_matte.png", "conditioning/0.png"])
def test_a_mask_by_an_unknown_name_is_named_and_photos_are_not(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    white_middle().save(folder / name)
    problems = P.gather_photos(folder)[1]
    assert [(problem.path, problem.kind) for problem in problems] == [(folder / name, "mask-like")]


def test_a_cut_out_subject_is_a_mask_by_its_transparency(folder):
    cut = Image.open(folder / "0.png").convert("RGBA")
    cut.putalpha(white_middle())
    cut.save(folder / "0.mask.png")
    mask = P.gather_photos(folder)[0][0].load_mask()
    assert (mask.getpixel((30, 20)), mask.getpixel((2, 2))) == (255, 0)
