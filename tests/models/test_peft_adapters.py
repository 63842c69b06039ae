"""Adapters other than LoRA: trained, saved, loaded and exported, the networks compute the same."""

import argparse
import json

import pytest
import torch
from peft import PeftModel
from runs import make_base
from safetensors.torch import load_file, save_file

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines.memory import forecast
from dbcore.models import peft_adapters as P
from dbcore.models.adapter import LoraFileError, plain_name
from dbcore.models.base import load_base
from dbcore.models.kohya import kohya_name
from dbcore.models.lora import (
    adapter_layers,
    add_lora,
    lora_parameters,
    remove_lora,
    save_lora,
)
from dbcore.models.lora_files import read_safetensors
from dbcore.models.reading import load_pipeline
from dbcore.models.replay import Replay
from dbcore.tools import export, merge
from dbcore.utils.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("world") / "base")


def said(base):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return base.predict(latents, torch.tensor([500]), base.encode_text(["a photo of sks dog"]))


def adapted(folder, kind, layers="attention", text_encoder=True):
    """A base with an adapter of a kind, trained as far as anyone can tell."""
    base, numbers = load_base(folder), torch.Generator().manual_seed(0)
    modules = {"unet": base.unet, **({"text_encoder": base.text_encoder} if text_encoder else {})}
    for name, module in modules.items():
        P.add_peft_adapter(module, kind, 4, 2.0, layers, 0, base.lora_targets[name])
        for parameter in lora_parameters(module):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=numbers)
    return base, modules


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_at_first_nothing_changes_and_the_seed_alone_decides(kind, folder):
    plain, drawn = said(load_base(folder)), []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        base = load_base(folder)
        torch.manual_seed(noise)
        P.add_peft_adapter(base.unet, kind, 4, 2.0, "all", seed, base.lora_targets["unet"])
        assert close(said(base), plain)
        drawn.append(lora_parameters(base.unet))
        assert {p.dtype for p in drawn[-1]} == {torch.float32}
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert all(map(torch.equal, drawn[0], drawn[2])) == (kind == "oft")  # which begins with zeros


@pytest.mark.parametrize("layers", ["attention", "all"])
@pytest.mark.parametrize("kind", P.CONFIGS)
def test_saved_and_loaded_it_says_the_same(kind, layers, folder, tmp_path):
    base, modules = adapted(folder, kind, layers)
    trained, plain = said(base), said(load_base(folder))
    assert not close(trained, plain)
    path = P.save_adapter(modules, tmp_path / "pytorch_lora_weights.safetensors", {"base": "tiny"})
    fresh = P.load(load_base(folder), tmp_path)
    assert close(said(fresh), trained)
    assert not any(p.requires_grad for p in fresh.unet.parameters())
    assert P.components(path, fresh) == {"unet", "text_encoder"}
    P.set_scales(fresh, {"default": 0.0})
    assert close(said(fresh), plain)
    P.set_scales(fresh, {"default": 1.0})
    assert close(said(fresh), trained)
    remove_lora(fresh)
    assert close(said(fresh), plain)


def test_an_oft_goes_on_no_convolution(folder):
    base, _ = adapted(folder, "oft", "conv1,to_q", text_encoder=False)
    assert {name.rpartition(".")[2] for name, _ in adapter_layers(base.unet)} == {"to_q"}
    with pytest.raises(ConfigError, match="--lora_layers conv1: an OFT goes on linear layers"):
        adapted(folder, "oft", "conv1", text_encoder=False)


def test_a_scale_is_a_share_of_the_change_but_of_a_rotation(folder, tmp_path):
    for kind in P.CONFIGS:
        path = P.save_adapter(adapted(folder, kind)[1], tmp_path / f"{kind}.safetensors")
        base = P.load(load_base(folder), path)
        if kind == "oft":
            with pytest.raises(ConfigError, match=r"--lora_scale 0.5: an OFT is a rotation"):
                P.set_scales(base, {"default": 0.5})
            continue
        _, layer = adapter_layers(base.unet)[0]
        whole = P.weight_change(layer, "default").clone()
        P.set_scales(base, {"default": -0.5})
        assert close(P.weight_change(layer, "default"), -0.5 * whole)


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_the_change_of_a_weight_is_what_merging_adds(kind, folder):
    base, _ = adapted(folder, kind, "all", text_encoder=False)
    for _, layer in adapter_layers(base.unet)[:12]:
        change, before = P.weight_change(layer, "default"), layer.get_base_layer().weight.clone()
        layer.merge()
        assert close(layer.get_base_layer().weight - before, change)


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_a_replay_is_the_same_in_bits(kind, folder):
    base, _ = adapted(folder, kind, text_encoder=False)
    cond = base.encode_text(["a red dog"])
    inputs = torch.zeros(1, 4, 16, 16), torch.tensor([500]), cond
    gradients = []
    for predict in (base.predict, Replay(base.predict, base.unet)):
        predict(*inputs).square().mean().backward()
        gradients.append([p.grad for p in lora_parameters(base.unet)])
        base.unet.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_peft_reads_the_exported_folder(kind, folder, tmp_path, capsys):
    base, modules = adapted(folder, kind)
    path = P.save_adapter(modules, tmp_path / "a.safetensors")
    run(export, "--lora", path, "--format", "peft", "--output", tmp_path / "peft")
    assert f"{P.NAMES[kind]} of text_encoder, unet" in capsys.readouterr().out
    stock, around = load_pipeline("", folder), load_base(folder)
    for name in modules:
        tuned = PeftModel.from_pretrained(getattr(stock, name), tmp_path / "peft" / name)
        vars(around)[name] = tuned.base_model.model
    assert close(said(around), said(base))


def change_by_lycoris(tensors, flat, shape):
    """The change of a weight as LyCORIS and ComfyUI compute it from a file."""
    def part(name):
        return tensors.get(f"{flat}.{name}")

    def factor(name):  # (matrix, its rank or None)
        if part(name) is not None:
            return part(name), None
        return part(f"{name}_a") @ part(f"{name}_b"), len(part(f"{name}_b"))

    prefix = "hada_w" if part("hada_w1_a") is not None else "lokr_w"
    (first, rank), (second, other) = factor(f"{prefix}1"), factor(f"{prefix}2")
    scale = float(part("alpha")) / (rank or other) if rank or other else 1.0
    whole = first * second if prefix == "hada_w" else torch.kron(
        first[..., None, None] if second.ndim == 4 else first, second)
    return scale * whole.reshape(shape)


@pytest.mark.parametrize(("kind", "rank"), [("loha", 4), ("lokr", 4), ("lokr", 1)])
def test_other_tools_compute_the_same_from_kohyas_format(kind, rank, folder, tmp_path, capsys):
    """With rank 4 LoKr's factors are whole in this small base, with rank 1 the second is two."""
    base, numbers = load_base(folder), torch.Generator().manual_seed(0)
    modules = {"unet": base.unet, "text_encoder": base.text_encoder}
    for name, module in modules.items():
        P.add_peft_adapter(module, kind, rank, 3.0, "all", 0, base.lora_targets[name])
        for parameter in lora_parameters(module):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=numbers)
    path = P.save_adapter(modules, tmp_path / "a.safetensors", {"trigger_words": "sks dog"})
    run(export, "--lora", path, "--format", "kohya", "--output", tmp_path / "k.safetensors")
    assert f"kohya: {P.NAMES[kind]} of text_encoder, unet" in capsys.readouterr().out
    tensors, count = load_file(tmp_path / "k.safetensors"), 0
    for component, module in modules.items():
        for name, layer in adapter_layers(module):
            flat = kohya_name(component, plain_name(component, name), False)
            weight = layer.get_base_layer().weight
            found = change_by_lycoris(tensors, flat, weight.shape)
            assert close(found, P.weight_change(layer, "default")), name
            count += sum(key.startswith(f"{flat}.") for key in tensors)
    assert count == len(tensors)
    _, header = read_safetensors(tmp_path / "k.safetensors")
    assert json.loads(header["ss_network_args"]) == {"algo": kind}


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_what_it_cannot_be_is_refused_with_a_reason(kind, folder, tmp_path):
    path = P.save_adapter(adapted(folder, kind)[1], tmp_path / "a.safetensors")
    for format in ("kohya", "diffusers", "merged") if kind == "oft" else ("diffusers", "merged"):
        with pytest.raises(InputError, match=f"--format {format}: .*give --format peft"):
            run(export, "--lora", path, "--format", format, "--output", tmp_path / "b.safetensors")
    with pytest.raises(LoraFileError, match="Here LoRA and DoRA are read"):
        run(merge, "--lora", path, path, "--output", tmp_path / "b.safetensors")
    base = P.load(load_base(folder), path)
    lora = load_base(folder)
    add_lora(lora.unet, 2, 2.0)
    second = save_lora({"unet": lora.unet}, tmp_path / "lora.safetensors")
    for one, file in ((base, second), (base, path), (lora, path)):
        with pytest.raises(LoraFileError, match="is used alone"):
            P.load(one, file, "second")


def test_one_of_another_base_is_refused_and_changes_nothing(folder, tmp_path):
    path = P.save_adapter(adapted(folder, "lokr")[1], tmp_path / "a.safetensors")
    tensors, (_, header) = load_file(path), read_safetensors(path)
    settings, plain = json.loads(header[P.HEADER_KEY]), said(load_base(folder))
    wide = {name: torch.ones(3, 3) for name in tensors}
    strange = {"transformer": settings["unet"]}
    elsewhere = {"unet": {**settings["unet"], "target_modules": ["not_there"]}}
    for number, (numbers, what) in enumerate(((wide, settings), (tensors, strange),
                                              (tensors, elsewhere))):
        own = {name: t for name, t in numbers.items() if name.split(".")[0] in what}
        bad = tmp_path / f"{number}.safetensors"
        save_file(own or {"transformer.a": torch.ones(1)}, bad, {P.HEADER_KEY: json.dumps(what)})
        base = load_base(folder)
        with pytest.raises(LoraFileError, match=f"{number}.safetensors does not fit this base"):
            P.load(base, bad)
        assert close(said(base), plain)
    save_file(tensors, bad, {P.HEADER_KEY: "{"})
    with pytest.raises(LoraFileError, match="header peft_adapter cannot be used"):
        P.read(bad)


@pytest.mark.parametrize("kind", P.CONFIGS)
def test_the_memory_is_forecast(kind, folder):
    config = TrainConfig(pretrained_model_name_or_path=str(folder), adapter=kind, rank=4,
                         max_train_steps=1)
    assert forecast(config, "cpu")


def run(tool, *words):
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    tool.main(parser.parse_args([str(word) for word in words]))
