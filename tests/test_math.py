"""The mathematics of diffusion and optimization. Run: python -m pytest tests/test_math.py"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import (
    GPT,
    Decoder,
    DiffusionTransformer,
    GPTConfig,
    NoiseBins,
    PromptGenerator,
    alpha_sigma,
    cosine_log_snr,
    diffuse,
    loss_weight,
    velocity,
    x_and_eps,
)
from plumbing.optim import Muon, configure_optimizers, schedule
from train_diffusion import update_ema

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
    x = draw(seed)
    eps = draw(seed + 1)
    level = torch.full((4,), log_snr, dtype=torch.float64)
    x_back, eps_back = x_and_eps(diffuse(x, eps, level), velocity(x, eps, level), level)
    torch.testing.assert_close(x_back, x)
    torch.testing.assert_close(eps_back, eps)


@given(st.floats(0.001, 0.999), st.floats(0.1, 10))
def test_cosine_schedule_is_cosine_squared_and_a_scale_shifts_log_snr(t, scale):
    shifted = cosine_log_snr(torch.tensor(t, dtype=torch.float64), scale)
    alpha2 = (shifted - 2 * math.log(scale)).sigmoid().item()
    assert alpha2 == pytest.approx(math.cos(math.pi * t / 2) ** 2, abs=1e-6)


def test_log_snr_is_finite_and_falls_from_clean_to_noise():
    levels = cosine_log_snr(torch.linspace(0, 1, 101))
    assert levels.isfinite().all() and (levels.diff() <= 0).all()
    assert levels[0] >= 15 and levels[-1] <= -15


@given(log_snrs)
def test_loss_weight_is_cauchy_below_zero_and_normal_above_each_with_maximum_one(log_snr):
    kind = torch.distributions.Cauchy if log_snr < 0 else torch.distributions.Normal
    shape = kind(0.0, 2.4)
    level = torch.tensor(log_snr)
    expected = (shape.log_prob(level) - shape.log_prob(torch.tensor(0.0))).exp()
    torch.testing.assert_close(loss_weight(level), expected)


def test_noise_bins_are_drawn_in_proportion_to_their_value():
    bins = NoiseBins()
    bins.value[:] = 0
    bins.value[10] = 1
    bins.value[90] = 3
    log_snr, value = bins.sample(40_000, torch.Generator().manual_seed(0))
    low = (log_snr >= -12) & (log_snr < -11.7)
    assert (low | (log_snr >= 12) & (log_snr < 12.3)).all()
    assert low.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (value[low] == 1).all() and (value[~low] == 3).all()


def test_noise_bins_estimate_the_loss_without_bias():
    """Whatever they hold, mean(loss / value) * mean(value) is the mean of the loss over even log_snr."""
    bins = NoiseBins()
    bins.value[:] = torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.1
    log_snr, value = bins.sample(400_000, torch.Generator().manual_seed(2))
    estimate = (log_snr.square() / value).mean() * bins.value.mean()
    assert estimate.item() == pytest.approx(75, rel=0.02)  # the mean of u^2 over [-15, 15]


def test_noise_bins_move_a_tenth_of_the_way_where_a_finite_loss_was_seen():
    bins = NoiseBins()
    losses = torch.tensor([3.0, 5.0, 11.0, math.inf, math.nan])
    bins.update(torch.tensor([-15.0, -14.9, 14.99, 0.1, 14.98]), losses)
    assert bins.value[0].item() == pytest.approx(0.9 + 0.1 * 4)
    assert bins.value[99].item() == pytest.approx(0.9 + 0.1 * 11)
    assert (bins.value[1:99] == 1).all()


@given(st.integers(0, 10**7), st.floats(0.5, 0.9999))
def test_ema_warms_up_to_its_decay(step, decay):
    """At step 0 it is the model; it remembers 1 - (1 + step)^(-3/4) of itself, and `decay` at most."""
    model = torch.nn.Linear(1, 1).double()
    ema = torch.nn.Linear(1, 1).double().requires_grad_(False)
    before = ema.weight.item()
    target = model.weight.item()
    update_ema(ema, model, step, decay)
    kept = min(decay, 1 - (1 + step) ** -0.75)
    assert ema.weight.item() == pytest.approx(kept * before + (1 - kept) * target, abs=1e-12)


def test_learning_rate_warms_up_linearly_and_ends_on_a_cosine():
    shares = [schedule(step, warmup=10, max_iters=110) for step in range(111)]
    assert shares[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert shares[10:] == pytest.approx([(1 + math.cos(math.pi * n / 100)) / 2 for n in range(101)])
    assert schedule(0, warmup=0, max_iters=1) == 1


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_muon_is_that_of_torch(shape):
    """Which rounds to bf16 on the way."""
    matrices = [torch.nn.Parameter(draw(0, shape).float()) for _ in range(2)]
    ours = Muon([matrices[0]], {"lr": 0.02, "weight_decay": 0.1})
    theirs = torch.optim.Muon([matrices[1]], 0.02, 0.1, momentum=0.95, adjust_lr_fn="original")
    for step in range(5):
        for matrix, optimizer in zip(matrices, (ours, theirs)):
            matrix.grad = draw(step + 1, shape).float()
            optimizer.step()
    moved = (matrices[0] - draw(0, shape)).norm()
    assert (matrices[0] - matrices[1]).norm() < 0.02 * moved


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_each_weight_has_one_optimizer_muon_the_linear_matrices_and_only_matrices_decay(muon):
    """Where the gradient is 0, a step shrinks matrices by decay_per_step, whatever the rates are."""
    gpt = GPT(GPTConfig(vocab_size=50, n_positions=16, n_layer=1, n_head=1, n_embd=64))
    decoder = Decoder(gpt, PromptGenerator(64, 64, d=64, n=1))
    module = torch.nn.ModuleList([decoder, DiffusionTransformer(64, d=64, n=2)])
    optimizers = configure_optimizers(module, 1e-3, (0.9, 0.99), decay_per_step=1e-2, muon=muon)
    trained = [[p for group in opt.param_groups for p in group["params"]] for opt in optimizers]
    names = {p: name for name, p in module.named_parameters()}
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    assert sorted(names[p] for each in trained for p in each) == sorted(names.values())
    assert [{names[p] for p in each} for each in trained[1:]] == ([linear] if muon else [])

    for p in names:
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for p, name in names.items():
        expected = 0.99 if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.data, torch.full_like(p, expected), msg=name)
