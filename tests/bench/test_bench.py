"""The benchmark runs, reads what programs print, and writes its report; what it measures is not
judged here."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import make_tiny_pipeline

import dbcore
from bench import __main__ as bench
from bench.watch import BAR, photo_transforms, rate, stages, watch
from dbcore.datasets.dreambooth import to_pixels

ROOT = Path(dbcore.__file__).parents[1]
# In the place of diffusers' script: its options, bars and file, and its use of torchvision, but no
# training.
SCRIPT = """
import argparse, pathlib
from PIL import Image
from torchvision import transforms
from tqdm import tqdm
check_min_version = print
check_min_version("0.1.0")
parser = argparse.ArgumentParser()
for name in ("output_dir", "instance_data_dir", "class_data_dir"):
    parser.add_argument("--" + name, type=pathlib.Path)
for name in ("resolution", "max_train_steps", "num_class_images"):
    parser.add_argument("--" + name, type=int)
args, more = parser.parse_known_args()
assert "--pre_compute_text_embeddings" in more and "--lora_layers" not in more
lanczos = transforms.InterpolationMode.LANCZOS
look = transforms.Compose([transforms.Resize(args.resolution, interpolation=lanczos),
                           transforms.RandomCrop(args.resolution), transforms.ToTensor(),
                           transforms.Normalize([0.5], [0.5])])
seen = [look(Image.open(path)).shape for path in args.instance_data_dir.iterdir()]
assert seen == [(3, args.resolution, args.resolution)] * 5
for k in tqdm(range(args.num_class_images or 0), desc="Generating class images"):
    args.class_data_dir.mkdir(exist_ok=True)
for k in tqdm(range(args.max_train_steps), desc="Steps"):
    pass
args.output_dir.mkdir()
(args.output_dir / "pytorch_lora_weights.safetensors").touch()
"""


@pytest.fixture
def words(tmp_path):
    base = make_tiny_pipeline(tmp_path / "base")
    (base / "recommended.json").write_text(json.dumps({"num_inference_steps": 2, "resolution": 32}))
    (tmp_path / "script.py").write_text(SCRIPT)
    return ["--smoke", "--script", str(tmp_path / "script.py"), "--toy", str(base),
            "--output_dir", str(tmp_path / "bench")]


@pytest.mark.parametrize("names",
                         [["prior"],
                          pytest.param(["toy", "prior", "validation"], marks=pytest.mark.slow)])
def test_smoke(names, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as `make test` has it: the bars are read all the same
    bench.main([*words, "--cases", *names, "answers"])
    report = json.loads((tmp_path / "bench" / "report.json").read_text())
    cases = {case["name"]: case for case in report["cases"]}
    assert list(cases) == names
    assert report["script"]["asks for diffusers"] == "0.1.0"
    for name, case in cases.items():
        for side, stage in (("dbcore", "encoding photos, s"), ("script", "steps, s")):
            (run,) = case["runs"][side]
            assert (0 <= run[stage] < run["until the LoRA is saved, s"] < run["whole command, s"]
                    + 0.01)
            assert run["resident memory, GB"] > 0.01
            assert ("class images, s" in run) == (name == "prior")
    text = (tmp_path / "bench" / "report.md").read_text()
    assert text.count("## ") == len(names)
    assert "--max_train_steps 2" in text
    assert "`script --help`" in text
    assert str(tmp_path) not in text


def test_the_forecast_is_held_against_runs(words, tmp_path):
    # from a process of its own: Linux counts in what the parent holds as it forks, and tests hold
    # gigabytes
    done = subprocess.run([sys.executable, "-m", "bench", *words, "--memory"], cwd=ROOT / "tests",
                          capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "bench" / "memory.json").read_text())
    assert [row["run"] for row in rows] == ["plain", "batch 32"]
    for row in rows:  # a process with PyTorch in it, and no more than a tiny base adds
        assert 2e8 < row["measured"] < 1.5e9
        assert 6e8 < row["forecast"] < 1.5e9
    table = (tmp_path / "bench" / "memory.md").read_text()
    assert "| batch 32 | `--instance_prompt a photo of sks dog --max_train_steps 3" in table
    assert str(tmp_path) not in table
    assert table.strip() in done.stdout


def test_a_script_that_fails_is_quoted(words, tmp_path, capsys):
    (tmp_path / "script.py").write_text("raise SystemExit('it needs diffusers 9.9')")
    with pytest.raises(SystemExit,
                       match=r"(?s)script.py ended with code 1.*it needs diffusers 9.9"):
        bench.main([*words, "--cases", "toy"])


def test_a_wrong_case_and_a_missing_script_are_named(words):
    with pytest.raises(SystemExit, match="--cases tay: choose from toy, prior"):
        bench.main([*words, "--cases", "tay"])
    with pytest.raises(SystemExit, match=r"--script nowhere.py: not there"):
        bench.main([*words, "--script", "nowhere.py"])


def test_the_script_is_fetched_for_the_installed_diffusers_and_kept(tmp_path, monkeypatch):
    from importlib.metadata import version

    served = tmp_path / version("diffusers")
    served.write_text("print('fetched')")
    monkeypatch.setattr(bench, "SCRIPT", f"{tmp_path.as_uri()}/{{}}")
    (tmp_path / "bench").mkdir()
    path = bench.find_script(None, tmp_path / "bench")
    served.unlink()
    assert path == bench.find_script(None, tmp_path / "bench")
    assert path.read_text() == "print('fetched')"
    path.unlink()
    with pytest.raises(ValueError, match="give your copy with --script"):
        bench.find_script(None, tmp_path / "bench")


def test_growth_turns_one_knob_at_a_time():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["--growth"])
    plain = next(bench.cpu_cases(args))
    for case in bench.growth_cases(args):
        changed = ({name for name in case.options if case.options[name] != plain.options.get(name)}
                   - {"max_train_steps"})
        option, _, value = case.name.partition("-")
        assert ((case.photos == int(value)) if option == "photos"
                else (case.options[option] == int(value)))
        assert changed <= {option, *bench.PRIOR}


def test_photos_are_as_many_as_asked_for_and_all_differ(tmp_path):
    paths = sorted(bench.photos(tmp_path / "photos", 12).iterdir())
    assert len({path.read_bytes() for path in paths}) == 12


# --- what is read from outside --------------------------------------------------------------------


def test_bars_of_both_programs_are_read():
    text = ("\rGenerating class images:  10%|#         | 1/10 [00:01<00:09]\rSteps:  "
            "67%|██████▋   | 100/150 [00:07]\rencoding photos: 100%|██| 5/5 [00:00<?]\rLoading "
            "pipeline components...: 100%|██| 5/5")
    assert BAR.findall(text) == [("class images", "1"), ("Steps", "100"), ("encoding photos", "5")]


def test_rate_leaves_out_the_warm_up_and_the_last_step():
    marks = [(0.0, 0), (9.0, 1)] + [(9.0 + 0.1 * k, 1 + k) for k in range(1, 19)] + [(99.0, 20)]
    assert rate(marks) == pytest.approx(10)
    assert rate([(0.0, 0), (1.0, 1), (2.0, 2)]) is None


def test_stages_add_up_to_the_whole():
    marks = {"class images": [(2, 0), (5, 4)], "steps": [(6, 0), (16, 9)]}
    assert stages(marks, 18) == {"start-up and loading": 3, "class images": 3, "steps": 10,
                                 "after the steps": 2}


def test_a_program_is_watched(tmp_path):
    (tmp_path / "program.py").write_text("""
import sys, time
hold = bytearray(300_000_000)
hold[::4096] = b"x" * len(hold[::4096])
print("\\rSteps:   0%|   | 0/2 [", file=sys.stderr, flush=True)
time.sleep(0.5)
print("\\rSteps: 100%|###| 2/2 [", file=sys.stderr, flush=True)
sys.exit(3)
""")
    seen = watch([str(tmp_path / "program.py")], tmp_path)
    (first, zero), (last, two) = seen["marks"]["steps"]
    assert (zero, two, seen["code"], seen["gpu_memory"]) == (0, 2, 3, None)
    assert 0.4 < last - first < seen["seconds"]
    assert seen["resident"] is None or seen["resident"] > 3e8
    assert "Steps: 100%" in (tmp_path / "log.txt").read_text()


def test_the_stand_in_shows_pictures_as_dbcore_does():
    parts = photo_transforms()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    look = [parts["Resize"](40, parts["InterpolationMode"].LANCZOS), parts["CenterCrop"](40),
            parts["ToTensor"](), parts["Normalize"]([0.5], [0.5])]
    middle = to_pixels(image.crop((10, 0, 50, 40)))
    assert (parts["Compose"](look)(image) - middle).abs().max() < 1e-5
    half = parts["Resize"](20, parts["InterpolationMode"].BICUBIC)(image)
    assert half.size == (30, 20)
    assert parts["RandomCrop"](20)(half).size == (20, 20)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [["--help"], ["train", "--help"], ["train", "--rank", "0"]],
                         ids=" ".join)
def test_help_and_a_mistake_are_answered_in_half_a_second(asked):
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "dbcore", *asked], cwd=ROOT, capture_output=True,
                       check=False)
        # the processor's seconds, not the clock's, which runs on while others work
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user
                     - before.children_system)
    assert min(times) < 0.5
