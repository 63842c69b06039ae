"""The subject encoder's recipe: its world, its loss and its score, on cases whose answers are
known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dbcore.toybox import encoder as subject
from dbcore.toybox.encoder import AMONG, VIEWS


def test_a_world_of_subjects_shows_each_of_them_anew():
    scenes = [subject.sample_view(5, k) for k in range(2 * VIEWS)]
    bare = [replace(character, hat="") for character, _ in scenes]
    assert len(set(bare[:VIEWS])) == len(set(bare[VIEWS:])) == 1
    assert bare[0] != bare[VIEWS]
    assert len({view for _, view in scenes}) == 2 * VIEWS
    assert scenes == [subject.sample_view(5, k) for k in range(2 * VIEWS)] != [
        subject.sample_view(6, k) for k in range(2 * VIEWS)]


def test_neither_hat_nor_place_says_who_it_is():
    scenes = [subject.sample_view(5, k) for k in range(100 * VIEWS)]
    several = [{(character.hat, view.place) for character, view in scenes[first:first + VIEWS]}
               for first in range(0, len(scenes), VIEWS)]
    assert min(map(len, several)) > 1
    assert 0.4 < np.mean([bool(character.hat) for character, _ in scenes]) < 0.6


def test_classes_come_in_blocks_and_every_second_batch_is_of_one():
    def kind(who):
        return subject.sample_view(5, who * VIEWS)[0].kind

    assert len({kind(who) for who in range(AMONG)}) == 1
    assert len({kind(block * AMONG) for block in range(6)}) == 6
    rng = np.random.default_rng(0)
    for step, classes in ((0, 6), (1, 1), (2, 6), (3, 1)):
        who = subject.pick_subjects(rng, step, 24, 12 * AMONG)
        assert len(set(who)) == 24
        assert len({kind(w) for w in who}) == classes


def test_the_loss_is_the_papers():
    vectors = torch.nn.functional.normalize(torch.randn(5, 3,
                                                        generator=torch.Generator().manual_seed(0)),
                                            dim=1)
    who, temperature, total = [0, 0, 0, 1, 1], 0.3, 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        bottom = sum(math.exp(vectors[i] @ vectors[j] / temperature) for j in others)
        own = [j for j in others if who[j] == who[i]]
        total -= sum(math.log(math.exp(vectors[i] @ vectors[p] / temperature) / bottom)
                     for p in own) / len(own)
    loss = subject.contrastive_loss(vectors, torch.tensor(who), temperature)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


def test_the_nearest_other_picture_is_never_the_picture_itself():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(subject.nearest_is_own(vectors, torch.tensor([0, 1, 1]))) == pytest.approx(2 / 3)


class ByColour(subject.SubjectEncoder):
    """Tells subjects by their mean colour alone, and classes not at all."""

    def forward(self, pixels):
        return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)), dim=-1)


def test_retrieval_is_whole_for_pictures_that_tell_and_chance_for_noise():
    colours = np.random.default_rng(0).integers(0, 256, (2 * AMONG, 1, 1, 1, 3), dtype=np.uint8)
    telling = np.broadcast_to(colours, (2 * AMONG, VIEWS, 8, 8, 3)).reshape(-1, 8, 8, 3)
    mixed, alike = subject.subject_retrieval(ByColour(), telling)
    assert mixed == alike == 1
    noise = np.random.default_rng(1).integers(0, 256, (2 * AMONG * VIEWS, 8, 8, 3), dtype=np.uint8)
    assert max(subject.subject_retrieval(ByColour(), noise)) < 0.1


def test_retrieval_asks_among_all_classes_and_among_one():
    """Two classes of 50, each of one colour a place in the row: alone they are told apart, together
    half are twins."""
    angles = np.repeat(np.linspace(0, math.pi, AMONG, endpoint=False)[None], 2, axis=0).flatten()
    one = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1)).float()
    vectors = one[:, None].expand(-1, VIEWS, -1)
    assert subject.first_among(vectors.unflatten(0, (-1, AMONG))) == 1
    together = vectors.unflatten(0, (-1, AMONG)).transpose(0, 1).flatten(0, 1)
    assert subject.first_among(together.unflatten(0, (-1, AMONG))) == 0.5


@pytest.mark.slow
def test_a_short_lesson_tells_subjects_apart(tmp_path):
    pytest.importorskip("numba")
    from dbcore.toybox.corpus import render_corpus

    pictures = render_corpus(tmp_path / "subjects.npy", 7, 2 * AMONG * VIEWS, size=64,
                             draw=subject.sample_view)
    others = render_corpus(tmp_path / "others.npy", 8, 2 * AMONG * VIEWS, size=64,
                           draw=subject.sample_view)
    untrained, _ = subject.subject_retrieval(subject.SubjectEncoder().eval(), others)
    net = subject.train_subject_encoder(pictures, tmp_path, seed=0, steps=40, batch=32)
    mixed, _ = subject.subject_retrieval(net, others)
    assert mixed > untrained + 0.2
    vectors = net.embed_images([Image.fromarray(picture) for picture in others[:2]])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_jittered_view_keeps_its_colours_and_half_of_them_are_mirrored():
    left = torch.zeros(200, 3, 64, 64)
    left[:, :, 24:40, 8:24] = 1.0
    made = subject.jittered(left, torch.Generator().manual_seed(0))
    assert made.shape == left.shape
    assert 0 <= made.min() <= made.max() <= 1 + 1e-6
    on_the_left = made[..., :32].sum((1, 2, 3)) > made[..., 32:].sum((1, 2, 3))
    assert 0.35 < on_the_left.float().mean() < 0.65
