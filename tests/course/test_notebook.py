"""The first cell installs what is missing and nothing else, and says what the machine is good
for."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dbcore
from dbcore.course import notebook

ROOT = Path(dbcore.__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed, and nothing else."""
    def pretend(**versions):
        monkeypatch.setattr(notebook, "_version", versions.get)
    return pretend


@pytest.fixture
def pip(monkeypatch):
    """Calls of pip, with the constraints it was given; none is made."""
    calls = []

    def run(command, **_):
        held = Path(command[-1]).read_text().split() if "--constraint" in command else None
        calls.append((command, held))
        return SimpleNamespace(returncode=1 if "broken>=1" in command else 0,
                               stderr="no such thing")

    monkeypatch.setattr(notebook.subprocess, "run", run)
    return calls


COLAB = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "diffusers": "0.39.0", "peft": "0.20.0",
         "transformers": "5.15.1",
         "accelerate": "1.14.0", "ipywidgets": "7.7.1", "huggingface_hub": "1.3.0",
         "matplotlib": "3.10.0",
         "numba": "0.60.0", "pillow": "11.3.0", "pyyaml": "6.0.2", "safetensors": "0.6.2",
         "tqdm": "4.67.1"}


def test_what_colab_has_is_enough(installed):
    installed(**COLAB)
    assert notebook.missing(notebook.NEEDS) == []


def test_the_absent_and_the_old_are_asked_for(installed):
    installed(**(COLAB | {"peft": None, "ipywidgets": "7.6.5", "safetensors": "0.4.10"}))
    assert notebook.missing(notebook.NEEDS) == ["ipywidgets>=7.7.1", "peft>=0.17"]


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_an_old_torch_or_numpy_is_left_alone_and_named(installed, name):
    installed(**(COLAB | {name: "1.0.0"}))
    with pytest.raises(notebook.SetupError, match=rf"{name} 1.0.0 is installed.*left as it is"):
        notebook.missing(notebook.NEEDS)


def test_an_install_holds_everything_else_where_it_is(installed, pip, capsys):
    installed(**(COLAB | {"peft": None}))
    notebook.install(["peft>=0.17"])
    ((command, held),) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "peft>=0.17" in command
    assert "torch==2.11.0+cu128" in held
    assert "numpy==2.1.3" in held
    assert not any(line.startswith("peft") for line in held)
    assert "Installing what is missing: peft" in capsys.readouterr().out


@pytest.mark.parametrize(("driver", "small"), [(None, True), ("/usr/bin/nvidia-smi", False)])
def test_a_missing_torch_is_the_small_one_where_no_gpu_is(installed, pip, monkeypatch, driver,
                                                          small):
    installed(**(COLAB | {"torch": None}))
    monkeypatch.setattr(notebook.platform, "system", lambda: "Linux")
    monkeypatch.setattr(notebook.shutil, "which", lambda name: driver)
    notebook.install(["torch>=2.4"])
    assert (notebook.CPU_WHEELS in pip[0][0]) == small
    assert "torch>=2.4" in pip[-1][0]
    assert pip[-1][1] is not None


def test_what_pip_could_not_do_is_said(installed, pip):
    installed(**COLAB)
    with pytest.raises(notebook.SetupError, match="could not install broken>=1:\nno such thing"):
        notebook.install(["broken>=1"])


def test_the_list_is_that_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["toybox"]
    lines += [line for line in project["optional-dependencies"]["notebooks"]
              if line.startswith("ipywidgets")]
    assert dict(line.split(">=") for line in lines) == notebook.NEEDS


@pytest.mark.parametrize(("gigabytes", "words"),
                         [(14.7, "Stable Diffusion fits"), (7.6, "Stable Diffusion fits"),
                                              (3.8, "may not fit")])  # fmt: skip
def test_a_gpu_is_judged_by_its_memory(monkeypatch, gigabytes, words):
    card = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert notebook.hardware().startswith(f"Tesla T4 with {round(gigabytes)} GB;")
    assert words in notebook.hardware()


def test_a_cpu_is_enough_for_the_toy_base(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "enough for the toy base" in notebook.hardware()
    for cores, words in ((1, "a CPU with 1 core;"), (2, "a CPU with 2 cores;")):
        monkeypatch.setattr(notebook, "_cores", lambda cores=cores: cores)
        assert notebook.hardware().startswith(words)


def test_ready_prints_two_lines(capsys):
    notebook.ready()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "dbcore is ready."
    assert second.startswith("Hardware: ")


def test_a_shipped_base_is_a_folder_and_any_other_name_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(dbcore, "DATA", tmp_path)
    (tmp_path / "toy_base").mkdir()
    (tmp_path / "toy_base" / "model_index.json").write_text("{}")
    assert notebook.find_base("toy_base") == str(tmp_path / "toy_base")
    assert notebook.find_base("stable-diffusion-v1-5/stable-diffusion-v1-5") == (
        "stable-diffusion-v1-5/stable-diffusion-v1-5")  # fmt: skip


def test_subjects_that_ship_and_ones_own(tmp_path):
    folder, about = notebook.find_subject("dog")
    assert len(list(folder.glob("*.png"))) == 5
    assert about["instance_prompt"] == "a photo of sks dog"
    (tmp_path / "subject.json").write_text(json.dumps({"class_noun": "newt"}))
    assert notebook.find_subject(str(tmp_path)) == (tmp_path, {"class_noun": "newt"})
    with pytest.raises(notebook.SetupError,
                       match=r"no subject 'unicorn': choose one of .*cat.*dog"):
        notebook.find_subject("unicorn")


@pytest.mark.parametrize(("name", "noun"), [("my_dog", "dog"), ("Ada's owl 2", "owl"),
                                            ("2026", "thing")])
def test_a_folder_of_plain_photos_is_a_subject(tmp_path, capsys, name, noun):
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(notebook.SetupError, match="no subject"):  # nothing is in it
        notebook.find_subject(str(folder))
    (folder / "IMG_0001.jpg").touch()
    found, about = notebook.find_subject(str(folder))
    assert (found, about["class_noun"]) == (folder, noun)
    assert about == notebook.describe_subject(noun)
    assert f"taken as {about['class_prompt']}, from its name" in capsys.readouterr().out


def test_the_prompts_of_a_subject():
    assert notebook.describe_subject("old teapot", "ohwx") == {
        "class_noun": "old teapot", "instance_prompt": "a photo of ohwx old teapot",
        "class_prompt": "a photo of an old teapot"}


def test_nothing_but_the_standard_library_is_needed_to_import_it():
    code = ("import sys; import dbcore.course.notebook; print(sorted({'torch', 'numpy', 'PIL'} & "
            "set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
