"""Every notebook runs alone, in a folder that holds nothing else, and fetches the project itself:
what Colab does.

The environment has the packages of this one but not dbcore; DBCORE_REPO is this checkout's folder.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from notebook_guards import NOTEBOOKS, setup_cell, tags, written

COURSE = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COURSE, reason="there are no notebooks yet")]


@pytest.fixture
def python(tmp_path):
    """A Python without dbcore: a bare environment that sees this one's packages, but not its
    editable installs."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", find], check=True, capture_output=True,
                          text=True).stdout.strip()
    Path(site, "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to be in, and the project's address in the environment."""
    monkeypatch.setenv("DBCORE_REPO", str(NOTEBOOKS.parent))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_set_up_cell_fetches_the_project(python, alone, tmp_path):
    cell = setup_cell(nbformat.read(COURSE[0], as_version=4))
    show = "\nimport dbcore; print(dbcore.__file__, dbcore.SUBJECTS.is_dir())"
    done = subprocess.run([python, "-c", cell + show], cwd=alone, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert "dbcore is ready." in done.stdout
    where, subjects = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert Path(where).is_relative_to(tmp_path / "env")
    assert subjects == "True"
    assert list(alone.iterdir()) == []


def test_without_an_address_the_set_up_cell_says_what_to_do(python, alone, monkeypatch):
    monkeypatch.delenv("DBCORE_REPO")
    cell = setup_cell(nbformat.read(COURSE[0], as_version=4))
    done = subprocess.run([python, "-c", cell], cwd=alone, capture_output=True, text=True,
                          check=False)
    assert done.returncode
    assert "set DBCORE_REPO" in done.stderr


@pytest.mark.parametrize("path", COURSE, ids=[path.stem for path in COURSE])
def test_a_notebook_runs_alone(path, python, alone):
    shutil.copy(path, alone)
    nb = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    NotebookClient(nb, km=manager, timeout=600,
                   resources={"metadata": {"path": str(alone)}}).execute()
    (first,) = [cell for cell in nb.cells if "setup" in tags(cell)]
    assert "dbcore is ready." in written(first)
