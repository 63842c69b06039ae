"""The tokenizer: the world's words are one token each, and the rare ones are in no caption."""

import pytest

from dbcore.toybox.corpus import scenes
from dbcore.toybox.scene import caption
from dbcore.toybox.words import (
    IDENTIFIERS,
    MAX_LENGTH,
    make_chat_tokenizer,
    train_tokenizer,
    words,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_every_word_is_one_token_of_its_own(tokenizer):
    ids = [tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in words()]
    assert {len(i) for i in ids} == {1}
    assert len(set(ids)) == len(ids)


def test_an_unknown_word_falls_into_pieces(tokenizer):
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) > 1


def test_captions_fit_and_come_back(tokenizer):
    texts = [caption(*scene) for scene in scenes(0, 2000)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= MAX_LENGTH
        assert tokenizer.decode(ids, skip_special_tokens=True).strip().replace(" ,", ",") == text


def test_rare_words_are_in_no_caption():
    used = {word for scene in scenes(0, 3000) for word in caption(*scene).replace(",", "").split()}
    assert not used & set(IDENTIFIERS)
    assert "dog" in used


def test_the_vocabulary_is_the_same_every_time(tokenizer, tmp_path):
    train_tokenizer(tmp_path)
    from transformers import CLIPTokenizer

    assert CLIPTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.fixture(scope="module")
def chat():
    return make_chat_tokenizer()


def test_a_chat_model_has_a_token_for_every_word_alone_and_after_a_space(chat):
    ids = [tuple(chat(space + word, add_special_tokens=False).input_ids)
           for word in words() for space in ("", " ")]
    assert {len(i) for i in ids} == {1}
    assert len(set(ids)) == len(ids)
    assert len(chat("zebra", add_special_tokens=False).input_ids) > 1


def test_a_chat_models_captions_fit_between_two_marks(chat):
    for scene in scenes(0, 300):
        text = caption(*scene)
        message = chat.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = chat(message).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= MAX_LENGTH
        assert chat.decode(ids) == f"<|im_start|> {text}<|im_end|>"
