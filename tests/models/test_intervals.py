"""Guidance and the LoRA act in their part of the steps, bit for bit as if they were on or off."""

import pytest
import torch
from runs import make_base

from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, lora_layers, set_scale


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A function: the latents after each of four steps of one image, with these options."""
    base = load_base(make_base(tmp_path_factory.mktemp("world") / "base"))
    numbers = torch.Generator().manual_seed(0)
    for parameter in add_lora(base.unet, 2, 2.0):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=numbers)

    def run(scale=1, guidance_scale=5.0, **options):
        found = []

        def watch(pipeline, step, t, inputs):
            found.append(inputs["latents"])
            return inputs

        set_scale(base, {"default": scale})
        base.generate(["a red dog"], [0], num_inference_steps=4, scheduler="ddim", callback=watch,
                      guidance_scale=guidance_scale, **options)
        assert not any(layer.disable_adapters for _, layer in lora_layers(base.unet))
        assert not any(p.requires_grad for p in base.unet.parameters())
        return found

    return run


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


def test_all_of_the_steps_is_as_without_an_interval(latents):
    whole = {"guidance_interval": (0, 1), "lora_interval": (0, 1)}
    assert all(same(latents(), latents(**whole)))


@pytest.mark.parametrize("interval", [(0.5, 1), (0.3, 0.8)])
def test_a_lora_is_off_until_its_interval_begins(interval, latents):
    assert same(latents(lora_interval=interval), latents(scale=0)) == [True, True, False, False]


def test_a_lora_is_off_after_its_interval(latents):
    found = latents(lora_interval=(0, 0.5))
    assert same(found, latents()) == [True, True, False, False]
    assert same(found, latents(scale=0)) == [False] * 4


def test_guidance_is_on_in_its_interval_alone(latents):
    assert same(latents(guidance_interval=(0, 0.5)), latents()) == [True, True, False, False]
    late = latents(guidance_interval=(0.5, 1))
    away = [float((a - b).abs().max()) for a, b in zip(late, latents(guidance_scale=1.0))]
    assert away[1] < 1e-4  # the prompt's own half, by way of the difference of both
    assert away[2] > 1e-2


def test_a_base_without_guidance_has_none_to_leave_out(latents):
    assert all(same(latents(guidance_scale=1.0, guidance_interval=(0.5, 1)),
                    latents(guidance_scale=1.0)))
