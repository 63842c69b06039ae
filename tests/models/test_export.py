"""A LoRA goes out to every format and comes back, and each time the networks compute the same."""

import json
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from pipelines import make_tiny_pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from dbcore.models import export as X

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CASES = {
    "alpha is rank": {"r": 4, "lora_alpha": 4},
    "alpha is not rank": {"r": 4, "lora_alpha": 1},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 2, "use_dora": True},
    "convolution": {"r": 3, "lora_alpha": 5, "target_modules": [*ATTENTION, "conv1", "conv_shortcut", "ff.net.0.proj"]},
    "dora convolution": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["conv1", "proj_in"]},
    "patterns": {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 7}},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


def load(base):
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def outputs(pipeline):
    """(what the text encoder says, what the UNet predicts of fixed latents given fixed text)."""
    ids = pipeline.tokenizer("a photo of sks dog", padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipeline.text_encoder(ids)[0], pipeline.unet(latents, 500, encoder_hidden_states=text).sample


def same(a, b, tolerance=1e-5):
    return all(torch.allclose(x, y, atol=tolerance, rtol=1e-4) for x, y in zip(a, b))


def train(pipeline, case="alpha is not rank", text_encoder=True, seed=0):
    """Put a LoRA on both networks and give it weights, as training would."""
    options = {"target_modules": ATTENTION, **CASES[case]}
    pipeline.unet.add_adapter(LoraConfig(**options))
    if text_encoder:
        text_options = {k: v for k, v in CASES[case].items() if "pattern" not in k}
        options = {**text_options, "target_modules": ["q_proj", "v_proj", "out_proj"]}
        pipeline.text_encoder.add_adapter(LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for model in [pipeline.unet, pipeline.text_encoder]:
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def save_as_diffusers_does(pipeline, folder):
    layers, metadata = {}, {}
    for name in ["unet", "text_encoder"]:
        model = getattr(pipeline, name)
        if hasattr(model, "peft_config"):
            layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            config = model.peft_config["default"].to_dict()
            config = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
            metadata[f"{name}_lora_adapter_metadata"] = config
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / X.WEIGHT_NAME


@pytest.fixture(scope="module", params=CASES)
def trained(request, base, tmp_path_factory):
    """(its case, file as diffusers saves it, what the networks computed before it was saved)."""
    pipeline = load(base)
    plain = outputs(pipeline)
    train(pipeline, request.param)
    wanted = outputs(pipeline)
    assert not torch.allclose(plain[0], wanted[0], atol=1e-2) and not torch.allclose(
        plain[1], wanted[1], atol=1e-2
    )
    return request.param, save_as_diffusers_does(pipeline, tmp_path_factory.mktemp("lora")), wanted


def outputs_with(base, path):
    pipeline = load(base)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return outputs(pipeline)


# --- there and back -----------------------------------------------------------------------------------


def test_diffusers_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    again = X.save_diffusers(X.read_adapter(path), tmp_path / "again.safetensors")
    assert same(outputs_with(base, again), wanted)


def test_kohya_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    kohya = X.save_kohya(X.read_adapter(path), tmp_path / "kohya.safetensors")
    back = X.save_diffusers(X.read_adapter(kohya, base), tmp_path / "back.safetensors")
    assert same(outputs_with(base, back), wanted)


def test_kohya_in_a_stock_pipeline(trained, base, tmp_path):
    case, path, wanted = trained
    if "dora" in case:
        pytest.skip("diffusers leaves dora_scale of a kohya file out, and says so")
    kohya = X.save_kohya(X.read_adapter(path), tmp_path / "kohya.safetensors")
    assert same(outputs_with(base, kohya), wanted)


def test_peft_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    folder = X.save_peft(X.read_adapter(path), tmp_path / "peft")
    pipeline = load(base)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder / "unet")
    pipeline.text_encoder = PeftModel.from_pretrained(pipeline.text_encoder, folder / "text_encoder")
    assert same(outputs(pipeline), wanted)
    back = X.save_diffusers(X.read_adapter(folder), tmp_path / "back.safetensors")
    assert same(outputs_with(base, back), wanted)


# --- kohya's conventions ------------------------------------------------------------------------------


@pytest.fixture
def adapter(base, tmp_path):
    pipeline = load(base)
    train(pipeline)
    read = X.read_adapter(save_as_diffusers_does(pipeline, tmp_path / "lora"))
    return X.Adapter(read.layers, {"base": "some/base", "trigger_words": "sks dog"})


def test_kohya_keys_are_those_other_tools_look_for(adapter, tmp_path):
    tensors = load_file(X.save_kohya(adapter, tmp_path / "k.safetensors"))
    to_out = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    q_proj = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    for flat in [to_out, q_proj]:
        for part in ["lora_down.weight", "lora_up.weight", "alpha"]:
            assert f"{flat}.{part}" in tensors
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(key.split(".")[0].replace("_", "").isalnum() for key in tensors)
    assert tensors[f"{to_out}.lora_down.weight"].shape == (4, 16) and tensors[f"{to_out}.alpha"].item() == 1.0


def test_kohya_names_are_looked_up_for_a_base_on_the_hub_too(adapter, base, tmp_path, monkeypatch):
    kohya = X.save_kohya(adapter, tmp_path / "kohya.safetensors")

    def from_folder(real, name, **more):
        assert name == "some/name"
        return real(base, **more)

    for cls, method in ((DiffusionPipeline, "load_config"), (UNet2DConditionModel, "load_config"),
                        (CLIPTextConfig, "from_pretrained")):  # fmt: skip
        monkeypatch.setattr(cls, method, partial(from_folder, getattr(cls, method)))
    assert X.read_adapter(kohya, "some/name").layers.keys() == adapter.layers.keys()


def test_kohya_header_names_network_base_and_trigger(adapter, tmp_path):
    _, header = X.read_safetensors(X.save_kohya(adapter, tmp_path / "k.safetensors"))
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == ("4", 1.0)
    assert header["ss_sd_model_name"] == "some/base" and header["modelspec.trigger_phrase"] == "sks dog"
    assert json.loads(header["ss_tag_frequency"]) == {"instance": {"sks dog": 1}}
    assert "ss_base_model_version" not in header  # 16 wide: none of the families A1111 knows


@pytest.mark.parametrize("width, version", [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0")])
def test_kohya_header_tells_the_family(width, version):
    layer = X.Layer(torch.zeros(2, width), torch.zeros(8, 2), 1.0)
    header = X.kohya_header(X.Adapter({"unet": {"mid_block.attn2.to_k": layer}}), {})
    assert header["ss_base_model_version"] == version


def test_two_text_encoders_become_te1_and_te2(tmp_path):
    layer = X.Layer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    named = {"encoder.layers.0.self_attn.q_proj": layer}
    path = X.save_kohya(
        X.Adapter({"text_encoder": named, "text_encoder_2": named}), tmp_path / "k.safetensors"
    )
    assert {key[:8] for key in load_file(path)} == {"lora_te1", "lora_te2"}


# --- refused ------------------------------------------------------------------------------------------


def test_files_that_are_none_are_named(tmp_path, base):
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{'broken")
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 64)
    torch.save({}, tmp_path / "lora.bin")
    save_file({"weird.key": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"lora_unet_nowhere.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "alien.safetensors")
    cases = {
        "cut.safetensors": "cut.*damaged", "huge.safetensors": "huge.*damaged", "lora.bin": "only .safetensors",
        "gone.safetensors": "not there", "other.safetensors": "weird.key", "alien.safetensors": "another model",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(X.LoraFileError, match=message):
            X.read_adapter(tmp_path / name, base)
    with pytest.raises(X.LoraFileError, match="pretrained_model_name_or_path"):
        X.read_adapter(tmp_path / "alien.safetensors")


def test_a_failed_save_leaves_the_old_file(adapter, tmp_path, monkeypatch):
    path = X.save_diffusers(adapter, tmp_path / "a.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(X, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        X.save_diffusers(adapter, path)
    assert path.read_bytes() == before


# --- merge and extract --------------------------------------------------------------------------------


def test_a_merged_file_is_the_weighted_sum(base, tmp_path):
    """A stock pipeline with both LoRAs at their weights computes what the one merged file does."""
    paths = []
    for seed, case in enumerate(["alpha is not rank", "rslora", "convolution"]):
        pipeline = load(base)
        train(pipeline, case, text_encoder=seed != 1, seed=seed)
        read = X.read_adapter(save_as_diffusers_does(pipeline, tmp_path / str(seed)))
        paths.append(X.save_diffusers(read, tmp_path / str(seed) / "again.safetensors"))
    both = load(base)
    for name, path in zip("abc", paths):
        both.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    both.set_adapters(["a", "b", "c"], [0.7, -0.4, 0.5])
    merged, error = X.merge_adapters([X.read_adapter(path) for path in paths], [0.7, -0.4, 0.5])
    path = X.save_diffusers(merged, tmp_path / "merged.safetensors")
    assert error == 0.0 and same(outputs_with(base, path), outputs(both))
    assert max(layer.rank for _, _, layer in merged.every()) == 4 + 4 + 3


def test_merging_down_to_a_rank_is_the_best_approximation(adapter):
    short, error = X.merge_adapters([adapter, adapter], [0.5, 0.5], rank=2)
    full, _ = X.merge_adapters([adapter], [1.0])
    lost = whole = 0.0
    for component, name, layer in full.every():
        delta = layer.delta()
        singular = torch.linalg.svdvals(delta)
        difference = delta - short.layers[component][name].delta()
        assert torch.allclose(difference.norm(), singular[2:].norm(), atol=1e-4)
        lost, whole = lost + difference.square().sum().item(), whole + delta.square().sum().item()
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and 0.1 < error < 0.9
    kept, error = X.merge_adapters([adapter, adapter], [0.5, 0.5], rank=4)
    assert error < 1e-3 and max(layer.rank for _, _, layer in kept.every()) == 4


@pytest.mark.parametrize("into, out", [((24, 3, 3), 4), ((4, 3, 3), 24), ((3,), 24)])
def test_a_layer_of_fewer_channels_than_the_rank_is_kept_whole(into, out):
    generator = torch.Generator().manual_seed(0)
    square = (1,) * (len(into) - 1)
    layer = X.Layer(torch.randn(40, *into, generator=generator), torch.randn(out, 40, *square, generator=generator), 0.5)
    short, lost = X.shorten(layer, rank=36)
    assert torch.allclose(short.delta(), layer.delta(), atol=1e-4) and lost < 1e-6


def test_merging_keeps_the_words_and_refuses_dora_and_strangers(adapter):
    other = X.Adapter(adapter.layers, {"base": "another", "trigger_words": "zwx cat"})
    merged, _ = X.merge_adapters([adapter, other], [1, 1])
    assert merged.notes == {"trigger_words": "sks dog, zwx cat"}
    layer = X.Layer(torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    dora = X.Adapter({"unet": {"a": X.Layer(layer.down, layer.up, 1.0, torch.ones(4))}})
    with pytest.raises(X.LoraFileError, match="DoRA"):
        X.merge_adapters([dora, dora], [1, 1])
    wide = X.Adapter({"unet": {"a": X.Layer(torch.zeros(1, 6), torch.zeros(4, 1), 1.0)}})
    with pytest.raises(X.LoraFileError, match="different bases"):
        X.merge_adapters([X.Adapter({"unet": {"a": layer}}), wide], [1, 1])
    with pytest.raises(X.LoraFileError, match="one each"):
        X.merge_adapters([adapter], [1, 1])


def test_extracting_gives_back_what_was_fused(base, tmp_path):
    tuned = load(base)
    train(tuned, "convolution")
    wanted = outputs(tuned)
    path = X.save_diffusers(
        X.read_adapter(save_as_diffusers_does(tuned, tmp_path)), tmp_path / "again.safetensors"
    )
    fused = load(base)
    fused.load_lora_weights(tmp_path, weight_name=path.name)
    fused.fuse_lora()
    fused.unload_lora_weights()
    before = load(base)
    models = [{"unet": p.unet, "text_encoder": p.text_encoder} for p in (before, fused)]
    adapter, figures = X.extract_adapter(*models, rank=3)
    assert figures["error"] < 1e-3 and figures["outside"] == 0.0
    assert same(outputs_with(base, X.save_diffusers(adapter, tmp_path / "x.safetensors")), wanted, 1e-4)


def test_extracting_reports_what_a_lora_cannot_hold(base):
    before, after = load(base), load(base)
    for parameter in after.unet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    _, low = X.extract_adapter({"unet": before.unet}, {"unet": after.unet}, rank=1)
    _, high = X.extract_adapter({"unet": before.unet}, {"unet": after.unet}, rank=8)
    assert 0 < high["error"] < low["error"] < 1 and 0 < low["outside"] == high["outside"] < 0.2
    with pytest.raises(X.LoraFileError, match="nothing to extract"):
        X.extract_adapter({"unet": before.unet}, {"unet": before.unet}, rank=1)
    with pytest.raises(X.LoraFileError, match="differ in shape"):
        X.extract_adapter({"unet": before.unet}, {"unet": after.text_encoder}, rank=1)


@pytest.mark.parametrize("shape", [(700, 600), (20, 30, 3, 3)])
def test_extract_layer_is_near_the_best(shape):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(shape, generator=generator)
    difference.flatten(1)[:] += 30 * torch.randn(shape[0], 1, generator=generator) / shape[0] ** 0.5
    layer = X.extract_layer(difference, rank=4)
    best = torch.linalg.svdvals(difference.flatten(1))[4:].norm()
    assert layer.rank == 4 and layer.delta().shape == shape
    assert (difference - layer.delta()).norm() < 1.01 * best


def test_the_same_lora_is_the_same_file(adapter, tmp_path):
    """Byte for byte, whatever order the library hashes the header's notes in."""
    noted = X.Adapter(adapter.layers, {"base": "b", "trigger_words": "sks", "more": "x"})
    files = {X.save_diffusers(noted, tmp_path / f"{k}.safetensors").read_bytes() for k in range(6)}
    assert len(files) == 1
