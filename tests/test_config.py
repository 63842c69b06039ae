"""Every option is one thing with five faces: flag, keyword, YAML key, line of config.yaml, row of
the card."""

import argparse
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import dbcore
from dbcore.__main__ import TOOLS, main
from dbcore.config import (
    ALIASES,
    ANSWERED,
    AUTO,
    SECRETS,
    ConfigError,
    GenerateConfig,
    TrainConfig,
    add_options,
    from_args,
    read_yaml,
    write_yaml,
)

FIELDS = [(cls, field) for cls in (TrainConfig, GenerateConfig)
          for field in dataclasses.fields(cls)]
NAMES = [f"{cls.__name__}.{field.name}" for cls, field in FIELDS]
NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos",
          "instance_prompt": "a sks dog"}


def parse(cls, *argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, cls)
    return from_args(parser.parse_args([str(word) for word in argv]), cls)


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def another(cls, field):
    """A value that the field may have and does not have by default."""
    hint, rules = typing.get_type_hints(cls)[field.name], field.metadata
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is list:
        return [1.5, 0.5] if kinds == (float,) else ["one", "two words"]
    if rules["choices"]:
        return next(choice for choice in rules["choices"]
                    if choice not in (AUTO, default_of(field)))
    if hint is bool:
        return not default_of(field)
    if int in kinds:
        return 17
    return 0.25 if float in kinds else "some/words of mine"


def as_flags(field, value):
    if isinstance(value, bool):
        return [f"--{field.name}" if value else f"--no-{field.name}"]
    return [f"--{field.name}", *(value if isinstance(value, list) else [value])]


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=NAMES)
def test_flag_keyword_yaml_key_saved_field_and_card_row_are_one(cls, field, tmp_path):
    from dbcore.engines.report import settings_table, shown

    value = another(cls, field)
    config = cls(**{field.name: value})
    assert getattr(config, field.name) == value != default_of(field)
    assert parse(cls, *as_flags(field, value)) == config
    (tmp_path / "mine.yaml").write_text(f"{field.name}: {value}\n", encoding="utf-8")
    assert parse(cls, "--config", tmp_path / "mine.yaml") == config
    write_yaml(config, tmp_path / "config.yaml")
    saved, table = read_yaml(tmp_path / "config.yaml", cls), settings_table(config)
    if field.name in SECRETS:
        assert field.name not in saved
        assert field.name not in table
    else:
        assert saved[field.name] == value
        assert f"| {field.name} | {shown(value)} |" in table.splitlines()


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=NAMES)
def test_help_says_what_a_field_does(cls, field):
    parser = argparse.ArgumentParser()
    add_options(parser, cls)
    assert len(field.metadata["help"].split()) >= 2
    words = " ".join(parser.format_help().split())
    assert f"--{field.name}" in words
    assert " ".join(field.metadata["help"].split()) in words


def test_a_saved_config_repeats_the_run(tmp_path):
    config = TrainConfig(**NEEDED, validation_prompt=["a dog", "été, 'quoted': yes"],
                         mixed_precision="no", seed=-3)
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(TrainConfig, "--config", tmp_path / "config.yaml") == config


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("rank: 8\nseed: 3\n")
    config = parse(TrainConfig, "--config", tmp_path / "run.yaml", "--rank", 2)
    assert (config.rank, config.seed) == (2, 3)


# --- bad values -----------------------------------------------------------------------------------


def bad_values():
    """(class, field name, value, what the message says) for each rule of each field."""
    for cls, field in FIELDS:
        hint, rules = typing.get_type_hints(cls)[field.name], field.metadata
        kinds = typing.get_args(hint) or (hint,)
        if rules["choices"]:
            yield cls, field.name, "purple", rules["choices"][0]
        if rules["low"] is not None:
            yield cls, field.name, rules["low"] - 1, "at least"
        if rules["high"] is not None:
            yield cls, field.name, rules["high"] + 1, "at most"
        if rules["above"] is not None:
            yield cls, field.name, rules["above"], "more than"
        if int in kinds:
            yield cls, field.name, 2.5, "a whole number"
        if float in kinds:
            yield cls, field.name, "nan", "a number"
            yield cls, field.name, "inf", "a number"
        if int in kinds or float in kinds:
            yield cls, field.name, "many", "number"
            yield cls, field.name, True, "number"
        if hint is bool:
            yield cls, field.name, "perhaps", "true or false"
        if kinds == (str,) or set(kinds) == {str, type(None)}:
            yield cls, field.name, 3.5, "text"
        if type(None) not in kinds and typing.get_origin(hint) is not list:
            yield cls, field.name, None, "give a value"


@pytest.mark.parametrize(("cls", "name", "value", "says"), list(bad_values()),
                         ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_bad_value_names_the_option(cls, name, value, says):
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    assert f"--{name}" in str(caught.value)
    assert says in str(caught.value)


def test_a_flag_of_no_option_and_half_a_flag_are_refused(capsys):
    for words in (["--ranks", "4"], ["--instance_data", "photos"]):
        with pytest.raises(SystemExit):
            parse(TrainConfig, *words)
        assert words[0] in capsys.readouterr().err


def test_an_unknown_yaml_key_is_answered_with_the_near_one(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(ConfigError,
                       match="'learning_rat' is no option; did you mean learning_rate"):
        parse(TrainConfig, "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize("text",
                         ["- rank\n- 4\n", "just words", "rank: [4\nhub_token: hf_sentinel\n",
                                  'hub_token: "hf_sentinel\n',
                          "rank: !!python/object/apply:os.system ['false']\n"])
def test_a_file_that_is_no_list_of_options_is_refused_and_not_quoted(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run.yaml") as caught:
        parse(TrainConfig, "--config", tmp_path / "run.yaml")
    assert "hf_sentinel" not in str(caught.value)


def test_yaml_reads_as_people_write_it(tmp_path):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\nlearning_rate: "
                                       "1e-4\nvalidation_prompt: a dog\ncenter_crop: "
                                       "yes\nrank: '8'\n")
    config = parse(TrainConfig, "--config", tmp_path / "run.yaml")
    assert (config.mixed_precision, config.learning_rate, config.rank) == ("no", 1e-4, 8)
    assert config.validation_prompt == ["a dog"]
    assert config.center_crop is True


def test_a_long_seed_is_the_same_from_every_side(tmp_path):
    seed = 2**53 + 1  # the first whole number that a float cannot hold
    (tmp_path / "run.yaml").write_text(f"seed: '{seed}'\n")
    assert TrainConfig(seed=seed).seed == parse(TrainConfig, "--seed", seed).seed == seed
    assert parse(TrainConfig, "--config", tmp_path / "run.yaml").seed == seed


def test_switches_go_both_ways_and_numbers_may_be_negative():
    config = parse(TrainConfig, "--no-cache_latents", "--center_crop", "--no-random_flip", "--seed",
                   "-1")
    assert (config.cache_latents, config.center_crop, config.random_flip,
            config.seed) == (False, True, False, -1)
    assert parse(GenerateConfig, "--lora_scale", "-0.5", "1", "-2").lora_scale == [-0.5, 1.0, -2.0]


def test_a_secret_is_not_in_the_repr_nor_in_an_error():
    assert "hf_sentinel" not in repr(TrainConfig(hub_token="hf_sentinel"))
    with pytest.raises(ConfigError, match="--hub_token") as caught:
        TrainConfig(hub_token={"value": "hf_sentinel"})
    assert "hf_sentinel" not in str(caught.value)


# --- options of other scripts ---------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "name"),
                         [(cls, name) for cls in ANSWERED for name in ANSWERED[cls]])
@pytest.mark.parametrize("value", [[], ["0"], ["a", "b"]], ids=["bare", "valued", "listed"])
def test_an_answered_option_prints_one_line_and_changes_nothing(cls, name, value, capsys):
    assert parse(cls, f"--{name}", *value, "--seed", 2) == cls(seed=2)
    assert capsys.readouterr().out == f"--{name} has no effect: {ANSWERED[cls][name]}.\n"


def test_an_alias_is_its_option_and_says_so(capsys):
    assert parse(TrainConfig, "--use_8bit_adam") == TrainConfig(optimizer="AdamW8bit")
    assert capsys.readouterr().out == "--use_8bit_adam is read as --optimizer AdamW8bit.\n"
    assert parse(GenerateConfig, "--lora", "a", "b") == GenerateConfig(checkpoint_dir=["a", "b"])
    buckets = "64,32;32,64"
    assert parse(TrainConfig, "--use_aspect_ratio_buckets").aspect_ratio_buckets == "auto"
    assert parse(TrainConfig, "--use_aspect_ratio_buckets", "--aspect_ratio_buckets",
                 buckets).aspect_ratio_buckets == buckets
    assert set(ALIASES) == {"use_8bit_adam", "lora", "use_aspect_ratio_buckets"}


@pytest.mark.parametrize("text", ["", "512", "512,768;", "512x768", "512,768 768,512", "0,8"])
def test_buckets_are_pairs_of_numbers(text):
    with pytest.raises(ConfigError, match=r"--aspect_ratio_buckets .*: give height,width in pix"):
        TrainConfig(**NEEDED, aspect_ratio_buckets=text).check()
    assert TrainConfig(aspect_ratio_buckets="64,32; 32,64").buckets == [(64, 32), (32, 64)]


def test_a_command_of_the_diffusers_script_is_read_as_it_is(capsys):
    config = parse(
        TrainConfig, "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5",
        "--instance_data_dir=dog", "--class_data_dir=class", "--output_dir=out",
        "--with_prior_preservation",
        "--prior_loss_weight=1.0", "--instance_prompt=a photo of sks dog",
        "--class_prompt=a photo of dog",
        "--resolution=512", "--train_batch_size=1", "--gradient_accumulation_steps=1",
        "--learning_rate=1e-4",
        "--lr_scheduler=constant", "--lr_warmup_steps=0", "--num_class_images=200",
        "--max_train_steps=800",
        "--checkpointing_steps=100", "--report_to=wandb",
        "--validation_prompt=A photo of sks dog in a bucket",
        "--validation_epochs=50", "--seed=0", "--train_text_encoder", "--mixed_precision=fp16",
        "--prior_generation_precision=fp32", "--enable_xformers_memory_efficient_attention",
        "--dataloader_num_workers=4", "--local_rank=0", "--push_to_hub")
    config.check()
    assert (config.max_train_steps, config.learning_rate,
            config.validation_epochs) == (800, 1e-4, 50)
    assert len(capsys.readouterr().out.splitlines()) == 3


# Every option of diffusers' examples/dreambooth/train_dreambooth_lora.py.
DIFFUSERS = """
    pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir
    instance_prompt class_prompt validation_prompt num_validation_images validation_epochs
    with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution
    center_crop train_text_encoder train_batch_size sample_batch_size num_train_epochs
    max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
    lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers use_8bit_adam adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id
    logging_dir allow_tf32 report_to mixed_precision prior_generation_precision local_rank
    enable_xformers_memory_efficient_attention pre_compute_text_embeddings tokenizer_max_length
    text_encoder_use_attention_mask validation_images class_labels_conditioning rank
    image_interpolation_mode
"""


@pytest.mark.parametrize("name", DIFFUSERS.split())
def test_every_option_of_the_diffusers_script_is_known(name):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, TrainConfig)
    assert f"--{name}" in parser._option_string_actions


def test_the_commands_of_the_seed_repository_are_read_as_they_are(capsys):
    """Its main.py and inference.py; a doubled `=` and all."""
    config = parse(
        TrainConfig, "--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5",
        "--instance_data_dir=imgs/dogs",
        "--instance_prompt=a photo of sks dog",
        "--validation_prompt=a photo of sks dog is swimming",
        "--with_prior_preservation", "--train_text_encoder", "--class_prompt==a photo of dog",
        "--resolution=512",
        "--train_batch_size=1", "--gradient_accumulation_steps=1", "--learning_rate=2e-4",
        "--max_train_steps=150",
        "--validation_epochs", 4)
    config.check()
    assert (config.class_prompt, config.max_train_steps,
            config.validation_epochs) == ("a photo of dog", 150, 4)
    drawn = parse(GenerateConfig, "--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5",
                  "--checkpoint_dir=checkpoint-200", "--prompt=A photo of sks dog is swimming",
                  "--output_dir=out",
                  "--mixed_precision=fp16", "--num_inference_steps=25", "--num_images=8",
                  "--seed=1", "--device=cuda")
    drawn.check()
    assert (drawn.checkpoint_dir, drawn.prompt) == (["checkpoint-200"],
                                                    ["A photo of sks dog is swimming"])
    said = capsys.readouterr().out
    assert "--class_prompt has a second =, which is left out" in said
    assert "--device has no effect" in said


# --- contradictions -------------------------------------------------------------------------------

TOKENS = {"train_text_encoder_ti": True, "token_abstraction": "sks"}
CONTRADICTIONS = {
    "pretrained_model_name_or_path": {"pretrained_model_name_or_path": None},
    "instance_data_dir": {"instance_data_dir": None},
    "instance_prompt": {"instance_prompt": ""},
    "with_prior_preservation": {"with_prior_preservation": True},
    "class_prompt": {"class_prompt": "a dog"},
    "logit_mean": {"logit_mean": 1.0, "weighting_scheme": "mode"},
    "logit_std": {"logit_std": 2.0},
    "mode_scale": {"mode_scale": 1.0},
    "tlora_alpha": {"tlora_alpha": 2.0},
    "use_tlora": {"use_tlora": True, "use_dora": True},
    "use_ema": {"use_ema": True, "optimizer": "AdamWScheduleFree"},
    "lr_scheduler": {"lr_scheduler": "cosine", "optimizer": "AdamWScheduleFree"},
    "prior_prediction": {"prior_prediction": True},
    "prior_loss_weight": {"prior_loss_weight": 0.5},
    "with_prior_preservation twice": {"with_prior_preservation": True, "prior_prediction": True,
                                      "class_prompt": "a dog"},
    "class_data_dir": {"class_data_dir": "dogs"},
    "text_encoder_lr": {"text_encoder_lr": 1e-5},
    "text_encoder_rank": {"text_encoder_rank": 2},
    "train_text_encoder_frac": {"train_text_encoder_frac": 0.5},
    "train_text_encoder_ti_frac": {"train_text_encoder_ti_frac": 0.5},
    "token_abstraction": {"token_abstraction": "sks"},
    "num_new_tokens_per_abstraction": {"num_new_tokens_per_abstraction": 3},
    "initializer_concept": {"initializer_concept": "dog"},
    "token_abstraction of two": {"train_text_encoder_ti": True, "token_abstraction": "sks,TOK"},
    "instance_prompt without": {"train_text_encoder_ti": True, "token_abstraction": "TOK"},
    "class_prompt with": {**TOKENS, "prior_prediction": True, "class_prompt": "a sks dog"},
    "train_text_encoder_ti": {**TOKENS, "train_text_encoder": True},
    "train_text_encoder_ti schedule-free": {**TOKENS, "optimizer": "AdamWScheduleFree"},
    "validation_epochs": {"validation_prompt": "a dog", "validation_steps": 1,
                          "validation_epochs": 1},
    "validation_steps": {"validation_steps": 1},
    "validation_epochs alone": {"validation_epochs": 1},
    "lr_warmup_steps": {"lr_warmup_steps": 10},
    "adam_beta1": {"adam_beta1": 0.5, "optimizer": "Adafactor"},
    "adam_epsilon": {"adam_epsilon": 1e-3, "optimizer": "Adafactor"},
    "lora_dropout": {"adapter": "oft", "lora_dropout": 0.1},
    "use_dora": {"adapter": "lokr", "use_dora": True},
    "lora_alpha": {"adapter": "oft", "lora_alpha": 1},
    "use_rslora": {"use_dora": True, "use_rslora": True, "lora_layers": "all"},
    "hub_model_id": {"hub_model_id": "me/dog"},
    "hub_token": {"hub_token": "hf_sentinel", "report_to": "wandb"},
    "output_dir": {"output_dir": "photos/run"},
    "output_dir within": {"with_prior_preservation": True, "class_prompt": "a dog",
                          "class_data_dir": "dogs", "output_dir": "dogs/run"},
    "class_data_dir a file": {"with_prior_preservation": True, "class_prompt": "a dog",
                              "class_data_dir": __file__},
    "instance_prompt of spaces": {"instance_prompt": "  "},
    "class_data_dir within": {"with_prior_preservation": True, "class_prompt": "a dog",
                              "class_data_dir": "photos"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_names_its_options(name):
    config = TrainConfig(**{**NEEDED, **CONTRADICTIONS[name]})
    with pytest.raises(ConfigError, match=f"--{name.split()[0]}"):
        config.check()


@pytest.mark.parametrize(("options", "says"), [
    ({"prompt": "a dog"}, "--checkpoint_dir"),
    ({"pretrained_model_name_or_path": "base"}, "--prompt"),
    ({"checkpoint_dir": ["a", "b", "c"], "prompt": "a dog", "lora_scale": [1, 2]}, "--lora_scale"),
])
def test_generate_says_what_is_missing(options, says):
    with pytest.raises(ConfigError, match=says):
        GenerateConfig(**options).check()


LIGHT = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from dbcore.__main__ import main
for words, says in [
    (["--help"], "quickstart"), (["train", "--help"], "--learning_rate"),
    (["generate", "--help"], "--lora_scale"), (["train", "--rank", "0"], "--rank 0"),
    (["train", "--rank", "4"], "--pretrained_model_name_or_path is missing"),
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["generate", "--prompt", "a"], "--checkpoint_dir"),
    (["train", "--pretrained_model_name_or_path", "b", "--instance_data_dir", "p",
      "--instance_prompt", "w", "--class_prompt", "c"], "--with_prior_preservation"),
]:
    out = io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            main(words)
    except SystemExit as error:
        out.write(str(error))
    assert says in out.getvalue(), (words, out.getvalue())
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib"}
    heavy &= set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True,
                          check=False, cwd=Path(dbcore.__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_help_lists_every_tool_with_its_line(capsys):
    import importlib

    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    there = {path.stem for path in (Path(dbcore.__file__).parent / "tools").glob("*.py")}
    modules = {name: importlib.import_module(f"dbcore.tools.{name}")
               for name in sorted(there - {"__init__"})}
    lines = {name: module.HELP for name, module in modules.items() if hasattr(module, "HELP")}
    assert set(TOOLS) == set(lines)
    for name, line in lines.items():
        assert f"{name} {' '.join(line.split())}" in words


@pytest.mark.parametrize("around", ["photos", "."])
def test_class_images_from_around_the_photos_are_refused(tmp_path, around):
    (tmp_path / "photos" / "sks").mkdir(parents=True)
    config = TrainConfig(pretrained_model_name_or_path="base",
                         instance_data_dir=str(tmp_path / "photos" / "sks"),
                         instance_prompt="a photo of sks dog", class_prompt="a photo of a dog",
                         with_prior_preservation=True, class_data_dir=str(tmp_path / around),
                         output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"--class_data_dir .* has --instance_data_dir .* in it"):
        config.check()


# --- a home and a console -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_dir", "instance_data_dir", "class_data_dir",
                                  "pretrained_model_name_or_path"])
def test_the_home_folder_is_meant_by_its_sign(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(f"{name}: ~/dog\n")
    assert getattr(TrainConfig(**read_yaml(tmp_path / "run.yaml", TrainConfig)),
                   name) == str(tmp_path / "dog")
    assert TrainConfig(instance_prompt="~ dog").instance_prompt == "~ dog"


def test_the_sign_is_read_in_the_options_of_every_tool(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    for tool, words in (("prepare", ["--instance_data_dir=~/photos", "--output_dir=~/out"]),
                        ("merge", ["--lora", "~/a", "~/b", "--output=~/out"])):
        monkeypatch.setattr(f"dbcore.tools.{tool}.main", seen.append)
        main([tool, *words])
    assert (seen[0].instance_data_dir, seen[0].output_dir) == (f"{tmp_path}/photos",
                                                               f"{tmp_path}/out")
    assert seen[1].lora == [f"{tmp_path}/a", f"{tmp_path}/b"]
