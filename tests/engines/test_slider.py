"""A slider moves the prediction along the base's own difference of two prompts, both ways."""

import dataclasses

import pytest
import torch
from runs import make_base

import dbcore
from dbcore.__main__ import main
from dbcore.config import ConfigError, SliderConfig
from dbcore.datasets.dreambooth import to_pixels
from dbcore.engines.slider import train_slider
from dbcore.models.base import load_base
from dbcore.models.lora import load_lora, set_scale
from dbcore.toybox.reader import load_reader

WISH = {"prompt": "a photo of a dog", "positive": "red", "negative": "blue", "num_images": 2,
        "train_batch_size": 2, "max_train_steps": 60, "learning_rate": 2e-3, "lora_layers": "all",
        "slider_strength": 30.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base's folder, slider's file)."""
    world = tmp_path_factory.mktemp("world")
    base = make_base(world / "base")
    return base, train_slider(SliderConfig(pretrained_model_name_or_path=str(base),
                                           output_dir=str(world / "slider"), **WISH))


def test_the_two_ends_move_the_prediction_in_opposite_ways(world):
    folder, path = world
    base = load_base(folder)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    t = torch.tensor([200, 400, 600, 800])

    @torch.no_grad()
    def said(words=""):
        prompt = f"{WISH['prompt']} {words}".strip()
        return base.predict(latents, t, base.encode_text([prompt] * 4)).flatten()

    plain, wanted = said(), said("red") - said("blue")
    load_lora(base, path)
    moved = {}
    for scale in (-1.0, 1.0):
        set_scale(base, {"default": scale})
        moved[scale] = said() - plain

    def cosine(a, b):
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    assert cosine(moved[1.0], moved[-1.0]) < -0.5
    assert cosine(moved[1.0], wanted) > 0.3
    assert cosine(moved[-1.0], wanted) < -0.3


@pytest.mark.slow
def test_legs_grow_by_the_scale_on_the_shipped_base(tmp_path):
    """By the reader's own measure: the difference of its logits of long and of short legs."""
    prompt, path = "a photo of a dog", str(dbcore.TOY_BASE)
    train_slider(SliderConfig(
        pretrained_model_name_or_path=path, output_dir=str(tmp_path), prompt=prompt,
        positive="with long legs", negative="with short legs", max_train_steps=60, rank=4))
    base, reader = load_base(path), load_reader(dbcore.TOY_BASE)
    load_lora(base, tmp_path)
    length = []
    for scale in (-2, 0, 2):
        set_scale(base, {"default": scale})
        images = base.generate([prompt] * 6, range(6), num_inference_steps=12)
        with torch.no_grad():
            logits = reader(torch.stack([to_pixels(image) for image in images]))["legs"]
        length.append(float((logits[:, 1] - logits[:, 0]).mean()))
    assert length == sorted(length)
    assert length[2] - length[0] > 2


def test_the_same_seed_is_the_same_file(world, tmp_path):
    folder, _ = world
    wish = {**WISH, "max_train_steps": 2, "pretrained_model_name_or_path": str(folder)}
    files = [train_slider(SliderConfig(**wish, seed=seed, output_dir=str(tmp_path / str(k))))
             for k, seed in enumerate((0, 0, 1))]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["prompt", "positive", "negative",
                                  "pretrained_model_name_or_path"])
def test_what_is_missing_is_named(name):
    wish = {"pretrained_model_name_or_path": "base", **WISH}
    with pytest.raises(ConfigError, match=f"--{name} is missing"):
        SliderConfig(**{**wish, name: None}).check()


def test_one_end_alone_and_a_folder_that_is_taken_are_refused(world):
    _, path = world
    config = SliderConfig(pretrained_model_name_or_path="base", **WISH)
    with pytest.raises(ConfigError, match="the slider has two ends"):
        dataclasses.replace(config, negative="red").check()
    with pytest.raises(ConfigError, match="holds a LoRA already"):
        dataclasses.replace(config, output_dir=str(path.parent)).check()


def test_the_command_says_how_to_use_it(world, tmp_path, capsys):
    main(["slider", "--pretrained_model_name_or_path", str(world[0]), "--prompt", "a dog",
          "--positive", "red", "--negative", "blue", "--num_images", "1", "--max_train_steps", "1",
          "--output_dir", str(tmp_path / "out")])
    assert "--lora_scale, from -1 (blue) to 1 (red)" in capsys.readouterr().out
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
