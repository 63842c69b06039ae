"""The measures on pictures whose answers are known, and the encoders on small random models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_tokenizer
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dbcore.config import ConfigError
from dbcore.engines import evaluate

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def plain(colour, size=8):
    return Image.new("RGB", (size, size), COLOURS[colour])


def mean_colour(pictures):
    return torch.stack([torch.tensor(np.asarray(p, dtype=np.float32).mean((0, 1)))
                        for p in pictures])


def named_colour(prompts):
    return torch.tensor([COLOURS[next(c for c in COLOURS if c in p)] for p in prompts]).float()


@pytest.fixture
def encoder():
    return evaluate.Encoder("mean colour", mean_colour, named_colour)


def test_features_are_unit_vectors_whatever_the_batch(encoder):
    pictures = [plain("red"), Image.new("RGB", (4, 4), (100, 50, 3)), plain("blue")]
    vectors = encoder.images(pictures)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert torch.equal(vectors, encoder.images(pictures, batch_size=1))
    assert torch.equal(evaluate.features(vectors, encoder), vectors)


def test_subject_fidelity_is_the_mean_over_all_pairs(encoder):
    photos = [plain("red"), plain("red"), plain("blue")]
    assert evaluate.subject_fidelity([plain("red")], photos, encoder) == pytest.approx(2 / 3)
    assert evaluate.subject_fidelity([plain("green")], photos,
                                     encoder) == pytest.approx(0, abs=1e-6)
    assert evaluate.prior_preservation_metric([plain("blue")], photos,
                                              encoder) == pytest.approx(1 / 3)


def test_the_ceiling_leaves_out_each_photo_with_itself(encoder):
    assert evaluate.real_against_real([plain("red"), plain("red"), plain("blue")],
                                      encoder) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="two or more"):
        evaluate.real_against_real([plain("red")], encoder)


def test_prompt_fidelity_compares_each_picture_with_its_own_prompt(encoder):
    pictures = [plain("red"), plain("blue")]
    assert evaluate.prompt_fidelity(pictures, ["a red dog", "a blue dog"],
                                    encoder) == pytest.approx(1)
    assert evaluate.prompt_fidelity(pictures, ["a blue dog", "a red dog"],
                                    encoder) == pytest.approx(0, abs=1e-6)
    assert evaluate.prompt_fidelity(pictures, "a red dog", encoder) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        evaluate.prompt_fidelity(pictures, ["red"] * 3, encoder)


def test_diversity_is_nought_for_copies_and_one_for_strangers(encoder):
    assert evaluate.diversity([plain("red")] * 4, encoder) == pytest.approx(0, abs=1e-6)
    assert evaluate.diversity([plain("red"), plain("green"), plain("blue")],
                              encoder) == pytest.approx(1)


def test_the_nearest_photo_is_found(encoder):
    photos = [plain("green"), plain("blue"), plain("red")]
    which, near = evaluate.nearest_photo([plain("red"), Image.new("RGB", (8, 8), (0, 30, 40))],
                                         photos, encoder)
    assert which == [2, 1]
    assert near == pytest.approx([1, 0.8])


def test_a_copy_is_nearer_to_a_photo_than_photos_are_to_each_other(encoder):
    photos = [plain("blue"), Image.new("RGB", (8, 8), (0, 30, 40))]  # their cosine is 0.8
    near = Image.new("RGB", (8, 8), (0, 40, 30))  # 0.6 and 0.96
    images = [plain("red"), plain("blue"), near, plain("green")]  # green: 0 and 0.6
    assert evaluate.share_of_copies(images, photos, encoder) == 1 / 2
    with pytest.raises(ValueError, match="one photo alone"):
        evaluate.share_of_copies(images, photos[:1], encoder)


def test_agreement_is_the_chance_that_a_right_picture_scores_higher():
    right = [True, True, False, False]
    assert evaluate.agreement([0.9, 0.8, 0.1, 0.2], right) == 1
    assert evaluate.agreement([0.1, 0.2, 0.9, 0.8], right) == 0
    assert evaluate.agreement([0.5, 0.9, 0.5, 0.7], right) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert evaluate.agreement([0.5, 0.9], [True, True]) is None
    assert evaluate.agreement([0.5, 0.9], [False, False]) is None


def test_the_interval_holds_the_mean_and_is_a_function_of_the_seed():
    values = [0.1, 0.4, 0.35, 0.8, 0.6]
    low, high = evaluate.bootstrap_interval(values, seed=3)
    assert 0.1 < low < np.mean(values) < high < 0.8
    assert evaluate.bootstrap_interval(values, seed=3) == (low, high)
    assert evaluate.bootstrap_interval(values, seed=4) != (low, high)
    assert evaluate.bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        evaluate.bootstrap_interval([])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [evaluate.bootstrap_interval(rng.normal(2, 1, 30), count=500) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 2 <= high for low, high in intervals]) <= 0.99


def test_an_encoder_of_pictures_alone_refuses_text_and_none_takes_nothing(encoder):
    blind = evaluate.Encoder("eyes", mean_colour)
    with pytest.raises(ValueError, match="eyes reads images and no text"):
        blind.texts(["red"])
    with pytest.raises(ValueError, match="no image"):
        encoder.images([])


# --- real kinds of encoders, small and random -----------------------------------------------------


def write_preprocessor(folder, side):
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": side, "size": {"shortest_edge": side}, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25], "image_processor_type": "CLIPImageProcessor"}))


def small(**more):
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, **more}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    marks = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id")
             for which in ("bos", "eos", "pad")}
    CLIPModel(CLIPConfig(
        text_config=small(vocab_size=len(tokenizer), max_position_embeddings=16, **marks),
        vision_config=small(image_size=16, patch_size=8), projection_dim=8)).save_pretrained(folder)
    write_preprocessor(folder, 16)
    return folder


def test_a_clip_of_transformers_gives_the_vectors_that_its_model_gives(clip_folder):
    encoder = evaluate.load_encoder(str(clip_folder))
    pictures, prompts = [plain("red", 16), plain("green", 16)], ["a photo of a dog",
                                                                 "a red car on the beach"]
    pixels = torch.stack([(torch.tensor(np.asarray(p)).permute(2, 0, 1) / 255 - 0.5) / 0.25
                          for p in pictures])
    ids = make_tokenizer(clip_folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(clip_folder).eval()(pixel_values=pixels, **ids)
    assert torch.allclose(encoder.images(pictures), whole.image_embeds, atol=1e-5)
    assert torch.allclose(encoder.texts(prompts), whole.text_embeds, atol=1e-5)
    assert encoder.name == str(clip_folder)


def test_a_vit_gives_its_cls_vector_and_reads_no_text(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**small(image_size=16, patch_size=8)),
                     add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    write_preprocessor(tmp_path, 16)
    encoder = evaluate.load_encoder(tmp_path)
    with torch.no_grad():
        truth = model(torch.full((1, 3, 16, 16), 2.0)).last_hidden_state[:, 0]
    vector = encoder.images([Image.new("RGB", (40, 16), (255, 255, 255))])  # a wide one is cropped
    assert torch.allclose(vector, truth / truth.norm(), atol=1e-5)
    with pytest.raises(ValueError, match="reads images and no text"):
        encoder.texts(["dog"])


def test_a_base_names_its_encoders(tmp_path, clip_folder):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "recommended.json").write_text(json.dumps({"metrics": str(clip_folder)}))
    assert [e.name for e in evaluate.load_encoders(tmp_path)] == [str(clip_folder)]


def test_a_base_on_the_hub_is_measured_by_the_usual_encoders(monkeypatch):
    monkeypatch.setattr(evaluate, "load_hub_encoder", lambda name: name)
    found = evaluate.load_encoders("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert found == list(evaluate.ENCODERS)


def test_what_is_no_encoder_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no-such-model"):
        evaluate.load_encoder(str(tmp_path / "no-such-model"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="is a bert"):
        evaluate.load_encoder(tmp_path)
