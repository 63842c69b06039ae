"""Class images: kept under what they depend on, refused when that has changed, shared, topped up,
never blank."""

import dataclasses
import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image
from pipelines import make_tiny_pipeline
from runs import leave_out_report, make_options

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines import prior
from dbcore.engines.prior import MANIFEST, class_images, class_photos
from dbcore.engines.trainer import Run, train
from dbcore.models.base import Family, load_base, resolve

FAST = {"num_inference_steps": 1, "guidance_scale": 2.0, "resolution": 32, "rank": 2}


def make_base(folder, **options):
    make_tiny_pipeline(folder, **options)
    (folder / "recommended.json").write_text(json.dumps(FAST))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wish(folder):
    return TrainConfig(
        pretrained_model_name_or_path=str(folder), instance_data_dir="photos",
        instance_prompt="a photo of sks dog",
        with_prior_preservation=True, class_prompt="a photo of a dog", num_class_images=5,
        sample_batch_size=2)


@pytest.fixture
def config(wish):
    return resolve(wish)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def with_(config, **options):
    return dataclasses.replace(config, **options)


def write_photos(folder, count=3, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for k in range(count):
        Image.fromarray(numbers.integers(0, 255, (32, 32, 3),
                                         dtype=np.uint8)).save(folder / f"photo{k}.png")
    return folder


# --- made, and kept under their name --------------------------------------------------------------


def test_they_are_pictures_of_the_class_each_from_its_own_seed(base, config, cache):
    folder = class_images(base, config)
    made = contents(folder)
    assert folder.is_relative_to(cache)
    assert list(made) == [f"{k:05d}.png" for k in range(5)]
    assert len(set(made.values())) == 5
    seed = prior.key(config.seed, "class image", 0, 3)
    (alone,) = base.generate([config.class_prompt], [seed], stream="class image")
    assert np.abs(np.asarray(alone, int) - np.asarray(Image.open(folder / "00003.png"),
                                                      int)).max() <= 1
    about = json.loads((folder / MANIFEST).read_text())
    assert about["prompt"] == "a photo of a dog"
    assert about["base"] == base.fingerprint()


def test_they_are_drawn_once(base, config, monkeypatch):
    first = class_images(base, config)
    monkeypatch.setattr(base, "generate", lambda *a, **k: pytest.fail("drawn again"))
    assert class_images(base, config) == first


@pytest.mark.parametrize("change",
                         [{"class_prompt": "a photo of a cat"}, {"seed": 1}, {"resolution": 48},
                                    {"prior_generation_precision": "bf16"}])
def test_whatever_they_depend_on_makes_another_folder(base, config, change):
    assert class_images(base, config) != class_images(base, with_(config, **change))


def test_another_base_makes_another_folder(base, config, tmp_path):
    other = load_base(make_base(tmp_path / "other", seed=1))
    assert class_images(base, config) != class_images(other, config)


def test_another_sampler_or_guidance_makes_another_folder(base, config, monkeypatch):
    first = class_images(base, config)
    monkeypatch.setitem(base.settings, "guidance_scale", 3.0)
    assert class_images(base, config) != first


def test_options_they_do_not_depend_on_keep_the_folder(base, config):
    same = with_(config, num_class_images=3, learning_rate=0.5, rank=8, prior_loss_weight=0.1,
                 instance_prompt="sks")
    assert class_images(base, config) == class_images(base, same)


# --- refused, or taken as they are ----------------------------------------------------------------


@pytest.mark.parametrize(("change", "named"), [
    ({"class_prompt": "a photo of a cat"},
     r"another prompt \('a photo of a dog', now 'a photo of a cat'\)"),
    ({"seed": 7}, r"another seed \(0, now 7\)"),
    ({"resolution": 48}, r"another resolution \(32, now 48\)"),
])
def test_a_folder_made_for_something_else_is_refused_by_name(base, config, tmp_path, change, named):
    config = with_(config, class_data_dir=str(tmp_path / "dogs"))
    before = contents(class_images(base, config))
    with pytest.raises(ConfigError, match=named) as refusal:
        class_images(base, with_(config, **change))
    assert "--class_data_dir" in str(refusal.value)
    assert contents(tmp_path / "dogs") == before


def test_a_folder_made_with_another_base_is_refused(base, config, tmp_path):
    config = with_(config, class_data_dir=str(tmp_path / "dogs"))
    class_images(base, config)
    with pytest.raises(ConfigError, match="another base"):
        class_images(load_base(make_base(tmp_path / "other", seed=1)), config)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_manifest_is_refused(base, config, tmp_path, text):
    config = with_(config, class_data_dir=str(tmp_path / "dogs"))
    class_images(base, config)
    (tmp_path / "dogs" / MANIFEST).write_text(text)
    with pytest.raises(ConfigError, match="another base"):
        class_images(base, config)


def test_a_users_own_folder_is_taken_as_it_is(base, config, tmp_path, monkeypatch):
    own = write_photos(tmp_path / "own", 3)
    before = sorted(path.name for path in own.iterdir())
    monkeypatch.setattr(base, "generate", lambda *a, **k: pytest.fail("drawn"))
    config = with_(config, class_data_dir=str(own), num_class_images=2)
    assert class_images(base, config) == own
    assert sorted(path.name for path in own.iterdir()) == before
    assert len(class_photos(own, config)[0]) == 3  # all of them, whatever number was asked for


def test_an_empty_folder_is_filled(base, config, tmp_path):
    (tmp_path / "dogs").mkdir()
    assert (class_images(base, with_(config, class_data_dir=str(tmp_path / "dogs")))
            == tmp_path / "dogs")
    assert len(contents(tmp_path / "dogs")) == 5


# --- missing, shared, half-written ----------------------------------------------------------------


def test_missing_ones_are_topped_up_as_they_were(base, config):
    folder = class_images(base, config)
    whole = contents(folder)
    (folder / "00002.png").unlink()
    class_images(base, config)
    assert contents(folder) == whole


def test_more_are_added_to_those_there_and_fewer_leave_them(base, config):
    folder = class_images(base, with_(config, num_class_images=4))
    few = contents(folder)
    class_images(base, with_(config, num_class_images=6))
    more = contents(folder)
    assert len(more) == 6
    assert few.items() <= more.items()
    fewer = with_(config, num_class_images=3)
    assert ([photo.path.name for photo in class_photos(class_images(base, fewer), fewer)[0]]
            == list(few)[:3])
    assert contents(folder) == more


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_make_the_same_pictures(base, config, tmp_path, world):
    alone = contents(class_images(base, with_(config, class_data_dir=str(tmp_path / "alone"))))
    config, waited = with_(config, class_data_dir=str(tmp_path / "shared")), []
    shares = []
    for rank in range(world):  # one after the other: the last one begins when the others are done
        before = len(contents(tmp_path / "shared"))
        class_images(base, config, rank, world, lambda: waited.append(True))
        shares.append(len(contents(tmp_path / "shared")) - before)
    assert contents(tmp_path / "shared") == alone
    assert len(waited) == world
    assert all(shares)


def test_what_a_killed_run_left_half_named_is_no_class_picture(base, config):
    folder = class_images(base, config)
    shutil.copy(folder / "00001.png", folder / "00001.png.1.partial")
    assert [photo.path.name for photo in class_photos(folder, config)[0]] == [f"{k:05d}.png"
                                                                              for k in range(5)]


# --- blank pictures -------------------------------------------------------------------------------


def test_a_blank_picture_is_drawn_again_and_only_that_one(base, config, monkeypatch):
    draw, asked = base.generate, []
    black = Image.new("RGB", (32, 32))

    def sometimes_black(prompts, seeds, **more):
        asked.append(list(seeds))
        images = draw(prompts, seeds, **more)
        return [black, *images[1:]] if len(asked) == 1 else images

    monkeypatch.setattr(base, "generate", sometimes_black)
    folder = class_images(base, with_(config, num_class_images=2))
    assert asked[1] == [asked[0][0] + 1]
    assert all(np.asarray(Image.open(path)).std() > prior.BLANK for path in folder.glob("*.png"))


def test_pictures_that_stay_blank_stop_the_run(base, config, monkeypatch):
    monkeypatch.setattr(base, "generate",
                        lambda prompts, seeds, **more: [Image.new("RGB", (32, 32), "grey")]
                        * len(seeds))
    with pytest.raises(ConfigError, match=r"came out blank 3 times.*--prior_generation_precision"):
        class_images(base, config)


# --- what training makes of them ------------------------------------------------------------------


def test_making_them_or_reusing_them_changes_no_weight(wish, tmp_path, monkeypatch):
    leave_out_report(monkeypatch)
    photos = write_photos(tmp_path / "photos")

    def weights(name, **options):
        run = with_(wish, instance_data_dir=str(photos), output_dir=str(tmp_path / name),
                    max_train_steps=3, report_to="none", num_class_images=4, **options)
        return hashlib.sha256(train(run).read_bytes()).hexdigest()

    made = weights("made")
    assert made == weights("reused")
    (cached,) = (tmp_path / "cache" / "class_images").iterdir()
    own = tmp_path / "own"
    own.mkdir()
    for path in cached.glob("*.png"):
        shutil.copy(path, own / path.name)
    assert made == weights("with own", class_data_dir=str(own))
    other = write_photos(tmp_path / "noise", 4, seed=1)
    assert made != weights("other", class_data_dir=str(other))


# --- a user's own, in a run -----------------------------------------------------------------------


def test_a_users_own_folder_loads_no_network_and_its_bad_photos_are_named(tmp_path, monkeypatch,
                                                                          capsys):
    own = write_photos(tmp_path / "own", 3)
    (own / "torn.png").write_bytes((own / "photo0.png").read_bytes()[:200])
    loaded, read = [], Family.read_network
    monkeypatch.setattr(Family, "read_network",
                        lambda base, part: (loaded.append(part), read(base, part))[1])
    seen = []
    monkeypatch.setattr(Run, "encode_ahead", lambda run, start: seen.append(loaded[:]))
    monkeypatch.setattr(Run, "loop", lambda *_: None)
    leave_out_report(monkeypatch)
    options = make_options(tmp_path, class_prompt="a photo of a dog", class_data_dir=str(own),
                           with_prior_preservation=True, prior_generation_precision="bf16")
    train(TrainConfig(**options, output_dir=tmp_path / "run"))
    assert seen == [[]]
    assert loaded == ["unet"]
    assert "torn.png" in capsys.readouterr().out


def test_two_jobs_make_one_cache_at_the_same_time(base, config, monkeypatch):
    both, failed = threading.Barrier(2, timeout=20), []
    save = Image.Image.save

    def slowly(image, path, **more):
        save(image, path, **more)
        both.wait()  # both have written the same picture, and neither has renamed it

    def job():
        try:
            class_images(base, config)
        except Exception as error:  # noqa: BLE001 - reported by the assertion
            failed.append(error)

    picture = Image.effect_noise((32, 32), 64).convert("RGB")
    monkeypatch.setattr(base, "generate", lambda prompts, *args, **more: [picture] * len(prompts))
    monkeypatch.setattr(Image.Image, "save", slowly)
    jobs = [threading.Thread(target=job) for _ in range(2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    folder = class_images(base, config)
    assert not failed
    assert len(contents(folder)) == config.num_class_images
    assert not list(folder.glob(".*"))
