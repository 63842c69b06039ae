"""What is missing, damaged or out of reach is named as what it is: the folder's fault, or the
hub's."""

import json

import pytest
from pipelines import make_tiny_pipeline
from runs import add_variant

from dbcore.config import ConfigError
from dbcore.models.base import load_base
from dbcore.models.reading import other_variant, reading

WEIGHTS = "diffusion_pytorch_model.safetensors"


def hub_error(name):
    """An error as the hub's client raises it, without a server."""
    from huggingface_hub import errors

    return getattr(errors, name).__new__(getattr(errors, name))


@pytest.mark.parametrize(("name", "words"), [
    ("GatedRepoError", "terms accepted"), ("RepositoryNotFoundError", "no model of this name"),
    ("RevisionNotFoundError", "--revision"), ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
    ("LocalEntryNotFoundError", "check the network"),
    ("HfHubHTTPError", "the hub failed or could not be reached"),
])  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a library's"])
def test_an_error_of_the_hub_is_named_as_such(name, words, wrapped):
    error = hub_error(name)
    if wrapped:
        error, error.__cause__ = OSError("Can't load the model"), error
    with pytest.raises(ConfigError,
                       match=f"its vae cannot be loaded .*{words}"), reading("its vae "
                                                                             "cannot be loaded"):
        raise error


def test_a_library_s_own_error_passes():
    with pytest.raises(ValueError, match="a bug"), reading("x"):
        raise ValueError("a bug")


def test_a_name_that_is_neither_folder_nor_hub_name_is_answered():
    with pytest.raises(ConfigError,
                       match="data/nowhere/base: no base found there; there is no such folder"):
        load_base("data/nowhere/base")


@pytest.fixture
def folder(tmp_path):
    return make_tiny_pipeline(tmp_path / "base")


def test_a_folder_of_fp16_files_alone_says_which_option_to_give(folder):
    add_variant(folder, folder)
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"its unet cannot be loaded .*add --variant fp16"):
        load_base(folder).unet  # noqa: B018 - loaded when touched
    assert load_base(folder, variant="fp16").unet is not None


def test_a_variant_that_is_not_there_is_answered(folder):
    with pytest.raises(ConfigError, match="no files of variant fp16: leave --variant out"):
        load_base(folder, variant="fp16").unet  # noqa: B018


@pytest.mark.parametrize(("names", "words"), [
    (["model.fp16-00001-of-00002.safetensors"], "add --variant fp16"),
    (["model-00001-of-00002.fp16.safetensors"], "add --variant fp16"),
    (["model.safetensors", "model.bf16.safetensors"], None), ([], None),
])  # fmt: skip
def test_files_in_parts_count_as_their_variant(names, words, tmp_path):
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    said = other_variant(tmp_path, "unet")
    assert said is None if words is None else words in said


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder"])
def test_a_part_that_is_missing_or_damaged_is_named(part, folder):
    for path in (folder / part).iterdir():
        path.write_text("{")
    base = load_base(folder)
    with pytest.raises(ConfigError, match=f"its {part} cannot be loaded"):
        base.noise_scheduler if part == "scheduler" else getattr(base, part)


def test_a_damaged_index_is_named(folder):
    (folder / "model_index.json").write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match="no base found there"):
        load_base(folder)
