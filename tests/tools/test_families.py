"""Each family in miniature goes through every command, and stock pipelines read what comes out."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_flux2_miniature, make_sdxl_miniature, make_tiny_pipeline
from runs import LORA, leave_out_report, make_photos, read_run

from dbcore.__main__ import main
from dbcore.engines import evaluate
from dbcore.models.base import Family, load_base
from dbcore.utils.seeding import generator, normal

FAMILIES = {"sd": make_tiny_pipeline, "sdxl": make_sdxl_miniature, "flux2": make_flux2_miniature}
PROMPT, SEEDS = "a photo of sks dog", [0, 1]


def dbcore(tool, *words, **options):
    """One command: `dbcore TOOL WORDS --name value ...`; True is a flag."""
    for name, value in options.items():
        words += (f"--{name}", *([] if value is True else [value]))
    main([tool, *map(str, words)])


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """A folder with a base, photos, and a run of four steps on them."""
    folder = tmp_path_factory.mktemp(request.param)
    base = FAMILIES[request.param](folder / "base")
    (base / "recommended.json").write_text(json.dumps({"num_inference_steps": 2}))
    make_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(folder / "cache"))
        leave_out_report(patch)
        train(folder, folder / "run")
        yield folder


def train(world, run, *words, **options):
    dbcore("train", *words, **{
        "pretrained_model_name_or_path": world / "base", "instance_data_dir": world / "photos",
        "instance_prompt": PROMPT, "max_train_steps": 4, "learning_rate": 0.1, "report_to": "none",
        "output_dir": run, **options})  # fmt: skip
    return run


def generate(run, folder, **options):
    dbcore("generate", prompt=PROMPT, num_images=len(SEEDS), checkpoint_dir=run, output_dir=folder,
           **options)
    return pixels(Image.open(path) for path in sorted(folder.glob("a-photo*.png")))


def stock(base, lora=None):
    """The pixels that a stock pipeline makes of the noise that `generate` begins with."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    ours = load_base(base)
    shape, side = ours.latent_shape(ours.resolution), ours.resolution
    noise = torch.cat([normal(shape, seed, "picture") for seed in SEEDS])
    return pixels(pipeline(
        prompt=[PROMPT] * len(SEEDS), latents=noise, num_inference_steps=2, height=side, width=side,
        guidance_scale=ours.settings["guidance_scale"],
        generator=[generator(seed, "picture sampler") for seed in SEEDS]).images)  # fmt: skip


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.fixture(scope="module")
def with_lora(world):
    """What a stock pipeline generates with the run's LoRA, which is not what it does without."""
    images = stock(world / "base", world / "run" / LORA)
    assert np.abs(images - stock(world / "base")).max() > 10
    return images


def test_a_stock_pipeline_makes_the_same_images(world, with_lora, tmp_path):
    assert np.abs(generate(world / "run", tmp_path) - with_lora).max() <= 1


def test_a_run_that_was_stopped_ends_in_the_same_bits(world, tmp_path):
    train(world, tmp_path / "run", max_train_steps=2)
    train(world, tmp_path / "run", resume_from_checkpoint="latest")
    assert read_run(tmp_path / "run") == read_run(world / "run")


def test_encoders_are_gone_before_the_denoiser_comes(world, tmp_path, monkeypatch):
    there, load = [], Family.load_network

    def watched(base, component):
        there.append((component in base.roles["denoiser"], [*base.loaded()]))
        return load(base, component)

    monkeypatch.setattr(Family, "load_network", watched)
    train(world, tmp_path / "run", low_vram=True, max_train_steps=1)
    generate(world / "run", tmp_path / "images", low_vram=True)
    assert [loaded for is_denoiser, loaded in there if is_denoiser] == [[], []]
    assert (tmp_path / "run" / LORA).stat().st_size == (world / "run" / LORA).stat().st_size


def test_evaluate_measures_it(world, tmp_path, monkeypatch):
    def colours(images):
        return torch.stack([torch.from_numpy(pixels([image.resize((2, 2))])).flatten().float()
                            for image in images])

    encoder = evaluate.Encoder("colours", colours, lambda prompts: torch.ones(len(prompts), 12))
    monkeypatch.setattr(evaluate, "load_encoders", lambda base: [encoder])
    dbcore("evaluate", checkpoint_dir=world / "run", num_prompts=1, num_images=2,
           output_dir=tmp_path)
    assert "run" in (tmp_path / "evaluation.md").read_text()


@pytest.mark.parametrize("tool", ["kohya", "peft"])
def test_export_there_and_back(world, with_lora, tmp_path, tool):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    base = {"pretrained_model_name_or_path": world / "base"}
    if tool == "kohya" and (world / "base/transformer").is_dir():
        with pytest.raises(SystemExit, match="no names for a transformer: give --format diffusers"):
            dbcore("export", lora=world / "run", format=tool, output=there, **base)
        return
    there = there if tool == "kohya" else tmp_path / "there"
    dbcore("export", lora=world / "run", format=tool, output=there, **base)
    dbcore("export", lora=there, format="diffusers", output=back, **base)
    assert np.abs(stock(world / "base", back) - with_lora).max() <= 1


def test_merged_into_the_base_and_extracted_again(world, with_lora, tmp_path):
    base = {"pretrained_model_name_or_path": world / "base"}
    dbcore("export", lora=world / "run", format="merged", output=tmp_path / "whole", **base)
    assert np.abs(stock(tmp_path / "whole") - with_lora).max() <= 1
    again = tmp_path / "again.safetensors"
    dbcore("extract", tuned=tmp_path / "whole", rank=4, output=again, **base)
    assert np.abs(stock(world / "base", again) - with_lora).max() <= 1


def test_two_halves_merge_into_the_whole(world, with_lora, tmp_path):
    halves = ("--lora", world / "run", world / "run", "--weights", 0.5, 0.5)
    dbcore("merge", *halves, output=tmp_path / "sum.safetensors")
    assert np.abs(stock(world / "base", tmp_path / "sum.safetensors") - with_lora).max() <= 1


def test_doctor_knows_it(world, capsys):
    dbcore("doctor", pretrained_model_name_or_path=world / "base",
           instance_data_dir=world / "photos", instance_prompt=PROMPT,
           class_prompt="a photo of a dog")
    words = capsys.readouterr().out
    assert "'sks' is 1 token" in words
    assert "It fits" in words
    assert re.search(r"\| \S*T4\S* .*\| fits \|", words)
