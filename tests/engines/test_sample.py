"""No option of `dbcore generate` is dead, and no picture is lost or drawn with another base than
its LoRA's."""

import contextlib
import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import add_variant, make_base, make_hub

from dbcore.__main__ import main
from dbcore.config import ConfigError, GenerateConfig, TrainConfig, write_yaml
from dbcore.engines.sample import file_names, generate, generate_and_save
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, save_lora

LORA = {"checkpoint_dir": ["{world}/dog.safetensors"]}

# field: (changed value, what must differ, options of both). `pictures`: their pixels; `files`: the
# names in the working folder; `batches`: how many pictures the pipeline drew at a time.
EFFECTS = {
    "pretrained_model_name_or_path": ("{world}/other", "pictures", {}),
    "revision": ("second", "pictures", {"pretrained_model_name_or_path": "tiny/base"}),
    "variant": ("fp16", "pictures", {}),
    "checkpoint_dir": (["{world}/dog.safetensors"], "pictures", {}),
    "lora_scale": ([0.5], "pictures", LORA),
    "prompt": (["a blue car", "a red dog"], "pictures", {}),
    "negative_prompt": ("snow", "pictures", {}),
    "num_images": (3, "files", {}),
    "seed": (1, "pictures", {}),
    "num_inference_steps": (3, "pictures", {}),
    "guidance_scale": (2.0, "pictures", {}),
    "guidance_interval": ([0.5, 1], "pictures", {}),
    "lora_interval": ([0.5, 1], "pictures", LORA),
    "scheduler": ("euler", "pictures", {}),
    "resolution": (48, "pictures", {}),
    "batch_size": (1, "batches", {}),
    "mixed_precision": ("bf16", "pictures", {}),
    "low_vram": (True, "pictures", {}),
    "output_dir": ("elsewhere", "files", {}),
}  # fmt: skip


def make_lora(base, path, seed=0):
    """A LoRA of a base's UNet with numbers as training would leave them."""
    unet, numbers = load_base(base).unet, torch.Generator().manual_seed(seed)
    for parameter in add_lora(unet, 2, 2.0):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=numbers)
    return save_lora({"unet": unet}, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    make_base(world / "base")
    add_variant(world / "base", make_base(world / "other", seed=1))
    make_lora(world / "base", world / "dog.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        make_hub(world / "hub", patch, main=world / "base", second=world / "other")
        yield world


@pytest.fixture(scope="module")
def outcome(world, tmp_path_factory):
    """A function: draw with some options in a new working folder, and return what a user sees of
    it."""
    known = {}

    def run(**more):
        key = repr(sorted(more.items()))
        if key not in known:
            known[key] = watch(world, tmp_path_factory.mktemp("here"), more)
        return known[key]

    return run


def filled(value, world):
    if isinstance(value, list):
        return [filled(item, world) for item in value]
    return value.format(world=world) if isinstance(value, str) else value


def watch(world, here, more):
    options = {"pretrained_model_name_or_path": f"{world}/base",
               "prompt": ["a photo of sks dog", "a red dog"],
               "num_images": 2, **more}  # fmt: skip
    config = GenerateConfig(**{name: filled(value, world) for name, value in options.items()})
    facts, draw = SimpleNamespace(batches=[]), StableDiffusionPipeline.__call__

    def drawing(pipeline, *args, prompt_embeds, **named):
        facts.batches.append(len(prompt_embeds))
        return draw(pipeline, *args, prompt_embeds=prompt_embeds, **named)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(here)
        patch.setattr(StableDiffusionPipeline, "__call__", drawing)
        folder = (here / generate_and_save(config)).resolve()
    facts.files = {path.relative_to(here).as_posix() for path in here.rglob("*.png")}
    pictures = [Image.open(path) for path in sorted(folder.glob("*-seed*.png"))]
    facts.pictures = [(picture.size, picture.tobytes()) for picture in pictures]
    return facts


def test_every_field_is_in_the_table():
    assert list(EFFECTS) == [field.name for field in dataclasses.fields(GenerateConfig)]


@pytest.mark.parametrize("name", EFFECTS)
def test_changing_an_option_changes_something_to_see(name, outcome):
    value, what, both = EFFECTS[name]
    before, after = outcome(**both), outcome(**{**both, name: value})
    assert before.pictures
    assert getattr(before, what) != getattr(after, what)


def test_there_is_a_file_a_picture_and_a_grid(outcome):
    assert outcome().files == {
        "pictures/a-photo-of-sks-dog-seed0.png", "pictures/a-photo-of-sks-dog-seed1.png",
        "pictures/a-red-dog-seed0.png", "pictures/a-red-dog-seed1.png", "pictures/grid.png"}


# --- prompts as file names ------------------------------------------------------------------------


def test_prompts_that_would_share_a_file_name_do_not():
    long = "a photo of a red dog with white spots wearing a blue hat and standing "
    short = ["a dog?", "a dog!", "a dog 2", "собака", "?!", ".."]
    names = file_names([long + "in the snow", long + "on the beach", *short])
    assert len(set(names)) == len(names)
    assert names[2:] == ["a-dog", "a-dog-2", "a-dog-2-2", "собака", "picture", "picture-2"]
    assert all(len(name) < 70 and "/" not in name for name in names)


# --- LoRAs and their base -------------------------------------------------------------------------


def same(one, other):
    return [[a.tobytes() for a in row] for row in one] == [[b.tobytes() for b in row]
                                                           for row in other]


@pytest.mark.parametrize("inside",
                         ["", "checkpoint-2", "checkpoint-2/pytorch_lora_weights.safetensors"])
def test_a_runs_lora_is_drawn_with_its_own_base(inside, world, tmp_path):
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-2"):
        make_lora(world / "other", folder / "pytorch_lora_weights.safetensors")
    write_yaml(TrainConfig(pretrained_model_name_or_path=str(world / "other")), run / "config.yaml")
    wish = {"checkpoint_dir": str(run / inside), "prompt": "a red dog", "num_images": 1}
    given = generate(GenerateConfig(**wish, pretrained_model_name_or_path=str(world / "other")))
    assert same(generate(GenerateConfig(**wish)), given)


def test_a_lora_that_names_no_base_is_refused(world):
    with pytest.raises(ConfigError, match=r"dog.safetensors does not say which base it belongs to"):
        generate(GenerateConfig(checkpoint_dir=str(world / "dog.safetensors"), prompt="a red dog"))


OTHERS_CONFIGS = {"empty": "", "another tool's": "job: extension\nconfig: {}\n", "no yaml": "{[",
                  "a list": "- 1\n",
                  "no base": "rank: 4\n"}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS_CONFIGS)
def test_a_lora_beside_a_config_that_no_run_wrote(kind, world, tmp_path):
    path = make_lora(world / "base", tmp_path / "lora.safetensors")
    (tmp_path / "config.yaml").write_text(OTHERS_CONFIGS[kind])
    with pytest.raises(ConfigError, match=r"lora.safetensors does not say which base it belongs"):
        generate(GenerateConfig(checkpoint_dir=str(path), prompt="a red dog"))


def test_each_lora_has_its_own_scale(world, tmp_path):
    paths = [str(world / "dog.safetensors"),
             str(make_lora(world / "base", tmp_path / "b.safetensors", seed=1))]
    wish = {"pretrained_model_name_or_path": str(world / "base"), "prompt": "a red dog",
            "num_images": 1}

    def draw(**more):
        return generate(GenerateConfig(**wish, **more))

    assert same(draw(checkpoint_dir=paths, lora_scale=[0, 0]), draw())
    assert same(draw(checkpoint_dir=paths, lora_scale=[0, 1]), draw(checkpoint_dir=paths[1:]))
    both = [draw(checkpoint_dir=paths, lora_scale=scale) for scale in ([1, 1], [1, 0.5], [1])]
    assert same(both[0], both[2])
    assert not same(both[0], both[1])


@pytest.mark.parametrize("interval", [[0.5], [0.5, 0.5], [0.8, 0.2], [-0.1, 1], [0, 1.5]])
def test_an_interval_that_is_no_part_of_the_steps_is_refused(interval, world):
    for name in ("guidance_interval", "lora_interval"):
        with pytest.raises(ConfigError, match=f"--{name} .*: give two fractions of the steps"):
            generate(GenerateConfig(pretrained_model_name_or_path=str(world / "base"),
                                    prompt="a red dog", **{name: interval}))


def test_the_command_says_where_its_pictures_are(world, tmp_path, capsys):
    main(["generate", "--pretrained_model_name_or_path", str(world / "base"), "--lora",
          str(world / "dog.safetensors"),
          "--prompt", "a red dog", "--num_images", "1", "--output_dir", str(tmp_path / "out")])
    assert f"1 images and a grid are in {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "a-red-dog-seed0.png").is_file()


# --- nothing is lost ------------------------------------------------------------------------------


def test_another_scale_leaves_the_pictures_that_are_there(world, tmp_path, capsys):
    wish = {"pretrained_model_name_or_path": f"{world}/base",
            "checkpoint_dir": [f"{world}/dog.safetensors"],
            "prompt": "a red dog", "num_images": 1, "output_dir": tmp_path}  # fmt: skip
    generate_and_save(GenerateConfig(**wish))
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    generate_and_save(GenerateConfig(**wish))  # the same again is the same files
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert len(first) == 2
    generate_and_save(GenerateConfig(**wish, lora_scale=0.5))
    assert {path: path.read_bytes() for path in first} == first
    assert {path.name for path in tmp_path.iterdir()} == {
        "a-red-dog-seed0.png", "grid.png", "a-red-dog-seed0-2.png", "grid-2.png"}
    assert "end in -2" in capsys.readouterr().out
