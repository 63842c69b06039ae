"""Every random number is a function of (seed, stream, step, sample), and of nothing else."""

import torch

from dbcore.utils.seeding import generator, integer, key, normal, permutation, uniform


def test_each_argument_matters_and_none_leaks_into_another():
    calls = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "flip", 0, 0), (0, "noise", 1, 0),
             (0, "noise", 0, 1), (0, "noise", 11, 1), (0, "noise", 1, 11)]
    assert len({key(*call) for call in calls}) == len(calls)
    assert all(0 <= key(*call) < 2**63 for call in calls)


def test_the_numbers_are_those_of_every_run_and_machine():
    """Pinned: changing how seeds are made would silently change what every seed gives."""
    assert key(0, "noise", 3, 2) == 3028314545892489255 == key(0, "noise", 3, 2)


def test_global_state_is_neither_used_nor_moved():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = normal((3,), 0, "noise", 7, [1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(normal((3,), 0, "noise", 7, [1]), first)


def test_a_sample_draws_the_same_whoever_else_is_drawn():
    together = normal((4, 4), 3, "noise", 7, [5, 6, 7])
    assert torch.equal(together[1], normal((4, 4), 3, "noise", 7, [6])[0])
    assert not torch.equal(together[0], together[1])


def test_normal_is_normal_and_integers_are_even():
    numbers = normal((100,), 0, "noise", 0, range(200))
    assert abs(numbers.mean()) < 0.03
    assert abs(numbers.std() - 1) < 0.03
    counts = torch.bincount(torch.tensor([integer(5, 0, "t", step) for step in range(5000)]),
                            minlength=5)
    assert counts.min() > 900
    assert len(counts) == 5


def test_every_pass_has_an_order_of_its_own():
    orders = [permutation(6, 0, "instance", epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert permutation(6, 0, "instance", 2) == orders[2]


def test_a_generator_is_new_each_time():
    one, two = generator(0, "a"), generator(0, "a")
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=two))


def test_uniform_numbers_fill_the_unit_interval_and_agree_with_integers():
    drawn = [uniform(3, "time", step) for step in range(2000)]
    assert 0 < min(drawn) < 0.002
    assert 0.998 < max(drawn) < 1
    assert len(set(drawn)) == 2000
    assert [int(1000 * u) for u in drawn] == [integer(1000, 3, "time", step)
                                              for step in range(2000)]
