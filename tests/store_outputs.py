"""Run notebooks from top to bottom and store what they show: `make outputs
NOTEBOOKS=notebooks/03_....ipynb`.

What `make test` compares with. Stored are text and PNG pictures; not stored are live widget views
and their state, times, and what only this machine has. A notebook whose run fails stays as it was.
"""

import os
import sys
import time
from itertools import chain
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
VIEW = "application/vnd.jupyter.widget-view+json"


def store(path):
    """Replace the outputs of the notebook at `path` by fresh ones; raises CellExecutionError if a
    cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # the kernel of this very Python, whatever kernels are installed
    NotebookClient(notebook, timeout=1200, kernel_name="python3", store_widget_state=False,
                   record_timing=False, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    nbformat.validate(notebook)
    beside = path.with_suffix(".part")
    beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(beside, path)


def tidy(outputs):
    """Pieces of one stream joined, and only the kinds of output that can be compared."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        for kind in (VIEW, "image/jpeg"):  # PIL sends its pictures as PNG and as JPEG
            output.get("data", {}).pop(kind, None)
        kept.append(output)
    return kept


def main():
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", DBCORE_STRICT="1")  # as in `make test`
    given = [Path(name) for name in sys.argv[1:]] or [NOTEBOOKS]
    for path in chain.from_iterable(sorted(one.glob("*.ipynb")) if one.is_dir() else [one]
                                    for one in given):
        began = time.monotonic()
        store(path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1e6:.2f} MB",
              flush=True)


if __name__ == "__main__":
    main()
