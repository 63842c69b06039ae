"""What tests on a GPU share."""

import copy
import functools
import os
from pathlib import Path

import pytest
from pipelines import make_sd15_pipeline

from dbcore.models.base import Family


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """A pipeline of Stable Diffusion 1.5's shape; $DBCORE_SD15 is one that was made before."""
    made = os.environ.get("DBCORE_SD15")
    return Path(made) if made else make_sd15_pipeline(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session", autouse=True)
def read_once():
    """Each network is read from its files once, and copied in the CPU's memory for each run."""
    read, before = Family.read_network, {}

    @functools.wraps(read)
    def copied(base, component):
        what = os.path.realpath(Path(base.name, component)), base.precision(component)
        if what not in before:
            before[what] = read(base, component)
        return copy.deepcopy(before[what])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Family, "read_network", copied)
        yield
