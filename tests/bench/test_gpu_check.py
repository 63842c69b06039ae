"""The GPU's check keeps what it has found, whatever fails, hangs or is cut short."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
from pipelines import make_flux2_miniature, make_tiny_pipeline

from bench import gpu_check, gpu_parts
from bench.gpu_report import markdown
from dbcore.engines.memory import size
from dbcore.models.base import load_base

HALF = '{"name": "one", "steps/s": 2.0}\\n{"name": "two", "st'  # a row, and half of the next
ROW = f"import sys; open(sys.argv[1], 'a').write('{HALF}'); "


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs a check of parts that are programs, {name: (seconds, code)}; returns its report."""

    def run(programs, minutes=1.0):
        made = [
            gpu_check.Part(
                name, limit, [sys.executable, "-c", code, str(tmp_path / f"{name}.jsonl")]
            )
            for name, (limit, code) in programs.items()
        ]
        monkeypatch.setattr(gpu_check, "parts", lambda args, work: made)
        args = Namespace(output_dir=tmp_path, minutes=minutes, tiny=True, parts=None)
        gpu_check.Check(args, tmp_path).run()
        return json.loads((tmp_path / "gpu_check.json").read_text())["parts"]

    return run


def test_a_part_that_fails_or_hangs_leaves_its_rows_and_its_last_words(check, tmp_path):
    found = check(
        {
            "sdxl": (30, ROW + "raise SystemExit('no kernel')"),
            "variants": (1.5, ROW + "import time; time.sleep(60)"),
            "flux2": (30, ROW),
        }
    )
    assert [part["outcome"] for part in found.values()] == [
        "ended with code 1",
        "cut short",
        "done",
    ]
    assert all(part["rows"] == [{"name": "one", "steps/s": 2.0}] for part in found.values())
    assert "no kernel" in found["sdxl"]["last words"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "no kernel" in text
    assert text.count("| one | 2 |") == 3


def test_what_is_not_begun_in_time_is_left_out(check):
    found = check({"sdxl": (30, ROW), "flux2": (30, ROW)}, minutes=0.001)
    assert [part["outcome"] for part in found.values()] == ["left out: no time"] * 2


def test_no_part_is_cut_short_that_takes_as_long_as_on_the_h100(tmp_path):
    text = (gpu_check.TESTS.parent / "data" / "results" / "gpu.md").read_text(encoding="utf-8")
    limits = {
        part.name: part.limit
        for part in gpu_check.parts(Namespace(tiny=True, script=None), tmp_path)
        if not part.beside
    }
    took = {name: float(s) for name, s in re.findall(r"\| (\w+) \| done \| ([\d.]+) \|", text)}
    assert {"bases", "tests", "plain", "variants", "flux2"} <= took.keys()
    assert all(1.2 * took[name] < limits[name] for name in took.keys() & limits.keys())
    unmeasured = {name: limit for name, limit in limits.items() if name not in took}
    whole = sum(seconds for name, seconds in took.items() if name in limits)
    assert whole + sum(unmeasured.values()) < 60 * gpu_check.MINUTES


def test_each_test_is_recorded_as_it_ends_and_none_takes_longer_than_it_may(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "def test_hangs(): time.sleep(30)\n"
    )
    where = {
        **os.environ,
        "RECORD": str(tmp_path / "rows"),
        "TEST_LIMIT": "1",
        "PYTHONPATH": str(gpu_check.TESTS),
    }
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bench.record", str(tmp_path)],
        cwd=tmp_path,
        env=where,
        check=False,
    )
    good, bad, hangs = gpu_check.rows_of(tmp_path / "rows")
    assert (good["outcome"], bad["outcome"], hangs["outcome"]) == ("passed", "failed", "failed")
    assert "assert 1 == 2" in bad["words"]
    assert "more than 1 seconds" in hangs["words"]
    assert hangs["seconds"] < 10


def test_a_variant_is_measured_on_random_weights_and_another_goes_on_where_one_fails(
    tmp_path, monkeypatch
):
    base = make_tiny_pipeline(tmp_path / "sd15")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    monkeypatch.setattr(gpu_parts, "VARIANTS", {"wrong": ({"rank": 0}, {}), "plain": ({}, {})})
    args = Namespace(work=tmp_path, tiny=True)
    assert gpu_parts.variants(gpu_parts.Rows(tmp_path / "rows"), args)
    wrong, plain = gpu_check.rows_of(tmp_path / "rows")
    assert "--rank 0" in wrong["error"]
    assert plain["steps/s"] > 0
    assert 0.1 < plain["loss"] < 10


def test_random_weights_are_as_many_as_those_that_are_read(tmp_path):
    base = load_base(make_flux2_miniature(tmp_path))
    module = gpu_parts.random_network(base, "text_encoder")
    assert size(module) == size(base.text_encoder)  # the table of words is there once
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_the_report_sets_the_forecast_beside_the_measurement():
    rows = {
        "variants": [
            {
                "name": "plain",
                "steps/s": 50.0,
                "GPU memory, GB": 3.0,
                "GPU memory of the steps, GB": 2.0,
            }
        ],
        "forecast": [{"name": "plain", "family": "sd15", "largest": "steps", "steps": 2.5}],
        "bases": [{"name": "machine", "machine": ["GPU 0"], "flops": 8e14}],
        "plain": [{"name": "plain", "dbcore": {"steps/s": 30.0}},
                  {"name": "plain", "script": {"steps/s": 10.0}}],
        "script": [{"name": "prior", "dbcore": {"steps/s": 20.0}}],  # the script was cut short
    }
    text = markdown(
        {"tiny": False, "parts": {name: {"rows": rows[name], "outcome": "done"} for name in rows}}
    )
    assert "| sd15, plain | steps | 2.50 | 3.00 | 0.83 | 2.50 | 2.00 | 1.25 |" in text
    assert "| steps/s | 30 | 10 | 0.33 |" in text
    assert "| steps/s | 20 |  |  |" in text
    assert "| plain | 50 | 3 | 2 |  |  |  | 11% |" in text  # of 800 TFLOP/s, at 1.78 TFLOP a step


def test_each_program_has_its_row_before_the_next_one_begins(tmp_path, monkeypatch):
    ended = []

    def costs(program, folder, environment):
        ended.append(program[0])
        if program[0] != "dbcore":
            raise RuntimeError("the script has failed")
        return {"steps/s": 30.0}

    script = tmp_path / "script.py"
    script.touch()
    monkeypatch.setattr("bench.__main__.costs", costs)
    args = Namespace(work=tmp_path, tiny=True, script=script)
    assert gpu_parts.plain(gpu_parts.Rows(tmp_path / "rows"), args)
    first, second = gpu_check.rows_of(tmp_path / "rows")
    assert ended == ["dbcore", str(script)]
    assert first == {"name": "plain", "dbcore": {"steps/s": 30.0}}
    assert "the script has failed" in second["error"]
