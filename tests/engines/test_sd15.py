"""The same code on Stable Diffusion 1.5's true shape: random weights serve for memory and for the
path."""

import json

import pytest
import torch
from pipelines import make_sd15_pipeline
from runs import read_run
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines.report import peak_memory
from dbcore.engines.train import train

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


@pytest.fixture(scope="module")
def whole(sd15, tmp_path_factory):
    """The folder of the same two steps in float32, on the same device."""
    return run(sd15, tmp_path_factory.mktemp("whole") / "run", resolution=512,
               mixed_precision="no").parent


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_steps_at_512_on_a_gpu_learn_in_half_what_they_learn_in_float32(sd15, whole, tmp_path,
                                                                            precision):
    torch.cuda.reset_peak_memory_stats()
    path = run(sd15, tmp_path / "run", resolution=512, mixed_precision=precision)
    memory = torch.cuda.max_memory_allocated()
    half, full = (read_run(folder)["log"] for folder in (path.parent, whole))
    assert not any("skipped" in record for record in half)
    assert [record["losses"] for record in half] == [pytest.approx(record["losses"], rel=0.05)
                                                     for record in full]
    assert likeness(path, whole / path.name) > 0.5  # of unrelated updates it is 0
    print(f"peak memory of the GPU: {memory / 1e9:.2f} GB")
    assert memory < 16e9  # a T4's


def likeness(path, other):
    """The cosine of two LoRAs' B matrices, which begin at 0: 1 where both have learned the same."""
    one, two = (torch.cat([t.flatten() for name, t in sorted(load_file(file).items())
                           if "lora_B" in name])
                for file in (path, other))
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))
