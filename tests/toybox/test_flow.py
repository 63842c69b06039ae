"""The toy base of the flow family: from nothing to a folder, read by the family and by the stock
pipeline."""

import functools
import json
import types

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

import dbcore
from dbcore.config import TrainConfig
from dbcore.models.base import load_base
from dbcore.models.flux2 import Flux2Klein
from dbcore.models.process import Density
from dbcore.toybox import corpus, denoiser, flow, fresh, language
from dbcore.toybox.clip import load_clip, tokenize
from dbcore.toybox.ship import size_mib
from dbcore.toybox.words import MAX_LENGTH, make_chat_tokenizer
from dbcore.utils.seeding import normal

pytest.importorskip("numba")
PROMPTS, SEEDS = ["a photo of sks dog", "a red car"], [3, 4]
TRUE_SHAPES = [(module, name, dict(getattr(module, name))) for module, name in (
    (language, "SHAPE"), (flow, "LANGUAGE"), (flow, "SHAPE"))]
LANGUAGE = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4}
SHAPE = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
         "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}


def noise_for_renders(packed, size, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, (len(packed[-1]), size, size, 3), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def small():
    """Networks of a few thousand numbers, few scenes, and noise for renders."""
    from dbcore.toybox import tracer

    with pytest.MonkeyPatch.context() as patch:
        for shape, sizes in ((language.SHAPE, LANGUAGE), (flow.SHAPE, SHAPE)):
            for name, value in sizes.items():
                patch.setitem(shape, name, value)
        for module, name, value in (
                (corpus, "SHARD", 4), (denoiser, "SHARD", 4), (denoiser.Latents, "FIRST", 8),
                (fresh, "CHUNK", 4), (flow, "FIRST", 4),
                (flow, "some_renders", functools.partial(flow.some_renders, 4)),
                (tracer, "render_packed", noise_for_renders)):
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A base whose transformer's numbers are all random, and says something."""
    torch.manual_seed(0)
    tokenizer, transformer = make_chat_tokenizer(), flow.make_transformer(0)
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    autoencoder = flow.make_autoencoder(flow.toy_autoencoder(), flow.some_renders())
    return flow.save_base(tmp_path_factory.mktemp("flow") / "base", tokenizer,
                          language.make_language_model(tokenizer), autoencoder, transformer)


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.fixture
def run(small, tmp_path, capsys):
    """The command in a work folder; the lines of its log."""
    def run(*options):
        flow.main(["--device", "cpu", "--batch", "4", "--work_dir", str(tmp_path / "work"),
                   "--output_dir", str(tmp_path / "base"), "--until", "save", *options])
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    return run


def test_the_recipe_makes_a_base_of_the_family_and_goes_on_where_it_was(run, tmp_path):
    first = run("--steps", "2", "--language_steps", "1")
    assert [(line["stage"], line["step"]) for line in first] == [
        ("language", 1), ("transformer", 2)]
    made = load_base(tmp_path / "base")
    assert isinstance(made, Flux2Klein)
    assert made.generate(["a red dog"], [0], num_inference_steps=2)[0].size == (64, 64)
    assert "has seen 8 samples" in (tmp_path / "base" / "README.md").read_text()
    second = run("--steps", "3", "--language_steps", "1")
    assert [(line["stage"], line["step"]) for line in second] == [("transformer", 3)]
    after = load_base(tmp_path / "base").transformer.state_dict()
    assert any(not torch.equal(after[name], value)
               for name, value in made.transformer.state_dict().items())


def test_without_a_step_it_is_the_folder_of_random_weights_and_says_so(run, tmp_path):
    assert run("--steps", "0", "--language_steps", "0") == []
    assert "is noise" in (tmp_path / "base" / "README.md").read_text()
    assert load_base(tmp_path / "base").transformer.proj_out.weight.abs().max() == 0


def test_by_the_minute_it_learns_from_scenes_made_meanwhile(run, tmp_path):
    stages = run("--minutes", "0.01", "--weights_dir", str(tmp_path / "weights"))
    assert {line["stage"] for line in stages} == {"language", "transformer"}
    assert not list((tmp_path / "work").glob("corpus/*"))
    held = [torch.load(tmp_path / "work" / f"{stage}.pt", weights_only=True)
            for stage in ("language", "transformer")]
    assert held[0]["seconds"] >= 0.01 * 60 * flow.LANGUAGE_SHARE
    assert held[1]["seconds"] >= 0.01 * 60 * (1 - flow.LANGUAGE_SHARE)
    assert list((tmp_path / "weights").iterdir())


def test_the_base_at_its_true_size_is_within_its_limit(tmp_path, monkeypatch):
    for module, name, shape in TRUE_SHAPES:
        monkeypatch.setattr(module, name, shape)
    tokenizer = make_chat_tokenizer()
    autoencoder = flow.make_autoencoder(flow.toy_autoencoder(), torch.zeros(2, 3, 64, 64))
    flow.save_base(tmp_path / "base", tokenizer, language.make_language_model(tokenizer),
                   autoencoder, flow.make_transformer(0))
    assert 20 < size_mib(tmp_path / "base") <= flow.LIMIT_MIB


def test_images_are_those_of_the_stock_pipeline(base, folder):
    stock = Flux2KleinPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    latents = torch.cat([normal(base.latent_shape(64), seed, "picture") for seed in SEEDS])
    theirs = stock(prompt=PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=4.0,
                   height=64, width=64, max_sequence_length=MAX_LENGTH).images
    ours = base.generate(PROMPTS, SEEDS, num_inference_steps=2)
    ours, theirs = (np.stack([np.asarray(image, int) for image in images])
                    for images in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours[0] - ours[1]).max() > 20


def test_a_lora_is_trained_on_it_and_changes_its_images(base, folder, tmp_path):
    from dbcore.engines.trainer import train
    from dbcore.models.lora import load_lora

    lora = train(TrainConfig(
        pretrained_model_name_or_path=str(folder), instance_prompt=PROMPTS[0],
        instance_data_dir=str(dbcore.SUBJECTS / "dog"), output_dir=str(tmp_path / "run"),
        max_train_steps=2, report_to="none"))
    taught = load_base(folder)
    load_lora(taught, lora)
    assert taught.generate(PROMPTS[:1], [3], 2) != base.generate(PROMPTS[:1], [3], 2)


def test_captions_are_encoded_in_training_as_the_pipeline_encodes_prompts(base):
    texts = [*PROMPTS, ""]
    ids = tokenize(base.tokenizer, texts)
    with torch.no_grad():
        ours = language.encode_tokens(base.text_encoder, ids)
        theirs = base.encode_text(texts)["prompt_embeds"]
    assert ours.shape == (3, MAX_LENGTH, len(language.LAYERS) * LANGUAGE["hidden_size"])
    torch.testing.assert_close(ours, theirs)


def test_patches_have_mean_0_and_variance_1_and_decode_as_the_toy_autoencoder_does(small):
    toy, pixels = flow.toy_autoencoder(), flow.some_renders()
    net = flow.make_autoencoder(toy, pixels)
    with torch.no_grad():
        z = toy.encode(pixels).latent_dist.mean
        torch.testing.assert_close(net.decode(z).sample, toy.decode(z).sample)
    patches = Flux2Klein.patches(types.SimpleNamespace(
        patch_scale=Flux2Klein.patch_scale.fget(types.SimpleNamespace(vae=net))), z)
    assert patches.shape[1:] == (32, 8, 8)
    torch.testing.assert_close(patches.mean((0, 2, 3)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(patches.var((0, 2, 3)), torch.ones(32), atol=1e-2, rtol=0)


def test_it_is_trained_with_the_shift_that_it_generates_with(base):
    u = torch.linspace(0.1, 0.9, 9)
    trained_at = base.process.timestep(u, 64, Density())
    scheduler = base.pipeline().scheduler
    scheduler.set_timesteps(sigmas=u.flip(0).tolist(), mu=123.0)  # the pipeline's is not used
    torch.testing.assert_close(scheduler.sigmas[:-1].flip(0), trained_at)


class Few:
    """Four images, each of one colour, and a word for each."""

    batch = 16

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.autoencoder = types.SimpleNamespace(config=types.SimpleNamespace(scaling_factor=1.0))
        self.z = torch.randn(4, 8, 1, 1, generator=draw).expand(-1, -1, 16, 16)
        self.words = torch.randn(4, 1, 24, generator=draw)

    def inputs(self, step):
        draw = torch.Generator().manual_seed(step)
        u = (torch.arange(16) + torch.rand(16, generator=draw)) / 16
        which = torch.randint(4, (16,), generator=draw)
        return self.z[which], torch.randn(16, 8, 16, 16, generator=draw), u, which


def test_the_loss_falls_on_a_handful_of_images(folder, tmp_path, monkeypatch, capsys):
    base, data = load_base(folder), Few()
    base.vae.bn.running_mean.zero_()
    base.vae.bn.running_var.fill_(1)
    base.transformer.load_state_dict(flow.make_transformer(0).state_dict())  # predicts 0
    monkeypatch.setattr(flow, "encode_tokens", lambda model, which: data.words[which])
    flow.train_transformer(base, data, tmp_path, steps=60, lr=3e-2)
    losses = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.8  # 2 at the start: noise and latents have variance 1


def test_the_language_model_learns_which_word_comes_next(small, tmp_path, capsys):
    language.train_language_model(make_chat_tokenizer(), tmp_path, 0, steps=30, batch=4, lr=1e-2)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["loss"] < 5.5  # a guess among all tokens: 6.5
    assert line["right"] > 0.1


def test_captions_of_the_language_model_never_come_twice(small):
    told = [language.random_captions(0, step, 8) for step in (0, 1)]
    assert told[0] != told[1]
    assert told[0] == language.random_captions(0, 0, 8)


def test_the_gates_find_their_networks_in_it(base, folder):
    from dbcore.toybox import gates

    ours, theirs = load_clip(folder), load_clip(dbcore.TOY_BASE)
    torch.testing.assert_close(ours.embed_texts(PROMPTS), theirs.embed_texts(PROMPTS), atol=2e-3,
                               rtol=0)
    assert gates.load_reader(folder)
    assert gates.load_subject_encoder(folder)
    rng = np.random.default_rng(0)
    assert gates.autoencoder_gate(base, rng.integers(0, 256, (2, 64, 64, 3), np.uint8))
    assert gates.moved(base, ["a dog"], ["a dog"]) == 0
    assert gates.moved(base, ["a dog"], ["a red car"]) > 0
