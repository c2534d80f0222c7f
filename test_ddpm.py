"""The proof of ddpm.py, in the order of the paper. Each test derives what it expects a second way: a closed form, exact
arithmetic, quadrature, an independent transcription in NumPy, or another library.

    pytest                          # about two minutes, on the CPU; where there is CUDA, its own tests too
    DDPM_TEST_SEED=7 pytest         # other random numbers; every statistical test states how often it may fail by
    chance

Worlds in which everything is known: if every pixel of x_0 is N(m, s²), then x_t is N(√ᾱ m, ᾱ s² + 1−ᾱ), and the network
that minimises Eq. 14 is E[ε|x_t] = √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1−ᾱ). Fed to the real samplers, it makes each step an
affine map of (x_t, z), whose mean and variance can be followed exactly.
"""

import contextlib
import copy
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ddpm
from ddpm import (
    GaussianDiffusion,
    UNet,
    classifier_free_guidance,
    cosine_beta_schedule,
    linear_beta_schedule,
    load_data,
    pick_device,
)

register_device = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
SEED = int(os.environ.get("DDPM_TEST_SEED", 0))
HERE = Path(__file__).parent
T = 1000
BETAS = np.array([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)])
BARS = np.exp(np.cumsum(np.log1p(-BETAS)))  # ᾱ_t, summed as logarithms
BARS_PREV = np.concatenate([[1.0], BARS[:-1]])  # ᾱ_{t−1}
WORLDS = [(0.0, 1.0), (0.3, 0.5), (-0.4, 0.1), (0.7, 0.0)]  # m, s


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """Whatever else this machine has: a result to the bit is the CPU's, and nothing is compiled first there. A test of
    another device names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "pick_device", lambda name=None: pick_device(name or "cpu"))
        yield


def exact(variance="fixed_large", betas=BETAS, **more):
    """The real code with its coefficients left in float64."""
    return GaussianDiffusion(betas, variance, dtype=torch.float64, **more)


def optimal(m, s, bars=BARS):
    """E[ε|x_t] where x_0 ~ N(m, s²)."""
    bars = torch.as_tensor(bars)

    def model(x_t, t):
        bar = bars[t].reshape(-1, 1, 1, 1)
        return (1 - bar).sqrt() * (x_t - bar.sqrt() * m) / (bar * s**2 + 1 - bar)

    return model


def knows(x_start, bars=BARS):
    """The ε that leads from x_start to x_t: a perfect network for one picture."""
    bars = torch.as_tensor(bars)

    def model(x_t, t):
        bar = bars[t].reshape(-1, *[1] * (x_t.dim() - 1))
        return (x_t - bar.sqrt() * x_start) / (1 - bar).sqrt()

    return model


# ---- 1. Noise schedules ----------------------------------------------------------------------------------------------


def test_linear_schedule_is_the_papers():
    """§4: T = 1000, β from 1e−4 to 0.02 in equal steps, in float64; other ends are taken as given."""
    betas = linear_beta_schedule(T)
    assert betas.dtype == torch.float64 and betas.shape == (T,)
    np.testing.assert_allclose(betas, BETAS, rtol=1e-12)
    np.testing.assert_allclose(linear_beta_schedule(5, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-12)


@pytest.mark.parametrize("s", [0.008, 0.02])
def test_cosine_schedule_gives_back_equation_17(s):
    """Improved DDPM Eq. 17: the product of 1 − β up to t is f(t)/f(0), wherever β is not capped; the cap is 0.999."""
    betas = cosine_beta_schedule(T, s) if s != 0.008 else cosine_beta_schedule(T)
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    products = [math.prod(1 - betas[:t].numpy()) for t in (1, 10, 500, 990, 998)]
    np.testing.assert_allclose(products, [f[t] / f[0] for t in (1, 10, 500, 990, 998)], rtol=1e-9)
    assert betas.dtype == torch.float64 and betas.shape == (T,)
    assert betas[-1] == 0.999 and (betas[:-1] < 0.999).all()


def guard_cosine_is_capped():
    for timesteps in (1, 10, 1000, 4000):
        assert cosine_beta_schedule(timesteps).max() <= 0.999
        assert all(value.isfinite().all() for value in GaussianDiffusion(cosine_beta_schedule(timesteps)).buffers())


def guard_schedule_of_a_config_ends_in_noise():
    """The mistake: 1e−4…0.02 at T = 100 leaves √ᾱ_T = 0.6. Measured against the ᾱ_T = 4e−5 of the paper's own."""
    for timesteps in (5, 10, 19, 20, 21, 50, 100, 250, 1000, 4000):
        for schedule in ("linear", "cosine"):
            _, diffusion = ddpm.build(ddpm.preset("digits", timesteps=timesteps, schedule=schedule), 1, None)
            assert diffusion.timesteps == timesteps and diffusion.alphas_cumprod[-1] < 1e-3


def test_short_schedules_still_end_in_noise():
    """§4 asks that x_T be almost N(0, I): a config scales the linear ends by 1000/T, whatever T is."""
    guard_schedule_of_a_config_ends_in_noise()
    _, diffusion = ddpm.build(ddpm.preset("digits", timesteps=500), 1, None)
    np.testing.assert_allclose(diffusion.betas[[0, -1]], [2e-4, 0.04], rtol=1e-6)


def test_a_schedule_that_leaves_signal_in_x_T_warns_with_the_number():
    """√ᾱ_T = 0.6 for the paper's ends at T = 100, from exact fractions; the paper's own schedule says nothing."""
    left = math.sqrt(math.prod(1 - Fraction(float(b)) for b in np.linspace(1e-4, 0.02, 100)))
    with pytest.warns(UserWarning, match=f"{left:.3f}"):
        GaussianDiffusion(linear_beta_schedule(100))
    with pytest.warns(UserWarning, match="0.051"):
        GaussianDiffusion([1 - 0.051**2])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianDiffusion(linear_beta_schedule(T))
        GaussianDiffusion([1 - 0.049**2])


# ---- 2. The forward process: Eq. 2 and 4 -----------------------------------------------------------------------------


def test_alphas_cumprod_in_exact_fractions():
    """ᾱ_t = ∏ (1 − β_s), multiplied as exact rationals for the first 60 steps and as logarithms for all."""
    product, diffusion = Fraction(1), exact()
    for t, beta in enumerate(linear_beta_schedule(T)[:60].tolist()):
        product *= 1 - Fraction(beta)
        assert float(diffusion.alphas_cumprod[t]) == pytest.approx(float(product), rel=1e-14)
    np.testing.assert_allclose(diffusion.alphas_cumprod, BARS, rtol=1e-12)


def guard_coefficients_keep_float32s_last_digit():
    """Each buffer is the float64 value rounded once: half a unit in the last place of float32, 6e−8 of the value."""
    with np.errstate(divide="ignore"):
        small = (1 - BARS_PREV) / (1 - BARS) * BETAS
    want = dict(
        betas=BETAS,
        log_betas=np.log(BETAS),
        alphas_cumprod=BARS,
        sqrt_alphas_cumprod=np.sqrt(BARS),
        sqrt_one_minus_alphas_cumprod=np.sqrt(-np.expm1(np.cumsum(np.log1p(-BETAS)))),
        posterior_variance=small,
        posterior_log_variance=np.log(np.concatenate([small[1:2], small[1:]])),
        posterior_mean_x_start=np.sqrt(BARS_PREV) * BETAS / (1 - BARS),
        posterior_mean_x_t=np.sqrt(1 - BETAS) * (1 - BARS_PREV) / (1 - BARS),
    )
    have = dict(GaussianDiffusion(linear_beta_schedule(T)).named_buffers())
    assert have.keys() == want.keys()
    for name, buffer in have.items():
        assert buffer.dtype == torch.float32
        np.testing.assert_allclose(buffer.double(), want[name], rtol=6.1e-8, atol=0, err_msg=name)


def test_coefficients_are_computed_in_float64():
    """Accumulated in float32, ᾱ_T would be off by 1e−6 of itself, seventeen times what this allows."""
    guard_coefficients_keep_float32s_last_digit()


def guard_schedule_is_no_state():
    """The mistake: an EMA or a checkpoint that carries the schedule, averages it or brings back an old one."""
    diffusion = GaussianDiffusion(linear_beta_schedule(T))
    assert not diffusion.state_dict() and not list(diffusion.parameters())


def test_buffers_move_but_are_not_saved():
    """Coefficients follow .to() as buffers, and are neither in the state dict nor trainable."""
    guard_schedule_is_no_state()
    assert {b.device.type for b in GaussianDiffusion(BETAS).to("meta").buffers()} == {"meta"}


def guard_marginal_by_one_vectorised_draw():
    """q_sample's mean and variance at every t at once: x_0 = 0.6, 4,000 draws a t. z of the mean and χ² of the
    variance at each of the 1000 t; a false alarm (any of 2000 statistics beyond p = 5e−10) has probability 1e−6. An
    error of the standard deviation by 8%, or of the mean by 0.1 standard deviations, is seen at each single t, and
    the sum of all χ² sees 0.3%."""
    n = 4000
    t = torch.arange(T).repeat_interleave(n)
    x_t = exact().q_sample(torch.full((T * n, 1, 1, 1), 0.6, dtype=torch.float64), t).reshape(T, n).numpy()
    z = (x_t - np.sqrt(BARS)[:, None] * 0.6) / np.sqrt(1 - BARS)[:, None]
    assert (2 * scipy.stats.norm.sf(np.abs(z.mean(1)) * math.sqrt(n)) > 5e-10).all()
    squares = (z**2).sum(1)
    assert (scipy.stats.chi2.sf(squares, n) > 2.5e-10).all() and (scipy.stats.chi2.cdf(squares, n) > 2.5e-10).all()
    assert abs(squares.sum() - T * n) < 5.5 * math.sqrt(2 * T * n)  # p = 4e−8


def test_equation_4_at_every_t_by_one_draw():
    """q(x_t|x_0) has mean √ᾱ_t x_0 and variance 1 − ᾱ_t, at all t, from q_sample's own randomness."""
    guard_marginal_by_one_vectorised_draw()


def guard_q_sample_coefficients():
    ones, zeros = torch.ones(T, 1, 1, 1, dtype=torch.float64), torch.zeros(T, 1, 1, 1, dtype=torch.float64)
    t, diffusion = torch.arange(T), exact()
    np.testing.assert_allclose(diffusion.q_sample(ones, t, zeros).flatten(), np.sqrt(BARS), rtol=1e-12)
    np.testing.assert_allclose(diffusion.q_sample(zeros, t, ones).flatten(), np.sqrt(1 - BARS), rtol=1e-12)


def test_equation_4_is_equation_2_composed():
    """x_t = √(1−β_t) x_{t−1} + √β_t z, one step at a time: mean and variance after each step are q_sample's."""
    mean, variance = np.ones(T), np.zeros(T)
    m, v = 1.0, 0.0
    for t in range(T):
        m, v = math.sqrt(1 - BETAS[t]) * m, (1 - BETAS[t]) * v + BETAS[t]
        mean[t], variance[t] = m, v
    ones, zeros = torch.ones(T, 1, 1, 1, dtype=torch.float64), torch.zeros(T, 1, 1, 1, dtype=torch.float64)
    diffusion, t = exact(), torch.arange(T)
    np.testing.assert_allclose(diffusion.q_sample(ones, t, zeros).flatten(), mean, rtol=1e-11)
    np.testing.assert_allclose(diffusion.q_sample(zeros, t, ones).flatten() ** 2, variance, rtol=1e-11)
    guard_q_sample_coefficients()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 3, 5, 7), (4, 6), (2, 1, 3, 3, 3)])
def test_any_shape_and_an_int_for_t(shape):
    """Any channel count and size, pictures or not; a plain int is that t for the whole batch."""
    diffusion, x, noise = exact(), torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    got = diffusion.q_sample(x, 500, noise)
    np.testing.assert_allclose(got, math.sqrt(BARS[500]) * x + math.sqrt(1 - BARS[500]) * noise, rtol=1e-12)
    assert torch.equal(got, diffusion.q_sample(x, torch.full((shape[0],), 500), noise))
    assert diffusion.p_sample_loop(optimal_like := (lambda x_t, t: torch.zeros_like(x_t)), shape).shape == shape
    assert diffusion.ddim_sample_loop(optimal_like, shape, 7).shape == shape


def test_q_sample_draws_its_own_noise_like_x():
    """Without noise= the noise is standard normal: two calls differ, and reseeding repeats them."""
    diffusion, x = exact(), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    first, second = diffusion.q_sample(x, 999), diffusion.q_sample(x, 999)
    torch.manual_seed(SEED)
    assert torch.equal(first, diffusion.q_sample(x, 999)) and not torch.equal(first, second)


# ---- The posterior: Eq. 6 and 7 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 10, 200, 500, 998, 999])
def test_posterior_is_bayes_rule_by_quadrature(t):
    """Eq. 6–7: q(x_{t−1}|x_t, x_0) ∝ q(x_t|x_{t−1}) q(x_{t−1}|x_0), normalised and integrated numerically."""
    x_0, x_t = -0.3, math.sqrt(BARS[t]) * -0.3 + 1.5 * math.sqrt(1 - BARS[t])
    mean_prev, sd_prev = math.sqrt(BARS[t - 1]) * x_0, math.sqrt(1 - BARS[t - 1])
    peak = mean_prev + sd_prev * np.linspace(-12, 12, 200_001)
    log_density = scipy.stats.norm.logpdf(
        x_t, np.sqrt(1 - BETAS[t]) * peak, math.sqrt(BETAS[t])
    ) + scipy.stats.norm.logpdf(peak, mean_prev, sd_prev)
    density = np.exp(log_density - log_density.max())
    mass = scipy.integrate.trapezoid(density, peak)
    mean = scipy.integrate.trapezoid(density * peak, peak) / mass
    variance = scipy.integrate.trapezoid(density * (peak - mean) ** 2, peak) / mass
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    got_mean, got_variance, got_log_variance = exact().q_posterior(x_0 * x, x_t * x, t)
    assert got_mean.item() == pytest.approx(mean, rel=1e-7)
    assert got_variance.item() == pytest.approx(variance, rel=1e-7)
    assert got_log_variance.item() == pytest.approx(math.log(variance), rel=1e-7)


def test_posterior_of_the_first_step_is_the_picture_itself():
    """At paper t = 1 x_{t−1} is x_0: mean x_0, variance 0, and a log variance that is β̃_2's, not −∞."""
    x_0, x_t = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    mean, variance, log_variance = exact().q_posterior(x_0, x_t, 0)
    np.testing.assert_allclose(mean, x_0, rtol=1e-12)
    assert (variance == 0).all()
    np.testing.assert_allclose(log_variance.exp(), (1 - BARS[0]) / (1 - BARS[1]) * BETAS[1], rtol=1e-9)
    lonely = GaussianDiffusion([0.999], dtype=torch.float64).q_posterior(x_0, x_t, 0)  # T = 1: no β̃_2, so β_1
    assert lonely[2].exp().flatten()[0].item() == pytest.approx(0.999)


# ---- The reverse process: Eq. 11, 15 and Algorithm 2 -----------------------------------------------------------------


def test_equation_15_inverts_equation_4():
    """x̂_0 from the true ε is x_0, and ε from the true x_0 is ε, at every t; against Eq. 15 written out."""
    x, noise, t = torch.randn(T, 2, dtype=torch.float64), torch.randn(T, 2, dtype=torch.float64), torch.arange(T)
    diffusion = exact()
    x_t = diffusion.q_sample(x, t, noise)
    np.testing.assert_allclose(diffusion.predict_x_start(x_t, t, noise), x, atol=1e-10)
    np.testing.assert_allclose(diffusion.predict_noise(x_t, t, x), noise, atol=1e-10)
    bar = BARS[:, None]
    np.testing.assert_allclose(
        diffusion.predict_x_start(x, t, noise),
        (x.numpy() - np.sqrt(1 - bar) * noise.numpy()) / np.sqrt(bar),
        rtol=1e-9,
        atol=1e-12,
    )


def test_equation_11_both_forms_agree_without_the_clamp():
    """μ̃_t(x_t, x̂_0), which the code computes, is (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t, which Algorithm 2 states, at every
    t."""
    x_t, noise, t = torch.randn(T, 3, dtype=torch.float64), torch.randn(T, 3, dtype=torch.float64), torch.arange(T)
    mean, _, _, x_start = exact().p_mean_variance(lambda x, t: noise, x_t, t, clip_denoised=False)
    beta, bar = BETAS[:, None], BARS[:, None]
    np.testing.assert_allclose(
        mean, (x_t.numpy() - beta / np.sqrt(1 - bar) * noise.numpy()) / np.sqrt(1 - beta), rtol=1e-8, atol=1e-9
    )
    np.testing.assert_allclose(
        x_start, (x_t.numpy() - np.sqrt(1 - bar) * noise.numpy()) / np.sqrt(bar), rtol=1e-9, atol=1e-9
    )


def guard_the_clamp_is_on_by_default():
    """A network that answers ε = 0 to a bright x_t means x̂_0 = x_t/√ᾱ_t > 1; Eq. 7 must see 1 instead, as the
    authors' does."""
    x_t = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    for sign in (1, -1):
        mean, _, _, x_start = exact().p_mean_variance(lambda x, t: torch.zeros_like(x), sign * x_t, 700)
        assert x_start.item() == sign
        want = sign * (
            math.sqrt(BARS[699]) * BETAS[700] / (1 - BARS[700])
            + 2 * math.sqrt(1 - BETAS[700]) * (1 - BARS[699]) / (1 - BARS[700])
        )
        assert mean.item() == pytest.approx(want, rel=1e-9)


def test_what_the_clamp_does():
    """Clamped, x̂_0 stays a picture; unclamped, ε = 0 at code t = 999 means a pixel 150 times too bright."""
    guard_the_clamp_is_on_by_default()
    x_t = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = lambda x, t: torch.zeros_like(x)
    assert exact().p_mean_variance(zero, x_t, 999, clip_denoised=False)[3].item() == pytest.approx(
        1 / math.sqrt(BARS[999])
    )
    for clip in (True, False):  # the samplers pass their own argument on
        seen = [exact().p_sample(zero, x_t, 999, clip, noise=x_t), exact().ddim_sample(zero, x_t, 999, 500, 0.0, clip)]
        want_p = exact().p_mean_variance(zero, x_t, 999, clip)[0] + math.sqrt(BETAS[999])
        assert torch.allclose(seen[0], want_p) and (seen[1].item() > 2) == (not clip)
        loops = (
            exact().p_sample_loop(zero, x_t.shape, clip, noise=x_t),
            exact().ddim_sample_loop(zero, x_t.shape, 9, 0.0, clip, noise=x_t),
        )
        assert (loops[1].abs().max() > 1.001) == (not clip) or clip
        assert loops[1].item() == pytest.approx(1.0 if clip else 1 / math.sqrt(BARS[999]), rel=1e-6)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_the_three_variances(variance):
    """§3.2: β_t or β̃_t. Improved DDPM Eq. 15: exp(v log β_t + (1−v) log β̃_t), here for a random v, and for v = 1
    and 0."""
    small = (1 - BARS_PREV) / (1 - BARS) * BETAS
    small_log = np.log(np.concatenate([small[1:2], small[1:]]))[:, None]
    x_t, t, v = (
        torch.randn(T, 2, 1, 1, dtype=torch.float64),
        torch.arange(T),
        torch.rand(T, 2, 1, 1, dtype=torch.float64),
    )
    v[:2], v[-2:] = 1, 0
    model = (lambda x, t: torch.cat([x, v], 1)) if variance == "learned_range" else (lambda x, t: x)
    _, got, got_log, _ = exact(variance).p_mean_variance(model, x_t, t)
    got, got_log = (k.broadcast_to(x_t.shape)[:, :, 0, 0].numpy() for k in (got, got_log))
    if variance == "fixed_large":
        want, want_log = BETAS[:, None], np.log(BETAS)[:, None]
    elif variance == "fixed_small":
        want, want_log = small[:, None], small_log
    else:
        v = v[:, :, 0, 0].numpy()
        want_log = v * np.log(BETAS)[:, None] + (1 - v) * small_log
        want = np.exp(want_log)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-9)
    np.testing.assert_allclose(got_log, np.broadcast_to(want_log, got.shape), rtol=1e-9)


def guard_no_noise_at_the_last_step():
    """At code t = 0 Algorithm 2 sets z = 0: x_0 must not feel the noise, and all other steps must feel σ_t of it."""
    x, ones = torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.ones(3, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0, 1, 999])
    for variance, sigma in (
        ("fixed_large", np.sqrt(BETAS)),
        ("fixed_small", np.sqrt((1 - BARS_PREV) / (1 - BARS) * BETAS)),
    ):
        model = lambda x, t: torch.zeros_like(x)
        felt = exact(variance).p_sample(model, x, t, noise=ones) - exact(variance).p_sample(model, x, t, noise=0 * ones)
        np.testing.assert_allclose(felt.flatten(), [0, sigma[1], sigma[999]], rtol=1e-9)


def test_algorithm_2_against_numpy():
    """Algorithm 2 transcribed from the paper into NumPy, all 1000 steps, on the same noise and the same (nonlinear)
    model."""
    guard_no_noise_at_the_last_step()
    generator = torch.Generator().manual_seed(SEED + 1)
    noise = [torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(T + 1)]
    x = noise[0].numpy()
    for i, t in enumerate(reversed(range(1, T + 1))):  # the paper's t
        alpha, bar = 1 - BETAS[t - 1], BARS[t - 1]
        z = noise[1 + i].numpy() if t > 1 else 0
        x = (x - (1 - alpha) / math.sqrt(1 - bar) * np.tanh(x + t / T)) / math.sqrt(alpha) + math.sqrt(BETAS[t - 1]) * z
    got = exact().p_sample_loop(
        lambda x, t: torch.tanh(x + (t + 1).reshape(-1, 1, 1, 1) / T),
        (2, 1, 2, 2),
        clip_denoised=False,
        generator=torch.Generator().manual_seed(SEED + 1),
    )
    np.testing.assert_allclose(got, x, rtol=1e-7, atol=1e-9)


def affine_chain(step, indices):
    """The samplers are affine in (x_t, z) in a Gaussian world: the slope, the offset and the share of z of each step,
    read off at (0, 0), (1, 0) and (0, 1), carry N(0, 1) from x_T to x_0. Yield (s, mean, variance) after each step."""
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    mean, variance = 0.0, 1.0
    for t, s in indices:
        at_zero, at_one, at_noise = step(x, t, s, z).flatten().tolist()
        slope, share = at_one - at_zero, at_noise - at_zero
        mean, variance = slope * mean + at_zero, slope**2 * variance + share**2
        yield s, mean, variance


EVERY_STEP = [(t, t - 1) for t in reversed(range(T))]


def test_fixed_large_is_exact_for_standard_normal_data():
    """§3.2: with σ_t² = β_t and x_0 ~ N(0, 1), every x_t of the reverse chain is N(0, 1); only the noiseless last step
    leaves α_1 = 0.9999 of the variance."""
    diffusion, model = exact("fixed_large"), optimal(0.0, 1.0)
    for s, mean, variance in affine_chain(
        lambda x, t, s, z: diffusion.p_sample(model, x, t, False, noise=z), EVERY_STEP
    ):
        assert mean == pytest.approx(0, abs=1e-12)
        assert variance == pytest.approx(1 if s >= 0 else 1 - BETAS[0], abs=1e-12)


def test_fixed_small_is_exact_for_a_single_point():
    """§3.2: with σ_t² = β̃_t and one picture as data, the reverse chain's marginals are q(x_t|x_0) from below the top,
    where N(0, 1) stands in for q(x_T|x_0), and it ends on the picture exactly."""
    diffusion, model = exact("fixed_small"), optimal(0.7, 0.0)
    for s, mean, variance in affine_chain(
        lambda x, t, s, z: diffusion.p_sample(model, x, t, False, noise=z), EVERY_STEP
    ):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx(math.sqrt(bar) * 0.7, abs=0.7 * math.sqrt(BARS[-1]))
        assert variance == pytest.approx(1 - bar, abs=BARS[-1])
    assert (mean, variance) == pytest.approx((0.7, 0.0), abs=1e-12)


@pytest.mark.parametrize("m, s", WORLDS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_error_in_between_is_the_computed_one(m, s, variance):
    """For x_0 ~ N(m, s²) the exact p(x_{t−1}|x_t) has variance β_t (1 − β_t/v_t)/α_t·… between β̃_t and β_t. Following
    the chain in NumPy with Algorithm 2's own coefficients gives the marginals to the last digit, and fixed_large ends
    too wide, fixed_small too narrow, each by less than 0.02."""
    diffusion, model = exact(variance), optimal(m, s)
    sigma2 = BETAS if variance == "fixed_large" else (1 - BARS_PREV) / (1 - BARS) * BETAS
    mean, var = 0.0, 1.0
    for t, got_mean, got_var in affine_chain(
        lambda x, t, s, z: diffusion.p_sample(model, x, t, False, noise=z), EVERY_STEP
    ):
        t = t + 1
        v = BARS[t] * s**2 + 1 - BARS[t]
        slope = (1 - BETAS[t] / v) / math.sqrt(1 - BETAS[t])
        mean = slope * mean + BETAS[t] * math.sqrt(BARS[t]) * m / v / math.sqrt(1 - BETAS[t])
        var = slope**2 * var + (sigma2[t] if t else 0)
        assert (got_mean, got_var) == pytest.approx((mean, var), rel=1e-8, abs=1e-12)
    assert mean == pytest.approx(m, abs=1e-3)
    if 0 < s < 1:
        assert 0 < (math.sqrt(var) - s) * (1 if variance == "fixed_large" else -1) < 0.02


def test_noise_in_data_out_for_a_mixture():
    """A mixture ¼ N(−0.6, 0.1²) + ¾ N(0.5, 0.2²): 4,000 pixels through Algorithm 2 with the exact E[ε|x_t] against the
    mixture's own distribution function. Kolmogorov–Smirnov, false alarm 1e−6, sees a distance of 0.05."""
    x_0 = exact().p_sample_loop(mixture_model, (4000, 1, 1, 1), clip_denoised=False).flatten().numpy()
    assert scipy.stats.kstest(x_0, mixture_cdf).statistic < scipy.stats.kstwo.isf(1e-6, 4000) + 0.005


WEIGHTS, MEANS, SDS = np.array([0.25, 0.75]), np.array([-0.6, 0.5]), np.array([0.1, 0.2])


def mixture_cdf(x):
    return (WEIGHTS * scipy.stats.norm.cdf(np.asarray(x)[..., None], MEANS, SDS)).sum(-1)


def mixture_log_density(x_t, t):
    """log q(x_t) of the mixture, as a function torch can differentiate."""
    bar = torch.as_tensor(BARS)[t].reshape(-1, 1, 1, 1, 1)
    mean, variance = bar.sqrt() * torch.as_tensor(MEANS), bar * torch.as_tensor(SDS) ** 2 + 1 - bar
    each = torch.as_tensor(WEIGHTS).log() - 0.5 * (
        variance.log() + math.log(2 * math.pi) + (x_t[..., None] - mean) ** 2 / variance
    )
    return torch.logsumexp(each, -1)


def mixture_model(x_t, t):
    """E[ε|x_t]: the two components' own, weighted with their probability given x_t."""
    bar = torch.as_tensor(BARS)[t].reshape(-1, 1, 1, 1, 1)
    mean, variance = bar.sqrt() * torch.as_tensor(MEANS), bar * torch.as_tensor(SDS) ** 2 + 1 - bar
    each = torch.as_tensor(WEIGHTS).log() - 0.5 * (variance.log() + (x_t[..., None] - mean) ** 2 / variance)
    return (torch.softmax(each, -1) * (1 - bar).sqrt() * (x_t[..., None] - mean) / variance).sum(-1)


# ---- The objective: Eq. 8 to 10, 12 and 14 ---------------------------------------------------------------------------


def test_equation_14_written_out():
    """L_simple is the mean of (ε − ε_θ(√ᾱ x_0 + √(1−ᾱ) ε, t))² over the batch and all pixels, to float64's
    precision."""
    x, noise, t = (
        torch.randn(5, 2, 3, 3, dtype=torch.float64),
        torch.randn(5, 2, 3, 3, dtype=torch.float64),
        torch.tensor([0, 3, 500, 998, 999]),
    )
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()
    want = ((noise.numpy() - np.sin(x_t) * t.numpy().reshape(-1, 1, 1, 1) / 100) ** 2).mean()
    got = exact().p_losses(lambda x_t, t: torch.sin(x_t) * t.reshape(-1, 1, 1, 1) / 100, x, t, noise)
    assert got.item() == pytest.approx(want, rel=1e-10)
    assert exact().p_losses(lambda x_t, t: noise, x, t, noise) == 0


def test_loss_of_the_optimal_model_is_its_closed_form():
    """In the Gaussian world min L_simple at t is ᾱ s²/(ᾱ s² + 1−ᾱ) per pixel: Var(ε|x_t). Averaged over 2 million
    draws of all t; false alarm 1e−6 (4.9 σ of the mean, estimated from the same draws), sees an error of 0.3%."""
    m, s, n = 0.3, 0.5, 2000
    t = torch.arange(T).repeat_interleave(n)
    x, noise = (
        m + s * torch.randn(T * n, 1, 1, 1, dtype=torch.float64),
        torch.randn(T * n, 1, 1, 1, dtype=torch.float64),
    )
    want = (BARS * s**2 / (BARS * s**2 + 1 - BARS)).mean()
    model = optimal(m, s)
    got = exact().p_losses(model, x, t, noise).item()
    each = (noise - model(exact().q_sample(x, t, noise), t)).square()
    assert abs(got - want) < 4.9 * each.std().item() / math.sqrt(T * n)


def test_equations_8_9_10_and_12_are_the_same_loss():
    """Eq. 8: ‖μ̃ − μ_θ‖²/2σ². Eq. 9: μ̃ of x_t(x_0, ε) and the x_0 that it holds. Eq. 10: μ̃ in terms of ε. Eq. 12:
    β²/(2σ²α(1−ᾱ)) ‖ε − ε_θ‖². For any network the four agree at every t: Eq. 8 with the code's μ̃ and μ_θ, the others
    written from the paper."""
    diffusion = exact()
    x, noise, guess = (torch.randn(T, 2, dtype=torch.float64) for _ in range(3))
    t = torch.arange(T)
    x_t = diffusion.q_sample(x, t, noise)
    mu_tilde, mu = diffusion.q_posterior(x, x_t, t)[0], diffusion.p_mean_variance(lambda *_: guess, x_t, t, False)[0]
    beta, bar = torch.as_tensor(BETAS)[:, None], torch.as_tensor(BARS)[:, None]
    eq8 = (mu_tilde - mu).square() / (2 * beta)
    bar_before = torch.as_tensor(BARS_PREV)[:, None]
    x_of = bar.sqrt() * x + (1 - bar).sqrt() * noise  # x_t(x_0, ε)
    x_0 = (x_of - (1 - bar).sqrt() * noise) / bar.sqrt()
    moved = bar_before.sqrt() * beta / (1 - bar) * x_0 + (1 - beta).sqrt() * (1 - bar_before) / (1 - bar) * x_of
    eq9 = (moved - mu).square() / (2 * beta)
    eq10 = ((x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt() - mu).square() / (2 * beta)
    eq12 = beta**2 / (2 * beta * (1 - beta) * (1 - bar)) * (noise - guess).square()
    np.testing.assert_allclose(eq8, eq9, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(eq8, eq10, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(eq8, eq12, rtol=1e-6, atol=1e-12)


def test_gradient_of_the_loss_by_finite_differences():
    """∇_θ of Algorithm 1's loss, for a network of three numbers, against central differences in float64."""
    x, noise, t = (
        torch.randn(4, 1, 2, 2, dtype=torch.float64),
        torch.randn(4, 1, 2, 2, dtype=torch.float64),
        torch.tensor([0, 10, 500, 999]),
    )
    for variance, loss in (("fixed_large", "simple"), ("fixed_large", "bound"), ("learned_range", "bound")):

        def value(theta):
            def model(x_t, t):
                eps = theta[0] * x_t + theta[1] * torch.tanh(x_t) * t.reshape(-1, 1, 1, 1) / T
                return torch.cat([eps, theta[2] + 0 * eps], 1) if variance == "learned_range" else eps + theta[2]

            return exact(variance, loss=loss).p_losses(model, x.clamp(-1, 1), t, noise)

        theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
        value(theta).backward()
        for i in range(3):
            h = torch.zeros(3, dtype=torch.float64)
            h[i] = 1e-5
            with torch.no_grad():
                slope = (value(theta + h) - value(theta - h)) / 2e-5
            assert theta.grad[i].item() == pytest.approx(slope.item(), rel=1e-5)


def test_the_bound_as_a_loss_is_the_mean_of_its_terms():
    """Eq. 5 for t drawn uniformly: T times the mean of L_{t−1} in bits/dim. With ε_θ = −9 ε that is, by Eq. 12 at σ_t²
    = β̃_t, β_t² / (2 β̃_t α_t (1−ᾱ_t)) · 100 ε², whatever x̂_0 lies outside of [−1, 1]."""
    x, noise = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([7, 400, 999])
    beta, bar = torch.tensor(BETAS)[t], (1 - torch.tensor(BETAS)).cumprod(0)
    posterior = (1 - bar[t - 1]) / (1 - bar[t]) * beta
    weight = beta**2 / (2 * posterior * (1 - beta) * (1 - bar[t]))
    want = T * (weight.reshape(-1, 1, 1, 1) * 100 * noise**2).mean() / math.log(2)
    loss = exact("fixed_small", loss="bound").p_losses(lambda x_t, t: -9 * noise, x, t, noise)
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)


def test_the_loss_draws_its_own_noise():
    """Without noise given, ε ~ N(0, I): ε_θ = 0 has the loss mean ε², a χ² of 65,536 draws; false alarm 1e−6."""
    x, n = torch.zeros(16, 1, 64, 64), 16 * 64 * 64
    loss = GaussianDiffusion(BETAS).p_losses(lambda x_t, t: torch.zeros_like(x_t), x, torch.arange(16)).item()
    assert scipy.stats.chi2.ppf(5e-7, n) < loss * n < scipy.stats.chi2.isf(5e-7, n)


def test_every_sampler_clamps_unless_told_otherwise():
    """ε_θ = 0 has x̂_0 = x_t/√ᾱ_t; clamped, the last step of each sampler ends within [−1, 1]. Unclamped, 1 grows to
    1/√ᾱ_T = 158."""
    diffusion, x = GaussianDiffusion(BETAS, "fixed_small"), torch.ones(1, 1, 2, 2)
    model = lambda x_t, t: torch.zeros_like(x_t)
    ends = {
        "p_sample_loop": diffusion.p_sample_loop(model, x.shape, noise=x),
        "p_sample_steps": [*diffusion.p_sample_steps(model, x)][-1],
        "ddim_sample_loop": diffusion.ddim_sample_loop(model, x.shape, 10, noise=x),
        "ddim_sample_steps": [*diffusion.ddim_sample_steps(model, x, 10)][-1],
    }
    assert {name: x_0.abs().max().item() <= 1 for name, x_0 in ends.items()} == dict.fromkeys(ends, True)
    assert diffusion.p_sample_loop(model, x.shape, clip_denoised=False, noise=x).abs().max() > 50


def test_hybrid_loss_holds_the_mean_still():
    """Improved DDPM Eq. 16: L_simple + 0.001 L_vlb, in which ε gets L_simple's gradient alone and v the bound's."""
    x, noise, t = (
        torch.rand(4, 1, 2, 2, dtype=torch.float64),
        torch.randn(4, 1, 2, 2, dtype=torch.float64),
        torch.tensor([0, 1, 500, 999]),
    )
    eps, v = (torch.randn(4, 1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    diffusion = exact("learned_range")
    loss = diffusion.p_losses(lambda x_t, t: torch.cat([eps, v], 1), x, t, noise)
    loss.backward()
    np.testing.assert_allclose(eps.grad, 2 * (eps - noise).detach() / eps.numel(), rtol=1e-10)
    x_t = diffusion.q_sample(x, t, noise)
    bound = T * diffusion.bound_term(lambda x_t, t: torch.cat([eps, v], 1), x, x_t, t, clip_denoised=False)[0].mean()
    assert loss.item() == pytest.approx(((eps - noise) ** 2).mean().item() + 0.001 * bound.item(), rel=1e-10)
    (want,) = torch.autograd.grad(0.001 * bound, v)
    np.testing.assert_allclose(v.grad, want, rtol=1e-10)
    assert (v.grad != 0).all()


# ---- The bound: Eq. 3, 5 and 13 --------------------------------------------------------------------------------------


def test_kl_of_gaussians_by_integration():
    """normal_kl against ∫ p log(p/q), integrated by scipy."""
    for m1, v1, m2, v2 in [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 2.0), (1.0, 0.01, 0.9, 0.02)]:
        p, q = scipy.stats.norm(m1, math.sqrt(v1)), scipy.stats.norm(m2, math.sqrt(v2))
        want = scipy.integrate.quad(
            lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m1 - 12 * v1**0.5, m1 + 12 * v1**0.5, points=[m1]
        )[0]
        got = ddpm.normal_kl(*(torch.tensor(k, dtype=torch.float64) for k in (m1, math.log(v1), m2, math.log(v2))))
        assert got.item() == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.55, 1.0])
@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.1, 2.0])
def test_equation_13_is_a_distribution_over_256_values(mean, sigma):
    """The 256 probabilities sum to one, and each is the mass that scipy's normal distribution puts on its bin, tails
    included: the logarithm is right to 1e−9 where the mass itself is far below the smallest float64."""
    k = torch.arange(256, dtype=torch.float64)
    x = k / 127.5 - 1
    log_p = ddpm.discretized_gaussian_log_likelihood(
        x, torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * math.log(sigma), dtype=torch.float64)
    )
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12) and log_p.isfinite().all()
    edges = (np.arange(257) * 2 - 1) / 255 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    a, b = (edges[:-1] - mean) / sigma, (edges[1:] - mean) / sigma
    flip = (a + b > 0) | np.isinf(b)
    low, high = np.where(flip, -b, a), np.where(flip, -a, b)
    with np.errstate(divide="ignore"):
        want = scipy.special.logsumexp(
            [scipy.special.log_ndtr(high), scipy.special.log_ndtr(low)],
            axis=0,
            b=np.stack([np.ones(256), -np.ones(256)]),
        )
    np.testing.assert_allclose(log_p, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.2, 0.4)])
def test_equation_5_equals_equation_3(m, s, variance):
    """Eq. 5's terms from the code, and Eq. 3 computed from the joint Gaussian q(x_{t−1}, x_t|x_0) alone, for T = 50.
    The code's KL is quadratic in ε, so its mean over ε is that over ε = ±1 exactly. L_0 is left out on both sides
    (Eq. 13's is of pixels); in its place Eq. 3's own term is used."""
    timesteps, x_0 = 50, 0.35
    betas = np.linspace(2e-3, 0.4, timesteps)
    bars = np.cumprod(1 - betas)
    prev = np.concatenate([[1.0], bars[:-1]])
    sigma2 = betas if variance == "fixed_large" else np.concatenate([[np.nan], ((1 - prev) / (1 - bars) * betas)[1:]])
    diffusion, model = exact(variance, betas), optimal(m, s, bars)
    x = torch.full((1, 1, 1, 1), x_0, dtype=torch.float64)
    bits = diffusion.bits_per_dim(model, x, clip_denoised=False)
    eq5 = bits["L_T"].item()
    for t in range(1, timesteps):
        both = [
            diffusion.bound_term(model, x, diffusion.q_sample(x, t, e * torch.ones_like(x)), t, False)[0].item()
            for e in (1, -1)
        ]
        eq5 += sum(both) / 2
    # Eq. 3 from the top: −log p(x_T), then −log p_θ(x_{t−1}|x_t) + log q(x_t|x_{t−1}), down to t = 2.
    eq3 = 0.5 * math.log(2 * math.pi) + 0.5 * (bars[-1] * x_0**2 + 1 - bars[-1])
    for t in range(1, timesteps):
        v = bars[t] * s**2 + 1 - bars[t]
        slope = (1 - betas[t] / v) / math.sqrt(1 - betas[t])
        offset = betas[t] * math.sqrt(bars[t]) * m / v / math.sqrt(1 - betas[t])
        # x_{t−1} − slope x_t − offset with x_t = √α x_{t−1} + √β z
        keep = 1 - slope * math.sqrt(1 - betas[t])
        mean = keep * math.sqrt(prev[t]) * x_0 - offset
        second = mean**2 + keep**2 * (1 - prev[t]) + slope**2 * betas[t]
        eq3 += 0.5 * math.log(2 * math.pi * sigma2[t]) + second / (2 * sigma2[t])
        eq3 -= 0.5 * math.log(2 * math.pi * betas[t]) + 0.5
    # q(x_1|x_0)'s entropy is what Eq. 5 has moved into the first KL.
    eq3 -= 0.5 * math.log(2 * math.pi * (1 - bars[0])) + 0.5
    assert eq5 == pytest.approx(eq3 / math.log(2), rel=1e-9)


def test_bound_is_negative_log_likelihood_plus_its_gap():
    """For x_0 ~ N(0, 1) fixed_large is the exact reverse: each KL to the true p(x_{t−1}|x_t) vanishes, and Eq. 5's
    terms for t > 1 with L_T are E[log q(x_1|x_0)/p(x_1)], whose closed form is ½(ᾱ_1 x_0² + (1−ᾱ_1) − 1 −
    log(1−ᾱ_1))."""
    for x_0 in (0.0, 0.4, -0.9):
        x = torch.full((1, 1, 1, 1), x_0, dtype=torch.float64)
        diffusion, model = exact("fixed_large"), optimal(0.0, 1.0)
        total = diffusion.bits_per_dim(model, x, clip_denoised=False)["L_T"].item()
        t = torch.arange(1, T)
        both = [
            diffusion.bound_term(
                model,
                x.expand(T - 1, 1, 1, 1),
                diffusion.q_sample(x.expand(T - 1, 1, 1, 1), t, e * torch.ones(T - 1, 1, 1, 1, dtype=torch.float64)),
                t,
                False,
            )[0]
            for e in (1, -1)
        ]
        total += (both[0] + both[1]).sum().item() / 2
        bar = BARS[0]
        assert total * math.log(2) == pytest.approx(0.5 * (bar * x_0**2 - bar - math.log(1 - bar)), rel=1e-7)


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.3, 0.5), (-0.4, 0.1)])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_bound_is_negative_log_likelihood_plus_the_kl_of_the_paths(m, s, variance):
    """L = −log p_θ(x_0) + KL(q(x_{1:T}|x_0) ‖ p_θ(x_{1:T}|x_0)). With the optimal ε for N(m, s²), p_θ is one Gaussian
    on all of x_0 … x_T: its covariance gives both by linear algebra, for a chain of eight steps. The code's terms are
    quadratic in the noise, so that ±1 averages them exactly; −log p_θ(x_0|x_1) is here a density, not Eq. 13's."""
    steps, x_0 = 8, 0.6
    beta = np.linspace(0.05, 0.9, steps)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    slope = np.sqrt(1 - bar) / (bar * s**2 + 1 - bar)  # ε = slope (x_t − √ᾱ m)
    a = (1 - beta / np.sqrt(1 - bar) * slope) / np.sqrt(1 - beta)
    b = beta / np.sqrt(1 - bar) * slope * np.sqrt(bar) * m / np.sqrt(1 - beta)
    sigma2 = beta if variance == "fixed_large" else (1 - before) / (1 - bar) * beta
    sigma2 = np.append(beta[0], sigma2[1:])

    mean, mixing = np.zeros(steps + 1), np.zeros((steps + 1, steps + 1))  # (x_0 … x_T) = mean + mixing z
    mixing[steps, steps] = 1
    for t in range(steps, 0, -1):
        mean[t - 1], mixing[t - 1] = a[t - 1] * mean[t] + b[t - 1], a[t - 1] * mixing[t]
        mixing[t - 1, t - 1] = np.sqrt(sigma2[t - 1])
    joint = mixing @ mixing.T
    gain = joint[1:, 0] / joint[0, 0]
    after, shift = joint[1:, 1:] - np.outer(gain, joint[0, 1:]), mean[1:] + gain * (x_0 - mean[0]) - np.sqrt(bar) * x_0
    i, j = np.minimum.outer(range(steps), range(steps)), np.maximum.outer(range(steps), range(steps))
    path = np.sqrt(bar[j] / bar[i]) * (1 - bar[i])
    kl = np.trace(np.linalg.solve(after, path)) + shift @ np.linalg.solve(after, shift) - steps
    kl = 0.5 * (kl + np.linalg.slogdet(after)[1] - np.linalg.slogdet(path)[1])
    want = kl - scipy.stats.norm(mean[0], joint[0, 0] ** 0.5).logpdf(x_0)

    diffusion, model = exact(variance, torch.as_tensor(beta)), optimal(m, s, bar)
    x, t = torch.full((steps - 1, 1), x_0, dtype=torch.float64), torch.arange(1, steps)
    flat = lambda x_t, t: model(x_t[..., None, None], t)[..., 0, 0]
    terms = [
        diffusion.bound_term(flat, x, diffusion.q_sample(x, t, e * torch.ones_like(x)), t, False)[0] for e in (1, -1)
    ]
    got = (terms[0] + terms[1]).sum().item() / 2
    got += diffusion.bits_per_dim(flat, x[:1], clip_denoised=False)["L_T"].item()
    error = (x_0 - a[0] * np.sqrt(bar[0]) * x_0 - b[0]) ** 2 + a[0] ** 2 * (1 - bar[0])
    decoder = 0.5 * np.log(2 * np.pi * sigma2[0]) + error / (2 * sigma2[0])
    assert got * math.log(2) + decoder == pytest.approx(want, rel=1e-9)


def guard_bits_per_dim_is_finite():
    x = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8)
    for variance in ("fixed_large", "fixed_small"):
        bits = GaussianDiffusion(linear_beta_schedule(20, 0.005, 0.9), variance).bits_per_dim(
            lambda x_t, t: torch.zeros_like(x_t), ddpm.to_model(x)
        )
        assert all(value.isfinite().all() for value in bits.values())


def test_bits_per_dim_adds_up():
    """The "total" is the three terms' sum; shapes are as promised; L_T is the paper's ≈ 1e−5 bits/dim or less; the
    squared error is that of x̂_0; a perfect network pays L_0 only: −log₂ of the mass of N(x_0, σ_1²) on x_0's own
    bin."""
    guard_bits_per_dim_is_finite()
    pixels = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    pixels[:, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    x = ddpm.to_model(pixels).double()
    diffusion = exact("fixed_small")
    bits = diffusion.bits_per_dim(knows(x), x)
    assert {k: tuple(v.shape) for k, v in bits.items()} == {
        "total": (3,),
        "L_T": (3,),
        "L_{t-1}": (3, T - 1),
        "L_0": (3,),
        "squared_error": (3, T),
    }
    np.testing.assert_allclose(bits["total"], bits["L_T"] + bits["L_{t-1}"].sum(1) + bits["L_0"], rtol=1e-12)
    bar = BARS[-1]
    kl = 0.5 * (bar * x.numpy() ** 2 - bar - math.log1p(-bar)).mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(bits["L_T"], kl, rtol=1e-6)
    assert bits["L_T"].max() < 2e-5 and bits["squared_error"].max() < 1e-20 and bits["L_{t-1}"].abs().max() < 1e-12
    sigma = math.sqrt((1 - BARS[0]) / (1 - BARS[1]) * BETAS[1])
    inner = 2 * scipy.stats.norm.cdf(1 / 255 / sigma) - 1
    edge = scipy.stats.norm.cdf(1 / 255 / sigma)
    mass = np.where((pixels == 0) | (pixels == 255), edge, inner)
    np.testing.assert_allclose(bits["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-9)
    wrong = exact("fixed_small").bits_per_dim(knows(x + 0.003), x, clip_denoised=False)
    np.testing.assert_allclose(wrong["squared_error"], np.full((3, T), 0.003**2), rtol=1e-6)
    off = scipy.stats.norm(0.003, sigma)
    mass = off.cdf(1 / 255) - off.cdf(-1 / 255)
    mass = np.where(pixels == 0, off.cdf(1 / 255), np.where(pixels == 255, off.sf(-1 / 255), mass))
    np.testing.assert_allclose(wrong["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-6)
    clamped = exact("fixed_small").bits_per_dim(knows(x + 2), x)["squared_error"]  # all at 1
    np.testing.assert_allclose(clamped, ((1 - x) ** 2).mean((1, 2, 3))[:, None].expand(3, T), atol=1e-12)


# ---- The score (§3.2) ------------------------------------------------------------------------------------------------


def test_score_is_the_gradient_of_log_density():
    """−E[ε|x_t]/√(1−ᾱ_t) is ∇ log q(x_t): the mixture's log density differentiated by autograd, at every t."""
    x_t, t = torch.randn(T, 1, 2, 2, dtype=torch.float64, requires_grad=True), torch.arange(T)
    (want,) = torch.autograd.grad(mixture_log_density(x_t, t).sum(), x_t)
    np.testing.assert_allclose(exact().score(mixture_model, x_t.detach(), t), want, rtol=1e-8, atol=1e-10)


# ---- DDIM ------------------------------------------------------------------------------------------------------------


def guard_ddim_timesteps():
    """Every S from 1 to T: S steps, T−1 first, strictly falling, none below 0, no gap off the even spacing by one or
    more."""
    diffusion = exact()
    for steps in range(1, T + 1):
        t = diffusion.ddim_timesteps(steps)
        assert len(t) == steps and t[0] == T - 1 and t[-1] >= 0
        assert all(a > b for a, b in zip(t, t[1:]))
        assert all(abs(t[i] + 1 - T * (steps - i) / steps) <= 0.5 for i in range(steps))


def test_ddim_timesteps_are_trailing():
    """Lin et al.: the sub-sequence begins at T−1, whatever S; for S = T it is every step."""
    guard_ddim_timesteps()
    assert exact().ddim_timesteps(T) == list(range(T - 1, -1, -1))
    assert exact().ddim_timesteps(4) == [999, 749, 499, 249]
    assert exact().ddim_timesteps(1) == [999]
    assert GaussianDiffusion([0.9, 0.99, 0.999]).ddim_timesteps(2) == [2, 1]  # round(1.5) − 1


def guard_ddim_stays_on_the_line():
    """A network that knows x_0 explains every x_t as √ᾱ_t x_0 + √(1−ᾱ_t) ε, and with η = 0 each DDIM step must land on
    that line at the level asked for: s = −1 is x_0 itself. Checked for steps short and long, from float64."""
    x_0, noise = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-1.2]], dtype=torch.float64)
    diffusion = exact()
    for t, s in [(999, 998), (999, 0), (999, -1), (500, 250), (20, 10), (20, -1), (1, 0), (1, -1), (0, -1)]:
        bar = BARS[s] if s >= 0 else 1.0
        x_t = math.sqrt(BARS[t]) * x_0 + math.sqrt(1 - BARS[t]) * noise
        got = diffusion.ddim_sample(knows(x_0), x_t, t, s)
        np.testing.assert_allclose(got, math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise, atol=1e-11)


def guard_ddim_runs_any_number_of_steps():
    for steps in (1, 3, 49, 600, T):
        x_0 = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64)
        got = exact().ddim_sample_loop(knows(x_0), x_0.shape, steps)
        np.testing.assert_allclose(got, x_0, atol=1e-10)


def test_ddim_lands_exactly_on_x_0():
    """DDIM Eq. 12 keeps to the line from ε to x_0 and ends where ᾱ = 1, for any number of steps."""
    guard_ddim_stays_on_the_line()
    guard_ddim_runs_any_number_of_steps()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equations_12_and_16_written_out(eta):
    """One step against the equations in NumPy, for every pair of a 37-step run and a batch whose t differ."""
    diffusion = exact()
    pairs = diffusion.ddim_timesteps(37)
    pairs = list(zip(pairs, [*pairs[1:], -1]))
    t, s = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    x_t, z = torch.randn(37, 1, 2, 2, dtype=torch.float64), torch.randn(37, 1, 2, 2, dtype=torch.float64)
    bar_t, bar_s = BARS[t].reshape(-1, 1, 1, 1), np.where(s < 0, 1.0, BARS[s]).reshape(-1, 1, 1, 1)
    eps = np.tanh(x_t.numpy())
    sigma = eta * np.sqrt((1 - bar_s) / (1 - bar_t)) * np.sqrt(1 - bar_t / bar_s)
    x_0 = (x_t.numpy() - np.sqrt(1 - bar_t) * eps) / np.sqrt(bar_t)
    want = np.sqrt(bar_s) * x_0 + np.sqrt(np.maximum(1 - bar_s - sigma**2, 0)) * eps + sigma * z.numpy()
    model = lambda x, t: torch.tanh(x)
    got = diffusion.ddim_sample(model, x_t, t, s, eta, clip_denoised=False, noise=z)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)
    one = diffusion.ddim_sample(model, x_t[3:4], int(t[3]), int(s[3]), eta, clip_denoised=False, noise=z[3:4])
    np.testing.assert_allclose(one, got[3:4], rtol=1e-12)


def test_eta_0_is_deterministic_and_eta_above_0_is_not():
    """η = 0: the picture is a function of x_T alone, whatever the generator says; η > 0 adds noise, even a little."""
    x_T, model, diffusion = torch.randn(2, 1, 4, 4), lambda x, t: torch.tanh(x), GaussianDiffusion(BETAS)
    runs = {
        eta: [
            diffusion.ddim_sample_loop(model, x_T.shape, 10, eta, noise=x_T, generator=torch.Generator().manual_seed(i))
            for i in (1, 2)
        ]
        for eta in (0.0, 0.01)
    }
    assert torch.equal(*runs[0.0]) and not torch.equal(*runs[0.01])
    assert torch.equal(diffusion.ddim_sample_loop(model, x_T.shape, 10, noise=x_T), runs[0.0][0])  # η defaults to 0


def test_a_model_in_bfloat16_is_used_in_the_precision_of_x_t():
    """ε in bfloat16, as autocast gives it, is the same numbers as in float32, and so is all that is made of it."""
    diffusion, x_t, noise = GaussianDiffusion(BETAS), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    model = lambda x, t: torch.tanh(x).bfloat16()
    in_float32 = lambda x, t: model(x, t).float()
    for t, s in ((500, 400), (torch.tensor([500, 3]), torch.tensor([400, 1]))):
        for clip in (False, True):
            for use in (
                lambda m: diffusion.ddim_sample(m, x_t, t, s, 0.5, clip, noise=noise),
                lambda m: diffusion.p_sample(m, x_t, t, clip, noise=noise),
                lambda m: diffusion.score(m, x_t, t),
                lambda m: diffusion.p_losses(m, x_t, t, noise),
            ):
                assert use(model).dtype == torch.float32 and torch.equal(use(model), use(in_float32))


def guard_eta_1_over_all_steps_is_algorithm_2():
    model = lambda x, t: torch.tanh(x + t.reshape(-1, 1, 1, 1) / T)
    diffusion = exact("fixed_small")
    for clip in (True, False):
        ddim, ddpm_ = (
            loop(model, (2, 1, 2, 2), *args, clip_denoised=clip, generator=torch.Generator().manual_seed(SEED))
            for loop, args in ((diffusion.ddim_sample_loop, (T, 1.0)), (diffusion.p_sample_loop, ()))
        )
        np.testing.assert_allclose(ddim, ddpm_, rtol=1e-8, atol=1e-10)


def test_eta_1_over_all_steps_is_algorithm_2_with_beta_tilde():
    """On the same noise, all T steps of DDIM with η = 1 and of Algorithm 2 with σ_t² = β̃_t end on the same picture;
    over 50 steps they can't, and with β_t they don't."""
    guard_eta_1_over_all_steps_is_algorithm_2()
    model = lambda x, t: torch.tanh(x)
    a, b = (
        loop(model, (1, 1, 2, 2), *args, generator=torch.Generator().manual_seed(SEED))
        for loop, args in ((exact("fixed_large").ddim_sample_loop, (T, 1.0)), (exact("fixed_large").p_sample_loop, ()))
    )
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.1)])
def test_ddim_converges_to_the_flow_at_first_order(m, s):
    """The probability flow carries x_T to m + s (x_T − √ᾱ_T m)/√(ᾱ_T s² + 1−ᾱ_T). DDIM's error in the slope halves when
    its steps double (rate 2 ± 0.25), and all 1000 steps are within 1%."""
    diffusion, model = exact(), optimal(m, s)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    want = s / math.sqrt(BARS[-1] * s**2 + 1 - BARS[-1])
    errors = []
    for steps in (125, 250, 500, 1000):
        x_0 = diffusion.ddim_sample_loop(model, x.shape, steps, clip_denoised=False, noise=x).flatten()
        errors.append((x_0[1] - x_0[0]).item() / want - 1)
    assert all(a / b == pytest.approx(2, abs=0.25) for a, b in zip(errors, errors[1:]))
    assert abs(errors[-1]) < 0.05
    assert x_0[0].item() == pytest.approx(m - want * math.sqrt(BARS[-1]) * m, abs=0.02)


def test_ddim_carries_quantiles_to_quantiles():
    """In one dimension the flow is increasing, so it takes the p-quantile of N(0, 1) to the p-quantile of the data: 99
    quantiles of the mixture, without a random number."""
    p = np.arange(1, 100) / 100
    x_T = torch.as_tensor(scipy.stats.norm.ppf(p)).reshape(-1, 1, 1, 1)
    x_0 = exact().ddim_sample_loop(mixture_model, x_T.shape, T, clip_denoised=False, noise=x_T).flatten().numpy()
    np.testing.assert_allclose(mixture_cdf(x_0), p, atol=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(eta):
    """DDIM's construction: for a single picture as data, every x_s has q(x_s|x_0)'s mean and variance, whatever η and
    whatever the steps left out."""
    diffusion, model = exact(), optimal(0.7, 0.0)
    t = diffusion.ddim_timesteps(23)
    for s, mean, variance in affine_chain(
        lambda x, t, s, z: diffusion.ddim_sample(model, x, t, s, eta, False, z), zip(t, [*t[1:], -1])
    ):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx(math.sqrt(bar) * 0.7, abs=0.7 * math.sqrt(BARS[-1]))
        assert variance == pytest.approx(1 - bar, abs=2 * BARS[-1])


def guard_a_clamped_x_start_takes_its_noise_with_it():
    """A network that answers ε = 0 to x_t = 2 at t = 700 is clamped to x̂_0 = 1, and ε must become (x_t −
    √ᾱ_t)/√(1−ᾱ_t)."""
    x_t = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    got = exact().ddim_sample(lambda x, t: torch.zeros_like(x), x_t, 700, 300)
    eps = (2 - math.sqrt(BARS[700])) / math.sqrt(1 - BARS[700])
    assert got.item() == pytest.approx(math.sqrt(BARS[300]) + math.sqrt(1 - BARS[300]) * eps, rel=1e-10)


def test_clamped_ddim_recomputes_its_noise():
    """After the clamp x̂_0 and ε still explain x_t, so that the step starts from where the sample is."""
    guard_a_clamped_x_start_takes_its_noise_with_it()


def guard_interpolation_starts_at_the_level_it_noised_to():
    seen = []
    a, b = torch.full((1, 1, 2, 2), -0.5, dtype=torch.float64), torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64)

    def model(x_t, t):
        seen.append((t.item(), x_t.clone()))
        return knows(0.25 * b + 0.75 * a)(x_t, t)

    noise = torch.randn_like(a)
    exact().interpolate(model, a, b, 40, 0.25, noise=noise)
    assert [t for t, _ in seen] == list(range(40, -1, -1))
    want = math.sqrt(BARS[40]) * (0.75 * a + 0.25 * b) + math.sqrt(1 - BARS[40]) * noise
    np.testing.assert_allclose(seen[0][1], want, rtol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_respaced_keeps_the_marginals_and_asks_at_the_old_t(variance, steps):
    """Improved DDPM §4: the S-step chain composed by Eq. 2 gives the old ᾱ at the S times kept, and σ_t² is β' or β̃'
    of the jump from s to t: 1 − ᾱ_t/ᾱ_s, and that times (1−ᾱ_s)/(1−ᾱ_t)."""
    betas = ddpm.linear_beta_schedule(1000)
    full = ddpm.GaussianDiffusion(betas, variance, dtype=torch.float64)
    alpha_bar = np.cumprod(1 - betas.numpy())
    kept = [math.floor(1000 * (i + 1) / steps + 0.5) - 1 for i in range(steps)]
    asked = []

    def model(x_t, t):
        asked.append(t.tolist())
        return torch.zeros(len(x_t), 2 if variance == "learned_range" else 1, *x_t.shape[2:], dtype=torch.float64)

    short, respaced = full.respace(model, steps)
    assert (short.timesteps, short.variance_type, short.betas.dtype) == (steps, variance, torch.float64)
    chain = np.cumprod(1 - short.betas.numpy())
    np.testing.assert_allclose(chain, alpha_bar[kept], rtol=1e-9)
    x_t = torch.ones(steps, 1, 1, 1, dtype=torch.float64)
    _, sigma2, _, _ = short.p_mean_variance(respaced, x_t, torch.arange(steps), clip_denoised=False)
    assert asked == [kept]
    before = np.append(1.0, alpha_bar[kept[:-1]])
    jump = 1 - alpha_bar[kept] / before
    small = jump * (1 - before) / (1 - alpha_bar[kept])
    want = jump if variance == "fixed_large" else small
    np.testing.assert_allclose(sigma2.flatten()[1:], want[1:], rtol=1e-9)


def test_respaced_with_beta_tilde_is_ddim_with_eta_1():
    """Two derivations of the same S-step sampler: Algorithm 2 on the respaced chain, and DDIM Eq. 12 with η = 1."""
    diffusion = ddpm.GaussianDiffusion(ddpm.cosine_beta_schedule(100), "fixed_small", dtype=torch.float64)
    model = lambda x_t, t: torch.sin(3 * x_t + t[:, None, None, None] / 100)
    x_T, noises = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(9, 2, 1, 4, 4, dtype=torch.float64)
    short, respaced = diffusion.respace(model, 9)
    a = b = x_T
    times = diffusion.ddim_timesteps(9)
    for i, (t, prev_t) in enumerate(zip(times, [*times[1:], -1])):
        a = short.p_sample(respaced, a, 8 - i, noise=noises[i])
        b = diffusion.ddim_sample(model, b, t, prev_t, eta=1.0, noise=noises[i])
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_interpolation_is_figure_8():
    """(1−λ) x_t + λ x'_t of the two pictures diffused to t, decoded from t: at λ = 0 and 1 it is the pictures' own
    decoding, and between, the mix that the network is shown has q(x_t)'s noise level."""
    guard_interpolation_starts_at_the_level_it_noised_to()
    a, b = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64)
    got = exact("fixed_small").interpolate(knows(b), a, b, 300, 1.0)
    np.testing.assert_allclose(got, b, atol=1e-9)


def test_a_generator_repeats_a_run_and_noise_starts_it():
    """generator= fixes x_T and every z; noise= is x_T itself: T steps from it are the loop's."""
    diffusion, model = exact(), lambda x, t: torch.tanh(x)
    for loop, more in ((diffusion.p_sample_loop, ()), (diffusion.ddim_sample_loop, (20, 0.5))):
        runs = [loop(model, (1, 1, 2, 2), *more, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    x_T = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    steps = list(diffusion.ddim_sample_steps(model, x_T, 20))
    assert len(steps) == 20 and torch.equal(steps[-1], diffusion.ddim_sample_loop(model, x_T.shape, 20, noise=x_T))
    assert (
        len(list(diffusion.p_sample_steps(model, x_T))) == T and len(list(diffusion.p_sample_steps(model, x_T, 4))) == 5
    )
    assert not steps[-1].requires_grad


# ---- Guidance --------------------------------------------------------------------------------------------------------


class Labelled:
    """A stand-in network: ε depends on x, t and y, and counts its calls."""

    num_classes = 4

    def __init__(self, channels=1):
        self.calls, self.rows, self.channels = 0, 0, channels

    def __call__(self, x_t, t, y):
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t)
        eps = torch.sin(x_t + y.reshape(-1, 1, 1, 1)) + t.reshape(-1, 1, 1, 1) / T
        return torch.cat([eps, eps * 3 + 1][: self.channels], 1)


def guard_guidance_mixes_as_the_paper_says():
    x_t, t, y = torch.randn(3, 1, 2, 2), torch.tensor([0, 5, 999]), torch.tensor([0, 3, 1])
    with_label, without = Labelled()(x_t, t, y), Labelled()(x_t, t, torch.full((3,), 4))
    for w in (0.0, 0.5, 1.0, 3.0, -1.0):
        got = classifier_free_guidance(Labelled(), y, w)(x_t, t)
        torch.testing.assert_close(got, (1 + w) * with_label - w * without)


def test_guidance():
    """ε̃ = (1 + w) ε(x, c) − w ε(x): w = 0 is conditional and w = −1 unconditional; one call of the network a step."""
    guard_guidance_mixes_as_the_paper_says()
    network = Labelled()
    model = classifier_free_guidance(network, torch.tensor([1, 2]), 2.0)
    GaussianDiffusion(BETAS).ddim_sample_loop(model, (2, 1, 2, 2), 5)
    assert network.calls == 5 and network.rows == 5 * 4
    unguided = Labelled()
    GaussianDiffusion(BETAS).ddim_sample_loop(
        classifier_free_guidance(unguided, torch.tensor([1, 2]), 0.0), (2, 1, 2, 2), 5
    )
    assert unguided.rows == 5 * 2  # w = 0 costs no second half
    nothing = torch.full((2,), 4)  # "no label" is a label too
    x_t, t = torch.randn(2, 1, 2, 2), torch.tensor([3, 4])
    torch.testing.assert_close(classifier_free_guidance(Labelled(), nothing, 2.0)(x_t, t), Labelled()(x_t, t, nothing))
    x_t, t, y = torch.randn(2, 1, 2, 2), torch.tensor([3, 4]), torch.tensor([1, 2])
    both = classifier_free_guidance(Labelled(2), y, 2.0)(x_t, t)  # v comes from the labelled half
    torch.testing.assert_close(both[:, 1:], Labelled(2)(x_t, t, y)[:, 1:])
    torch.testing.assert_close(both[:, :1], classifier_free_guidance(Labelled(), y, 2.0)(x_t, t))


def test_guided_score_is_of_the_sharpened_density():
    """∇ log [q(x_t|c)^(1+w) / q(x_t)^w] is the guided score: two Gaussian classes, their mixture by autograd."""

    def log_q(x_t, t, m, s=0.3):
        bar = torch.as_tensor(BARS)[t].reshape(-1, 1, 1, 1)
        v = bar * s**2 + 1 - bar
        return -0.5 * ((x_t - bar.sqrt() * m) ** 2 / v + v.log())

    def log_any(x_t, t):
        return torch.logaddexp(log_q(x_t, t, -0.5), log_q(x_t, t, 0.5)) - math.log(2)

    def network(x_t, t, y):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            each = torch.stack([log_q(x, t, -0.5), log_q(x, t, 0.5), log_any(x, t)])
            log = each.gather(0, y.reshape(1, -1, 1, 1, 1)).sum()
            bar = torch.as_tensor(BARS)[t].reshape(-1, 1, 1, 1)
            return -(1 - bar).sqrt() * torch.autograd.grad(log, x)[0]

    network.num_classes = 2
    x_t, t, y = (
        torch.randn(6, 1, 1, 1, dtype=torch.float64),
        torch.tensor([0, 9, 99, 300, 700, 999]),
        torch.tensor([0, 1] * 3),
    )
    x = x_t.clone().requires_grad_()
    log = 2.5 * torch.where(y.reshape(-1, 1, 1, 1) == 0, log_q(x, t, -0.5), log_q(x, t, 0.5)) - 1.5 * log_any(x, t)
    (want,) = torch.autograd.grad(log.sum(), x)
    np.testing.assert_allclose(exact().score(classifier_free_guidance(network, y, 1.5), x_t, t), want, rtol=1e-9)


# ---- The network -----------------------------------------------------------------------------------------------------


def randomised(module):
    """The module with no weight at zero, so that what a zeroed layer would hide is seen."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn_like(p) / math.sqrt(max(1, p[0].numel())) if p.dim() > 1 else 1 + 0.1 * torch.randn_like(p)
            )
    return module.eval()


def small(**changes):
    return UNet(
        **{
            **dict(
                image_channels=2,
                dim=8,
                dim_mults=(1, 2),
                num_res_blocks=1,
                attn_resolutions=(4,),
                image_size=8,
                dropout=0.0,
            ),
            **changes,
        }
    )


@functools.cache
def paper_network():
    return UNet()


def test_the_papers_network_has_35746307_parameters():
    """Appendix B's network, to the parameter; attention at 16×16 twice down, three times up, and once in the middle."""
    network = paper_network()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    attention = [name for name, m in network.named_modules() if isinstance(m, ddpm.AttentionBlock)]
    assert len(attention) == 6
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)}
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_time_embedding_by_numpy():
    """sin(t ω_i), then cos(t ω_i), ω_i = 10000^(−i/(half − 1)): the authors' and Transformer's, at code t."""
    t = torch.tensor([0, 1, 17, 999])
    omega = 10000.0 ** (-np.arange(16) / 15)
    want = np.concatenate([np.sin(np.outer(t, omega)), np.cos(np.outer(t, omega))], 1)
    np.testing.assert_allclose(ddpm.SinusoidalPositionEmbeddings(32)(t), want, atol=1e-4)


def guard_output_starts_at_zero_and_blocks_as_identity():
    """A residual block at initialisation is its shortcut, whatever the time: the time sits before the zeroed
    convolution."""
    block, x = ddpm.ResidualBlock(8, 8, 16, attention=True), torch.randn(2, 8, 4, 4)
    for emb in (torch.zeros(2, 16), torch.randn(2, 16)):
        assert torch.equal(block(x, emb), x)


def test_the_first_loss_is_the_noises_variance():
    """Zeroed outputs make ε_θ = 0 at the start, so the first loss is E‖ε‖² = 1: 3·32²·8 draws, false alarm 1e−6 by
    χ²."""
    guard_output_starts_at_zero_and_blocks_as_identity()
    network = small(image_channels=3, image_size=32).eval()
    x, t, noise = torch.rand(8, 3, 32, 32) * 2 - 1, torch.randint(T, (8,)), torch.randn(8, 3, 32, 32)
    assert (network(x, t) == 0).all()
    loss, n = GaussianDiffusion(BETAS).p_losses(network, x, t, noise).item(), noise.numel()
    assert scipy.stats.chi2.ppf(5e-7, n) < loss * n < scipy.stats.chi2.isf(5e-7, n)


@pytest.mark.parametrize("channels, groups", [(128, 32), (384, 32), (132, 4), (36, 4), (33, 1)])
def test_groups_of_the_norms(channels, groups):
    """32, and the greatest number below it that divides both 32 and the channels where they don't divide by 32."""
    assert ddpm.GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize("dim, groups", [(4, 1), (32, 2), (96, 6), (124, 1), (128, 32), (256, 32)])
def test_groups_of_a_network(dim, groups):
    """The same number in every norm, whatever its channels: 32 from the paper's dim of 128 on, below it dim / 16."""
    network = ddpm.UNet(dim=dim, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {groups} and len(norms) == 8 * 2 + 4 + 1


def test_residual_block_written_out():
    """GN–SiLU–conv, + time, GN–SiLU–conv, + shortcut, with torch's functional forms and groups written out."""
    block = randomised(ddpm.ResidualBlock(32, 64, 12))
    x, emb = torch.randn(3, 32, 5, 5), torch.randn(3, 12)
    p = dict(block.named_parameters())
    h = F.conv2d(
        F.silu(F.group_norm(x, 32, p["norm1.weight"], p["norm1.bias"], 1e-6)),
        p["conv1.weight"],
        p["conv1.bias"],
        padding=1,
    )
    h = h + F.linear(F.silu(emb), p["time.weight"], p["time.bias"])[..., None, None]
    h = F.conv2d(
        F.silu(F.group_norm(h, 32, p["norm2.weight"], p["norm2.bias"], 1e-6)),
        p["conv2.weight"],
        p["conv2.bias"],
        padding=1,
    )
    torch.testing.assert_close(block(x, emb), h + F.conv2d(x, p["shortcut.weight"], p["shortcut.bias"]))


def test_attention_written_out():
    """softmax(q kᵀ/√C) v over the pixels, pixel by pixel in a loop, plus the input."""
    block, x = randomised(ddpm.AttentionBlock(32)).double(), torch.randn(2, 32, 2, 3, dtype=torch.float64)
    h = F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
    want = torch.empty_like(x)
    for b in range(2):
        pixels = [h[b, :, i, j] for i in range(2) for j in range(3)]
        q, k, v = ([block.qkv.weight[a : a + 32] @ p + block.qkv.bias[a : a + 32] for p in pixels] for a in (0, 32, 64))
        for n in range(6):
            weight = torch.softmax(torch.stack([q[n] @ other / math.sqrt(32) for other in k]), 0)
            mixed = sum(w * value for w, value in zip(weight, v))
            want[b, :, n // 3, n % 3] = x[b, :, n // 3, n % 3] + block.out.weight @ mixed + block.out.bias
    torch.testing.assert_close(block(x), want)


def test_downsampling_pads_right_and_bottom_and_upsampling_repeats():
    """Stride 2 with TensorFlow's SAME padding; nearest-neighbour doubling; each against loops over pixels."""
    down, up, x = randomised(ddpm.Downsample(2)), randomised(ddpm.Upsample(2)), torch.randn(1, 2, 4, 4)
    padded = torch.zeros(2, 5, 5)
    padded[:, :4, :4] = x[0]
    for i in range(2):
        for j in range(2):
            patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            want = (down.conv.weight * patch).sum((1, 2, 3)) + down.conv.bias
            torch.testing.assert_close(down(x)[0, :, i, j], want)
    doubled = torch.stack([x[..., i // 2, j // 2] for i in range(8) for j in range(8)], -1).reshape(1, 2, 8, 8)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


def guard_network_feels_time_as_it_is():
    """The model is given the very t, int64, that q_sample used, and the U-Net's answer changes with it."""
    seen = []

    def model(x_t, t):
        seen.append(t)
        return torch.zeros_like(x_t)

    x = torch.zeros(2, 1, 2, 2)
    diffusion = GaussianDiffusion(BETAS)
    diffusion.p_losses(model, x, torch.tensor([0, 999]))
    diffusion.p_sample(model, x, 17)
    diffusion.ddim_sample(model, x, 17, 3)
    diffusion.score(model, x, 17)
    assert all(t.dtype == torch.int64 for t in seen)
    assert [t.tolist() for t in seen] == [[0, 999], [17, 17], [17, 17], [17, 17]]
    network, x = randomised(small()), torch.randn(1, 2, 8, 8)
    assert (network(x, torch.tensor([500])) - network(x, torch.tensor([501]))).abs().max() > 1e-5


def guard_samples_of_a_batch_are_independent():
    network = randomised(small(num_classes=3))
    x, t, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    together = network(x, t, y)
    for i in range(4):
        torch.testing.assert_close(
            network(x[i : i + 1], t[i : i + 1], y[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-4
        )
    network.train()
    torch.testing.assert_close(network(x, t, y), together)


def test_network_depends_on_every_input_and_on_nothing_else():
    """x, t and y each change the answer, the other pictures of the batch do not, in training mode either."""
    guard_network_feels_time_as_it_is()
    guard_samples_of_a_batch_are_independent()
    network, x, t = randomised(small(num_classes=3)), torch.randn(1, 2, 8, 8), torch.tensor([5])
    outputs = [network(x, t, torch.tensor([y])) for y in range(4)]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(outputs[3], network(x, t))  # no label is the last class
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, t)[0, 0, 0, 0], x)
    assert (gradient != 0).all()  # through the middle every pixel sees every other


def test_a_label_adds_its_embedding_to_the_times():
    """Label y acts as if its row of the table were added to the time embedding's last bias; there is one row a class,
    and one for no label."""
    network, x, t = randomised(small(num_classes=3)), torch.randn(1, 2, 8, 8), torch.tensor([5])
    assert network.label.weight.shape == (4, 32)
    want = network(x, t, torch.tensor([2]))
    with torch.no_grad():
        network.time[2].bias += network.label.weight[2]
        network.label.weight.zero_()
    torch.testing.assert_close(network(x, t), want, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter():
    """After two steps (zeroed layers hold back the first) every weight of the labelled network has moved."""
    network = small(num_classes=3, learned_variance=True)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, t, y = torch.randn(8, 2, 8, 8), torch.randint(T, (8,)), torch.arange(8) % 4
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, t, y) - 1).square().mean().backward()
        optimizer.step()
    assert all((p != before[name]).any() for name, p in network.named_parameters())
    assert all((p.grad != 0).any() for p in network.parameters())


def test_dropout_is_for_training_only():
    """In training mode two calls differ, in eval mode they don't; it sits before the second convolution."""
    network, x, t = randomised(small(dropout=0.5)), torch.randn(1, 2, 8, 8), torch.tensor([5])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))
    assert ddpm.ResidualBlock(8, 8, 16).dropout.p == 0  # none unless asked for
    block = randomised(ddpm.ResidualBlock(8, 8, 16, dropout=1.0)).train()
    silent = block.conv2.bias.reshape(1, -1, 1, 1).expand(1, 8, 4, 4)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(1, 16)), x + silent)


@pytest.mark.parametrize(
    "changes, levels",
    [
        (dict(), 2),
        (dict(dim_mults=(1,), image_size=5), 1),
        (dict(dim_mults=(1,), image_size=1, attn_resolutions=()), 1),
        (dict(dim_mults=(1, 1, 2, 2), image_size=24, attn_resolutions=(6, 3)), 4),
        (dict(dim=12, time_dim=20, num_res_blocks=3, image_channels=5), 2),
    ],
)
def test_shapes_in_are_shapes_out(changes, levels):
    """Any channels, levels and size that halves; doubled channels with a learned variance; attention just where
    asked."""
    network = small(**changes)
    size, channels = changes.get("image_size", 8), changes.get("image_channels", 2)
    assert network(torch.randn(2, channels, size, size), torch.tensor([0, 1])).shape == (2, channels, size, size)
    doubled = small(**changes, learned_variance=True)
    assert doubled(torch.randn(2, channels, size, size), torch.tensor([0, 1])).shape == (2, 2 * channels, size, size)
    assert sum(isinstance(m, ddpm.Downsample) for m in network.modules()) == levels - 1
    if "time_dim" in changes:
        assert network.down[0].time.in_features == 20
    attention = {(6, 3): 2 * 1 + 2 * 2 + 1, (): 0}  # both sizes, down and up, and the middle
    if "attn_resolutions" in changes:
        assert (
            sum(isinstance(m, ddpm.AttentionBlock) for m in network.modules()) == attention[changes["attn_resolutions"]]
        )


def test_network_in_other_dtypes_and_memory_formats():
    """float64 agrees with float32, channels_last with the default, and bfloat16 autocast to its 8 bits."""
    network, x, t = randomised(small()), torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    want = copy.deepcopy(network).double()(x.double(), t)
    assert want.dtype == torch.float64
    torch.testing.assert_close(network(x, t).double(), want, rtol=1e-3, atol=1e-3)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, network(x, t), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(x, t).float() - network(x, t)).abs().mean() < 0.1 * want.abs().mean()


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it where there is one")


@NO_CUDA
def test_cuda_agrees_with_the_cpu():
    """The same picture, network, noise and step on both devices."""
    network, x, t = randomised(small()), torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    diffusion, noise = GaussianDiffusion(BETAS), torch.randn(2, 2, 8, 8)
    want = diffusion.ddim_sample(network, x, 900, 400, 0.5, noise=noise), diffusion.p_sample(network, x, t, noise=noise)
    network, diffusion, x, t, noise = (k.cuda() for k in (network, diffusion, x, t, noise))
    got = diffusion.ddim_sample(network, x, 900, 400, 0.5, noise=noise), diffusion.p_sample(network, x, t, noise=noise)
    torch.testing.assert_close([k.cpu() for k in got], list(want), rtol=1e-2, atol=1e-2)


def test_each_process_takes_its_own_gpu_and_touches_no_other(monkeypatch):
    """torchrun numbers the processes of a machine in LOCAL_RANK; a GPU that is named by number is that one. Seen from
    how torch is called, so that no GPU is needed. Unless named it is CUDA, else MPS, else the CPU."""
    touched, settings, there = [], [], {"cuda": True, "mps": True}

    def zeros(size, device):
        touched.append(device)
        if device == torch.device("cuda", 7):
            raise RuntimeError("invalid device ordinal\nand a trace")

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "set_device", settings.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, want in [(None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")]:
        assert pick_device(name) == torch.device(want)
        assert touched == [torch.device(want)] and settings == [torch.device(want), "high"]
        touched.clear(), settings.clear()
    with pytest.raises(ValueError, match="device 'cuda:7' can't be used here: invalid device ordinal$"):
        pick_device("cuda:7")
    assert pick_device("cpu") == torch.device("cpu")
    there["cuda"] = False
    assert pick_device() == torch.device("mps")
    there["mps"] = False
    assert pick_device() == torch.device("cpu")
    assert not settings
    monkeypatch.delenv("LOCAL_RANK")
    assert pick_device("cuda") == torch.device("cuda", 0)


class Elsewhere(TorchDispatchMode):
    """A pretended GPU, whose tensors have everything but values. crossed notes, in order, what goes between it and the
    host, for which a real one makes the host wait: a value read, a copy, an operation on tensors of both."""

    def __init__(self):
        super().__init__()
        self.without_values, self.crossed = FakeTensorMode(), []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        tensors = [each for each in tree_leaves((arguments, named)) if torch.is_tensor(each)]
        target = torch.device(named["device"]).type if named.get("device") else None
        places = {each.device.type for each in tensors if each.dim() or target or each.device.type == "elsewhere"}
        read = operation is torch.ops.aten._local_scalar_dense.default
        if "elsewhere" not in {*places, target}:
            return operation(*arguments, **named)
        if read or len({*places, target} - {None}) > 1:
            self.crossed.append(operation.overloadpacket.__name__)
        if read:
            return 1
        if target == "cpu":
            return torch.ones(arguments[0].shape, dtype=named.get("dtype"))
        arguments = tree_map_only(torch.Tensor, self.without_values.from_tensor, arguments)
        with self.without_values:
            return operation(*arguments, **named)


def crossings():
    """What crosses during six steps of training that log every third, and during sampling with guidance, on a GPU that
    is pretended for the rest of this process."""
    register_device("elsewhere")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    ddpm.pick_device = lambda name: torch.device("elsewhere", 0)
    ddpm.autocast = lambda config, device: contextlib.nullcontext()
    ddpm.atomic_write = lambda path, save: None
    p_losses, device = GaussianDiffusion.p_losses, Elsewhere()

    def marked(self, *batch):
        device.crossed.append("step")
        return p_losses(self, *batch)

    def sample(run, step):
        model = classifier_free_guidance(run.model, torch.arange(4, device="elsewhere:0"), 1.0)
        device.crossed.append("sampling")
        for eta in (0.0, 1.0):
            run.diffusion.ddim_sample_loop(model, (4, 1, 8, 8), 3, eta)
        run.diffusion.p_sample_loop(model, (4, 1, 8, 8))
        device.crossed.append("sampled")

    GaussianDiffusion.p_losses = marked
    tiny = dict(dim=16, dim_mults=(1,), batch_size=4, timesteps=50, steps=6, log_every=3, sample_every=6)
    with device:
        ddpm.train(ddpm.preset("digits", **tiny, flip=True, dropout=0.1, variance="learned_range"), watch=sample)
    return device.crossed


@pytest.mark.skipif(register_device is None, reason="needs a newer torch to pretend: pip install --upgrade torch")
def test_neither_training_nor_sampling_waits_for_the_gpu(folder):
    """Training reads from a GPU when it logs, one copy for all steps since, and at no other time; sampling never does,
    once it has looked at the labels that guidance is for."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    code = "import test_ddpm; print(*test_ddpm.crossings())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    crossed = said.stdout.splitlines()[-1].split()
    start = crossed.index("step")
    assert "_to_copy" in crossed[:start]
    logged = ["step", "step", "step", "_to_copy"]
    assert crossed[start:] == [*logged, *logged, "_local_scalar_dense", "sampling", "sampled"]


def test_network_exports_and_compiles_as_one_graph():
    """torch.export holds the network whole, labels and all, and dynamo finds no graph break."""
    network, inputs = (
        randomised(small(num_classes=3)),
        (torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])),
    )
    exported = torch.export.export(network, inputs).module()
    torch.testing.assert_close(exported(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


# ---- The network and the samplers against diffusers ------------------------------------------------------------------

NO_DIFFUSERS = "compares with another library: pip install diffusers"


PUBLISHED = dict(
    _class_name="UNet2DModel",
    sample_size=32,
    in_channels=3,
    out_channels=3,
    block_out_channels=[128, 256, 256, 256],
    layers_per_block=2,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_num_groups=32,
    norm_eps=1e-6,
    act_fn="silu",
    mid_block_scale_factor=1,
)
SMALLER = dict(
    PUBLISHED,
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=[128, 256],
    layers_per_block=1,
    down_block_types=["AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D"],
)


def test_network_equals_diffusers_unet_of_the_published_configuration(tmp_path):
    """google/ddpm-cifar10-32's configuration, all weights random, saved in both formats and read back: UNet()'s own
    arguments, and the same ε to 1e−5 of its size. The names that older files give attention are read as well."""
    diffusers = pytest.importorskip("diffusers", reason=NO_DIFFUSERS)
    theirs = randomised(diffusers.UNet2DModel(**PUBLISHED).eval())
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "safetensors")
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "bin" / "config.json", tmp_path / "old")
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = {
        functools.reduce(lambda name, word: name.replace(new[word], word), new, name): weight
        for name, weight in theirs.state_dict().items()
    }
    assert old.keys() != theirs.state_dict().keys()
    torch.save(old, tmp_path / "old" / "diffusion_pytorch_model.bin")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([7, 990])
    for kind in ("bin", "safetensors", "old"):
        network, shape = ddpm.load_published(tmp_path / kind)
        assert shape == dict(dim=128, dim_mults=(1, 2, 2, 2), num_res_blocks=2, image_size=32, attn_resolutions=(16,))
        with torch.no_grad():
            want, got = theirs(x, t).sample, network(x, t)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_published_weights_draw_what_diffusers_draws(folder, capsys):
    """--sample --weights: 50 steps of DDIM from the same noise end in the picture of diffusers' pipeline parts, to half
    a grey level; Algorithm 2 runs too; and --train --weights starts from them."""
    diffusers = pytest.importorskip("diffusers", reason=NO_DIFFUSERS)
    theirs = randomised(diffusers.UNet2DModel(**SMALLER).eval())
    theirs.save_pretrained("small", safe_serialization=False)
    Path("small/diffusion_pytorch_model.safetensors").write_bytes(b"")  # .bin goes first
    assert cli("--sample", 2, "--weights", "small", "--individual", "--seed", 5, "--no-bf16") == 0
    scheduler = diffusers.DDIMScheduler(T, timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(50)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(ddpm.derive_seed(5, "sampling", 0)))
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    for i, want in enumerate(x):
        drawn = np.asarray(Image.open(f"runs/small/individual/{i:05}.png"), dtype=float)
        assert np.abs(drawn - (want[0].clamp(-1, 1).numpy() + 1) * 127.5).max() < 0.51
    assert cli("--sample", 1, "--weights", "small", "--sampler", "ddpm", "--sampling-steps", 3, "--out", "else") == 0
    assert Path("else/samples.png").exists()
    assert cli("--train", "--weights", "small", "--dim", 64, "--steps", 1) == 2
    coloured = diffusers.UNet2DModel(**{**SMALLER, "in_channels": 3, "out_channels": 3})
    coloured.save_pretrained("coloured", safe_serialization=False)
    assert cli("--train", "--weights", "coloured", "--steps", 1) == 2
    assert "digits has 1 channels, coloured 3" in capsys.readouterr().err and not Path("runs/digits").exists()
    how = ("--batch-size", 2, "--flip")
    assert cli("--train", "--weights", "small", "--steps", 1, "--lr", 0, *how) == 0
    for name, weight in ddpm.load_published("small")[0].state_dict().items():
        torch.testing.assert_close(weights("runs/digits")["model"][name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(freq_shift=0), "freq_shift can't be 0"),
        (dict(flip_sin_to_cos=True), "flip_sin_to_cos can't be True"),
        (dict(attention_head_dim=8), "attention_head_dim can't be 8"),
        (dict(attention_head_dim=...), "attention_head_dim can't be 'left out'"),
        (dict(norm_eps=...), "norm_eps can't be 'left out'"),
        (dict(downsample_padding=1), "downsample_padding can't be 1"),
        (dict(norm_num_groups=16), "norm_num_groups can't be 16"),
        (dict(act_fn="gelu"), "act_fn can't be 'gelu'"),
        (dict(num_class_embeds=10), "num_class_embeds can't be 10"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift can't be 'scale_shift'"),
        (dict(add_attention=False), "add_attention can't be False"),
        (dict(down_block_types=["DownBlock2D", "DownBlock2D"]), "add_attention can't be True"),
        (dict(down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]), "down_block_types can't be"),
        (dict(up_block_types=["AttnUpBlock2D", "UpBlock2D"]), "up_block_types can't be"),
        (dict(block_out_channels=[64, 128]), "block_out_channels can't be"),
        (dict(block_out_channels=[256, 384]), "block_out_channels can't be"),
        (dict(out_channels=2), "out_channels can't be 2"),
        (dict(something_new=1), "something_new can't be 1"),
        (dict(sample_size=...), "sample_size"),
        (dict(sample_size="large"), "fits"),
        (dict(block_out_channels=[]), "fits"),
        (dict(sample_size=9), "image_size 9"),
        (dict(), "Missing key(s) in state_dict"),
    ],
)
def test_published_configurations_that_the_network_cant_be_are_refused_by_name(changes, named, tmp_path):
    """Each field that changes what diffusers' U-Net computes is held to what ours computes. The last row's is accepted,
    and its empty file of weights refused. However long the reason, one line of at most 200 characters says it."""
    config = {name: value for name, value in {**SMALLER, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        ddpm.load_published(tmp_path)
    reason = str(refusal.value).removeprefix(f"{tmp_path} is no published network that fits here: ")
    assert len(reason) <= 200 and "\n" not in reason


def test_published_weights_that_would_run_code_are_refused_unrun(tmp_path):
    """A .bin is a pickle, and a pickle may hold any call: this one would make a folder."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "config.json").write_text(json.dumps(SMALLER))
    torch.save({"conv_in.weight": Malicious()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="no published network that fits here"):
        ddpm.load_published(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_steps_equal_diffusers(variance, clip):
    """DDPMScheduler's step at each t, given the same ε, x_t and z, to 1e−5 of x's size, once its coefficients are
    made in float64: its own, multiplied up in float32, are off by 5e−5 near x_0."""
    diffusers = pytest.importorskip("diffusers", reason=NO_DIFFUSERS)
    scheduler = diffusers.DDPMScheduler(T, variance_type=variance, clip_sample=clip)
    scheduler.alphas_cumprod = (1 - linear_beta_schedule(T)).cumprod(0)
    scheduler.set_timesteps(T)
    diffusion, eps, x_t = (
        GaussianDiffusion(linear_beta_schedule(T), variance),
        torch.randn(1, 1, 4, 4),
        torch.randn(1, 1, 4, 4),
    )
    for t in [0, 1, 2, 17, 400, 998, 999]:
        z = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(t))
        want = scheduler.step(eps, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        got = diffusion.p_sample(lambda x, t: eps, x_t, t, clip_denoised=clip, noise=z)
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_steps_equal_diffusers(eta, clip):
    """DDIMScheduler with trailing spacing, S from 1 to T, step by step; where S divides T (elsewhere it takes the wrong
    prev_t), and below its clamp, whose ε it recomputes only when told to (use_clipped_model_output)."""
    diffusers = pytest.importorskip("diffusers", reason=NO_DIFFUSERS)
    scheduler = diffusers.DDIMScheduler(T, timestep_spacing="trailing", clip_sample=clip, set_alpha_to_one=True)
    diffusion = GaussianDiffusion(linear_beta_schedule(T))
    for steps in (1, 2, 5, 10, 50, 200, 500, 1000):
        scheduler.set_timesteps(steps)
        timesteps = diffusion.ddim_timesteps(steps)
        assert timesteps == scheduler.timesteps.tolist()
        for t, s in list(zip(timesteps, [*timesteps[1:], -1]))[:: max(1, steps // 25)] + [(timesteps[-1], -1)]:
            x_t = torch.randn(1, 1, 2, 2)
            eps, z = torch.randn_like(x_t), torch.randn_like(x_t)
            want = scheduler.step(eps, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
            got = diffusion.ddim_sample(lambda x, t: eps, x_t, t, s, eta, clip, noise=z)
            assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max()), (steps, t)


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_the_embedded_digits_are_the_uci_digits():
    """1,797 pictures, ten classes of the sizes that the data set's authors publish, 17 grey levels, each an exact
    16th; and picture for picture those of scikit-learn where it is installed."""
    images, labels = load_data("digits")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = images.double() * 16 / 255
    assert set(levels.round().unique().tolist()) == set(range(17)) and (levels - levels.round()).abs().max() < 0.0315
    datasets = pytest.importorskip("sklearn.datasets", reason="compares with the source: pip install scikit-learn")
    digits = datasets.load_digits()
    order = np.argsort(digits.target, kind="stable")
    assert (levels.round()[:, 0].numpy() == digits.images[order]).all() and (
        labels.numpy() == digits.target[order]
    ).all()


def test_held_out_pictures_are_never_trained_on():
    """Split "train" and "test" part the digits nine to one, and together are all."""
    (train, a), (test, b), (all_, _) = (load_data("digits", split=s) for s in ("train", "test", None))
    assert len(train) + len(test) == len(all_) and len(test) == 179 and set(b.tolist()) == set(range(10))
    assert torch.equal(test, all_[9::10]) and torch.equal(train[:9], all_[:9]) and len(a) == len(train)


def guard_pixels_are_scaled_to_minus_one_and_one():
    assert ddpm.to_model(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_pixels(ddpm.to_model(every)), every)
    assert ddpm.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    x = ddpm.to_model(every)
    np.testing.assert_allclose(x, np.arange(256) * 2 / 255 - 1, atol=1e-6)


def test_scaling_happens_once_at_either_end():
    """0…255 is [−1, 1], and back, without loss; what training feeds the loss spans both ends."""
    guard_pixels_are_scaled_to_minus_one_and_one()


def save(path, mode="RGB", size=(20, 12), colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_a_folder_of_pictures(tmp_path):
    """Nested folders are the classes, any size and mode is read, resized and cropped, what is no picture is passed
    over."""
    save(tmp_path / "cats" / "a.png")
    save(tmp_path / "cats" / "deep" / "b.JPG", size=(9, 40))
    save(tmp_path / "dogs" / "c.png", mode="L", colour=(80, 80, 80))
    save(tmp_path / "dogs" / "p.png", mode="P")
    save(tmp_path / "dogs" / "d.gif", mode="1", colour=(255, 255, 255))
    Image.fromarray(np.full((5, 5), 257 * 100, np.uint16)).save(tmp_path / "dogs" / "deep16.png")
    Image.new("RGBA", (7, 7), (0, 0, 0, 0)).save(tmp_path / "dogs" / "clear.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images, labels = load_data(str(tmp_path), 16)
    assert images.shape == (7, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    centre = {
        p.name: images[i, :, 8, 8].tolist()
        for i, p in enumerate(sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".txt"))
    }
    assert centre["a.png"] == [255, 0, 0] and centre["c.png"] == [80, 80, 80] and centre["p.png"][0] > 250
    assert centre["d.gif"] == [255] * 3 and centre["clear.png"] == [255] * 3 and centre["deep16.png"] == [100] * 3
    flat = tmp_path / "cats" / "deep"
    assert load_data(str(flat), 8)[1] is None
    left = Image.new("RGB", (30, 10), "black")
    left.paste("white", (0, 0, 10, 10))
    left.save(tmp_path / "left.png")
    assert (load_data(str(tmp_path), 10)[0][-1] == 0).all()  # the middle third of a wide picture


@pytest.mark.parametrize("name, channels", [("mnist", 1), ("fashion_mnist", 1), ("cifar10", 3)])
def test_torchvision_sets_arrive_channels_first(name, channels, monkeypatch):
    """Torchvision's own containers (a tensor for MNIST, an HWC array and a list for CIFAR-10) become uint8 NCHW and
    int64; split picks the half."""

    class Fake:
        def __init__(self, root, train, download):
            assert (root, download) == ("data", True)
            self.data = (
                torch.zeros(6, 28, 28, dtype=torch.uint8) if channels == 1 else np.zeros((6, 32, 32, 3), np.uint8)
            )
            self.data[2:, 1, 3] = 7 if train else 9
            self.targets = torch.arange(6) if channels == 1 else list(range(6))

    monkeypatch.setitem(ddpm.TORCHVISION, name, Fake)
    for split, value in ((None, 7), ("train", 7), ("test", 9)):
        images, labels = load_data(name, split=split)
        assert images.shape == ((6, 1, 28, 28) if channels == 1 else (6, 3, 32, 32)) and images.dtype == torch.uint8
        assert (images[2:, :, 1, 3] == value).all() and images.sum() == value * 4 * channels
        assert labels.tolist() == list(range(6)) and labels.dtype == torch.int64


def test_no_network_is_one_line_that_says_what_to_do(monkeypatch):
    """A failed download names the reason and a way on."""

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setitem(ddpm.TORCHVISION, "cifar10", offline)
    with pytest.raises(ValueError, match="cifar10 .*Name or service not known.*--data digits"):
        load_data("cifar10")


# ---- Training --------------------------------------------------------------------------------------------------------

TINY = [
    "--dim",
    "8",
    "--dim-mults",
    "1",
    "--num-res-blocks",
    "1",
    "--attn-resolutions",
    "4",
    "--batch-size",
    "8",
    "--timesteps",
    "50",
    "--log-every",
    "2",
    "--warmup",
    "2",
    "--dropout",
    "0.2",
    "--sample-every",
    "1000",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(*arguments):
    """Run the command line in this process → its exit status."""
    try:
        ddpm.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code
    return 0


def weights(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "out")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_training_twice_from_a_seed_is_the_same_to_the_bit(folder):
    """A step depends on (seed, step) alone, dropout included: every number in the checkpoint repeats; another seed's
    doesn't."""
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("--train", *TINY, "--steps", 4, "--out", out, "--seed", seed) == 0
    a, b, c = map(weights, "abc")
    assert same(a, b) and not same(a["model"], c["model"])


def test_the_log_holds_means(folder):
    """A line of log.csv is the mean of the loss and of the gradient's norm over the steps since the line before."""
    rows = {}
    for every in (1, 4):
        assert cli("--train", *TINY, "--steps", 4, "--log-every", every, "--out", f"every{every}") == 0
        lines = Path(f"every{every}", "log.csv").read_text().splitlines()[1:]
        rows[every] = np.array([[float(cell) for cell in line.split(",")[1:3]] for line in lines])
    assert rows[1].shape == (4, 2) and rows[4].shape == (1, 2)
    np.testing.assert_allclose(rows[1].mean(0), rows[4][0], atol=1e-4)


def test_the_log_and_the_bar_count_right(folder, monkeypatch):
    """With a clock that jumps two seconds whenever it is read, a line of log.csv for 2 steps of 8 pictures says 16
    pictures in 2 s; time spent on a grid does not count. The bar is told pictures, and where a resumed run stands."""
    bars, clock = [], iter(range(0, 10**6, 2))

    class Bar:
        def __init__(self, *_, **how):
            bars.append((how, []))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            bars[-1][1].append(n)

        def set_postfix(self, loss):
            self.loss = bars[-1][0]["loss"] = loss

    monkeypatch.setattr(ddpm.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(ddpm, "tqdm", Bar)
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: ddpm.time.perf_counter())
    assert cli("--train", *TINY, "--steps", 4, "--sample-every", 2) == 0
    assert cli("--train", "--resume", "--steps", 6) == 0
    rows = [line.split(",") for line in Path("runs/digits/log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss", "gradient_norm", "learning_rate", "images_per_second"]
    assert [(row[0], row[4]) for row in rows[1:]] == [("2", "8"), ("4", "8"), ("6", "8")]
    assert [(how["total"], how["initial"], steps) for how, steps in bars] == [(32, 0, [8] * 4), (48, 32, [8] * 2)]
    assert all(how["unit"] == " images" and how["unit_scale"] is True and how["disable"] is None for how, _ in bars)
    assert [float(how["loss"]) for how, _ in bars] == pytest.approx([float(rows[i][1]) for i in (2, 3)], abs=1e-4)


def test_a_batch_is_reproduced_from_seed_and_step(folder, monkeypatch, capsys):
    """The batch of step 2 of seed 5, drawn again by hand as the docstring of a failed step says: seed_of(seed, step),
    then the pictures, t and ε in Algorithm 1's order. The steps still to go are announced."""
    seen, seeds, original, seed_of = [], [], GaussianDiffusion.p_losses, ddpm.derive_seed
    monkeypatch.setattr(ddpm, "derive_seed", lambda *numbers: seeds.append(numbers) or seed_of(*numbers))
    monkeypatch.setattr(
        GaussianDiffusion, "p_losses", lambda self, *batch: seen.append(batch[1:]) or original(self, *batch)
    )
    assert cli("--train", *TINY, "--steps", 2, "--seed", 5) == 0
    assert cli("--train", "--resume", "--steps", 5) == 0
    assert [n for n in seeds if n[1] == "training"] == [(5, "training", step, 0) for step in range(5)]
    said = capsys.readouterr().out
    assert "1,618 pictures of digits" in said and "cpu, 2 steps into" in said and "cpu, 3 steps into" in said
    images, _ = load_data("digits", split="train")
    torch.manual_seed(ddpm.derive_seed(5, "training", 2, 0))
    chosen = torch.randint(1618, (8,))
    x_start, t, noise = images[chosen] / 127.5 - 1, torch.randint(50, (8,)), torch.randn(8, 1, 8, 8)
    for got, want in zip(seen[2], (x_start, t, noise)):
        torch.testing.assert_close(got, want)


def test_what_watches_training_is_shown_the_averaged_network_ready_to_draw(folder):
    """watch comes every sample_every steps and at the end, with dropout off and the averages of the checkpoint."""
    seen = []
    config = ddpm.preset("digits", dim=8, dim_mults=(1,), steps=5, dropout=0.5, sample_every=2, batch_size=4)
    ddpm.train(config, watch=lambda run, step: seen.append((step, run, run.model.training)))
    assert [(step, training) for step, _, training in seen] == [(2, False), (4, False), (5, False)]
    averaged = weights("runs/digits")["ema"]
    for name, value in seen[-1][1].model.state_dict().items():
        assert torch.equal(value, averaged[name])
    assert weights("runs/digits")["optimizer"]["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("flags, times", [((), 0), (("--compile",), 1), (("--no-compile",), 0)])
def test_the_network_is_compiled_when_asked(flags, times, folder, monkeypatch):
    """On a CPU it is not compiled unless --compile says so, seen from how torch.compile is called: for static shapes
    always, for sampling in the mode that captures CUDA graphs. What it returns is what trains and draws, here zeros."""

    class Compiled(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.num_classes, self.image_channels = network, 10, 1

        def forward(self, x, t, y=None):
            return 0 * self.network(x, t, y)

    calls = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: calls.append(how) or Compiled(network))
    assert cli("--train", *TINY, "--steps", 1, *flags, "--no-bf16") == 0
    assert calls == [dict(mode=None, dynamic=False)] * times
    assert cli("--sample", 2, "--sampling-steps", 1, *flags, "--individual", "--no-bf16") == 0
    assert calls == [dict(mode=None, dynamic=False), dict(mode="reduce-overhead", dynamic=False)] * times
    assert cli("--evaluate", 2, *flags) == 0
    assert len(calls) == 3 * times


@pytest.mark.parametrize(
    "device, triton, said, want",
    [
        ("cuda", True, None, True),
        ("cuda", False, None, False),
        ("cuda", False, True, True),
        ("cuda", True, False, False),
        ("mps", True, None, False),
        ("cpu", True, None, False),
        ("cpu", False, True, True),
    ],
)
def test_unless_said_a_network_is_compiled_on_cuda_with_triton(device, triton, said, want, monkeypatch, capsys):
    """The mistake: torch.compile on CUDA without a look for Triton, which torch does not bring along on Windows, nor is
    there one for old GPUs, so that training ends at its first step."""
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: triton)
    monkeypatch.setattr(torch, "compile", lambda network, mode, dynamic: (network, mode, dynamic))
    got = ddpm.maybe_compile(ddpm.preset("digits", compile=said), torch.device(device), "network", "a mode")
    assert got == (("network", "a mode", False) if want else "network")
    assert ("--no-compile" in capsys.readouterr().err) == want
    monkeypatch.setenv("RANK", "1")
    assert got == ddpm.maybe_compile(ddpm.preset("digits", compile=said), torch.device(device), "network", "a mode")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "device, cuda, avx512, amx, said, want",
    [
        ("cuda", True, False, False, None, True),
        ("cuda", False, True, True, None, False),
        ("cuda", True, True, True, False, False),
        ("cuda", False, False, False, True, True),
        ("cpu", True, False, False, None, False),
        ("cpu", False, True, False, None, True),
        ("cpu", False, False, True, None, True),
        ("cpu", False, True, True, False, False),
        ("mps", True, True, True, None, False),
    ],
)
def test_unless_said_bfloat16_is_used_where_the_device_computes_in_it(
    device, cuda, avx512, amx, said, want, monkeypatch
):
    """The mistake: to believe a GPU that emulates bfloat16, slowly, as those before Ampere do."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    got = ddpm.autocast(ddpm.preset("digits", bf16=said), torch.device(device))
    assert got == (device, torch.bfloat16, want)


def test_what_a_device_or_a_compiler_lacks_is_one_line(folder, monkeypatch, capsys):
    """Memory, as CUDA says it, and a torch.compile that does not get through."""

    def exhausted(self, *batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total of 8.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(GaussianDiffusion, "p_losses", exhausted)
        assert cli("--train", *TINY, "--steps", 1) == 2
    line = "ddpm.py: error: CUDA out of memory; a smaller --batch-size or --sampling-batch needs less"
    assert capsys.readouterr().err.splitlines()[-1] == line

    def broken(graph, inputs):
        raise RuntimeError("no compiler\nto be found")

    monkeypatch.setattr(
        torch, "compile", lambda network, original=torch.compile, **_: original(network, backend=broken)
    )
    assert cli("--train", *TINY, "--steps", 1, "--compile") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        re.match(r"ddpm.py: error: torch.compile fails \(.*no compiler to be found.*; --no-compile does without$", line)
        and len(line) < 280
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory: run it on Linux")
def test_freed_memory_is_kept(folder, monkeypatch):
    """64 MB, taken and given back again and again, are new pages each time, 16,384 of 4 kB; after keep_freed_memory
    they are the same pages. Told by the operating system's count of page faults. The command line begins with it."""
    code = """if True:
        import resource, torch, ddpm
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                [torch.ones(2**21) for _ in range(8)]
            return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10
        print(faults())
        ddpm.keep_freed_memory()
        faults()
        print(faults())"""
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, capture_output=True, text=True).stdout
    before, after = map(int, said.split())
    assert after < 100 and before > 1000
    calls = []
    monkeypatch.setattr(ddpm, "keep_freed_memory", lambda: calls.append(1))
    assert cli("--sample", 1) == 2 and calls == [1]


@pytest.mark.parametrize("count, size, batches", [(9, 3, 3), (7, 4, 2), (3, 3, 1)])
def test_the_batches_of_sampling_are_equally_large(count, size, batches, folder, monkeypatch):
    """At most 4 at once, all batches of one shape, labels going on from one to the next; what is over is left out."""
    assert cli("--train", *TINY, "--steps", 1) == 0
    original, seen = ddpm.UNet.forward, []

    def forward(self, x, t, y=None):
        seen.append((len(x), y.tolist()))
        return original(self, x, t, y)

    monkeypatch.setattr(ddpm.UNet, "forward", forward)
    assert cli("--sample", count, "--sampling-batch", 4, "--sampling-steps", 1, "--individual") == 0
    assert seen == [(size, list(range(i * size, (i + 1) * size))) for i in range(batches)]
    assert len(list(Path("runs/digits/individual").iterdir())) == count


def test_a_compiled_network_is_compiled_once(folder, monkeypatch):
    """torch.compile starts anew at inputs of another kind, shape or stride: training shows it one, and so does each way
    of sampling, from x_T to the last step."""
    original, kinds = ddpm.UNet.forward, set()

    def forward(self, *inputs, **named):
        kinds.add(tuple((each.dtype, each.shape, each.stride()) for each in (*inputs, *named.values())))
        return original(self, *inputs, **named)

    monkeypatch.setattr(ddpm.UNet, "forward", forward)
    ways = [("--train", *TINY, "--steps", 4, "--flip", "--sample-every", 9, "--log-every", 9)]
    ways += [
        ("--sample", 3, "--sampler", s, "--sampling-steps", 4, *f)
        for s in ("ddpm", "ddim")
        for f in ((), ("--guidance", 1))
    ]
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: None)
    for way in ways:
        kinds.clear()
        assert cli(*way) == 0
        assert len(kinds) == 1, way


@pytest.mark.parametrize("at, status", [(1, 130), (2, 130), (3, 0)])
def test_a_signal_ends_training_after_its_step(at, status, folder, monkeypatch, capsys):
    """SIGTERM during step 1 or 2 of 3: that step is finished, saved and named, no grid is drawn; during the last the
    run just ends. The handlers of before are back."""
    original, steps = GaussianDiffusion.p_losses, []

    def signalled(self, *batch):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    monkeypatch.setattr(GaussianDiffusion, "p_losses", signalled)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ended = cli("--train", *TINY, "--steps", 3, "--sample-every", 1)
    assert (ended, len(steps), weights("runs/digits")["step"]) == (status, at, at)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert ("--train --resume --out runs/digits" in capsys.readouterr().err) == (status == 130)
    assert len(list(Path("runs/digits").glob("samples-*.png"))) == at - 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(folder, monkeypatch, capsys):
    """NaN at step 5 (counted from 0) of a run that looks every 4 steps and saved at 4: the message names (seed, step),
    and the checkpoint of before stays."""
    original, steps = GaussianDiffusion.p_losses, []

    def broken(self, *batch):
        steps.append(1)
        return original(self, *batch) * (math.nan if len(steps) == 6 else 1)

    monkeypatch.setattr(GaussianDiffusion, "p_losses", broken)
    assert cli("--train", *TINY, "--steps", 8, "--log-every", 4, "--checkpoint-every", 4, "--seed", 7) == 2
    assert "not finite at (seed 7, step 5); runs/digits/checkpoint.pt" in capsys.readouterr().err
    assert weights("runs/digits")["step"] == 4 and all(
        w.isfinite().all() for w in weights("runs/digits")["model"].values()
    )


def test_without_labels_when_asked(folder):
    """--no-conditional learns no labels, though the data have them."""
    assert cli("--train", *TINY, "--steps", 1, "--no-conditional") == 0
    assert weights("runs/digits")["num_classes"] is None
    assert cli("--train", *TINY, "--steps", 1) == 0
    assert weights("runs/digits")["num_classes"] == 10


def guard_resumed_equals_uninterrupted():
    assert cli("--train", *TINY, "--steps", 6, "--out", "whole") == 0
    assert cli("--train", *TINY, "--steps", 6, "--out", "part", "--checkpoint-every", 4) == 0

    class Stopped(Exception):
        pass

    def stop_after_4(path, save, write=ddpm.atomic_write):
        write(path, save)
        if path.name == "checkpoint.pt":
            raise Stopped

    original, ddpm.atomic_write = ddpm.atomic_write, stop_after_4
    try:
        with pytest.raises(Stopped):
            cli("--train", *TINY, "--steps", 6, "--out", "cut", "--checkpoint-every", 4)
    finally:
        ddpm.atomic_write = original
    assert weights("cut")["step"] == 4
    assert cli("--train", "--resume", "--out", "cut") == 0
    whole, cut = weights("whole"), weights("cut")
    for name in ("model", "ema", "optimizer", "scheduler", "step"):
        assert same(whole[name], cut[name]), name
    rows = [[line.split(",")[:4] for line in Path(out, "log.csv").read_text().splitlines()] for out in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_resumed_equals_uninterrupted_to_the_bit(folder):
    """Killed after step 4 and resumed, a run ends with the same weights, averages, optimiser, schedule and log."""
    guard_resumed_equals_uninterrupted()


def test_ema_is_the_weighted_sum_written_out():
    """w̄_n = d_n w̄_{n−1} + (1 − d_n) w_n with d_n = min(decay, (1 + n)/(10 + n)), unrolled by hand over 30 updates;
    the first update takes the weights as they are."""
    for decay in (0.5, 0.9999):
        module = nn.Linear(1, 1, bias=False)
        ema = nn.Linear(1, 1, bias=False)
        values, want = np.random.default_rng(SEED).normal(size=30), None
        for n, value in enumerate(values):
            with torch.no_grad():
                module.weight.fill_(value)
            ddpm.ema_update(ema, module, n, decay)
            d = min(decay, (1 + n) / (10 + n))
            want = value if n == 0 else d * want + (1 - d) * value
            assert ema.weight.item() == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_learning_rate_warms_up_and_decays():
    """Linear from lr/(warmup + 1) up to lr, then held, or falling on a line to 0 at the last step."""
    held, falling = (ddpm.preset("digits", steps=100, warmup=9, lr_decay=d) for d in ("constant", "linear"))
    assert [ddpm.learning_rate(held, s) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [ddpm.learning_rate(falling, s) for s in (0, 4, 9, 50, 99, 100)] == pytest.approx(
        [0.1, 0.48, 0.91, 0.5, 0.01, 0]
    )


def guard_training_draws_every_t():
    """Algorithm 1, line 3: t is uniform on all of 0…T−1. 800 draws over T = 5: χ² with false alarm 1e−6, and t = T−1
    seen."""
    seen = []

    def spy(self, model, x_start, t, noise):
        seen.append((x_start, t, noise, model.keywords["y"]))
        return sum(p.sum() for p in model.func.parameters()) * 0

    original, GaussianDiffusion.p_losses = GaussianDiffusion.p_losses, spy
    try:
        assert cli("--train", *TINY, "--timesteps", 5, "--batch-size", 80, "--steps", 10, "--label-dropout", 0.2) == 0
    finally:
        GaussianDiffusion.p_losses = original
    x, t, noise, y = (torch.cat(k) for k in zip(*seen))
    counts = t.bincount(minlength=5)
    assert len(counts) == 5 and counts.min() > 0 and scipy.stats.chisquare(counts).pvalue > 1e-6
    return x, t, noise, y


def test_algorithm_1_draws_what_the_paper_says(folder):
    """x_0 from the data at random, on [−1, 1]; t uniform; ε standard normal (χ², KS); labels hidden with the
    probability asked for (binomial); each statistic with false alarm 1e−6."""
    x, t, noise, y = guard_training_draws_every_t()
    assert x.min() == -1 and x.max() == 1
    images, labels = load_data("digits", split="train")
    table = {bytes(i.numpy().tobytes()): int(l) for i, l in zip(images, labels)}
    true = torch.tensor([table[ddpm.to_pixels(i).numpy().tobytes()] for i in x])  # each is a real training picture
    hidden = y == 10
    assert torch.equal(y[~hidden], true[~hidden])
    assert scipy.stats.binomtest(int(hidden.sum()), 800, 0.2).pvalue > 1e-6
    assert len({i.numpy().tobytes() for i in x}) > 400  # 800 draws of 1,618: 631 expected
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-6
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_flips_are_half_and_only_when_asked(folder):
    """--flip mirrors each picture with probability ½ (binomial, false alarm 1e−6)."""
    seen = []
    original = GaussianDiffusion.p_losses
    GaussianDiffusion.p_losses = lambda self, model, x_start, *_: (
        seen.append(x_start) or sum(p.sum() for p in model.func.parameters()) * 0
    )
    try:
        for flag in ("--flip", "--no-flip"):
            assert cli("--train", *TINY, "--batch-size", 200, "--steps", 1, flag) == 0
    finally:
        GaussianDiffusion.p_losses = original
    mirrored, plain = seen
    same_way, other_way = (mirrored == plain).flatten(1).all(1), (mirrored == plain.flip(3)).flatten(1).all(1)
    assert (same_way | other_way).all()
    assert scipy.stats.binomtest(int((~same_way).sum()), 200, 0.5).pvalue > 1e-6


def test_a_tiny_network_overfits_and_samples_its_pictures(folder):
    """Data in, data out, the whole way: four pictures in a folder, 250 steps, and DDIM draws those four."""
    for i, (left, right) in enumerate([("black", "white"), ("white", "black"), ("white", "white"), ("black", "black")]):
        picture = Image.new("RGB", (4, 4), left)
        picture.paste(right, (2, 0, 4, 4))
        for copy_ in range(3):
            (folder / "pictures").mkdir(exist_ok=True)
            picture.save(folder / "pictures" / f"{i}{copy_}.png")
    assert (
        cli(
            "--train",
            "--data",
            "pictures",
            "--image-size",
            4,
            "--dim",
            16,
            "--dim-mults",
            1,
            "--num-res-blocks",
            1,
            "--attn-resolutions",
            4,
            "--steps",
            250,
            "--batch-size",
            64,
            "--lr",
            1e-2,
            "--warmup",
            10,
            "--dropout",
            0,
            "--lr-decay",
            "linear",
            "--timesteps",
            100,
            "--ema-decay",
            0.98,
            "--no-flip",
            "--sample-every",
            1000,
            "--seed",
            SEED,
        )
        == 0
    )
    run = ddpm.Run.read("runs/pictures")
    x_0 = ddpm.last(run.trajectory(80, seed=SEED, sampling_steps=20))
    known = ddpm.to_model(load_data("pictures", 4)[0])
    distance = (x_0[:, None] - known).square().flatten(2).mean(2).sqrt().min(1).values
    assert distance.median() < 0.5  # noise is 1.1 from the nearest, and they 1.4 from each other
    losses = [float(row.split(",")[1]) for row in Path("runs/pictures/log.csv").read_text().splitlines()[1:]]
    assert losses[0] > 2 * losses[-1]


@pytest.mark.parametrize(
    "device, flags",
    [
        ("cpu", ("--no-compile",)),
        pytest.param("cuda", ("--no-compile", "--no-bf16"), marks=NO_CUDA),
        pytest.param("cuda", (), marks=NO_CUDA),
    ],
)
def test_each_device_trains_goes_on_draws_and_evaluates(device, flags, folder, capsys):
    """What the command line does, on the device that it is told; the same seed draws the same pictures there."""
    flags = ["--device", device, *flags]
    assert cli("--train", *TINY, "--steps", 5, "--flip", *flags) == 0
    assert f" {pick_device(device)}, 5 steps" in capsys.readouterr().out
    assert cli("--train", "--resume", "--steps", 8, *flags) == 0
    rows = [row.split(",") for row in Path("runs/digits/log.csv").read_text().splitlines()[1:]]
    assert rows[-1][0] == "8" and all(math.isfinite(float(row[1])) for row in rows)
    for how in (("--sampler", "ddpm"), ("--guidance", 1), ("--eta", 1, "--animate")):
        pictures = []
        for _ in range(2):
            assert cli("--sample", 6, "--sampling-batch", 3, "--sampling-steps", 4, *how, *flags) == 0
            pictures.append(Path("runs/digits/samples.png").read_bytes())
        assert pictures[0] == pictures[1]
    assert cli("--evaluate", 5, *flags) == 0
    assert "NLL" in capsys.readouterr().out


def guard_sampling_uses_the_averaged_weights():
    run, checkpoint = ddpm.Run.read("runs/digits"), weights("runs/digits")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, checkpoint["ema"][name])
    assert not same(dict(run.model.state_dict()), dict(checkpoint["model"]))


def guard_sampling_is_without_dropout():
    run = ddpm.Run.read("runs/digits")
    a, b = (ddpm.last(run.trajectory(4, seed=3, sampling_steps=3)) for _ in range(2))
    assert torch.equal(a, b)


def test_command_line_end_to_end(folder, capsys):
    """Train, sample each way, evaluate, animate, go on: what is promised lies where it is promised, the same seed
    gives the same picture and another another, and the schedule is not among what is saved."""
    assert cli("--train", *TINY, "--steps", 6, "--sample-every", 3, "--checkpoint-every", 3) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert "runs/digits" in last[0] and "python ddpm.py --sample 64 --out runs/digits" in last[1]
    run = folder / "runs" / "digits"
    assert {p.name for p in run.iterdir()} == {"checkpoint.pt", "log.csv", "samples-000003.png", "samples-000006.png"}
    rows = (run / "log.csv").read_text().splitlines()
    assert rows[0].split(",")[:2] == ["step", "loss"] and [r.split(",")[0] for r in rows[1:]] == ["2", "3", "4", "6"]
    saved = weights(run)
    assert set(saved) == {"model", "ema", "optimizer", "scheduler", "step", "config", "image_channels", "num_classes"}
    assert not [name for name in [*saved["model"], *saved["ema"]] if "alphas" in name or "betas" in name]
    guard_sampling_uses_the_averaged_weights()
    guard_sampling_is_without_dropout()
    pictures = {}
    for name, flags in dict(
        plain=[],
        again=[],
        seed=["--seed", 1],
        label=["--label", 3],
        free=["--unconditional"],
        guided=["--guidance", 2],
        noisy=["--eta", 1],
        ancestral=["--sampler", "ddpm"],
    ).items():
        steps = [] if name == "ancestral" or name == "noisy" else ["--sampling-steps", 5]
        assert cli("--sample", 12, *steps, *flags) == 0
        pictures[name] = np.array(Image.open(run / "samples.png"))
    assert (pictures["plain"] == pictures["again"]).all()
    others = [p for name, p in pictures.items() if name != "again"]
    assert all(a.shape != b.shape or (a != b).any() for i, a in enumerate(others) for b in others[:i])
    assert cli("--sample", 5, "--sampling-steps", 4, "--individual", "--animate", "--sampling-batch", 2) == 0
    assert sorted(p.name for p in (run / "individual").iterdir()) == [f"{i:05}.png" for i in range(5)]
    assert {Image.open(p).size for p in (run / "individual").iterdir()} == {(8, 8)}
    with Image.open(run / "samples.gif") as gif:
        assert gif.n_frames >= 3
    assert cli("--sample", 3, "--sampling-steps", 4, "--individual") == 0
    assert len(list((run / "individual").iterdir())) == 3  # no leftovers among what FID tools read
    capsys.readouterr()
    assert cli("--evaluate", 5) == 0
    table = capsys.readouterr().out
    assert "5 held-out" in table and "NLL ≤" in table
    assert cli("--train", "--resume", "--steps", 8) == 0 and weights(run)["step"] == 8
    assert cli("--train", *TINY, "--steps", 1) == 0
    assert weights("runs/digits-1")["step"] == 8 and weights(run)["step"] == 1  # the earlier run is kept


def test_samples_in_batches_do_not_depend_on_their_order(folder):
    """Batch i of a sampling run starts from (seed, i): the first pictures are the same however many follow."""
    assert cli("--train", *TINY, "--steps", 1) == 0
    run = ddpm.Run.read("runs/digits")
    how = dict(sampler="ddim", sampling_steps=3, individual=True, sampling_batch=4)
    seen = []
    for count in (4, 12):
        ddpm.sample(run, count, **how)
        seen.append([Path(run.config.out, "individual", f"{i:05}.png").read_bytes() for i in range(4)])
        assert len(set(seen[-1])) == 4
    assert seen[0] == seen[1]


def test_grid_shows_every_picture_once():
    """Pictures lie row by row, a column a class, small ones enlarged by whole pixels."""
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 8, 8) * 40
    grid = np.array(ddpm.make_grid_image(pixels, 3))[..., 0]
    assert grid.shape == (4 * (2 * 9 + 1), 4 * (3 * 9 + 1))
    centres = [[grid[4 * (1 + 9 * i + 4), 4 * (1 + 9 * j + 4)] for j in range(3)] for i in range(2)]
    assert centres == [[0, 40, 80], [120, 160, 200]]


def test_interrupted_training_leaves_a_checkpoint_and_says_how_to_go_on(folder):
    """SIGINT and SIGTERM finish the step, save, print one line and end with 130; --resume goes on from there."""
    for number in (signal.SIGINT, signal.SIGTERM):
        out = f"run{number}"
        process = subprocess.Popen(
            [sys.executable, HERE / "ddpm.py", "--device", "cpu", "--train", *TINY, "--steps", "100000", "--out", out],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        deadline = time.time() + 120
        log = Path(out, "log.csv")
        while time.time() < deadline and process.poll() is None and not (log.exists() and "\n2," in log.read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert (
            f"{out}/checkpoint.pt" in message
            and f"--train --resume --out {out}" in message
            and "Traceback" not in message
        )
        step = weights(out)["step"]
        assert cli("--train", "--resume", "--out", out, "--steps", step + 1) == 0 and weights(out)["step"] == step + 1


def test_killed_again_and_again_a_run_ends_the_same_to_the_bit(folder):
    """SIGKILL at random moments of a run that saves after every step, then --resume: what is there always loads,
    nothing half-written is taken for a checkpoint, and the weights at the end are an uninterrupted run's. Twice here;
    DDPM_TEST_KILLS=20 pytest -k killed does it twenty times."""
    flags = [*TINY, "--lr-decay", "constant", "--sample-every", "1000000"]
    command = ["--train", *flags, "--steps", "1000000", "--checkpoint-every", "1", "--out", "cut"]
    for moment in np.random.default_rng(SEED).uniform(0.1, 0.6, int(os.environ.get("DDPM_TEST_KILLS", 2))):
        process = subprocess.Popen(
            [sys.executable, HERE / "ddpm.py", "--device", "cpu", *command], stdout=subprocess.PIPE, text=True
        )
        deadline = time.time() + 120
        while not Path("cut/checkpoint.pt").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        process.stdout.readline()  # "… steps into cut": training goes on
        time.sleep(moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert weights("cut")["step"] > 0
        command = ["--train", "--resume", "--out", "cut"]
    steps = weights("cut")["step"] + 3
    assert cli("--train", "--resume", "--out", "cut", "--steps", steps) == 0
    assert cli("--train", *flags, "--steps", steps, "--out", "whole") == 0
    whole, cut = weights("whole"), weights("cut")
    for name in ("model", "ema", "optimizer", "scheduler", "step"):
        assert same(whole[name], cut[name]), name


def test_evaluate_prints_the_bound_and_its_parts(folder, capsys):
    """The printed means and standard errors are those of bits_per_dim on the same pictures and noise; rate and
    distortion add up to the total."""
    assert cli("--train", *TINY, "--steps", 1) == 0
    capsys.readouterr()
    assert cli("--evaluate", 5, "--seed", 3, "--no-bf16") == 0
    said = capsys.readouterr().out
    run, x = ddpm.Run.read("runs/digits"), load_data("digits", split="test")[0][:5] / 127.5 - 1
    bits = run.diffusion.bits_per_dim(run.model, x, generator=torch.Generator().manual_seed(ddpm.derive_seed(3, "evaluation")))
    middle = bits["L_{t-1}"].sum(1)
    assert said.startswith("5 held-out pictures of digits")
    for name, want in (("L_T", bits["L_T"]), ("L_{T-1}", middle), ("L_0", bits["L_0"]), ("NLL ≤", bits["total"])):
        mean, error = map(float, re.search(re.escape(name) + r" +([\d.]+) ± ([\d.]+)", said).groups())
        assert mean == pytest.approx(want.mean().item(), abs=2e-4)
        assert error == pytest.approx(want.std().item() / 5**0.5, abs=2e-4)
    rate, distortion, rmse = map(float, re.search(r"rate ([\d.]+), distortion ([\d.]+) \(RMSE ([\d.]+)", said).groups())
    assert rate + distortion == pytest.approx(bits["total"].mean().item(), abs=3e-4)
    assert rmse == pytest.approx(127.5 * bits["squared_error"][:, 0].mean().item() ** 0.5, abs=0.01)
    said = []
    for seed in ((), ("--seed", 0), ("--seed", 2**32 - 1)):
        assert cli("--evaluate", 5, *seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN = [sys.executable, *TWO_PROCESSES, HERE / "ddpm.py", "--device", "cpu"]
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_processes_speak_nccl_between_gpus_and_gloo_otherwise(device, backend, folder, monkeypatch):
    """Seen from how torch.distributed is called, all tensors staying where they are, so that no GPU is needed."""

    def init_process_group(backend):
        raise ValueError(f"asked for {backend}")

    data = load_data("digits", split="train")
    monkeypatch.setattr(ddpm, "load_data", lambda name, size, device, split: data)
    monkeypatch.setattr(ddpm, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(nn.Module, "to", lambda self, device, **_: self)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"asked for {backend}"):
        ddpm.train(ddpm.preset("digits"))


def test_two_processes_share_a_run(folder):
    """torchrun with two gloo processes: rank 0 alone writes and speaks, a run of one process is resumed by two, and
    their samples are one process's to the byte."""
    flags = [*TINY, "--dropout", "0", "--lr", "1e-3", "--lr-decay", "constant", "--no-bf16"]

    def as_two(*arguments):
        job = subprocess.run([*TORCHRUN, *map(str, arguments)], check=True, capture_output=True, env=ONE_THREAD)
        assert b"images/s" not in job.stderr and b"batches" not in job.stderr  # no bars where nobody looks
        return job.stdout.decode().splitlines()

    assert cli("--train", *flags, "--steps", 3, "--out", "two") == 0
    said = as_two("--train", "--resume", "--steps", 5, "--out", "two")
    assert [line.split(" ")[0] for line in said] == ["1,618", "the", "next:"]
    assert weights("two")["step"] == 5
    sampling = ["--sample", "6", "--sampling-batch", "2", "--sampling-steps", "4", "--out", "two", "--individual"]
    assert as_two(*sampling) == ["two/samples.png", "two/individual"]
    shared = [p.read_bytes() for p in sorted(Path("two/individual").iterdir())]
    assert cli(*sampling) == 0
    assert len(shared) == 6 and shared == [p.read_bytes() for p in sorted(Path("two/individual").iterdir())]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc: run it on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_of_two_processes_ends_both(number, folder):
    """SIGTERM to rank 1 alone: both stop after the same step, rank 0 having saved it. SIGKILL: the job ends with a
    message that names rank and signal. Either way it ends in failure, and one process goes on from the checkpoint."""
    command = [*TORCHRUN, "--train", *TINY, "--steps", "1000000", "--checkpoint-every", "5"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    deadline = time.time() + 120
    while not Path("runs/digits/checkpoint.pt").exists() and job.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (rank_1,) = (int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(rank_1, number)
    _, said = job.communicate(timeout=120)
    step = weights("runs/digits")["step"]
    assert job.returncode != 0
    assert (
        f"stopped after step {step:,};" if number == signal.SIGTERM else f"Signal 9 (SIGKILL) received by PID {rank_1}"
    ) in said
    assert cli("--train", "--resume", "--steps", step + 2) == 0
    assert weights("runs/digits")["step"] == step + 2


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_writing_is_all_or_nothing(folder):
    """write() leaves the old file whole when saving fails, and nothing beside it."""
    path = folder / "file"
    ddpm.atomic_write(path, lambda file: file.write(b"old"))

    class Full:
        """What a full disk is to torch.save, which answers with a RuntimeError of its own."""

        def __init__(self, file):
            self.file, self.room = file, 100

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError("No space left on device")
            return self.file.write(data)

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    for full in (lambda file: Full(file).write(bytes(101)), lambda file: torch.save(torch.zeros(10_000), Full(file))):
        with pytest.raises(OSError, match="file can't be written .*No space left on device"):
            ddpm.atomic_write(path, full)
    with pytest.raises(KeyboardInterrupt):
        ddpm.atomic_write(path, interrupted)
    assert path.read_bytes() == b"old" and [p.name for p in folder.iterdir()] == ["file"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, capsys):
    """The step is named, the last good checkpoint stays, the status is 2."""
    assert cli("--train", *TINY, "--steps", 2) == 0
    original, calls = GaussianDiffusion.p_losses, []

    def breaks(self, *arguments):
        calls.append(1)
        return original(self, *arguments) * (math.nan if len(calls) == 4 else 1)

    GaussianDiffusion.p_losses = breaks
    try:
        assert cli("--train", "--resume", "--steps", 20) == 2
    finally:
        GaussianDiffusion.p_losses = original
    assert "(seed 0, step 5)" in capsys.readouterr().err and weights("runs/digits")["step"] == 2


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a labelled run, an unlabelled one, and things that are neither."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert cli("--train", *TINY, "--steps", 1, "--no-conditional", "--out", "runs/plain") == 0
        assert cli("--train", *TINY, "--steps", 1) == 0
    finally:
        os.chdir(before)
    (folder / "empty").mkdir()
    save(folder / "broken" / "good.png")
    (folder / "broken" / "bad.png").write_bytes(b"no picture")
    save(folder / "truncated" / "cut.png", size=(200, 200))
    (folder / "truncated" / "cut.png").write_bytes((folder / "truncated" / "cut.png").read_bytes()[:80])
    for name, content in (("text", b"no checkpoint"), ("nothing", b"")):
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").write_bytes(content)
    (folder / "foreign").mkdir()
    torch.save({"weights": torch.zeros(3)}, folder / "foreign" / "checkpoint.pt")
    (folder / "cut").mkdir()
    whole = (folder / "runs" / "digits" / "checkpoint.pt").read_bytes()
    (folder / "cut" / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    (folder / "evil").mkdir()
    torch.save({"config": Evil()}, folder / "evil" / "checkpoint.pt")
    return folder


REFUSED = [
    ("", "required"),
    ("--trian", "--trian"),
    ("--train --sample 4", "not allowed with"),
    ("--train --no-such-flag", "no-such-flag"),
    ("--train --steps 0", "steps .*got 0"),
    ("--train --steps many", "steps.*many"),
    ("--train --batch-size -1", "batch_size .*-1"),
    ("--train --lr -0.1", "lr .*-0.1"),
    ("--train --lr nan", "lr .*nan"),
    ("--train --warmup -5", "warmup .*-5"),
    ("--train --dropout 1", "dropout .*1"),
    ("--train --label-dropout 1.5", "label_dropout .*1.5"),
    ("--train --timesteps 1", "timesteps .*1"),
    ("--train --ema-decay 1", "ema_decay .*1"),
    ("--train --grad-clip -1", "grad_clip .*-1"),
    ("--train --seed -1", "--seed .*-1"),
    ("--train --schedule quadratic", "schedule.*quadratic"),
    ("--train --variance large", "variance.*large"),
    ("--train --loss l1", "loss.*l1"),
    ("--train --lr-decay cosine", "lr-decay.*cosine"),
    ("--train --dim 30", "dim .*30"),
    ("--train --dim 0", "dim .*0"),
    ("--train --dim-mults 1 2 2 2 2", "8 can't be halved 4 times"),
    ("--train --dim-mults 0", "dim_mults .*0"),
    ("--train --num-res-blocks 0", "num_res_blocks .*0"),
    ("--train --image-size 0", "image_size .*0"),
    ("--train --image-size 16", "image_size must be 8 for digits, got 16"),
    ("--train --log-every 0", "log_every .*0"),
    ("--train --sample-every 0", "sample_every .*0"),
    ("--train --checkpoint-every 0", "checkpoint_every .*0"),
    ("--train --device tpu9", "tpu9"),
    ("--train --data nowhere", "nowhere"),
    ("--train --data empty", "no pictures in empty"),
    ("--train --data broken", "broken/bad.png"),
    ("--train --data truncated", "truncated/cut.png"),
    ("--train --data runs/digits/checkpoint.pt", "checkpoint.pt"),
    ("--train --sampler ddim", "--sampler does not go with --train"),
    ("--train --guidance 1", "--guidance does not go with --train"),
    ("--train --out text/checkpoint.pt", "text/checkpoint.pt"),
    ("--train --resume --out nowhere", "no checkpoint at nowhere/checkpoint.pt"),
    ("--train --resume --data mnist", "no checkpoint at runs/mnist"),
    ("--train --resume", "has its 1 steps already"),
    ("--train --resume --steps 5 --dim 64", "--dim does not go with --train --resume"),
    ("--sample 4 --weights nowhere", "nowhere is no published network .*config.json"),
    ("--sample 4 --weights picture --data digits", "--data does not go with --weights"),
    ("--train --weights nowhere", "nowhere is no published network .*config.json"),
    ("--train --resume --steps 5 --weights nowhere", "--weights does not go with --train --resume"),
    ("--evaluate --weights nowhere", "--weights does not go with --evaluate"),
    ("--train --resume --out text", "text/checkpoint.pt is no checkpoint"),
    ("--sample 0", "--sample .*0"),
    ("--sample -3", "--sample.*-3"),
    ("--sample few", "sample.*few"),
    ("--sample 4 --out nowhere", "no checkpoint at nowhere/checkpoint.pt"),
    ("--sample 4 --out text", "text/checkpoint.pt is no checkpoint"),
    ("--sample 4 --out nothing", "nothing/checkpoint.pt is no checkpoint"),
    ("--sample 4 --out foreign", "foreign/checkpoint.pt is no checkpoint"),
    ("--sample 4 --out cut", "cut/checkpoint.pt is no checkpoint"),
    ("--sample 4 --out evil", "evil/checkpoint.pt is no checkpoint"),
    ("--sample 4 --sampling-steps 0", "steps must lie in 1…50, got 0"),
    ("--sample 4 --sampling-steps 51", "steps must lie in 1…50, got 51"),
    ("--sample 4 --eta -0.5", "eta .*-0.5"),
    ("--sample 4 --eta 1.5", "eta .*1.5"),
    ("--sample 4 --eta nan", "eta .*nan"),
    ("--sample 4 --guidance inf", "--guidance .*inf"),
    ("--sample 4 --label 10", "--label must lie in 0…9, got 10"),
    ("--sample 4 --label -1", "--label .*-1"),
    ("--sample 4 --label 3 --unconditional", "--unconditional goes with neither"),
    ("--sample 4 --guidance 1 --unconditional", "--unconditional goes with neither"),
    ("--sample 4 --out runs/plain --label 1", "learned labels; that in runs/plain did not"),
    ("--sample 4 --out runs/plain --guidance 1", "learned labels; that in runs/plain did not"),
    ("--sample 4 --sampler ddpm --eta 0.5", "--eta 0.5 is DDIM's"),
    ("--sample 4 --sampler euler", "sampler.*euler"),
    ("--sample 4 --sampling-batch 0", "--sampling-batch .*0"),
    ("--sample 4 --seed -2", "--seed .*-2"),
    ("--sample 4 --seed 4294967296", "--seed must lie in 0…4294967295, got 4294967296$"),
    ("--sample 4 --lr 1", "--lr does not go with --sample"),
    ("--sample 4 --steps 10", "--steps does not go with --sample"),
    ("--sample 4 --resume", "--resume does not go with --sample"),
    ("--evaluate 0", "--evaluate .*0"),
    ("--evaluate --eta 1", "--eta does not go with --evaluate"),
]


@pytest.mark.parametrize("line, words", REFUSED, ids=[line or "nothing" for line, _ in REFUSED])
def test_command_line_refuses(line, words, trained, monkeypatch, capsys):
    """One line that names the value, exit status 2, nothing written, no code of a foreign checkpoint run."""
    monkeypatch.chdir(trained)
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert cli(*line.split()) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("ddpm.py: error: ") and re.search(words, message[0]), message
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


X, TT = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
ZERO = lambda x, t: torch.zeros_like(x)
PUBLIC = dict(
    no_betas=(lambda: GaussianDiffusion([]), "betas"),
    beta_of_1=(lambda: GaussianDiffusion([0.5, 1.0]), "betas"),
    beta_of_0=(lambda: GaussianDiffusion([0.0, 0.5]), "betas"),
    betas_nan=(lambda: GaussianDiffusion([math.nan]), "betas"),
    betas_square=(lambda: GaussianDiffusion([[0.5]]), "betas"),
    variance=(lambda: GaussianDiffusion([0.5, 0.999], "big"), "big"),
    loss=(lambda: GaussianDiffusion([0.5, 0.999], loss="l2"), "l2"),
    pixels=(lambda: GaussianDiffusion(BETAS).q_sample(X.to(torch.uint8), TT, X), "uint8"),
    noise=(lambda: GaussianDiffusion(BETAS).q_sample(X, TT, X[:1]), r"\(1, 1, 4, 4\)"),
    t_short=(lambda: GaussianDiffusion(BETAS).q_sample(X, TT[:1]), r"\(2,\)"),
    t_float=(lambda: GaussianDiffusion(BETAS).q_sample(X, TT / 2), "int64"),
    t_negative=(lambda: GaussianDiffusion(BETAS).q_sample(X, TT - 1), "-1"),
    t_large=(lambda: GaussianDiffusion(BETAS).q_sample(X, 1000), "0…999, got 1000"),
    t_below=(lambda: GaussianDiffusion(BETAS).p_sample(ZERO, X, -1), "-1"),
    t_too_large=(lambda: GaussianDiffusion(BETAS).q_sample(X, TT + 999), "0…999, got .*1000"),
    model=(lambda: GaussianDiffusion(BETAS).p_sample(lambda x, t: x[:, :, :2], X, 5), r"\(2, 1, 2, 4\)"),
    model_learned=(lambda: GaussianDiffusion(BETAS, "learned_range").p_sample(ZERO, X, 5), "2 channels"),
    eta=(lambda: GaussianDiffusion(BETAS).ddim_sample(ZERO, X, 5, 3, eta=1.2), "1.2"),
    prev_t=(lambda: GaussianDiffusion(BETAS).ddim_sample(ZERO, X, 5, 5), "prev_t=5"),
    ddim_t=(lambda: GaussianDiffusion(BETAS).ddim_sample(ZERO, X, 1000, 3), "got 1000"),
    prev_t_high=(lambda: GaussianDiffusion(BETAS).ddim_sample(ZERO, X, 5, 2000), "prev_t=2000 with t=5"),
    prev_t_low=(lambda: GaussianDiffusion(BETAS).ddim_sample(ZERO, X, 5, -2), "prev_t=-2"),
    steps_0=(lambda: GaussianDiffusion(BETAS).ddim_timesteps(0), "got 0"),
    steps_T=(lambda: GaussianDiffusion(BETAS).ddim_timesteps(1001), "1001"),
    no_classes=(lambda: classifier_free_guidance(UNet(dim=4, image_size=8), TT, 1.0), "num_classes"),
    label=(lambda: classifier_free_guidance(Labelled(), TT + 4, 1.0), "5"),
    label_low=(lambda: classifier_free_guidance(Labelled(), TT - 1, 1.0), "-1"),
    size=(lambda: UNet(image_size=30), "30 can't be halved 3 times.*multiple of 8"),
    deep=(lambda: small(dim_mults=(1, 1, 1, 1))(torch.zeros(2, 2, 4, 4), TT), "multiples of 8, got"),
    size_0=(lambda: UNet(image_size=0), "0"),
    dim=(lambda: small(dim=6), "6"),
    embedding=(lambda: ddpm.SinusoidalPositionEmbeddings(7), "7"),
    embedding_2=(lambda: ddpm.SinusoidalPositionEmbeddings(2), "2"),
    channels=(lambda: small()(X, TT), r"\(2, 1, 4, 4\)"),
    odd=(lambda: small()(torch.zeros(2, 2, 5, 4), TT), r"\(2, 2, 5, 4\)"),
    flat=(lambda: small()(torch.zeros(2, 2, 4), TT), r"\(2, 2, 4\)"),
    labels=(lambda: small()(torch.zeros(2, 2, 4, 4), TT, TT), "num_classes"),
    levels=(lambda: ddpm.preset("digits", dim_mults=()), "dim_mults"),
    choice=(lambda: ddpm.preset("digits", schedule="x"), "x"),
)


@pytest.mark.parametrize("call, words", PUBLIC.values(), ids=PUBLIC)
def test_public_functions_refuse(call, words):
    """A ValueError with the offending value."""
    with pytest.raises(ValueError, match=words):
        call()


# ---- The museum of mistakes ------------------------------------------------------------------------------------------
# Each was shipped by a public implementation. Each is put into the code here, and the very assertions that guard the
# real code, the guard_… functions above, must then fail, having passed without it.


def method(name):
    """Replace a method of GaussianDiffusion by one that is handed the original."""

    def decorate(wrong):
        original = getattr(GaussianDiffusion, name)
        return lambda patch: patch.setattr(
            GaussianDiffusion, name, functools.partialmethod(lambda self, *a, **k: wrong(self, original, *a, **k))
        )

    return decorate


def function(owner, name, wrong):
    return lambda patch: patch.setattr(owner, name, wrong)


def coefficients(**wrong):
    """Replace buffers after they were made."""
    original = GaussianDiffusion.__init__

    def init(self, *arguments, **more):
        original(self, *arguments, **more)
        for name, change in wrong.items():
            setattr(self, name, change(self))

    return lambda patch: patch.setattr(GaussianDiffusion, "__init__", init)


@method("p_sample")
def noisy_last_step(self, original, model, x_t, t, clip_denoised=True, noise=None, generator=None):
    mean, variance, _, _ = self.p_mean_variance(model, x_t, t, clip_denoised)
    return mean + variance.sqrt() * noise


@method("_alpha_bar")
def alpha_bar_of_0_at_the_end(self, original, t):
    return original(self, torch.as_tensor(t).clamp(min=0))


@method("_alpha_bar")
def alpha_bar_one_step_early(self, original, t):
    return original(self, torch.as_tensor(t) - 1) if t > 0 else original(self, t)


@method("_alpha_bar")
def index_from_the_end(self, original, t):
    return self.alphas_cumprod.double()[t]


@method("ddim_timesteps")
def leading(self, original, steps):
    return [i * (self.timesteps // steps) for i in range(steps)][::-1]


@method("ddim_timesteps")
def one_too_high(self, original, steps):
    return [min(t + 1, self.timesteps) for t in original(self, steps)]


@method("ddim_timesteps")
def floor_stride(self, original, steps):
    return list(range(self.timesteps - 1, -1, -(self.timesteps // steps)))


@method("p_mean_variance")
def never_clamped(self, original, model, x_t, t, clip_denoised=True):
    return original(self, model, x_t, t, False)


@method("_predict")
def told_a_fraction(self, original, model, x_t, t):
    return original(self, lambda x, t: model(x, t / self.timesteps), x_t, t)


@method("predict_noise")
def noise_left_as_it_was(self, original, x_t, t, x_start):
    return torch.zeros_like(x_t)


@method("p_sample_steps")
def one_step_below(self, original, model, x_t, t=None, **more):
    return original(self, model, x_t, None if t is None else t - 1, **more)


@method("ddim_sample_steps")
def another_sampler(self, original, model, x_t, steps, eta=0.0, clip_denoised=True, generator=None):
    return (
        self.p_sample_steps(model, x_t, None, clip_denoised, generator)
        if steps == self.timesteps
        else original(self, model, x_t, steps, eta, clip_denoised, generator)
    )


def saved_buffers(patch, original=GaussianDiffusion.register_buffer):
    patch.setattr(
        GaussianDiffusion, "register_buffer", lambda self, name, value, persistent: original(self, name, value)
    )


def time_after_both_convolutions(patch):
    def forward(self, x, emb):
        h = self.conv2(self.dropout(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))))
        return self.attention(self.shortcut(x) + h + self.time(F.silu(emb))[:, :, None, None])

    patch.setattr(ddpm.ResidualBlock, "forward", forward)


def uncapped_cosine(timesteps, s=0.008):
    f = torch.cos((torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + s) / (1 + s) * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]


def accumulated_in_float32(patch):
    original = torch.Tensor.cumprod
    patch.setattr(torch.Tensor, "cumprod", lambda self, dim: original(self.float(), dim).double())


def raw_weights(patch, original=ddpm.read_checkpoint):
    def read(*arguments):
        checkpoint = original(*arguments)
        return {**checkpoint, "ema": checkpoint["model"]}

    patch.setattr(ddpm, "read_checkpoint", read)


def wrong_guidance(sign, more):
    def guide(model, labels, scale):
        def guided(x_t, t):
            a, b = model(x_t, t, labels), model(x_t, t, torch.full_like(labels, model.num_classes))
            return (more + scale) * a + sign * (scale + more - 1) * b

        return guided

    return guide


def not_restored(owner):
    return lambda patch: patch.setattr(owner, "load_state_dict", lambda self, state, **_: None)


def resumed_from_scratch(patch, original=ddpm.run_train):
    patch.setattr(
        ddpm, "run_train", lambda given: original({k: v for k, v in given.items() if k != "resume"} | {"steps": 1})
    )


def integer_dropout(patch, original=ddpm.parse):
    def parse(arguments):
        mode, given = original(arguments)
        return mode, {**given, "label_dropout": int(given["label_dropout"])}

    patch.setattr(ddpm, "parse", parse)


def guard_resume_without_a_checkpoint_is_refused():
    assert cli("--train", "--resume", "--out", "nowhere") == 2 and not Path("nowhere").exists()


def guard_label_dropout_is_a_number():
    assert ddpm.parse(["--train", "--label-dropout", "0.2"])[1]["label_dropout"] == 0.2


def guard_all_steps_are_ddims():
    x_T, model = torch.randn(1, 1, 2, 2), lambda x, t: torch.tanh(x)
    a, b = (GaussianDiffusion(BETAS).ddim_sample_loop(model, x_T.shape, T, noise=x_T) for _ in range(2))
    assert torch.equal(a, b)


MUSEUM = [
    (1, "noise at the last step", noisy_last_step, guard_no_noise_at_the_last_step),
    (2, "last DDIM step to alpha_bar of t=0", alpha_bar_of_0_at_the_end, guard_ddim_stays_on_the_line),
    (3, "DDIM reads alpha_bar one step early", alpha_bar_one_step_early, guard_ddim_stays_on_the_line),
    (4, "short DDIM starts below T-1", leading, guard_ddim_timesteps),
    (5, "DDIM over all T steps indexes T", one_too_high, guard_ddim_timesteps),
    (6, "prev_t=-1 indexes from the end", index_from_the_end, guard_ddim_stays_on_the_line),
    (7, "schedule among what an EMA averages", saved_buffers, guard_schedule_is_no_state),
    (8, "no EMA at sampling", raw_weights, guard_sampling_uses_the_averaged_weights),
    (9, "x_0 is not clamped", never_clamped, guard_the_clamp_is_on_by_default),
    (
        10,
        "t is never T-1",
        function(
            ddpm.torch, "randint", lambda high, size, original=torch.randint, **k: original(max(1, high - 1), size, **k)
        ),
        guard_training_draws_every_t,
    ),
    (11, "network is told t/T", told_a_fraction, guard_network_feels_time_as_it_is),
    (
        11.5,
        "network ignores t",
        function(ddpm.SinusoidalPositionEmbeddings, "forward", lambda self, t: torch.zeros(len(t), self.dim)),
        guard_network_feels_time_as_it_is,
    ),
    (
        12,
        "pictures on [0, 1]",
        function(ddpm, "to_model", lambda pixels: pixels / 255),
        guard_pixels_are_scaled_to_minus_one_and_one,
    ),
    (
        13,
        "root missing on 1 - alpha_bar",
        coefficients(sqrt_one_minus_alphas_cumprod=lambda d: 1 - d.alphas_cumprod),
        guard_marginal_by_one_vectorised_draw,
    ),
    (
        13.5,
        "root missing on alpha_bar",
        coefficients(sqrt_alphas_cumprod=lambda d: d.alphas_cumprod),
        guard_q_sample_coefficients,
    ),
    (
        14,
        "log of a zero variance",
        coefficients(posterior_log_variance=lambda d: d.posterior_variance.log()),
        guard_bits_per_dim_is_finite,
    ),
    (
        15,
        "cosine beta is not capped",
        function(sys.modules[__name__], "cosine_beta_schedule", uncapped_cosine),
        guard_cosine_is_capped,
    ),
    (16, "alpha_bar accumulated in float32", accumulated_in_float32, guard_coefficients_keep_float32s_last_digit),
    (
        17,
        "linear ends kept at T << 1000",
        function(ddpm, "linear_beta_schedule", lambda timesteps, *_: linear_beta_schedule(timesteps)),
        guard_schedule_of_a_config_ends_in_noise,
    ),
    (
        18,
        "time added after both convolutions",
        time_after_both_convolutions,
        guard_output_starts_at_zero_and_blocks_as_identity,
    ),
    (
        19,
        "batch norm",
        function(ddpm, "GroupNorm", lambda channels, groups: nn.BatchNorm2d(channels)),
        guard_samples_of_a_batch_are_independent,
    ),
    (
        20,
        "guidance with the wrong sign",
        function(sys.modules[__name__], "classifier_free_guidance", wrong_guidance(1, 1)),
        guard_guidance_mixes_as_the_paper_says,
    ),
    (
        20.5,
        "guidance off by one",
        function(sys.modules[__name__], "classifier_free_guidance", wrong_guidance(-1, 0)),
        guard_guidance_mixes_as_the_paper_says,
    ),
    (
        21,
        "dropout on while sampling",
        function(nn.Module, "eval", lambda self: self),
        guard_sampling_is_without_dropout,
    ),
    (22, "resume forgets the EMA", raw_weights, guard_resumed_equals_uninterrupted),
    (22.3, "resume forgets the optimiser", not_restored(torch.optim.Adam), guard_resumed_equals_uninterrupted),
    (
        22.6,
        "resume restarts the data order",
        function(ddpm, "derive_seed", lambda *n, count=iter(range(10**9)): next(count)),
        guard_resumed_equals_uninterrupted,
    ),
    (23, "S that does not divide T", floor_stride, guard_ddim_timesteps),
    (
        24,
        "clamped without recomputing the noise",
        noise_left_as_it_was,
        guard_a_clamped_x_start_takes_its_noise_with_it,
    ),
    (25, "interpolation decodes from t-1", one_step_below, guard_interpolation_starts_at_the_level_it_noised_to),
    (26, "resume starts from scratch in silence", resumed_from_scratch, guard_resume_without_a_checkpoint_is_refused),
    (27, "label dropout parsed as an integer", integer_dropout, guard_label_dropout_is_a_number),
    (28, "S = T runs another sampler", another_sampler, guard_all_steps_are_ddims),
]


@pytest.mark.filterwarnings("ignore:√ᾱ_T")
@pytest.mark.parametrize("row, name, mistake, guard", MUSEUM, ids=[f"{int(row)}: {name}" for row, name, *_ in MUSEUM])
def test_the_museum_of_mistakes(row, name, mistake, guard, folder, monkeypatch):
    """The guard passes on the code as it is, and fails on the code with the mistake put in."""
    if int(row) in (8, 21):
        assert cli("--train", *TINY, "--dropout", 0.5, "--steps", 3) == 0
    guard()
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        mistake(patch)
        for run in ("whole", "part", "cut"):
            if Path(run).exists():
                Path(run).rename(f"{run}-right")
        guard()


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_tells_the_truth():
    """The table paper ↔ code ↔ test names each equation, every name in it is defined, the second column's in ddpm.py
    and the third's here; so are all tests that the answers name; the pictures shown are there and weigh under 2 MB
    together."""
    text = (HERE / "README.md").read_text()
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    rows = [row for row in rows if len(row) == 3 and "`test_" in row[2]]
    numbers = {"DDPM": set(), "DDIM": set(), "Improved DDPM": set()}
    for paper, code, tests in rows:
        which = re.match(r"(DDIM|Improved DDPM)? ?Eq\. ([\d, ]+)", paper)
        if which:
            numbers[which[1] or "DDPM"] |= set(map(int, which[2].strip(" ,").split(",")))
        names = re.findall(r"`(\w+)`", code)
        assert names and all(hasattr(ddpm, name) or hasattr(GaussianDiffusion, name) for name in names), code
        assert re.findall(r"`(test_\w+)`", tests), tests
    assert numbers == {"DDPM": set(range(1, 16)), "DDIM": {12, 16}, "Improved DDPM": {15, 16, 17}}
    assert {"Algorithm 1", "Algorithm 2"} <= {row[0] for row in rows}
    for name in re.findall(r"`(test_\w+)`", text):
        assert callable(globals().get(name)), name
    pictures = [HERE / p for p in re.findall(r"\]\((assets/[^)]+)\)", text)]
    assert pictures and sum(p.stat().st_size for p in pictures) < 2_000_000
    assert (
        text.index("pip install -r requirements.txt && python ddpm.py --train")
        < text.index("pip install -r requirements.txt && pytest")
        < 1500
    )
