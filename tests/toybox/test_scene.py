"""The world: exact captions, a tracer that repeats itself, and everything a caption names
visible."""

import numpy as np
import pytest

from dbcore.toybox.corpus import HELD_OUT, sample, sample_held_out, scenes
from dbcore.toybox.scene import (
    BUILD,
    CLASSES,
    COLORS,
    PLACES,
    Character,
    View,
    caption,
    mirror,
    named_build,
    random_character,
    random_view,
    with_hat,
)

pytest.importorskip("numba")


def picture(character, size=48, **view):
    from dbcore.toybox.tracer import render_array

    return render_array(character, View(**view), size)


DOG = Character("dog", "white", "plain", "black")


@pytest.mark.parametrize(("character", "place", "expected"), [
    (DOG, "studio", "a photo of a white dog, from the right"),
    (Character("dog", "white", "spotted", "black"), "beach",
     "a photo of a white dog with black spots on the beach, from the right"),
    (Character("cat", "orange", "striped", "blue", hat="red"), "snow",
     "a photo of an orange cat with blue stripes wearing a red hat in the snow, from the right"),
    (Character("robot", "gray", hat="pink"), "water",
     "a photo of a gray robot wearing a pink hat swimming in water, from the right"),
])
def test_a_caption_says_exactly_what_is_there(character, place, expected):
    assert caption(character, View(place)) == expected


@pytest.mark.parametrize(("build", "view", "expected"), [
    ({"legs": 0.9}, {}, "a photo of a white dog with long legs, from the right"),
    ({"legs": 0.9, "ears": 0.1}, {"flip": True},
     "a photo of a white dog with small ears and long legs, from the left"),
    ({"tail": 0.1, "ears": 0.8, "length": 0.9}, {"azimuth": 5},
     "a photo of a white dog with big ears, a short tail and a long body, from the right side"),
    ({}, {"azimuth": 80, "flip": True}, "a photo of a white dog, from the front"),
    ({}, {"place": "snow", "distance": 0.75},
     "a photo of a white dog in the snow, from the right, close up"),
    ({}, {"distance": 1.4, "sun": 18},
     "a photo of a white dog, from the right, far away, in low sun"),
    ({"legs": 0.9}, {"place": "water"}, "a photo of a white dog swimming in water, from the right"),
    ({}, {"place": "night", "sun": 18}, "a photo of a white dog at night, from the right"),
    ({"legs": 0.6, "ears": 0.4}, {}, "a photo of a white dog, from the right"),
])
def test_whatever_varies_has_words(build, view, expected):
    assert caption(Character("dog", "white", **build), View(**view)) == expected


def test_attributes_are_dropped_and_none_is_invented():
    character, view = Character("cat", "orange", "striped", "blue", hat="red",
                                legs=0.9), View("snow", sun=15)
    rng = np.random.default_rng(0)
    texts = {caption(character, view, rng, drop=0.5) for _ in range(300)}
    full = set(caption(character, view).replace(",", "").split())
    assert {word for text in texts for word in text.replace(",", "").split()} <= full | {"a", "an"}
    assert any("blue" not in text and "stripes" in text for text in texts)
    assert any("snow" not in text for text in texts)
    assert any("long legs" in text for text in texts)
    assert all("cat" in text for text in texts)


def test_details_are_dropped_at_a_rate_of_their_own():
    character, view = Character("cat", "orange", legs=0.9), View("snow", sun=15)
    rng = np.random.default_rng(0)
    assert (caption(character, view, rng, drop=0, drop_details=1) == "a photo of an orange "
            "cat in the snow")
    assert (caption(character, view, rng, drop=1, drop_details=0)
            == "a cat with long legs, from the right, in low sun")


@pytest.mark.parametrize("kind", CLASSES)
def test_each_word_for_a_build_can_be_seen(kind):
    for name, phrases in BUILD[kind].items():
        if any(phrases):  # a few pixels, an eye or a crest, are enough
            small, large = (picture(Character(kind, "red", **{name: value}))
                            for value in (0.1, 0.9))
            changed = (abs(small - large).max(axis=-1) > 0.15).mean()
            assert changed > 0.003, f"{phrases} changes {changed:.1%} of the image"


def test_side_angle_distance_and_light_can_be_seen():
    usual = picture(DOG)
    for view in ({"flip": True}, {"azimuth": 5}, {"azimuth": 82}, {"distance": 0.75},
                 {"distance": 1.4}, {"sun": 18}):
        assert (abs(picture(DOG, **view) - usual).max(axis=-1) > 0.15).mean() > 0.02, view


def test_a_random_view_is_of_one_kind_or_clearly_of_another():
    rng = np.random.default_rng(0)
    views = [random_view(rng) for _ in range(400)]
    assert {v.angle for v in views} == {"side", "", "front"}
    assert {v.size for v in views} == {"close up", "", "far away"}
    assert not any(14 < v.azimuth < 24 or 56 < v.azimuth < 74 for v in views)
    assert 0.05 < np.mean([v.sun < 30 for v in views]) < 0.3


def test_the_mirrored_scene_is_the_mirror_image_with_its_own_words():
    from dbcore.toybox.tracer import render_array

    scene = Character("dog", "red"), View("grass")
    np.testing.assert_array_equal(render_array(*mirror(*scene), 32),
                                  render_array(*scene, 32)[:, ::-1])
    assert "from the right" in caption(*scene)
    assert "from the left" in caption(*mirror(*scene))


def test_no_word_for_what_cannot_be_seen():
    assert named_build(Character("robot", "red", ears=0.9), View()) == {"ears": 1}
    assert named_build(Character("robot", "red", ears=0.9, hat="red"), View()) == {}
    assert named_build(Character("duck", "red", ears=0.1), View()) == {}  # no crest: nothing to say


def test_a_name_that_does_not_exist_is_refused_with_the_ones_that_do():
    with pytest.raises(ValueError, match=r"Character.color is 'mauve'.*red"):
        Character("dog", "mauve")
    with pytest.raises(ValueError, match=r"View.place is 'moon'.*studio"):
        View("moon")


def test_one_scene_gives_one_picture():
    character, view = sample(0, 5)
    from dbcore.toybox.tracer import render_array

    first, second = render_array(character, view, 32), render_array(character, view, 32)
    assert first.shape == (32, 32, 3)
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(first, second)


def test_flip_is_the_mirror_image():
    np.testing.assert_array_equal(picture(DOG, flip=True), picture(DOG)[:, ::-1])


def test_every_place_class_and_colour_looks_different():
    def alike(pictures):
        return [(i, j) for i in range(len(pictures)) for j in range(i)
                if abs(pictures[i] - pictures[j]).mean() < 0.004]

    assert alike([picture(DOG, place=place) for place in PLACES]) == []
    assert alike([picture(Character(kind, "red")) for kind in CLASSES]) == []
    assert alike([picture(Character("dog", color)) for color in COLORS]) == []


@pytest.mark.parametrize("kind", CLASSES)
def test_pattern_and_hat_can_be_seen(kind):
    plain = picture(Character(kind, "white"))
    for marked in (Character(kind, "white", "spotted", "black"),
                   Character(kind, "white", "striped", "black"),
                   with_hat(Character(kind, "white"), "blue")):
        changed = (abs(picture(marked) - plain).max(axis=-1) > 0.15).mean()
        assert changed > 0.01, f"{marked} changes {changed:.1%} of the picture"


def test_water_hides_the_lower_half():
    legs_on_grass = picture(Character("dog", "red", legs=1.0), place="grass", size=64)
    legs_in_water = picture(Character("dog", "red", legs=1.0), place="water", size=64)

    def red(image):
        return ((image[..., 0] > 0.45) & (image[..., 1] < 0.3)).sum()

    assert 0 < red(legs_in_water) < 0.85 * red(legs_on_grass)


def test_held_out_pairs_are_never_sampled():
    seen = {(character.kind, character.color) for character, _ in scenes(0, 3000)}
    assert not seen & HELD_OUT
    assert len(seen) == len(CLASSES) * len(COLORS) - len(HELD_OUT)  # and nothing else is missing


def test_held_out_scenes_are_the_held_out_pairs_with_and_without_hats():
    made = [sample_held_out(3, k) for k in range(48)]
    assert {(c.kind, c.color) for c, _ in made} == HELD_OUT
    assert sum(bool(c.hat) for c, _ in made) == 24
    assert len({v.place for _, v in made}) > 6
    assert all(c.color2 != c.color for c, _ in made)


def test_sample_k_depends_on_seed_and_k_alone():
    assert scenes(0, 8)[7] == sample(0, 7)
    assert sample(0, 7) != sample(1, 7)


def test_a_corpus_half_rendered_is_finished_not_begun_again(tmp_path, monkeypatch):
    from dbcore.toybox import corpus, tracer

    monkeypatch.setattr(corpus, "SHARD", 2)
    monkeypatch.setattr(corpus, "SIZE", 16)
    whole = corpus.render_corpus(tmp_path / "whole", 0, 6)
    real, drawn = tracer._render, []

    def dies_at_the_fifth(*args):
        drawn.append(args)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tracer, "_render", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        corpus.render_corpus(tmp_path / "half", 0, 6)
    drawn.clear()
    monkeypatch.setattr(tracer, "_render", lambda *args: drawn.append(args) or real(*args))
    np.testing.assert_array_equal(corpus.render_corpus(tmp_path / "half", 0, 6), whole)
    assert len(drawn) == 2
    np.testing.assert_array_equal(corpus.render_corpus(tmp_path / "half", 0, 3), whole[:3])


def test_random_characters_differ_and_fixed_attributes_stay():
    rng = np.random.default_rng(0)
    made = [random_character(rng, kind="duck") for _ in range(20)]
    assert len(set(made)) == 20
    assert {c.kind for c in made} == {"duck"}
