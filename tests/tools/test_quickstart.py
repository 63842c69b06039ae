"""The first thing a newcomer runs leaves a LoRA and an image, says so in four lines, and can be
run again."""

import json

import pytest
from PIL import Image
from pipelines import make_tiny_pipeline

import dbcore
from dbcore.__main__ import main
from dbcore.tools import quickstart


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("base"))
    (folder
     / "recommended.json").write_text(json.dumps({"num_inference_steps": 2, "resolution": 32}))
    return folder


def test_twice_in_a_row(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "CLASS_IMAGES", 2)
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["quickstart", "--pretrained_model_name_or_path", str(base), "--max_train_steps", "2"])
        lines = capsys.readouterr().out.splitlines()[-4:]
        assert [line.split(":")[0] for line in lines] == ["Done", "Time", "Look", "Next"]
    run = tmp_path / "work_dirs" / "quickstart"
    with Image.open(run / "before_after.png") as grid:
        assert min(grid.size) > 400
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    assert "before_after.png" in lines[2]


def test_an_unknown_subject_is_answered_with_those_there_are(base, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--pretrained_model_name_or_path", str(base), "--subject", "unicorn"])
    assert "unicorn" in str(stop.value)
    assert "teapot" in str(stop.value)


def test_every_shipped_subject_can_be_asked_for():
    names = sorted(path.parent.name for path in dbcore.SUBJECTS.glob("*/subject.json"))
    assert "dog" in names
    assert len(names) >= 6
    for name in names:
        folder, subject = quickstart.read_subject(name)
        prompts = quickstart.prompts_for(subject)
        assert len(list(folder.glob("*.png"))) == 5
        assert len(prompts) == 5
        assert subject["class_noun"] in prompts[0]
        assert "sks" in prompts[0]
        assert "sks" not in prompts[-1]


def test_another_run_is_not_replaced_unasked(base, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "CLASS_IMAGES", 2)
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    words = ["quickstart", "--pretrained_model_name_or_path", str(base), "--max_train_steps", "1",
             "--output_dir", str(tmp_path / "run")]  # fmt: skip
    main(words)
    before = (tmp_path / "run" / "pytorch_lora_weights.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--subject", "cat"])
    assert "holds a run already" in str(stop.value)
    assert "--overwrite_output_dir" in str(stop.value)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").read_bytes() == before
    main([*words, "--subject", "cat", "--overwrite_output_dir"])
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").read_bytes() != before
