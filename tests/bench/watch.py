"""One program as a process of its own, timed and watched from outside; `make bench` compares two.

Its progress bars tell its stages apart, the system tells its highest resident memory. The process
itself is this file too, `python -m bench.watch NOTES PROGRAM ...`, which imports nothing heavy, so
that the program's own start-up is measured.
"""

import atexit
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import time
import types
from functools import reduce
from pathlib import Path

# A progress bar of dbcore or of diffusers' script. A print is one write, so no read from the pipe
# cuts one in two.
BAR = re.compile(r"(class images|encoding photos|steps): +\d+%\|[^|]*\| *(\d+)/\d+", re.IGNORECASE)
STAGES = ("class images", "encoding photos", "steps")


# --- outside --------------------------------------------------------------------------------------


def watch(program, folder, environment=None):
    """Run a program (its words; "dbcore" or a script's path comes first), and say what it did.

    `environment`: variables beside those of this process.

    Returns {"began": the time of day, "seconds", "marks": {bar: [(seconds, count)]}, "resident",
    "gpu_memory": bytes or None, "code"}; what it printed is in `folder`/log.txt.
    """
    notes, marks = Path(folder, "notes.json"), {}
    environment = {**os.environ, **(environment or {})}
    environment.pop("TQDM_DISABLE", None)  # bars are read
    tests = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None,
                                                       [tests, environment.get("PYTHONPATH")]))
    clock, began = time.time(), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", __name__, str(notes), *program],
                               stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    with process.stdout as output, open(Path(folder, "log.txt"), "wb") as log:
        while chunk := os.read(output.fileno(), 1 << 16):
            now = time.perf_counter() - began
            log.write(chunk)
            for bar, count in BAR.findall(chunk.decode("utf-8", "replace")):
                marks.setdefault(bar.lower(), []).append((now, int(count)))
    resident = wait(process)
    seconds = time.perf_counter() - began
    gpu_memory = json.loads(notes.read_text())["gpu_memory"] if notes.is_file() else None
    return {"began": clock, "seconds": seconds, "marks": marks, "resident": resident,
            "gpu_memory": gpu_memory,
            "code": process.returncode}


def wait(process):
    """Wait for its end; its highest resident memory in bytes, None on Windows.

    Linux counts in what the parent held as it forked, so the parent should have imported nothing
    heavy.
    """
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


def rate(marks):
    """Steps a second, without the first tenth (which warms up) and the last (which saves); None for
    too few.

    `marks`: [(seconds, count)]; of several prints of one count the last is the end of its step.
    """
    ends = {count: when for when, count in marks}
    total = max(ends)
    inside = [count for count in ends if max(1, total // 10) <= count < total]
    first, last = min(inside, default=0), max(inside, default=0)
    return (last - first) / (ends[last] - ends[first]) if last > first else None


def stages(marks, seconds):
    """Seconds of each progress bar, of what follows the last one, and of all the rest."""
    parts = {bar: marks[bar][-1][0] - marks[bar][0][0] for bar in STAGES if bar in marks}
    parts["after the steps"] = seconds - marks["steps"][-1][0]
    return {"start-up and loading": seconds - sum(parts.values()), **parts}


# --- inside ---------------------------------------------------------------------------------------


def main(notes, program, *words):
    """Be the program; as it ends, write its highest use of the GPU's memory to `notes`."""
    atexit.register(note_memory, notes)
    sys.argv = [program, *words]
    if program == "dbcore":
        runpy.run_module("dbcore", run_name="__main__", alter_sys=True)
    else:
        if not importlib.util.find_spec("torchvision"):
            stand_in_for_torchvision()
        runpy.run_path(program, run_name="__main__")


def note_memory(path):
    torch = sys.modules.get("torch")
    used = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else None
    Path(path).write_text(json.dumps({"gpu_memory": used}))


def stand_in_for_torchvision():
    """Let the script import `photo_transforms` as torchvision's; both are Pillow's work.

    Libraries that ask whether torchvision is installed still hear that it is not.
    """
    module = types.ModuleType("torchvision")
    module.transforms = types.SimpleNamespace(**photo_transforms())
    sys.modules["torchvision"] = module
    find = importlib.util.find_spec
    importlib.util.find_spec = (lambda name, package=None: None if name == "torchvision"
                                else find(name, package))


def photo_transforms():
    """{name: maker of a function of a picture}: what diffusers' script takes from
    torchvision.transforms."""
    import numpy as np
    import torch
    from PIL.Image import Resampling

    def compose(steps):
        return lambda image: reduce(lambda x, step: step(x), steps, image)

    def resize(size, interpolation):  # the shorter side becomes `size`
        return lambda image: image.resize([round(s * size / min(image.size)) for s in image.size],
                                          interpolation)

    def crop(size, place):
        def cut(image):
            left, top = (place(side - size) for side in image.size)
            return image.crop((left, top, left + size, top + size))
        return cut

    def to_tensor():  # (3, h, w) in [0, 1]
        def tensor(image):
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

        return tensor

    def normalize(mean, std):
        mean, std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        return lambda pixels: pixels.sub(mean).div(std)

    return {
        "Compose": compose, "Resize": resize, "ToTensor": to_tensor, "Normalize": normalize,
        "RandomCrop": lambda size: crop(size, lambda room: int(torch.randint(room + 1, ()))),
        "CenterCrop": lambda size: crop(size, lambda room: room // 2),
        "InterpolationMode": Resampling,
    }  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
