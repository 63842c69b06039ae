"""The loss against the formula on paper, term by term."""

import pytest
import torch

from dbcore.engines.losses import dreambooth_loss

ONES = torch.ones(4, 1, 4, 4)


@pytest.fixture
def pair():
    """Predictions and targets for two samples of the subject and two of the class, (4, 4, 4, 4)."""
    numbers = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 4, 4, generator=numbers) for _ in range(2)]


def mean_square(a, b):
    """|a - b|^2 over the number of elements, in plain Python."""
    differences = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("prior_weight", [0.0, 0.3, 1.0, 2.5])
def test_two_parts_are_the_papers_sum(pair, prior_weight):
    y, target = pair
    loss, losses = dreambooth_loss(y, target, ONES, torch.ones(4), 2, prior_weight)
    by_hand = mean_square(y[:2], target[:2]) + prior_weight * mean_square(y[2:], target[2:])
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert losses.tolist() == pytest.approx([mean_square(a, b) for a, b in zip(y, target)],
                                            rel=1e-5)


def test_without_class_pictures_it_is_the_plain_mean_square(pair):
    y, target = pair
    loss, _ = dreambooth_loss(y, target, ONES, torch.ones(4), 4, 100.0)
    assert loss.item() == pytest.approx(torch.nn.functional.mse_loss(y, target).item(), rel=1e-6)


def test_the_class_pulls_as_hard_as_its_weight_says(pair):
    y, target = pair
    gradients = {}
    for weight in (0.0, 1.0, 2.0):
        x = y.clone().requires_grad_()
        dreambooth_loss(x, target, ONES, torch.ones(4), 2, weight)[0].backward()
        gradients[weight] = x.grad
    assert not gradients[0.0][2:].any()
    assert gradients[1.0][2:].any()
    torch.testing.assert_close(gradients[2.0][2:], 2 * gradients[1.0][2:])
    torch.testing.assert_close(gradients[2.0][:2], gradients[0.0][:2])


def test_each_samples_weight_counts_and_the_reported_losses_are_unweighted(pair):
    y, target = pair
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0])
    loss, losses = dreambooth_loss(y, target, ONES, weight, 2, 1.0)
    parts = [w * mean_square(a, b) for w, a, b in zip(weight.tolist(), y, target)]
    assert loss.item() == pytest.approx(sum(parts[:2]) / 2 + sum(parts[2:]) / 2, rel=1e-5)
    assert losses[3] > 0
    assert not losses.requires_grad


# --- masks ----------------------------------------------------------------------------------------


def test_a_mask_leaves_the_black_part_out_and_does_not_dilute_the_rest(pair):
    y, target = pair
    mask = ONES.clone()
    mask[:, :, :, 2:] = 0
    loss, losses = dreambooth_loss(y, target, mask, torch.ones(4), 4, 1.0)
    assert losses[0].item() == pytest.approx(mean_square(y[0, :, :, :2], target[0, :, :, :2]),
                                             rel=1e-5)
    changed = target.clone()
    changed[:, :, :, 2:] += 10
    assert dreambooth_loss(y, changed, mask, torch.ones(4), 4, 1.0)[0] == loss
    changed[:, :, :, 1] += 10
    assert dreambooth_loss(y, changed, mask, torch.ones(4), 4, 1.0)[0] > loss


def test_grey_counts_by_its_share(pair):
    y, target = pair
    mask = ONES.clone()
    mask[0, :, 0] = 0.25
    errors = (y[0] - target[0]).square().mean(dim=0)
    by_hand = (0.25 * errors[0].sum() + errors[1:].sum()) / (0.25 * 4 + 12)
    _, losses = dreambooth_loss(y, target, mask, torch.ones(4), 4, 1.0)
    assert losses[0].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_black_mask_gives_nothing_to_learn_and_no_nan(pair):
    y, target = pair
    y.requires_grad_()
    mask = ONES.clone()
    mask[0] = 0
    loss, losses = dreambooth_loss(y, target, mask, torch.ones(4), 4, 1.0)
    loss.backward()
    assert losses[0] == 0
    assert loss.isfinite()
    assert not y.grad[0].any()
    assert y.grad[1].any()
