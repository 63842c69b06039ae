"""The same code on Stable Diffusion 1.5's true shape: random weights serve for memory and for the
path."""

import json

import pytest
from pipelines import make_sd15_pipeline
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines.report import peak_memory
from dbcore.engines.trainer import train

PHOTOS = "data/subjects/dog"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return make_sd15_pipeline(tmp_path_factory.mktemp("sd15"))


def run(base, folder, **options):
    return train(TrainConfig(
        pretrained_model_name_or_path=str(base), instance_data_dir=PHOTOS,
        instance_prompt="a photo of sks dog",
        output_dir=str(folder), max_train_steps=2, report_to="none", **options))


def trained_norm(path):
    """Norm of all B matrices: 0 before the first step."""
    return sum(float(t.norm()) for name, t in load_file(path).items() if "lora_B" in name)


@pytest.mark.slow
def test_two_steps_at_256_on_a_cpu(sd15, tmp_path, monkeypatch):
    (sd15 / "recommended.json").write_text(json.dumps({"num_inference_steps": 1}))
    path = run(sd15, tmp_path / "run", resolution=256)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert len(shapes) == 256
    assert trained_norm(path) > 0
    assert (shapes["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"]
            == (4, 768))
    memory, whose = peak_memory()
    print(f"peak memory of the process: {memory / 1e9:.2f} GB")
    assert whose == "process"
    assert memory < 12e9
