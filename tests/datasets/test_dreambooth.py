"""Which photo, seen how, with which words: a batch is a function of (seed, step), whoever asks."""

import dataclasses
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pipelines import make_tiny_pipeline
from runs import Copies, make_photos

from dbcore.config import TrainConfig
from dbcore.datasets.dreambooth import (
    CROPS,
    DreamBoothData,
    Sample,
    look,
    refuse_shared,
    steps_per_epoch,
)
from dbcore.datasets.photos import Photo, PhotoError, gather_photos, nearest_bucket
from dbcore.models.base import load_base
from dbcore.utils.seeding import integer, permutation

OPTIONS = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog",
           "resolution": 32,
           "train_batch_size": 1}


def config(**options):
    return TrainConfig(**{**OPTIONS, **options})


def named(count, kind="subject"):
    return [Photo(Path(f"{kind}{k}.png"), (32, 32)) for k in range(count)]


def names(samples):
    return [s.photo.path.stem for s in samples]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_pipeline(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four real files: squares and oblongs, one with a mask, one with a caption."""
    folder, numbers = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k, (width, height) in enumerate([(40, 40), (60, 40), (40, 70), (48, 48)]):
        Image.fromarray(numbers.integers(0, 255, (height, width, 3),
                                         dtype=np.uint8)).save(folder / f"{k}.png")
    Image.fromarray(np.tri(40, dtype=np.uint8) * 255).save(folder / "0.mask.png")
    (folder / "1.txt").write_text("a photo of sks dog on the beach")
    return gather_photos(folder)[0]


def test_a_photo_of_the_subject_is_refused_as_one_of_the_class(photos, tmp_path):
    """The folders are two, and one links to the other."""
    (tmp_path / "class").symlink_to(photos[0].path.parent, target_is_directory=True)
    with pytest.raises(PhotoError,
                       match=r"--class_data_dir leads to .*, which is a photo of the subject"):
        refuse_shared(photos, gather_photos(tmp_path)[0])
    refuse_shared(photos[:2], photos[2:])
    shutil.copy(photos[0].path, tmp_path / "copy.png")
    with pytest.raises(PhotoError, match=r"leads to .*copy.png, which is a photo of the subject"):
        refuse_shared(photos, [photo for photo in gather_photos(tmp_path)[0]
                               if photo.path.name == "copy.png"])


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_subject_comes_first_then_as_many_of_the_class(batch):
    data = DreamBoothData(config(train_batch_size=batch), named(5), named(7, "class"))
    for step in range(4):
        samples = data.samples(step)
        assert [s.is_class for s in samples] == [False] * batch + [True] * batch
        assert ([s.prompt for s in samples] == ["a photo of sks dog"] * batch
                + ["a photo of a dog"] * batch)
        assert all(name.startswith("class") for name in names(samples)[batch:])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_without_class_images_the_batch_is_the_subject_alone(batch):
    samples = DreamBoothData(config(train_batch_size=batch), named(5)).samples(0)
    assert len(samples) == batch
    assert not any(s.is_class for s in samples)


def test_three_photos_in_batches_of_two_are_seen_equally_often():
    data = DreamBoothData(config(train_batch_size=2), named(3))
    batches = [names(data.samples(step)) for step in range(3)]
    assert all(len(batch) == 2 for batch in batches)  # no partial batch, none dropped
    assert set(Counter(name for batch in batches for name in batch).values()) == {2}
    assert steps_per_epoch(data.config, len(data.photos)) == 2


def test_each_pass_has_every_photo_once_in_an_order_of_its_own():
    data = DreamBoothData(config(), named(8))
    seen = [names(data.samples(step))[0] for step in range(24)]
    passes = [seen[k:k + 8] for k in (0, 8, 16)]
    assert all(len(set(one)) == 8 for one in passes)
    assert passes[0] != passes[1] != passes[2]
    other = DreamBoothData(config(seed=1), named(8))
    assert [names(other.samples(step))[0] for step in range(8)] != passes[0]


def test_a_step_can_be_asked_for_alone():
    """What a resumed run does: nothing before the step was drawn."""
    run, resumed = (DreamBoothData(config(train_batch_size=2), named(5), named(9, "class"))
                    for _ in range(2))
    before = [run.samples(step) for step in range(12)]
    assert resumed.samples(11) == before[11]


def test_sample_g_is_photo_g_of_passes_that_are_permutations_of_the_seed():
    data = DreamBoothData(config(train_batch_size=2, seed=5), named(5), named(3, "class"))
    for g in range(20):
        subject, of_class = (data.samples(g // 2)[g % 2 + more] for more in (0, 2))
        for sample, count, stream in ((subject, 5, "instance"), (of_class, 3, "class")):
            epoch, place = divmod(g, count)
            assert (sample.photo.path.stem[-1]
                    == str(permutation(count, 5, stream, epoch)[place]))


# --- aspect-ratio buckets -------------------------------------------------------------------------

SIZES = [(60, 40), (90, 60), (40, 60), (50, 50), (30, 45), (64, 40)]  # 3 wide, 2 high, 1 between
BUCKETS = {"aspect_ratio_buckets": "24,36;36,24"}


def mixed():
    return [Photo(Path(f"{k}.png"), size) for k, size in enumerate(SIZES)]


def test_without_buckets_there_is_one_of_the_resolution():
    """And its samples are those of a run that names it, though there is another that none needs."""
    plain, named_ = (DreamBoothData(config(train_batch_size=2, random_flip=True, **more), mixed(),
                                    named(3, "class"))
                     for more in ({}, {"aspect_ratio_buckets": "32,32;32,320"}))
    for step in range(9):
        assert plain.samples(step) == named_.samples(step)
        assert {s.bucket for s in plain.samples(step)} == {(32, 32)}


def test_a_batch_is_of_one_bucket_and_every_photo_is_seen_equally_often():
    data = DreamBoothData(config(train_batch_size=3, **BUCKETS), mixed())
    batches = [data.samples(step) for step in range(4 * len(SIZES))]
    assert all(len({sample.bucket for sample in batch}) == 1 for batch in batches)
    assert len({batch[0].bucket for batch in batches[:len(SIZES)]}) == 2
    seen = Counter(sample.photo for batch in batches for sample in batch)
    assert set(seen.values()) == {3 * 4}
    assert len(seen) == len(SIZES)
    assert all(nearest_bucket(sample.photo.size, data.config.buckets) == sample.bucket
               for batch in batches for sample in batch)
    other = DreamBoothData(config(train_batch_size=3, seed=1, **BUCKETS), mixed())
    assert [batch[0].bucket for batch in batches] != [other.samples(step)[0].bucket
                                                      for step in range(len(batches))]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_see_the_buckets_that_one_process_with_the_whole_batch_sees(world):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, **BUCKETS}
    one = DreamBoothData(config(train_batch_size=4, **options), mixed(), named(3, "class"))
    many = DreamBoothData(config(train_batch_size=4 // world, **options), mixed(),
                          named(3, "class"))
    for step, micro in ((0, 0), (0, 1), (7, 1)):
        rows = [s for rank in range(world) for s in many.samples(step, micro, rank, world)]
        assert sorted(rows, key=lambda s: s.is_class) == one.samples(step, micro)


def test_class_images_are_cropped_to_the_bucket_of_their_batch_and_kept_apart(base, photos):
    """One square class image is encoded once for each bucket that it is in."""
    data = DreamBoothData(config(train_batch_size=2, center_crop=True, **BUCKETS), photos[1:3],
                          photos[:1])
    shapes = set()
    for step in range(4):
        data.encode(base, samples := data.samples(step))
        batch = data.batch(base, samples, step)
        height, width = samples[0].bucket
        assert [s.bucket for s in samples] == [(height, width)] * 4
        assert batch["x0"].shape == batch["noise"].shape == (4, 4, height // 2, width // 2)
        assert batch["mask"].shape == (4, 1, height // 2, width // 2)
        assert batch["geometry"][:, 4:].tolist() == [[height, width]] * 4
        shapes.add((height, width))
    assert shapes == {(24, 36), (36, 24)}
    assert len(data.latents.where) == 2 + 2


def test_photo_and_mask_are_cropped_to_the_bucket_without_distortion(tmp_path):
    """Of a photo whose left third is red, and so is the mask, the bucket shows the middle."""
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.mask.png")
    (photo,), _ = gather_photos(tmp_path)
    sample = Sample(photo, "a dog", (40, 40), 0.5, False, 0)
    image, mask = look(sample, config())
    assert sample.box == (15, 0, 45, 30)
    wide = replace(sample, bucket=(24, 36))
    image, mask = look(wide, config())
    assert wide.box == (8, 0, 53, 30)  # 12 of 45 columns are red
    assert image.shape == (3, 24, 36)
    assert mask.size == (36, 24)
    assert float((image[0] > 0).float().mean()) == pytest.approx(12 / 45, abs=0.03)
    assert np.array_equal(np.asarray(mask) > 127, image[0].numpy() > 0)


# --- processes and accumulation -------------------------------------------------------------------


@pytest.mark.parametrize(("world", "batch", "micros"),
                         [(2, 1, 1), (2, 3, 1), (4, 2, 1), (1, 2, 4), (2, 2, 2)])
def test_processes_and_accumulation_draw_what_one_large_batch_draws(base, photos, world, batch,
                                                                    micros):
    options = {"random_flip": True, "noise_offset": 0.1, "seed": 3}
    whole = DreamBoothData(config(train_batch_size=world * batch * micros, **options), photos,
                           photos[::-1])
    parts = DreamBoothData(config(train_batch_size=batch, gradient_accumulation_steps=micros,
                                  **options),
                           photos, photos[::-1])
    for step in (0, 5):
        wanted = whole.samples(step)
        got = [parts.samples(step, micro, rank, world) for micro in range(micros)
               for rank in range(world)]
        subject, of_class = ([s for part in got for s in part if s.is_class == kind]
                             for kind in (False, True))
        assert subject + of_class == wanted
        for sample in wanted:
            ours, theirs = (d.draws(sample, step, (4, 16, 16)) for d in (whole, parts))
            assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2]))
            assert ours[2] == theirs[2]


def test_every_draw_is_its_own():
    data = DreamBoothData(config(train_batch_size=2), named(2), named(2, "class"))
    samples = data.samples(0)
    noises = [data.draws(s, step, (4, 4, 4))[1] for step in (0, 1) for s in samples]
    epsilons = [data.draws(s, 0, (4, 4, 4))[0] for s in samples]
    different = [tuple(t.flatten().tolist()) for t in noises + epsilons]
    assert len(set(different)) == len(different)


def test_class_images_change_nothing_for_the_subject():
    alone, beside = (DreamBoothData(config(random_flip=True), named(5), c)
                     for c in ([], named(3, "class")))
    for step in range(6):
        (one, *_), (two, *_) = alone.samples(step), beside.samples(step)
        assert one == two
        assert torch.equal(alone.draws(one, step, (4, 4, 4))[1],
                           beside.draws(two, step, (4, 4, 4))[1])


# --- words and views ------------------------------------------------------------------------------


def test_a_photos_caption_wins_over_the_prompt(photos):
    data = DreamBoothData(config(), photos, photos)
    by_photo = {s.photo.path.stem: s.prompt for step in range(4) for s in data.samples(step)
                if not s.is_class}
    assert by_photo == {"1": "a photo of sks dog on the beach",
                        **dict.fromkeys("023", "a photo of sks dog")}
    assert {s.prompt for step in range(4) for s in data.samples(step)
            if s.is_class} == {"a photo of a dog"}


def test_words_are_dropped_as_often_as_asked_and_never_the_classs(photos):
    data = DreamBoothData(config(caption_dropout=0.3), photos, photos)
    samples = [s for step in range(400) for s in data.samples(step)]
    own = [s.prompt for s in samples if not s.is_class]
    assert 0.25 < np.mean([prompt == "" for prompt in own]) < 0.35
    assert {s.prompt for s in samples if s.is_class} == {"a photo of a dog"}
    all_dropped = DreamBoothData(config(caption_dropout=1), photos)
    assert {s.prompt for step in range(9) for s in all_dropped.samples(step)} == {""}


def test_tags_change_places_but_for_the_first():
    data = DreamBoothData(config(shuffle_tags=True, instance_prompt="sks dog, red, old,wet"),
                          named(2))
    met = Counter(data.samples(step)[0].prompt for step in range(60))
    assert len(met) == 6
    assert {prompt[:9] for prompt in met} == {"sks dog, "}
    assert {" ".join(sorted(prompt.split(", ")[1:])) for prompt in met} == {"old red wet"}


def test_two_processes_say_what_one_says():
    more = {"shuffle_tags": True, "caption_dropout": 0.5, "prior_prediction": True,
            "instance_prompt": "sks dog, red, old, wet"}
    pair = DreamBoothData(config(**more), named(3))
    one = DreamBoothData(config(**more, train_batch_size=2), named(3))
    for step in range(8):
        first, second = (pair.samples(step, rank=rank, world=2) for rank in (0, 1))
        assert [*first[:1], *second[:1], *first[1:], *second[1:]] == one.samples(step)


def test_a_dropped_caption_is_kept_by_the_class_prompt():
    data = DreamBoothData(config(caption_dropout=1, prior_prediction=True), named(1))
    assert [s.prompt for s in data.samples(0)] == ["", "a photo of a dog"]


def test_crops_and_mirrors_are_drawn_and_can_be_switched_off():
    oblong = [Photo(Path("long.png"), (60, 40))]
    free = DreamBoothData(config(random_flip=True), oblong)
    views = {s.view[1:] for step in range(60) for s in free.samples(step)}
    assert len({place for _, place, _ in views}) == CROPS
    assert {mirrored for *_, mirrored in views} == {False, True}
    fixed = DreamBoothData(config(center_crop=True), oblong)
    assert {s.view[1:] for step in range(20) for s in fixed.samples(step)} == {
        ((32, 32), 0.5, False)}


# --- the latents' store ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_cached_and_uncached_batches_are_the_same(base, photos, batch):
    options = {"train_batch_size": batch, "random_flip": True, "noise_offset": 0.05}
    cached = DreamBoothData(config(**options), photos, photos[1:])
    fresh = DreamBoothData(config(cache_latents=False, **options), photos, photos[1:])
    for step in range(4):  # all encoded ahead, as a run does, before the first is read
        cached.encode(base, cached.samples(step))
    for step in range(4):
        one, two = (d.batch(base, d.samples(step), step) for d in (cached, fresh))
        assert one["prompts"] == two["prompts"]
        assert one["x0"].shape == (2 * batch, 4, 16, 16)
        for name in ("noise", "t", "mask"):
            assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one["x0"], two["x0"], rtol=1e-4, atol=1e-5)


def test_each_view_is_encoded_once(base, photos, monkeypatch):
    data, encoded = DreamBoothData(config(), photos[:1] + photos[3:]), []
    encode = base.encode_images
    monkeypatch.setattr(base, "encode_images", lambda pixels: encoded.append(len(pixels))
                        or encode(pixels))
    for step in range(10):
        data.encode(base, data.samples(step))
    assert sum(encoded) == 2  # two square photos, ten steps


def test_a_mask_follows_its_photo(base, photos):
    data = DreamBoothData(config(train_batch_size=4, cache_latents=False), photos)
    batch = data.batch(base, samples := data.samples(0), 0)
    masks = dict(zip(names(samples), batch["mask"]))
    assert masks["1"].eq(1).all()
    assert masks["0"].mean() == pytest.approx(0.5, abs=0.05)
    assert masks["0"][0, -1, 0] == 1
    assert masks["0"][0, 0, -1] == 0
    ignored = DreamBoothData(config(train_batch_size=4, cache_latents=False, use_masks=False),
                             photos)
    assert ignored.batch(base, samples, 0)["mask"].eq(1).all()


def test_x0_is_drawn_from_the_posterior(base, photos):
    """mean + std * epsilon, not the mean."""
    data = DreamBoothData(config(), photos)
    data.encode(base, samples := data.samples(0))
    entry = data.latents.get(samples[0].view)
    epsilon = data.draws(samples[0], 0, (4, 16, 16))[0]
    torch.testing.assert_close(data.batch(base, samples, 0)["x0"][0],
                               entry["mean"] + entry["std"] * epsilon)
    assert entry["std"].min() > 0


class Grey(Photo):
    def load(self):
        return Image.new("RGB", (8, 8), "grey")


class Encoder:
    """Latents of 32 kB an image, as a base of 256 x 256 pixels has them."""

    device = torch.device("cpu")

    def encode_images(self, pixels):
        return torch.zeros(len(pixels), 4, 32, 32), torch.ones(len(pixels), 4, 32, 32)


def test_five_thousand_photos_do_not_grow_memory():
    many = [Grey(Path(f"{k}.png"), (8, 8)) for k in range(5000)]
    data = DreamBoothData(dataclasses.replace(config(), train_batch_size=50, resolution=8), many)
    data.encode(Encoder(), data.samples(0))
    before = psutil.Process().memory_info().rss
    for step in range(100):
        data.encode(Encoder(), data.samples(step))
    grown = psutil.Process().memory_info().rss - before
    assert len(data.latents.where) == 5000
    assert grown < 40e6, f"{grown / 1e6:.0f} MB for 180 MB of latents"


# --- what a sample says of itself -----------------------------------------------------------------


@pytest.mark.parametrize(("size", "place", "mirrored", "wanted"), [
    ((400, 300), 1.0, False, [300, 400, 0, 50, 150, 150]),  # the right end, at half size
    ((400, 300), 1.0, True, [300, 400, 0, 0, 150, 150]),  # which is the left end in a mirror
    ((300, 600), 0.5, False, [600, 300, 75, 0, 150, 150]),
    ((400, 300), 1.0, False, [300, 400, 12, 0, 100, 150]),  # 400 x 267 of it, the lowest
])  # fmt: skip
def test_geometry_is_that_of_the_photo_and_of_the_crop_once_resized(size, place, mirrored, wanted):
    sample = Sample(Photo("photo.png", size), "a dog", tuple(wanted[4:]), place, mirrored, 0)
    assert sample.geometry == wanted


def test_a_batch_carries_each_samples_geometry_and_time(base, photos):
    data = DreamBoothData(config(train_batch_size=3), photos)
    samples = data.samples(0)
    data.encode(base, samples)
    batch = data.batch(base, samples, 0)
    assert batch["geometry"].tolist() == [sample.geometry for sample in samples]
    assert batch["t"].tolist() == [integer(1000, 0, "timestep", 0, sample.number)
                                   for sample in samples]


def test_all_that_a_step_needs_goes_to_the_device_in_one_copy(base, tmp_path, monkeypatch):
    data = DreamBoothData(config(train_batch_size=2), gather_photos(make_photos(tmp_path), 32)[0])
    samples = data.samples(0)
    data.encode(base, samples)
    here = data.batch(base, samples, 0)
    monkeypatch.setattr(base, "device", torch.device("meta"))
    with Copies() as copies:
        there = data.batch(base, samples, 0)
    assert copies.count == 1
    assert there.pop("prompts") == here.pop("prompts")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in there.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in here.items()}
