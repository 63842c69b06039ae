"""What a LoRA is, as equations of a network's outputs, on a small random base."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import MAX_TOKENS, make_tiny_pipeline
from runs import lora_gradients

from dbcore.config import ConfigError
from dbcore.models.adapter import Adapter, Layer, LoraFileError, merge_adapters
from dbcore.models.base import load_base
from dbcore.models.lora import (
    SampleDropout,
    add_lora,
    count_parameters,
    load_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    multiply_in_half,
    read_lora,
    remove_lora,
    save_lora,
    set_dropout,
    set_scale,
    target_modules,
    unmerge_lora,
)
from dbcore.models.lora_files import read_adapter, save_diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(folder):
    return load_base(folder)


@torch.no_grad()
def said(base):
    return predict(base)


def predict(base):
    """What the UNet predicts of fixed latents, under what the text encoder says of a fixed
    prompt."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return base.predict(latents, torch.tensor([10, 700]),
                        base.encode_text(["a photo of sks dog", "a red car"]))


def as_if_trained(module, seed=0, size=0.3):
    """Numbers in A and B (and DoRA's magnitudes) as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def a_file(base, path, seed=0, rank=4, alpha=2.0, text_encoder=False, **more):
    """A LoRA of `base`, trained as far as anyone can tell, in a file; the base is left as it
    was."""
    modules = {"unet": base.unet, **({"text_encoder": base.text_encoder} if text_encoder else {})}
    for module in modules.values():
        add_lora(module, rank, alpha, **more)
        as_if_trained(module, seed)
    save_lora(modules, path)
    remove_lora(base)
    return path


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


# --- injection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options",
                         [{}, {"use_dora": True}, {"use_rslora": True}, {"layers": "attention+ff"}])
def test_at_first_nothing_changes(base, options):
    plain = said(base)
    add_lora(base.unet, 4, 8.0, **options)
    add_lora(base.text_encoder, 4, 8.0, **options)
    assert close(said(base), plain)
    as_if_trained(base.unet)
    assert not close(said(base), plain)


def test_only_the_lora_gets_gradients(base):
    parameters = add_lora(base.unet, 2, 2.0)
    as_if_trained(base.unet)
    cond = base.encode_text(["a photo of sks dog"])
    base.predict(torch.zeros(1, 4, 16, 16), torch.tensor([500]), cond).square().mean().backward()
    frozen = [p for p in base.unet.parameters() if not any(p is own for own in parameters)]
    assert all(p.grad is not None for p in parameters)
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_parameters_are_rank_times_inputs_and_outputs(base):
    sides = sum(sum(base.unet.get_submodule(name).weight.shape)
                for name in target_modules(base.unet, "attention"))
    everything = sum(p.numel() for p in base.unet.parameters())
    parameters = add_lora(base.unet, 3, 3.0)
    assert count_parameters(base.unet) == (3 * sides, everything + 3 * sides)
    assert sum(p.numel() for p in parameters) == 3 * sides


def test_the_layer_computes_the_papers_equation(base):
    linear = base.unet.get_submodule(target_modules(base.unet, "attention")[0])
    weight, bias = linear.weight.clone(), linear.bias
    add_lora(base.unet, 4, 2.0)
    as_if_trained(base.unet)
    _, layer = lora_layers(base.unet)[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(3))
    wanted = torch.nn.functional.linear(x, weight + 2.0 / 4 * b @ a, bias)
    assert close(layer(x), wanted)


def test_a_is_drawn_by_the_seed_alone(folder):
    drawn = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)
        unet = load_base(folder).unet
        add_lora(unet, 4, 4.0, seed=seed)
        drawn.append(lora_layers(unet)[0][1].lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adding_a_lora_leaves_torchs_own_random_numbers_alone(base):
    unet = base.unet
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    add_lora(unet, 4, 4.0)
    assert torch.equal(torch.rand(3), wanted)


def test_a_half_precision_base_gets_a_lora_in_full_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in add_lora(base.unet, 4, 4.0)} == {torch.float32}
    assert base.unet.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{"layers": "all"}, {"use_dora": True}])
def test_a_begins_with_the_same_numbers_whatever_the_bases_precision(more, folder):
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        unet = load_base(folder, dtype=dtype).unet
        add_lora(unet, 4, 4.0, **more)
        drawn.append([layer.lora_A["default"].weight for _, layer in lora_layers(unet)])
    assert len(drawn[0]) > 8
    assert all(torch.equal(whole, half) for whole, half in zip(*drawn))


def test_gradients_in_bf16_are_those_in_float32_but_for_rounding(folder):
    whole, half = lora_gradients(folder), lora_gradients(folder, torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(whole, half, dim=0) > 0.999
    assert half.norm() == pytest.approx(float(whole.norm()), rel=0.02)
    assert not torch.equal(whole, half)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_lora_on_a_half_precision_base_multiplies_in_half(folder, layers):
    base = load_base(folder, dtype=torch.bfloat16)
    add_lora(base.unet, 4, 4, layers)
    multiply_in_half(base.unet)
    products = set()
    for _, layer in lora_layers(base.unet):
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.register_forward_hook(lambda part, x, y: products.add((x[0].dtype, y.dtype)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append((x.dtype, x.numel())) or x, lambda x: x):
        loss = predict(base).sum()
    loss.backward()
    assert products == {(torch.bfloat16, torch.bfloat16)}
    gradients = [p.grad for p in lora_parameters(base.unet)]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert any(g.abs().max() > 0 for g in gradients)
    # float32 copies of inputs, the smallest of them the prompts', would be kept for the gradient
    assert not [n for dtype, n in kept if dtype == torch.float32 and n >= 2 * MAX_TOKENS * 16]


def test_in_float32_a_lora_multiplies_as_before_to_the_last_bit(base):
    add_lora(base.unet, 4, 4, "all")
    for parameter in lora_parameters(base.unet):
        parameter.data = torch.randn_like(parameter)
    before = said(base)
    multiply_in_half(base.unet)
    assert torch.equal(said(base), before)


def test_dora_divides_by_norms_in_float32(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    before = said(base)
    add_lora(base.unet, 4, 4, use_dora=True)
    multiply_in_half(base.unet)
    assert (said(base) - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize(("layers", "endings"), [
    ("attention", {"to_q", "to_k", "to_v", "0"}),
    ("attention+ff", {"to_q", "to_k", "to_v", "0", "proj", "2"}),
    ("to_k, to_v", {"to_k", "to_v"}),
])  # fmt: skip
def test_which_layers(base, layers, endings):
    add_lora(base.unet, 2, 2.0, layers=layers)
    assert {name.rpartition(".")[2] for name, _ in lora_layers(base.unet)} == endings


def test_all_layers(base):
    fitting = [m for m in base.unet.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    add_lora(base.unet, 2, 2.0, layers="all")
    assert len(lora_layers(base.unet)) == len(fitting)


def test_a_layer_that_is_not_there_is_named(base):
    with pytest.raises(ConfigError, match=r"--lora_layers to_z: .*attention"):
        add_lora(base.unet, 2, 2.0, layers="to_z")


# --- dropout --------------------------------------------------------------------------------------


def dropping(folder):
    """A base whose LoRA hides half of its inputs, and what its UNet predicts of some rows of a
    batch by some keys."""
    base = load_base(folder)
    add_lora(base.unet, 4, 4.0, dropout=0.5)
    as_if_trained(base.unet)
    base.unet.train()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    words = base.encode_text(["a photo of sks dog", "a red car"])["encoder_hidden_states"]

    def predict(rows, keys):
        set_dropout({"unet": base.unet}, keys)
        return base.predict(latents[rows], torch.tensor([10, 700])[rows],
                            {"encoder_hidden_states": words[rows]})

    return base, predict


def test_what_a_sample_loses_is_its_own_whoever_is_in_its_batch(folder):
    _, predict = dropping(folder)
    both = predict([0, 1], [7, 8])
    assert close(both[:1], predict([0], [7]))
    assert close(both[1:], predict([1], [8]))
    assert not close(both[:1], predict([0], [8]))


def test_activations_computed_twice_lose_the_same(folder):
    gradients = []
    for twice in (False, True):
        base, predict = dropping(folder)
        if twice:
            base.unet.enable_gradient_checkpointing()
        predict([0, 1], [7, 8]).square().mean().backward()
        gradients.append([p.grad for p in lora_parameters(base.unet)])
    assert all(close(one, other) for one, other in zip(*gradients))


def test_dropout_keeps_the_mean_and_is_off_outside_training():
    dropout, ones = SampleDropout(0.25, "layer"), torch.ones(2, 100_000)
    dropout.keys = [1, 2]
    kept = dropout(ones)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert kept.mean(dim=1).tolist() == pytest.approx([1, 1], abs=0.01)
    assert (kept[0] != kept[1]).any()
    dropout.eval()
    assert torch.equal(dropout(ones), ones)


# --- merge and remove -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"layers": "all"}])
def test_merged_is_unmerged(base, options):
    add_lora(base.unet, 4, 2.0, **options)
    as_if_trained(base.unet)
    unmerged = said(base)
    merge_lora(base.unet)
    assert all(layer.merged for _, layer in lora_layers(base.unet))
    assert close(said(base), unmerged)
    unmerge_lora(base.unet)
    assert close(said(base), unmerged)


@pytest.mark.parametrize("merged", [False, True])
def test_removing_gives_the_base_back(base, merged):
    plain, names = said(base), [name for name, _ in base.unet.named_modules()]
    add_lora(base.unet, 4, 2.0)
    add_lora(base.text_encoder, 4, 2.0)
    as_if_trained(base.unet)
    as_if_trained(base.text_encoder)
    if merged:
        merge_lora(base.unet)
    remove_lora(base)
    assert [name for name, _ in base.unet.named_modules()] == names
    assert lora_parameters(base.unet) == []
    assert close(said(base), plain)
    add_lora(base.unet, 4, 2.0)  # and there is room for the next
    assert close(said(base), plain)


# --- files ----------------------------------------------------------------------------------------


SAVED = [
    {"rank": 4, "alpha": 1.0}, {"rank": 2, "alpha": 8.0, "text_encoder": True},
    {"use_rslora": True},
    {"use_dora": True}, {"use_dora": True, "text_encoder": True}, {"layers": "all", "rank": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_a_loaded_file_says_what_the_trained_network_said_in_a_stock_pipeline_too(base, tmp_path,
                                                                                  options):
    options = {"rank": 4, "alpha": 2.0, **options}
    plain = said(base)
    modules = {"unet": base.unet}
    if options.pop("text_encoder", False):
        modules["text_encoder"] = base.text_encoder
    for module in modules.values():
        add_lora(module, **options)
        as_if_trained(module)
    trained = said(base)
    path = save_lora(modules, tmp_path / "lora.safetensors")
    fresh = load_lora(load_base(base.name), path)
    assert close(said(fresh), trained)
    assert not close(trained, plain)
    assert lora_parameters(fresh.unet) == []
    stock, around = StableDiffusionPipeline.from_pretrained(base.name,
                                                            safety_checker=None), load_base(
                                                                base.name)
    stock.load_lora_weights(path.parent, weight_name=path.name)
    vars(around).update(unet=stock.unet, text_encoder=stock.text_encoder)
    assert close(said(around), trained)


def test_a_runs_folder_is_a_file(base, tmp_path):
    path = a_file(base, tmp_path / "pytorch_lora_weights.safetensors")
    assert close(said(load_lora(load_base(base.name), tmp_path)), said(load_lora(base, path)))


def test_read_lora_is_what_was_saved(base, tmp_path):
    path = a_file(base, tmp_path / "a.safetensors", rank=4, alpha=1.0)
    layers = read_lora(load_lora(base, path).modules).layers["unet"]
    assert len(layers) == len(lora_layers(base.unet))
    assert {(layer.rank, layer.scale) for layer in layers.values()} == {(4, 0.25)}


def test_a_lora_of_another_base_is_refused_and_changes_nothing(base, tmp_path):
    plain = said(base)
    path = a_file(base, tmp_path / "a.safetensors", text_encoder=True)
    good = read_adapter(path).layers
    name = next(iter(good["text_encoder"]))
    wide = Layer(torch.ones(4, 99), good["text_encoder"][name].up, 1.0)
    wrong = {
        "wide": {**good, "text_encoder": {name: wide}},
        "unknown": {"unet": {"down_blocks.7.to_q": Layer(torch.ones(4, 8), torch.ones(8, 4), 1.0)}},
        "second": {**good, "text_encoder_2": good["text_encoder"]},
    }
    for word, layers in wrong.items():
        bad = save_diffusers(Adapter(layers), tmp_path / f"{word}.safetensors")
        with pytest.raises(LoraFileError, match=f"{word}.safetensors does not fit this base"):
            load_lora(base, bad)
        assert close(said(base), plain), word
        assert not lora_layers(base.unet), word


def test_a_file_that_is_none_is_refused(base, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not at all")
    with pytest.raises(LoraFileError, match="damaged"):
        load_lora(base, tmp_path / "a.safetensors")


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_scale_0_is_the_base_and_1_is_as_trained(base, tmp_path, options):
    plain = said(base)
    load_lora(base, a_file(base, tmp_path / "a.safetensors", text_encoder=True, **options))
    trained = said(base)
    set_scale(base, {"default": 0})
    assert close(said(base), plain)
    set_scale(base, {"default": 0.5})
    half = said(base)
    assert not close(half, plain)
    assert not close(half, trained)
    set_scale(base, {"default": 1})  # of what was trained, not of what was set before
    assert close(said(base), trained)


def test_half_the_scale_is_half_the_update(base, tmp_path):
    load_lora(base, a_file(base, tmp_path / "a.safetensors"), scale=0.5)
    _, layer = lora_layers(base.unet)[0]
    half = layer.get_delta_weight("default").clone()
    set_scale(base, {"default": 1})
    assert close(layer.get_delta_weight("default"), 2 * half)


def test_two_loras_add_up(base, tmp_path):
    paths = [a_file(base, tmp_path / f"{seed}.safetensors", seed, rank, alpha=3.0)
             for seed, rank in ((1, 2), (2, 4))]  # fmt: skip
    for name, path in zip("ab", paths):
        load_lora(base, path, name=name)
    set_scale(base, {"a": 0.7, "b": 0.4})
    both = said(base)
    set_scale(base, {"a": 0.7})
    assert not close(said(base), both)  # one that is not named is off
    summed, _ = merge_adapters([read_adapter(path) for path in paths], [0.7, 0.4])
    one = load_lora(load_base(base.name), save_diffusers(summed, tmp_path / "sum.safetensors"))
    assert close(said(one), both)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_second_lora_is_no_surprise_and_is_used_alone(base, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        load_lora(base, a_file(load_base(base.name), tmp_path / f"{name}.safetensors", seed),
                  name=name)
    second = load_lora(load_base(base.name), tmp_path / "b.safetensors")
    assert close(said(base), said(second))


def test_a_scale_for_a_lora_that_is_not_there_is_refused(base, tmp_path):
    load_lora(base, a_file(base, tmp_path / "a.safetensors"), name="dog")
    with pytest.raises(ConfigError, match="no LoRA named 'cat'; there is dog"):
        set_scale(base, {"cat": 0.5})


def test_a_scale_is_a_finite_number(base, tmp_path):
    load_lora(base, a_file(base, tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match="finite"):
        set_scale(base, {"default": float("nan")})


def test_a_merged_lora_has_no_scale(base, tmp_path):
    load_lora(base, a_file(base, tmp_path / "a.safetensors"))
    merge_lora(base.unet)
    with pytest.raises(ConfigError, match="unmerge_lora"):
        set_scale(base, {"default": 0.5})


def test_a_name_that_is_taken_is_refused(base, tmp_path):
    path = a_file(base, tmp_path / "a.safetensors")
    load_lora(base, path)
    with pytest.raises(ValueError, match="default"):
        load_lora(base, path)
