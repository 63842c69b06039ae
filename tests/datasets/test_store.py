"""What is computed once and read many times: prompts as the frozen text encoders encode them."""

import pytest
import torch
from pipelines import make_tiny_pipeline

from dbcore.config import ConfigError, TrainConfig
from dbcore.datasets.store import PromptCache
from dbcore.models.base import load_base
from dbcore.models.embeddings import add_tokens, tokens_of
from dbcore.models.lora import adapters_off, add_lora, load_lora, remove_lora, save_lora, set_scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


def encoded(source, prompts):
    return source(prompts)["encoder_hidden_states"]


def test_prompts_become_embeddings_once(folder):
    base, prompts = load_base(folder), ["a red dog", "a blue car"]
    wanted = encoded(base.encode_text, prompts)
    assert wanted.shape == (2, 16, 16)
    cache = PromptCache(base, prompts)
    base.release("text_encoder")
    assert torch.allclose(encoded(cache.encode, prompts), wanted, atol=1e-6)
    assert "text_encoder" not in vars(base)


def test_a_prompt_that_was_not_added_is_encoded_when_it_is_asked_for(folder):
    base = load_base(folder)
    cache = PromptCache(base, ["a red dog"])
    base.release("text_encoder")
    wanted = encoded(load_base(folder).encode_text, ["a red dog", "a new one"])
    assert torch.equal(encoded(cache.encode, ["a red dog", "a new one"]), wanted)


def test_images_of_prompts_in_a_cache_need_no_text_encoder(folder):
    base = load_base(folder)
    wanted = base.generate(["a red dog"], [0], num_inference_steps=2)[0]
    cache = PromptCache(base, ["a red dog", ""])
    base.release("text_encoder")
    (image,) = base.generate(["a red dog"], [0], num_inference_steps=2, encode=cache.encode)
    assert image.tobytes() == wanted.tobytes()
    assert "text_encoder" not in vars(base)


def test_prompts_with_new_tokens_are_kept_once_they_are_learnt(folder):
    base = load_base(folder)
    cache = PromptCache(base)
    add_tokens(base, TrainConfig(token_abstraction="sks"))
    (part,) = tokens_of(base.text_encoders)
    with pytest.raises(ConfigError, match="or learns new tokens"):
        cache.add(["sks dog"])
    part.requires_grad_(False)
    cache.add(["sks dog"])
    kept = encoded(cache.encode, ["sks dog"])
    assert torch.equal(kept, encoded(base.encode_text, ["<s0><s1> dog"]))
    part.initial.zero_()
    with adapters_off(base.text_encoders):  # as before the run, which the cache does not know
        assert (encoded(cache.encode, ["sks dog"]) - kept).abs().max() > 0.01
    assert torch.equal(encoded(cache.encode, ["sks dog"]), kept)


def test_prompts_are_encoded_anew_while_a_lora_is_on_the_text_encoder(folder, tmp_path):
    """Trained, loaded or scaled: the encoder's own word counts. The frozen one's is back after."""
    base, prompts = load_base(folder), ["a red dog"]
    cache = PromptCache(base, prompts)
    frozen = encoded(cache.encode, prompts)
    numbers = torch.Generator().manual_seed(0)
    for parameter in add_lora(base.text_encoder, 2, 2.0):
        parameter.data.copy_(torch.randn(parameter.shape, generator=numbers))
    trained = encoded(cache.encode, prompts)
    assert (trained - frozen).abs().max() > 0.01
    with pytest.raises(ConfigError, match="cannot be kept while the text encoder has a LoRA"):
        cache.add(["another"])
    save_lora({"text_encoder": base.text_encoder}, tmp_path / "lora.safetensors")
    remove_lora(base)
    assert torch.equal(encoded(cache.encode, prompts), frozen)
    load_lora(base, tmp_path / "lora.safetensors")
    assert torch.allclose(encoded(cache.encode, prompts), trained, atol=1e-6)
    set_scale(base, {"default": 0.5})
    half = encoded(cache.encode, prompts)
    assert (half - trained).abs().max() > 0.01
    assert (half - frozen).abs().max() > 0.01
