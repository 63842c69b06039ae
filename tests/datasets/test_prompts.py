"""What a base does not read is shown, and where that calls the subject, nothing is made with it."""

import json

import pytest
from PIL import Image
from pipelines import MAX_TOKENS, make_tiny_pipeline
from runs import make_options

from dbcore.config import ConfigError, GenerateConfig, TrainConfig
from dbcore.datasets.prompts import PromptError, calling_words, check_fit, without_identifier
from dbcore.engines.sample import generate
from dbcore.engines.trainer import train
from dbcore.models.base import load_base

ROOM = MAX_TOKENS - 2  # beside the marks of start and end
LONG = " ".join(["red"] * ROOM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("", ""),
        (LONG, ""),
        (f"{LONG} sks dog", "sks dog"),
        (f"{LONG[4:]} xyz on grass", "xyz on grass"),  # xyz: 3 tokens
        (f"a  photo\n{LONG}  in snow", "red red in snow"),
        ("sks", ""),
    ],
)
def test_what_is_cut_off_is_what_the_tokenizer_leaves_out(base, prompt, cut):
    assert " ".join(base.cut_off(prompt).split()) == " ".join(cut.split())
    kept = prompt[: len(prompt) - len(base.cut_off(prompt))]
    assert len(base.tokenizer(kept).input_ids) <= MAX_TOKENS


def test_a_shorter_limit_of_the_users_counts(folder):
    assert load_base(folder, tokenizer_max_length=5).cut_off("a photo of sks dog") == "sks dog"
    with pytest.raises(ConfigError,
                       match="--tokenizer_max_length 17: this base reads 16 tokens at most"):
        load_base(folder, tokenizer_max_length=17).cut_off("a dog")


def test_what_is_cut_off_is_said_and_a_lost_identifier_stops(base):
    said = []
    check_fit(
        base,
        [("a.png's caption", f"sks dog {LONG} in the snow"), ("--class_prompt", "a dog")],
        "a photo of sks dog",
        "a photo of a dog",
        said.append,
    )
    assert said == [
        ("  the end of a.png's caption is cut off, as it is too long for the base: "
         "'red red in the snow'")
    ]
    with pytest.raises(
        PromptError, match=r"'sks dog'. sks, which calls the subject, is in it: shorten"
    ):
        check_fit(
            base,
            [("a.png's caption", f"{LONG} sks dog")],
            "a photo of sks dog",
            "a photo of a dog",
            said.append,
        )


def test_the_words_that_call_a_subject():
    assert calling_words("A photo of sks dog.", "a photo of a dog") == {"sks"}
    assert calling_words("a photo of sks dog") == {"sks", "dog"}
    assert calling_words("a picture of Zwx golden retriever", "a golden retriever") == {"zwx"}


def test_training_stops_before_anything_is_written(tmp_path, folder):
    config = TrainConfig(**{**make_options(tmp_path), "output_dir": str(tmp_path / "run")})
    Image.new("RGB", (32, 32), "red").save(f"{config.instance_data_dir}/long.png")
    with open(f"{config.instance_data_dir}/long.txt", "w") as file:
        file.write(f"{LONG} {config.instance_prompt}")
    with pytest.raises(PromptError, match=r"the end of long.png's caption is cut off"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_generating_shows_what_is_cut_and_stops_for_a_run_s_identifier(tmp_path, folder, capsys):
    options = {
        "pretrained_model_name_or_path": str(folder),
        "num_images": 1,
        "num_inference_steps": 1,
        "resolution": 32,
    }
    generate(GenerateConfig(**options, prompt=[f"{LONG} sks dog"]))
    assert (
        "the end of --prompt is cut off, as it is too long for the base: 'sks dog'"
        in capsys.readouterr().out
    )
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "pretrained_model_name_or_path": str(folder),
                "instance_data_dir": "photos",
                "instance_prompt": "a photo of sks dog",
            }
        )
    )
    with pytest.raises(PromptError, match="which calls the subject"):
        generate(
            GenerateConfig(**options, prompt=[f"{LONG} sks dog"], checkpoint_dir=[str(tmp_path)])
        )


@pytest.mark.parametrize(("text", "says"), [
    ("a photo of sks dog", "a photo of a dog"),  # the instance prompt: the class prompt as given
    ("a photo of sks dog, in snow", "a photo of dog, in snow"),
    ("Sks", "a photo of a dog"),
    ("a dog in snow", "a photo of a dog"),
    ("", "a photo of a dog"),
])
def test_the_identifier_is_left_out_of_a_photos_words(text, says):
    assert without_identifier(text, "a photo of sks dog", "a photo of a dog") == says


def test_captions_need_the_word_for_new_tokens(tmp_path, folder):
    options = make_options(tmp_path, train_text_encoder_ti=True, token_abstraction="sks")
    for k in range(3):
        (tmp_path / "photos" / f"{k}.txt").write_text("a dog in snow")
    with pytest.raises(PromptError, match=r"--token_abstraction sks: no photo's caption .*in snow"):
        train(TrainConfig(**{**options, "pretrained_model_name_or_path": str(folder)},
                          output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_prior_prediction_needs_an_identifier_in_the_instance_prompt_alone(tmp_path):
    config = TrainConfig("base", instance_data_dir=str(tmp_path), prior_prediction=True,
                         instance_prompt="a photo of a dog", class_prompt="photo of the dog")
    with pytest.raises(PromptError, match=r"--instance_prompt .* put an identifier"):
        train(config)
