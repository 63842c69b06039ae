"""FLUX.2 [klein]: the images and latents of the stock pipeline, its LoRA presets, its timesteps."""

import json

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from pipelines import make_flux2_miniature

from dbcore.config import ConfigError
from dbcore.models.base import load_base
from dbcore.models.lora import target_modules
from dbcore.utils.seeding import normal

PROMPTS, SEEDS = ["a photo of sks dog", "a red car"], [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_flux2_miniature(tmp_path_factory.mktemp("flux2"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.fixture(scope="module")
def stock(folder):
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_images_are_those_of_the_stock_pipeline(base, stock):
    latents = torch.cat([normal(base.latent_shape(32), seed, "picture") for seed in SEEDS])
    theirs = stock(prompt=PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=4.0,
                   height=32, width=32).images
    ours = base.generate(PROMPTS, SEEDS, num_inference_steps=2)
    # latents are scaled and scaled back once more, which may round a level the other way
    ours, theirs = (np.stack([np.asarray(image, int) for image in images])
                    for images in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 1


def test_latents_are_the_pipelines_and_decode_to_what_the_autoencoder_says(base, stock):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        theirs = stock._encode_vae_image(images, None)
        decoded = stock.vae.decode(stock.vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    mean, std = base.encode_images(images)
    assert mean.shape[1:] == base.latent_shape(32)
    assert std.abs().max() == 0
    torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base.decode(mean), decoded, rtol=0, atol=1e-5)


def test_an_oblong_training_image_is_told_its_places_as_the_pipeline_tells_them(base, stock,
                                                                              monkeypatch):
    seen, forward = {}, base.transformer.forward
    monkeypatch.setattr(base.transformer, "forward",
                        lambda **given: seen.update(given) or forward(**given))
    x_t = normal(base.latent_shape(32, 64), 0, "latents")
    assert x_t.shape[2] * 2 == x_t.shape[3]
    with torch.no_grad():
        made = base.predict(x_t, torch.tensor([0.5]), base.encode_text(PROMPTS[:1]))
    assert made.shape == x_t.shape
    assert torch.equal(seen["img_ids"], stock._prepare_latent_ids(x_t)[0])
    assert torch.equal(seen["hidden_states"], stock._pack_latents(x_t))


def preset(base, name):
    return target_modules(base.transformer, ",".join(base.lora_targets["transformer"][name]))


def test_presets_are_of_both_kinds_of_blocks_and_never_the_embedders(base):
    attention = preset(base, "attention")
    more = preset(base, "attention+ff")
    single = [name for name in attention if name.startswith("single_transformer_blocks.")]
    assert [name.rpartition("attn.")[2] for name in attention if name not in single] == [
        "to_q", "to_k", "to_v", "to_out.0"]
    assert len(single) == 2 * len(base.transformer.single_transformer_blocks)
    assert set(attention) < set(more)
    assert len(more) == 4 + 4 + 8
    assert all("transformer_blocks" in name for name in more)


def test_no_more_tokens_are_read_than_the_tokenizer_gives_or_the_pipeline_takes(folder):
    base = load_base(folder)
    assert base.token_limit("tokenizer") == 512
    base.tokenizer.model_max_length = 20
    assert base.encode_text(PROMPTS)["prompt_embeds"].shape[1] == 20


def test_larger_images_are_trained_with_more_noise(base):
    u = torch.tensor([0.2, 0.5, 0.8])
    few, many = base.process.timestep(u, 256), base.process.timestep(u, 4096)
    assert torch.all(few < many)
    assert torch.all(many < 1)
    torch.testing.assert_close(few[1], torch.tensor(0.5).sigmoid())  # mu = base_shift


def test_the_transformer_fits_in_8_bits(folder, base):
    x_t, t = torch.randn(2, *base.latent_shape(32)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        whole = base.predict(x_t, t, base.encode_text(PROMPTS))
        small = load_base(folder, low_vram=True).predict(x_t, t, base.encode_text(PROMPTS))
    assert 0 < (whole - small).norm() / whole.norm() < 0.05


def test_a_transformer_that_is_told_the_guidance_is_refused(folder, tmp_path):
    (tmp_path / "transformer").mkdir()
    config = json.loads((folder / "transformer/config.json").read_text())
    config["guidance_embeds"] = True
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(ConfigError, match=r"guidance.*klein"):
        load_base(tmp_path)
