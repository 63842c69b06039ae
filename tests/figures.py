"""The figures of the course, alone, for eyes that have not read the text.

`python tests/figures.py FOLDER` writes each stored image as FOLDER/notebook/cell.png;
tests/notebooks/figures.yaml has what each must show and what such eyes saw.
"""

import base64
import sys
from pathlib import Path

import nbformat
from notebook_guards import NOTEBOOKS, code_cells

COURSE = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def figures(path: Path) -> dict[str, list[bytes]]:
    """{cell id: its stored images as PNG files}, of the cells that have any."""
    found = {}
    for cell in code_cells(nbformat.read(path, as_version=4)):
        images = [base64.b64decode(output.data["image/png"]) for output in cell.outputs
                  if "image/png" in output.get("data", {})]
        if images:
            found[cell.id] = images
    return found


if __name__ == "__main__":
    for notebook in COURSE:
        folder = Path(sys.argv[1]) / notebook.stem
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in figures(notebook).items():
            for k, image in enumerate(images):
                (folder / f"{name}{f'-{k + 1}' if k else ''}.png").write_bytes(image)
