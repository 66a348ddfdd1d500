"""The diffusion mathematics. Run: python -m pytest tests/test_math.py"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import (
    AdaptiveNoise,
    alpha_sigma,
    cosine_log_snr,
    diffuse,
    loss_weight,
    update_ema,
    velocity,
    x_and_eps,
)

log_snrs = st.floats(-15, 15)


def draw(seed, shape=(4, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(log_snrs)
def test_alpha_and_sigma_lie_on_the_circle(log_snr):
    alpha, sigma = alpha_sigma(torch.tensor([log_snr], dtype=torch.float64))
    assert alpha.item() ** 2 + sigma.item() ** 2 == pytest.approx(1)
    assert math.log(alpha.item() ** 2 / sigma.item() ** 2) == pytest.approx(log_snr, abs=1e-6)


@given(log_snrs, st.integers(0, 1000))
def test_v_and_z_recover_x_and_eps(log_snr, seed):
    x, eps, level = draw(seed), draw(seed + 1), torch.full((4,), log_snr, dtype=torch.float64)
    x_back, eps_back = x_and_eps(diffuse(x, eps, level), velocity(x, eps, level), level)
    torch.testing.assert_close(x_back, x)
    torch.testing.assert_close(eps_back, eps)


@given(st.floats(0.001, 0.999))
def test_cosine_schedule_is_cosine_squared(t):
    alpha2 = cosine_log_snr(torch.tensor(t, dtype=torch.float64)).sigmoid().item()
    assert alpha2 == pytest.approx(math.cos(math.pi * t / 2) ** 2, abs=1e-6)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_scale_shifts_log_snr_by_twice_its_logarithm(t, scale):
    t = torch.tensor(t, dtype=torch.float64)
    assert (cosine_log_snr(t, scale) - cosine_log_snr(t)).item() == pytest.approx(
        2 * math.log(scale), abs=1e-9
    )


def test_schedule_is_finite_and_falls_from_clean_to_noise():
    levels = cosine_log_snr(torch.linspace(0, 1, 101))
    assert levels.isfinite().all() and (levels.diff() <= 0).all()
    assert levels[0] >= 15 and levels[-1] <= -15


def test_loss_weight_peaks_at_one_and_is_non_increasing_in_eps_space():
    log_snr = torch.linspace(-15, 15, 10_001, dtype=torch.float64)
    weight = loss_weight(log_snr)
    assert weight.max() == 1
    eps_space = weight * (torch.exp(-log_snr) + 1)
    assert (eps_space.diff() <= 0).all()


@given(st.floats(-15, -0.5))
def test_loss_weight_below_zero_has_the_cauchy_shape(log_snr):
    weight = loss_weight(torch.tensor(log_snr, dtype=torch.float64)).item()
    assert weight == pytest.approx(1 / (1 + (log_snr / 2.4) ** 2))


@given(st.floats(2, 15))
def test_loss_weight_above_zero_has_the_normal_shape(log_snr):
    ratio = loss_weight(torch.tensor([log_snr, 2.0], dtype=torch.float64))
    normal = math.exp(-((log_snr / 2.4) ** 2) / 2 + (2 / 2.4) ** 2 / 2)
    assert (ratio[0] / ratio[1]).item() == pytest.approx(normal, rel=1e-3)


def test_adaptive_noise_draws_bins_in_proportion_to_their_value():
    noise = AdaptiveNoise()
    noise.value[:] = 0
    noise.value[10], noise.value[90] = 1, 3
    log_snr, density = noise.sample(40_000, torch.Generator().manual_seed(0))
    low = (log_snr >= -12) & (log_snr < -11.7)
    assert (low | (log_snr >= 12) & (log_snr < 12.3)).all()
    assert low.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (density[low] == 1).all() and (density[~low] == 3).all()


def test_adaptive_noise_estimates_the_loss_without_bias():
    """Whatever the bins hold, mean(loss / value) * mean(value) is the mean of the loss over even log_snr."""
    noise = AdaptiveNoise()
    noise.value[:] = torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.1
    log_snr, density = noise.sample(400_000, torch.Generator().manual_seed(2))
    estimate = (log_snr.square() / density).mean() * noise.value.mean()
    assert estimate.item() == pytest.approx(75, rel=0.02)  # the mean of u^2 over [-15, 15]


def test_adaptive_noise_moves_only_the_bins_it_saw_by_a_tenth():
    noise = AdaptiveNoise()
    noise.update(torch.tensor([-15.0, -14.9, 14.99]), torch.tensor([3.0, 5.0, 11.0]))
    assert noise.value[0].item() == pytest.approx(0.9 + 0.1 * 4)
    assert noise.value[99].item() == pytest.approx(0.9 + 0.1 * 11)
    assert (noise.value[1:99] == 1).all()


def test_ema_starts_at_the_weights_and_ends_at_the_full_decay():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
    update_ema(ema, model, step=0)
    assert ema.weight.item() == model.weight.item()
    before = ema.weight.item()
    torch.nn.init.constant_(model.weight, before + 1)
    update_ema(ema, model, step=10**9)
    assert ema.weight.item() - before == pytest.approx(1e-4, rel=1e-2)
