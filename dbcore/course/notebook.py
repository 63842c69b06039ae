"""What the first cells of a notebook need: packages that may be missing, a line about the
hardware, a base, a subject.

The first cell calls `ready` where nothing but `dbcore` may be there yet (Colab, an empty folder),
so this module imports the standard library alone.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import dbcore
from dbcore.utils.errors import InputError

# The lowest versions the course runs with: pyproject.toml's, for a folder that was never installed.
NEEDS = {
    "accelerate": "1.2", "diffusers": "0.35", "huggingface_hub": "0.30", "ipywidgets": "7.7.1",
    "matplotlib": "3.8",
    "numba": "0.60", "numpy": "1.26", "peft": "0.17", "pillow": "10.1", "pyyaml": "6.0",
    "safetensors": "0.4.5",
    "torch": "2.4", "tqdm": "4.66", "transformers": "4.51",
}  # fmt: skip
LEFT_ALONE = ("torch", "numpy")  # replaced under a running kernel, they break it
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
STABLE_DIFFUSION_GB = 8


class SetupError(InputError):
    """A package, base or subject is not there, or too old; says which and what to do."""


def ready() -> None:
    """Install what is missing, leave torch and numpy as they are, and say what this machine can
    run.

    Raises `SetupError` if torch or numpy is too old, or if a package could not be installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    wanted = missing(NEEDS)
    if wanted:
        install(wanted)
    _no_bar_for_weights()
    print("dbcore is ready.")
    print(f"Hardware: {hardware()}")


def _no_bar_for_weights():
    """Reading a network from disk takes a second and needs no bar; the hub's bars for downloads
    stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()  # silences the hub as well
    enable_progress_bars()


def missing(needs: dict[str, str]) -> list[str]:
    """The lines for pip, such as 'peft>=0.17', of what is absent or older than `needs` = {name:
    version}."""
    lines = []
    for name, lowest in needs.items():
        has = _version(name)
        if has is not None and _numbers(has) >= _numbers(lowest):
            continue
        if has is not None and name in LEFT_ALONE:
            raise SetupError(f"{name} {has} is installed and the course needs {lowest} or newer. "
                             "It was left as it is: other work may need it. Update it, or start in "
                             "a fresh environment.")
        lines.append(f"{name}>={lowest}")
    return lines


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def install(lines: list[str]) -> None:
    """pip install `lines`, with every package of the course that is already good enough held where
    it is."""
    absent = {re.split("[>=]", line)[0]: line for line in lines}
    print("Installing what is missing:", ", ".join(absent), flush=True)
    if "torch" in absent and platform.system() == "Linux" and not shutil.which("nvidia-smi"):
        # without gigabytes of CUDA
        _pip("--no-deps", "--retries", "1", "--index-url", CPU_WHEELS, absent["torch"])
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder, "held.txt")
        held.write_text("\n".join(f"{name}=={_version(name)}" for name in NEEDS
                                  if name not in absent))
        trouble = _pip(*lines, "--constraint", str(held))
    if trouble:
        raise SetupError(f"pip could not install {', '.join(lines)}:\n{trouble[-1500:]}")


def _pip(*arguments):
    """pip install; what it complained of if it failed, else None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() or "no reason given" if done.returncode else None


def hardware() -> str:
    """One line: what torch will run on, and what that means for the course."""
    import torch

    if torch.cuda.is_available():
        gigabytes = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
        fits = gigabytes >= STABLE_DIFFUSION_GB - 1  # an "8 GB" card reports a little less
        return f"{torch.cuda.get_device_name(0)} with {gigabytes} GB; Stable Diffusion " + (
            "fits, and the toy base takes seconds." if fits else "may not fit; the toy base does.")
    if torch.backends.mps.is_available():
        return "an Apple GPU; the toy base takes seconds, Stable Diffusion takes patience."
    cores = _cores()
    return (f"a CPU with {cores} core{'' if cores == 1 else 's'}; enough for the toy base. "
            "For Stable Diffusion, find a GPU (Colab has one).")


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_base(name: str) -> str:
    """What `load_base` takes, for a name in a form: 'toy_base' ships with dbcore, all else is a
    folder or the hub's."""
    shipped = dbcore.DATA / name
    return str(shipped) if (shipped / "model_index.json").is_file() else name


def find_subject(name: str) -> tuple[Path, dict[str, str]]:
    """(folder of photos, what it shows) of a subject that ships, or of your own folder.

    What it shows is in its subject.json, at least {"class_noun", "instance_prompt",
    "class_prompt"}; for a folder of plain photos it is told by the folder's name, such as my_dog.
    Raises `SetupError`.
    """
    for folder in (dbcore.SUBJECTS / name, Path(name)):
        if (folder / "subject.json").is_file():
            return folder, json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    if name and Path(name).is_dir() and any(file.is_file() for file in Path(name).iterdir()):
        noun = (["thing"] + re.findall(r"[a-z]{2,}", Path(name).resolve().name.lower()))[-1]
        about = describe_subject(noun)
        print(f"{name} has no subject.json: taken as {about['class_prompt']}, from its name.")
        return Path(name), about
    known = ", ".join(sorted(path.parent.name for path in dbcore.SUBJECTS.glob("*/subject.json")))
    raise SetupError(f"no subject {name!r}: choose one of {known}, or a folder of photos")


def describe_subject(class_noun: str, identifier: str = "sks") -> dict[str, str]:
    """What a subject.json holds: the class in a word or two, and the two prompts made of it."""
    article = "an" if class_noun[:1].lower() in "aeiou" else "a"
    return {"class_noun": class_noun, "instance_prompt": f"a photo of {identifier} {class_noun}",
            "class_prompt": f"a photo of {article} {class_noun}"}
