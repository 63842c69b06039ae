"""Weights in 8 bits: as near as rounding allows, a quarter of the memory, and a LoRA learns on them
as on others."""

import pytest
import torch
from pipelines import MAX_TOKENS, make_tiny_pipeline
from torch.nn.utils import parametrize

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines.memory import size
from dbcore.engines.prior import describe
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, lora_layers, lora_parameters, merge_lora
from dbcore.models.quantize import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


def layers():
    return [torch.nn.Linear(12, 5), torch.nn.Conv2d(3, 7, 3)]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_off_by_half_a_level_of_its_row_at_most(kind, dtype):
    layer = layers()[kind].to(dtype).requires_grad_(False)
    layer.weight[0] *= 100  # a loud row must not make the others coarse
    before = layer.weight.float().clone()
    quantize(layer)
    assert layer.weight.dtype == dtype
    assert layer.parametrizations.weight.original0.dtype == torch.int8
    largest = before.flatten(1).abs().amax(1).view(-1, *[1] * (before.ndim - 1))
    error = (layer.weight.float() - before).abs()
    assert (error <= largest * (0.5 / 127 + 1.5 * torch.finfo(dtype).eps)).all()
    assert error.max() > 0


def test_a_row_of_zeros_stays_one():
    layer = layers()[0].half().requires_grad_(False)
    layer.weight[1] = 0
    assert torch.equal(quantize(layer).weight[1], torch.zeros(12).half())


def test_a_weight_that_is_trained_is_refused():
    with pytest.raises(RuntimeError, match="gradient"):
        quantize(layers()[0])


def test_the_unet_alone_is_in_8_bits(folder):
    plain, light = load_base(folder), load_base(folder, low_vram=True)
    weights = [p for p in plain.unet.parameters() if p.ndim > 1]
    # 4 bytes a row: its scale
    assert size(plain.unet) - size(light.unet) == sum(3 * p.numel() - 4 * len(p) for p in weights)
    assert size(light.vae) == size(plain.vae)
    assert light.vae.use_slicing
    assert not plain.vae.use_slicing
    stored = [p for p in light.unet.parameters() if p.dtype == torch.int8 and p.ndim == 4]
    assert stored
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in stored)
    config = TrainConfig(class_prompt="a dog", resolution=32, prior_generation_precision="no")
    # so that one's class images are not taken for the other's
    assert describe(light, config) != describe(plain, config)


def test_a_prediction_is_near_that_of_the_whole_weights(folder):
    x_t, cond = torch.randn(2, 4, 16, 16), {"encoder_hidden_states": torch.randn(2, MAX_TOKENS, 16)}
    with torch.no_grad():
        plain, light = (load_base(folder, low_vram=low).predict(x_t, torch.tensor([5, 700]), cond)
                        for low in (False, True))
    assert 0 < (plain - light).norm() < 0.05 * plain.norm()


def test_a_lora_has_the_gradients_that_it_has_on_the_same_weights_unquantized(folder):
    light, same = (load_base(folder, low_vram=True) for _ in range(2))
    for layer in same.unet.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    found = []
    for base in (light, same):
        add_lora(base.unet, 2, 2, layers="all")
        for number, p in enumerate(lora_parameters(base.unet)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) / 8
        torch.manual_seed(0)
        cond = {"encoder_hidden_states": torch.randn(2, MAX_TOKENS, 16)}
        base.predict(torch.randn(2, 4, 16, 16), torch.tensor([5, 700]),
                     cond).square().mean().backward()
        found.append([p.grad for p in lora_parameters(base.unet)])
    assert any(g.abs().max() > 0 for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_lora_is_not_merged_into_weights_in_8_bits(folder):
    base = load_base(folder, low_vram=True)
    add_lora(base.unet, 2, 2)
    with pytest.raises(ConfigError, match="without low_vram"):
        merge_lora(base.unet)
    assert not any(layer.merged for _, layer in lora_layers(base.unet))


def test_pictures_are_drawn_one_at_a_time(folder):
    base, seen = load_base(folder, low_vram=True), []
    base.unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    base.generate(["a dog", "a cat"], [0, 1], num_inference_steps=1, guidance_scale=2.0,
                  resolution=32)
    assert seen == [2, 2]  # one picture is two rows: with the prompt and without
