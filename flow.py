"""Rectified flow (arXiv 2209.03003), trained and sampled as in SD3 (arXiv 2403.03206).

A straight line joins a latent x0 and Gaussian noise e: z_t = (1 - t) x0 + t e. The noise level t
(sigma) lies in [0, 1]; t = 1 is pure noise. The network predicts the velocity dz/dt = e - x0, which
sampling integrates from t = 1 to 0. (Dream Engine's paper writes x0 - e, but its code uses e - x0.)
"""

from itertools import pairwise

import torch


def shift_sigmas(sigma, shift):
    """Shift noise levels up, as larger pictures need (SD3 paper, section 5.3.2)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_schedule(steps, shift=3.0):
    """Return the noise levels of a sampling run: (steps + 1,) fp32, falling from 1 to 0.

    The last level before 0 is 0.001 shifted twice, as in SD3.5's own code and in diffusers.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    lowest = shift_sigmas(0.001, shift)
    sigmas = shift_sigmas(torch.linspace(1, lowest, steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def euler(velocity_fn, noise, sigmas, progress=iter):
    """Integrate dz/dt = velocity_fn(z, t) along sigmas at noise (B, C, H, W).

    velocity_fn takes t as a float. progress wraps the list of steps, for a progress bar. The latent
    stays fp32, because in bf16 it would lose 1 % in 28 steps.
    """
    z = noise.float()
    for t, t_next in progress(list(pairwise(sigmas.tolist()))):
        z = z + (t_next - t) * velocity_fn(z, t).float()
    return z


def guide(cond, null, guidance):
    """Classifier-free guidance (arXiv 2207.12598): v = v_null + g (v_cond - v_null)."""
    return null + guidance * (cond - null)


def noise(n, shape, seed):
    """Draw the Gaussian noise of n samples: (n, *shape), fp32 on the CPU; row i uses seed + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def training_sigmas(n, shift=3.0, generator=None):
    """Draw n noise levels in (0, 1), fp32: a logit-normal, shifted. Shift 3: the median is 0.75."""
    return shift_sigmas(torch.randn(n, generator=generator).sigmoid(), shift)


def add_noise(x0, noise, t):
    """Return z_t = (1 - t) x0 + t noise, for x0 and noise (B, C, H, W) and t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


def velocity_loss(velocity, x0, noise, t=None):
    """Return each example's mean squared error to noise - x0: (B,) fp32.

    t (B,) weights it by t^2: the error of the implied x0, which is the official code's loss.
    """
    error = (velocity.float() - (noise - x0).float()).square().mean(dim=(1, 2, 3))
    return error if t is None else t**2 * error
