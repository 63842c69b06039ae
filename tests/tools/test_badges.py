"""The badge and the set-up cell of a notebook get the project's address, as often as it changes."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dbcore.tools.badges import write_address

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "00_first.ipynb"
    cells = [new_markdown_cell(f"# 00\n{BADGE}"),
             new_code_cell('# Set-up\nDBCORE_REPO = ""  # where\nimport os')]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("times", [("ada/course",), ("ada/course", "grace-h/course.2")])
def test_both_addresses_are_written_and_nothing_else(path, times):
    before = nbformat.read(path, as_version=4)
    for repository in times:
        write_address(path, repository)
    after = nbformat.read(path, as_version=4)
    where = f"https://colab.research.google.com/github/{times[-1]}/blob/main/notebooks/00_first.ipynb"
    assert (after.cells[0].source
            == before.cells[0].source.replace("https://colab.research.google.com/)", f"{where})"))
    line = f'DBCORE_REPO = "https://github.com/{times[-1]}/archive/main.zip"  # where'
    assert after.cells[1].source == f"# Set-up\n{line}\nimport os"


@pytest.mark.parametrize("repository",
                         ["", "course", "https://github.com/ada/course", 'ada/"', "ada/course/x"])
def test_what_is_no_repository_is_refused(path, repository):
    before = path.read_text()
    with pytest.raises(ValueError, match="owner/name"):
        write_address(path, repository)
    assert path.read_text() == before


def test_a_notebook_without_a_badge_is_named(path):
    nbformat.write(new_notebook(cells=[new_code_cell('DBCORE_REPO = ""')]), path)
    with pytest.raises(ValueError, match=r"00_first.*0 Colab badges and 1 DBCORE_REPO"):
        write_address(path, "ada/course")
