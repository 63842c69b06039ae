"""A LoRA goes out to every format and comes back, and each time the networks compute the same."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from pipelines import make_flux2_miniature, make_sdxl_miniature, make_tiny_pipeline
from runs import make_hub
from safetensors.torch import load_file, save_file

from dbcore.models import adapter as A
from dbcore.models import kohya as K
from dbcore.models import lora_files as X
from dbcore.models.base import load_base
from dbcore.models.lora import copy_weights, load_lora, lora_layers

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CASES = {
    "alpha is rank": {"r": 4, "lora_alpha": 4},
    "alpha is not rank": {"r": 4, "lora_alpha": 1},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 2, "use_dora": True},
    "convolution": {"r": 3, "lora_alpha": 5,
                    "target_modules": [*ATTENTION, "conv1", "conv_shortcut", "ff.net.0.proj"]},
    "dora convolution": {"r": 2, "lora_alpha": 3, "use_dora": True,
                         "target_modules": ["conv1", "proj_in"]},
    "patterns": {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_k": 2},
                 "alpha_pattern": {"to_v": 7}},
    "expressions": {"r": 4, "lora_alpha": 2, "rank_pattern": {r"attn\d\.to_(q|k)": 2},
                    "alpha_pattern": {r"(^down_blocks.*attn2)\.to_v": 9, r".*attn2.*": 7,
                                      "to_v": 5}},
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
    ids = pipeline.tokenizer(
        "a photo of sks dog", padding="max_length", return_tensors="pt"
    ).input_ids
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipeline.text_encoder(ids)[0], pipeline.unet(
            latents, 500, encoder_hidden_states=text
        ).sample


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
            layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(
                get_peft_model_state_dict(model)
            )
            config = model.peft_config["default"].to_dict()
            config = {
                key: list(value) if isinstance(value, set) else value
                for key, value in config.items()
            }
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
    assert not torch.allclose(plain[0], wanted[0], atol=1e-2)
    assert not torch.allclose(
        plain[1], wanted[1], atol=1e-2
    )
    return request.param, save_as_diffusers_does(pipeline, tmp_path_factory.mktemp("lora")), wanted


def outputs_with(base, path):
    pipeline = load(base)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return outputs(pipeline)


# --- there and back -------------------------------------------------------------------------------


def test_diffusers_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    again = X.save_diffusers(X.read_adapter(path), tmp_path / "again.safetensors")
    assert same(outputs_with(base, again), wanted)


def test_kohya_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    kohya = K.save_kohya(X.read_adapter(path), tmp_path / "kohya.safetensors")
    back = X.save_diffusers(X.read_adapter(kohya, base), tmp_path / "back.safetensors")
    assert same(outputs_with(base, back), wanted)


def test_kohya_in_a_stock_pipeline(trained, base, tmp_path):
    case, path, wanted = trained
    if "dora" in case:
        pytest.skip("diffusers leaves dora_scale of a kohya file out, and says so")
    kohya = K.save_kohya(X.read_adapter(path), tmp_path / "kohya.safetensors")
    assert same(outputs_with(base, kohya), wanted)


def test_peft_there_and_back(trained, base, tmp_path):
    _, path, wanted = trained
    folder = X.save_peft(X.read_adapter(path), tmp_path / "peft")
    pipeline = load(base)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder / "unet")
    pipeline.text_encoder = PeftModel.from_pretrained(
        pipeline.text_encoder, folder / "text_encoder"
    )
    assert same(outputs(pipeline), wanted)
    back = X.save_diffusers(X.read_adapter(folder), tmp_path / "back.safetensors")
    assert same(outputs_with(base, back), wanted)


@pytest.mark.parametrize("write", [X.save_diffusers, K.save_kohya], ids=["diffusers", "kohya"])
def test_ours_and_the_stock_pipeline_make_the_same_image(trained, base, tmp_path, write):
    case, path, _ = trained
    if "dora" in case and write is K.save_kohya:
        pytest.skip("diffusers leaves dora_scale of a kohya file out, and says so")
    path = write(X.read_adapter(path), tmp_path / "lora.safetensors")
    ours, stock = load_lora(load_base(base), path), load_base(base)
    assert stock.text_encoder  # loaded, so that the pipeline has it
    pipeline = stock.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    assert same(outputs(ours.pipeline()), outputs(pipeline))
    images = [
        np.asarray(b.generate(["a photo of sks dog"], [0], num_inference_steps=3)[0], int)
        for b in (ours, stock)
    ]
    assert abs(images[0] - images[1]).max() <= 1 < np.ptp(images[0])


def test_names_of_earlier_diffusers_are_read(base, tmp_path):
    """As diffusers 0.16 and 0.20 named the halves."""
    pipeline = load(base)
    train(pipeline, "alpha is rank")
    tensors = load_file(save_as_diffusers_does(pipeline, tmp_path))
    assert any(".attn1.to_q.lora.down." in key for key in tensors)
    assert any(
        "lora_linear_layer" in key for key in tensors
    )
    old = {re.sub(r"(attn\d)\.to_(\w+)(\.0)?\.lora\.", r"\1.processor.to_\2_lora.", key): tensor
           for key, tensor in tensors.items()}  # fmt: skip
    assert any("to_out_lora.up" in key for key in old)
    save_file(old, tmp_path / "old.safetensors")
    again = X.save_diffusers(
        X.read_adapter(tmp_path / "old.safetensors"), tmp_path / "again.safetensors"
    )
    assert same(outputs_with(base, again), outputs(pipeline))
    assert same(outputs_with(base, tmp_path / "old.safetensors"), outputs(pipeline))


def test_each_layer_of_a_kohya_file_has_its_own_alpha(adapter, base, tmp_path):
    tensors = load_file(K.save_kohya(adapter, tmp_path / "k.safetensors"))
    alphas = {key: 1.0 + k % 5 for k, key in enumerate(sorted(tensors)) if key.endswith(".alpha")}
    save_file(
        {**tensors, **{key: torch.tensor(alpha) for key, alpha in alphas.items()}},
        tmp_path / "a.safetensors",
    )
    read = X.read_adapter(tmp_path / "a.safetensors", base)
    scales = {
        K.kohya_name(c, module, False) + ".alpha": layer.scale * layer.rank
        for c, module, layer in read.every()
    }
    assert scales == pytest.approx(alphas)


def test_peft_over_an_earlier_export_leaves_nothing_of_it(adapter, tmp_path):
    X.save_peft(adapter, tmp_path)
    X.save_peft(A.Adapter({"unet": adapter.layers["unet"]}), tmp_path)
    assert X.read_adapter(tmp_path).layers.keys() == {"unet"}
    assert not any((tmp_path / "text_encoder").iterdir())


# --- kohya's conventions --------------------------------------------------------------------------


@pytest.fixture
def adapter(base, tmp_path):
    pipeline = load(base)
    train(pipeline)
    read = X.read_adapter(save_as_diffusers_does(pipeline, tmp_path / "lora"))
    return A.Adapter(read.layers, {"base": "some/base", "trigger_words": "sks dog"})


def test_kohya_keys_are_those_other_tools_look_for(adapter, tmp_path):
    tensors = load_file(K.save_kohya(adapter, tmp_path / "k.safetensors"))
    to_out = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    q_proj = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    for flat in [to_out, q_proj]:
        for part in ["lora_down.weight", "lora_up.weight", "alpha"]:
            assert f"{flat}.{part}" in tensors
    assert {key.split(".", 1)[1] for key in tensors} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert all(key.split(".")[0].replace("_", "").isalnum() for key in tensors)
    assert (
        tensors[f"{to_out}.lora_down.weight"].shape == (4, 16)
    )
    assert (
        tensors[f"{to_out}.alpha"].item() == 1.0
    )


def test_kohya_names_are_looked_up_for_a_base_on_the_hub_too(adapter, base, tmp_path, monkeypatch):
    kohya = K.save_kohya(adapter, tmp_path / "kohya.safetensors")
    make_hub(tmp_path / "hub", monkeypatch, main=base)
    assert X.read_adapter(kohya, "tiny/base").layers.keys() == adapter.layers.keys()


def test_kohya_header_names_network_base_and_trigger(adapter, tmp_path):
    _, header = X.read_safetensors(K.save_kohya(adapter, tmp_path / "k.safetensors"))
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == ("4", 1.0)
    assert (
        header["ss_sd_model_name"] == "some/base"
    )
    assert (
        header["modelspec.trigger_phrase"] == "sks dog"
    )
    assert json.loads(header["ss_tag_frequency"]) == {"instance": {"sks dog": 1}}
    assert "ss_base_model_version" not in header  # 16 wide: none of the families A1111 knows


@pytest.mark.parametrize(
    ("width", "version"), [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0")]
)
def test_kohya_header_tells_the_family(width, version):
    layer = A.Layer(torch.zeros(2, width), torch.zeros(8, 2), 1.0)
    header = K.kohya_header(A.Adapter({"unet": {"mid_block.attn2.to_k": layer}}))
    assert header["ss_base_model_version"] == version


def test_two_text_encoders_become_te1_and_te2(tmp_path):
    layer = A.Layer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    named = {"encoder.layers.0.self_attn.q_proj": layer}
    path = K.save_kohya(
        A.Adapter({"text_encoder": named, "text_encoder_2": named}), tmp_path / "k.safetensors"
    )
    assert {key[:8] for key in load_file(path)} == {"lora_te1", "lora_te2"}


def test_what_a_kohya_file_says_of_itself_is_kept(adapter, base, tmp_path):
    notes = {
        "ss_sd_model_name": "v1-5",
        "ss_epoch": "7",
        "ss_tag_frequency": "{}",
        "sshs_model_hash": "of this file",
    }
    kohya = K.save_kohya(A.Adapter(adapter.layers, notes), tmp_path / "k.safetensors")
    path = X.save_diffusers(X.read_adapter(kohya, base), tmp_path / "d.safetensors")
    _, header = X.read_safetensors(
        K.save_kohya(X.read_adapter(path), tmp_path / "again.safetensors")
    )
    assert {key: header.get(key) for key in notes} == {**notes, "sshs_model_hash": None}
    assert header["ss_network_dim"] == "4"


def test_layers_that_kohyas_scripts_pass_over_are_named(adapter):
    layer = A.Layer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    more = {
        "conv_in": layer,
        "time_embedding.linear_1": layer,
        "down_blocks.0.downsamplers.0.conv": layer,
    }
    assert K.kohya_leaves_out(adapter) == []
    assert K.kohya_leaves_out(A.Adapter({"unet": more})) == ["conv_in", "time_embedding.linear_1"]


# --- other families -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_sdxl_miniature(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    return make_flux2_miniature(tmp_path_factory.mktemp("flux2"))


def adapter_of_all(base):
    """A LoRA of rank 2 on every layer of a base, of random numbers."""
    layers, generator = {}, torch.Generator().manual_seed(0)
    for (component, name), module in X.Names(base).modules.items():
        out, *into = module.weight.shape
        up = torch.randn(out, 2, *[1] * (len(into) - 1), generator=generator)
        down = torch.randn(2, *into, generator=generator)
        layers.setdefault(component, {})[name] = A.Layer(down, up, 0.5)
    return A.Adapter(layers)


def updates(networks):
    """{(component, module): scale * up @ down} of the LoRAs on networks."""
    return {
        (component, A.plain_name(component, name)): layer.get_delta_weight(layer.active_adapters[0])
        for component, network in networks.items()
        for name, layer in lora_layers(network)
    }


@pytest.mark.parametrize(
    ("family", "write"),
    [("sdxl", X.save_diffusers), ("sdxl", K.save_kohya), ("flux2", X.save_diffusers)]
)
def test_ours_and_the_stock_pipeline_read_the_same_of_every_family(family, write, request,
                                                                   tmp_path):
    base = request.getfixturevalue(family)
    path = write(adapter_of_all(base), tmp_path / "lora.safetensors")
    ours = updates(load_lora(load_base(base), path).modules)
    stock = DiffusionPipeline.from_pretrained(base)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    theirs = updates({component: getattr(stock, component)
                      for component in stock._lora_loadable_modules})
    wanted = {(component, name): layer.delta()
              for component, name, layer in adapter_of_all(base).every()}
    assert wanted.keys() == ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], wanted[key], atol=1e-5) for key in wanted)
    assert all(torch.allclose(theirs[key], wanted[key], atol=1e-5) for key in wanted)


def test_the_first_of_two_text_encoders_is_te1(sdxl, tmp_path, monkeypatch):
    monkeypatch.setitem(K.FAMILIES, 40, K.FAMILIES[2048])  # the miniature's width
    layers = adapter_of_all(sdxl).layers
    unet_and_first = A.Adapter({key: layers[key] for key in ("unet", "text_encoder")})
    tensors = load_file(K.save_kohya(unet_and_first, tmp_path / "one.safetensors"))
    assert {key.split("_")[1] for key in tensors} == {"unet", "te1"}


def test_names_of_the_original_sdxl_are_read(sdxl, tmp_path):
    flat = "lora_unet_input_blocks_7_1_transformer_blocks_1_attn1_to_q"
    halves = {
        f"{flat}.lora_down.weight": torch.ones(2, 16),
        f"{flat}.lora_up.weight": torch.ones(16, 2),
    }
    save_file({**halves, f"{flat}.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors")
    ((component, name, layer),) = X.read_adapter(tmp_path / "k.safetensors", sdxl).every()
    assert (component, name) == (
        "unet",
        "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q",
    )
    assert layer.scale == 0.5


def test_names_of_flux2_are_read_and_what_diffusers_drops_is_refused(flux2, tmp_path):
    def kohya(flat, out):
        return {f"{flat}.lora_down.weight": torch.ones(2, 16),
                f"{flat}.lora_up.weight": torch.ones(out, 2),
                f"{flat}.alpha": torch.tensor(1.0)}  # fmt: skip

    path = tmp_path / "k.safetensors"
    save_file(kohya("lora_unet_double_blocks_0_img_attn_qkv", 48), path)
    layers = X.read_adapter(path, flux2).layers["transformer"]
    assert layers.keys() == {f"transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    assert all(torch.equal(layer.delta(), torch.ones(16, 16)) for layer in layers.values())
    again = X.save_diffusers(A.Adapter({"transformer": layers}), tmp_path / "d.safetensors")
    assert X.read_adapter(again).layers["transformer"].keys() == layers.keys()
    with pytest.raises(A.LoraFileError, match="no names for a transformer"):
        K.save_kohya(A.Adapter({"transformer": layers}), path)
    save_file(
        {
            **kohya("lora_unet_double_blocks_0_img_attn_qkv", 48),
            **kohya("lora_unet_modulation", 16),
        },
        path,
    )
    with pytest.raises(A.LoraFileError, match=r"lora_unet_modulation.*another model family"):
        X.read_adapter(path, flux2)


# --- refused --------------------------------------------------------------------------------------


def test_files_that_are_none_are_named(tmp_path, base):
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{'broken")
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 64)
    torch.save({}, tmp_path / "lora.bin")
    save_file({"weird.key": torch.zeros(2)}, tmp_path / "other.safetensors")
    halves = {f"lora_unet_nowhere.lora_{half}.weight": torch.zeros(2, 2) for half in ("down", "up")}
    save_file(halves, tmp_path / "alien.safetensors")
    cases = {
        "cut.safetensors": "cut.*damaged", "huge.safetensors": "huge.*damaged",
        "lora.bin": "only .safetensors",
        "gone.safetensors": "not there", "other.safetensors": "weird.key",
        "alien.safetensors": "another model",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(A.LoraFileError, match=message):
            X.read_adapter(tmp_path / name, base)
    with pytest.raises(A.LoraFileError, match="pretrained_model_name_or_path"):
        X.read_adapter(tmp_path / "alien.safetensors")


TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{TO_Q.replace('.', '_')}"
HALF = torch.ones(2, 16)
# what is put into a sound file beside the rest, in kohya's names, and what its refusal says
REFUSED = {
    "loha": ({f"{KOHYA}2.hada_w1_a": HALF}, "hada_w1_a, of a LoHa, which ComfyUI"),
    "lokr": ({f"{KOHYA}2.lokr_w1": HALF}, "lokr_w1, of a LoKr"),
    "tucker": ({f"{KOHYA}.lora_mid.weight": HALF}, "lora_mid.weight, of a Tucker"),
    "tucker loha": ({f"{KOHYA}.hada_t1": HALF}, "hada_t1, of a Tucker"),
    "bias": ({f"{KOHYA}.diff_b": HALF}, "diff_b, of full weights"),
    "oft": ({f"{KOHYA}2.oft_blocks": HALF}, "oft_blocks, of an OFT"),
    "glora": ({f"{KOHYA}2.a1.weight": HALF}, "a1.weight, of a GLoRA"),
    "embedding": ({"bundle_emb.sks.clip_l": HALF},
                  "bundle_emb.sks.clip_l, of an embedding.*OneTrainer"),
    "half": ({f"{KOHYA}2.lora_down.weight": HALF}, f"{KOHYA}2.lora_down.weight has no lora_up"),
    "other half": ({f"{KOHYA}2.lora_up.weight": HALF}, f"{KOHYA}2.lora_up.weight has no lora_down"),
    "alpha alone": ({f"{KOHYA}2.alpha": torch.ones(())},
                    f"{KOHYA}2.alpha has no lora_down and no lora_up"),
    "unknown": ({f"{KOHYA}.something": HALF}, "something, which is no LoRA key"),
    "nan": ({f"{KOHYA}.lora_up.weight": torch.full((16, 4), torch.nan)},
            "lora_up.weight has numbers that are not"),
    "infinite": ({f"{KOHYA}.alpha": torch.tensor(torch.inf)},
                 f"{KOHYA}.alpha has numbers that are not finite"),
    "alphas": ({f"{KOHYA}.alpha": torch.ones(2)}, r"alpha of shape \(2,\) is not one number"),
    "no network": ({f"{TO_Q}.lora_A.weight": HALF, f"{TO_Q}.lora_B.weight": HALF.T.contiguous()},
                   f"does not say which network it is of.*rename each key to unet.{TO_Q}.lora_"),
    "third "
    "encoder": ({"lora_te3_a.lora_down.weight": HALF,
                 "lora_te3_a.lora_up.weight": HALF.T.contiguous()},
                      "lora_te3_a.lora_down.weight fits no module"),
    "larger": ({f"{KOHYA}.lora_up.weight": torch.ones(32, 4)},
               f"{KOHYA}.lora_down.weight fits no module"),
    "ranks": ({f"{KOHYA}.lora_up.weight": torch.ones(16, 3)}, "halves of shapes"),
    "twice": ({f"unet.{TO_Q}.lora_A.weight": HALF,
               f"unet.{TO_Q}.lora_B.weight": HALF.T.contiguous()}, "there twice"),
    "two names": ({f"{KOHYA}.lora_A.weight": HALF}, "two names of one thing"),
    "some dora": ({f"{KOHYA}.dora_scale": torch.ones(16, 1)}, "has no DoRA magnitude"),
    "dora of inputs": ({f"{KOHYA}.dora_scale": torch.ones(1, 16)},
                       r"dora_scale of shape \(1, 16\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_used_is_refused_by_its_key(adapter, base, tmp_path, case):
    more, message = REFUSED[case]
    path = K.save_kohya(adapter, tmp_path / "k.safetensors")
    assert X.read_adapter(path, base).layers.keys() == adapter.layers.keys()
    save_file({**load_file(path), **more}, path)
    with pytest.raises(A.LoraFileError, match=message):
        X.read_adapter(path, base)


HEADERS = {  # what the header's LoraConfig says, and what its refusal says
    "rank": ({"unet.r": 8}, "rank 8 and alpha 1.0, its tensors have rank 4"),
    "alpha": ({"unet.lora_alpha": "much"}, "cannot be used"),
    "pattern": ({"unet.alpha_pattern": {"to_(q": 2}}, "cannot be used"),
    "dora": ({"unet.use_dora": True}, "use_dora True"),
    "another network": ({"transformer.r": 4, "transformer.lora_alpha": 8},
                        "LoraConfig of 'transformer'"),
    "no network": ({"r": 4, "lora_alpha": 8}, "so their scale is in doubt"),
    "pissa": ({"unet.init_lora_weights": "pissa"}, "pissa, which changes the base too"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_does_not_go_with_the_tensors_is_refused(adapter, tmp_path, case):
    more, message = HEADERS[case]
    path = X.save_diffusers(adapter, tmp_path / "d.safetensors")
    tensors, header = X.read_safetensors(path)
    configs = json.dumps({**json.loads(header[X.HEADER_KEY]), **more})
    save_file(tensors, path, {X.HEADER_KEY: configs})
    with pytest.raises(A.LoraFileError, match=message):
        X.read_adapter(path)
    save_file(tensors, path, {X.HEADER_KEY: "[1"})
    with pytest.raises(A.LoraFileError, match="no JSON object"):
        X.read_adapter(path)


def test_peft_folders_of_other_adapters_are_refused(adapter, tmp_path):
    folder = X.save_peft(adapter, tmp_path)
    config = json.loads((folder / "unet/adapter_config.json").read_text())
    (folder / "unet/adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(A.LoraFileError, match="its unet is a LOHA"):
        X.read_adapter(folder)


def test_capital_letters_are_a_suffix_too(adapter, tmp_path):
    path = X.save_diffusers(adapter, tmp_path / "LORA.SAFETENSORS")
    assert X.read_adapter(path).layers.keys() == adapter.layers.keys()


def test_numbers_that_are_not_finite_are_not_written(adapter, tmp_path):
    with pytest.raises(A.LoraFileError, match="finite"):
        A.merge_adapters([adapter, adapter], [1.0, float("nan")])
    overflowing, _ = A.merge_adapters([adapter, adapter], [1e38, 1e38])
    overflowing = A.merge_adapters([overflowing, overflowing], [1e38, 1.0])[0]
    with pytest.raises(A.LoraFileError, match="not be finite numbers, so nothing is saved"):
        X.save_diffusers(overflowing, tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("x*"))


def test_a_name_that_ends_another_has_its_own_rank_and_alpha():
    layer, other = (
        A.Layer(torch.ones(rank, 4), torch.ones(4, rank), scale)
        for rank, scale in ((2, 0.5), (3, 2.0))
    )
    named = {"proj_out": other, "block.proj_out": layer, "block.proj_in": layer}
    network = torch.nn.Module()
    network.proj_out, network.block = torch.nn.Linear(4, 4), torch.nn.Module()
    network.block.proj_out, network.block.proj_in = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    inject_adapter_in_model(X.lora_config(named), network)
    assert {name: network.get_submodule(name).scaling["default"]
            for name in named} == pytest.approx(
        {name: layer.scale for name, layer in named.items()})  # fmt: skip


def test_a_failed_save_leaves_the_old_file(adapter, tmp_path, monkeypatch):
    path = X.save_diffusers(adapter, tmp_path / "a.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(
        X, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        X.save_diffusers(adapter, path)
    assert path.read_bytes() == before


# --- merge and extract ----------------------------------------------------------------------------


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
    merged, error = A.merge_adapters([X.read_adapter(path) for path in paths], [0.7, -0.4, 0.5])
    path = X.save_diffusers(merged, tmp_path / "merged.safetensors")
    assert error == 0.0
    assert same(outputs_with(base, path), outputs(both))
    assert max(layer.rank for _, _, layer in merged.every()) == 4 + 4 + 3


def test_merging_down_to_a_rank_is_the_best_approximation(adapter):
    short, error = A.merge_adapters([adapter, adapter], [0.5, 0.5], rank=2)
    full, _ = A.merge_adapters([adapter], [1.0])
    lost = whole = 0.0
    for component, name, layer in full.every():
        delta = layer.delta()
        singular = torch.linalg.svdvals(delta)
        difference = delta - short.layers[component][name].delta()
        assert torch.allclose(difference.norm(), singular[2:].norm(), atol=1e-4)
        lost, whole = lost + difference.square().sum().item(), whole + delta.square().sum().item()
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0.1 < error < 0.9
    kept, error = A.merge_adapters([adapter, adapter], [0.5, 0.5], rank=4)
    assert error < 1e-3
    assert max(layer.rank for _, _, layer in kept.every()) == 4


@pytest.mark.parametrize(("into", "out"), [((24, 3, 3), 4), ((4, 3, 3), 24), ((3,), 24)])
def test_a_layer_of_fewer_channels_than_the_rank_is_kept_whole(into, out):
    generator = torch.Generator().manual_seed(0)
    square = (1,) * (len(into) - 1)
    layer = A.Layer(
        torch.randn(40, *into, generator=generator),
        torch.randn(out, 40, *square, generator=generator),
        0.5,
    )
    short, lost = A.truncate_rank(layer, rank=36)
    assert torch.allclose(short.delta(), layer.delta(), atol=1e-4)
    assert lost < 1e-6


def test_merging_keeps_the_words_and_refuses_dora_and_strangers(adapter):
    other = A.Adapter(adapter.layers, {"base": "another", "trigger_words": "zwx cat"})
    merged, _ = A.merge_adapters([adapter, other], [1, 1])
    assert merged.notes == {"trigger_words": "sks dog, zwx cat"}
    layer = A.Layer(torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    dora = A.Adapter({"unet": {"a": A.Layer(layer.down, layer.up, 1.0, torch.ones(4))}})
    with pytest.raises(A.LoraFileError, match="DoRA"):
        A.merge_adapters([dora, dora], [1, 1])
    wide = A.Adapter({"unet": {"a": A.Layer(torch.zeros(1, 6), torch.zeros(4, 1), 1.0)}})
    with pytest.raises(A.LoraFileError, match="different bases"):
        A.merge_adapters([A.Adapter({"unet": {"a": layer}}), wide], [1, 1])
    with pytest.raises(A.LoraFileError, match="one each"):
        A.merge_adapters([adapter], [1, 1])


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
    adapter, figures = A.extract_adapter(*models, rank=3)
    assert figures["error"] < 1e-3
    assert figures["outside"] == 0.0
    assert same(
        outputs_with(base, X.save_diffusers(adapter, tmp_path / "x.safetensors")), wanted, 1e-4
    )


def test_extracting_reports_what_a_lora_cannot_hold(base):
    before, after = load(base), load(base)
    for parameter in after.unet.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(0)
        )
    _, low = A.extract_adapter({"unet": before.unet}, {"unet": after.unet}, rank=1)
    _, high = A.extract_adapter({"unet": before.unet}, {"unet": after.unet}, rank=8)
    assert 0 < high["error"] < low["error"] < 1
    assert 0 < low["outside"] == high["outside"] < 0.2
    with pytest.raises(A.LoraFileError, match="nothing to extract"):
        A.extract_adapter({"unet": before.unet}, {"unet": before.unet}, rank=1)
    with pytest.raises(A.LoraFileError, match="differ in shape"):
        A.extract_adapter({"unet": before.unet}, {"unet": after.text_encoder}, rank=1)


@pytest.mark.parametrize("shape", [(700, 600), (20, 30, 3, 3)])
def test_extract_layer_is_near_the_best(shape):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(shape, generator=generator)
    difference.flatten(1)[:] += 30 * torch.randn(shape[0], 1, generator=generator) / shape[0] ** 0.5
    layer = A.extract_layer(difference, rank=4)
    best = torch.linalg.svdvals(difference.flatten(1))[4:].norm()
    assert layer.rank == 4
    assert layer.delta().shape == shape
    assert (difference - layer.delta()).norm() < 1.01 * best


def test_the_same_lora_is_the_same_file(adapter, tmp_path):
    """Byte for byte, whatever order the library hashes the header's notes in."""
    noted = A.Adapter(adapter.layers, {"base": "b", "trigger_words": "sks", "more": "x"})
    files = {X.save_diffusers(noted, tmp_path / f"{k}.safetensors").read_bytes() for k in range(6)}
    assert len(files) == 1


# --- merging as peft does -------------------------------------------------------------------------


@pytest.mark.parametrize("module", [torch.nn.Linear(12, 10), torch.nn.Conv2d(6, 8, 3)], ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_a_merge_of_updates_is_pefts_own(method, module, monkeypatch):
    def bernoulli(input):  # theirs draws a new LoRA first, and other numbers after that
        return (torch.rand(input.shape, generator=torch.Generator().manual_seed(7)) < input).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    adapters, tuned = [], None
    generator = torch.Generator().manual_seed(0)
    out, *into = module.weight.shape
    for name, rank in (("1", 2), ("2", 4)):
        layer = A.Layer(torch.randn(rank, *into, generator=generator),
                        torch.randn(out, rank, *[1] * (len(into) - 1), generator=generator), 0.5)
        adapters.append(A.Adapter({"unet": {"a": layer}}))
        config = X.lora_config({"a": layer})
        if tuned is None:
            tuned = get_peft_model(torch.nn.ModuleDict({"a": module}), config, name)
        else:
            tuned.add_adapter(name, config)
        copy_weights(tuned.base_model.model["a"], layer, name)
    tuned.add_weighted_adapter(["1", "2"], [0.7, -0.4], "both", f"{method}_svd", density=0.3)
    wanted = tuned.base_model.model["a"].get_delta_weight("both")
    tuned.unload()
    merged, error = A.merge_adapters(adapters, [0.7, -0.4], method=method, density=0.3)
    summed, _ = A.merge_adapters(adapters, [0.7, -0.4])
    layer = merged.layers["unet"]["a"]
    assert layer.rank == 4
    assert 0 < error < 1
    assert torch.allclose(layer.delta(), wanted, atol=1e-4)
    assert not torch.allclose(wanted, summed.layers["unet"]["a"].delta(), atol=1e-1)


def test_what_dare_keeps_is_drawn_by_the_seed_alone(adapter):
    def updates(seed):
        torch.rand(1)
        merged, _ = A.merge_adapters([adapter, adapter], [1, 1], method="dare_linear", seed=seed)
        return [layer.delta() for _, _, layer in merged.every()]

    first, again, other = updates(1), updates(1), updates(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
