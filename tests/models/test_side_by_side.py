"""The first steps of each family are those of diffusers' own script of it, number by number.

The scripts are given with DIFFUSERS_SCRIPTS, the folder examples/dreambooth of a copy of diffusers.
Without them, our steps are held against a few numbers that were stored of one run of each.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from side_by_side import CASES, STORED, run_ours, run_script, summary

SCRIPTS = os.environ.get("DIFFUSERS_SCRIPTS")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A function: what our run of a case computes, kept for both tests."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = run_ours(CASES[name], tmp_path_factory.mktemp("ours"))
        return known[name]

    return run


def compare(name, part, mine, theirs):
    """Equal but for rounding, which is as large as the largest numbers that were added up."""
    largest = theirs.abs().max().item()
    difference = (mine - theirs).abs().max().item()
    print(f"{name}, {part}: {len(theirs)} numbers differ by {difference:.1e} at most, "
          f"{difference / largest:.1e} of the largest")
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", CASES)
def test_our_steps_are_those_that_were_stored_of_the_script(name, ours):
    stored, found = json.loads(STORED.read_text())[name], summary(ours(name))
    for part, numbers in stored.items():
        compare(name, part, torch.tensor(found[part]), torch.tensor(numbers))


@pytest.mark.skipif(not SCRIPTS, reason="DIFFUSERS_SCRIPTS names no folder with diffusers' scripts")
@pytest.mark.parametrize("name", CASES)
def test_our_steps_are_those_of_the_script(name, ours, tmp_path):
    theirs, mine = run_script(Path(SCRIPTS, CASES[name].script), CASES[name], tmp_path), ours(name)
    assert theirs.keys() == mine.keys()
    for part in ("loss", "gradient", "lora"):
        names = [key for key in theirs if key.startswith(part)]
        compare(name, part, *(torch.cat([tensors[key].flatten() for key in names])
                              for tensors in (mine, theirs)))
