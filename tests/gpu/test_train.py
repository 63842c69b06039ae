"""Training on a GPU: in half precision as in float32, without waiting, in a T4's memory."""

import pytest
import torch
from runs import read_run
from safetensors.torch import load_file

from dbcore.config import TrainConfig
from dbcore.engines.trainer import train

PHOTOS = "data/subjects/dog"


def run(base, folder, **options):
    return train(
        TrainConfig(
            pretrained_model_name_or_path=str(base),
            instance_data_dir=PHOTOS,
            instance_prompt="a photo of sks dog",
            output_dir=str(folder),
            report_to="none",
            num_report_images=0,
            **{"max_train_steps": 2, "resolution": 512, **options},
        )
    )


@pytest.fixture(scope="module")
def whole(sd15, tmp_path_factory):
    """The folder of the same two steps in float32, on the same device."""
    return run(
        sd15, tmp_path_factory.mktemp("whole") / "run", resolution=512, mixed_precision="no"
    ).parent


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_steps_at_512_on_a_gpu_learn_in_half_what_they_learn_in_float32(
    sd15, whole, tmp_path, precision
):
    torch.cuda.reset_peak_memory_stats()
    path = run(sd15, tmp_path / "run", resolution=512, mixed_precision=precision)
    memory = torch.cuda.max_memory_allocated()
    half, full = (read_run(folder)["log"] for folder in (path.parent, whole))
    assert not any("skipped" in record for record in half)
    assert [record["losses"] for record in half] == [
        pytest.approx(record["losses"], rel=0.05) for record in full
    ]
    assert likeness(path, whole / path.name) > 0.5  # of unrelated updates it is 0
    print(f"peak memory of the GPU: {memory / 1e9:.2f} GB")
    assert memory < 16e9  # a T4's


def likeness(path, other):
    """The cosine of two LoRAs' B matrices, which begin at 0: 1 where both have learned the same."""
    one, two = (
        torch.cat([t.flatten() for name, t in sorted(load_file(file).items()) if "lora_B" in name])
        for file in (path, other)
    )
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))
