"""What tests on a GPU share."""

import os
from pathlib import Path

import pytest
from pipelines import make_sd15_pipeline


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """A pipeline of Stable Diffusion 1.5's shape; $DBCORE_SD15 is one that was made before."""
    made = os.environ.get("DBCORE_SD15")
    return Path(made) if made else make_sd15_pipeline(tmp_path_factory.mktemp("sd15"))
