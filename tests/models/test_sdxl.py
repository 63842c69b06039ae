"""Stable Diffusion XL: the stock pipeline's images, and what the UNet is told beside a prompt."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pipelines import make_sdxl_miniature

from dbcore.config import ConfigError
from dbcore.models.base import load_base
from dbcore.utils.seeding import normal

PROMPTS, SEEDS = ["a photo of sks dog", "a red car"], [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sdxl_miniature(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.mark.parametrize("negative", ["", "snow"])
def test_images_are_those_of_the_stock_pipeline(base, folder, negative):
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    latents = torch.cat([normal(base.latent_shape(32), seed, "picture") for seed in SEEDS])
    words = {"negative_prompt": [negative] * 2} if negative else {}  # none: zeros, no empty text
    theirs = stock(PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=5.0, height=32,
                   width=32, **words).images
    ours = base.generate(PROMPTS, SEEDS, num_inference_steps=2, negative_prompt=negative)
    # the memory's layout is another, by which a level may be rounded the other way
    ours, theirs = (np.stack([np.asarray(image, int) for image in images])
                    for images in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 1


def test_a_prompt_is_encoded_alike_alone_and_beside_others(base):
    together, alone = base.encode_text(["a dog", "", "a cat"]), base.encode_text(["a cat"])
    for name, rows in together.items():
        torch.testing.assert_close(rows[2:], alone[name], rtol=0, atol=1e-5)
        assert rows[1].abs().max() == 0 < rows[0].abs().max()


def test_size_and_crop_are_told_to_the_unet(base):
    x_t, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), base.encode_text(PROMPTS)
    whole, cropped = torch.tensor([[[32, 32, 0, 0, 32, 32]] * 2, [[32, 64, 0, 16, 32, 32]] * 2])
    with torch.no_grad():
        plain, same, other = (base.predict(x_t, t, cond, geometry)
                              for geometry in (None, whole, cropped))
    assert torch.equal(plain, same)
    assert (plain - other).abs().max() > 1e-5


def test_the_autoencoder_is_in_float32_unless_it_is_mended_for_half(folder, tmp_path):
    half = load_base(folder, dtype=torch.float16)
    assert (half.precision("vae"), half.precision("unet")) == (torch.float32, torch.float16)
    mended = make_sdxl_miniature(tmp_path)
    config = mended / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert load_base(mended, dtype=torch.float16).precision("vae") == torch.float16


def test_a_base_of_another_process_is_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text((folder / part / "config.json").read_text())
    index["scheduler"] = ["diffusers", "EDMDPMSolverMultistepScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"EDM.*stable-diffusion-xl-base-1.0"):
        load_base(tmp_path)
