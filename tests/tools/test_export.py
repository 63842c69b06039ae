"""export, merge and extract as commands: files on disk in, files on disk out, same networks."""

import argparse
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import make_tiny_pipeline
from safetensors.torch import load_file, save_file

from dbcore.config import ConfigError
from dbcore.models.adapter import Adapter, Layer
from dbcore.models.kohya import save_kohya
from dbcore.models.lora_files import read_adapter, read_safetensors, save_diffusers
from dbcore.tools import export, extract, merge
from dbcore.utils.errors import InputError


def run(tool, *words):
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    tool.main(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("base"))
    (folder / "recommended.json").write_text('{"rank": 4}')
    return folder


def load(folder, lora=None):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipeline


def predict(pipeline):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = pipeline.tokenizer("a photo of sks dog", padding="max_length",
                             return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.unet(latents, 500,
                             encoder_hidden_states=pipeline.text_encoder(ids)[0]).sample


@pytest.fixture(scope="module", params=["lora", "dora"])
def lora(request, base, tmp_path_factory):
    """A run's folder with a LoRA of both networks, alpha not rank."""
    pipeline = load(base)
    layers, configs = {}, {}
    for component, targets in [("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj"])]:
        network = getattr(pipeline, component)
        config = LoraConfig(r=4, lora_alpha=2, target_modules=targets,
                            use_dora=request.param == "dora")
        network.add_adapter(config)
        for name, parameter in network.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(3)
                )
        layers[component] = {k: v.data for k, v in get_peft_model_state_dict(network).items()}
        configs[component] = {**config.to_dict(), "target_modules": targets}
    folder = tmp_path_factory.mktemp("run")
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    return folder, predict(pipeline)


def test_export_merged(lora, base, tmp_path, capsys):
    folder, wanted = lora
    words = ["--lora", folder, "--pretrained_model_name_or_path", base, "--format", "merged"]
    run(export, *words, "--output", tmp_path / "whole")
    assert torch.allclose(predict(load(tmp_path / "whole")), wanted, atol=1e-5)
    assert json.loads((tmp_path / "whole/recommended.json").read_text()) == {"rank": 4}
    assert "16 layers of the unet" in capsys.readouterr().out
    run(export, *words, "--output", tmp_path / "none", "--lora_scale", 0)
    if "magnitude" not in str(read_safetensors(folder
                                               / "pytorch_lora_weights.safetensors")[0].keys()):
        assert torch.allclose(predict(load(tmp_path / "none")), predict(load(base)), atol=1e-5)


def test_merged_keeps_the_precision_of_the_base(base, tmp_path):
    half = load(base).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    layer = Layer(torch.ones(1, 16), torch.ones(16, 1), 0.1)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    export.save_merged(Adapter({"unet": {name: layer}}), tmp_path / "half", tmp_path / "out")
    key = f"{name}.weight"
    before, _ = read_safetensors(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    after, _ = read_safetensors(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert after[key].dtype == torch.float16
    assert torch.equal(after[key], (before[key].float() + 0.1).half())


def test_export_kohya_and_back(lora, base, tmp_path):
    folder, wanted = lora
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    run(export, "--lora", folder, "--format", "kohya", "--output", kohya, "--trigger_words",
        "sks dog")
    tensors, header = read_safetensors(kohya)
    assert header["modelspec.trigger_phrase"] == "sks dog"
    assert all(key.startswith("lora_") for key in tensors)
    words = ["--format", "diffusers", "--pretrained_model_name_or_path", base]
    run(export, "--lora", kohya, *words, "--output", back)
    assert torch.allclose(predict(load(base, back)), wanted, atol=1e-5)
    assert read_safetensors(back)[1]["trigger_words"] == "sks dog"


def test_export_peft_and_back(lora, base, tmp_path):
    folder, wanted = lora
    run(export, "--lora", folder, "--format", "peft", "--output", tmp_path / "peft")
    back = tmp_path / "back.safetensors"
    run(export, "--lora", tmp_path / "peft", "--format", "diffusers", "--output", back)
    assert torch.allclose(predict(load(base, back)), wanted, atol=1e-5)


def test_nothing_is_overwritten_unasked(tmp_path, base):
    layer = Layer(torch.zeros(1, 16), torch.zeros(16, 1), 1.0)
    path = save_diffusers(
        Adapter({"unet": {"mid_block.attentions.0.proj_in": layer}}), tmp_path / "a.safetensors"
    )
    before = path.read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        run(export, "--lora", path, "--format", "kohya", "--output", path)
    with pytest.raises(ValueError, match="--overwrite"):
        run(merge, "--lora", path, path, "--output", path)
    assert path.read_bytes() == before
    run(export, "--lora", path, "--format", "kohya", "--output", path, "--overwrite")
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match="pretrained_model_name_or_path"):
        run(export, "--lora", path, "--format", "merged", "--output", tmp_path / "x")


def test_an_output_is_called_as_a_lora_file_is(lora, tmp_path):
    for name in ("lora", "lora.bin", "lora.safetensor"):
        for tool, words in ((export, ["--format", "kohya"]), (merge, [lora[0]])):
            with pytest.raises(InputError, match=r"ends in .safetensors"):
                run(tool, "--lora", lora[0], *words, "--output", tmp_path / name)
    run(export, "--lora", lora[0], "--format", "diffusers", "--output",
        tmp_path / "LORA.SAFETENSORS")
    assert read_adapter(tmp_path / "LORA.SAFETENSORS").layers.keys() == {"unet", "text_encoder"}
    run(export, "--lora", lora[0], "--format", "peft", "--output", tmp_path / "folder")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_scales_and_weights_are_finite_numbers(lora, base, tmp_path, number, capsys):
    scale = ["--format", "merged", "--pretrained_model_name_or_path", base,
             f"--lora_scale={number}"]
    for tool, words in ((export, scale), (merge, [f"--weights={number}"])):
        with pytest.raises(SystemExit):
            run(tool, "--lora", lora[0], *words, "--output", tmp_path / "x.safetensors")
        assert f"{number}: give a finite number" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_merge_that_leaves_the_numbers_is_not_written(lora, base, tmp_path):
    with pytest.raises(ConfigError, match=r"--lora_scale 1e\+39 in torch.float32: "
                       r".* has numbers that are not finite"):
        run(export, "--lora", lora[0], "--format", "merged", "--pretrained_model_name_or_path",
            base, "--lora_scale", "1e39",
            "--output", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_with_a_weight_that_is_not_finite_is_refused_by_its_name(base, tmp_path):
    tuned = shutil.copytree(base, tmp_path / "tuned")
    path = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"--tuned .*: conv_in.bias of its unet has numbers "
                       "that are not finite"):
        run(extract, "--pretrained_model_name_or_path", base, "--tuned", tuned, "--output",
            tmp_path / "e.safetensors")


def test_what_kohyas_scripts_leave_out_is_said(tmp_path, capsys):
    inside = "mid_block.attentions.0.proj_in"
    for name, rows in ((inside, None), ("conv_in", None), (inside, torch.ones(16))):
        layer = Layer(torch.zeros(1, 16), torch.zeros(16, 1), 1.0, rows)
        path = save_diffusers(Adapter({"unet": {name: layer}}), tmp_path / "a.safetensors")
        run(export, "--lora", path, "--format", "kohya", "--output", tmp_path / "k.safetensors",
            "--overwrite")
        said = capsys.readouterr().out
        assert ("leave out conv_in" in said) == (name == "conv_in")
        assert ("leaves DoRA's magnitudes out" in said) == (rows is not None)


def test_merge(tmp_path, base, capsys):
    """Half of one and a quarter of another, one of them in kohya's names."""
    generator = torch.Generator().manual_seed(0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layers = [
        Layer(torch.randn(r, 16, generator=generator), torch.randn(16, r, generator=generator), 0.7)
        for r in (3, 2)
    ]
    first = save_diffusers(Adapter({"unet": {name: layers[0]}}), tmp_path / "a.safetensors")
    second = save_kohya(Adapter({"unet": {name: layers[1]}}), tmp_path / "b.safetensors")
    words = ["--lora", first, second, "--weights", 0.5, 0.25, "--pretrained_model_name_or_path",
             base]
    run(merge, *words, "--output", tmp_path / "sum.safetensors")
    merged = read_adapter(tmp_path / "sum.safetensors").layers["unet"][name]
    assert merged.rank == 5
    assert "rank 5, relative error 0.0000" in capsys.readouterr().out
    assert torch.allclose(merged.delta(), 0.5 * layers[0].delta() + 0.25 * layers[1].delta(),
                          atol=1e-5)
    run(merge, *words, "--output", tmp_path / "short.safetensors", "--rank", 2)
    assert read_adapter(tmp_path / "short.safetensors").layers["unet"][name].rank == 2
    run(merge, *words, "--output", tmp_path / "ties.safetensors", "--method", "ties", "--density",
        0.3)
    ties = read_adapter(tmp_path / "ties.safetensors").layers["unet"][name]
    assert ties.rank == 3
    assert not torch.allclose(ties.delta(), merged.delta(), atol=0.1)
    for wrong in [["--rank", 0], ["--weights", 1], ["--method", "ties", "--density", 0],
                  ["--method", "dare_ties", "--density", 1.5]]:
        with pytest.raises(ValueError, match="give"):
            run(merge, "--lora", first, second, "--output", tmp_path / "x.safetensors", *wrong)


def test_a_density_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="--density does nothing with --method sum"):
        run(merge, "--lora", "a", "--output", tmp_path / "x.safetensors", "--density", 0.5)


def test_extract(base, tmp_path, capsys):
    tuned = load(base)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(16, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    tuned.unet.get_submodule(name).weight.data += change
    tuned.save_pretrained(tmp_path / "tuned")
    words = ["--pretrained_model_name_or_path", base, "--tuned", tmp_path / "tuned", "--rank", 2]
    run(extract, *words, "--output", tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert [found for _, found, _ in adapter.every()] == [name]
    assert torch.allclose(adapter.layers["unet"][name].delta(), change, atol=1e-4)
    assert "error 0.0000" in capsys.readouterr().out
    assert torch.allclose(predict(load(base, tmp_path / "x.safetensors")), predict(tuned),
                          atol=1e-4)


# --- only what an export wrote is replaced --------------------------------------------------------


@pytest.fixture
def theirs(tmp_path):
    """A folder of someone's own."""
    (tmp_path / "home" / "deep").mkdir(parents=True)
    (tmp_path / "home" / "deep" / "novel.txt").write_text("mine")
    return tmp_path / "home"


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_folder_of_others_is_never_replaced(form, lora, base, theirs):
    words = ["--format", form, "--pretrained_model_name_or_path", base, "--overwrite"]
    with pytest.raises(InputError, match=r"deep/novel.txt in it was written by no export"):
        run(export, "--lora", lora[0], *words, "--output", theirs)
    assert (theirs / "deep" / "novel.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_an_earlier_export_is_replaced_whole_unless_something_was_added(form, lora, base, tmp_path):
    words = ["--format", form, "--pretrained_model_name_or_path", base, "--overwrite", "--output",
             tmp_path / "out"]
    run(export, "--lora", lora[0], *words)
    first = {path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*")}
    run(export, "--lora", lora[0], *words)
    assert {path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*")} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt in it was written by no export"):
        run(export, "--lora", lora[0], *words)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_that_is_no_lora_is_never_replaced(lora, base, tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file({"conv_in.weight": torch.zeros(2)}, weights)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    own = save_diffusers(read_adapter(lora[0]), run_folder / "pytorch_lora_weights.safetensors")
    (run_folder / "config.yaml").write_text("")
    before = weights.read_bytes(), own.read_bytes()
    for tool, words in ((export, ["--format", "diffusers"]), (merge, [])):
        for output, said in ((weights, "no LoRA file"), (own, "a run's own LoRA")):
            with pytest.raises(InputError, match=said):
                run(tool, "--lora", lora[0], *words, "--output", output, "--overwrite")
    assert (weights.read_bytes(), own.read_bytes()) == before


def test_a_base_that_is_not_there_is_a_clear_error(lora, tmp_path):
    words = ["--format", "merged", "--pretrained_model_name_or_path", tmp_path / "nowhere"]
    with pytest.raises(ConfigError, match="nowhere: no pipeline can be loaded from it"):
        run(export, "--lora", lora[0], *words, "--output", tmp_path / "out")
    words = ["--pretrained_model_name_or_path", tmp_path, "--tuned", tmp_path]
    with pytest.raises(ConfigError, match="no pipeline can be loaded from it"):
        run(extract, *words, "--output", tmp_path / "out.safetensors")
