"""Files from strangers and secrets of one's own: nothing is run, nothing hangs, nothing is told."""

import ast
import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from runs import LORA, leave_out_report, make_options, make_photos

import dbcore
from dbcore.__main__ import main
from dbcore.config import ConfigError, TrainConfig
from dbcore.engines import checkpoint
from dbcore.engines.trainer import Interrupted, train
from dbcore.models.adapter import LoraFileError
from dbcore.models.base import load_base, recommended
from dbcore.models.lora_files import read_adapter

TOKEN, SECRET = "hf_sentinel_of_the_token", "sentinel-of-the-environment"
SOURCES = sorted(Path(dbcore.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(folder / "cache"))
        yield make_options(folder, max_train_steps=2)


# --- nothing unpickles ----------------------------------------------------------------------------


def calls(path):
    """(dotted name, keyword names and values) of every call in a source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value)
                                           for word in node.keywords}


@pytest.mark.parametrize("path", SOURCES,
                         ids=lambda path: path.relative_to(Path(dbcore.__file__).parent).as_posix())
def test_no_module_unpickles(path):
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}  # fmt: skip
    assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for name, words in calls(path):
        assert name not in ("eval", "exec", "yaml.load", "os.system")
        assert name != "torch.load" or words.get("weights_only") == "True"
        assert name != "np.load" or words.get("allow_pickle", "False") == "False"


def test_a_pickled_lora_is_refused_unopened(tmp_path):
    marker = tmp_path / "was run"
    (tmp_path / "pytorch_lora_weights.bin").write_bytes("cos\nsystem\n(S'touch "
                                                        f"{marker}'\ntR.".encode())
    with pytest.raises(LoraFileError, match="pickled"):
        read_adapter(tmp_path / "pytorch_lora_weights.bin")
    assert not marker.exists()


# --- hostile safetensors --------------------------------------------------------------------------


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "endless header": safetensors_bytes({}, length=2**60),
    "header beyond the file": safetensors_bytes({"a": TENSOR}, length=10_000),
    "no JSON": safetensors_bytes(b"{" * 100),
    "deep JSON": safetensors_bytes(b'{"a":' * 50_000),
    "offsets beyond the file": safetensors_bytes({"a": {**TENSOR, "data_offsets": [0, 2**50]}},
                                                 b"\0" * 16),
    "offsets backwards": safetensors_bytes({"a": {**TENSOR, "data_offsets": [16, 0]}}, b"\0" * 16),
    "shape too large": safetensors_bytes({"a": {**TENSOR, "shape": [2**40, 2**40]}}, b"\0" * 16),
    "overlap": safetensors_bytes({"a": TENSOR, "b": TENSOR}, b"\0" * 16),
    "cut short": safetensors_bytes({"a": TENSOR}, b"\0" * 9),
    "not a LoRA": safetensors_bytes({"a": TENSOR}, b"\0" * 16),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_lora_file_is_a_clear_error(kind, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(LoraFileError, match=r"lora.safetensors"):
        read_adapter(path)


@pytest.mark.parametrize("kind",
                         ["empty", "endless header", "offsets beyond the file", "cut short"])
def test_a_hostile_base_is_a_clear_error(kind, options, tmp_path):
    import shutil

    folder = shutil.copytree(options["pretrained_model_name_or_path"], tmp_path / "base")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(ConfigError, match="its unet cannot be loaded"):
        load_base(folder).unet  # noqa: B018


def test_a_base_with_pickled_weights_alone_is_refused(options, tmp_path):
    import shutil

    folder = shutil.copytree(options["pretrained_model_name_or_path"], tmp_path / "base")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="its unet cannot be loaded from safetensors"):
        load_base(folder).unet  # noqa: B018


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_damaged_settings_of_a_base_name_the_file(text, tmp_path):
    (tmp_path / "recommended.json").write_text(text)
    with pytest.raises(ConfigError, match=r"recommended.json is damaged"):
        recommended(tmp_path)


class Program:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_made_to_deceive_is_a_clear_error(options, tmp_path):
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, output_dir=tmp_path / "run"), should_stop=lambda: True)
    folder = tmp_path / "run" / "checkpoint-1"
    weights = folder / checkpoint.TRAINING
    good, state = weights.read_bytes(), json.loads((folder / checkpoint.STATE).read_text())
    saved = torch.load(weights, weights_only=True)
    other, program = io.BytesIO(), io.BytesIO()
    torch.save({**saved, "weights": [saved["weights"][0][:1], *saved["weights"][1:]]}, other)
    torch.save(Program(str(tmp_path / "started")), program)
    for data, says in ((HOSTILE["endless header"], "cannot be read"),
                       (program.getvalue(), "cannot be read"),
                       (other.getvalue(), "another shape")):
        weights.write_bytes(data)
        # the digests agree: only the content is wrong
        state["sha256"][weights.name] = checkpoint.digest_of(weights)
        (folder / checkpoint.STATE).write_text(json.dumps(state))
        with pytest.raises(checkpoint.CheckpointError, match=says):
            train(TrainConfig(**options, output_dir=tmp_path / "run",
                              resume_from_checkpoint="latest"))
    assert good != weights.read_bytes()
    assert not (tmp_path / "started").exists()


# --- hostile photos -------------------------------------------------------------------------------


def png_of(width, height):
    """A few hundred bytes that say they are a picture of that size."""
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def test_training_survives_a_folder_of_traps(options, tmp_path, capsys, monkeypatch):
    folder = make_photos(tmp_path / "photos")
    (folder / "bomb.png").write_bytes(png_of(50_000, 50_000))
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "; rm -rf $HOME; .png").write_bytes(b"no picture")
    (folder / "\x1b[2Jclear\nscreen.png").write_bytes(b"no picture")
    (folder / "-rf.jpg").write_bytes((folder / "1.png").read_bytes())
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    leave_out_report(monkeypatch)
    path = train(TrainConfig(**{**options, "instance_data_dir": str(folder)},
                             output_dir=tmp_path / "run"))
    said = capsys.readouterr().out
    assert path.is_file()
    assert "\x1b" not in said
    for name in ("bomb.png", "torn.png", "itself.png", "rm -rf", "clear\\nscreen.png"):
        (line,) = [line for line in said.splitlines() if name in line]
        assert "skipped" in line


@pytest.mark.parametrize("content", [None, b"no picture"], ids=["empty", "all bad"])
def test_no_good_photo_stops_before_any_model_is_loaded(content, options, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    if content:
        (tmp_path / "photos" / "dog.jpg").write_bytes(content)
    monkeypatch.setattr("dbcore.engines.trainer.load_base",
                        lambda *args, **more: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="photos"):
        train(TrainConfig(**{**options, "instance_data_dir": str(tmp_path / "photos")},
                          output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_is_in_anything_a_run_leaves(options, tmp_path, capfd, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))
             if name != "report_to"]
    flags += ["--output_dir", str(tmp_path / "run"), "--hub_token", TOKEN, "--report_to",
              "tensorboard",
              "--validation_prompt", "a photo of sks dog", "--num_validation_images", "1"]
    main(["train", *flags])
    with pytest.raises(SystemExit) as refused:  # the error of a finished run's folder
        main(["train", *flags])
    said = "".join(capfd.readouterr()) + str(refused.value)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {LORA, "config.yaml", "README.md", "log.jsonl", "state.json"} <= names
    assert any("tfevents" in n for n in names)
    for secret in (TOKEN, SECRET):
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_no_secret_is_in_the_traceback_of_a_failed_upload(options, tmp_path, monkeypatch):
    import traceback

    from dbcore.engines.hub import push

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, exist_ok):
            raise OSError(f"401 for {self.token}")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    config = TrainConfig(**options, push_to_hub=True, hub_token=TOKEN, output_dir=tmp_path / "dog")
    with pytest.raises(ConfigError, match="dog could not be uploaded") as caught:
        push(config)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such home")
def test_the_home_folder_is_in_no_card(options, tmp_path, monkeypatch):
    from dbcore.engines.report import settings_table

    monkeypatch.setenv("HOME", str(tmp_path))
    table = settings_table(
        TrainConfig(**{**options, "instance_data_dir": str(tmp_path / "dog photos")}))
    assert str(tmp_path) not in table
    assert "~/dog photos" in table
