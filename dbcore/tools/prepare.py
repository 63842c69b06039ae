"""`dbcore prepare`: a folder of photos as they are -> a folder ready to train on, and a report."""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcore.datasets.photos import (
    CONTACT_SHEET,
    INTERPOLATIONS,
    Photo,
    PhotoError,
    check_box,
    crop_to_square,
    gather_photos,
    shown,
    square_box,
)
from dbcore.utils.errors import InputError
from dbcore.utils.files import whole_folder
from dbcore.utils.text import read_text

if TYPE_CHECKING:
    from PIL import Image

HELP = "check photos, turn them upright, crop them square and write a folder ready to train on"
# the contact sheet: at most 60 photos, 150 pixels each
SHEET_PHOTOS, SHEET_COLUMNS, CELL = 60, 4, 150
SHEET_LETTERS, SHEET_LINES = 48, 2  # of a photo's problems, above it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instance_data_dir", required=True, help="folder of photos; nothing is written there"
    )
    parser.add_argument("--output_dir", required=True,
                        help="new folder for the squares and the report")
    parser.add_argument("--resolution", type=int, default=512, help="side of the squares in pixels")
    parser.add_argument("--image_interpolation_mode", choices=INTERPOLATIONS, default="lanczos")
    parser.add_argument("--seed", type=int, default=0, help="decides where --random crops")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--center_crop", action="store_true",
                       help="the middle of each photo (the default)")
    place.add_argument("--random", action="store_true", help="somewhere along the longer side")
    place.add_argument(
        "--crop_box",
        help="left,top,right,bottom in pixels of the upright photo, for every photo, "
        "or a JSON file "
        '{"dog.jpg": [left, top, right, bottom], ...}; photos not named there are '
        'cropped in the middle',
    )


def main(args: argparse.Namespace) -> None:
    report = prepare(
        args.instance_data_dir,
        args.output_dir,
        resolution=args.resolution,
        crop="random" if args.random else "center",
        boxes=read_boxes(args.crop_box) if args.crop_box else None,
        interpolation=args.image_interpolation_mode,
        seed=args.seed,
    )
    print(describe(report))


def prepare(instance_data_dir: str | Path, output_dir: str | Path, resolution: int = 512,
            crop: str = "center", boxes: Any = None, interpolation: str = "lanczos",
            seed: int = 0) -> dict[str, Any]:
    """Write `output_dir`: 0000.png, ... (with .txt captions and .mask.png masks), sheet and
    reports.

    `crop`: "center" or "random" (by `seed` and the photo's number). `boxes`: one box (left, top,
    right, bottom) for every photo or a dict file name -> box, in pixels of the upright photo.
    Returns the report, a dict. The folder appears whole or not at all. The images carry no EXIF:
    no place, no owner. Raises `PhotoError` if no photo is usable, a box does not fit, or
    `output_dir` is in the way.
    """
    source, target = Path(instance_data_dir), Path(output_dir)
    if resolution < 8:
        raise PhotoError(f"--resolution {resolution}: give the side in pixels, 8 or more")
    photos, problems = gather_photos(source, resolution=resolution)
    _refuse_target(source, target)
    boxes = _boxes_by_photo(boxes, photos, source)
    rows = []
    with whole_folder(target) as partial:
        for number, photo in enumerate(photos):
            at = random.Random(f"{seed} crop {number}").random() if crop == "random" else 0.5
            box = boxes.get(photo.path) or square_box(photo.size, at)
            rows.append(_write_square(photo, partial / f"{number:04d}.png", box, resolution,
                                      interpolation))
            rows[-1]["from"] = shown(photo.path.relative_to(source))
            rows[-1]["problems"] = [note.message if note.path == photo.path else str(note)
                                    for note in problems if photo.path in (note.path, note.photo)]
        report = {
            "resolution": resolution,
            "crop": "boxes" if boxes else crop,
            "seed": seed,
            "photos": rows,
            "skipped": [
                {"from": shown(p.path.relative_to(source)), "why": p.message} for p in problems
                if p.skipped
            ],
            "notes": _other_notes(problems, photos, source),
        }
        contact_sheet(photos, rows, partial).save(partial / CONTACT_SHEET)
        (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False),
                                             encoding="utf-8")
        (partial / "report.md").write_text(describe(report) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()  # it is empty: _refuse_target has looked
    return report


def read_boxes(text: str) -> tuple[str, ...] | dict[str, Any]:
    """The value of --crop_box: four numbers, or the dict in a JSON file. Raises `PhotoError`."""
    path = Path(text)
    if not path.is_file():
        return tuple(text.split(","))  # check_box says what is wrong with them
    try:
        boxes = json.loads(read_text(path))
    except InputError as error:
        raise PhotoError(f"--crop_box {shown(text)} {error}") from None
    except ValueError as error:
        raise PhotoError(f"--crop_box {shown(text)} is not JSON: {error}") from None
    if not isinstance(boxes, dict):
        raise PhotoError(f'--crop_box {shown(text)}: write {{"dog.jpg": '
                         f'[left, top, right, bottom], ...}}')
    return boxes


def _refuse_target(source, target):
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise PhotoError(f"--output_dir {shown(target)} lies in the photo folder: "
                         "choose a place outside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PhotoError(
            f"--output_dir {shown(target)} exists and is not empty: choose another, or remove it"
        )


def _boxes_by_photo(boxes, photos, source):
    """{path: checked box}, every box checked before anything is written."""
    if boxes is None:
        return {}
    if not isinstance(boxes, dict):
        boxes = {photo.path.relative_to(source).as_posix(): boxes for photo in photos}
    named = {photo.path.relative_to(source).as_posix(): photo for photo in photos}
    unknown = sorted(set(boxes) - set(named))
    if unknown:
        raise PhotoError(f"--crop_box names {shown(unknown[0])}, which is no usable photo of "
                         f"{shown(source)}")
    checked = {}
    for name, box in boxes.items():
        try:
            checked[named[name].path] = check_box(box, named[name].size)
        except PhotoError as error:
            raise PhotoError(f"{shown(name)}: {error}") from None
    return checked


def _write_square(photo, path, box, resolution, interpolation):
    square = crop_to_square(photo.load(), resolution, box=box, interpolation=interpolation)
    square.info.clear()
    square.save(path)
    row = {"file": path.name, "size": list(photo.size), "box": list(box)}
    if photo.caption is not None:
        path.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        row["caption"] = photo.caption
    if photo.mask_path is not None:
        mask = crop_to_square(photo.load_mask(), resolution, box=box, interpolation="nearest")
        row["mask"] = path.with_suffix(".mask.png").name
        mask.save(path.with_name(row["mask"]))
    return row


def _other_notes(problems, photos, source):
    """What was found about files that are no photo and belong to none, such as a table of
    captions."""
    of_photos = {photo.path for photo in photos}
    return [{"from": shown(p.path.relative_to(source)), "why": p.message}
            for p in problems if not p.skipped and not of_photos & {p.path, p.photo}]


def contact_sheet(photos: list[Photo], rows: list[dict[str, Any]], folder: Path) -> Image.Image:
    """One image of the whole folder: each photo with its square drawn on it, beside what was made
    of it."""
    from PIL import Image, ImageDraw

    shown_rows = rows[:SHEET_PHOTOS]
    columns = min(SHEET_COLUMNS, len(shown_rows))
    head = 15 * (1 + SHEET_LINES) + 5
    wide, high = 2 * CELL + 16, head + CELL + 10
    sheet = Image.new("RGB", (columns * wide, -(-len(shown_rows) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (photo, row) in enumerate(zip(photos, shown_rows)):
        left, top = number % columns * wide + 4, number // columns * high + head
        label = [f"{row['file']}  {photo.size[0]} x {photo.size[1]}",
                 *textwrap.wrap("; ".join(row["problems"]), SHEET_LETTERS, max_lines=SHEET_LINES,
                                placeholder=" ...")]
        for above, line in enumerate(reversed(label), 1):
            pen.text((left, top - 15 * above), line, fill="black", font_size=12)
        small = photo.load()
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (left, top))
        scale = small.width / photo.size[0]
        corners = [left + row["box"][0] * scale, top + row["box"][1] * scale]
        corners += [left + row["box"][2] * scale - 1, top + row["box"][3] * scale - 1]
        pen.rectangle(corners, outline="#D55E00", width=2)
        with Image.open(folder / row["file"]) as square:
            sheet.paste(square.resize((CELL, CELL)), (left + CELL + 4, top))
    return sheet


def describe(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    side, made, skipped = report["resolution"], report["photos"], report["skipped"]
    lines = [f"# {len(made)} photos at {side} x {side}, {len(skipped)} skipped", ""]
    lines += ["| file | from | size | square | remarks |", "|---|---|---|---|---|"]
    for row in made:
        extras = ["has a caption"] * ("caption" in row) + ["has a mask"] * ("mask" in row)
        remarks = "; ".join(row["problems"] + extras) or "good"
        size, box = "{} x {}".format(*row["size"]), "{}, {} to {}, {}".format(*row["box"])
        lines.append(f"| {row['file']} | {_cell(row['from'])} | {size} | {box} | "
                     f"{_cell(remarks)} |")
    for title, notes in (("Skipped:", skipped), ("Other files:", report["notes"])):
        if notes:
            lines += ["", title] + [f"- {row['from']}: {row['why']}" for row in notes]
    return "\n".join(lines)


def _cell(text):
    return text.replace("|", "\\|")
