"""T-LoRA: each sample has the ranks of its own timestep, in training and in a pipeline."""

from fractions import Fraction

import pytest
import torch
from pipelines import make_flux2_miniature, make_tiny_pipeline
from runs import leave_out_report, make_options

from dbcore.__main__ import main
from dbcore.config import ConfigError, GenerateConfig, TrainConfig
from dbcore.engines.sample import generate
from dbcore.engines.trainer import train
from dbcore.models.adapter import Adapter
from dbcore.models.base import load_base
from dbcore.models.lora import (
    adapters_off,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    read_lora,
    remove_lora,
)
from dbcore.models.lora_files import read_adapter, save_diffusers
from dbcore.models.process import Flow
from dbcore.models.tlora import active_ranks, mask_ranks

FAMILIES = {"sd": make_tiny_pipeline, "flux2": make_flux2_miniature}
RANK = 4


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_the_ranks_are_the_papers(rank):
    found = active_ranks(torch.arange(1000) / 1000, rank, 1.0).tolist()
    assert found == [Fraction(1000 - t, 1000) * (rank - 1) // 1 + 1 for t in range(1000)]
    assert active_ranks(torch.tensor([0.0, 1.0]), rank, 3.0).tolist() == [rank, 1]


def with_lora(base, layers):
    """A LoRA with no zeros in it on the denoiser; the pairs (A, B)."""
    add_lora(base.denoiser, RANK, RANK, layers, presets=base.lora_targets[
        base.roles["denoiser"][0]])
    numbers = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(base.denoiser):
        up = layer.lora_B["default"].weight
        up.data = torch.randn(up.shape, generator=numbers) * 0.1
    return [layer.lora_A["default"].weight for _, layer in lora_layers(base.denoiser)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_has_the_ranks_of_its_timestep(family, tmp_path):
    base = load_base(FAMILIES[family](tmp_path / "base"))
    downs = with_lora(base, "all")
    t = torch.tensor([0.05, 0.4, 0.99])
    t = t if isinstance(base.process, Flow) else (t * 1000).long()
    shape = base.latent_shape(32)
    x_t = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    cond = base.encode_text(["a", "a red car", "sks dog"])
    cut = [down.clone() for down in downs]
    by_hand = []
    for row, count in enumerate([3, 2, 1]):
        for down, whole in zip(downs, cut):
            down.copy_(whole)
            down[count:] = 0
        by_hand.append(base.predict(x_t, t, cond)[row])
    for down, whole in zip(downs, cut):
        down.copy_(whole)
    plain = base.predict(x_t, t, cond)
    mask_ranks(base, 1.0)
    masked = base.predict(x_t, t, cond)
    torch.testing.assert_close(masked, torch.stack(by_hand), rtol=0, atol=1e-5)
    assert (plain - masked).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_compiled_blocks_have_the_ranks_of_each_call_and_none_where_they_are_off(tmp_path):
    base = load_base(make_tiny_pipeline(tmp_path / "base"))
    with_lora(base, "attention")
    mask_ranks(base, 1.0)
    x_t = torch.randn(2, *base.latent_shape(32), generator=torch.Generator().manual_seed(1))
    cond = {name: rows.detach() for name, rows in base.encode_text(["a red car"] * 2).items()}
    times = [torch.tensor([50, 900]), torch.tensor([700, 400])]

    def said():
        found = []
        for t in times:
            found.append(base.predict(x_t, t, cond))
            found.append(torch.autograd.grad(found[-1].square().mean(), lora_parameters(base.unet)))
            with torch.no_grad(), adapters_off({"unet": base.unet}):
                found.append(base.predict(x_t, t, cond))
        return found

    plain = said()
    traced = []
    base.unet.compile_repeated_blocks(  # the tracing of torch.compile, run in Python
        backend=lambda graph, inputs: traced.append(graph) or graph.forward)
    compiled = said()
    assert traced
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain[0], plain[2])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a T-LoRA's run."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        train(TrainConfig(**make_options(folder, learning_rate=0.1), use_tlora=True,
                          output_dir=str(folder / "run")))
    return folder / "run"


def picture(lora):
    return generate(GenerateConfig(checkpoint_dir=[str(lora)], prompt=["sks dog"], num_images=1,
                                   pretrained_model_name_or_path=str(lora.parent / "base")
                                   if lora.is_dir() else str(lora.parents[1] / "base")))[0][0]


def test_images_are_generated_with_the_mask_it_was_trained_with(run):
    adapter = read_adapter(run)
    assert adapter.notes["tlora_alpha"] == "1.0"
    bare = save_diffusers(Adapter(adapter.layers), run / "bare.safetensors")
    assert picture(run).tobytes() != picture(bare).tobytes()


def test_an_export_says_what_others_lose(run, tmp_path, capsys):
    main(["export", "--lora", str(run), "--output", str(tmp_path / "a.safetensors"),
          "--format", "kohya", "--pretrained_model_name_or_path", str(run.parent / "base")])
    assert "This is a T-LoRA: other programs" in capsys.readouterr().out


def test_it_is_not_merged_into_weights_and_goes_when_it_is_taken_off(tmp_path):
    base = load_base(make_tiny_pipeline(tmp_path / "base"))
    with_lora(base, "attention")
    mask_ranks(base, 1.0)
    with pytest.raises(ConfigError, match="T-LoRA cannot be merged"):
        merge_lora(base.unet)
    remove_lora(base)
    with_lora(base, "attention")
    merge_lora(base.unet)
    assert read_lora({"unet": base.unet}).layers
