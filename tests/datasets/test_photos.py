"""Every kind of picture file a user may have: read right, or refused with a reason."""

import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo

from dbcore.datasets import photos as P


def picture(seed=0, size=(64, 64)):
    """Smooth random colours: enough structure for a fingerprint, and no two seeds alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def kinds(problems):
    return {problem.kind for problem in problems}


def check(tmp_path, name, resolution=None):
    photos, problems = P.check_photos([tmp_path / name], resolution=resolution)
    return (photos[0] if photos else None), problems


def close(image, colour, tolerance=3):
    return np.abs(np.asarray(image, dtype=int).reshape(-1, 3) - colour).max() <= tolerance


# --- find -----------------------------------------------------------------------------------------


def test_find_is_sorted_nested_and_without_junk(tmp_path):
    for name in ["b.jpg", "a.PNG", "two words.png", "собака.png", "狗.jpeg", "deep/er/c.webp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name, format="PNG")
    junk = [".DS_Store", "Thumbs.db", "desktop.ini", "._b.jpg", "notes.txt", "metadata.jsonl",
            "notes.zip"]
    junk += [".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/x.png", "masks/b.png", "b.mask.png"]
    for name in junk:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"junk")
    found = [path.relative_to(tmp_path).as_posix() for path in P.find_photos(tmp_path)]
    assert found == sorted(["b.jpg", "a.PNG", "two words.png", "собака.png", "狗.jpeg",
                            "deep/er/c.webp"])


def test_find_looks_inside_a_file_without_a_known_ending(tmp_path):
    picture().save(tmp_path / "IMG_0001", format="JPEG")
    (tmp_path / "README").write_text("not an image")
    assert [path.name for path in P.find_photos(tmp_path)] == ["IMG_0001"]


def test_a_circle_of_links_ends_and_broken_links_are_reported(tmp_path):
    picture().save(tmp_path / "good.png")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    photos, problems = P.gather_photos(tmp_path)
    assert [photo.path.name for photo in photos] == ["good.png"]
    assert sorted(problem.path.name for problem in problems) == ["gone.png", "self.png"]
    assert all(problem.skipped and "link" in problem.message for problem in problems)


def test_a_pipe_named_like_a_photo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(P.PhotoError, match="not an ordinary file"):
        P.gather_photos(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(P.PhotoError, match=name):
        P.find_photos(tmp_path / name)


def test_an_empty_folder_and_one_of_bad_photos_say_why(tmp_path):
    with pytest.raises(P.PhotoError, match=r"no image in .*put 3 to 10"):
        P.gather_photos(tmp_path)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.png").write_text("hello")
    with pytest.raises(P.PhotoError) as error:
        P.gather_photos(tmp_path)
    assert "none of the 2" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "empty.jpg: the file is empty" in str(error.value)
    assert "words.png: its content is no image" in str(error.value)


def grouped(tmp_path, *folders):
    for k, name in enumerate(folders):
        (tmp_path / name).mkdir(parents=True)
        picture(k).save(tmp_path / name / "a.png")
    return tmp_path


@pytest.mark.parametrize("folders", [
    ["10_sks dog", "1_dog"], ["1_Dog", "2_sks dog"], ["img/20_ohwx man", "reg/1_man"],
    ["5_zwx", "1_teapot"], ["10_sks dog", "10_sks2 cat"]])
def test_kohyas_layout_is_refused_with_what_to_give(tmp_path, folders):
    with pytest.raises(P.PhotoError,
                       match=r"kohya's layout.*--instance_data_dir '.*' --class_data_dir '.*'"):
        P.gather_photos(grouped(tmp_path, *folders))


@pytest.mark.parametrize("folders", [
    ["1_front", "2_side", "3_back"], ["10_sks dog"], ["12_may", "14_may"],
    ["12_05_2023", "14_05_2023"], ["beach", "1_x"],
    ["2023_summer", "2025_winter"]])
def test_numbered_folders_of_one_subject_are_read(tmp_path, folders):
    assert len(P.gather_photos(grouped(tmp_path, *folders))[0]) == len(folders)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tiff", "a.avif"])
def test_plain_formats_are_read_without_complaint(tmp_path, name):
    Image.new("RGB", (40, 30), (200, 80, 40)).save(tmp_path / name)
    photo, problems = check(tmp_path, name)
    assert problems == []
    assert photo.size == (40, 30)
    image = photo.load()
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    assert close(image, (200, 80, 40), 8)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    photo, problems = check(tmp_path, "a.png")
    values = np.asarray(photo.load())[..., 0].astype(int)
    assert problems == []
    assert np.abs(values - ramp / 256).max() <= 1
    assert 120 < values.mean() < 135


def test_transparent_parts_become_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    image.save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ["rgba.png", "la.png", "p.png"]:
        photo, problems = check(tmp_path, name)
        assert photo.load().getpixel((19, 19)) == (255, 255, 255), name
        assert kinds(problems) == {"transparent"}
    assert check(tmp_path, "rgba.png")[0].load().getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_keep_their_colours(tmp_path, mode):
    image = Image.new("RGB", (20, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))
    image.convert(mode).save(tmp_path / "a.tiff", format="TIFF")
    photo, _ = check(tmp_path, "a.tiff")
    assert photo.load().getpixel((1, 1)) == (0, 0, 0)
    assert photo.load().getpixel((18, 18)) == (255, 255, 255)


def test_a_colour_profile_of_srgb_or_a_broken_one_changes_nothing(tmp_path):
    sRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (20, 20), (200, 80, 40))
    image.save(tmp_path / "same.png", icc_profile=sRGB)
    image.save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    for name in ["same.png", "broken.png"]:
        assert close(check(tmp_path, name)[0].load(), (200, 80, 40), 2), name


def test_a_wide_colour_profile_is_converted(tmp_path):
    """Display P3, as phones save it: sRGB made of the same numbers would be too dull."""
    image = Image.new("RGB", (20, 20), (200, 80, 40))
    image.save(tmp_path / "p3.png", icc_profile=display_p3())
    red, green, blue = check(tmp_path, "p3.png")[0].load().getpixel((5, 5))
    assert 208 <= red <= 220
    assert 65 <= green <= 78
    assert blue < 35


def display_p3():
    """A Display P3 profile (ICC v2, gamma 2.2): primaries adapted to D50 and one curve."""

    def s15(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    parts = {
        b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ " + bytes(4) + s15(0.5151, 0.2412, -0.0011),
        b"gXYZ": b"XYZ " + bytes(4) + s15(0.2919, 0.6922, 0.0419),
        b"bXYZ": b"XYZ " + bytes(4) + s15(0.1572, 0.0666, 0.7841),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    at, table, body = 128 + 4 + 12 * len(parts), b"", b""
    for tag, data in parts.items():
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    size = struct.pack(">I", at + len(body))
    header = size + b"lcms" + struct.pack(">I", 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + s15(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    """However the camera was held, the photo comes out as the upright one: red top left, blue
    below."""
    upright = Image.new("RGB", (32, 48), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 255), (0, 32, 16, 48))
    # the transpose that makes what the sensor saw
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    photo, problems = check(tmp_path, "a.png")
    assert photo.size == photo.load().size == (32, 48)
    assert problems == []
    assert np.array_equal(np.asarray(photo.load()), np.asarray(upright))


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ["red", "green", "blue"]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    photo, problems = check(tmp_path, "a.gif")
    assert kinds(problems) == {"animated"}
    assert "3 frames" in problems[0].message
    assert photo.load().getpixel((5, 5)) == (255, 0, 0)


def test_a_wrong_ending_is_read_by_content(tmp_path):
    picture().save(tmp_path / "a.png", format="JPEG")
    photo, problems = check(tmp_path, "a.png")
    assert photo is not None
    assert kinds(problems) == {"extension"}
    assert "JPEG" in problems[0].message


def test_heic_without_its_package_names_the_command(tmp_path, monkeypatch):
    header = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    (tmp_path / "IMG_1.HEIC").write_bytes(header + bytes(100))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    photo, problems = check(tmp_path, "IMG_1.HEIC")
    assert photo is None
    assert "pip install pillow-heif" in problems[0].message


def test_heic_with_its_package(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), (200, 80, 40)).save(tmp_path / "a.heic", format="HEIF")
    photo, problems = check(tmp_path, "a.heic")
    assert problems == []
    assert close(photo.load(), (200, 80, 40), 8)


# --- damaged and hostile --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_one_cut_short_is_skipped_among_good_ones(tmp_path, form):
    picture(1).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad", format=form)
    whole = (tmp_path / "bad").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad").unlink()
    photos, problems = P.gather_photos(tmp_path)
    assert [photo.path.name for photo in photos] == ["good.png"]
    assert [problem.path.name for problem in problems if problem.skipped] == ["bad.jpg"]


def png_that_claims(width, height):
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


# beyond Pillow's own refusal, and where it only warns
@pytest.mark.parametrize("side", [50_000, 10_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(side, side))
    tracemalloc.start()
    photo, problems = check(tmp_path, "bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert photo is None
    assert kinds(problems) == {"too large"}
    assert "smaller copy" in problems[0].message
    assert peak < 20e6


def test_a_bomb_without_an_ending_is_found_and_refused(tmp_path):
    (tmp_path / "bomb").write_bytes(png_that_claims(50_000, 50_000))
    with pytest.raises(P.PhotoError, match="megapixels"):
        P.gather_photos(tmp_path)


KINDS = ["jxl", "cur", "fli", "ras", "rgb", "jp2", "tga", "psd", "cr3", "nef", "dng", "svg", "xcf",
         "exr", "hif", "livp", "pdf", "mp4", "MOV", "webm"]


@pytest.mark.parametrize("name", [f"photo.{ending}" for ending in KINDS] + ["PHOTO.CR2"])
def test_images_of_unread_kinds_are_named_with_what_to_do(tmp_path, name):
    picture().save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(bytes(64))
    photos, problems = P.gather_photos(tmp_path)
    assert [photo.path.name for photo in photos] == ["good.png"]
    assert [problem.path.name for problem in problems] == [name]
    assert problems[0].skipped
    assert "JPEG" in problems[0].message


def test_a_raw_file_is_not_read_by_its_preview(tmp_path):
    picture().save(tmp_path / "a.nef", format="TIFF")  # as Pillow sees one
    photo, problems = check(tmp_path, "a.nef")
    assert photo is None
    assert problems[0].message == ".nef images are not read here: save it as JPEG or PNG"


@pytest.mark.parametrize("start",
                         [b"\xff\x0a", b"\0\0\0\x0cJXL \r\n", b"8BPS\0\x01", b"\0\0\0\x18ftypheic"])
def test_an_unread_kind_without_an_ending_is_known_by_its_first_bytes(tmp_path, start, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (tmp_path / "IMG_0001").write_bytes(start + bytes(64))
    with pytest.raises(P.PhotoError, match="IMG_0001: "):
        P.gather_photos(tmp_path)


# --- odd metadata ---------------------------------------------------------------------------------


def exif_block(orientation, resolution):
    """EXIF with an orientation and an XResolution: (type, count, value or offset, bytes at offset
    38)."""
    kind, count, value, data = resolution
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation,
                          0) + struct.pack("<HHII", 0x011A, kind, count, value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + data


ODD = {
    "minus one over nothing": (10, 1, 38, struct.pack("<ii", -1, 0)),
    "nothing over nothing": (5, 1, 38, bytes(8)),
    "text": (2, 4, 0x41424344, b""),
    "beyond the file": (5, 1, 10**6, b""),
    "no known type": (99, 1, 0, b""),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_exif_costs_a_sound_photo_nothing(tmp_path, form, odd):
    sideways = picture(size=(64, 32)).transpose(Image.Transpose.ROTATE_90)
    sideways.save(tmp_path / "a.png", format=form, exif=exif_block(6, ODD[odd]))
    photo, problems = check(tmp_path, "a.png")
    assert photo.size == photo.load().size == (64, 32)
    assert kinds(problems) <= {"extension"}


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_is_none_leaves_a_photo_as_it_is(tmp_path, orientation):
    picture(size=(64, 32)).save(tmp_path / "a.png", exif=exif_block(orientation, ODD["text"]))
    assert check(tmp_path, "a.png")[0].load().size == (64, 32)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_tiff_is_as_wide_as_it_is_loaded(tmp_path, orientation):
    """Pillow turns a TIFF itself, so that its sides must not be swapped twice."""
    picture(size=(32, 64)).save(tmp_path / "a.tiff", tiffinfo={0x0112: orientation})
    photo, _ = check(tmp_path, "a.tiff")
    assert photo.size == photo.load().size == (64, 32)


def long_texts():
    text, compressed, many = (PngInfo() for _ in range(3))
    text.add_text("workflow", "x" * 70_000_000)
    compressed.add_itxt("workflow", "x" * 3_000_000, zip=True)
    for k in range(70):
        many.add_text(f"step {k}", "x" * 1_000_000, zip=True)
    return {"text": text, "compressed": compressed, "many": many}


@pytest.mark.parametrize("which", ["text", "compressed", "many"])
def test_the_history_that_an_editor_writes_into_a_png_may_be_long(tmp_path, which):
    image = picture()
    image.save(tmp_path / "a.png", pnginfo=long_texts()[which], icc_profile=display_p3())
    image.save(tmp_path / "short.png", icc_profile=display_p3())
    photo, problems = check(tmp_path, "a.png")
    assert problems == []
    assert photo.load().tobytes() == check(tmp_path, "short.png")[0].load().tobytes()


def test_a_text_behind_the_pixels_or_a_huge_profile_costs_nothing(tmp_path):
    picture().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    data = b"key\0\0" + zlib.compress(bytes(3_000_000))
    crc = struct.pack(">I", zlib.crc32(b"zTXt" + data))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + crc
    (tmp_path / "behind.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    picture().save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    for name in ["behind.png", "profile.png"]:
        photo, problems = check(tmp_path, name)
        assert problems == [], name
        assert photo.load().tobytes() == picture().tobytes(), name


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_grey_of_fewer_bits_in_sixteen_is_as_bright_as_it_was(tmp_path, bits, form):
    grey = np.asarray(picture().convert("L"), dtype=np.uint16)
    Image.fromarray(grey << (bits - 8)).save(tmp_path / f"a.{form}")
    photo, problems = check(tmp_path, f"a.{form}")
    assert np.array_equal(np.asarray(photo.load())[..., 0], grey)
    assert kinds(problems) == {"depth"}
    assert f"read as {bits} bits" in problems[0].message


def test_twelve_bits_a_colour_in_sixteen_are_named(tmp_path):
    """Pillow reads such a PNG's upper eight bits alone, in which a twelve-bit image is all but
    black."""
    Image.new("RGB", (32, 32), (15, 9, 3)).save(tmp_path / "a.png")
    _, problems = check(tmp_path, "a.png")
    assert kinds(problems) == {"dark"}
    assert "its brightest value is 15 of 255" in problems[0].message


def test_grey_beyond_sixteen_bits_is_refused_by_its_values(tmp_path):
    Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)).save(tmp_path / "a.tiff")
    photo, problems = check(tmp_path, "a.tiff")
    assert photo is None
    assert "grey values from 70000 to 70000" in problems[0].message


# --- hostile --------------------------------------------------------------------------------------


def test_a_format_that_starts_other_programs_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (r) file\n"
    )
    photo, problems = check(tmp_path, "a.png")
    assert photo is None
    assert kinds(problems) == {"not an image"}


def test_hostile_names_are_printed_harmlessly(tmp_path):
    names = ["a\x1b[2Jb.png", "new\nline.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        (tmp_path / name).touch()
    _, problems = P.check_photos(P.find_photos(tmp_path))
    text = "".join(str(problem) for problem in problems)
    assert len(problems) == 3
    assert text.isprintable()
    text.encode("utf-8")


# --- what is worth a warning ----------------------------------------------------------------------


def test_small_and_narrow_photos_are_warned_about(tmp_path):
    picture(size=(400, 100)).save(tmp_path / "a.png")
    photo, problems = check(tmp_path, "a.png", resolution=128)
    assert photo is not None
    assert kinds(problems) == {"small", "narrow"}
    assert "1.3 times" in str(problems[0])
    assert "25 %" in str(problems[1])
    assert check(tmp_path, "a.png", resolution=100)[1][0].kind == "narrow"


def test_warnings_are_of_the_bucket_that_a_photo_goes_to(tmp_path):
    picture(size=(400, 100)).save(tmp_path / "a.png")
    known = {}
    for buckets in ([(64, 256), (128, 128)], [(120, 480), (480, 120)], [(256, 128)]):
        known[buckets[0]] = [str(problem) for problem in P.check_photos(
            [tmp_path / "a.png"], buckets=buckets)[1]]
    assert known[64, 256] == []
    assert known[120, 480] == ["a.png: 400 x 100 is smaller than 480 x 120: enlarged 1.2 times"]
    assert known[256, 128] == [
        "a.png: 400 x 100 is smaller than 128 x 256: enlarged 2.6 times",
        "a.png: 400 x 100 is long and narrow: the nearest bucket keeps 12 % of it"]


@pytest.mark.parametrize(("size", "wanted"), [
    ((600, 500), (512, 512)), ((700, 500), (512, 768)), ((500, 700), (768, 512)),
    ((1000, 1000), (1024, 1024)), ((700, 700), (512, 512)), ((9000, 100), (512, 768)),
])  # fmt: skip
def test_a_photo_goes_to_the_bucket_of_its_shape_and_then_of_its_size(size, wanted):
    assert P.nearest_bucket(size, [(512, 512), (512, 768), (768, 512), (1024, 1024)]) == wanted


@pytest.mark.parametrize(("size", "shape", "at", "box"), [
    ((60, 40), (1, 1), 0.5, (10, 0, 50, 40)), ((60, 40), (768, 512), 1, (33, 0, 60, 40)),
    ((60, 40), (512, 1024), 0, (0, 0, 60, 30)), ((60, 40), (512, 768), 0.3, (0, 0, 60, 40)),
    ((3, 900), (512, 2048), 0.5, (0, 450, 3, 451)),
])  # fmt: skip
def test_a_crop_is_the_largest_of_its_shape(size, shape, at, box):
    assert P.crop_box(size, shape, at) == box


def test_duplicates_and_near_duplicates(tmp_path):
    picture(1, (256, 256)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture(1, (256, 256)).resize((150, 150)).save(tmp_path / "c.jpg", quality=40)
    picture(2, (256, 256)).save(tmp_path / "d.png")
    photos, problems = P.check_photos(P.find_photos(tmp_path))
    assert len(photos) == 4
    assert [(p.path.name, p.kind) for p in problems] == [("b.png", "duplicate"),
                                                         ("c.jpg", "near-duplicate")]
    assert "a.png" in problems[0].message
    assert "a.png" in problems[1].message
    assert {problem.twin for problem in problems} == {tmp_path / "a.png"}


def product(seed, ground="white"):
    """An object with a pattern of its own on a plain ground, always at the same place: a shop's
    photo."""
    outline = Image.new("L", (256, 256), 0)
    ImageDraw.Draw(outline).ellipse((80, 80, 176, 176), fill=255)
    image = Image.new("RGB", (256, 256), ground)
    image.paste(picture(seed, (256, 256)), (0, 0), outline)
    return image


@pytest.mark.parametrize("ground", ["white", "black", (240, 240, 240)])
def test_objects_on_a_plain_ground_are_told_apart_and_copies_of_one_are_not(tmp_path, ground):
    for seed in range(8):
        product(seed, ground).save(tmp_path / f"{seed}.png")
    product(3, ground).resize((150, 150)).save(tmp_path / "copy.jpg", quality=60)
    _, problems = P.check_photos(P.find_photos(tmp_path))
    assert [(problem.path.name, problem.message.split(":")[0]) for problem in problems] == [
        ("copy.jpg", "looks nearly the same as 3.png")]


def test_5000_photos_cost_little_memory(tmp_path):
    """What stays of each is a path, a digest and a thumbnail of 768 bytes."""
    picture().save(tmp_path / "0000.png")
    content = (tmp_path / "0000.png").read_bytes()
    for i in range(1, 5000):
        (tmp_path / f"{i:04d}.png").write_bytes(content + bytes([i % 256, i // 256]))
    paths = P.find_photos(tmp_path)
    assert len(paths) == 5000
    tracemalloc.start()
    photos, problems = P.check_photos(paths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(photos) == 5000
    assert kinds(problems) == {"near-duplicate"}
    assert peak < 5000 * 4000  # one 64 x 64 RGB picture alone is 12,288 bytes


# --- captions and masks ---------------------------------------------------------------------------


def test_captions_from_txt_and_metadata(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"]):
        picture(i).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("  sks dog\n on grass ", encoding="utf-8")
    rows = [("a.png", "not this"), ("b.png", "собака"), ("sub/d.png", "from above"),
            ("../x", "hostile")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "{broken", '["list"]']),
                                             encoding="utf-8")
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "e.png", "text": "own folder"}\n')
    photos, problems = P.gather_photos(tmp_path)
    captions = {photo.path.relative_to(tmp_path).as_posix(): photo.caption for photo in photos}
    assert captions == {
        "a.png": "sks dog on grass", "b.png": "собака", "c.png": None,
        "sub/d.png": "from above", "sub/e.png": "own folder",
    }  # fmt: skip
    messages = [problem.message for problem in problems]
    assert sum("line" in message for message in messages) == 2
    assert sum("1 of 5 photos" in message for message in messages) == 1


def test_a_caption_file_that_is_none_is_bounded(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" * 10**6)
    photo, problems = check(tmp_path, "a.png")
    assert photo.caption is None
    assert kinds(problems) == {"caption"}


def test_masks_beside_or_in_their_folder(tmp_path):
    (tmp_path / "masks").mkdir()
    for i, name in enumerate(["a", "b", "c"]):
        picture(i, (60, 40)).save(tmp_path / f"{name}.jpg")
    mask = Image.new("L", (30, 20), 0)
    mask.paste(255, (0, 0, 15, 20))
    mask.save(tmp_path / "a.mask.png")
    mask.save(tmp_path / "masks/b.png")
    mask.resize((20, 20)).save(tmp_path / "c.mask.png")
    photos, problems = P.gather_photos(tmp_path)
    assert [photo.mask_path and photo.mask_path.name
            for photo in photos] == ["a.mask.png", "b.png", None]
    assert kinds(problems) == {"mask"}
    assert "shape" in problems[0].message
    loaded = photos[0].load_mask()
    assert loaded.mode == "L"
    assert loaded.size == (60, 40)
    assert loaded.getpixel((5, 5)) == 255
    assert loaded.getpixel((55, 5)) == 0
    assert photos[2].load_mask() is None


# --- crop -----------------------------------------------------------------------------------------


def bands():
    """Red, green, blue, each 40 x 40, side by side."""
    image = Image.new("RGB", (120, 40), "red")
    image.paste("lime", (40, 0, 80, 40))
    image.paste("blue", (80, 0, 120, 40))
    return image


def test_crop_centre_ends_and_box():
    assert close(P.crop_to_square(bands(), 16), (0, 255, 0), 0)
    assert close(P.crop_to_square(bands(), 16, center_crop=False, at=0), (255, 0, 0), 0)
    assert close(P.crop_to_square(bands(), 16, center_crop=False, at=1), (0, 0, 255), 0)
    assert close(P.crop_to_square(bands(), 16, box=(85, 5, 115, 35)), (0, 0, 255), 0)
    assert P.crop_to_square(bands().rotate(90, expand=True), 50).size == (50, 50)


@pytest.mark.parametrize(
    "box", [(0, 0, 50, 41), (-1, 0, 30, 31), (5, 5, 5, 5), (0, 0, 40, 20), "abcd", (1, 2)]
)
def test_a_bad_box_is_named(box):
    with pytest.raises(P.PhotoError, match="crop box"):
        P.crop_to_square(bands(), 16, box=box)


def test_interpolations_differ_and_an_unknown_one_is_named():
    source = picture(3, (50, 50))
    made = {name: P.crop_to_square(source, 31, interpolation=name).tobytes()
            for name in P.INTERPOLATIONS}
    assert len(set(made.values())) == len(P.INTERPOLATIONS)
    with pytest.raises(P.PhotoError, match="lanczos"):
        P.crop_to_square(source, 31, interpolation="cubic")
