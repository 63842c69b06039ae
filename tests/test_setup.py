"""pyproject.toml, constraints.txt, environment.yml and the Makefile tell one story."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def by_name(lines):
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return by_name(line for line in lines if line and not line.startswith("#"))


def ranges():
    extras = PROJECT["optional-dependencies"].values()
    direct = by_name([*PROJECT["dependencies"], *(line for extra in extras for line in extra)])
    return {name: requirement for name, requirement in direct.items() if name != "dbcore"}


def conda_lines():
    """[(entry, comment)] of environment.yml, the pip section included."""
    found = re.findall(r"^ *- ([^#\n]+?) *(?:# (.+))?$", (ROOT / "environment.yml").read_text(),
                       re.MULTILINE)
    return [(entry, comment) for entry, comment in found if entry not in ("conda-forge", "pip:")]


def version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"constraints.txt: {requirement} is not an exact version"
    return specifier.version


def test_every_constraint_is_one_exact_public_version():
    for name, pin in pins().items():
        assert not pin.url, f"constraints.txt: {name} comes from {pin.url}; pin a released version"
        assert "+" not in version(pin), f"constraints.txt: {pin} has a local suffix; drop it"


def test_tested_versions_lie_within_the_ranges():
    for name, wanted in ranges().items():
        assert name in pins(), f"constraints.txt has no line for pyproject.toml's {name}"
        assert version(pins()[name]) in wanted.specifier, f"{pins()[name]} is outside {wanted}"


def test_ranges_admit_what_colab_has():
    colab = {"torch": "2.11", "diffusers": "0.39", "peft": "0.20", "transformers": "5.15",
             "accelerate": "1.14", "numpy": "2.1", "ipywidgets": "7.7.1"}
    for name, has in colab.items():
        assert has in ranges()[name].specifier, f"Colab's {name} {has} would be replaced"


def test_all_holds_every_extra():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(PROJECT["optional-dependencies"]) - {"all"}


def test_conda_has_the_same_versions():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert listed[0] == "--constraint constraints.txt"
    assert listed[-1] == "-e ."
    conda = {name: version(pin) for name, pin in by_name(listed[1:-1]).items()}
    assert conda == {name: version(pins()[name]) for name in ranges()}


def test_every_conda_line_says_what_needs_it():
    silent = [entry for entry, comment in conda_lines() if not comment
              and not entry.startswith("--")]
    assert len(conda_lines()) > 20
    assert not silent


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()) - {"help"}
    # not `make test`'s
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True,
                           env=alone).stdout
    assert {line.split()[0] for line in shown.splitlines()} - {"help"} == targets
    assert {"setup", "quickstart", "test", "lab", "badges", "bundle", "toybox"} <= targets


def test_ci_runs_what_people_run():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_data_is_where_the_package_says():
    import dbcore

    assert (dbcore.DATA / "LICENSE").read_text().startswith("CC0 1.0 Universal")
    assert dbcore.TOY_BASE.parent == dbcore.SUBJECTS.parent == dbcore.DATA
