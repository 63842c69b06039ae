"""The parts of the stack: shapes, round trips to disk, and the gates' own bookkeeping."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dbcore.toybox import corpus, gates
from dbcore.toybox.gates import Gate
from dbcore.toybox.scene import Character, View, mirror


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    from dbcore.toybox.words import train_tokenizer

    return CLIPTokenizer.from_pretrained(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A base of untrained networks, saved as the trained one is."""
    from dbcore.toybox.autoencoder import make_autoencoder
    from dbcore.toybox.clip import ToyCLIP, make_text_encoder
    from dbcore.toybox.denoiser import make_unet
    from dbcore.toybox.encoder import SubjectEncoder
    from dbcore.toybox.reader import Reader
    from dbcore.toybox.ship import save_base

    torch.manual_seed(0)
    clip, reader, encoder = ToyCLIP(
        make_text_encoder(tokenizer)).eval(), Reader().eval(), SubjectEncoder().eval()
    folder = tmp_path_factory.mktemp("base") / "toy_base"
    save_base(folder, tokenizer, clip, make_autoencoder(), make_unet(), reader, encoder)
    return folder, clip.float(), reader, encoder


def pictures(count=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_a_saved_base_is_an_ordinary_pipeline(saved):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(saved[0])
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red dog", num_inference_steps=2,
                 generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_clip_comes_back_as_it_was(saved):
    from dbcore.toybox.clip import load_clip, tokenize

    folder, clip, *_ = saved
    loaded = load_clip(folder)
    images, texts = [Image.fromarray(p) for p in pictures()], ["a photo of a red dog", "a cat"]
    x = torch.from_numpy(pictures()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed_images(images), clip.image_features(x), atol=5e-3,
                                   rtol=0)
        torch.testing.assert_close(loaded.embed_texts(texts),
                                   clip.text_features(tokenize(loaded.tokenizer, texts)),
                                   atol=5e-3, rtol=0)
    torch.testing.assert_close(loaded.embed_texts(texts).norm(dim=1), torch.ones(2))


def test_reader_comes_back_as_it_was(saved):
    from dbcore.toybox.reader import ANSWERS, load_reader

    images = [Image.fromarray(p) for p in pictures(8)]
    read = load_reader(saved[0]).read(images)
    assert read == saved[2].read(images)
    assert all(answer[q] in ANSWERS[q] for answer in read for q in ANSWERS)


def test_subject_encoder_comes_back_as_it_was(saved):
    from dbcore.toybox.encoder import load_subject_encoder

    path = saved[0] / "subject" / "model.safetensors"
    assert path.stat().st_size <= 2e6
    images = [Image.fromarray(p) for p in pictures()]
    loaded = load_subject_encoder(saved[0]).embed_images(images)
    torch.testing.assert_close(loaded, saved[3].embed_images(images), atol=5e-3, rtol=0)


def test_reader_truth_leaves_out_what_cannot_be_seen():
    from dbcore.toybox.reader import truth

    plain = truth(Character("dog", "red", "plain", "blue"), View("snow", flip=True))
    assert plain == {"class": "dog", "color": "red", "pattern": "plain", "color2": "none",
                     "hat": "none",
                     "place": "snow", "side": "left", "angle": "", "size": "", "light": ""}
    assert truth(Character("dog", "red", "striped", "blue", hat="pink"), View())["color2"] == "blue"
    front = truth(Character("dog", "red", legs=0.9, ears=0.1), View("night", azimuth=80, sun=15))
    assert (front["angle"], front["legs"], front["ears"]) == ("front", "big", "small")
    assert not {"side", "light", "tail"} & set(front)


def test_only_the_images_that_answer_a_question_count_for_it():
    from dbcore.toybox.reader import shares_right

    read = [{"class": "dog", "side": "left"}, {"class": "cat", "side": "left"},
            {"class": "dog", "side": "left"}]
    truths = [{"class": "dog", "side": "left"}, {"class": "dog"}, {"class": "dog", "side": "right"}]
    assert shares_right(read, truths) == {"class": pytest.approx(2 / 3), "side": 0.5}


def test_a_mirrored_render_changes_sides_in_its_answers_too():
    from dbcore.toybox.reader import ANSWERS, UNASKED, answer_table, seen_in_mirror, truth

    scenes = [corpus.sample(0, k) for k in range(40)]
    mirrored = torch.arange(40) % 2 == 0
    told = seen_in_mirror(answer_table(scenes), mirrored)
    asked = 0
    for k, (character, view) in enumerate(scenes):
        right = truth(*(mirror(character, view) if mirrored[k] else (character, view)))
        for question, choices in ANSWERS.items():
            wanted = choices.index(right[question]) if question in right else UNASKED
            assert told[question][k] == wanted
        asked += mirrored[k] and "side" in right
    assert asked > 5


def test_a_moved_render_keeps_its_size_and_its_middle():
    from dbcore.toybox.reader import moved

    x = torch.zeros(30, 3, 64, 64)
    x[:, :, 20:30, 10:20] = 1.0
    made = moved(x, torch.arange(30) < 15, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    assert made.sum((1, 2, 3)).unique().tolist() == [300.0]  # nothing left the frame
    columns = (made[:, 0].amax(1) * torch.arange(64)).argmax(1) - 9  # where it begins
    assert columns[:15].min() >= 40
    assert columns[15:].max() <= 14
    assert len(columns[15:].unique()) > 4


def test_a_reader_of_fewer_questions_is_read(tmp_path):
    from dbcore.toybox.fit import save_half
    from dbcore.toybox.reader import Reader, load_reader

    save_half(Reader(["class", "side"]), tmp_path / "reader")
    answers = load_reader(tmp_path).read([Image.fromarray(p) for p in pictures(1)])
    assert set(answers[0]) == {"class", "side"}


def test_sharpness_is_one_for_the_same_images_and_less_for_blurred_ones():
    sharp = pictures(4)
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(1)))
                        for p in sharp])
    assert gates.sharpness(blurred) < 0.5 * gates.sharpness(sharp)


def test_pca_codes_have_unit_variance_and_tell_hue():
    from dbcore.toybox.autoencoder import CHANNELS, PatchPCA, to_tensor

    rng = np.random.default_rng(0)
    # broad colour and gradients, as pictures have, not white noise
    small = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC))
                       for s in small])
    codes = PatchPCA(images)(to_tensor(images))
    assert codes.shape == (40, CHANNELS, 8, 8)
    torch.testing.assert_close(codes.var(dim=(0, 2, 3)), torch.ones(CHANNELS), atol=0.05, rtol=0)
    red, blue = (np.full((1, 32, 32, 3), colour, np.uint8)
                 for colour in ((200, 40, 40), (40, 40, 200)))
    assert (PatchPCA(images)(to_tensor(red)) - PatchPCA(images)(to_tensor(blue))).abs().max() > 0.5


def test_psnr_of_a_known_error(monkeypatch):
    from dbcore.toybox import autoencoder

    images = pictures(2) // 2
    monkeypatch.setattr(autoencoder, "reconstruct", lambda net, x: x + np.uint8(10))
    assert autoencoder.psnr(None, images) == pytest.approx(20 * np.log10(25.5))


def test_latents_are_kept_in_shards_of_images_and_their_mirror_images(tmp_path, monkeypatch):
    from dbcore.toybox import autoencoder

    torch.manual_seed(0)
    net, images = autoencoder.make_autoencoder().eval(), pictures(3)
    monkeypatch.setattr(autoencoder, "render_shard", lambda folder, seed, number: images)
    latents = autoencoder.latent_shard(net, tmp_path, 0, 7)
    assert latents.shape == (2, 3, autoencoder.CHANNELS, 16, 16)
    with torch.no_grad(), autoencoder.half_where_fast():
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = net.encode(x.flip(-1)).latent_dist.mean.float()[2:]
    np.testing.assert_allclose(latents[1, 2:], expected.numpy(), atol=5e-3)

    def dies(*args):
        raise KeyboardInterrupt

    net.encode = dies
    np.testing.assert_array_equal(autoencoder.latent_shard(net, tmp_path, 0, 7), latents)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.latent_shard(net, tmp_path, 0, 8)
    assert not list(tmp_path.rglob("*8.npy"))


def test_more_scenes_come_as_the_training_goes_on(monkeypatch):
    from dbcore.toybox import denoiser

    asked = []
    monkeypatch.setattr(denoiser, "SHARD", 4)
    monkeypatch.setattr(denoiser.Latents, "FIRST", 8)
    monkeypatch.setattr(denoiser, "latent_shard",
                        lambda net, folder, seed, number: asked.append(number) or
                        np.full((2, 4, 4, 16, 16), number, np.float16)
                        + np.array([0, 0.5])[:, None, None, None, None])
    latents = denoiser.Latents(None, None, None, 0, batch=16)
    z, scenes = latents.batch_at(0, np.random.default_rng(0))
    assert asked == [0, 1]
    assert latents.available(10) == 20
    latents.batch_at(10, np.random.default_rng(0))
    assert asked == [0, 1, 2, 3, 4]
    world = [denoiser.sample(0, k) for k in range(8)]
    for row, scene in zip(z, scenes, strict=True):
        value = float(row.flatten()[0])
        mirrored = value % 1 == 0.5
        first = int(value) * 4
        assert (denoiser.mirror(*scene) if mirrored else scene) in world[first:first + 4]


def test_each_sample_gets_the_noise_nearest_to_it():
    from dbcore.toybox.denoiser import near_noise

    pytest.importorskip("scipy")
    z = torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    free = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    noise = near_noise(z, torch.Generator().manual_seed(2))
    # the same ones, in other places
    assert torch.equal(noise.flatten(1).sort(0).values, free.flatten(1).sort(0).values)
    assert (noise - z).norm() < 0.95 * (free - z).norm()

def test_gates_pass_miss_and_survive_the_disk():
    found = [Gate("high", 0.9, 0.95), Gate("low", 0.9, 0.85),
             Gate("quick", 4, 3.2, least=False, note="2 threads"),
             Gate("slow", 4, 5.0, least=False)]
    assert [gate.passed for gate in found] == [True, False, True, False]
    assert gates.from_json(gates.to_json(found)) == found
    assert [row["passed"] for row in json.loads(gates.to_json(found))] == [True, False, True, False]
    lines = gates.table(found).splitlines()
    assert len(lines) == 6
    assert "| low | >= 0.9 | 0.85 | missed |" in lines
    assert "| quick (2 threads) | <= 4 | 3.2 | passed |" in lines


def test_a_subject_is_its_identity_not_its_hat_or_place():
    character = Character("dog", "orange", "striped", "blue")
    read = {"class": "dog", "color": "orange", "pattern": "striped", "color2": "blue", "hat": "red",
            "place": "snow"}
    assert gates.is_subject(read, character)
    for question, wrong in (("class", "cat"), ("color", "red"), ("pattern", "plain"),
                            ("color2", "none")):
        assert not gates.is_subject({**read, question: wrong}, character)


def test_the_decoder_learns_stronger_edges_and_leaves_latents_alone(tmp_path):
    from dbcore.toybox.autoencoder import laplacian, make_autoencoder, to_tensor, train_decoder

    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    torch.manual_seed(0)
    net, x = make_autoencoder().eval(), to_tensor(images)
    with torch.no_grad():
        z = net.encode(x).latent_dist.mean
        before = laplacian(net.decode(z).sample).var()
    train_decoder(net, images, tmp_path, 0, steps=15, batch=8)
    with torch.no_grad():
        assert torch.equal(net.encode(x).latent_dist.mean, z)
        assert laplacian(net.decode(z).sample).var() > 1.5 * before
