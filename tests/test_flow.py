"""Rectified flow: schedule and sampler against diffusers, training against closed forms."""

import pytest
import torch
from cases import SCHEDULES, drift
from tiny import tensor

import flow


@pytest.mark.parametrize("shift, steps", SCHEDULES)
def test_schedule_equals_diffusers(shift, steps, answers):
    expected = answers[f"flow/{shift}/{steps}"]
    torch.testing.assert_close(flow.sigma_schedule(steps, shift), expected, rtol=0, atol=1e-5)


def test_trajectory_equals_diffusers(answers):
    sigmas = flow.sigma_schedule(12)
    for n, expected in enumerate(answers["flow/trajectory"], 1):
        z = flow.euler(drift, tensor("noise", (2, 4, 4, 4)), sigmas[: n + 1])
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


def test_euler_integrates_a_constant_velocity_exactly():
    noise, x0 = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    z = flow.euler(lambda z, t: noise - x0, noise, flow.sigma_schedule(7))
    torch.testing.assert_close(z, x0, rtol=1e-5, atol=1e-5)


def test_euler_reaches_a_single_data_point_from_any_noise():
    """If all data is x0, the true velocity is (z - x0) / t and Euler ends at x0 exactly."""
    x0 = torch.randn(1, 2, 4, 4)
    z = flow.euler(lambda z, t: (z - x0) / t, torch.randn(3, 2, 4, 4), flow.sigma_schedule(5))
    torch.testing.assert_close(z, x0.expand_as(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_needs_at_least_one_step(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        flow.sigma_schedule(steps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_training_sigmas_are_a_shifted_logit_normal(shift):
    sigmas = flow.training_sigmas(200_000, shift, torch.Generator().manual_seed(0))
    assert 0 < sigmas.min() and sigmas.max() < 1
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        u = torch.special.ndtri(torch.tensor(quantile)).sigmoid()
        expected = shift * u / (1 + (shift - 1) * u)
        assert abs(sigmas.quantile(quantile) - expected) < 0.005


def test_noising_and_loss_equal_their_formulas():
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.7])
    z = flow.add_noise(x0, noise, t)
    torch.testing.assert_close(z[1], 0.3 * x0[1] + 0.7 * noise[1])
    assert flow.velocity_loss(noise - x0, x0, noise).tolist() == [0, 0]
    velocity = torch.randn(2, 3, 4, 4)
    expected = (velocity - noise + x0).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(flow.velocity_loss(velocity, x0, noise), expected)
    # The official loss compares x0 with the x0 that the velocity implies.
    implied = z - t.view(2, 1, 1, 1) * velocity
    expected = (implied - x0).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(flow.velocity_loss(velocity, x0, noise, t), expected)


def test_guidance_extrapolates_from_null_to_cond():
    cond, null = torch.tensor(3.0), torch.tensor(1.0)
    assert [flow.guide(cond, null, g).item() for g in (0, 1, 4)] == [1, 3, 9]


def test_the_noise_of_a_row_depends_only_on_its_seed():
    three = flow.noise(3, (2, 4, 4), seed=7)
    assert torch.equal(three[2:], flow.noise(1, (2, 4, 4), seed=9))
    assert not torch.equal(three[0], three[1])
