"""The protocol on a small random base: prompts, floor and ceiling, resuming, and the table."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_tiny_pipeline

from dbcore import TOY_BASE
from dbcore.__main__ import main
from dbcore.config import ConfigError, TrainConfig, write_yaml
from dbcore.engines import evaluate as engine
from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, save_lora
from dbcore.models.stable_diffusion import StableDiffusion
from dbcore.tools import evaluate as tool

PROMPTS = {"scenes": ["in the snow", "on the beach"], "looks": ["red"]}


def colours(images):
    return torch.stack([torch.tensor(np.asarray(p.resize((2, 2)), dtype=np.float32)).flatten() - 128
                        for p in images])


def lengths(prompts):
    return torch.stack([torch.full((12,), float(len(p))) + torch.arange(12) for p in prompts])


@pytest.fixture
def encoder(monkeypatch):
    found = engine.Encoder("colours", colours, lengths, "a stand-in")
    monkeypatch.setattr(engine, "load_encoders", lambda base: [found])
    return found


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("base"))
    (folder
     / "recommended.json").write_text(json.dumps({"num_inference_steps": 2, "guidance_scale": 1.0}))
    return folder


def make_run(root, base_folder, name, strength, seed=0):
    """A run's folder as train leaves it, its LoRA's B constant `strength`."""
    folder, photos = root / name, root / f"{name}-photos"
    photos.mkdir()
    for k in range(2):
        pixels = np.random.default_rng((seed, k)).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{k}.png")
    folder.mkdir()
    write_yaml(TrainConfig(pretrained_model_name_or_path=str(base_folder),
                           instance_data_dir=str(photos),
                           instance_prompt="a photo of sks dog", class_prompt="a photo of a dog"),
               folder / "config.yaml")
    unet = load_base(base_folder).unet
    for parameter in add_lora(unet, 2, 2):
        if parameter.shape[1] == 2:  # B, (out, rank)
            torch.nn.init.constant_(parameter, strength)
    save_lora({"unet": unet}, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


# --- the prompts ----------------------------------------------------------------------------------


def test_scenes_follow_the_subject_and_looks_precede_it():
    assert tool.compose(PROMPTS, "a photo of sks dog", "a photo of a dog") == [
        ("a photo of sks dog in the snow", "a photo of a dog in the snow"),
        ("a photo of sks dog on the beach", "a photo of a dog on the beach"),
        ("a photo of red sks dog", "a photo of a red dog"),
    ]


@pytest.mark.parametrize("name", ["objects", "live", "toy"])
def test_each_list_that_ships_has_25_different_prompts(name):
    made = tool.compose(tool.read_prompts(name, "no-base"), "a photo of sks dog",
                        "a photo of a dog")
    assert len(made) == len(set(made)) == 25
    assert not any("sks" in plain for _, plain in made)
    assert all("sks dog" in drawn for drawn, _ in made)


def test_the_toy_list_says_only_words_that_the_toy_world_knows():
    words = pytest.importorskip("dbcore.toybox.words").words()
    phrases = tool.read_prompts("toy", "no-base")
    assert {word for phrase in phrases["scenes"] + phrases["looks"]
            for word in phrase.split()} <= set(words)


def test_the_base_recommends_its_list_and_a_wrong_name_is_refused(tmp_path):
    (tmp_path / "recommended.json").write_text(json.dumps({"prompts": "toy"}))
    assert tool.read_prompts(None, tmp_path) == tool.read_prompts("toy", tmp_path)
    assert tool.read_prompts(None, "no-base") == tool.read_prompts("objects", "no-base")
    with pytest.raises(ConfigError,
                       match="--prompts nonsense: give live, objects, toy, or a JSON file"):
        tool.read_prompts("nonsense", tmp_path)


def test_the_toy_base_is_asked_in_words_that_it_knows():
    assert tool.read_prompts(None, TOY_BASE) == tool.read_prompts("toy", "no-base")


def test_fewer_prompts_are_spread_over_the_list():
    assert tool.spread(list(range(25)), 5) == [0, 5, 10, 15, 20]
    assert tool.spread([1, 2], None) == tool.spread([1, 2], 9) == [1, 2]
    with pytest.raises(ConfigError, match="at least 1"):
        tool.spread([1, 2], 0)


def test_a_run_without_a_class_prompt_is_read_from_its_instance_prompt(tmp_path, base_folder):
    folder = make_run(tmp_path, base_folder, "run", 0.0)
    write_yaml(TrainConfig(pretrained_model_name_or_path=str(base_folder),
                           instance_data_dir="photos",
                           instance_prompt="a photo of sks dog"), folder / "config.yaml")
    assert tool.read_run(folder).class_prompt == "a photo of a dog"
    for other in ("", "job: extension\n", f"pretrained_model_name_or_path: {base_folder}\n"):
        (folder / "config.yaml").write_text(other)
        with pytest.raises(ConfigError, match=r"its config.yaml is not a run's"):
            tool.read_run(folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no pytorch_lora_weights.safetensors: "
                       "give the folder of a finished run"):
        tool.read_run(folder)


@pytest.mark.parametrize(("instance", "expected"), [
    ("a photo of sks dog", "a photo of a dog"), ("a photo of the ohwx owl", "a photo of an owl"),
    ("sks dog", "a dog"),
    ("sks golden retriever", None), ("a photo of golden retriever", None), ("a photo of sks", None),
    ("sks", None),
    ("a photo of my dog", None), ("a photo of sks dog, smiling", None),
    ("a photo of TV stand", None), ("", None),
])
def test_a_class_is_guessed_only_where_there_is_no_doubt(instance, expected):
    assert tool.bare_class(instance) == expected


def test_in_doubt_a_class_prompt_is_asked_for_and_taken(tmp_path, base_folder):
    folder = make_run(tmp_path, base_folder, "run", 0.0)
    write_yaml(TrainConfig(pretrained_model_name_or_path=str(base_folder),
                           instance_data_dir="photos",
                           instance_prompt="sks golden retriever"), folder / "config.yaml")
    with pytest.raises(ConfigError, match="'sks golden retriever' does not tell its class for "
                       "certain: give --class_prompt"):
        tool.read_run(folder)
    assert tool.read_run(folder, "a golden retriever").class_prompt == "a golden retriever"


@pytest.mark.parametrize(("instance", "plain", "drawn", "asked"), [
    ("a photo of sks golden retriever", "a photo of a golden retriever",
     "a photo of red sks golden retriever",
     "a photo of a red golden retriever"),
    ("sks golden retriever", "a golden retriever", "red sks golden retriever",
     "a red golden retriever"),
    ("a photo of the sks dog", "a photo of a dog", "a photo of the red sks dog",
     "a photo of a red dog"),
    ("a photo of a dog named sks", "a photo of a dog", "a photo of a red dog named sks",
     "a photo of a red dog"),
    ("sks dog", "dog", "red sks dog", "red dog"),
])
def test_looks_stand_before_the_whole_noun(instance, plain, drawn, asked):
    assert tool.compose({"scenes": [], "looks": ["red"]}, instance, plain) == [(drawn, asked)]


@pytest.mark.parametrize(("content", "words"), [
    ({"scenes": "in the snow"}, 'scenes is "in the snow", and should be a list of texts'),
    ({"scenes": None, "looks": ["red"]}, "scenes is null, and should be a list"),
    ({"scenes": ["in the snow", 3]}, r"scenes is \["),
    ({"looks": ["red", " "]}, "looks is"),
    ({"scene": ["in the snow"]}, "'scene', which is neither scenes nor looks"),
    (["in the snow"], "holds a list of JSON"),
    ({"scenes": [], "looks": []}, "holds no prompt"),
    ({}, "holds no prompt"),
])
def test_a_prompt_file_of_another_form_is_refused_by_what_it_holds(tmp_path, content, words):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        tool.read_prompts(str(tmp_path / "mine.json"), "no-base")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_prompt_file_with_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "mine.json").write_text('{"scenes": ["in a café"]}', encoding=encoding)
    assert tool.read_prompts(str(tmp_path / "mine.json"), "no-base") == {"scenes": ["in a café"],
                                                                         "looks": []}
    (tmp_path / "mine.json").write_bytes('{"scenes": ["in a café"]}'.encode("cp1252"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        tool.read_prompts(str(tmp_path / "mine.json"), "no-base")


# --- the protocol ---------------------------------------------------------------------------------


def test_a_lora_that_does_nothing_scores_as_the_floor_and_one_that_does_not(tmp_path, base_folder,
                                                                            encoder, prompts):
    runs = [make_run(tmp_path, base_folder, "idle", 0.0),
            make_run(tmp_path, base_folder, "busy", 3.0, seed=1)]
    out = tmp_path / "out"
    main(["evaluate", "--checkpoint_dir", *map(str, runs), "--prompts", prompts, "--num_images",
          "2",
          "--output_dir", str(out)])
    result = json.loads((out / "evaluation.json").read_text())
    idle, busy = result["subjects"]["idle"], result["subjects"]["busy"]
    assert idle["adapter"] == pytest.approx(idle["floor"], abs=1e-5)
    assert busy["adapter"]["subject, colours"] != pytest.approx(busy["floor"]["subject, colours"],
                                                                abs=1e-3)
    # two different photos, neither compared with itself
    assert idle["ceiling"]["subject, colours"] < 1
    assert idle["ceiling"]["prompt, colours"] is None
    mean, low, high = result["mean"]["adapter"]["subject, colours"]
    assert mean == pytest.approx((idle["adapter"]["subject, colours"]
                                  + busy["adapter"]["subject, colours"]) / 2)
    assert low <= mean <= high
    table = (out / "evaluation.md").read_text()
    assert "2 subjects x 3 prompts x 2 images" in table
    assert "| busy, with LoRA |" in table
    assert "colours: a stand-in." in table


def test_the_measures_are_those_of_the_images_on_the_disk(tmp_path, base_folder, encoder,
                                                          prompts):
    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 3.0))
    result = tool.evaluate([subject], tmp_path / "out", prompts, num_images=2)
    files = sorted((tmp_path / "out" / "pictures" / "run").glob("*.png"))
    images = [Image.open(file) for file in files]
    photos = [Image.open(file) for file in sorted((tmp_path / "run-photos").glob("*.png"))]
    assert len(files) == 8  # 3 prompts and the class, 2 images each
    scores = result["subjects"]["run"]["adapter"]
    assert (scores["subject, colours"]
            == pytest.approx(engine.subject_fidelity(images[:6], photos, encoder)))
    assert (scores["PRES, colours"]
            == pytest.approx(engine.subject_fidelity(images[6:], photos, encoder)))
    apart = [engine.diversity(images[k:k + 2], encoder) for k in (0, 2, 4)]
    assert scores["DIV, colours"] == pytest.approx(sum(apart) / 3)


def test_a_second_call_draws_only_what_is_missing(tmp_path, base_folder, encoder, prompts,
                                                  monkeypatch):
    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 3.0))
    first = tool.evaluate([subject], tmp_path / "out", prompts, num_images=2)
    gone = tmp_path / "out" / "pictures" / "run" / "001-1.png"
    before = np.asarray(Image.open(gone), dtype=int)
    gone.unlink()
    drawn, draw = [], StableDiffusion.generate
    monkeypatch.setattr(StableDiffusion, "generate",
                        lambda self, texts, *a, **k: drawn.extend(texts)
                        or draw(
        self, texts, *a, **k))
    again = tool.evaluate([subject], tmp_path / "out", prompts, num_images=2)
    assert drawn == ["a photo of sks dog on the beach"]
    # a batch of another size rounds otherwise
    assert np.abs(np.asarray(Image.open(gone), dtype=int) - before).max() <= 1
    assert again["subjects"]["run"]["adapter"] == pytest.approx(first["subjects"]["run"]["adapter"],
                                                                abs=0.01)


def test_images_of_another_lora_are_refused(tmp_path, base_folder, encoder, prompts):
    folder = make_run(tmp_path, base_folder, "run", 3.0)
    tool.evaluate([tool.read_run(folder)], tmp_path / "out", prompts, num_images=2)
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(make_run(tmp_path, base_folder, "other", 1.0).joinpath(path.name).read_bytes())
    with pytest.raises(ConfigError, match="holds images of another lora: remove it"):
        tool.evaluate([tool.read_run(folder)], tmp_path / "out", prompts, num_images=2)


def test_another_evaluation_leaves_the_numbers_of_the_first(tmp_path, base_folder, encoder, prompts,
                                                            capsys):
    runs, out = [make_run(tmp_path, base_folder, name, 0.0)
                 for name in ("one", "two")], tmp_path / "out"
    words = ["--prompts", prompts, "--num_images", "2", "--num_prompts", "1", "--output_dir",
             str(out)]
    # again: the same, and no third
    for run, files in ((runs[0], [""]), (runs[1], ["", "-2"]), (runs[1], ["", "-2"])):
        main(["evaluate", "--checkpoint_dir", str(run), *words])
        assert sorted(path.name for path in out.glob("*.json")) == sorted(f"evaluation{end}.json"
                                                                          for end in files)
    subjects = [list(json.loads((out / name).read_text())["subjects"])
                for name in ("evaluation.json", "evaluation-2.json")]
    assert subjects == [["one"], ["two"]]
    assert "the new ones are in evaluation-2.json" in capsys.readouterr().out


def test_two_runs_of_one_name_are_refused_before_anything_is_drawn(tmp_path, base_folder):
    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 0.0))
    with pytest.raises(ConfigError, match="two runs are named run"):
        tool.evaluate([subject, subject], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_class_prompt_a_run_is_used_and_shown(tmp_path, base_folder, encoder, prompts, capsys):
    runs = [make_run(tmp_path, base_folder, "one", 0.0),
            make_run(tmp_path, base_folder, "two", 0.0, seed=1)]
    words = ["evaluate", "--checkpoint_dir", *map(str, runs), "--prompts", prompts, "--num_images",
             "2", "--num_prompts",
             "1", "--output_dir", str(tmp_path / "out"), "--class_prompt"]
    main([*words, "a photo of a cat", "a photo of the dog"])
    text = capsys.readouterr().out
    assert "one: 'a photo of sks dog', compared with its class, 'a photo of a cat'." in text
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["class_prompts"] == {"one": "a photo of a cat", "two": "a photo of the dog"}
    drawn = json.loads((tmp_path / "out" / "pictures" / "one"
                        / "about.json").read_text())["prompts"]
    assert drawn == ["a photo of sks dog in the snow", "a photo of a cat"]
    with pytest.raises(SystemExit, match="3 values of --class_prompt for 2 of --checkpoint_dir"):
        main([*words, "a", "b", "c"])


def test_images_of_another_interval_are_not_taken_for_this_ones(tmp_path, base_folder, encoder,
                                                                 prompts):
    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 0.0))
    how = [("a dog", "a dog")], tmp_path / "out", 2, 0, 8
    late = {**tool.WHOLE, "lora_interval": [0.5, 1]}
    assert tool.about(subject, "floor", [], 0, late) == tool.about(subject, "floor", [], 0,
                                                                   tool.WHOLE)
    tool.generate_all(subject, "adapter", *how, late)
    with pytest.raises(ConfigError, match="images of another lora_interval"):
        tool.generate_all(subject, "adapter", *how)


def test_photos_that_are_gone_are_missed_before_anything_is_drawn(tmp_path, base_folder, encoder,
                                                                  prompts):
    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 0.0))
    (tmp_path / "run-photos").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"photos of run are needed.*run-photos does not "
                       "exist.*instance_data_dir in its"):
        tool.evaluate([subject], tmp_path / "out", prompts, num_images=2)
    assert not (tmp_path / "out").exists()


def test_lpips_is_measured_where_it_is_asked_for(tmp_path, base_folder, encoder, prompts,
                                                 monkeypatch):
    """A stand-in with the package's own signature: the mean absolute difference, (n, 1, 1, 1)."""
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("alex", False)

        def forward(self, ones, others):
            assert ones.min() >= -1
            assert ones.max() <= 1
            return (ones - others).abs().mean(dim=(1, 2, 3), keepdim=True)

    subject = tool.read_run(make_run(tmp_path, base_folder, "run", 3.0))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match="--lpips needs one more package: pip install lpips"):
        tool.evaluate([subject], tmp_path / "out", prompts, num_images=3, lpips=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    scores = tool.evaluate([subject], tmp_path / "out", prompts, num_images=3,
                           lpips=True)["subjects"]["run"]
    # the class's are left out
    files = sorted((tmp_path / "out" / "pictures" / "run").glob("*.png"))[:9]
    pixels = [np.asarray(Image.open(file), dtype=float) / 127.5 for file in files]
    pairs = [np.abs(pixels[3 * p + a] - pixels[3 * p + b]).mean() for p in range(3)
             for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert scores["adapter"]["DIV, LPIPS"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert scores["ceiling"]["DIV, LPIPS"] is None


def test_lpips_itself():
    """The package's network without AlexNet's weights: copies are 0 apart, others more."""
    network = pytest.importorskip("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    assert engine.lpips_diversity([images[0]] * 2, network) == 0
    assert engine.lpips_diversity(images, network) > 0.001


def test_each_encoder_has_its_own_ceiling(monkeypatch):
    photos = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), dtype=np.uint8))
              for k in range(4)]
    monkeypatch.setattr(tool, "read_photos", lambda subject: photos)
    encoders = [engine.Encoder("colours", colours),
                engine.Encoder("darkness", lambda images: 255 - colours(images))]
    ceiling = tool.measure(None, {"floor": photos}, [("a dog", "a dog")], 2, encoders)["ceiling"]
    for encoder in encoders:
        alike = engine.real_against_real(photos, encoder)
        assert ceiling[f"subject, {encoder.name}"] == pytest.approx(alike)
    assert ceiling["DIV, colours"] is None
