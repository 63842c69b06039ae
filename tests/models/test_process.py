"""The two processes: what diffusers computes, the papers' equations, and the way back to x0."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from dbcore.models.process import Density, Diffusion, Flow

KINDS = ["epsilon", "v_prediction", "sample"]
T = torch.arange(0, 1000, 37)
U = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def processes():
    abar = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    return [*(Diffusion(abar, kind) for kind in KINDS), Flow()]


@pytest.fixture
def numbers():
    made = torch.Generator().manual_seed(0)
    return [torch.randn(len(T), 3, 2, 2, generator=made) for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_diffusion_is_diffusers_scheduler_bit_for_bit(kind, numbers):
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_end=0.012)
    process, (x0, noise) = Diffusion.from_scheduler(scheduler.config), numbers
    assert torch.equal(process.corrupt(x0, noise, T), scheduler.add_noise(x0, noise, T))
    v = scheduler.get_velocity(x0, noise, T)
    assert torch.equal(process.target(x0, noise, T),
                       {"epsilon": noise, "v_prediction": v, "sample": x0}[kind])


def test_flow_goes_straight_from_image_to_noise(numbers):
    (x0, noise), t = numbers, (T + 1) / 1000
    x_t, velocity = Flow().corrupt(x0, noise, t), Flow().target(x0, noise, t)
    assert torch.allclose(x_t + velocity * (1 - t).view(-1, 1, 1, 1), noise, atol=1e-5)
    assert torch.allclose(x_t - velocity * t.view(-1, 1, 1, 1), x0, atol=1e-5)


@pytest.mark.parametrize("process", processes(), ids=str)
def test_the_target_leads_back_to_x0(process, numbers):
    (x0, noise), t = numbers, process.timestep((T + 1) / 1001.0)
    guess = process.guess(process.target(x0, noise, t), process.corrupt(x0, noise, t), t)
    assert torch.allclose(guess, x0, atol=1e-3)
    assert torch.equal(process.weight(t), torch.ones(len(t)))


def test_flow_weighs_the_error_of_x0_too():
    """An error of 1 in the velocity is one of t in x0."""
    t = torch.tensor([0.1, 0.5, 0.9])
    snr = ((1 - t) / t) ** 2
    assert torch.allclose(Flow().weight(t, 5.0), snr.clamp(max=5.0) * t**2)


def test_diffusion_draws_each_timestep_equally_often():
    t = Diffusion(torch.linspace(0.9, 0.1, 50)).timestep(U)
    assert t.bincount().tolist() == [20] * 50


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_the_densities_are_those_of_diffusers(scheme):
    """Over many draws, by their quantiles: it draws its own numbers."""
    theirs = compute_density_for_timestep_sampling(
        scheme, 200_000, 0.5, 1.5, 1.29, generator=torch.Generator().manual_seed(0)).double()
    ours = Density(scheme, 0.5, 1.5, 1.29)(U)
    at = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert torch.allclose(ours.quantile(at), theirs.quantile(at), atol=0.01)


def test_diffusion_takes_the_density_that_it_is_given():
    process = Diffusion(torch.linspace(0.9, 0.1, 1000))
    counts = process.timestep(U, density=Density("logit_normal")).bincount(minlength=1000)
    assert counts[400:600].sum() > 3 * counts[:200].sum() > 0
    assert torch.equal(process.timestep(U), torch.arange(1000))


def test_flow_draws_t_as_the_densities_say():
    assert torch.allclose(Flow(Density()).timestep(U), U.float())
    assert torch.equal(Flow().timestep(U, density=Density()), Flow(Density()).timestep(U))
    wide = Density("logit_normal", 0.5, 2.0)
    logits = torch.logit(Flow(wide).timestep(U).double())
    assert abs(logits.mean() - 0.5) < 1e-3
    assert abs(logits.std() - 2.0) < 0.02


def test_larger_images_are_shifted_towards_noise():
    """Esser et al. 2024, equation 23: the odds of t are multiplied by e^mu."""
    flow = Flow(Density(), mu=lambda positions: positions / 100)
    t = flow.timestep(U, 200).double()
    assert torch.allclose(t / (1 - t), math.exp(2) * U / (1 - U), rtol=1e-3)


# --- min-SNR-gamma --------------------------------------------------------------------------------


@pytest.mark.parametrize("abar", [0.999, 0.9, 0.5, 0.1, 0.004])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_x0_whatever_is_predicted(kind, abar):
    """The paper's weight is min(SNR, gamma) on |x0 - x0_theta|^2; a prediction of another kind is
    turned into x0."""
    gamma, abar = 5.0, torch.tensor(abar, dtype=torch.float64)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    numbers = torch.Generator().manual_seed(1)
    x0, noise, error = (torch.randn(64, generator=numbers, dtype=torch.float64) for _ in range(3))
    x_t = a * x0 + s * noise
    target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]
    prediction = target + 0.1 * error
    x0_of = {"epsilon": lambda y: (x_t - s * y) / a, "v_prediction": lambda y: a * x_t - s * y,
             "sample": lambda y: y}
    snr = abar / (1 - abar)
    wanted = torch.clamp(snr, max=gamma) * (x0_of[kind](prediction) - x0).square().mean()
    got = Diffusion(abar[None], kind).weight(torch.tensor([0]),
                                             gamma)[0] * (prediction - target).square().mean()
    torch.testing.assert_close(got, wanted)


def test_min_snr_lowers_the_easy_timesteps_alone():
    snr = torch.tensor([100.0, 4.99, 1.0, 0.01])
    weight = Diffusion(snr / (1 + snr)).weight(torch.arange(4), 5.0)
    assert weight[0] < 0.1
    assert weight[1:].eq(1).all()
