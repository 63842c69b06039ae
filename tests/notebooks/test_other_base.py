"""Every notebook runs with BASE set to the form's other choice, Stable Diffusion 1.5, here a
miniature of it.

The miniature lies in a hub's cache under its true name, has the original's layers, names and
sampler, and random weights. So what a notebook claims of a trained model need not hold here: it is
printed, as for every learner, and stops nothing.
"""

import json

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from notebook_guards import NOTEBOOKS, code_cells, tags
from pipelines import (
    make_flux2_miniature,
    make_sd15_miniature,
    make_sd15_pipeline,
    make_sdxl_miniature,
    make_tokenizer,
)
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Short runs, in the fewest steps that a notebook can divide as it does.
SHORT = {
    "00_meet_the_model": {"STEPS": 5},
    "01_data_prep": {},
    "02_lora_injection": {"STEPS": 2, "RANK": 1, "NUM_INFERENCE_STEPS": 4},
    "03_prior_preservation": {"STEPS": 4, "CLASS_IMAGES": 10},
    "04_gpu_training": {"STEPS": 8},
    "05_inference": {"STEPS": 2, "NUM_INFERENCE_STEPS": 4},
    "06_text_encoder": {"STEPS": 2},
    "07_evaluation": {"STEPS": 3, "CLASS_IMAGES": 2},
    "08_failure_lab": {"STEPS": 4},
    "09_your_own_subject": {"STEPS": 4},
    "10_beyond_dreambooth": {"STEPS": 2, "CLASS_IMAGES": 2, "DRAW_STEPS": 4},
}

# Before a notebook's first cell: the memory of a T4, less what CUDA's context takes.
T4 = """import torch
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, 15e9 / whole))"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"), make_sd15_miniature)


@pytest.fixture(scope="module")
def large_hub(tmp_path_factory):
    """With weights as many as the original's."""
    return make_hub(tmp_path_factory.mktemp("large_hub"), make_sd15_pipeline)


def make_hub(home, make):
    """A folder for HF_HOME, as the hub leaves it: a base, and the encoders that measure
    pictures."""
    make(snapshot(home, SD15))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    clip, dino = snapshot(home, "openai/clip-vit-base-patch32"), snapshot(home,
                                                                          "facebook/dino-vits16")
    tokenizer = make_tokenizer(clip)
    marks = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id")
             for which in ("bos", "eos", "pad")}
    words = {**small, **marks, "vocab_size": len(tokenizer)}
    CLIPModel(CLIPConfig(vision_config=small, text_config=words, projection_dim=8)).save_pretrained(
        clip)
    ViTModel(ViTConfig(**small), add_pooling_layer=False).save_pretrained(dino)
    for folder in (clip, dino):
        values = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return home


def snapshot(home, name):
    """The folder of a model's files in the hub's cache."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    files = folder / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    return files


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_stable_diffusion_by_its_name(name, hub, tmp_path, monkeypatch):
    execute(name, hub, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHORT)
def test_stable_diffusion_at_its_size_fits_a_t4(name, large_hub, tmp_path, monkeypatch):
    execute(name, large_hub, tmp_path, monkeypatch, T4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_sd15_miniature, make_sdxl_miniature, make_flux2_miniature])
@pytest.mark.parametrize("name", ["02_lora_injection", "03_prior_preservation", "05_inference"])
def test_another_subject_on_a_base_of_each_family(name, make, hub, tmp_path, monkeypatch):
    """To the end, and with no more than two denoisers in memory there."""
    base = str(make(tmp_path / "base"))
    nb = prepared(name, BASE=base, SUBJECT="teapot", **SHORT[name])
    nb.cells.append(nbformat.v4.new_code_cell(COUNT))
    run(nb, hub, tmp_path, monkeypatch)
    assert 1 <= int(nb.cells[-1].outputs[0].text) <= 2


@pytest.mark.slow
def test_a_run_of_ones_own_goes_on_where_it_was_kept(hub, tmp_path, monkeypatch):
    """As after a disconnect: all cells again, with the run's folder still there."""
    kept = tmp_path / "kept"
    for steps in (2, 4):
        values = {"BASE": SD15, "STEPS": steps, "RUN_DIR": str(kept)}
        run(prepared("09_your_own_subject", **values), hub, tmp_path, monkeypatch)
    records = [json.loads(line) for line in (kept / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert (kept / "checkpoint-2").is_dir()


# How many networks of the denoiser's class are in memory.
COUNT = """import gc
gc.collect()
print(sum(type(one) is type(base.denoiser) for one in gc.get_objects()))"""


def execute(name, hub, tmp_path, monkeypatch, first=""):
    """Run a notebook on the base in a hub's cache; `first`: what its kernel does before."""
    nb = prepared(name, BASE=SD15, **SHORT[name])
    nb.cells.insert(0, nbformat.v4.new_code_cell(first))
    run(nb, hub, tmp_path, monkeypatch)


def prepared(name, **values):
    """A notebook with other parameters."""
    nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    set_parameters(nb, **values)
    return nb


def run(nb, hub, tmp_path, monkeypatch):
    """Run it in an empty folder, as a learner does: what does not hold is printed."""
    monkeypatch.setenv("HF_HOME", str(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.delenv("DBCORE_STRICT", raising=False)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()


def set_parameters(nb, **values):
    """Other values in the parameters cell, where each has to be there already."""
    (cell,) = [cell for cell in code_cells(nb) if "parameters" in tags(cell)]
    lines = cell.source.splitlines()
    for name, value in values.items():
        (at,) = [k for k, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[at] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)
