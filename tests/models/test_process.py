"""The two processes: what diffusers computes, the papers' equations, and the way back to x0."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from dbcore.models.process import Diffusion, Flow

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
    assert torch.equal(process.target(x0, noise, T), {"epsilon": noise, "v_prediction": v, "sample": x0}[kind])


def test_flow_goes_straight_from_image_to_noise(numbers):
    (x0, noise), t = numbers, (T + 1) / 1000
    x_t, velocity = Flow().corrupt(x0, noise, t), Flow().target(x0, noise, t)
    assert torch.allclose(x_t + velocity * (1 - t).view(-1, 1, 1, 1), noise, atol=1e-5)
    assert torch.allclose(x_t - velocity * t.view(-1, 1, 1, 1), x0, atol=1e-5)


@pytest.mark.parametrize("process", processes())
def test_the_target_leads_back_to_x0_and_min_snr_weighs_its_error(process, numbers):
    (x0, noise), t = numbers, process.timestep((T + 1) / 1001.0)
    x_t, target = process.corrupt(x0, noise, t), process.target(x0, noise, t)
    assert torch.allclose(process.guess(target, x_t, t), x0, atol=1e-3)
    # Hang et al. 2023: min(SNR, gamma) (x0's error)^2, whatever is predicted
    error = 0.01 * noise
    of_x0 = (process.guess(target + error, x_t, t) - process.guess(target, x_t, t)).square()
    snr = process.snr(t).clamp(max=5.0).view(-1, 1, 1, 1)
    weighed = process.weight(t, 5.0).view(-1, 1, 1, 1) * error.square()
    assert torch.allclose(weighed, snr * of_x0, rtol=0.05, atol=1e-8)
    assert torch.equal(process.weight(t), torch.ones(len(t)))


def test_diffusion_draws_each_timestep_equally_often():
    t = Diffusion(torch.linspace(0.9, 0.1, 50)).timestep(U)
    assert t.bincount().tolist() == [20] * 50


def test_flow_draws_t_as_the_densities_say():
    assert torch.allclose(Flow("uniform").timestep(U), U.float())
    logits = torch.logit(Flow(logit_mean=0.5, logit_std=2.0).timestep(U).double())
    assert abs(logits.mean() - 0.5) < 1e-3 and abs(logits.std() - 2.0) < 0.02


def test_larger_images_are_shifted_towards_noise():
    """Esser et al. 2024, equation 23: the odds of t are multiplied by e^mu."""
    flow = Flow("uniform", mu=lambda positions: positions / 100)
    t = flow.timestep(U, 200).double()
    assert torch.allclose(t / (1 - t), math.exp(2) * U / (1 - U), rtol=1e-3)
