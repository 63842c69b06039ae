"""The forecast against real networks: the same bytes, counted on shapes and on numbers."""

import re
from pathlib import Path

import pytest
import torch
from pipelines import MAX_TOKENS, make_flux2_shape, make_sdxl_shape, make_tiny_pipeline

from dbcore.config import OPTIMIZERS, TrainConfig
from dbcore.engines import advice, memory
from dbcore.engines.trained import PACKAGES, make_optimizer
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, lora_parameters

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


def config(folder, **more):
    return TrainConfig(pretrained_model_name_or_path=str(folder), mixed_precision="no",
                       prior_generation_precision="no", **more)


def phases(folder, **more):
    return {phase.name: phase for phase in memory.forecast(config(folder, **more)).phases}


def test_weights_are_those_of_the_networks_that_each_phase_holds(folder):
    base = load_base(folder)
    add_lora(base.unet, 4, 4)
    unet, vae, text = (memory.size(getattr(base, part)) for part in ("unet", "vae", "text_encoder"))
    found = phases(folder)
    assert found["steps"].weights == unet
    assert found["encoding photos"].weights == vae  # before there is a UNet
    assert found["validation and report"].weights == unet + vae
    assert phases(folder, train_text_encoder=True)["steps"].weights > unet + text
    assert phases(folder, cache_latents=False)["steps"].weights == unet + vae
    found = phases(folder, **PRIOR)
    assert found["class images"].weights == pytest.approx(unet + vae + text, rel=0.01)
    assert found["encoding photos"].weights == unet + vae  # left from drawing them


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_and_numbers_give_the_same_count(folder, checkpointing):
    base = load_base(folder)
    unet = base.unet
    add_lora(unet, 4, 4)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with memory.Live([unet]) as live:
        cond = {"encoder_hidden_states": torch.randn(2, MAX_TOKENS, 16)}
        out = base.predict(torch.randn(2, 4, 16, 16), torch.tensor([5, 7]), cond)
        out.square().mean().backward()
    found = memory.forecast(config(folder, train_batch_size=2,
                                   gradient_checkpointing=checkpointing), "cuda").phases
    (step,) = [phase for phase in found if phase.name == "steps"]
    gradients = sum(p.grad.numel() * 4 for p in lora_parameters(unet))
    assert step.activations > gradients
    assert step.activations == pytest.approx(live.peak, rel=0.05)


def test_steps_take_what_the_largest_bucket_takes(folder):
    square, wide, mixed = (phases(folder, resolution=32, aspect_ratio_buckets=buckets)
                           for buckets in (None, "32,64", "32,64;32,32;64,24"))
    for name in ("steps", "encoding photos"):
        assert mixed[name] == wide[name]
        assert mixed[name].activations > 1.4 * square[name].activations
    assert mixed["validation and report"] == square["validation and report"]
    (*_, last) = advice.savings(config(folder, resolution=256, train_batch_size=1,
                                       aspect_ratio_buckets="256,256"),
                                "cpu")
    assert last == {"resolution": 192, "aspect_ratio_buckets": "auto"}


def test_a_cpus_heap_has_gaps(folder):
    here, card = (memory.forecast(config(folder), device).phases for device in ("cpu", "cuda"))
    assert [phase.name for phase in here] == [phase.name for phase in card]
    assert all(a.activations == 2 * b.activations > 0 for a, b in zip(here, card))
    assert [phase.weights for phase in here] == [phase.weights for phase in card]


def test_a_gpus_kernels_have_work_space_beside_all_tensors(folder):
    here, card = (memory.forecast(config(folder), device) for device in ("cpu", "cuda"))
    assert card.allocated == card.largest.total + 0.2e9
    assert card.peak == card.allocated + 0.5e9
    assert here.peak == here.largest.total + 0.6e9


def test_prompts_are_encoded_before_there_is_a_denoiser(folder):
    text = memory.size(load_base(folder).text_encoder)
    assert phases(folder)["encoding prompts"].weights == text
    assert phases(folder, **PRIOR)["encoding prompts"].weights > 2 * text  # left from class images
    assert phases(folder, low_vram=True, **PRIOR)["encoding prompts"].weights == text


@pytest.mark.parametrize("rank", [4, 256], ids=["in float32", "in 8 bits"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_holds_what_the_forecast_says(name, rank, folder):
    """Counted in the real ones after two steps; Prodigy needs no copy of a matrix that begins at
    zero, as B does."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    parameters = add_lora(load_base(folder).unet, rank, rank)
    optimizer = make_optimizer(TrainConfig(optimizer=name), [{"params": parameters, "lr": 1e-4}])
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    real = sum(t.numel() * t.element_size() for state in optimizer.state.values()
               for key, t in state.items()
               # 8 bits' levels are shared by all
               if torch.is_tensor(t) and t.dim() and "map" not in key)
    found = phases(folder, optimizer=name, rank=rank)["steps"].optimizer
    assert real <= found * 1.04
    assert found <= real * (1.17 if name == "Prodigy" else 1.01)
    means = sum(p.numel() * p.element_size() for p in parameters)
    assert (phases(folder, optimizer=name, rank=rank, use_ema=True)["steps"].optimizer == found
            + means)


def test_options_move_the_forecast_the_way_they_move_a_run(folder):
    plain = phases(folder, train_batch_size=4)["steps"].activations
    assert phases(folder, train_batch_size=8)["steps"].activations == pytest.approx(2 * plain,
                                                                                    rel=0.1)
    assert phases(folder, train_batch_size=4,
                  gradient_checkpointing=True)["steps"].activations < 0.8 * plain
    assert phases(folder, train_batch_size=4,
                  **PRIOR)["steps"].activations == pytest.approx(2 * plain, rel=0.1)
    assert phases(folder, train_batch_size=4, resolution=64)["steps"].activations > 3 * plain
    assert phases(folder, train_batch_size=4, train_text_encoder=True)["steps"].activations > plain
    few, many = (phases(folder, sample_batch_size=n, **PRIOR)["class images"].activations
                 for n in (1, 8))
    assert many > 6 * few


def test_half_precision_halves_the_weights_but_the_autoencoder_stays_whole_in_fp16(folder):
    def weights(precision):
        made = advice.in_precision(TrainConfig(pretrained_model_name_or_path=str(folder)),
                                   precision)
        return {p.name: p.weights for p in memory.forecast(made, "cuda").phases}

    whole, half, brain = weights("no"), weights("fp16"), weights("bf16")
    assert half["steps"] < 0.6 * whole["steps"]
    assert half["encoding photos"] > brain["encoding photos"]


def test_low_vram_quantizes_the_unet_and_draws_one_picture_at_a_time(folder):
    base = load_base(folder, low_vram=True)
    vae = memory.size(base.vae)
    add_lora(base.unet, 4, 4)
    plain, low = phases(folder, gradient_checkpointing=True,
                        **PRIOR), phases(folder, low_vram=True, **PRIOR)
    assert low["steps"].weights == memory.size(base.unet)
    assert low["class images"].weights == memory.size(base.unet) + vae
    # read whole, then quantized
    assert low["loading"].weights == pytest.approx(plain["steps"].weights, rel=0.05)
    assert low["encoding photos"].weights == vae  # class images or not
    # no more is kept for the gradients than with whole weights, but for what one block's are made
    # into
    assert (low["steps"].activations < plain["steps"].activations + plain["steps"].weights
            - low["steps"].weights)
    few, many = (phases(folder, low_vram=True, sample_batch_size=n,
                        **PRIOR)["class images"].activations for n in (1, 8))
    assert few == many < plain["class images"].activations / 2


def test_nothing_of_the_base_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("dbcore.models.base.Family.read_network",
                        lambda *a: pytest.fail("weights were loaded"))
    memory.forecast(config(folder))


def test_advice_is_the_first_set_of_changes_that_fits(monkeypatch, folder):
    def pretend(config, device="cuda"):
        peak = (100 - 30 * config.gradient_checkpointing - 20 * (config.train_batch_size == 1)
                - 10 * config.low_vram)
        return memory.Forecast([memory.Phase("steps", peak, 0)], 0)

    monkeypatch.setattr(advice, "forecast", pretend)
    wish = config(folder, train_batch_size=2)
    assert advice.advise(wish, 100, "cpu") == {}
    assert advice.advise(wish, 75, "cpu") == {"gradient_checkpointing": True}
    assert advice.advise(wish, 55, "cpu") == {"gradient_checkpointing": True, "train_batch_size": 1,
                                              "gradient_accumulation_steps": 2}
    assert advice.advise(wish, 45, "cpu")["low_vram"] is True
    assert "resolution" not in advice.advise(wish, 45, "cpu")
    assert advice.advise(wish, 20, "cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make", "side"), [
    ("SDXL", make_sdxl_shape, 1024), ("SDXL", make_sdxl_shape, 768),
    ("FLUX.2 [klein] 4B", make_flux2_shape, 512),
])  # fmt: skip
def test_what_a_large_base_needs_of_a_t4_is_what_the_readme_says(name, make, side, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    row = rf"\| {re.escape(name)}, {side} x {side} \| (.+) GB \| (.+) GB \| (.+) GB \|"
    base = str(make(tmp_path))
    for number, more in zip(re.search(row, readme).groups(), (
            {}, {"gradient_checkpointing": True}, {"low_vram": True})):
        options = TrainConfig(pretrained_model_name_or_path=base, resolution=side, **more)
        found = memory.forecast(advice.in_precision(options, "fp16"), "cuda").peak
        assert found / 1e9 == pytest.approx(float(number), abs=0.06)
