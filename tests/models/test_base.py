"""The frozen base behind its few methods, and what `auto` becomes."""

import dataclasses
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import make_tiny_pipeline
from runs import add_variant, make_base, make_hub, make_photos
from safetensors.torch import load_file, save_file

from dbcore.config import ConfigError, GenerateConfig, TrainConfig
from dbcore.engines import trainer
from dbcore.models.base import (
    Family,
    best_precision,
    checkpoint_gradients,
    leave_file,
    load_base,
    resolve,
    without_bf16,
)
from dbcore.models.lora import add_lora
from dbcore.models.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


def away(one, other):
    """Largest difference of two pictures in grey levels."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["auto", "ddim", "euler_a"])
def test_picture_k_depends_on_its_own_pair_alone(base, scheduler):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": scheduler}
    prompts, seeds = ["a red dog", "a blue car", "a red dog", "a red dog"], [1, 2, 2, 1]
    together = base.generate(prompts, seeds, **options)
    (alone,) = base.generate(prompts[2:3], seeds[2:3], **options)
    by_two = base.generate(prompts, seeds, batch_size=2, **options)
    assert away(together[2], alone) <= 1
    assert all(away(a, b) <= 1 for a, b in zip(together, by_two))
    assert away(together[0], together[3]) <= 1  # the same pair, the same picture
    assert away(together[0], together[2]) > 10  # another seed


def test_the_prompt_and_the_guidance_are_heard(base):
    def draw(prompt, **more):
        return base.generate([prompt], [0], num_inference_steps=3, **more)[0]

    red = draw("a red dog", guidance_scale=7.0)
    assert away(red, draw("a blue car", guidance_scale=7.0)) > 1
    assert away(red, draw("a red dog", guidance_scale=1.0)) > 1
    assert away(red, draw("a red dog", guidance_scale=7.0, negative_prompt="snow")) > 1


def test_drawing_leaves_torchs_random_numbers_and_the_modules_mode_alone(base):
    base.unet.train()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    base.generate(["a dog"], [0], num_inference_steps=1)
    assert base.unet.training
    assert torch.equal(torch.rand(3), wanted)
    base.unet.eval()


def test_pictures_are_as_large_as_asked(base):
    assert base.generate(["a dog"], [0], num_inference_steps=1)[0].size == (32, 32)
    assert base.generate(["a dog"], [0], num_inference_steps=1, resolution=48)[0].size == (48, 48)


@pytest.mark.parametrize(("prompts", "seeds"),
                         [(["a dog", "a cat"], [0]), (["a dog"], [0, 1]), ("a dog", [0])])
def test_a_prompt_without_a_seed_is_refused(base, prompts, seeds):
    with pytest.raises(ConfigError, match="one seed for each prompt"):
        base.generate(prompts, seeds, num_inference_steps=1)


def test_more_denoising_steps_than_timesteps_are_refused(base):
    with pytest.raises(ConfigError, match="--num_inference_steps 1001: this base was trained "
                       "with 1000 timesteps"):
        base.generate(["a dog"], [0], num_inference_steps=1001)


@pytest.mark.parametrize(("component", "file"), [
    ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model")])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_base_with_weights_that_are_not_finite_is_refused_by_their_name(component, file, number,
                                                                          tmp_path):
    """Its images would be black, and its losses no numbers."""
    path = make_tiny_pipeline(tmp_path) / component / f"{file}.safetensors"
    weights = load_file(path)
    name = max(weights)
    weights[name].view(-1)[-1] = number
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{re.escape(name)} of its {component} has numbers "
                       "that are not finite"):
        load_base(tmp_path).generate(["a dog"], [0], num_inference_steps=1)


def test_images_that_are_not_finite_are_refused_and_not_black(base, monkeypatch):
    monkeypatch.setattr(base, "decode", lambda latents: torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(ConfigError,
                       match=r"not finite numbers.*float32 has overflowed.*smaller --lora_scale"):
        base.generate(["a dog"], [0], num_inference_steps=1)


def test_the_recommended_settings_are_used(tmp_path):
    folder = make_tiny_pipeline(tmp_path)
    wished = {"num_inference_steps": 2, "guidance_scale": 6.0}
    (folder / "recommended.json").write_text(json.dumps(wished))
    base, counted = load_base(folder), []
    by_itself = base.generate(["a dog"], [0],
                              callback=lambda pipe, step, t, more: counted.append(step)
                              or more)
    assert counted == [0, 1]
    assert away(by_itself[0], base.generate(["a dog"], [0], **wished)[0]) == 0
    assert away(by_itself[0], base.generate(["a dog"], [0], guidance_scale=1.0)[0]) > 1


def test_the_recommended_sampler_is_used_unless_another_is_asked_for(folder, tmp_path):
    assert load_base(folder).sampler() == load_base(folder).index["scheduler"][1]
    base = load_base(make_tiny_pipeline(tmp_path))
    own = base.generate(["a dog"], [0], num_inference_steps=4)[0]
    (tmp_path / "recommended.json").write_text(json.dumps({"scheduler": "euler"}))
    base = load_base(tmp_path)
    assert base.sampler() == type(base.pipeline().scheduler).__name__ == "EulerDiscreteScheduler"
    assert base.sampler("ddim") == "DDIMScheduler"
    assert away(base.generate(["a dog"], [0], num_inference_steps=4)[0], own) > 0
    (tmp_path / "recommended.json").write_text(json.dumps({"scheduler": "fastest"}))
    with pytest.raises(ConfigError, match="fastest"):
        load_base(tmp_path).sampler()


# --- encoding, noise and targets ------------------------------------------------------------------


def test_pictures_become_latents_and_come_back_in_range(base):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = base.encode_images(pixels)
    assert mean.shape == std.shape == (2, *base.latent_shape(32))
    assert (std > 0).all()
    posterior = base.vae.encode(pixels).latent_dist
    assert torch.allclose(mean, posterior.mean * base.vae.config.scaling_factor)
    back = base.decode(mean)
    assert back.shape == pixels.shape
    assert back.abs().max() <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_base_was_trained_to_say(kind, tmp_path):
    base = load_base(make_tiny_pipeline(tmp_path, kind))
    x0, noise, t = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), torch.tensor([0, 400, 999])
    abar = base.noise_scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    process = base.process
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    assert torch.allclose(process.corrupt(x0, noise, t), x_t, atol=1e-5)
    wanted = {"epsilon": noise, "sample": x0,
              "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x0}[kind]
    assert torch.allclose(process.target(x0, noise, t), wanted, atol=1e-5)
    assert torch.allclose(process.snr(t), (abar / (1 - abar)).flatten())


def test_everything_is_frozen(base):
    assert all(not p.requires_grad for part in (base.unet, base.vae, base.text_encoder)
               for p in part.parameters())
    assert not any(part.training for part in (base.unet, base.vae, base.text_encoder))


# --- fingerprint ----------------------------------------------------------------------------------


def edit_weights(file, change):
    save_file(change(load_file(file)), file)


def test_another_base_has_another_fingerprint(base, folder, tmp_path):
    assert load_base(folder).fingerprint() == base.fingerprint()
    other = make_tiny_pipeline(tmp_path)
    edit_weights(other / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: {
        name: tensor + (name == "decoder.conv_out.bias") * 1e-3
        for name, tensor in tensors.items()})
    assert load_base(other).fingerprint() != base.fingerprint()


def test_a_fingerprint_depends_on_numbers_and_not_on_names_or_places(base, folder, tmp_path):
    """As a base that another version of transformers has saved: other names, and one tensor of
    integers more."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_weights(copy / "text_encoder" / "model.safetensors", lambda tensors: {
        **{f"text_model.{name}": tensor for name, tensor in tensors.items()},
        "position_ids": torch.arange(16)})
    assert load_base(copy).fingerprint() == base.fingerprint()


def test_a_fingerprint_is_that_of_the_pipeline_alone(base, folder, tmp_path):
    """A metric encoder that is trained anew leaves the LoRAs of its base as they are."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(copy / "vae", copy / "reader")
    assert load_base(copy).fingerprint() == base.fingerprint()


def test_a_fingerprint_is_that_of_the_variant_and_the_revision(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base.name, tmp_path / "base")
    other = make_base(tmp_path / "other", seed=1)
    add_variant(folder, other)
    assert load_base(folder).fingerprint() == base.fingerprint()
    assert load_base(folder, variant="fp16").fingerprint() == load_base(other).fingerprint()
    make_hub(tmp_path / "hub", monkeypatch, main=folder, second=other)
    assert load_base("tiny/base").fingerprint() == base.fingerprint()
    assert load_base("tiny/base", "second").fingerprint() == load_base(other).fingerprint()


def test_a_fingerprint_loads_no_network(folder, monkeypatch):
    monkeypatch.setattr(Family, "load_network", lambda *_: pytest.fail("a network was loaded"))
    assert load_base(folder).fingerprint()


def test_what_is_released_comes_back_as_it_was(folder):
    base = load_base(folder)
    add_lora(base.unet, 2, 2.0)
    base.release("unet")
    assert not any("lora" in name for name, _ in base.unet.named_parameters())


def test_no_weight_keeps_the_file_that_it_came_from_in_memory(folder):
    base = load_base(folder)
    for weight in (*base.unet.parameters(), *base.vae.parameters(),
                   *base.text_encoder.parameters()):
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last)


def test_on_another_device_only_a_weight_in_another_layout_is_copied():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(4, 4)).to("meta")
    before = [weight.untyped_storage()._cdata for weight in module.parameters()]
    leave_file(module, torch.channels_last)
    after = [weight.untyped_storage()._cdata for weight in module.parameters()]
    assert [one == other for one, other in zip(before, after)] == [False, True, True, True]
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)


# --- auto -----------------------------------------------------------------------------------------


def test_auto_without_a_recommendation(folder):
    config = resolve(TrainConfig(pretrained_model_name_or_path=str(folder),
                                 train_text_encoder=True),
                     "cpu")
    assert (config.rank, config.learning_rate, config.lora_layers) == (4, 2e-4, "attention")
    assert config.train_batch_size == 1
    assert (config.lora_alpha, config.text_encoder_rank, config.text_encoder_lr) == (4.0, 4, 2e-5)
    assert (config.resolution, config.mixed_precision,
            config.prior_generation_precision) == (32, "no", "no")
    drawn = resolve(GenerateConfig(pretrained_model_name_or_path=str(folder)), "cpu")
    assert (drawn.num_inference_steps, drawn.guidance_scale, drawn.resolution) == (25, 7.5, 32)


def test_auto_follows_the_bases_recommendation_and_what_was_given(tmp_path):
    folder = make_tiny_pipeline(tmp_path)
    wished = {"rank": 16, "learning_rate": 1e-3, "lora_layers": "attention+ff",
              "train_batch_size": 4, "resolution": 64,
              "guidance_scale": 3.0}  # fmt: skip
    (folder / "recommended.json").write_text(json.dumps(wished))
    config = resolve(TrainConfig(pretrained_model_name_or_path=str(folder),
                                 train_text_encoder=True),
                     "cpu")
    assert {name: getattr(config, name) for name in wished if name != "guidance_scale"} == {
        name: value for name, value in wished.items() if name != "guidance_scale"}
    assert (config.lora_alpha, config.text_encoder_lr) == (16.0, 1e-4)
    assert resolve(GenerateConfig(pretrained_model_name_or_path=str(folder))).guidance_scale == 3.0
    given = resolve(TrainConfig(pretrained_model_name_or_path=str(folder), rank=8, lora_alpha=2,
                                resolution=32,
                                learning_rate=5e-4, mixed_precision="bf16"), "cpu")  # fmt: skip
    assert (given.rank, given.lora_alpha, given.resolution,
            given.learning_rate) == (8, 2.0, 32, 5e-4)
    assert given.mixed_precision == "bf16"


@pytest.mark.parametrize("options",
                         [{}, {"train_text_encoder": True, "train_text_encoder_frac": 0.5}])
def test_a_settled_config_passes_its_own_check(folder, options):
    """It is what a run writes into config.yaml, and --config has to take it."""
    asked = TrainConfig(pretrained_model_name_or_path=str(folder), instance_data_dir="photos",
                        instance_prompt="a photo of sks dog", **options)  # fmt: skip
    resolved = resolve(asked, "cpu")
    resolved.check()
    assert resolve(resolved, "cpu") == resolved


def test_prodigy_finds_its_rate_itself(folder):
    assert resolve(TrainConfig(pretrained_model_name_or_path=str(folder),
                               optimizer="Prodigy")).learning_rate == 1.0


@pytest.mark.parametrize(("option", "factor"),
                         [("train_text_encoder", 0.1), ("train_text_encoder_ti", 10)])
def test_new_tokens_learn_fast_a_text_encoder_slowly_and_both_at_prodigys_one_rate(option, factor,
                                                                                   folder):
    wish = TrainConfig(pretrained_model_name_or_path=str(folder), **{option: True})
    assert resolve(wish).text_encoder_lr == pytest.approx(2e-4 * factor)
    assert resolve(dataclasses.replace(wish, optimizer="Prodigy")).text_encoder_lr == 1.0
    assert resolve(dataclasses.replace(wish, text_encoder_lr=1e-5)).text_encoder_lr == 1e-5


def test_processors_and_macs_train_in_full_precision():
    assert best_precision("cpu") == best_precision("mps") == "no"


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_trains_in_the_half_precision_that_it_has(has, chosen, folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has)
    assert resolve(TrainConfig(pretrained_model_name_or_path=str(folder)),
                   "cuda").mixed_precision == chosen


def test_half_precision_asked_of_a_processor_is_whole_and_said(folder, capsys):
    wish = TrainConfig(pretrained_model_name_or_path=str(folder), mixed_precision="fp16",
                       prior_generation_precision="fp16")
    resolved = resolve(wish, "cpu")
    assert resolved.mixed_precision == resolved.prior_generation_precision == "no"
    assert "--mixed_precision fp16 needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_bf16_asked_of_a_gpu_without_it_is_fp16_and_said(has, chosen, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has)
    wish = TrainConfig(mixed_precision="bf16", prior_generation_precision="no")
    found = without_bf16(wish, "cuda")
    assert (found.mixed_precision, found.prior_generation_precision) == (chosen, "no")
    said = capsys.readouterr().out
    assert ("--mixed_precision bf16: this GPU has no arithmetic in it" in said) is not has
    assert without_bf16(wish, "cpu") == wish  # slow there, and right
    assert without_bf16(GenerateConfig(mixed_precision="bf16"), "cuda").mixed_precision == chosen


def test_a_run_asks_the_card_that_it_is_on_and_a_forecast_for_another_does_not(
        folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    wish = TrainConfig(pretrained_model_name_or_path=str(folder), mixed_precision="bf16",
                       instance_data_dir=str(make_photos(tmp_path)), instance_prompt="a dog")
    assert resolve(wish, "cuda").mixed_precision == "bf16"
    there = SimpleNamespace(device=torch.device("cuda"), print=print)
    monkeypatch.setattr(trainer, "make_accelerator", lambda config: there)
    assert trainer.check(wish)[0].mixed_precision == "fp16"


@pytest.mark.parametrize(("side", "slices"), [(256, False), (512, True)])
def test_large_images_are_decoded_one_after_the_other(side, slices, folder, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "native_resolution", lambda base: side)
    assert load_base(folder).vae.use_slicing == slices


def test_gradients_are_checkpointed_in_either_librarys_words(folder):
    base = load_base(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for network in (base.unet, base.text_encoder):
            checkpoint_gradients(network)
            assert any(getattr(part, "gradient_checkpointing", False) for part in network.modules())


# --- bases that are not there ---------------------------------------------------------------------


def test_a_base_that_has_moved_is_named(monkeypatch):
    def gone(*args, **kwargs):
        raise OSError("404")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", gone)
    with pytest.raises(ConfigError,
                       match="has moved to stable-diffusion-v1-5/stable-diffusion-v1-5"):
        load_base("runwayml/stable-diffusion-v1-5")
    with pytest.raises(ConfigError,
                       match="--pretrained_model_name_or_path my/own: no base found there"):
        load_base("my/own")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no base found there"):
        load_base(tmp_path)


def test_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ConfigError, match="FluxPipeline: supported are StableDiffusionPipeline"):
        load_base(tmp_path)


def edit_json(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(("file", "entries", "words"), [
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"},
     "is made for inpainting"),
    ("unet/config.json", {"in_channels": 9},
     "takes 9 channels and latents have 4. It is made for inpainting"),
])  # fmt: skip
def test_an_inpainting_base_is_refused_with_the_reason(file, entries, words, tmp_path):
    folder = make_tiny_pipeline(tmp_path)
    edit_json(folder / file, **entries)
    with pytest.raises(ConfigError, match=words):
        load_base(folder)


def test_auto_buckets_are_those_of_diffusers_in_multiples_that_the_base_can(folder):
    training_utils = pytest.importorskip("diffusers.training_utils")
    config = TrainConfig(pretrained_model_name_or_path=str(folder), resolution=512,
                         aspect_ratio_buckets="auto")
    ladder = getattr(training_utils, "generate_aspect_ratio_buckets", None)
    if ladder is None:
        pytest.skip("this diffusers has none")
    assert set(resolve(config).buckets) == set(ladder(512, 8))
    small = resolve(dataclasses.replace(config, resolution=8)).buckets
    assert min(side for bucket in small for side in bucket) == 8
    assert len(small) == len(set(small))


def test_buckets_that_the_base_cannot_draw_are_refused_with_those_that_it_can(folder):
    config = TrainConfig(pretrained_model_name_or_path=str(folder),
                         aspect_ratio_buckets="64,32;100,32")
    with pytest.raises(ConfigError, match=r"--aspect_ratio_buckets 100: this base's images have "
                       "sides that are multiples of 8; give 96 or 104"):
        resolve(config)


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig])
@pytest.mark.parametrize(("resolution", "near"),
                         [(100, "96 or 104"), (44, "40 or 48"), (11, "8 or 16")])
def test_a_resolution_that_cannot_be_drawn_is_refused_with_those_that_can(cls, resolution, near,
                                                                          folder):
    with pytest.raises(ConfigError,
                       match=f"--resolution {resolution}: .* multiples of 8; give {near}"):
        resolve(cls(pretrained_model_name_or_path=str(folder), resolution=resolution), "cpu")


def test_a_base_with_a_part_missing_says_which(tmp_path):
    folder = make_tiny_pipeline(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="its unet cannot be loaded"):
        load_base(folder).unet  # noqa: B018 - loaded when touched
