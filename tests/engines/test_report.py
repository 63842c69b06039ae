"""The report tells a run that learned from one that did not, and gives nothing private away."""

import ast
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from dbcore import TOY_BASE
from dbcore.engines import report
from dbcore.engines.prior import cache_dir


@dataclass
class Config:
    pretrained_model_name_or_path: str = "someone/some-base"
    revision: str | None = None
    instance_prompt: str = "a photo of sks dog"
    validation_prompt: list[str] = field(default_factory=lambda: ["sks dog on the beach"])
    instance_data_dir: str = str(Path.home() / "photos" / "my dog")
    adapter: str = "lora"
    rank: int = 4
    num_report_images: int = 4
    hub_token: str | None = "hf_thisIsASecretThatNobodyMaySee"


class Painter(torch.nn.Module):
    """Stands for a UNet: one grey level out of two linear layers."""

    def __init__(self):
        super().__init__()
        self.mid_block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 5),
                                              "to_v": torch.nn.Linear(6, 5)})
        for layer in self.mid_block.values():
            torch.nn.init.constant_(layer.weight, 0.1)

    def forward(self, x):
        return self.mid_block["to_q"](x) + self.mid_block["to_v"](x)


def trained(strength=0.0, alpha=8, rank=2):
    """{"unet": a Painter with LoRA, its B matrices constant `strength`}."""
    torch.manual_seed(0)
    unet = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha,
                                              target_modules=["to_q", "to_v"]),
                                   Painter())
    for layer in unet.mid_block.values():
        torch.nn.init.constant_(layer.lora_A["default"].weight, 1.0)
        torch.nn.init.constant_(layer.lora_B["default"].weight, strength)
    return {"unet": unet}


def painter_of(modules):
    def draw(prompts, seeds):
        with torch.no_grad():
            level = modules["unet"](torch.ones(1, 6)).mean().sigmoid().item() * 255
        return [Image.new("RGB", (8, 8), (int(level),) * 3) for _ in seeds]
    return draw


def run(tmp_path, strength, config=None, history=({"step": 1, "loss": 0.5},)):
    modules = trained(strength)
    evidence = report.write_report(modules, painter_of(modules), config or Config(), tmp_path,
                                   list(history), seconds=12.0)
    return evidence, (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(report, "hf_hub_download",
                        lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))


def test_a_run_that_learned_is_told_from_one_that_did_not(tmp_path):
    evidence, card = run(tmp_path / "learned", strength=0.5)
    assert evidence.visible
    assert evidence.difference > 10
    assert "WARNING" not in card
    evidence, card = run(tmp_path / "idle", strength=0.0)
    assert not evidence.visible
    assert evidence.difference == 0
    assert evidence.overall == 0
    assert "WARNING: nothing visible was learned" in card
    assert "learning_rate" in card


def test_without_pictures_the_size_of_the_update_is_told_and_nothing_is_claimed(tmp_path):
    evidence, card = run(tmp_path, strength=0.5, config=Config(num_report_images=0))
    assert evidence.difference is None
    assert not evidence.visible
    assert f"The update is {evidence.overall:.2%}" in card
    assert "on_off.png" not in card
    assert not (tmp_path / "report" / "on_off.png").exists()
    assert (tmp_path / "report" / "update_by_layer.png").exists()


def test_update_is_s_b_a_over_w():
    modules = trained(strength=0.5, alpha=8, rank=2)
    sizes, overall = report.update_sizes(modules)
    layer = modules["unet"].mid_block["to_q"]
    delta = 8 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (delta.norm() / layer.base_layer.weight.norm()).item()
    assert sizes == {f"unet.mid_block.{name}": pytest.approx(expected) for name in ("to_q", "to_v")}
    assert overall == pytest.approx(expected)


def test_adapters_off_is_the_base_and_everything_comes_back():
    modules, plain, x = trained(strength=0.5), Painter(), torch.ones(1, 6)
    plain.load_state_dict({name.replace("base_layer.", ""): value for name, value
                           in modules["unet"].state_dict().items() if "lora" not in name})
    before = modules["unet"](x)
    wanted = [parameter.requires_grad for parameter in modules["unet"].parameters()]
    with report.adapters_off(modules):
        assert torch.equal(modules["unet"](x), plain(x))
    assert torch.equal(modules["unet"](x), before)
    assert [parameter.requires_grad for parameter in modules["unet"].parameters()] == wanted


def test_loss_is_told_apart_by_timestep():
    history = [{"step": 1, "loss": 0.5, "timesteps": [10, 900], "losses": [0.9, 0.1]},
               {"step": 2, "loss": 0.5, "timesteps": [20], "losses": [0.7]}]
    bands = report.loss_by_band(history, [0, 500, 1000])
    assert bands == {"t 0 to 499": pytest.approx(0.8), "t 500 to 999": pytest.approx(0.1)}
    assert report.loss_by_band([{"step": 1, "loss": 1.0}], [0, 500]) == {}
    assert report.band_edges(history) == [0, 180, 360, 541, 721, 901]


def test_loss_is_told_apart_by_a_flows_times_too():
    history = [{"step": 1, "loss": 0.5, "timesteps": [0.05, 0.95], "losses": [0.9, 0.1]}]
    bands = report.loss_by_band(history, report.band_edges(history))
    assert bands == {"t 0.0 to 0.2": pytest.approx(0.9), "t 0.8 to 1.0": pytest.approx(0.1)}


def test_plots_and_pictures_are_there_and_linked(tmp_path):
    grid = tmp_path / "validation" / "step-000050" / "grid.png"
    grid.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(grid)
    _, card = run(tmp_path, strength=0.5)
    links = ["report/on_off.png", "report/loss_by_timestep.png", "report/update_by_layer.png",
             "validation/step-000050/grid.png"]
    for link in links:
        assert f"]({link})" in card
        assert np.asarray(Image.open(tmp_path / link)).size
    assert "[50](" in card
    assert "12 s" in card
    assert "GB" in card


def test_the_animation_has_a_frame_a_validation_in_order_of_steps(tmp_path):
    for step, (colour, width) in {100: ("lime", 20), 50: ("red", 16)}.items():
        grid = tmp_path / "validation" / f"step-{step:06d}" / "grid.png"
        grid.parent.mkdir(parents=True)
        Image.new("RGB", (width, 16), colour).save(grid)
    _, card = run(tmp_path, strength=0.5)
    assert "](training.gif)" in card
    animation, seen = Image.open(tmp_path / "training.gif"), []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        seen.append((animation.convert("RGB").getpixel((10, 8)), animation.info["duration"]))
    assert seen == [((255, 0, 0), report.FRAME), ((0, 255, 0), report.LAST_FRAME)]
    assert (animation.size, animation.info["loop"]) == ((20, 16), 0)


def test_without_validation_there_is_no_animation(tmp_path):
    _, card = run(tmp_path, strength=0.5)
    assert "training.gif" not in card
    assert not (tmp_path / "training.gif").exists()


def test_front_matter_is_what_the_hub_reads(tmp_path):
    _, card = run(tmp_path, strength=0.5)
    data = ModelCard(card).data
    assert (data.base_model, data.library_name) == ("someone/some-base", "diffusers")
    assert data.instance_prompt == "a photo of sks dog"
    assert {"lora", "dreambooth"} <= set(data.tags)
    assert [entry["text"] for entry in data.widget] == ["a photo of sks dog",
                                                        "sks dog on the beach"]
    assert all((tmp_path / entry["output"]["url"]).is_file() for entry in data.widget)
    assert data.license == "other"  # nothing is known of this base, and nothing is made up


def test_licence_and_provenance_are_the_bases_own_words(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: cc0-1.0\nprovenance: "
                                    "A toy, trained on renders.\n---\n# x\n")
    _, card = run(tmp_path, strength=0.5, config=Config(pretrained_model_name_or_path=str(base)))
    assert "Licence: cc0-1.0. A toy, trained on renders." in card
    assert ModelCard(card).data.license == "cc0-1.0"
    assert ModelCard(card).data.base_model == "base"
    assert str(tmp_path) not in card


def test_the_card_says_where_the_base_is_the_toy(tmp_path):
    _, card = run(tmp_path, strength=0.5,
                  config=Config(pretrained_model_name_or_path=str(TOY_BASE)))
    assert "Every image it learnt from and every weight was made by dbcore's own code" in card


def test_every_setting_is_listed_but_no_secret_and_no_home(tmp_path):
    _, card = run(tmp_path, strength=0.5)
    assert "| rank | 4 |" in card
    assert "| instance_data_dir | ~/photos/my dog |" in card
    assert "hf_this" not in card
    assert "hub_token" not in card
    assert str(Path.home()) not in card


def test_working_folder_paths_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.shown(str(tmp_path / "data" / "toy")) == "data/toy"
    # whose folders these are is nobody's business
    assert report.shown("/mnt/anna/photos") == "photos"
    assert report.shown("a | b") == "a \\| b"
    assert report.shown(3) == "3"


@pytest.mark.parametrize(("asked", "expected"), [
    (None, ["a photo of sks dog"]),
    ("x", ["a photo of sks dog", "x"]),
    (["x", "x", "a photo of sks dog", "y", "z", "w"], ["a photo of sks dog", "x", "y", "z"]),
])
def test_prompts_are_few_and_different(asked, expected):
    assert report.report_prompts(Config(validation_prompt=asked)) == expected


def test_peak_memory_is_that_of_a_process_with_torch_in_it():
    assert 50e6 < report.peak_memory()[0] < 500e9


@pytest.mark.parametrize("prompt",
                         ['a "photo" of sks dog', "a dog's \\ bowl", 'two\nlines "x"', "собака"])
def test_the_cards_code_is_python_whatever_the_prompt(prompt, tmp_path):
    _, card = run(tmp_path, strength=0.5,
                  config=Config(instance_prompt=prompt, pretrained_model_name_or_path='a/"b"'))
    code = card.split("```python\n")[1].split("```")[0]
    words = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert prompt in words
    assert 'a/"b"' in words


def test_a_user_without_a_home_gets_a_card(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("pathlib.Path.expanduser",
                        lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    _, card = run(tmp_path, strength=0.5)
    assert "| rank | 4 |" in card
    monkeypatch.delenv("DBCORE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir().is_absolute()
