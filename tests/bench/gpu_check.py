"""`make gpu-check`: all that a GPU can tell of this project, in some eleven minutes.

Each part is a process of its own with a limit of its own, and writes a row as soon as it has one;
after every row gpu_check.json and gpu_check.md are written anew. So a part that fails, or a machine
that is taken away, costs what was not measured yet and nothing else. Parts come in the order of
what they are worth.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_report import write

TESTS = Path(__file__).parents[1]
TAIL = 3000  # characters of a failed part's last words
TEST_LIMIT = 40  # seconds that one test may take
MINUTES = 13  # what all parts take on an H100, and some: data/results/gpu.md


@dataclass
class Part:
    """One process: what it runs, how long it may, and what has become of it."""

    name: str
    limit: float  # seconds
    command: list[str]
    environment: dict = field(default_factory=dict)
    beside: bool = False  # it needs no GPU, and runs beside the others
    record: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None


def main(argv=None):
    """Run the parts one after the other, as long as there is time; what fails is written down."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("work_dirs/gpu_check"),
        help="where gpu_check.json, gpu_check.md and log.txt go (%(default)s)",
    )
    parser.add_argument(
        "--script", type=Path, help="diffusers' train_dreambooth_lora.py, to be compared with"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="what is not begun by then is left out (%(default)s)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny bases and few steps: does it run? For any machine"
    )
    parser.add_argument(
        "--parts", nargs="+", metavar="NAME", help="only these parts, in their usual order"
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        Check(args, Path(work)).run()


class Check:
    """The parts, and the report on them."""

    def __init__(self, args, work):
        self.args, self.work, self.began = args, work, time.monotonic()
        self.parts = [
            part for part in parts(args, work) if not args.parts or part.name in args.parts
        ]
        self.log = open(args.output_dir / "log.txt", "wb")  # noqa: SIM115 - open as long as the check

    def run(self):
        try:
            for part in self.parts:
                self.start(part)
                if not part.beside:
                    self.follow(part)
            for part in self.parts:
                if part.beside:
                    self.follow(part)
        finally:
            for part in self.parts:
                end(part)
            self.collect()
            self.log.close()
        print((self.args.output_dir / "gpu_check.md").read_text(encoding="utf-8"))

    def left(self):
        """Seconds that are left."""
        return 60 * self.args.minutes - (time.monotonic() - self.began)

    def start(self, part):
        if self.left() < 5:
            part.record = {"outcome": "left out: no time"}
            return
        print(f"{time.monotonic() - self.began:5.0f} s  {part.name}", flush=True)
        environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **part.environment}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")])
        )
        part.record = {"outcome": "running", "began": round(time.monotonic() - self.began, 1)}
        words = open(self.work / f"{part.name}.txt", "wb")  # noqa: SIM115 - the process's own from now on
        part.process = subprocess.Popen(
            part.command,
            stdout=words,
            stderr=subprocess.STDOUT,
            cwd=TESTS.parent,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        words.close()

    def follow(self, part):
        """Wait for a part's end, or end it; the report is kept up to date meanwhile."""
        if part.process is None:
            return
        until = time.monotonic() + min(part.limit, self.left())
        while part.process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
            self.collect()
        code = part.process.poll()
        end(part)
        part.record |= {
            "outcome": "cut short"
            if code is None
            else "done"
            if code == 0
            else f"ended with code {code}",
            "seconds": round(time.monotonic() - self.began - part.record["began"], 1),
        }
        words = (self.work / f"{part.name}.txt").read_bytes()
        self.log.write(
            f"\n===== {part.name}: {part.record['outcome']}\n".encode() + words[-100_000:]
        )
        self.log.flush()
        if code != 0:
            part.record["last words"] = words[-TAIL:].decode("utf-8", "replace")
        self.collect()

    def collect(self):
        """Every part's rows so far, into the report."""
        report = {
            "seconds": round(time.monotonic() - self.began, 1),
            "limit": 60 * self.args.minutes,
            "tiny": self.args.tiny,
            "parts": {},
        }
        for part in self.parts:
            report["parts"][part.name] = {
                **part.record,
                "rows": rows_of(self.work / f"{part.name}.jsonl"),
            }
        write(report, self.args.output_dir)


def end(part):
    """End a part that still runs, with all that it started; pytest is asked first, and sums up."""
    if part.process is None or part.process.poll() is not None:
        return
    for word, patience in ((signal.SIGINT, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(part.process.pid, word)
            part.process.wait(patience)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def rows_of(path):
    """The rows that a part has written so far, without one that is half written."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def parts(args, work):
    """All parts, the most valuable first; the bases that they share come before them."""

    def measured(name, limit, beside=False):
        command = [
            sys.executable,
            "-m",
            "bench.gpu_parts",
            name,
            "--work",
            str(work),
            *["--tiny"] * args.tiny,
        ]
        return Part(
            name,
            limit,
            [*command, *(["--script", str(args.script.resolve())] if args.script else [])],
            {"OMP_NUM_THREADS": "2"} if beside else {},
            beside,
        )

    marked = sorted(
        str(path)
        for path in TESTS.rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
        and path.parent.name != "notebooks"  # they take minutes each: pytest -m gpu tests/notebooks
    )
    if args.tiny:  # on a machine without a GPU: one test that runs on any
        marked = [str(TESTS / "models" / "test_process.py")]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        *marked,
        "-m",
        "" if args.tiny else "gpu",
        "-p",
        "bench.record",
        "-p",
        "no:cacheprovider",
        "-v",
        "-rA",
        "--tb=short",
        f"--basetemp={work / 'pytest'}",
    ]
    tests = Part(
        "tests",
        240,
        pytest,
        {
            "RECORD": str(work / "tests.jsonl"),
            "TEST_LIMIT": str(TEST_LIMIT),
            "DBCORE_SD15": str(work / "sd15"),
        },
    )
    yield measured("bases", 45)
    yield measured("forecast", 240, beside=True)
    yield tests
    yield measured("plain", 100)
    yield measured("variants", 110)
    yield measured("sdxl", 110)
    yield measured("flux2", 65)
    yield measured("script", 140)
    yield measured("compile", 110)


if __name__ == "__main__":
    main()
