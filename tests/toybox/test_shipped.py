"""What ships in data/: the base and its subjects, as their cards say they are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dbcore
from dbcore.toybox.gates import from_json, table
from dbcore.toybox.ship import CARD, LIMIT_MIB, RECOMMENDED, size_mib
from dbcore.toybox.subjects import SHIPPED, SHIPPED_SIZE


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(dbcore.TOY_BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_base_is_small_and_in_the_precision_that_stock_pipelines_take():
    from safetensors import safe_open

    assert size_mib(dbcore.TOY_BASE) <= LIMIT_MIB
    files = list(dbcore.TOY_BASE.rglob("*.safetensors"))
    assert len(files) == 6  # text encoder, autoencoder, UNet; toy CLIP, reader, subject encoder
    for path in files:
        wanted = torch.float32 if path.parent.name == "text_encoder" else torch.float16
        with safe_open(path, "pt") as held:
            assert {held.get_tensor(name).dtype for name in held.keys()} == {wanted}  # noqa: SIM118


def test_a_stock_pipeline_draws_the_colour_it_is_asked_for(pipe):
    def draw(prompt):
        made = pipe(prompt, num_inference_steps=8, guidance_scale=4.0,
                    generator=torch.Generator().manual_seed(0))
        return np.asarray(made.images[0], dtype=np.float32)

    red, blue = draw("a photo of a red car"), draw("a photo of a blue car")
    assert red.shape == (64, 64, 3)
    assert red.std() > 10
    middle = np.s_[20:50, 12:52]
    assert red[middle][..., 0].mean() > blue[middle][..., 0].mean() + 20
    assert blue[middle][..., 2].mean() > red[middle][..., 2].mean() + 20


def test_sks_is_one_token_and_its_vector_is_its_own(pipe):
    ids = pipe.tokenizer(["sks", "dog"], add_special_tokens=False).input_ids
    assert [len(i) for i in ids] == [1, 1]
    table_of_words = pipe.text_encoder.get_input_embeddings().weight
    assert not torch.equal(table_of_words[ids[0][0]], table_of_words[ids[1][0]])


def test_recommended_settings_are_those_of_the_code():
    assert json.loads((dbcore.TOY_BASE / "recommended.json").read_text()) == RECOMMENDED


def test_the_card_has_the_gates_that_were_measured():
    card = (dbcore.TOY_BASE / "README.md").read_text(encoding="utf-8")
    gates = from_json((dbcore.TOY_BASE / "gates.json").read_text())
    assert len(gates) >= 20
    assert table(gates) in card
    assert "license: cc0-1.0" in card


def test_clip_and_reader_know_renders():
    pytest.importorskip("numba")
    from dbcore.toybox.clip import load_clip
    from dbcore.toybox.corpus import scenes
    from dbcore.toybox.reader import load_reader, truth
    from dbcore.toybox.scene import caption
    from dbcore.toybox.tracer import render

    world = scenes(12345, 20)  # of no seed that was trained on
    images, texts = [render(*scene) for scene in world], [caption(*scene) for scene in world]
    clip, reader = load_clip(dbcore.TOY_BASE), load_reader(dbcore.TOY_BASE)
    best = (clip.embed_images(images) @ clip.embed_texts(texts).T).argmax(dim=1)
    assert (best == torch.arange(20)).float().mean() >= 0.9
    read = reader.read(images)
    assert np.mean([r["class"] == truth(*scene)["class"] for r, scene in zip(read, world)]) >= 0.9


def test_the_subject_encoder_knows_individuals_of_one_class_and_measures_fidelity():
    pytest.importorskip("numba")
    from dbcore.engines.evaluate import load_encoders
    from dbcore.toybox.encoder import VIEWS, first_among, sample_view
    from dbcore.toybox.tracer import render

    encoder = load_encoders(dbcore.TOY_BASE)[1]
    assert encoder.name == "subject encoder"
    # of no seed that was trained on
    images = [render(*sample_view(12345, k)) for k in range(20 * VIEWS)]
    # 0.05 would be chance; of 50 in one class the card states what it finds
    assert first_among(encoder.images(images).unflatten(0, (1, 20, VIEWS))) >= 0.6


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_subject_is_five_photos_and_its_description(name):
    folder = dbcore.SUBJECTS / name
    photos = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    assert [photo.size for photo in photos] == [(SHIPPED_SIZE, SHIPPED_SIZE)] * 5
    assert len({photo.tobytes() for photo in photos}) == 5
    about = json.loads((folder / "subject.json").read_text())
    assert about["character"] == SHIPPED[name].to_dict()
    assert about["instance_prompt"] == f"a photo of sks {about['class_noun']}"
    assert about["class_prompt"] == f"a photo of a {about['class_noun']}"


def test_the_card_states_the_limits_that_the_recipe_writes():
    card = (dbcore.TOY_BASE / "README.md").read_text(encoding="utf-8")
    assert card[card.index("## Limits"):] == CARD[CARD.index("## Limits"):]
