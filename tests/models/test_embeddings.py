"""New tokens: what is trained of the table of words, what a prompt becomes, and their file."""

import pytest
import torch
from pipelines import make_sdxl_miniature, make_tiny_pipeline
from safetensors.torch import save_file

from dbcore.config import TrainConfig
from dbcore.models import embeddings
from dbcore.models.adapter import LoraFileError
from dbcore.models.base import load_base
from dbcore.models.lora import remove_lora
from dbcore.models.peft_adapters import load

TOKENS = TrainConfig(token_abstraction="sks", num_new_tokens_per_abstraction=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(folder):
    """A base that is learning new tokens."""
    base = load_base(folder)
    embeddings.add_tokens(base, TOKENS)
    return base


def the_part(base):
    (part,) = embeddings.tokens_of(base.text_encoders)
    return part


def said(base, *prompts):
    return base.encode_text(list(prompts))["encoder_hidden_states"]


def test_only_the_rows_of_new_tokens_are_trained(base):
    part = the_part(base)
    before = part.table.weight.clone()
    said(base, "a photo of sks dog").square().sum().backward()
    trained = [p for p in base.text_encoder.parameters() if p.requires_grad]
    assert len(trained) == 1
    assert trained[0] is part.rows
    assert (part.rows.grad != 0).any(dim=1).all()
    torch.optim.SGD(trained, lr=1.0).step()
    assert torch.equal(part.table.weight, before)


def test_a_batch_without_new_tokens_has_a_gradient_of_zero(base):
    said(base, "a red car").square().sum().backward()
    assert not the_part(base).rows.grad.any()


def test_the_word_is_read_as_the_tokens_where_it_stands_alone(base):
    spelt = base.tokens(["a photo of <s0><s1><s2> dog"])
    assert torch.equal(base.tokens(["a photo of sks dog"]), spelt)
    assert torch.equal(base.tokens(["a photo of SKS dog"]), spelt)
    assert (base.tokens(["a photo of sksy dog"]) < the_part(base).first).all()


def test_they_begin_like_other_words(base):
    part = the_part(base)
    assert part.rows.shape == (3, 16)
    assert float(part.rows.detach().std()) == pytest.approx(float(part.table.weight.std()), rel=0.3)
    assert len({tuple(row) for row in part.rows.tolist()}) == 3


def test_their_spread_is_pulled_to_that_of_the_table(base):
    part = the_part(base)
    part.rows.data *= 32
    before = part.rows.detach().clone()
    no, yes = torch.tensor(False), torch.tensor(True)
    part.keep_spread(no)  # nothing was learnt
    part.rows.grad = torch.ones_like(part.rows)
    part.keep_spread(yes)  # a step that changed nothing
    assert torch.equal(part.rows, before)
    part.keep_spread(no)
    ratio = float(part.table.weight.std() / before.std())
    assert torch.allclose(part.rows, before * ratio ** 0.1)


def test_a_long_prompt_is_cut_by_the_tokens_that_are_read(folder):
    base = load_base(folder)
    prompt = "sks " + "dog " * 13 + "car"
    assert base.cut_off(prompt) == "car"
    embeddings.name_tokens(base, "sks", 3)
    assert base.cut_off(prompt) == "dog dog car"


def test_a_file_goes_on_a_base_and_off_again(base, folder, tmp_path):
    words = said(base, "a photo of sks dog")
    path = tmp_path / "learned_embeds.safetensors"
    embeddings.save_tokens(base.text_encoders, path, {embeddings.NOTE: "sks"})
    fresh = load_base(folder)
    plain = said(fresh, "a photo of sks dog")
    embeddings.load_tokens(fresh, embeddings.read_tokens(tmp_path))
    assert torch.equal(said(fresh, "a photo of sks dog"), words)
    assert not fresh.text_varies
    remove_lora(fresh)
    assert torch.equal(said(fresh, "a photo of sks dog"), plain)
    assert "<s0>" not in fresh.tokenizer.get_vocab()


@pytest.mark.parametrize(("rows", "words"), [
    ({"clip_l": torch.ones(2, 8)}, "do not fit this base"),
    ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16)}, "do not fit this base"),
    ({"clip_l": torch.full((2, 16), torch.nan)}, "one vector of finite numbers"),
    ({"clip_l": torch.ones(16)}, "one vector of finite numbers"),
], ids=["width", "another family", "nan", "no rows"])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(rows, words, folder, tmp_path):
    save_file(rows, tmp_path / "learned_embeds.safetensors")
    base = load_base(folder)
    with pytest.raises(LoraFileError, match=words):
        load(base, tmp_path)
    assert base.new_tokens is None


def test_both_text_encoders_learn(tmp_path):
    base = load_base(make_sdxl_miniature(tmp_path))
    embeddings.add_tokens(base, TOKENS)
    sum(tensor.square().sum() for tensor in base.encode_text(["sks dog"]).values()).backward()
    parts = embeddings.tokens_of(base.text_encoders)
    assert [part.key for part in parts] == ["clip_l", "clip_g"]
    assert all(part.rows.grad.any() for part in parts)
