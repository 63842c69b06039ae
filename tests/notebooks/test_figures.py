"""Every figure of the course passes the picture test: someone who has not read the text sees in it
what it must show.

figures.yaml keeps both sentences, `shows` and `seen`, and whether they agree. A figure that is new,
or whose cell is gone, fails here until someone has looked again.
"""

from pathlib import Path

import pytest
import yaml
from figures import COURSE, figures

ROWS = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=COURSE, ids=[path.stem for path in COURSE])
def notebook(request):
    return request.param


def test_every_figure_has_its_row_and_every_row_its_figure(notebook):
    assert set(ROWS[notebook.stem]) == set(figures(notebook))


def test_what_a_figure_must_show_is_what_was_seen(notebook):
    for cell, row in ROWS[notebook.stem].items():
        assert row.keys() == {"shows", "seen", "agree"}, cell
        assert len(row["shows"].split()) > 4, cell
        assert len(row["seen"].split()) > 4, cell
        assert row["agree"] is True, f"{cell} must show: {row['shows']} Seen: {row['seen']}"


def test_no_notebook_is_left_out():
    assert set(ROWS) == {path.stem for path in COURSE}
