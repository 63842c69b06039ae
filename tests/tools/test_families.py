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
from safetensors.torch import load_file

from dbcore.__main__ import main
from dbcore.config import GenerateConfig
from dbcore.engines import evaluate
from dbcore.engines.sample import add_loras, encode_ahead, frozen_base
from dbcore.models.base import Family, load_base, resolve
from dbcore.models.embeddings import EMBEDS_NAME, read_tokens
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


def stock_pipeline(base, lora=None):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        tell_tokens(pipeline, lora.parent)
    return pipeline


def stock(base, lora=None, prompt=PROMPT):
    """The pixels that a stock pipeline makes of the noise that `generate` begins with."""
    pipeline = stock_pipeline(base, lora)
    ours = load_base(base)
    shape, side = ours.latent_shape(ours.resolution), ours.resolution
    noise = torch.cat([normal(shape, seed, "picture") for seed in SEEDS])
    return pixels(pipeline(
        prompt=[prompt] * len(SEEDS), latents=noise, num_inference_steps=2, height=side, width=side,
        guidance_scale=ours.settings["guidance_scale"],
        generator=[generator(seed, "picture sampler") for seed in SEEDS]).images)  # fmt: skip


def tell_tokens(pipeline, folder):
    """As the model card says, where there are new tokens."""
    if tokens := read_tokens(folder):
        lines = tokens.loading().replace(EMBEDS_NAME, f"{folder}/{EMBEDS_NAME}")
        exec(lines, {"pipeline": pipeline})  # noqa: S102 - our own, as a user would run them


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


@pytest.fixture(scope="module")
def with_tokens(world):
    """A run of new tokens beside its LoRA; skipped where the family has none."""
    if (world / "base/transformer").is_dir():
        pytest.skip("the family is taught no new tokens")
    return train(world, world / "tokens", train_text_encoder_ti=True, token_abstraction="sks",
                 initializer_concept="dog")


def test_a_stock_pipeline_reads_new_tokens(world, with_tokens, tmp_path):
    spelt = "a photo of <s0><s1> dog"
    pipeline = stock_pipeline(world / "base", with_tokens / LORA)
    theirs, plain = (pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
                     for prompt in (spelt, PROMPT))
    images = stock(world / "base", with_tokens / LORA, spelt)
    assert np.abs(generate(with_tokens, tmp_path) - images).max() <= 1
    for low_vram in (False, True):
        config = GenerateConfig(str(world / "base"), checkpoint_dir=[str(with_tokens)],
                                low_vram=low_vram)
        base = frozen_base(resolve(config))
        encode = encode_ahead(base, config)
        add_loras(base, config)
        ours = next(iter((encode or base.encode_text)([PROMPT]).values()))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert (plain - theirs).abs().max() > 0.1


def test_new_tokens_are_exported_and_not_merged(world, with_tokens, tmp_path, capsys):
    base = {"pretrained_model_name_or_path": world / "base"}
    dbcore("export", lora=with_tokens, format="merged", output=tmp_path / "whole", **base)
    there = tmp_path / "there.safetensors"
    dbcore("export", lora=with_tokens, format="kohya", output=there, **base)
    dbcore("export", "--overwrite", lora=there, format="kohya", output=there, **base)
    assert "write there_emb in place of sks" in capsys.readouterr().out
    dbcore("export", lora=there, format="peft", output=tmp_path / "peft", **base)
    rows = [load_file(folder / EMBEDS_NAME) for folder in (with_tokens, tmp_path / "peft")]
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])
    told = stock_pipeline(world / "base", with_tokens / LORA).text_encoder
    whole = stock_pipeline(tmp_path / "whole").text_encoder
    assert torch.equal(whole.get_input_embeddings().weight[-2:],
                       told.get_input_embeddings().weight[-2:])
    with pytest.raises(SystemExit, match="has new tokens in learned_embeds"):
        dbcore("merge", "--lora", world / "run", with_tokens, output=tmp_path / "sum.safetensors")
    with pytest.raises(SystemExit, match=r"has new tokens .*already"):
        train(world, tmp_path / "again", train_text_encoder_ti=True, token_abstraction="sks",
              pretrained_model_name_or_path=tmp_path / "whole")


def test_a_family_without_new_tokens_says_so(world, tmp_path):
    if (world / "base/transformer").is_dir():
        with pytest.raises(SystemExit, match="--train_text_encoder_ti: this base's text encoder"):
            train(world, tmp_path / "run", train_text_encoder_ti=True, token_abstraction="sks")


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
