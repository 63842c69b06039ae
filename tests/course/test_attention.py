"""Attention maps by word: what is recorded, where a word's tokens are, and a base without
cross-attention."""

import numpy as np
import pytest
import torch
from pipelines import make_flux2_miniature, make_sd15_miniature, make_tokenizer

from dbcore.course import attention
from dbcore.course.attention import grey, recording, token_places, word_maps
from dbcore.models.base import load_base

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_sd15_miniature(tmp_path_factory.mktemp("sd15")))


def test_each_layer_gives_weights_that_add_up_to_one_over_the_tokens(base):
    with recording(base.denoiser) as maps:
        base.generate([PROMPT], [0], 2)
    layers = [name for name, _ in base.denoiser.named_modules() if name.endswith("attn2")]
    assert len(maps) >= 2 * len(layers)
    for one in maps:
        assert one.shape[0] == base.tokenizer.model_max_length
        torch.testing.assert_close(one.sum(0), torch.ones(one.shape[1:]))


def test_the_maps_are_those_of_the_prompt_not_of_the_empty_one(base):
    with recording(base.denoiser) as guided:
        base.generate([PROMPT], [0], 1, guidance_scale=2.0)
    with recording(base.denoiser) as alone:
        base.generate([PROMPT], [0], 1, guidance_scale=1.0)
    torch.testing.assert_close(guided[0], alone[0], atol=1e-5, rtol=1e-4)


def test_recording_changes_no_image_and_ends(base):
    (plain,) = base.generate([PROMPT], [0], 2)
    image, *maps = word_maps(base, PROMPT, 0, ["sks", "dog"], num_inference_steps=2)
    assert np.array_equal(image, plain)
    assert [one.size for one in maps] == [plain.size] * 2
    assert not any("Recording" in type(one).__name__
                   for one in base.denoiser.attn_processors.values())


def test_a_map_is_the_words_share_among_the_words(base, monkeypatch):
    shares = []
    monkeypatch.setattr(attention, "grey", lambda values, size: shares.append(values))
    word_maps(base, "a photo of sks dog", 0, ["a", "photo", "of", "sks", "dog"],
              num_inference_steps=1)
    torch.testing.assert_close(sum(shares), torch.ones_like(shares[0]))


def test_a_word_of_several_tokens_has_all_of_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    prompt = "a photo of hovercraft dog"
    places = token_places(tokenizer, prompt)
    tokens = ["start", *tokenizer.tokenize(prompt)]
    assert len(places["hovercraft"]) > 1
    assert [tokens[k] for k in places["hovercraft"]] == tokenizer.tokenize("hovercraft")
    assert [tokens[k] for k in places["dog"]] == tokenizer.tokenize("dog")


def test_a_word_that_is_cut_off_is_black(base):
    room = base.tokenizer.model_max_length
    _, dog, owl = word_maps(base, "a dog" + " a" * room + " owl", 0, ["dog", "owl"],
                            num_inference_steps=1)
    assert np.asarray(dog).max() == 255
    assert np.asarray(owl).max() == 0


def test_without_cross_attention_there_are_no_maps(tmp_path):
    flux = load_base(make_flux2_miniature(tmp_path))
    assert word_maps(flux, PROMPT, 0, ["sks"], num_inference_steps=1) == []


def test_a_map_goes_from_black_to_white():
    image = grey(torch.tensor([[0.2, 0.2], [0.2, 0.6]]), (2, 2))
    assert np.asarray(image)[..., 0].tolist() == [[0, 0], [0, 255]]
