"""The training loop: the same weights whether it was killed or not, and Muon's step as it should
be."""

import pytest
import torch
from torch import nn

from dbcore.toybox import fit as fitting
from dbcore.toybox.fit import Muon, fit, orthogonalised, step_rng


class Killed(Exception):
    pass


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
                         nn.Conv2d(8, 8, 3, padding=1),
                         nn.Flatten(), nn.Linear(8 * 16, 4)).to(memory_format=torch.channels_last)


def train(folder, steps=12, die_at=None, **options):
    net = network()

    def loss_at(step, progress):
        if step == die_at:
            raise Killed
        _, rng = step_rng(0, "test", step)
        x = torch.randn(4, 3, 4, 4, generator=rng)
        return {"loss": (net(x) - x.mean(dim=(1, 2, 3))[:, None]).square().mean()}

    return fit("test", folder, net, loss_at, steps, 1e-2, **options).state_dict()


@pytest.mark.parametrize("options", [{}, {"muon": True, "ema": 0.9}])
def test_a_killed_run_ends_at_the_same_weights(tmp_path, options):
    whole = train(tmp_path / "whole", **options)
    for die_at in (5, 9):
        with pytest.raises(Killed):
            train(tmp_path / "killed", die_at=die_at, save_every=0.0, **options)
    resumed = train(tmp_path / "killed", **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], value)
                   for name, value in network().state_dict().items())


def test_a_finished_run_takes_no_step_more(tmp_path):
    first = train(tmp_path)
    assert all(torch.equal(first[k], v) for k, v in train(tmp_path, die_at=12).items())


def test_a_run_ends_when_its_minutes_are_up_and_goes_on_when_given_more(tmp_path, monkeypatch):
    now = iter(range(10_000))  # each look at the clock is a second later
    monkeypatch.setattr(fitting.time, "monotonic", lambda: float(next(now)))
    seen = []

    def rate(progress):
        seen.append(progress)
        return 1.0

    train(tmp_path, steps=10_000, minutes=0.5, rate=rate)
    first = torch.load(tmp_path / "test.pt", weights_only=True)
    assert 30 <= first["seconds"] < 33
    assert seen == sorted(seen)
    assert 0.9 < seen[-1] <= 1
    train(tmp_path, steps=10_000, minutes=0.5, die_at=first["step"])  # no step more
    train(tmp_path, steps=10_000, minutes=1.0, rate=rate)
    second = torch.load(tmp_path / "test.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert 60 <= second["seconds"] < 63
    # the schedule is that of the longer run
    assert seen[first["step"]] == pytest.approx(0.5, abs=0.1)


def test_few_steps_end_a_run_before_its_minutes(tmp_path):
    train(tmp_path, steps=5, minutes=60)
    assert fitting.steps_done(tmp_path, "test") == 5
    assert fitting.steps_done(tmp_path, "other") == 0


def test_a_kill_in_the_middle_of_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        train(tmp_path, die_at=6, save_every=0.0)

    def dies_half_way(payload, path):
        path.write_bytes(b"half a checkpoint")
        raise Killed

    monkeypatch.setattr(fitting.torch, "save", dies_half_way)
    with pytest.raises(Killed):
        train(tmp_path, save_every=0.0)
    monkeypatch.undo()
    assert torch.load(tmp_path / "test.pt", weights_only=True)["step"] == 6
    train(tmp_path)


def test_orthogonalised_keeps_directions_and_evens_out_lengths():
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    given_and_out = zip((matrix, matrix.T, 1e-3 * matrix),
                        orthogonalised([matrix, matrix.T, 1e-3 * matrix]))
    for given, out in given_and_out:
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        assert out.shape == given.shape
        aligned = u.T @ out @ v.T  # diagonal, if the singular vectors are the same
        values = aligned.diagonal()
        assert (aligned - torch.diag(values)).abs().max() < 1e-3
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_steps_along_the_orthogonalised_momentum():
    draw = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3,
                                      generator=draw).to(memory_format=torch.channels_last))
    start, expected = weight.detach().clone(), weight.detach().clone()
    mean = torch.zeros(6, 4, 3, 3)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        weight.grad = torch.randn(6, 4, 3, 3, generator=draw)
        mean = 0.9 * mean + 0.1 * weight.grad
        nesterov = 0.9 * mean + 0.1 * weight.grad
        u, _, v = torch.linalg.svd(nesterov.reshape(6, 36), full_matrices=False)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 36**0.5 * (u @ v).reshape(6, 4, 3, 3)
        optimizer.step()
    # Newton-Schulz stops at singular values between 0.68 and 1.2, not at 1
    assert (weight - expected).norm() < 0.1 * (expected - start).norm()


def test_cosine_rate_rises_then_falls_to_its_floor():
    rates = [fitting.cosine_rate(k / 100) for k in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[2] == 1
    assert rates[-1] == pytest.approx(0.02)
    assert rates[2:] == sorted(rates[2:], reverse=True)
