"""The proof of ddpm.py: each equation of the paper, derived a second time.

    pytest                       # two to four minutes on two CPU cores
    DDPM_TEST_SEED=7 pytest      # the same tests with other random numbers

The first part follows the paper and can be read beside it. Each test derives the expected value independently of
ddpm.py: in closed form, in exact arithmetic, by numerical integration, by a transcription into NumPy, or with another
library. The second part, below the line "The paper ends here", holds the regression tests of the data, the files, the
devices and the command line.

The paper counts t = 1…T, the code t = 0…T−1. A test that compares random numbers with a distribution states its
false-alarm rate, the probability that it fails although the code is right.

Gaussian worlds. If each pixel of x_0 is distributed as N(m, s²), everything is known in closed form: x_t is distributed
as N(√ᾱ_t m, ᾱ_t s² + 1 − ᾱ_t), and jointly Gaussian with ε, with covariance √(1−ᾱ_t). The network that minimises Eq. 14
is the conditional mean, because a conditional mean minimises a squared error:

    E[ε|x_t] = √(1−ᾱ_t) (x_t − √ᾱ_t m) / (ᾱ_t s² + 1 − ᾱ_t).

With this network each step of a sampler is an affine map of (x_t, z), so the mean and the variance of every x_t can be
computed without random numbers.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import warnings
import weakref
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, ImageSequence
from torch import nn

import bench_ddpm
import ddpm

SEED = int(os.environ.get("DDPM_TEST_SEED", 0))
HERE = Path(__file__).parent

# The paper's schedule (§4), from its definition.
T = 1000
BETAS = np.array([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)])
BARS = np.exp(np.cumsum(np.log1p(-BETAS)))  # ᾱ_t, summed as logarithms
BARS_PREV = np.concatenate([[1.0], BARS[:-1]])  # ᾱ_{t−1}, with ᾱ_0 = 1
BETAS_TILDE = (1 - BARS_PREV) / (1 - BARS) * BETAS  # β̃_t


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(SEED)


PICK_DEVICE = ddpm.pick_device  # as it is, before the patch below


@pytest.fixture(autouse=True, scope="session")
def on_one_thread_of_the_cpu():
    """Tests run on the CPU unless they name another device, so that results are reproducible to the bit, and on one
    thread, which is faster for networks as small as these. The losses in the log are compared on 8 images in place of
    512, for speed alone."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "pick_device", lambda name=None: PICK_DEVICE(name or "cpu"))
        patch.setattr(ddpm, "EXAMPLES", 8)
        yield


@pytest.fixture(autouse=True, scope="session")
def host_reads(request, tmp_path_factory):
    """A function that returns the process of count_host_reads, for the test that needs it. It is started with the
    session, because it takes a while and needs no core of the tests; with pytest -n by the first worker alone, unless
    another one runs that test."""
    processes = []

    def start():
        if not processes:
            process = subprocess.Popen(
                [sys.executable, "-c", "import test_ddpm; print(*test_ddpm.count_host_reads())"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                cwd=tmp_path_factory.mktemp("host_reads"),
            )
            processes.append(process)
        return processes[0]

    wanted = any(item.name == "test_neither_training_nor_sampling_waits_for_the_gpu" for item in request.session.items)
    if wanted and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        start()
    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def exact(variance="fixed_large", betas=BETAS, **options):
    """GaussianDiffusion with its coefficients kept in float64."""
    return ddpm.GaussianDiffusion(betas, variance, dtype=torch.float64, **options)


def column(values, x):
    """Values of shape (B,), shaped so that they multiply x (B, …)."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def predicts_zero(x_t, t):
    """A model that answers ε = 0."""
    return torch.zeros_like(x_t)


def optimal(m, s, bars=BARS):
    """The optimal model E[ε|x_t] for x_0 ~ N(m, s²)."""

    def model(x_t, t):
        bar = column(bars[t], x_t)
        return (1 - bar).sqrt() * (x_t - bar.sqrt() * m) / (bar * s**2 + 1 - bar)

    return model


def knows(x_start, bars=BARS):
    """The perfect model for a single image: it answers the ε that leads from x_start to x_t."""

    def model(x_t, t):
        bar = torch.as_tensor(bars, device=x_t.device)[t]  # by torch, since t may be on another device than the CPU
        bar = bar.to(x_t.dtype).reshape(-1, *[1] * (x_t.dim() - 1))
        return (x_t - bar.sqrt() * x_start) / (1 - bar).sqrt()

    return model


# ---- 1. Noise schedules ----------------------------------------------------------------------------------------------


def test_linear_schedule_is_the_papers():
    """§4: T = 1000, β_t evenly spaced from 1e−4 to 0.02, in float64; other ends are used as given."""
    betas = ddpm.linear_beta_schedule(T)
    assert betas.dtype == torch.float64
    assert betas.shape == (T,)
    np.testing.assert_allclose(betas, BETAS, rtol=1e-12)
    np.testing.assert_allclose(ddpm.linear_beta_schedule(5, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-12)


@pytest.mark.parametrize("s", [0.008, 0.02])
def test_cosine_schedule_is_equation_17(s):
    """Improved DDPM Eq. 17: the product of 1 − β up to t is f(t)/f(0) wherever β_t is below its cap of 0.999, which
    only the last β reaches. s = 0.008 is the default."""
    betas = ddpm.cosine_beta_schedule(T, s)
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    np.testing.assert_allclose(np.cumprod(1 - betas[:-1].numpy()), np.divide(f[1:-1], f[0]), rtol=1e-9)
    assert betas.dtype == torch.float64
    assert betas.shape == (T,)
    assert betas[-1] == 0.999
    assert (betas[:-1] < 0.999).all()
    assert torch.equal(ddpm.cosine_beta_schedule(T), betas) == (s == 0.008)


@pytest.mark.parametrize("timesteps", [1, 10, 1000, 4000])
def test_cosine_schedule_is_capped_at_every_length(timesteps):
    """Without the cap β_T = 1, so that ᾱ_T = 0 and Eq. 15 divides by √ᾱ_T = 0."""
    betas = ddpm.cosine_beta_schedule(timesteps)
    assert betas.max() <= 0.999
    x = torch.ones(1, 1)
    assert ddpm.GaussianDiffusion(betas).predict_x_start(x, timesteps - 1, 0 * x).isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_short_schedules_end_in_noise(schedule):
    """§4 asks that x_T be almost N(0, I). A config scales the ends of the linear schedule by 1000/T, so that ᾱ_T < 1e−3
    for every T ≥ 2; the paper's own ᾱ_T is 4e−5, and its unscaled ends at T = 100 would leave 0.36."""
    for timesteps in (2, 3, 5, 10, 19, 20, 21, 50, 100, 250, 1000, 4000):
        diffusion = ddpm.build_diffusion(ddpm.preset("digits", timesteps=timesteps, schedule=schedule))
        assert diffusion.timesteps == timesteps
        assert diffusion.alphas_cumprod[-1] < 1e-3
    if schedule == "linear":
        betas = ddpm.build_diffusion(ddpm.preset("digits", timesteps=500)).betas
        np.testing.assert_allclose(betas[[0, -1]], [2e-4, 0.04], rtol=1e-6)


def test_a_schedule_that_leaves_signal_in_x_T_warns_with_the_number():
    """The paper's ends at T = 100 leave √ᾱ_T = 0.6, here from exact fractions. The limit is 0.05, and the paper's own
    schedule does not warn."""
    left = math.sqrt(math.prod(1 - Fraction(float(b)) for b in np.linspace(1e-4, 0.02, 100)))
    with pytest.warns(UserWarning, match=f"{left:.3f}"):
        ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(100))
    with pytest.warns(UserWarning, match="0.051"):
        ddpm.GaussianDiffusion([1 - 0.051**2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(T))
        ddpm.GaussianDiffusion([1 - 0.049**2])


# ---- 2. The forward process: Eq. 2 and 4 -----------------------------------------------------------------------------


def test_alphas_cumprod_in_exact_fractions():
    """ᾱ_t = ∏ (1 − β_s): the first 60 as exact rational numbers, all 1000 as sums of logarithms."""
    product, diffusion = Fraction(1), exact(betas=ddpm.linear_beta_schedule(T))
    for t, beta in enumerate(ddpm.linear_beta_schedule(T)[:60].tolist()):
        product *= 1 - Fraction(beta)
        assert float(diffusion.alphas_cumprod[t]) == pytest.approx(float(product), rel=1e-14)
    np.testing.assert_allclose(diffusion.alphas_cumprod, BARS, rtol=1e-12)


def test_coefficients_are_computed_in_float64():
    """Each coefficient is its float64 value rounded once to float32, which is at most 6e−8 of the value. Accumulated in
    float32, ᾱ_t would be off by up to 2.7e−7, 4.5 times what this test allows."""
    log_variance = np.log(np.concatenate([BETAS_TILDE[1:2], BETAS_TILDE[1:]]))  # β̃_1 = 0 has no logarithm
    want = dict(
        betas=BETAS,
        log_betas=np.log(BETAS),
        alphas_cumprod=BARS,
        sqrt_alphas_cumprod=np.sqrt(BARS),
        sqrt_one_minus_alphas_cumprod=np.sqrt(-np.expm1(np.cumsum(np.log1p(-BETAS)))),
        posterior_variance=BETAS_TILDE,
        posterior_log_variance=log_variance,
        posterior_mean_x_start=np.sqrt(BARS_PREV) * BETAS / (1 - BARS),
        posterior_mean_x_t=np.sqrt(1 - BETAS) * (1 - BARS_PREV) / (1 - BARS),
    )
    have = dict(ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(T)).named_buffers())
    assert have.keys() == want.keys()
    for name, buffer in have.items():
        assert buffer.dtype == torch.float32
        np.testing.assert_allclose(buffer.double(), want[name], rtol=6.1e-8, atol=0, err_msg=name)


def test_coefficients_are_buffers_outside_the_state_dict():
    """They follow .to(), and neither a checkpoint nor an EMA can hold an old schedule or average one."""
    diffusion = ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(T))
    assert not diffusion.state_dict()
    assert not list(diffusion.parameters())
    assert {buffer.device.type for buffer in diffusion.to("meta").buffers()} == {"meta"}


def test_equation_4_is_equation_2_composed():
    """x_t = √(1−β_t) x_{t−1} + √β_t z, one step at a time: after each of the 1000 steps, mean and variance are those of
    q_sample, whose coefficients are √ᾱ_t and √(1−ᾱ_t)."""
    mean, variance = np.ones(T), np.zeros(T)
    m, v = 1.0, 0.0
    for t in range(T):
        m, v = math.sqrt(1 - BETAS[t]) * m, (1 - BETAS[t]) * v + BETAS[t]
        mean[t], variance[t] = m, v
    ones, zeros, t = torch.ones(T, 1, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.float64), torch.arange(T)
    diffusion = exact(betas=ddpm.linear_beta_schedule(T))
    np.testing.assert_allclose(diffusion.q_sample(ones, t, zeros).flatten(), mean, rtol=1e-11)
    np.testing.assert_allclose(diffusion.q_sample(zeros, t, ones).flatten() ** 2, variance, rtol=1e-11)
    np.testing.assert_allclose(diffusion.q_sample(ones, t, zeros).flatten(), np.sqrt(BARS), rtol=1e-12)
    np.testing.assert_allclose(diffusion.q_sample(zeros, t, ones).flatten(), np.sqrt(1 - BARS), rtol=1e-12)


def test_equation_4_at_every_t_by_sampling():
    """q(x_t|x_0) has mean √ᾱ_t x_0 and variance 1 − ᾱ_t, from 1,000 draws at each t and x_0 = 0.6. One z statistic for
    the mean and one χ² for the variance at each t, and one χ² over all t. False-alarm rate 1e−6 in all. The limits are
    0.2 standard deviations for a mean and 14% for a standard deviation at a single t, and 0.4% for all of them."""
    n = 1000
    t = torch.arange(T).repeat_interleave(n)
    x_t = exact().q_sample(torch.full((T * n, 1, 1, 1), 0.6, dtype=torch.float64), t).reshape(T, n).numpy()
    z = (x_t - np.sqrt(BARS)[:, None] * 0.6) / np.sqrt(1 - BARS)[:, None]
    assert (2 * scipy.stats.norm.sf(np.abs(z.mean(1)) * math.sqrt(n)) > 4e-10).all()
    squares = (z**2).sum(1)
    assert (np.minimum(scipy.stats.chi2.sf(squares, n), scipy.stats.chi2.cdf(squares, n)) > 2e-10).all()
    total = scipy.stats.chi2(T * n)
    assert min(total.sf(squares.sum()), total.cdf(squares.sum())) > 5e-8


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 3, 5, 7), (4, 6), (2, 1, 3, 3, 3)])
def test_any_shape_and_an_int_for_t(shape):
    """Any number of dimensions, channels and pixels works; an int t stands for the whole batch."""
    diffusion, x, noise = exact(), normal(*shape), normal(*shape)
    got = diffusion.q_sample(x, 500, noise)
    np.testing.assert_allclose(got, math.sqrt(BARS[500]) * x + math.sqrt(1 - BARS[500]) * noise, rtol=1e-12)
    assert torch.equal(got, diffusion.q_sample(x, torch.full((shape[0],), 500), noise))
    short = exact(betas=np.linspace(0.05, 0.9, 10))
    assert short.p_sample_loop(predicts_zero, shape).shape == shape
    assert short.ddim_sample_loop(predicts_zero, shape, 7).shape == shape


# ---- 3. The posterior: Eq. 6 and 7 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 10, 200, 500, 998, 999])
def test_posterior_is_bayes_rule_by_integration(t):
    """Eq. 6, 7: q(x_{t−1}|x_t, x_0) ∝ q(x_t|x_{t−1}) q(x_{t−1}|x_0), normalised by numerical integration."""
    x_0, x_t = -0.3, math.sqrt(BARS[t]) * -0.3 + 1.5 * math.sqrt(1 - BARS[t])
    prior = scipy.stats.norm(math.sqrt(BARS[t - 1]) * x_0, math.sqrt(1 - BARS[t - 1]))
    x = prior.mean() + prior.std() * np.linspace(-12, 12, 200_001)  # x_{t−1}
    step = scipy.stats.norm(np.sqrt(1 - BETAS[t]) * x, math.sqrt(BETAS[t]))
    log_density = step.logpdf(x_t) + prior.logpdf(x)
    density = np.exp(log_density - log_density.max())
    mass = scipy.integrate.trapezoid(density, x)
    mean = scipy.integrate.trapezoid(density * x, x) / mass
    variance = scipy.integrate.trapezoid(density * (x - mean) ** 2, x) / mass
    one = torch.ones(1, 1, dtype=torch.float64)
    got_mean, got_variance, got_log_variance = exact().q_posterior(x_0 * one, x_t * one, t)
    assert got_mean.item() == pytest.approx(mean, rel=1e-7)
    assert got_variance.item() == pytest.approx(variance, rel=1e-7)
    assert got_log_variance.item() == pytest.approx(math.log(variance), rel=1e-7)


def test_posterior_of_the_first_step_is_the_image_itself():
    """At paper t = 1, x_{t−1} is x_0: the mean is x_0, the variance 0, and the log variance that of paper t = 2 instead
    of −∞. With T = 1 there is no t = 2, and the log variance is that of β_1."""
    x_0, x_t = normal(2, 1, 2, 2), normal(2, 1, 2, 2)
    mean, variance, log_variance = exact().q_posterior(x_0, x_t, 0)
    np.testing.assert_allclose(mean, x_0, rtol=1e-12)
    assert (variance == 0).all()
    np.testing.assert_allclose(log_variance.exp(), (1 - BARS[0]) / (1 - BARS[1]) * BETAS[1], rtol=1e-9)
    _, _, log_variance = exact(betas=[0.999]).q_posterior(x_0, x_t, 0)
    np.testing.assert_allclose(log_variance.exp(), 0.999, rtol=1e-12)


# ---- 4. The training loss: Eq. 8 to 10, 12 and 14 --------------------------------------------------------------------


def test_equation_14_written_out():
    """L_simple is the mean over images, channels and pixels of (ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t))²."""
    x, noise, t = normal(5, 2, 3, 3), normal(5, 2, 3, 3), torch.tensor([0, 3, 500, 998, 999])
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()
    want = ((noise.numpy() - np.sin(x_t) * t.numpy().reshape(-1, 1, 1, 1) / 100) ** 2).mean()
    got = exact().p_losses(lambda x_t, t: torch.sin(x_t) * t.reshape(-1, 1, 1, 1) / 100, x, t, noise)
    assert got.item() == pytest.approx(want, rel=1e-10)
    assert exact().p_losses(lambda x_t, t: noise, x, t, noise) == 0


def test_the_smallest_loss_is_its_closed_form():
    """In a Gaussian world the smallest L_simple at t is Var(ε|x_t) = ᾱ_t s²/(ᾱ_t s² + 1 − ᾱ_t), by E[ε|x_t]. The loss
    of an affine model is quadratic in x_0 and ε, so its mean over both is that over the four points x_0 = m ± s, ε =
    ±1. Any constant added to the model, and any multiple of x_t's deviation from its mean, adds its own mean
    square."""
    m, s = 0.3, 0.5
    t = torch.arange(T).repeat(4)
    x = torch.tensor([m - s, m - s, m + s, m + s], dtype=torch.float64).repeat_interleave(T)[:, None]
    noise = torch.tensor([-1, 1, -1, 1], dtype=torch.float64).repeat_interleave(T)[:, None]
    model, variance = optimal(m, s), BARS * s**2 + 1 - BARS
    smallest = (BARS * s**2 / variance).mean()
    assert exact().p_losses(model, x, t, noise).item() == pytest.approx(smallest, rel=1e-10)
    shifted = lambda x_t, t: model(x_t, t) + 0.1
    assert exact().p_losses(shifted, x, t, noise).item() == pytest.approx(smallest + 0.01, rel=1e-10)
    steeper = lambda x_t, t: model(x_t, t) + 0.1 * (x_t - column(np.sqrt(BARS) * m, x_t[:T]).repeat(4, 1))
    assert exact().p_losses(steeper, x, t, noise).item() == pytest.approx(smallest + 0.01 * variance.mean(), rel=1e-10)


def test_equations_8_9_10_and_12_are_the_same_loss():
    """Eq. 8, ‖μ̃ − μ_θ‖²/2σ², has μ̃ and μ_θ from the code and is what p_losses returns with loss="bound" (times T, in
    bits). Eq. 9 and 10 put x_t(x_0, ε) into μ̃; in Eq. 12, β²/(2σ²α(1−ᾱ)) ‖ε − ε_θ‖², μ_θ of Eq. 11 is put in too. The
    three are written out here. All agree at every t > 1, for a model that answers anything. With σ_t² = β̃_t the two
    variances agree and Eq. 8's constant C is 0; with β_t it is the KL of the variances alone."""
    diffusion = exact("fixed_small", loss="bound")
    x, noise, guess = normal(T, 2), normal(T, 2), normal(T, 2)
    t = torch.arange(T)
    beta, bar, bar_prev = (torch.as_tensor(k)[:, None] for k in (BETAS, BARS, BARS_PREV))
    sigma2 = torch.as_tensor(BETAS_TILDE)[:, None]
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * noise

    mu_tilde, _, _ = diffusion.q_posterior(x, x_t, t)
    mu, _, _, _ = diffusion.p_mean_variance(lambda x_t, t: guess, x_t, t, clip_denoised=False)
    eq8 = (mu_tilde - mu).square() / (2 * sigma2)

    mu_written = (x_t - beta / (1 - bar).sqrt() * guess) / (1 - beta).sqrt()  # Eq. 11
    x_0 = (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()
    mu_tilde_of_x_0 = bar_prev.sqrt() * beta / (1 - bar) * x_0 + (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar) * x_t
    eq9 = (mu_tilde_of_x_0 - mu_written).square() / (2 * sigma2)
    eq10 = ((x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt() - mu_written).square() / (2 * sigma2)
    eq12 = beta**2 / (2 * sigma2 * (1 - beta) * (1 - bar)) * (noise - guess).square()
    for each in (eq9, eq10, eq12):
        np.testing.assert_allclose(eq8[1:], each[1:], rtol=1e-6, atol=1e-12)
    loss = diffusion.p_losses(lambda x_t, t: guess[1:], x[1:], t[1:], noise[1:])
    assert loss.item() == pytest.approx(T * eq12[1:].mean().item() / math.log(2), rel=1e-8)

    eq12 = beta**2 / (2 * beta * (1 - beta) * (1 - bar)) * (noise - guess).square()
    c = 0.5 * ((beta / sigma2).log() - 1 + sigma2 / beta)
    loss = exact("fixed_large", loss="bound").p_losses(lambda x_t, t: guess[1:], x[1:], t[1:], noise[1:])
    assert loss.item() == pytest.approx(T * (eq12 + c)[1:].mean().item() / math.log(2), rel=1e-8)


def bound_in_numpy(x, noise, t, predicted_noise, v):
    """The terms of Eq. 5 at t in bits/dim, one an element: the KL of q(x_{t−1}|x_t, x_0) to N(μ_θ, σ_t²), and at t = 0
    −log₂ of the mass that Eq. 13 puts on the pixel. log σ_t² = v log β_t + (1−v) log β̃_t (Improved DDPM Eq. 15)."""
    t = t.numpy()
    beta, bar, bar_prev, tilde = (k[t].reshape(-1, *[1] * (x.ndim - 1)) for k in (BETAS, BARS, BARS_PREV, BETAS_TILDE))
    tilde = np.where(tilde == 0, BETAS_TILDE[1], tilde)  # β̃_1 = 0: the authors use β̃_2
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * noise
    mean = (x_t - beta / np.sqrt(1 - bar) * predicted_noise) / np.sqrt(1 - beta)
    sigma2 = np.exp(v * np.log(beta) + (1 - v) * np.log(tilde))
    mean_q = np.sqrt(bar_prev) * beta / (1 - bar) * x + np.sqrt(1 - beta) * (1 - bar_prev) / (1 - bar) * x_t
    kl = 0.5 * (np.log(sigma2 / tilde) - 1 + tilde / sigma2 + (mean_q - mean) ** 2 / sigma2)
    decoder = scipy.stats.norm(mean, np.sqrt(sigma2))
    upper = np.where(x > 0.999, 1, decoder.cdf(x + 1 / 255))
    lower = np.where(x < -0.999, 0, decoder.cdf(x - 1 / 255))
    first = t.reshape(beta.shape) == 0
    return np.where(first, -np.log(np.where(first, upper - lower, 1)), kl) / math.log(2)


def pixels_and_noise():
    """Six images of 8-bit pixels, black and white among them, at t = 0 twice, 1, 7, 400 and 999; small noise, so that
    at t = 0 the mass is well above float64's smallest number."""
    pixels = torch.randint(0, 256, (6, 2, 3, 3))
    pixels[:, 0, 0, :2] = torch.tensor([0, 255])
    t = torch.tensor([0, 0, 1, 7, 400, 999])
    return pixels.double() / 127.5 - 1, normal(6, 2, 3, 3).clamp(-2, 2), t


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_the_bound_as_a_loss_is_T_times_its_mean_term(variance):
    """Eq. 5 for a t drawn uniformly: T times the mean of L_{t−1}, and of L_0 where t = 0, in bits/dim, written out in
    NumPy and scipy. The prediction is far off, so that x̂_0 lies outside of [−1, 1] and is not clamped."""
    x, noise, t = pixels_and_noise()
    v = {"fixed_large": 1, "fixed_small": 0, "learned_range": torch.rand(x.shape, dtype=torch.float64)}[variance]
    guess = torch.where(column(t == 0, x) > 0, 0.5 * noise, -9 * noise)
    model = (lambda x_t, t: torch.cat([guess, v], 1)) if variance == "learned_range" else (lambda x_t, t: guess)
    want = T * bound_in_numpy(x.numpy(), noise.numpy(), t, guess.numpy(), np.asarray(v)).mean()
    loss = exact(variance, loss="bound").p_losses(model, x, t, noise)
    assert loss.item() == pytest.approx(want, rel=1e-7)
    x_t = exact().q_sample(x, t, noise)
    assert (exact().predict_x_start(x_t, t, guess).abs() > 1).any()
    alone = exact(variance, loss="bound").p_losses(lambda x_t, t: model(x_t, t)[:2], x[:2], t[:2], noise[:2])
    first = T * bound_in_numpy(x.numpy(), noise.numpy(), t, guess.numpy(), np.asarray(v))[:2].mean()  # L_0 alone
    assert alone.item() == pytest.approx(first, rel=1e-7)


def test_hybrid_loss_trains_the_mean_by_L_simple_and_the_variance_by_the_bound():
    """Improved DDPM: L_hybrid = L_simple + 0.001 L_vlb, where L_vlb does not train the mean. The value against the
    closed form, t = 0 included; the gradient of ε_θ against L_simple's in closed form, and that of v against 0.001
    L_vlb's by central differences."""
    x, noise, t = pixels_and_noise()
    guess = (0.5 * noise).requires_grad_()
    v = torch.rand(x.shape, dtype=torch.float64, requires_grad=True)
    loss = exact("learned_range").p_losses(lambda x_t, t: torch.cat([guess, v], 1), x, t, noise)
    loss.backward()

    x, noise, guess_, v_ = (k.detach().numpy() for k in (x, noise, guess, v))
    terms = functools.partial(bound_in_numpy, x, noise, t, guess_)
    assert loss.item() == pytest.approx(((noise - guess_) ** 2).mean() + 0.001 * T * terms(v_).mean(), rel=1e-8)
    np.testing.assert_allclose(guess.grad, 2 * (guess_ - noise) / noise.size, rtol=1e-10)
    h = 1e-5
    slope = (terms(v_ + h) - terms(v_ - h)) / (2 * h)  # each term depends on its own v alone
    np.testing.assert_allclose(v.grad, 0.001 * T * slope / v_.size, rtol=1e-4, atol=1e-9 * T)
    assert (v.grad != 0).all()


def test_gradient_of_the_loss_in_closed_form():
    """∇_θ of Algorithm 1's loss for ε_θ = a x_t + b: the derivatives of the mean of (ε − a x_t − b)² written out."""
    x, noise, t = normal(4, 1, 2, 2), normal(4, 1, 2, 2), torch.tensor([0, 10, 500, 999])
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2))
    exact().p_losses(lambda x_t, t: a * x_t + b, x, t, noise).backward()
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()
    error = noise.numpy() - 0.3 * x_t + 0.2
    assert a.grad.item() == pytest.approx((-2 * error * x_t).mean(), rel=1e-9)
    assert b.grad.item() == pytest.approx((-2 * error).mean(), rel=1e-9)


def as_velocity(model):
    """The model whose output for a model's ε is √ᾱ_t ε − √(1−ᾱ_t) x̂_0, with x̂_0 by Eq. 15."""

    def velocity(x_t, t, *labels):
        noise = model(x_t, t, *labels)
        bar = column(BARS[t], x_t)
        x_start = (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * x_start

    return velocity


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_loss_of_a_velocity_written_out(variance):
    """L_simple for prediction="velocity" is the mean of (√ᾱ_t ε − √(1−ᾱ_t) x_0 − output)² in NumPy (Salimans, Ho,
    2022, §4); a learned variance adds the bound of the ε that the output stands for, in NumPy too."""
    x, noise, t = pixels_and_noise()
    bar = BARS[t].reshape(-1, *[1] * (x.dim() - 1))
    x_t = np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()
    output = np.sin(3 * x_t)
    velocity = np.sqrt(bar) * noise.numpy() - np.sqrt(1 - bar) * x.numpy()
    want = ((velocity - output) ** 2).mean()
    v = torch.full_like(x, 0.3)
    model = lambda x_t, t: torch.sin(3 * x_t)
    if variance == "learned_range":
        model = lambda x_t, t: torch.cat([torch.sin(3 * x_t), v], 1)
        meant = np.sqrt(bar) * output + np.sqrt(1 - bar) * x_t  # since x_0 = √ᾱ x_t − √(1−ᾱ) velocity
        want += 0.001 * T * bound_in_numpy(x.numpy(), noise.numpy(), t, meant, v.numpy()).mean()
    got = exact(variance, prediction="velocity").p_losses(model, x, t, noise)
    assert got.item() == pytest.approx(want, rel=1e-8)


def test_a_velocity_and_the_noise_it_stands_for_draw_the_same():
    """The same function, once as ε_θ and once as the velocity: the samplers, the encoder, the score, the likelihood and
    guidance give the same to rounding (float64)."""
    noise_model = lambda x_t, t: torch.tanh(2 * x_t + column(t / T, x_t))
    ours, theirs = exact(prediction="velocity"), exact()
    model = as_velocity(noise_model)
    x_T = normal(2, 1, 4, 4)
    calls = dict(
        ddpm=lambda diffusion, model: ddpm.last(diffusion.p_sample_steps(model, x_T, 20, generator=seeded_by(3))),
        ddim=lambda diffusion, model: diffusion.ddim_sample_loop(
            model, x_T.shape, 7, 0.5, noise=x_T, generator=seeded_by(3)
        ),
        dpm_solver=lambda diffusion, model: diffusion.dpm_solver_sample_loop(model, x_T.shape, 7, noise=x_T),
        encode=lambda diffusion, model: diffusion.ddim_encode_loop(model, x_T, 7),
        score=lambda diffusion, model: diffusion.score(model, x_T, torch.tensor([0, 999])),
        respaced=lambda diffusion, model: respaced(diffusion, model, x_T),
        bits=lambda diffusion, model: diffusion.bits_per_dim(model, x_T.clamp(-1, 1), generator=seeded_by(3))["total"],
    )
    for name, call in calls.items():
        np.testing.assert_allclose(call(ours, model), call(theirs, noise_model), rtol=1e-7, atol=1e-7, err_msg=name)

    labelled = lambda x_t, t, y: torch.tanh(2 * x_t + column(y, x_t))
    labels = torch.tensor([0, 2])
    guided = []
    for diffusion, model in ((ours, as_velocity(labelled)), (theirs, labelled)):
        model.num_classes = 3
        with_guidance = ddpm.classifier_free_guidance(model, labels, 1.5)
        guided.append(diffusion.dpm_solver_sample_loop(with_guidance, x_T.shape, 7, noise=x_T))
    np.testing.assert_allclose(*guided, rtol=1e-7, atol=1e-7)


def seeded_by(seed):
    return torch.Generator().manual_seed(seed)


def respaced(diffusion, model, x_T):
    """x_0 of Algorithm 2 in 7 steps."""
    short, short_model = diffusion.respace(model, 7)
    return short.p_sample_loop(short_model, x_T.shape, noise=x_T, generator=seeded_by(3))


def test_errors_of_a_velocity_are_not_magnified():
    """An output that is wrong by 1 makes x̂_0 wrong by √(1−ᾱ_t) < 1 if it is a velocity, and by √(1−ᾱ_t)/√ᾱ_t, which is
    157 at t = T, if it is ε."""
    x, noise, t = normal(T, 2), normal(T, 2), torch.arange(T)
    x_t = exact().q_sample(x, t, noise)
    for prediction, model, factor in (
        ("noise", lambda x_t, t: noise + 1, np.sqrt((1 - BARS) / BARS)),
        ("velocity", lambda x_t, t: as_velocity(lambda x_t, t: noise)(x_t, t) + 1, np.sqrt(1 - BARS)),
    ):
        _, _, _, guess = exact(prediction=prediction).p_mean_variance(model, x_t, t, clip_denoised=False)
        np.testing.assert_allclose((x - guess).abs(), np.stack([factor] * 2, 1), rtol=1e-7)


def test_plain_mistakes_of_a_caller_are_named_in_one_line():
    """8-bit images, a model that returns what diffusers' networks return, t as a list, labels that are guided by NaN,
    betas that reach 1: a ValueError that says what would be right."""
    diffusion, x = exact(), normal(2, 1, 4, 4)
    bytes_ = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    t = torch.tensor([3, 4])
    model = lambda x_t, t, y=None: predicts_zero(x_t, t)
    model.num_classes = 2
    floats = r"images must be floats scaled to \[-1, 1\], got torch.uint8"
    for call, wanted in (
        (lambda: diffusion.q_sample(bytes_, t), floats),
        (lambda: diffusion.p_losses(model, bytes_, t), floats),
        (lambda: diffusion.interpolate(model, bytes_, bytes_, 3, 0.5), floats),
        (lambda: diffusion.bits_per_dim(model, bytes_), floats),
        (lambda: diffusion.p_sample(model, x, 3, noise=bytes_), "noise must be floats"),
        (lambda: diffusion.p_losses(lambda x_t, t: (x_t,), x, t), "the model must return a tensor, got tuple"),
        (lambda: exact(prediction="velocity").score(model, x.half(), t), "a velocity needs x_t in float32 or float64"),
        (lambda: diffusion.q_sample(x, [3, 4]), "t must be an int or int64 of shape"),
        (lambda: diffusion.q_sample(x, 2.0), "t must be an int or int64 of shape"),
        (lambda: diffusion.q_sample(x, torch.tensor([3, 1000])), r"t must lie in 0…999, got 3…1000"),
        (lambda: list(diffusion.p_sample_steps(model, x, -1)), "t must lie in 0…999, got -1"),
        (lambda: ddpm.classifier_free_guidance(model, t % 2, math.nan), "scale must be finite, got nan"),
        (lambda: exact(betas=np.linspace(1e-4, 1, 1000)), r"betas .*shape \(1000,\) and values in 0.0001…1$"),
        (lambda: ddpm.UNet(dropout=math.nan), "dropout must be at least 0 and below 1, got nan"),
        (lambda: ddpm.preset("digits", "big"), "must be one of digits, .*, gpu, got 'big'"),
        (lambda: ddpm.preset(""), "data must not be empty"),
        (lambda: ddpm.load_data("digits", image_size=0), "image_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=wanted) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- 5. The reverse process: Eq. 11, 15 and Algorithm 2 --------------------------------------------------------------


def test_equation_15_inverts_equation_4():
    """x̂_0 from the true ε is x_0, and ε from the true x_0 is ε, at every t; x̂_0 against Eq. 15 written out. With the
    optimal ε_θ of a Gaussian world x̂_0 is E[x_0|x_t]."""
    x, noise, t = normal(T, 2), normal(T, 2), torch.arange(T)
    diffusion = exact()
    x_t = diffusion.q_sample(x, t, noise)
    np.testing.assert_allclose(diffusion.predict_x_start(x_t, t, noise), x, atol=1e-10)
    np.testing.assert_allclose(diffusion.predict_noise(x_t, t, x), noise, atol=1e-10)
    want = (x.numpy() - np.sqrt(1 - BARS[:, None]) * noise.numpy()) / np.sqrt(BARS[:, None])
    np.testing.assert_allclose(diffusion.predict_x_start(x, t, noise), want, rtol=1e-9, atol=1e-12)
    pred_x_start = diffusion.predict_x_start(x, t, optimal(0.3, 0.5)(x, t))
    gain = np.sqrt(BARS) * 0.5**2 / (BARS * 0.5**2 + 1 - BARS)  # Cov(x_0, x_t)/Var(x_t)
    want = 0.3 + gain[:, None] * (x.numpy() - np.sqrt(BARS[:, None]) * 0.3)
    np.testing.assert_allclose(pred_x_start, want, rtol=1e-8, atol=1e-9)


def test_equation_11_both_forms_agree_without_the_clamp():
    """μ̃_t(x_t, x̂_0), which the code computes, is (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t, which Algorithm 2 states, at every
    t."""
    x_t, noise, t = normal(T, 3), normal(T, 3), torch.arange(T)
    mean, _, _, pred_x_start = exact().p_mean_variance(lambda x_t, t: noise, x_t, t, clip_denoised=False)
    beta, bar, x, eps = BETAS[:, None], BARS[:, None], x_t.numpy(), noise.numpy()
    np.testing.assert_allclose(mean, (x - beta / np.sqrt(1 - bar) * eps) / np.sqrt(1 - beta), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(pred_x_start, (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar), rtol=1e-9, atol=1e-9)


def test_the_clamp_is_on_by_default():
    """A model that answers ε = 0 to x_t = ±2 at t = 700 claims x̂_0 = ±2/√ᾱ_t. Eq. 7 is given ±1 instead, as in the
    authors' code."""
    x_t = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    for sign in (1, -1):
        mean, _, _, pred_x_start = exact().p_mean_variance(predicts_zero, sign * x_t, 700)
        to_x_start = math.sqrt(BARS[699]) * BETAS[700] / (1 - BARS[700])
        to_x_t = math.sqrt(1 - BETAS[700]) * (1 - BARS[699]) / (1 - BARS[700])
        assert pred_x_start.item() == sign
        assert mean.item() == pytest.approx(sign * (to_x_start + 2 * to_x_t), rel=1e-9)


@pytest.mark.parametrize("clip", [None, True, False])
def test_every_sampler_passes_clip_denoised_on(clip):
    """From x_T = 1 with ε_θ = 0 and no noise, x_0 is 1 with the clamp, which is the default, and 1/√ᾱ_T = 157 without,
    for each sampler, step by step and as a loop: without the clamp each step divides by √α_t."""
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    how = {} if clip is None else dict(clip_denoised=clip)
    want = 1 / math.sqrt(BARS[-1]) if clip is False else 1.0
    quiet = exact("fixed_small", betas=BETAS)
    quiet.posterior_variance.zero_()  # σ_t² of "fixed_small" is read from it: Algorithm 2 without noise
    ends = dict(
        p_sample_loop=quiet.p_sample_loop(predicts_zero, ones.shape, noise=ones, **how),
        p_sample_steps=list(quiet.p_sample_steps(predicts_zero, ones, **how))[-1],
        ddim_sample_loop=quiet.ddim_sample_loop(predicts_zero, ones.shape, 10, noise=ones, **how),
        ddim_sample_steps=list(quiet.ddim_sample_steps(predicts_zero, ones, 10, **how))[-1],
        ddim_sample=quiet.ddim_sample(predicts_zero, ones, 999, -1, **how),
        dpm_solver_sample_loop=quiet.dpm_solver_sample_loop(predicts_zero, ones.shape, 10, noise=ones, **how),
        dpm_solver_sample_steps=list(quiet.dpm_solver_sample_steps(predicts_zero, ones, 10, **how))[-1],
    )
    for name, x_0 in ends.items():
        assert x_0.item() == pytest.approx(want, rel=1e-6), name
    x_s = quiet.p_sample(predicts_zero, ones, 999, **how)
    pred_x_start = want if clip is False else 1.0
    to_x_start = math.sqrt(BARS[998]) * BETAS[999] / (1 - BARS[999])
    to_x_t = math.sqrt(1 - BETAS[999]) * (1 - BARS[998]) / (1 - BARS[999])
    assert x_s.item() == pytest.approx(to_x_start * pred_x_start + to_x_t, rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_the_three_variances(variance):
    """§3.2: β_t or β̃_t. Improved DDPM Eq. 15: exp(v log β_t + (1−v) log β̃_t) for random v, v = 1 and v = 0."""
    tilde_log = np.log(np.concatenate([BETAS_TILDE[1:2], BETAS_TILDE[1:]]))[:, None]
    x_t, t, v = normal(T, 2), torch.arange(T), torch.rand(T, 2, dtype=torch.float64)
    v[:2], v[-2:] = 1, 0
    model = (lambda x, t: torch.cat([x, v], 1)) if variance == "learned_range" else (lambda x, t: x)
    _, got, got_log, _ = exact(variance).p_mean_variance(model, x_t, t)
    learned_log = v.numpy() * np.log(BETAS)[:, None] + (1 - v.numpy()) * tilde_log
    want, want_log = {
        "fixed_large": (BETAS[:, None], np.log(BETAS)[:, None]),
        "fixed_small": (BETAS_TILDE[:, None], tilde_log),
        "learned_range": (np.exp(learned_log), learned_log),
    }[variance]
    np.testing.assert_allclose(got.expand(T, 2), np.broadcast_to(want, (T, 2)), rtol=1e-9)
    np.testing.assert_allclose(got_log.expand(T, 2), np.broadcast_to(want_log, (T, 2)), rtol=1e-9)


# σ_t² of each variance; a learned one for v = 0.3, where β̃_1 = 0 is replaced by β̃_2.
LOG_TILDE = np.log(np.concatenate([BETAS_TILDE[1:2], BETAS_TILDE[1:]]))
VARIANCES = dict(
    fixed_large=BETAS, fixed_small=BETAS_TILDE, learned_range=np.exp(0.3 * np.log(BETAS) + 0.7 * LOG_TILDE)
)


def with_v(variance, model):
    """The model, with v = 0.3 beside its ε if the variance is learned."""
    if variance != "learned_range":
        return model
    return lambda x_t, t: torch.cat([model(x_t, t), torch.full_like(x_t, 0.3)], 1)


@pytest.mark.parametrize("variance, sigma2", VARIANCES.items(), ids=VARIANCES)
def test_no_noise_at_the_last_step(variance, sigma2):
    """Algorithm 2 has z = 0 at paper t = 1: x_0 does not depend on the noise, and x_{t−1} contains σ_t of it elsewhere,
    for a batch of different t and for an int t."""
    x, ones, t = normal(3, 1), torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 1, 999])
    diffusion, model = exact(variance), with_v(variance, predicts_zero)
    noisy, quiet = (diffusion.p_sample(model, x, t, noise=z) for z in (ones, 0 * ones))
    want = [0, math.sqrt(sigma2[1]), math.sqrt(sigma2[999])]
    np.testing.assert_allclose((noisy - quiet).flatten(), want, rtol=1e-9)
    for i, step in enumerate(t.tolist()):
        one = diffusion.p_sample(model, x[i : i + 1], step, noise=ones[i : i + 1])
        np.testing.assert_allclose(one, noisy[i : i + 1], rtol=1e-12)


@pytest.mark.parametrize("variance, sigma2", VARIANCES.items(), ids=VARIANCES)
def test_algorithm_2_in_numpy(variance, sigma2):
    """Algorithm 2 transcribed from the paper, all 1000 steps, on the same noise and with the same nonlinear model."""
    generator = torch.Generator().manual_seed(SEED + 1)
    noise = [torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64).numpy() for _ in range(T)]
    x = noise[0]
    for t in range(T, 0, -1):
        alpha, bar = 1 - BETAS[t - 1], BARS[t - 1]
        z = noise[T - t + 1] if t > 1 else 0
        mean = (x - (1 - alpha) / math.sqrt(1 - bar) * np.tanh(x + t / T)) / math.sqrt(alpha)
        x = mean + math.sqrt(sigma2[t - 1]) * z
    got = exact(variance).p_sample_loop(
        with_v(variance, lambda x_t, t: torch.tanh(x_t + column((t + 1) / T, x_t))),
        (2, 1, 2, 2),
        clip_denoised=False,
        generator=torch.Generator().manual_seed(SEED + 1),
    )
    np.testing.assert_allclose(got, x, rtol=1e-7, atol=1e-9)


def test_section_2_alone_trains_and_samples():
    """Eq. 14, Algorithm 2 and the score, on nothing but DDPM; GaussianDiffusion overrides nothing of it."""
    diffusion = ddpm.DDPM(BETAS, dtype=torch.float64)
    x, t, noise = normal(4, 3), torch.tensor([0, 9, 99, 999]), normal(4, 3)
    answer = column([1.0, 2.0, 3.0, 4.0], x).expand_as(x)
    want = ((noise - answer).numpy() ** 2).mean()
    assert diffusion.p_losses(lambda x_t, t: answer, x, t, noise).item() == pytest.approx(want, rel=1e-12)
    np.testing.assert_allclose(
        diffusion.score(lambda x_t, t: noise, x, 99), -noise / math.sqrt(1 - BARS[99]), rtol=1e-9
    )
    # A model that knows x_0 = ½: the last step returns it without noise
    oracle = lambda x_t, t: (x_t - column(np.sqrt(BARS)[t] / 2, x_t)) / column(np.sqrt(1 - BARS)[t], x_t)
    np.testing.assert_allclose(diffusion.p_sample_loop(oracle, (4, 3)), 0.5, rtol=1e-9)
    added = {name for name in vars(ddpm.GaussianDiffusion) if not name.startswith("__")}
    assert not added & set(vars(ddpm.DDPM))


def affine_chain(step, pairs):
    """Follow N(0, 1) from x_T to x_0 through steps that are affine in (x_t, z): the slope, the offset and the weight
    of z are read off at (x_t, z) = (0, 0), (1, 0) and (0, 1). Yields (s, mean, variance, product of slopes) after each
    step from t to s."""
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    mean, variance, product = 0.0, 1.0, 1.0
    for t, s in pairs:
        offset, at_one, at_noise = step(x, t, s, z).flatten().tolist()
        slope, weight = at_one - offset, at_noise - offset
        mean, variance, product = slope * mean + offset, slope**2 * variance + weight**2, slope * product
        yield s, mean, variance, product


EVERY_STEP = [(t, t - 1) for t in reversed(range(T))]  # code t; s = −1 is x_0


def ancestral(diffusion, model):
    """A step of Algorithm 2 for affine_chain."""
    return lambda x, t, s, z: diffusion.p_sample(model, x, t, clip_denoised=False, noise=z)


def test_fixed_large_is_exact_for_standard_normal_data():
    """§3.2: with σ_t² = β_t and x_0 ~ N(0, 1), every x_t of the reverse chain is N(0, 1): the optimal ε_θ is √(1−ᾱ_t)
    x_t, so μ_θ = √α_t x_t, and the variance stays α_t + β_t = 1. Only the last step, which adds no noise, leaves α_1 =
    0.9999 of it."""
    for s, mean, variance, _ in affine_chain(ancestral(exact("fixed_large"), optimal(0.0, 1.0)), EVERY_STEP):
        assert mean == pytest.approx(0, abs=1e-12)
        assert variance == pytest.approx(1 if s >= 0 else 1 - BETAS[0], abs=1e-12)


def test_fixed_small_is_exact_for_a_single_point():
    """§3.2: with σ_t² = β̃_t and a single image m as data, p_θ(x_{t−1}|x_t) = q(x_{t−1}|x_t, x_0 = m). Started from
    q(x_T|x_0) the chain would have q's marginals. N(0, 1) differs from q(x_T|x_0) by −√ᾱ_T m in the mean and by ᾱ_T in
    the variance; affine steps multiply these by P and P², P being the product of the slopes so far. So x_s has mean
    (√ᾱ_s − P√ᾱ_T) m and variance 1 − ᾱ_s + P²ᾱ_T, and x_0 is m."""
    for s, mean, variance, product in affine_chain(ancestral(exact("fixed_small"), optimal(0.7, 0.0)), EVERY_STEP):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx((math.sqrt(bar) - product * math.sqrt(BARS[-1])) * 0.7, abs=1e-12)
        assert variance == pytest.approx(1 - bar + product**2 * BARS[-1], abs=1e-12)
    assert (mean, variance) == pytest.approx((0.7, 0.0), abs=1e-12)


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.3, 0.5), (-0.4, 0.1), (0.7, 0.0)])
@pytest.mark.parametrize("variance, sigma2", [("fixed_large", BETAS), ("fixed_small", BETAS_TILDE)])
def test_the_error_of_a_fixed_variance_in_between(m, s, variance, sigma2):
    """For x_0 ~ N(m, s²), p(x_{t−1}|x_t) has the variance β_t (1 − β_t/v_t)/α_t with v_t = ᾱ_t s² + 1 − ᾱ_t, which lies
    between β̃_t and β_t, and equals them for s = 0 and s = 1. The whole chain with Algorithm 2's coefficients, written
    out; at its end fixed_large is too wide and fixed_small too narrow, each by less than 0.005."""
    v = BARS * s**2 + 1 - BARS
    true_variance = (BETAS * (1 - BETAS / v) / (1 - BETAS))[1:]
    before = (BARS_PREV * s**2 + 1 - BARS_PREV)[1:]  # Var(x_{t−1})
    # Precisions add up: that of x_{t−1}, and α_t/β_t of x_t given x_{t−1}. Inverted, with v_t = α_t before + β_t.
    bayes = 1 / (1 / before + (1 - BETAS[1:]) / BETAS[1:])
    np.testing.assert_allclose(true_variance, bayes, rtol=1e-9)
    assert (BETAS_TILDE[1:] <= true_variance * (1 + 1e-9)).all()
    assert (true_variance <= BETAS[1:] * (1 + 1e-9)).all()
    if s in (0, 1):
        np.testing.assert_allclose(true_variance, (BETAS if s else BETAS_TILDE)[1:], rtol=1e-9)

    mean, var = 0.0, 1.0
    for i, got_mean, got_variance, _ in affine_chain(ancestral(exact(variance), optimal(m, s)), EVERY_STEP):
        t = i + 1
        slope = (1 - BETAS[t] / v[t]) / math.sqrt(1 - BETAS[t])
        mean = slope * mean + BETAS[t] * math.sqrt(BARS[t]) * m / v[t] / math.sqrt(1 - BETAS[t])
        var = slope**2 * var + (sigma2[t] if t else 0)
        assert (got_mean, got_variance) == pytest.approx((mean, var), rel=1e-8, abs=1e-12)
    assert mean == pytest.approx(m, abs=1e-3)
    if 0 < s < 1:
        assert 0 < (math.sqrt(var) - s) * (1 if variance == "fixed_large" else -1) < 0.005


# A mixture ¼ N(−0.6, 0.1²) + ¾ N(0.5, 0.2²) as data: not Gaussian, and still known in closed form.
WEIGHTS, MEANS, SDS = np.array([0.25, 0.75]), np.array([-0.6, 0.5]), np.array([0.1, 0.2])


def mixture_cdf(x):
    return (WEIGHTS * scipy.stats.norm.cdf(np.asarray(x)[..., None], MEANS, SDS)).sum(-1)


def mixture_components(x_t, t):
    """log of weight times density of each component of q(x_t), their means and variances, and ᾱ_t."""
    bar = column(BARS[t], x_t)[..., None]
    mean, variance = bar.sqrt() * torch.as_tensor(MEANS), bar * torch.as_tensor(SDS) ** 2 + 1 - bar
    log = -0.5 * (variance.log() + math.log(2 * math.pi) + (x_t[..., None] - mean) ** 2 / variance)
    return torch.as_tensor(WEIGHTS).log() + log, mean, variance, bar


def mixture_log_density(x_t, t):
    """log q(x_t), differentiable by torch."""
    return torch.logsumexp(mixture_components(x_t, t)[0], -1)


def mixture_model(x_t, t):
    """E[ε|x_t]: that of each component, weighted by the component's probability given x_t."""
    log, mean, variance, bar = mixture_components(x_t, t)
    return (torch.softmax(log, -1) * (1 - bar).sqrt() * (x_t[..., None] - mean) / variance).sum(-1)


def test_algorithm_2_turns_noise_into_the_data():
    """4,000 pixels through Algorithm 2 with E[ε|x_t] of the mixture, against the mixture's distribution function by
    Kolmogorov and Smirnov: false-alarm rate 1e−6, with 0.005 allowed for the error of σ_t² = β_t (0.003 in a simulation
    of 150,000 pixels). The limit is a distance of 0.0475."""
    x_0 = exact().p_sample_loop(mixture_model, (4000, 1), clip_denoised=False).flatten().numpy()
    assert scipy.stats.kstest(x_0, mixture_cdf).statistic < scipy.stats.kstwo.isf(1e-6, 4000) + 0.005


# ---- 6. DDIM, respacing and DPM-Solver -------------------------------------------------------------------------------


def test_ddim_timesteps_are_trailing():
    """S of the T timesteps for every S from 1 to T: T−1 first (Lin et al., 2023), then falling without repetition, each
    within half a timestep of even spacing; for S = T every timestep."""
    diffusion = exact()
    for steps in range(1, T + 1):
        t = diffusion.ddim_timesteps(steps)
        assert len(t) == steps
        assert t[0] == T - 1
        assert t[-1] >= 0
        assert all(a > b for a, b in zip(t, t[1:], strict=False))
        assert all(abs(t[i] + 1 - T * (steps - i) / steps) <= 0.5 for i in range(steps))
    assert diffusion.ddim_timesteps(T) == list(range(T - 1, -1, -1))
    assert diffusion.ddim_timesteps(4) == [999, 749, 499, 249]
    assert ddpm.GaussianDiffusion([0.9, 0.99, 0.999]).ddim_timesteps(2) == [
        2,
        1,
    ]  # round(1.5) − 1: Python rounds 1.5 to 2


def pairs_of(timesteps):
    """(t, prev_t) for each step; the last step goes to x_0, prev_t = −1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def test_ddim_stays_on_the_line_from_noise_to_x_0():
    """The perfect model of an image explains every x_t as √ᾱ_t x_0 + √(1−ᾱ_t) ε. With η = 0 a DDIM step from t to s
    gives √ᾱ_s x_0 + √(1−ᾱ_s) ε, for short steps and long ones; s = −1 is x_0 itself, with ᾱ = 1."""
    x_0, noise = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-1.2]], dtype=torch.float64)
    diffusion = exact()
    for t, s in [(999, 998), (999, 0), (999, -1), (500, 250), (20, 10), (20, -1), (1, 0), (1, -1), (0, -1)]:
        bar = BARS[s] if s >= 0 else 1.0
        x_t = math.sqrt(BARS[t]) * x_0 + math.sqrt(1 - BARS[t]) * noise
        got = diffusion.ddim_sample(knows(x_0), x_t, t, s)
        np.testing.assert_allclose(got, math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3, 49, 600, T])
def test_ddim_lands_on_x_0_in_any_number_of_steps(steps):
    """With the perfect model of an image, whether S divides T or not."""
    x_0 = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64)
    np.testing.assert_allclose(exact().ddim_sample_loop(knows(x_0), x_0.shape, steps), x_0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equations_12_and_16_written_out(eta):
    """Each step of a 37-step run against the two equations in NumPy."""
    diffusion, model = exact(), lambda x_t, t: torch.tanh(x_t)
    for t, s in pairs_of(diffusion.ddim_timesteps(37)):
        x_t, z = normal(2, 1, 2, 2), normal(2, 1, 2, 2)
        bar_t, bar_s = BARS[t], BARS[s] if s >= 0 else 1.0
        eps = np.tanh(x_t.numpy())
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        x_0 = (x_t.numpy() - math.sqrt(1 - bar_t) * eps) / math.sqrt(bar_t)
        want = math.sqrt(bar_s) * x_0 + math.sqrt(max(0, 1 - bar_s - sigma**2)) * eps + sigma * z.numpy()
        got = diffusion.ddim_sample(model, x_t, t, s, eta, clip_denoised=False, noise=z)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_ddim_coefficients_are_float64_for_a_float32_diffusion():
    """1 − ᾱ_1 read back from the float32 buffer would be off by 1.7e−4 of its value, and so would σ and the ε of a
    clamped x̂_0. Unclamped, for the perfect model of x_0 = 0, x_s = √((1−ᾱ_s−σ²)/(1−ᾱ_t)) x_t + σ z; clamped, for a
    model whose x̂_0 is above 1, x_s = √ᾱ_s + √((1−ᾱ_s)/(1−ᾱ_t)) (x_t − √ᾱ_t). Both in float32 to 1e−5."""
    diffusion = ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(T))
    x_t, z = torch.randn(64, 1), torch.randn(64, 1)
    eps = lambda x_t, t: (x_t.double() / column(np.sqrt(1 - BARS[t]), x_t).double()).float()
    for t, s, eta in [(1, 0, 0.0), (1, 0, 1.0), (2, 0, 0.5), (3, 1, 1.0), (500, 0, 0.0)]:
        sigma = eta * math.sqrt((1 - BARS[s]) / (1 - BARS[t])) * math.sqrt(1 - BARS[t] / BARS[s])
        want = math.sqrt((1 - BARS[s] - sigma**2) / (1 - BARS[t])) * x_t.double() + sigma * z.double()
        got = diffusion.ddim_sample(eps, x_t, t, s, eta, clip_denoised=False, noise=z)
        np.testing.assert_allclose(got.double(), want, rtol=1e-5, atol=3e-7)
    for t, s in [(1, 0), (2, 0), (3, 1)]:
        eps = math.sqrt((1 - BARS[s]) / (1 - BARS[t])) * (x_t.double() - math.sqrt(BARS[t]))
        got = diffusion.ddim_sample(lambda x_t, t: torch.full_like(x_t, -1e4), x_t, t, s)
        np.testing.assert_allclose(got.double(), math.sqrt(BARS[s]) + eps, rtol=3e-5, atol=1e-6)


def test_eta_0_is_deterministic_and_eta_above_0_is_not():
    """η = 0, the default: the image is a function of x_T alone, whatever the generator. η > 0 adds noise, however small
    η is."""
    x_T, diffusion = normal(2, 1, 4, 4), exact()
    loop = functools.partial(diffusion.ddim_sample_loop, lambda x_t, t: torch.tanh(x_t), x_T.shape, 10, noise=x_T)
    first, second = (loop(eta=0.0, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    assert torch.equal(first, second)
    assert torch.equal(first, loop())
    first, second = (loop(eta=0.01, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("clip", [True, False])
def test_eta_1_over_all_steps_is_algorithm_2_with_beta_tilde(clip):
    """On the same noise, all T steps of DDIM with η = 1 and of Algorithm 2 with σ_t² = β̃_t give the same image. With
    σ_t² = β_t they do not."""
    model = lambda x_t, t: torch.tanh(x_t + column(t / T, x_t))

    def both(variance):
        diffusion = exact(variance)
        ddim = diffusion.ddim_sample_loop(
            model, (2, 1, 2, 2), T, 1.0, clip, generator=torch.Generator().manual_seed(SEED)
        )
        return ddim, diffusion.p_sample_loop(model, (2, 1, 2, 2), clip, generator=torch.Generator().manual_seed(SEED))

    np.testing.assert_allclose(*both("fixed_small"), rtol=1e-8, atol=1e-10)
    ddim, ancestral_ = both("fixed_large")
    assert (ddim - ancestral_).abs().max() > 1e-4


def test_all_T_steps_of_ddim_are_still_ddim():
    """With S = T and η = 0 the loop is deterministic: it does not switch to Algorithm 2."""
    x_T = normal(1, 1, 2, 2)
    loop = functools.partial(exact().ddim_sample_loop, lambda x_t, t: torch.tanh(x_t), x_T.shape, T, noise=x_T)
    assert torch.equal(loop(), loop())


@pytest.mark.parametrize("m, s, error", [(0.3, 0.5, -0.00302), (-0.4, 0.1, -0.01683)])
def test_ddim_converges_to_the_flow_at_first_order(m, s, error):
    """The deterministic map that keeps standard scores, (x_0 − m)/s = (x_T − √ᾱ_T m)/√Var(x_T), is called the
    probability flow, and DDIM is a first-order method for it: the error of its slope halves when S doubles (a ratio of
    2 ± 0.25 from 125 to 1000 steps). With all 1000 steps the slope is too small by 0.30% for s = 0.5 and by 1.68% for
    s = 0.1, which is the product of the slopes of the steps, √(ᾱ_s/ᾱ_t) (1 − √(1−ᾱ_t) a_t) + √(1−ᾱ_s) a_t for ε_θ =
    a_t (x_t − √ᾱ_t m)."""
    diffusion, model = exact(), optimal(m, s)
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    flow = s / math.sqrt(BARS[-1] * s**2 + 1 - BARS[-1])
    errors = []
    for steps in (125, 250, 500, 1000):
        x_0 = diffusion.ddim_sample_loop(model, x_T.shape, steps, clip_denoised=False, noise=x_T).flatten()
        errors.append((x_0[1] - x_0[0]).item() / flow - 1)
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert ratios == pytest.approx([2, 2, 2], abs=0.25)

    a = np.sqrt(1 - BARS) / (BARS * s**2 + 1 - BARS)
    slopes = np.sqrt(BARS_PREV / BARS) * (1 - np.sqrt(1 - BARS) * a) + np.sqrt(1 - BARS_PREV) * a
    assert (x_0[1] - x_0[0]).item() == pytest.approx(np.prod(slopes), rel=1e-8)
    assert errors[-1] == pytest.approx(error, abs=1e-5)
    assert x_0[0].item() == pytest.approx(m - flow * math.sqrt(BARS[-1]) * m, abs=0.02 * abs(m))


def test_ddim_maps_quantiles_to_quantiles():
    """In one dimension the flow is increasing, so it maps the p-quantile of N(0, 1) to the p-quantile of the data: 99
    quantiles of the mixture, to 0.01 in p, without random numbers."""
    p = np.arange(1, 100) / 100
    x_T = torch.as_tensor(scipy.stats.norm.ppf(p)).reshape(-1, 1)
    x_0 = exact().ddim_sample_loop(mixture_model, x_T.shape, T, clip_denoised=False, noise=x_T).flatten().numpy()
    np.testing.assert_allclose(mixture_cdf(x_0), p, atol=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(eta):
    """DDIM is constructed so that for each x_0 its marginals are q(x_s|x_0). A single image m as data makes x̂_0 = x_0
    exact, so that this can be seen: started from N(0, 1), each x_s of a 23-step run has mean (√ᾱ_s − P√ᾱ_T) m and
    variance 1 − ᾱ_s + P²ᾱ_T, P being the product of the slopes."""
    diffusion, model = exact(), optimal(0.7, 0.0)
    step = lambda x, t, s, z: diffusion.ddim_sample(model, x, t, s, eta, clip_denoised=False, noise=z)
    for s, mean, variance, product in affine_chain(step, pairs_of(diffusion.ddim_timesteps(23))):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx((math.sqrt(bar) - product * math.sqrt(BARS[-1])) * 0.7, abs=1e-12)
        assert variance == pytest.approx(1 - bar + product**2 * BARS[-1], abs=1e-12)


def test_clamped_ddim_recomputes_its_noise():
    """ε_θ = 0 at x_t = 2 and t = 700 is clamped to x̂_0 = 1, and ε becomes (x_t − √ᾱ_t)/√(1−ᾱ_t), so that Eq. 4 still
    gives x_t."""
    x_t = torch.full((1, 1), 2.0, dtype=torch.float64)
    got = exact().ddim_sample(predicts_zero, x_t, 700, 300)
    eps = (2 - math.sqrt(BARS[700])) / math.sqrt(1 - BARS[700])
    assert got.item() == pytest.approx(math.sqrt(BARS[300]) + math.sqrt(1 - BARS[300]) * eps, rel=1e-10)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_respacing_keeps_the_marginals_and_the_models_timesteps(variance, steps):
    """Algorithm 2 in S steps (Nichol, Dhariwal, 2021): the S-step chain composed by Eq. 2 has the old ᾱ at the S
    timesteps kept, σ_t² is β' or β̃' of the jump from s to t (1 − ᾱ_t/ᾱ_s, and that times (1−ᾱ_s)/(1−ᾱ_t)) or between
    the two, and the model is called with the old t. The loss is kept."""
    kept = [math.floor(T * (i + 1) / steps + 0.5) - 1 for i in range(steps)]
    asked = []

    def model(x_t, t):
        asked.extend(t.tolist())
        return with_v(variance, predicts_zero)(x_t, t)

    short, short_model = exact(variance).respace(model, steps)
    assert short.timesteps == steps
    assert short.betas.dtype == torch.float64
    np.testing.assert_allclose(np.cumprod(1 - short.betas.numpy()), BARS[kept], rtol=1e-9)
    x_t = torch.ones(steps, 1, dtype=torch.float64)
    _, sigma2, _, _ = short.p_mean_variance(short_model, x_t, torch.arange(steps), clip_denoised=False)
    assert asked == kept
    before = np.append(1.0, BARS[kept[:-1]])
    jump = 1 - BARS[kept] / before
    tilde = jump * (1 - before) / (1 - BARS[kept])
    learned = jump**0.3 * tilde**0.7  # v = 0.3
    want = dict(fixed_large=jump, fixed_small=tilde, learned_range=learned)[variance]
    first = 1 if variance == "learned_range" else 0  # where β̃' = 0 has no logarithm
    np.testing.assert_allclose(sigma2.flatten()[first:], want[first:], rtol=1e-9)
    other, _ = exact(loss="bound", prediction="velocity").respace(model, steps)
    assert (other.loss_type, other.prediction_type) == ("bound", "velocity")


def test_respaced_algorithm_2_with_beta_tilde_is_ddim_with_eta_1():
    """Two derivations of the same S-step sampler: Algorithm 2 on the respaced chain, and DDIM Eq. 12 with η = 1."""
    diffusion = exact("fixed_small", ddpm.cosine_beta_schedule(100))
    model = lambda x_t, t: torch.sin(3 * x_t + column(t / 100, x_t))
    noises = normal(9, 2, 1, 4, 4)
    short, short_model = diffusion.respace(model, 9)
    a = b = normal(2, 1, 4, 4)
    for i, (t, s) in enumerate(pairs_of(diffusion.ddim_timesteps(9))):
        a = short.p_sample(short_model, a, 8 - i, noise=noises[i])
        b = diffusion.ddim_sample(model, b, t, s, eta=1.0, noise=noises[i])
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def half_log_snr(bar):
    """λ = log(√ᾱ/√(1−ᾱ)); ∞ for ᾱ = 1."""
    with np.errstate(divide="ignore"):
        return 0.5 * np.log(bar) - 0.5 * np.log1p(-bar)


@pytest.mark.parametrize("schedule", [ddpm.linear_beta_schedule, ddpm.cosine_beta_schedule])
def test_dpm_solver_timesteps_are_even_in_log_snr(schedule):
    """S of the T timesteps for any S from 1 to T: T−1 first, falling without repetition. Each is the timestep whose λ
    is nearest to one of S even values, of which the first is λ_{T−1} and λ_0 would be the next one, except where the
    timesteps are sparser in λ than these values, so that it would be taken already, or none would be left for the rest:
    then it is the next one, or the largest that leaves one for each. For the linear schedule and S up to 10 there is no
    exception. S = T is every timestep."""
    betas = schedule(T)
    diffusion = exact(betas=betas)
    lambdas = half_log_snr(np.exp(np.cumsum(np.log1p(-betas.numpy()))))
    for steps in (1, 2, 3, 8, 10, 50, 200, 999, T):
        t = diffusion.dpm_solver_timesteps(steps)
        assert len(t) == steps
        assert t[0] == T - 1
        assert all(a > b for a, b in zip(t, t[1:], strict=False))
        even = [lambdas[-1] + (lambdas[0] - lambdas[-1]) * i / steps for i in range(steps)]
        nearest = [int(np.abs(lambdas - value).argmin()) for value in even]
        if steps <= 10 and schedule is ddpm.linear_beta_schedule:
            assert t == nearest
        for i in range(1, steps):
            taken, too_few = nearest[i] >= t[i - 1], nearest[i] < steps - 1 - i
            assert t[i] == (t[i - 1] - 1 if taken else steps - 1 - i if too_few else nearest[i])
    assert diffusion.dpm_solver_timesteps(T) == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_dpm_solver_in_its_own_exponential_form(steps, clip):
    """DPM-Solver++(2M) as its authors write it, in NumPy: x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D with α = √ᾱ, σ =
    √(1−ᾱ), h = λ_s − λ_t and D = (1 + 1/(2r)) x̂_0(x_t) − 1/(2r) x̂_0(x_r), r = h_before/h (Lu et al., 2022, Algorithm
    2). D is x̂_0 at the first step and at the last, where h = ∞. Every step to 1e−9; S calls of the model, at its S
    times. Both x̂_0 and D are clamped; 7 steps extrapolate beyond [−1, 1]."""
    diffusion, x, asked = exact(), normal(4, 1, 4, 4), []
    eps = lambda x_t: np.sin(3 * x_t)
    model = lambda x_t, t: (asked.append(t.tolist()), torch.sin(3 * x_t))[1]
    got = list(diffusion.dpm_solver_sample_steps(model, x, steps, *[] if clip else [False]))
    times = diffusion.dpm_solver_timesteps(steps)
    assert asked == [[t] * 4 for t in times]
    assert len(got) == steps

    limit = 1.0 if clip else math.inf
    x, before, h_before, outside = x.numpy(), None, None, 0
    for i, (t, s) in enumerate(pairs_of(times)):
        bar_s = BARS[s] if s >= 0 else 1.0
        h = half_log_snr(bar_s) - half_log_snr(BARS[t])
        x_0 = np.clip((x - math.sqrt(1 - BARS[t]) * eps(x)) / math.sqrt(BARS[t]), -limit, limit)
        D = x_0
        if 0 < i < steps - 1:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
            outside += (np.abs(D) > limit).sum()
            D = np.clip(D, -limit, limit)
        x = math.sqrt((1 - bar_s) / (1 - BARS[t])) * x - math.sqrt(bar_s) * np.expm1(-h) * D
        np.testing.assert_allclose(got[i], x, rtol=1e-9, atol=1e-9)
        before, h_before = x_0, h
    assert outside > 0 or steps != 7 or not clip


@pytest.mark.parametrize("clip", [True, False])
def test_dpm_solver_without_extrapolation_is_ddim(clip):
    """Where x̂_0 does not change from step to step, as for the perfect model of one image, nothing is extrapolated, and
    each step is that of DDIM with η = 0, to 1e−12. For any model the first and the last step are."""
    diffusion, x_T = exact(), normal(2, 1, 2, 2)
    pairs = pairs_of(diffusion.dpm_solver_timesteps(9))
    x_t = x_T
    model = knows(torch.full_like(x_T, 0.4))
    for (t, s), got in zip(pairs, diffusion.dpm_solver_sample_steps(model, x_T, 9, clip), strict=True):
        x_t = diffusion.ddim_sample(model, x_t, t, s, clip_denoised=clip)
        np.testing.assert_allclose(got, x_t, rtol=1e-12, atol=1e-12)

    model = lambda x_t, t: torch.tanh(2 * x_t)
    first, *_, last_but_one, x_0 = diffusion.dpm_solver_sample_steps(model, x_T, 9, clip)
    ddim = functools.partial(diffusion.ddim_sample, model, clip_denoised=clip)
    np.testing.assert_allclose(first, ddim(x_T, *pairs[0]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x_0, ddim(last_but_one, *pairs[-1]), rtol=1e-12, atol=1e-12)


def slopes_at_the_last_timestep(timesteps, m, s, counts, run):
    """The relative errors of the slope of x_T → x_t at the last t of S steps, for each S of counts, x_0 ~ N(m, s²) and
    the optimal model; the flow's own slope is √(Var(x_t)/Var(x_T))."""
    betas = np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)
    bars = np.exp(np.cumsum(np.log1p(-betas)))
    diffusion, x_T = exact(betas=betas), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    variances = bars * s**2 + 1 - bars
    errors = []
    for steps in counts:
        x_t = run(diffusion, optimal(m, s, bars), x_T, steps)
        t = diffusion.dpm_solver_timesteps(steps)[-1]
        errors.append((x_t[1] - x_t[0]).item() / math.sqrt(variances[t] / variances[-1]) - 1)
    return errors


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.1)])
def test_dpm_solver_converges_to_the_flow_at_second_order(m, s):
    """When S doubles, the error of the slope of the flow down to the last timestep falls to a quarter (4 ± 0.2 from 64
    to 256 steps); that of DDIM at the same times only to a half. This needs times that are even in λ, and so a fine
    process: T = 100,000. With T = 1000 rounding sets in: near x_0 the 1000 times lie further apart in λ than the even
    ones, so that 512 steps have more than a twentieth of the error of 64 in place of a 64th. (The last step, from there
    to x_0, is DDIM's.)"""

    def dpm_solver(diffusion, model, x_T, steps):
        return list(diffusion.dpm_solver_sample_steps(model, x_T, steps, clip_denoised=False))[-2]

    def ddim(diffusion, model, x_T, steps):
        times = diffusion.dpm_solver_timesteps(steps)
        for t, s in zip(times, times[1:], strict=False):
            x_T = diffusion.ddim_sample(model, x_T, t, s, clip_denoised=False)
        return x_T

    second = slopes_at_the_last_timestep(100_000, m, s, (64, 128, 256), dpm_solver)
    assert [a / b for a, b in zip(second, second[1:], strict=False)] == pytest.approx([4, 4], abs=0.2)
    first = slopes_at_the_last_timestep(100_000, m, s, (64, 128, 256), ddim)
    assert [a / b for a, b in zip(first, first[1:], strict=False)] == pytest.approx([2, 2], abs=0.05)
    assert abs(second[0]) < abs(first[0]) / 20

    coarse = slopes_at_the_last_timestep(T, m, s, (64, 512), dpm_solver)
    assert abs(coarse[1]) > abs(coarse[0]) / 20


@pytest.mark.parametrize("s", [0.5, 0.2, 0.1, 0.05, 0.02])
def test_ten_steps_of_dpm_solver_are_closer_than_fifty_of_ddim(s):
    """The standard deviation of x_0 for x_0 ~ N(0, s²) and the optimal model, on the 0…255 scale: 10 steps miss it by
    at most 1.5 grey levels, 50 steps by 0.3. DDIM misses it by 1.9 or more in 50 steps."""
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    deviation_of_x_T = math.sqrt(BARS[-1] * s**2 + 1 - BARS[-1])

    def miss(loop, steps):
        x_0 = loop(optimal(0.0, s), x_T.shape, steps, clip_denoised=False, noise=x_T)
        return 127.5 * abs((x_0[1] - x_0[0]).item() * deviation_of_x_T - s)

    diffusion = exact()
    assert miss(diffusion.dpm_solver_sample_loop, 10) < 1.5
    assert miss(diffusion.dpm_solver_sample_loop, 50) < 0.3
    assert miss(diffusion.ddim_sample_loop, 50) > 1.9


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_encoding_written_out(steps, clip):
    """DDIM §4.3: its step with η = 0 (Eq. 12) from each time to the next larger one, x_0 itself first, whose noise is
    read at code t = 0, in NumPy. S calls of the model."""
    diffusion, x_0, asked = exact(), 1.5 * normal(2, 1, 2, 2), []
    model = lambda x_t, t: (asked.append(t.tolist()), torch.tanh(x_t + 1))[1]
    got = diffusion.ddim_encode_loop(model, x_0, steps, *[] if clip else [False])
    times = diffusion.ddim_timesteps(steps)[::-1]
    assert asked == [[t, t] for t in [0, *times[:-1]]]

    x = math.sqrt(BARS[times[0]]) * x_0.numpy() + math.sqrt(1 - BARS[times[0]]) * np.tanh(x_0.numpy() + 1)
    for t, later in zip(times, times[1:], strict=False):
        noise = np.tanh(x + 1)
        pred_x_start = (x - math.sqrt(1 - BARS[t]) * noise) / math.sqrt(BARS[t])
        if clip:
            pred_x_start = pred_x_start.clip(-1, 1)
            noise = (x - math.sqrt(BARS[t]) * pred_x_start) / math.sqrt(1 - BARS[t])
        x = math.sqrt(BARS[later]) * pred_x_start + math.sqrt(1 - BARS[later]) * noise
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.25)])
def test_encoding_is_the_inverse_of_the_flow_at_first_order(m, s):
    """In the exact world x_0 → x_T keeps standard scores, as x_T → x_0 does. The error of the slope halves when S
    doubles (2 ± 0.3 from 125 to 500 steps), and so does that of x_0 encoded and decoded again."""
    diffusion, model = exact(), optimal(m, s)
    x_0 = torch.tensor([[m], [m + s]], dtype=torch.float64)
    flow = math.sqrt(BARS[-1] * s**2 + 1 - BARS[-1]) / s
    slopes, returns = [], []
    for steps in (125, 250, 500):
        x_T = diffusion.ddim_encode_loop(model, x_0, steps, clip_denoised=False)
        slopes.append((x_T[1] - x_T[0]).item() / s / flow - 1)
        again = diffusion.ddim_sample_loop(model, x_0.shape, steps, clip_denoised=False, noise=x_T)
        returns.append((again - x_0).abs().max().item())
    for errors in (slopes, returns):
        assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([2, 2], abs=0.3)
    assert abs(slopes[-1]) < 0.02
    assert returns[-1] < 0.03 * s
    assert x_T[0].item() == pytest.approx(math.sqrt(BARS[-1]) * m, abs=0.02 * abs(m))


@pytest.mark.parametrize("sample", ["ddim", "dpm_solver"])
def test_a_learned_variance_does_not_change_a_deterministic_sampler(sample):
    """Only the ε half of the output is used, by DDIM with η = 0, DPM-Solver and encoding."""
    model, x = lambda x_t, t: torch.tanh(x_t), normal(2, 1, 2, 2)
    want, got = (
        getattr(exact(variance), f"{sample}_sample_loop")(with_v(variance, model), x.shape, 6, noise=x)
        for variance in ("fixed_large", "learned_range")
    )
    assert torch.equal(want, got)
    want, got = (
        exact(variance).ddim_encode_loop(with_v(variance, model), x, 6) for variance in ("fixed_large", "learned_range")
    )
    assert torch.equal(want, got)


def test_the_loops_are_their_steps():
    """*_sample_steps yields x_{t−1}, …, x_0; *_sample_loop returns the last; noise= is x_T; p_sample_steps may start at
    any t. No gradients are recorded."""
    diffusion, model = exact(betas=np.linspace(0.05, 0.9, 12)), lambda x_t, t: torch.tanh(x_t + column(t / 12, x_t))
    x_T = normal(1, 1, 2, 2).requires_grad_()
    generator = lambda: torch.Generator().manual_seed(SEED)
    steps = list(diffusion.ddim_sample_steps(model, x_T, 5, 0.5, generator=generator()))
    loop = diffusion.ddim_sample_loop(model, x_T.shape, 5, 0.5, noise=x_T, generator=generator())
    assert len(steps) == 5
    assert torch.equal(steps[-1], loop)
    assert not loop.requires_grad
    x, noise = x_T, generator()
    for x_t, (t, s) in zip(steps, pairs_of(diffusion.ddim_timesteps(5)), strict=True):
        x = diffusion.ddim_sample(model, x, t, s, 0.5, generator=noise)
        assert torch.equal(x, x_t)
    steps = list(diffusion.p_sample_steps(model, x_T, generator=generator()))
    loop = diffusion.p_sample_loop(model, x_T.shape, noise=x_T, generator=generator())
    assert len(steps) == 12
    x, noise = x_T, generator()
    for t in range(11, -1, -1):
        x = diffusion.p_sample(model, x, t, generator=noise)
        assert torch.equal(x, steps[11 - t])
    assert torch.equal(steps[-1], loop)
    assert not loop.requires_grad
    assert len(list(diffusion.p_sample_steps(model, x_T, 4))) == 5
    loop = diffusion.dpm_solver_sample_loop(model, x_T.shape, 5, noise=x_T)
    assert torch.equal(list(diffusion.dpm_solver_sample_steps(model, x_T, 5))[-1], loop)
    assert not loop.requires_grad
    assert not diffusion.ddim_encode_loop(model, x_T, 5).requires_grad


def test_interpolation_is_figure_8():
    """Fig. 8: both images diffused to the same t with the same noise, mixed as (1−λ)x_t + λx'_t, and decoded by
    Algorithm 2 from that t. The model sees the mixture first, at t, whose noise has the level √(1−ᾱ_t) for every λ, and
    then every smaller t; λ = 0 and 1 are the two images' own decodings."""
    a, b, noise = normal(1, 1, 2, 2), normal(1, 1, 2, 2), normal(1, 1, 2, 2)
    diffusion, seen = exact("fixed_small"), []

    def model(x_t, t):
        seen.append((t.item(), x_t))
        return torch.tanh(x_t)

    for weight in (0.0, 0.25, 1.0):
        seen.clear()
        got = diffusion.interpolate(model, a, b, 40, weight, noise, torch.Generator().manual_seed(SEED))
        assert [t for t, _ in seen] == list(range(40, -1, -1))
        mixed = math.sqrt(BARS[40]) * ((1 - weight) * a + weight * b) + math.sqrt(1 - BARS[40]) * noise
        np.testing.assert_allclose(seen[0][1], mixed, rtol=1e-12)
        x, generator = mixed, torch.Generator().manual_seed(SEED)
        for t in range(40, -1, -1):
            x = diffusion.p_sample(model, x, t, generator=generator)
        np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-14)


# ---- 7. The bound: Eq. 3, 5 and 13 -----------------------------------------------------------------------------------


def test_kl_of_gaussians_by_integration():
    """normal_kl against ∫ p log(p/q), integrated by scipy."""
    for m1, v1, m2, v2 in [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 2.0), (1.0, 0.01, 0.9, 0.02)]:
        p, q = scipy.stats.norm(m1, math.sqrt(v1)), scipy.stats.norm(m2, math.sqrt(v2))
        integrand = lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x))
        want, _ = scipy.integrate.quad(integrand, m1 - 12 * v1**0.5, m1 + 12 * v1**0.5, points=[m1])
        arguments = (torch.tensor(k, dtype=torch.float64) for k in (m1, math.log(v1), m2, math.log(v2)))
        assert ddpm.normal_kl(*arguments).item() == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.55, 1.0])
@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.1, 2.0])
def test_equation_13_is_a_distribution_over_256_values(mean, sigma):
    """Each of the 256 probabilities is the mass that scipy's normal distribution puts on its bin, those of 0 and 255
    reaching to −∞ and +∞: to 1e−9 by the distribution function where the mass is above 1e−12, and in the tails, where
    the mass may underflow float64, to 1e−6 by ∫ exp(−x²/2) over the bin relative to its nearest edge. They sum to
    one."""
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean_, log_variance = (torch.tensor(k, dtype=torch.float64) for k in (mean, 2 * math.log(sigma)))
    log_p = ddpm.discretized_gaussian_log_likelihood(x, mean_, log_variance)
    assert log_p.isfinite().all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)

    edges = (np.arange(257) * 2 - 1) / 255 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    a, b = (edges[:-1] - mean) / sigma, (edges[1:] - mean) / sigma
    mass = np.where(
        a > 0, scipy.stats.norm.sf(a) - scipy.stats.norm.sf(b), scipy.stats.norm.cdf(b) - scipy.stats.norm.cdf(a)
    )
    near = mass > 1e-12
    np.testing.assert_allclose(log_p[near].exp(), mass[near], rtol=1e-9)

    # A bin that begins u > 0 standard deviations from the mean, of width w: e^(−u²/2) ∫ e^(−u y − y²/2) dy over [0, w].
    for k in np.flatnonzero(~near):
        u, w = min(abs(a[k]), abs(b[k])), b[k] - a[k]
        y = np.linspace(0, 1, 20_001) * min(w, 50 / u)  # beyond 50/u the integrand is below e^−50
        integral = scipy.integrate.simpson(np.exp(-u * y - y**2 / 2), x=y)
        want = -(u**2) / 2 + math.log(integral) - 0.5 * math.log(2 * math.pi)
        assert log_p[k].item() == pytest.approx(want, rel=1e-6)


def mean_bound(diffusion, model, x_start, t):
    """The sum over t of the terms of Eq. 5, in nats, averaged over ε. The model is affine in x_t, so μ̃ − μ_θ is
    affine and the KL quadratic in ε: E[a + bε + cε²] = a + c, the mean over ε = ±1. p_losses with loss="bound" is T
    times the mean term in bits/dim."""
    x = torch.full((len(t), 1), x_start, dtype=torch.float64)
    both = [diffusion.p_losses(model, x, t, sign * torch.ones_like(x)).item() for sign in (1, -1)]
    return sum(both) / 2 * len(t) / diffusion.timesteps * math.log(2)


def mean_L_T(diffusion, model, x_start):
    """L_T in nats."""
    x = torch.full((1, 1), x_start, dtype=torch.float64)
    return diffusion.bits_per_dim(model, x, clip_denoised=False)["L_T"].item() * math.log(2)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.2, 0.4)])
def test_equation_5_equals_equation_3(m, s, variance):
    """Eq. 5's terms of t > 1 and L_T from the code; Eq. 3 in closed form from the joint Gaussian q(x_{t−1}, x_t|x_0),
    for T = 50. Both without −log p_θ(x_0|x_1), which is the same term in the two. Of Eq. 3's term
    at t = 1 there remains E[log q(x_1|x_0)], which is minus the entropy of q(x_1|x_0)."""
    timesteps, x_0 = 50, 0.35
    betas = np.linspace(2e-3, 0.4, timesteps)
    bars = np.cumprod(1 - betas)
    prev = np.concatenate([[1.0], bars[:-1]])
    sigma2 = betas if variance == "fixed_large" else (1 - prev) / (1 - bars) * betas
    diffusion, model = exact(variance, betas, loss="bound"), optimal(m, s, bars)
    eq5 = mean_L_T(diffusion, model, x_0) + mean_bound(diffusion, model, x_0, torch.arange(1, timesteps))

    # E[−log p(x_T)], then E[−log p_θ(x_{t−1}|x_t) + log q(x_t|x_{t−1})] for each t > 1.
    eq3 = 0.5 * math.log(2 * math.pi) + 0.5 * (bars[-1] * x_0**2 + 1 - bars[-1])
    for t in range(1, timesteps):
        v = bars[t] * s**2 + 1 - bars[t]
        slope = (1 - betas[t] / v) / math.sqrt(1 - betas[t])  # μ_θ = slope x_t + offset
        offset = betas[t] * math.sqrt(bars[t]) * m / v / math.sqrt(1 - betas[t])
        # x_{t−1} − μ_θ, with x_t = √α_t x_{t−1} + √β_t z, has this mean and second moment:
        kept = 1 - slope * math.sqrt(1 - betas[t])
        mean = kept * math.sqrt(prev[t]) * x_0 - offset
        second = mean**2 + kept**2 * (1 - prev[t]) + slope**2 * betas[t]
        eq3 += 0.5 * math.log(2 * math.pi * sigma2[t]) + second / (2 * sigma2[t])
        eq3 -= 0.5 * math.log(2 * math.pi * betas[t]) + 0.5
    eq3 -= 0.5 * math.log(2 * math.pi * (1 - bars[0])) + 0.5
    assert eq5 == pytest.approx(eq3, rel=1e-9)


@pytest.mark.parametrize("x_0", [0.0, 0.4, -0.9])
def test_the_bound_of_an_exact_reverse_process(x_0):
    """For x_0 ~ N(0, 1), fixed_large is the exact reverse process. Eq. 5's terms of t > 1 with L_T are then
    KL(q(x_1|x_0) ‖ p(x_1)) with p(x_1) = N(0, 1): ½(ᾱ_1 x_0² − ᾱ_1 − log(1−ᾱ_1))."""
    diffusion, model = exact("fixed_large", loss="bound"), optimal(0.0, 1.0)
    total = mean_L_T(diffusion, model, x_0) + mean_bound(diffusion, model, x_0, torch.arange(1, T))
    assert total == pytest.approx(0.5 * (BARS[0] * x_0**2 - BARS[0] - math.log(1 - BARS[0])), rel=1e-7)


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.3, 0.5), (-0.4, 0.1)])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_bound_is_the_negative_log_likelihood_plus_a_kl(m, s, variance):
    """L = −log p_θ(x_0) + KL(q(x_{1:T}|x_0) ‖ p_θ(x_{1:T}|x_0)), which makes L a bound. With the optimal ε for N(m,
    s²), p_θ is one Gaussian over (x_0, …, x_T), so both are linear algebra; here for T = 8. −log p_θ(x_0|x_1) is a
    density here and written out: Eq. 13 is about pixels."""
    steps, x_0 = 8, 0.6
    beta = np.linspace(0.05, 0.9, steps)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    slope = np.sqrt(1 - bar) / (bar * s**2 + 1 - bar)  # ε = slope (x_t − √ᾱ m)
    a = (1 - beta / np.sqrt(1 - bar) * slope) / np.sqrt(1 - beta)
    b = beta / np.sqrt(1 - bar) * slope * np.sqrt(bar) * m / np.sqrt(1 - beta)
    sigma2 = beta if variance == "fixed_large" else (1 - before) / (1 - bar) * beta
    sigma2 = np.append(beta[0], sigma2[1:])  # β̃_1 = 0 has no density; any σ_1² would do, it cancels

    # The joint Gaussian of p_θ: (x_0, …, x_T) = mean + mixing z with independent z.
    mean, mixing = np.zeros(steps + 1), np.zeros((steps + 1, steps + 1))
    mixing[steps, steps] = 1
    for t in range(steps, 0, -1):
        mean[t - 1], mixing[t - 1] = a[t - 1] * mean[t] + b[t - 1], a[t - 1] * mixing[t]
        mixing[t - 1, t - 1] = np.sqrt(sigma2[t - 1])
    joint = mixing @ mixing.T

    # p_θ(x_{1:T}|x_0) by conditioning; q(x_{1:T}|x_0) has means √ᾱ_t x_0 and covariances √(ᾱ_j/ᾱ_i) (1−ᾱ_i), i ≤ j.
    gain = joint[1:, 0] / joint[0, 0]
    after = joint[1:, 1:] - np.outer(gain, joint[0, 1:])
    shift = mean[1:] + gain * (x_0 - mean[0]) - np.sqrt(bar) * x_0
    i, j = np.minimum.outer(range(steps), range(steps)), np.maximum.outer(range(steps), range(steps))
    path = np.sqrt(bar[j] / bar[i]) * (1 - bar[i])
    kl = np.trace(np.linalg.solve(after, path)) + shift @ np.linalg.solve(after, shift) - steps
    kl = 0.5 * (kl + np.linalg.slogdet(after)[1] - np.linalg.slogdet(path)[1])
    assert kl > -1e-12  # 0 if p_θ is exact
    want = kl - scipy.stats.norm(mean[0], joint[0, 0] ** 0.5).logpdf(x_0)

    diffusion, model = exact(variance, beta, loss="bound"), optimal(m, s, bar)
    got = mean_L_T(diffusion, model, x_0) + mean_bound(diffusion, model, x_0, torch.arange(1, steps))
    error = (x_0 - a[0] * np.sqrt(bar[0]) * x_0 - b[0]) ** 2 + a[0] ** 2 * (1 - bar[0])
    decoder = 0.5 * np.log(2 * np.pi * sigma2[0]) + error / (2 * sigma2[0])
    assert got + decoder == pytest.approx(want, rel=1e-9)


@pytest.mark.filterwarnings("ignore:√ᾱ_T")
@pytest.mark.parametrize("pixel", [0, 37, 128, 200, 255])
def test_the_bound_with_the_decoder_of_pixels_is_a_bound(pixel):
    """Eq. 3 with Eq. 13: for T = 3 and an affine model, x_1 of p_θ is Gaussian, so −log p_θ of a pixel value is that of
    a bin of one normal distribution, and the 256 values sum to one. The bound, with L_0 integrated over ε by Gauss and
    Hermite, is above it, by less than one nat."""
    beta = np.array([0.05, 0.4, 0.95])
    bar = np.cumprod(1 - beta)
    diffusion, model = exact("fixed_large", beta, loss="bound"), optimal(0.1, 0.5, bar)
    chain = affine_chain(lambda x, t, s, z: diffusion.p_sample(model, x, t, False, noise=z), [(2, 1), (1, 0), (0, -1)])
    _, mean, variance, _ = list(chain)[-1]
    x_0 = scipy.stats.norm(mean, math.sqrt(variance + beta[0]))  # the decoder has σ_1² = β_1, the last step 0
    edges = np.concatenate([[-np.inf], (np.arange(1, 256) * 2 - 1) / 255 - 1, [np.inf]])
    probability = np.diff(x_0.cdf(edges))
    assert probability.sum() == pytest.approx(1, abs=1e-12)

    x = pixel / 127.5 - 1
    bound = mean_L_T(diffusion, model, x) + mean_bound(diffusion, model, x, torch.arange(1, 3))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        one, noise = torch.full((1, 1), x, dtype=torch.float64), torch.full((1, 1), node, dtype=torch.float64)
        L_0 = diffusion.p_losses(model, one, torch.tensor([0]), noise).item() / 3 * math.log(2)
        bound += weight * L_0
    assert 0 < bound + math.log(probability[pixel]) < 1


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_bits_per_dim_of_a_perfect_model(variance):
    """A model that knows x_0 pays for the terms of t > 1 only what σ_t² ≠ β̃_t costs, nothing with fixed_small; L_T is
    the closed form, about 1e−5 bits/dim for random pixels, as in the paper; L_0 is −log₂ of the mass of N(x_0, σ_1²)
    on the pixel's own bin; x̂_0 is x_0."""
    pixels = torch.randint(0, 256, (3, 2, 4, 4))
    pixels[:, 0, 0, :2] = torch.tensor([0, 255])
    x = pixels.double() / 127.5 - 1
    bits = exact(variance).bits_per_dim(knows(x), x)
    shapes = {"total": (3,), "L_T": (3,), "L_{t-1}": (3, T - 1), "L_0": (3,), "squared_error": (3, T)}
    assert {name: tuple(value.shape) for name, value in bits.items()} == shapes
    np.testing.assert_allclose(bits["total"], bits["L_T"] + bits["L_{t-1}"].sum(1) + bits["L_0"], rtol=1e-12)

    bar = BARS[-1]
    kl = 0.5 * (bar * x.numpy() ** 2 - bar - math.log1p(-bar)).mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(bits["L_T"], kl, rtol=1e-6)
    assert bits["L_T"].mean().item() == pytest.approx(1e-5, rel=0.5)
    sigma2 = BETAS[1:] if variance == "fixed_large" else BETAS_TILDE[1:]
    kl = 0.5 * (np.log(sigma2 / BETAS_TILDE[1:]) - 1 + BETAS_TILDE[1:] / sigma2) / math.log(2)
    np.testing.assert_allclose(bits["L_{t-1}"], np.broadcast_to(kl, (3, T - 1)), rtol=1e-6, atol=1e-12)
    assert bits["squared_error"].max() < 1e-20

    sigma2 = BETAS[0] if variance == "fixed_large" else BETAS_TILDE[1]  # β̃_2 in place of β̃_1 = 0
    decoder = scipy.stats.norm(0, math.sqrt(sigma2))
    mass = np.where((pixels == 0) | (pixels == 255), decoder.cdf(1 / 255), 2 * decoder.cdf(1 / 255) - 1)
    np.testing.assert_allclose(bits["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-9)


def test_bits_per_dim_of_a_model_that_is_wrong():
    """A model that takes x_0 + 0.003 for x_0: the squared error is 0.003² at every t, and L_0 is the mass of a shifted
    normal distribution. With the clamp, a model that takes x_0 + 2 for x_0 is taken to mean 1."""
    pixels = torch.randint(0, 256, (3, 2, 4, 4))
    pixels[:, 0, 0, :2] = torch.tensor([0, 255])
    x = pixels.double() / 127.5 - 1
    bits = exact("fixed_small").bits_per_dim(knows(x + 0.003), x, clip_denoised=False)
    np.testing.assert_allclose(bits["squared_error"], np.full((3, T), 0.003**2), rtol=1e-6)
    off = scipy.stats.norm(0.003, math.sqrt(BETAS_TILDE[1]))
    inside = off.cdf(1 / 255) - off.cdf(-1 / 255)
    mass = np.where(pixels == 0, off.cdf(1 / 255), np.where(pixels == 255, off.sf(-1 / 255), inside))
    np.testing.assert_allclose(bits["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-6)
    clamped = exact("fixed_small").bits_per_dim(knows(x + 2), x)["squared_error"]
    np.testing.assert_allclose(clamped, ((1 - x) ** 2).mean((1, 2, 3))[:, None].expand(3, T), atol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_bits_per_dim_is_finite(variance):
    """All terms are finite in float32 for a model that answers 0, although β̃_1 = 0 has no logarithm."""
    x = torch.randint(0, 256, (2, 1, 3, 3)) / 127.5 - 1
    bits = ddpm.GaussianDiffusion(np.linspace(0.005, 0.9, 20), variance).bits_per_dim(predicts_zero, x)
    assert all(value.isfinite().all() for value in bits.values())


# ---- 8. The score (§3.2) ---------------------------------------------------------------------------------------------


def test_score_is_the_gradient_of_the_log_density():
    """−E[ε|x_t]/√(1−ᾱ_t) is ∇ log q(x_t): the mixture's log density differentiated by autograd, at every t."""
    x_t, t = normal(T, 2).requires_grad_(), torch.arange(T)
    (want,) = torch.autograd.grad(mixture_log_density(x_t, t).sum(), x_t)
    np.testing.assert_allclose(exact().score(mixture_model, x_t.detach(), t), want, rtol=1e-8, atol=1e-10)


# ---- 9. Guidance -----------------------------------------------------------------------------------------------------


class Labelled:
    """A model with labels: ε depends on x, t and y; v = 3ε + 1, so that it can be told from ε. Records the labels of
    its calls."""

    num_classes = 4

    def __init__(self, learned_variance=False):
        self.learned_variance, self.asked = learned_variance, []

    def __call__(self, x_t, t, y):
        self.asked.append(y.tolist())
        eps = torch.sin(x_t + column(y, x_t)) + column(t / T, x_t)
        return torch.cat([eps, eps * 3 + 1], 1) if self.learned_variance else eps


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_mixes_as_the_paper_says(w):
    """ε̃ = (1 + w) ε(x, c) − w ε(x): w = 0 is conditional sampling, w = −1 unconditional. v is that of ε(x, c). "No
    label" is a label too, which guidance leaves as it is."""
    x_t, t, y, null = normal(3, 2, 2, 2), torch.tensor([0, 5, 999]), torch.tensor([0, 3, 1]), torch.full((3,), 4)
    conditional, unconditional = Labelled()(x_t, t, y), Labelled()(x_t, t, null)
    got = ddpm.classifier_free_guidance(Labelled(), y, w)(x_t, t)
    torch.testing.assert_close(got, (1 + w) * conditional - w * unconditional)
    got = ddpm.classifier_free_guidance(Labelled(learned_variance=True), y, w)(x_t, t)
    torch.testing.assert_close(got, torch.cat([(1 + w) * conditional - w * unconditional, conditional * 3 + 1], 1))
    got = ddpm.classifier_free_guidance(Labelled(), null, w)(x_t, t)
    torch.testing.assert_close(got, unconditional)


def test_guidance_calls_the_network_once_a_step():
    """Both halves are one batch, the labelled one first; w = 0 needs no second half."""
    y, diffusion = torch.tensor([1, 2]), exact(betas=np.linspace(0.05, 0.9, 10))
    for w, asked in ((2.0, [1, 2, 4, 4]), (0.0, [1, 2])):
        network = Labelled()
        diffusion.ddim_sample_loop(ddpm.classifier_free_guidance(network, y, w), (2, 1, 2, 2), 5)
        assert network.asked == [asked] * 5


def test_the_guided_score_is_that_of_a_sharpened_density():
    """(1 + w) ε(x, c) − w ε(x) gives, at each t, the score ∇ log [q(x_t|c)^(1+w) / q(x_t)^w]; the samples do not
    therefore have the density q(x_0|c)^(1+w) / q(x_0)^w. Two Gaussian classes and their mixture, w = 1.5, by
    autograd."""

    def log_q(x_t, t, m, s=0.3):
        bar = column(BARS[t], x_t)
        v = bar * s**2 + 1 - bar
        return -0.5 * ((x_t - bar.sqrt() * m) ** 2 / v + v.log())

    def log_any(x_t, t):
        return torch.logaddexp(log_q(x_t, t, -0.5), log_q(x_t, t, 0.5)) - math.log(2)

    def network(x_t, t, y):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            each = torch.stack([log_q(x, t, -0.5), log_q(x, t, 0.5), log_any(x, t)])
            log = each.gather(0, y.reshape(1, -1, 1)).sum()
            return -(1 - column(BARS[t], x)).sqrt() * torch.autograd.grad(log, x)[0]

    network.num_classes = 2
    x_t, t, y = normal(6, 1), torch.tensor([0, 9, 99, 300, 700, 999]), torch.tensor([0, 1] * 3)
    x = x_t.clone().requires_grad_()
    log_class = torch.where(y[:, None] == 0, log_q(x, t, -0.5), log_q(x, t, 0.5))
    (want,) = torch.autograd.grad((2.5 * log_class - 1.5 * log_any(x, t)).sum(), x)
    guided = ddpm.classifier_free_guidance(network, y, 1.5)
    np.testing.assert_allclose(exact().score(guided, x_t, t), want, rtol=1e-9)


# ---- 10. Every random draw -------------------------------------------------------------------------------------------
# Each function that draws its own noise, and how the noise is recovered from what it returns or shows to the model. The
# model knows that x_0 = 0 (ε_θ = x_t/√(1−ᾱ_t), x̂_0 = 0), so that samples stay bounded.

FEW = np.linspace(0.05, 0.9, 10)  # the β_t of a short process
FEW_BARS = np.cumprod(1 - FEW)
FEW_BARS_PREV = np.append(1.0, FEW_BARS[:-1])


def recorder(seen):
    """The model that knows x_0 = 0, recording the x_t that it is shown."""
    model = knows(0.0, FEW_BARS)
    return lambda x_t, t: (seen.append(x_t), model(x_t, t))[1]


def noise_of_q_sample(diffusion, x, generator):
    return diffusion.q_sample(x, 9) / math.sqrt(1 - FEW_BARS[9])


def noise_of_p_losses(diffusion, x, generator):
    seen = []
    diffusion.p_losses(recorder(seen), x, 9)
    return seen[0] / math.sqrt(1 - FEW_BARS[9])


def noise_of_p_sample(diffusion, x, generator):
    return diffusion.p_sample(predicts_zero, x, 9, generator=generator) / math.sqrt(FEW[9])


def noise_of_ddim_sample(diffusion, x, generator):
    sigma = math.sqrt((1 - FEW_BARS[4]) / (1 - FEW_BARS[9])) * math.sqrt(1 - FEW_BARS[9] / FEW_BARS[4])
    return diffusion.ddim_sample(predicts_zero, x, 9, 4, 1.0, generator=generator) / sigma


def noise_of_bits_per_dim(diffusion, x, generator):
    seen = []
    diffusion.bits_per_dim(recorder(seen), x, generator=generator)
    return torch.stack([x_t / math.sqrt(1 - FEW_BARS[t]) for t, x_t in enumerate(seen)])


def noise_of_interpolate(diffusion, x, generator):
    """At λ = ½ separate noise for the two images would have the variance ½."""
    seen = []
    diffusion.interpolate(recorder(seen), x, x, 9, 0.5, generator=generator)
    return seen[0] / math.sqrt(1 - FEW_BARS[9])


def ancestral_noise(seen):
    """z of each step of Algorithm 2, from the x_t that the model was shown."""
    slopes = np.sqrt(1 - FEW) * (1 - FEW_BARS_PREV) / (1 - FEW_BARS)  # Eq. 7 with x_0 = 0
    return [(seen[i + 1] - slopes[t] * seen[i]) / math.sqrt(FEW[t]) for i, t in enumerate(range(9, 0, -1))]


def noise_of_p_sample_steps(diffusion, x, generator):
    seen = []
    list(diffusion.p_sample_steps(recorder(seen), x, generator=generator))
    return torch.stack(ancestral_noise(seen))


def noise_of_p_sample_loop(diffusion, x, generator):
    seen = []
    diffusion.p_sample_loop(recorder(seen), x.shape, generator=generator)
    return torch.stack([seen[0], *ancestral_noise(seen)])


def ddim_noise(diffusion, seen):
    """z of each DDIM step with η = 1 but the last, which adds none."""
    noises = []
    for (x_t, x_s), (t, s) in zip(zip(seen, seen[1:], strict=False), pairs_of([9, 7, 5, 3, 1]), strict=False):
        sigma = math.sqrt((1 - FEW_BARS[s]) / (1 - FEW_BARS[t])) * math.sqrt(1 - FEW_BARS[t] / FEW_BARS[s])
        slope = math.sqrt((1 - FEW_BARS[s] - sigma**2) / (1 - FEW_BARS[t]))
        noises.append((x_s - slope * x_t) / sigma)
    return noises


def noise_of_ddim_sample_steps(diffusion, x, generator):
    seen = []
    list(diffusion.ddim_sample_steps(recorder(seen), x, 5, 1.0, generator=generator))
    return torch.stack(ddim_noise(diffusion, seen))


def noise_of_ddim_sample_loop(diffusion, x, generator):
    seen = []
    diffusion.ddim_sample_loop(recorder(seen), x.shape, 5, 1.0, generator=generator)
    return torch.stack([seen[0], *ddim_noise(diffusion, seen)])


def noise_of_dpm_solver_sample_loop(diffusion, x, generator):
    seen = []
    diffusion.dpm_solver_sample_loop(recorder(seen), x.shape, 5, generator=generator)
    return seen[0]


NOISES = {name.removeprefix("noise_of_"): f for name, f in globals().items() if name.startswith("noise_of_")}
METHODS = {
    name: inspect.signature(method).parameters
    for name, method in {**vars(ddpm.DDPM), **vars(ddpm.GaussianDiffusion)}.items()
    if callable(method) and not name.startswith("_")
}


def test_every_function_that_draws_noise_is_tested():
    """Each public method with an optional noise or a generator has an entry above."""
    draw = {
        name
        for name, parameters in METHODS.items()
        if "generator" in parameters or ("noise" in parameters and parameters["noise"].default is None)
    }
    assert draw == set(NOISES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
def test_noise_is_standard_normal_and_independent(draw, dtype):
    """ε, z and x_T are N(0, 1) by Kolmogorov and Smirnov, of x's dtype, and uncorrelated between any two images,
    channels, rows, columns and timesteps (by Fisher's transformation of each correlation). False-alarm rate 1e−7 for
    each of at most six statistics."""
    x = torch.zeros(8, 3, 8, 8, dtype=dtype)
    noise = draw(ddpm.GaussianDiffusion(FEW, dtype=dtype), x, None)
    assert noise.dtype == dtype
    assert noise.shape[-4:] == x.shape
    noise = noise.double().numpy()
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-7
    for axis in range(noise.ndim):
        slices = np.moveaxis(noise, axis, 0).reshape(noise.shape[axis], -1)
        pairs = np.corrcoef(slices)[np.triu_indices(len(slices), 1)]
        z = np.arctanh(pairs.clip(-0.9999, 0.9999)) * math.sqrt(slices.shape[1] - 3)
        assert np.abs(z).max() < scipy.stats.norm.isf(0.5e-7 / len(pairs)), f"axis {axis}"


@pytest.mark.parametrize("t", [300, torch.tensor([300])], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_stays_half_precision(dtype, t):
    """With x_t in float16 or bfloat16 every function returns its dtype, whether t is an int or a tensor, and agrees
    with float32 to the precision of the dtype. bits/dim, whose L_0 has no meaning there, are refused."""
    x = torch.tensor([0.5, -0.25, 0.125, 1.0]).reshape(1, 1, 2, 2)
    diffusion = ddpm.GaussianDiffusion(BETAS)
    model = lambda x_t, t: x_t / 2
    functions = [
        lambda x: diffusion.q_sample(x, t, x),
        lambda x: diffusion.q_posterior(x, x, t)[0],
        lambda x: diffusion.predict_x_start(x, t, x),
        lambda x: diffusion.predict_noise(x, t, x),
        lambda x: diffusion.p_sample(model, x, t, noise=x),
        lambda x: diffusion.score(model, x, t),
        lambda x: diffusion.p_losses(model, x, torch.as_tensor(t).reshape(1), x),
    ]
    for function in functions:
        got, want = function(x.to(dtype)), function(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)
    with pytest.raises(ValueError, match=f"float32 or float64, got {dtype}"):
        diffusion.bits_per_dim(model, x.to(dtype))


@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
def test_noise_is_drawn_on_the_device_of_x(draw):
    """torch's meta device has shapes without values: noise drawn on the CPU would be refused beside it."""
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert draw(ddpm.GaussianDiffusion(FEW).to("meta"), x, None).device.type == "meta"


@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
def test_noise_comes_from_the_generator(draw):
    """The same seed gives the same noise, another seed another. A generator that is given is the only one used; without
    one, torch's own is. Of a list of generators, each gives the noise of its image, whatever the others are."""
    diffusion, x = ddpm.GaussianDiffusion(FEW), torch.zeros(2, 1, 4, 4)
    if "generator" in METHODS[draw.__name__.removeprefix("noise_of_")]:
        before = torch.get_rng_state()
        runs = [draw(diffusion, x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
        assert torch.equal(torch.get_rng_state(), before)
        lists = [[torch.Generator().manual_seed(seed) for seed in seeds] for seeds in ((5, 6), (5, 7), (6, 5))]
        ab, ac, ba = (draw(diffusion, x, each) for each in lists)
        assert torch.equal(ab[..., 0, :, :, :], ac[..., 0, :, :, :])
        assert not torch.equal(ab[..., 1, :, :, :], ac[..., 1, :, :, :])
        assert torch.equal(ab, ba.flip(-4))
        with pytest.raises(ValueError, match="2 images need as many generators, got 3"):
            draw(diffusion, x, [torch.Generator()] * 3)
    else:
        runs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            runs.append(draw(diffusion, x, None))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(5)
    first = draw(diffusion, x, None)
    assert not torch.equal(first, draw(diffusion, x, None))
    torch.manual_seed(5)
    assert torch.equal(first, draw(diffusion, x, None))


@pytest.mark.parametrize("name", [name for name, parameters in METHODS.items() if "noise" in parameters])
def test_noise_of_another_shape_is_refused(name):
    """Broadcast, one ε would serve a whole batch."""
    diffusion, x, noise = ddpm.GaussianDiffusion(FEW), torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    arguments = dict(
        q_sample=(x, 5),
        p_losses=(predicts_zero, x, 5),
        predict_x_start=(x, 5),
        p_sample=(predicts_zero, x, 5),
        p_sample_loop=(predicts_zero, x.shape),
        interpolate=(predicts_zero, x, x, 5, 0.5),
        ddim_sample=(predicts_zero, x, 5, 3),
        ddim_sample_loop=(predicts_zero, x.shape, 5),
        dpm_solver_sample_loop=(predicts_zero, x.shape, 5),
    )[name]
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        getattr(diffusion, name)(*arguments, noise=noise)


def test_a_model_in_bfloat16_is_used_in_the_precision_of_x():
    """ε_θ in bfloat16, as autocast returns it, is converted to x's dtype before it is used."""
    diffusion, x_t, noise = ddpm.GaussianDiffusion(BETAS), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    in_bfloat16 = lambda x_t, t: torch.tanh(x_t).bfloat16()
    in_float32 = lambda x_t, t: torch.tanh(x_t).bfloat16().float()
    for clip in (False, True):
        for use in (
            lambda model, clip=clip: diffusion.ddim_sample(model, x_t, 500, 400, 0.5, clip, noise=noise),
            lambda model, clip=clip: diffusion.p_sample(model, x_t, torch.tensor([500, 3]), clip, noise=noise),
            lambda model: diffusion.score(model, x_t, 500),
            lambda model: diffusion.p_losses(model, x_t, 500, noise),
        ):
            assert use(in_bfloat16).dtype == torch.float32
            assert torch.equal(use(in_bfloat16), use(in_float32))


@pytest.mark.parametrize("t", [17, torch.tensor([0, 999])])
def test_the_model_is_given_t_as_it_is(t):
    """int64 of shape (B,) and not divided by T; an int becomes a batch of it. Each function calls the model once."""
    seen, x = [], torch.zeros(2, 1, 2, 2)
    model = lambda x_t, t: (seen.append(t), torch.zeros_like(x_t))[1]
    diffusion = ddpm.GaussianDiffusion(BETAS)
    diffusion.p_losses(model, x, t)
    diffusion.p_sample(model, x, t)
    diffusion.score(model, x, t)
    if isinstance(t, int):
        diffusion.ddim_sample(model, x, t, 3)
    want = [t, t] if isinstance(t, int) else t.tolist()
    assert [each.tolist() for each in seen] == [want] * (4 if isinstance(t, int) else 3)
    assert all(each.dtype == torch.int64 for each in seen)


# ---- 11. The network (appendix B) ------------------------------------------------------------------------------------


def randomise(module):
    """Give every weight a random value, so that layers that start at zero do not hide what lies behind them."""
    with torch.no_grad():
        for p in module.parameters():
            scale = 1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn_like(p) + (1 if p.dim() == 1 else 0))
    return module.eval()


def small(**changes):
    """A small U-Net: two levels of 8 and 16 channels, with attention at 4×4."""
    sizes = dict(image_channels=2, dim=8, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)
    return ddpm.UNet(**{**sizes, "dropout": 0.0, **changes})


@functools.cache
def paper_network():
    return ddpm.UNet()


def test_the_papers_network_has_35746307_parameters():
    """Appendix B: as many parameters as the authors' network, attention in six places (which ones, the next test
    proves), 32 groups in every norm, dropout 0.1. The second convolution of each block, the attention's output and the
    last convolution start at zero, nothing else does."""
    network = paper_network()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert sum(isinstance(m, ddpm.AttentionBlock) for m in network.modules()) == 6
    assert {(m.num_groups, m.eps) for m in network.modules() if isinstance(m, nn.GroupNorm)} == {(32, 1e-6)}
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.1}
    zeros = {name.removesuffix(".weight") for name, p in network.named_parameters() if (p == 0).all() and p.dim() > 1}
    layers = {name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert zeros == {name for name in layers if name.endswith((".conv2", ".to_out.0")) or name == "conv_out"}


def appendix_b(weights, x, t, y=None, *, dim, groups, dim_mults, num_res_blocks, attention_at):
    """The U-Net of appendix B as plain functions of its weights, which have the names of the published weights. Also
    returns the names that were used."""
    used = set()

    def take(name):
        used.update((f"{name}.weight", f"{name}.bias"))
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm(h, name):
        return F.group_norm(h, groups, *take(name), eps=1e-6)

    def conv(h, name, **how):
        return F.conv2d(h, *take(name), **how)

    def swish(h):
        return h * torch.sigmoid(h)

    def residual_block(h, name, in_channels, out_channels):
        r = conv(swish(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        r = r + F.linear(swish(emb), *take(f"{name}.time_emb_proj"))[:, :, None, None]
        r = conv(swish(norm(r, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return r + (h if in_channels == out_channels else conv(h, f"{name}.conv_shortcut"))

    def attention(h, name):
        pixels = norm(h, f"{name}.group_norm").flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (F.linear(pixels, *take(f"{name}.{part}")) for part in ("to_q", "to_k", "to_v"))
        mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(h.shape[1]), dim=2) @ v
        return h + F.linear(mixed, *take(f"{name}.to_out.0")).transpose(1, 2).reshape(h.shape)

    # The time embedding: sines, then cosines, with frequencies from 1 down to 1/10000; two linear layers.
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=x.dtype) / (dim // 2 - 1))
    angles = t[:, None] * omega
    emb = F.linear(torch.cat([angles.sin(), angles.cos()], 1), *take("time_embedding.linear_1"))
    emb = F.linear(swish(emb), *take("time_embedding.linear_2"))
    if y is not None:
        used.add("class_embedding.weight")
        emb = emb + weights["class_embedding.weight"][y]

    # Down: each level of num_res_blocks blocks, then a stride-2 convolution padded right and bottom.
    h, channels = conv(x, "conv_in", padding=1), dim
    skips = [h]
    for level, mult in enumerate(dim_mults):
        for i in range(num_res_blocks):
            h = residual_block(h, f"down_blocks.{level}.resnets.{i}", channels, dim * mult)
            channels = dim * mult
            if h.shape[2] in attention_at:
                h = attention(h, f"down_blocks.{level}.attentions.{i}")
            skips.append(h)
        if level < len(dim_mults) - 1:
            h = conv(F.pad(h, (0, 1, 0, 1)), f"down_blocks.{level}.downsamplers.0.conv", stride=2)
            skips.append(h)

    # Middle.
    h = residual_block(h, "mid_block.resnets.0", channels, channels)
    if attention_at:
        h = attention(h, "mid_block.attentions.0")
    h = residual_block(h, "mid_block.resnets.1", channels, channels)

    # Up: one block more a level, each given a skip, the last one first, behind h; then doubling and a convolution.
    for level, mult in enumerate(reversed(dim_mults)):
        for i in range(num_res_blocks + 1):
            skip = skips.pop()
            h = torch.cat([h, skip], dim=1)
            h = residual_block(h, f"up_blocks.{level}.resnets.{i}", h.shape[1], dim * mult)
            if h.shape[2] in attention_at:
                h = attention(h, f"up_blocks.{level}.attentions.{i}")
        if level < len(dim_mults) - 1:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(h, f"up_blocks.{level}.upsamplers.0.conv", padding=1)
    assert not skips
    return conv(swish(norm(h, "conv_norm_out")), "conv_out", padding=1), used


NETWORKS = dict(
    paper=dict(),
    labels=dict(num_classes=3, learned_variance=True),
    no_attention=dict(attn_resolutions=(), image_channels=1),
    deep=dict(dim=16, dim_mults=(1, 1, 3), num_res_blocks=2, attn_resolutions=(8, 2), image_channels=3),
    one_level=dict(dim_mults=(2,), num_res_blocks=3, attn_resolutions=(8,)),
)


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_the_network_is_appendix_b_wire_by_wire(changes):
    """All weights random, in float64 (float32 for the paper's size): the network's answer is that of the transcription
    above, and the transcription uses every weight, by its published name."""
    if not changes:
        network = randomise(copy.deepcopy(paper_network()))
        dim, dim_mults, num_res_blocks, attention_at, size, channels = 128, (1, 2, 2, 2), 2, (16,), 32, 3
    else:
        network = randomise(small(**changes)).double()
        given = dict(dim=8, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_channels=2)
        given.update({name: value for name, value in changes.items() if name in given})
        dim, dim_mults, num_res_blocks, attention_at, channels = given.values()
        size = 8
    weights = dict(network.named_parameters())
    x = torch.randn(2, channels, size, size, dtype=weights["conv_in.weight"].dtype)
    t, y = torch.tensor([7, 990]), torch.tensor([0, 2]) if "num_classes" in changes else None
    groups = 32 if dim >= 128 else max(1, dim // 16)
    with torch.no_grad():
        want, used = appendix_b(
            weights,
            x,
            t,
            y,
            dim=dim,
            groups=groups,
            dim_mults=dim_mults,
            num_res_blocks=num_res_blocks,
            attention_at=attention_at,
        )
        got = network(x, t, y) if y is not None else network(x, t)
    assert used == set(weights)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_time_embedding_in_numpy():
    """sin(t ω_i), then cos(t ω_i), with ω_i = 10000^(−i/(half − 1)), at code t."""
    t = torch.tensor([0, 1, 17, 999])
    omega = 10000.0 ** (-np.arange(16) / 15)
    want = np.concatenate([np.sin(np.outer(t, omega)), np.cos(np.outer(t, omega))], 1)
    np.testing.assert_allclose(ddpm.SinusoidalPositionEmbeddings(32)(t), want, atol=1e-4)


def test_blocks_start_as_the_identity():
    """At initialisation a residual block with attention returns its input, whatever the time: the last convolution and
    the attention's output are zero, and the time is added before that convolution."""
    block, x = ddpm.ResidualBlock(8, 8, 16), torch.randn(2, 8, 4, 4)
    for emb in (torch.zeros(2, 16), torch.randn(2, 16)):
        assert torch.equal(block(x, emb), x)
    assert torch.equal(ddpm.AttentionBlock(8)(x), x)


def test_the_first_loss_is_the_variance_of_the_noise():
    """The last convolution starts at zero, so ε_θ = 0 and the first loss is the mean of ε²."""
    network = small(image_channels=3, image_size=32).eval()
    x, t, noise = torch.rand(8, 3, 32, 32) * 2 - 1, torch.randint(T, (8,)), torch.randn(8, 3, 32, 32)
    assert (network(x, t) == 0).all()
    loss = ddpm.GaussianDiffusion(BETAS).p_losses(network, x, t, noise).item()
    assert loss == pytest.approx((noise.double() ** 2).mean().item(), rel=1e-6)


@pytest.mark.parametrize("channels, groups", [(128, 32), (384, 32), (132, 4), (36, 4), (33, 1)])
def test_groups_of_a_norm(channels, groups):
    """32, as in the paper, or the greatest common divisor of 32 and the channels."""
    assert ddpm.group_norm(channels).num_groups == groups


@pytest.mark.parametrize("dim, groups", [(4, 1), (32, 2), (96, 6), (124, 1), (128, 32), (256, 32)])
def test_groups_of_a_network(dim, groups):
    """The same number in every norm: 32 from the paper's width of 128 on; below it, dim/16, a rule of this project."""
    network = small(dim=dim)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {groups}
    assert len(norms) == 8 * 2 + 4 + 1


def test_attention_in_a_loop():
    """softmax(q kᵀ/√C) v over the pixels, plus the input, one pixel at a time."""
    block, x = randomise(ddpm.AttentionBlock(32)).double(), normal(2, 32, 2, 3)
    p = dict(block.named_parameters())
    h = F.group_norm(x, 32, p["group_norm.weight"], p["group_norm.bias"], 1e-6)
    want = torch.empty_like(x)
    for b in range(2):
        pixels = [h[b, :, i, j] for i in range(2) for j in range(3)]
        q, k, v = (
            [p[f"{name}.weight"] @ one + p[f"{name}.bias"] for one in pixels] for name in ("to_q", "to_k", "to_v")
        )
        for n in range(6):
            weight = torch.softmax(torch.stack([q[n] @ other / math.sqrt(32) for other in k]), 0)
            mixed = sum(w * value for w, value in zip(weight, v, strict=True))
            out = p["to_out.0.weight"] @ mixed + p["to_out.0.bias"]
            want[b, :, n // 3, n % 3] = x[b, :, n // 3, n % 3] + out
    torch.testing.assert_close(block(x), want)


def test_downsampling_pads_right_and_bottom_and_upsampling_repeats_pixels():
    """Stride 2 with TensorFlow's SAME padding, and nearest-neighbour doubling before a convolution, in loops over
    pixels."""
    down, up, x = randomise(ddpm.Downsample(2)), randomise(ddpm.Upsample(2)), torch.randn(1, 2, 4, 4)
    padded = torch.zeros(2, 5, 5)
    padded[:, :4, :4] = x[0]
    for i in range(2):
        for j in range(2):
            patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            want = (down.conv.weight * patch).sum((1, 2, 3)) + down.conv.bias
            torch.testing.assert_close(down(x)[0, :, i, j], want)
    doubled = torch.stack([x[..., i // 2, j // 2] for i in range(8) for j in range(8)], -1).reshape(1, 2, 8, 8)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


def test_the_network_depends_on_x_t_and_y():
    """Every pixel of x (through the middle every pixel sees every other), neighbouring t, and y; no y is the last
    row of the label embedding."""
    network, x, t = randomise(small(num_classes=3)), torch.randn(1, 2, 8, 8), torch.tensor([500])
    outputs = [network(x, t, torch.tensor([y])) for y in range(4)]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(outputs[3], network(x, t))
    assert (network(x, t) - network(x, t + 1)).abs().max() > 1e-5
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, t)[0, 0, 0, 0], x)
    assert (gradient != 0).all()


def test_images_of_a_batch_are_independent():
    """The answer for one image does not depend on the others, in training mode either: there is no batch norm."""
    network = randomise(small(num_classes=3))
    x, t, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    together = network(x, t, y)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(network(x[one], t[one], y[one]), together[one], rtol=1e-4, atol=1e-4)
    network.train()
    torch.testing.assert_close(network(x, t, y), together)


def test_gradients_reach_every_parameter():
    """After four steps of Adam (layers at zero hold back the first) every parameter tensor has moved."""
    network = small(num_classes=3, learned_variance=True)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, t, y = torch.randn(8, 2, 8, 8), torch.randint(T, (8,)), torch.arange(8) % 4
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, t, y) - 1).square().mean().backward()
        optimizer.step()
    assert all((p != before[name]).any() for name, p in network.named_parameters())


def test_dropout_is_for_training_only():
    """In training mode two calls differ, in evaluation mode they do not; it stands before the second convolution; a
    block has none unless asked for."""
    network, x, t = randomise(small(dropout=0.5)), torch.randn(1, 2, 8, 8), torch.tensor([5])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))
    assert ddpm.ResidualBlock(8, 8, 16).dropout.p == 0
    block = randomise(ddpm.ResidualBlock(8, 8, 16, dropout=1.0)).train()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(1, 16)), x + block.conv2.bias[:, None, None])


SHAPES = [
    (dict(), 2, 3),
    (dict(dim_mults=(1,), image_size=5), 1, 0),
    (dict(dim_mults=(1,), image_size=1, attn_resolutions=()), 1, 0),
    (dict(dim_mults=(1, 1, 2, 2), image_size=24, attn_resolutions=(6, 3)), 4, 6),
    (dict(dim=12, time_dim=20, num_res_blocks=3, image_channels=5), 2, 7),
]


@pytest.mark.parametrize("changes, levels, attentions", SHAPES)
def test_any_shape_of_network(changes, levels, attentions):
    """Any channels, levels and size that halves. A learned variance doubles the output's channels. Attention stands
    where asked, on the way down and up, and then in the middle too."""
    network = small(**changes)
    size, channels = changes.get("image_size", 8), changes.get("image_channels", 2)
    x, t = torch.randn(2, channels, size, size), torch.tensor([0, 1])
    assert network(x, t).shape == (2, channels, size, size)
    assert small(**changes, learned_variance=True)(x, t).shape == (2, 2 * channels, size, size)
    assert sum(isinstance(m, ddpm.Downsample) for m in network.modules()) == levels - 1
    middle = 1 if changes.get("attn_resolutions", (4,)) else 0
    assert sum(isinstance(m, ddpm.AttentionBlock) for m in network.modules()) == attentions + middle
    if "time_dim" in changes:
        assert network.state_dict()["time_embedding.linear_1.weight"].shape == (20, 12)


def test_the_network_in_other_dtypes_and_memory_formats():
    """float64 agrees with float32, channels_last with the default, and bfloat16 autocast to 10% on average."""
    network, x, t = randomise(small()), torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    want = copy.deepcopy(network).double()(x.double(), t)
    assert want.dtype == torch.float64
    torch.testing.assert_close(network(x, t).double(), want, rtol=1e-3, atol=1e-3)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, network(x, t), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(x, t).float() - network(x, t)).abs().mean() < 0.1 * want.abs().mean()


# ---- 12. Training: Algorithm 1 ---------------------------------------------------------------------------------------
# A tiny network on the digits that come with the project, through the command line.

TINY = dict(dim=8, dim_mults=1, num_res_blocks=1, attn_resolutions=4, batch_size=8, timesteps=50, warmup=2)
TINY.update(log_every=2, dropout=0.2, sample_every=1000, seed=SEED + 1)


def flags(settings):
    """Settings as arguments of the command line: dict(lr_decay="linear", flip=False) is --lr-decay linear --no-flip."""
    arguments = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def cli(*arguments):
    """Run the command line in this process. Returns the exit status."""
    try:
        ddpm.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def train(**changes):
    """Train a tiny network through the command line. Returns what the checkpoint holds."""
    settings = {**TINY, **changes}
    assert cli("--train", *flags(settings)) == 0
    return read(settings.get("out", "runs/digits"))


def read(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the bit, tensors included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "out")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def log_of(out):
    """The first four columns of log.csv as floats."""
    header, *rows = Path(out, "log.csv").read_text().splitlines()
    assert header == "step,loss,gradient_norm,learning_rate,images_per_second,ema_loss,ema_loss_held_out"
    return np.array([[float(cell) for cell in row.split(",")[:4]] for row in rows])


GRID = ddpm.Run.grid


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the current one. Training draws no grids there, to save time; a test of grids takes GRID."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: None)
    return tmp_path


@pytest.fixture
def no_trial(monkeypatch):
    """Training does not try a step first, so that a test can count steps."""
    monkeypatch.setattr(ddpm, "try_step", lambda *_: None)


def algorithm_1(config, processes=1):
    """Algorithm 1 and appendix B, a second time: Adam, warm-up, clipping and the moving average in plain arithmetic,
    the gradients by autograd. Each process draws its share of the batch from a seed of its own, in this order: images,
    t, ε, flips, hidden labels, dropout; gradients are averaged. Returns the weights, their average and the log's
    rows."""
    images, labels = ddpm.load_data("digits", split="train")
    torch.manual_seed(ddpm.derive_seed(config.seed, "weights"))
    network = ddpm.UNet(
        image_channels=1,
        dim=config.dim,
        dim_mults=config.dim_mults,
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=config.attn_resolutions,
        image_size=8,
        dropout=config.dropout,
        num_classes=10 if config.conditional else None,
    ).to(memory_format=torch.channels_last)  # train uses it, and it changes the order in which dropout draws its mask
    betas = np.linspace(0.1 / config.timesteps, 20 / config.timesteps, config.timesteps)  # 1e−4…0.02, times 1000/T
    bars = torch.as_tensor(np.cumprod(1 - betas))
    parameters, n = list(network.parameters()), config.batch_size // processes
    m, v, average = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
    rows = []
    for step in range(config.steps):
        losses, gradients = [], [torch.zeros_like(p) for p in parameters]
        for rank in range(processes):
            torch.manual_seed(ddpm.derive_seed(config.seed, "training", step, rank))
            chosen = torch.randint(len(images), (n,))
            x_0 = images[chosen].float() / 127.5 - 1
            t = torch.randint(config.timesteps, (n,))
            noise = torch.randn(n, 1, 8, 8)
            if config.flip:
                mirrored = torch.randint(2, (n,))
                x_0 = torch.stack([x.flip(2) if flip else x for x, flip in zip(x_0, mirrored, strict=True)])
            y = None
            if config.conditional:
                hidden = torch.rand(n) < config.label_dropout
                y = torch.tensor([10 if hide else int(labels[i]) for i, hide in zip(chosen, hidden, strict=True)])
            bar = bars[t].reshape(-1, 1, 1, 1)
            x_t = bar.sqrt().float() * x_0 + (1 - bar).sqrt().float() * noise
            loss = ((noise - network(x_t, t, y)) ** 2).mean()
            losses.append(loss.item())
            for total, gradient in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient / processes
        norm = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
        shrink = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        rate = config.lr * min(1.0, (step + 1) / (config.warmup + 1))
        if config.lr_decay == "linear":
            rate *= 1 - step / config.steps
        decay = min(config.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        with torch.no_grad():
            for i, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                m[i] = 0.9 * m[i] + 0.1 * shrink * gradient
                v[i] = 0.999 * v[i] + 0.001 * (shrink * gradient) ** 2
                p -= rate * (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                average[i] = decay * average[i] + (1 - decay) * p
        rows.append([step + 1, np.mean(losses), norm, rate])
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, parameters, strict=True)), dict(zip(names, average, strict=True)), np.array(rows)


EVERYTHING = dict(steps=6, lr=3e-3, warmup=2, lr_decay="linear", grad_clip=0.02, ema_decay=0.15, flip=True)
EVERYTHING.update(dropout=0.2, label_dropout=0.3, batch_size=12, log_every=1, bf16=False)
PLAIN = dict(steps=4, lr=1e-3, warmup=0, lr_decay="constant", grad_clip=0, ema_decay=0.9999, flip=False)
PLAIN.update(dropout=0, conditional=False, timesteps=1000, log_every=1, bf16=False)


def assert_trained_as_algorithm_1(saved, out, processes=1):
    """Weights, average and log agree with algorithm_1: the mean deviation in each tensor is below 0.2% of the learning
    rate, which bounds what a step moves a weight by, and the largest below 5%. (Adam divides by the gradient's size, so
    that float32's rounding shows where a gradient is nearly 0.)"""
    config = ddpm.Config(**saved["config"])
    weights, average, rows = algorithm_1(config, processes)
    for have, want in ((saved["model"], weights), (saved["ema"], average)):
        for name, weight in want.items():
            deviation = (have[name] - weight).abs() / config.lr
            assert deviation.mean() < 0.002, name
            assert deviation.max() < 0.05, name
    np.testing.assert_allclose(log_of(out), rows, rtol=2e-3, atol=1e-6)
    return rows


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, dict(EVERYTHING, steps=1), PLAIN, dict(PLAIN, conditional=True, label_dropout=0, lr_decay="linear")],
    ids=["everything", "first-step", "plain", "labels"],
)
def test_training_is_algorithm_1(settings, folder):
    """A few steps of the command line against the transcription above: with labels, flips, label dropout, dropout,
    warm-up, decay and clipping all on, after the first step (when the average is the weights), and with all off."""
    rows = assert_trained_as_algorithm_1(train(**settings), "runs/digits")
    if settings["grad_clip"]:
        assert (rows[:, 2] > settings["grad_clip"]).all()  # so that clipping is seen


def test_algorithm_1_draws_what_the_paper_says(folder, no_trial, monkeypatch):
    """Over 10 steps of 80 images: each x_0 is a training image, scaled to [−1, 1], with its label, from all parts of
    the data alike (χ²); t is uniform on 0…T−1 (χ²); ε is standard normal (Kolmogorov–Smirnov); labels are hidden with
    the probability asked for, within each batch (binomial, and no batch all or nothing, probability 2e−7). False-alarm
    rate 1e−6 each."""
    seen, original = [], ddpm.GaussianDiffusion.p_losses

    def p_losses(self, model, x_start, t, noise):
        def watched(x_t, t):
            prediction = model(x_t, t)
            if torch.is_grad_enabled():  # in training, not when losses are compared for the log
                seen.append((x_start, t, noise, labels_seen.pop()))
            return prediction

        return original(self, watched, x_start, t, noise)

    labels_seen, forward = [], ddpm.UNet.forward
    monkeypatch.setattr(
        ddpm.UNet, "forward", lambda self, x, t, y=None: labels_seen.append(y) or forward(self, x, t, y)
    )
    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    train(timesteps=5, batch_size=80, steps=10, label_dropout=0.2)
    x, t, noise, y = (torch.cat(each) for each in zip(*seen, strict=True))

    images, labels = ddpm.load_data("digits", split="train")
    table = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    true = torch.tensor([table[image.numpy().tobytes()] for image in pixels])
    assert (x.min(), x.max()) == (-1, 1)
    index = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    drawn_from = np.array([index[image.numpy().tobytes()] for image in pixels])
    assert scipy.stats.chisquare(np.histogram(drawn_from, 20, (0, len(images)))[0]).pvalue > 1e-6
    hidden = y == 10
    assert torch.equal(y[~hidden], true[~hidden])
    assert scipy.stats.binomtest(int(hidden.sum()), 800, 0.2).pvalue > 1e-6
    assert all(0 < each.sum() < 80 for each in hidden.reshape(10, 80))
    counts = t.bincount(minlength=5)
    assert len(counts) == 5
    assert scipy.stats.chisquare(counts).pvalue > 1e-6
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-6


def test_moving_average_written_out():
    """w̄_n = d_n w̄_{n−1} + (1 − d_n) w_n with d_n = min(decay, (1 + n)/(10 + n)), over 30 updates; the first
    copies."""
    for decay in (0.5, 0.9999):
        module, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        values, want = np.random.default_rng(SEED).normal(size=30), None
        for n, value in enumerate(values):
            nn.init.constant_(module.weight, value)
            ddpm.ema_update(average, module, n, decay)
            d = min(decay, (1 + n) / (10 + n))
            want = value if n == 0 else d * want + (1 - d) * value
            assert average.weight.item() == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_learning_rate_rises_and_then_holds_or_falls():
    """Linear from lr/(warmup + 1) to lr, then constant, or times a line that reaches 0 after the last step."""
    how = dict(steps=100, warmup=9, lr=0.02)
    constant, linear = (ddpm.preset("digits", lr_decay=decay, **how) for decay in ("constant", "linear"))
    rates = [ddpm.learning_rate(constant, step) for step in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([0.002, 0.01, 0.02, 0.02, 0.02])
    falling = [ddpm.learning_rate(linear, step) for step in (0, 4, 9, 50, 99, 100)]
    assert falling == pytest.approx([0.002, 0.0096, 0.0182, 0.01, 0.0002, 0])


def test_a_tiny_network_learns_its_images(folder):
    """Images in, images out: four images in a folder, 100 steps, and sampling draws all four: the median distance of a
    sample to the nearest image is below 0.5, each of the four is the nearest of some, and the loss halves. Noise is 1.1
    from the nearest, and the images are at least 1.4 from each other."""
    (folder / "pictures").mkdir()
    for i, halves in enumerate([("black", "white"), ("white", "black"), ("white", "white"), ("black", "black")]):
        image = Image.new("RGB", (4, 4), halves[0])
        image.paste(halves[1], (2, 0, 4, 4))
        for j in range(3):
            image.save(folder / "pictures" / f"{i}{j}.png")
    settings = dict(data="pictures", image_size=4, dim=16, steps=100, batch_size=32, lr=1e-2, warmup=10, dropout=0)
    train(**settings, lr_decay="linear", timesteps=100, ema_decay=0.98, flip=False, out="run")
    x_0 = ddpm.last(ddpm.Run.read("run").trajectory(80, seed=SEED))
    images = ddpm.load_data("pictures", 4)[0].float() / 127.5 - 1
    distance, nearest = (x_0[:, None] - images).square().flatten(2).mean(2).sqrt().min(1)
    assert distance.median() < 0.5
    assert set(images[nearest[distance < 0.5]].flatten(1)[:, [0, -1]].int().flatten().tolist()) == {-1, 1}
    losses = log_of("run")[:, 1]
    assert losses[0] > 2 * losses[-1]


def test_no_two_uses_of_randomness_share_a_seed(folder, monkeypatch):
    """derive_seed gives different seeds for different seeds, uses and numbers, trailing zeros included; and training
    with grids, sampling and evaluation never ask for one of them twice, but for those of the grids and of the losses
    that are compared, whose noise is the same each time, and that of the batches of --sample, which add the numbers of
    their images."""
    uses = ["weights", "training", "grid", "comparison", "sampling", "evaluation"]
    paths = [(seed, use) for seed in range(4) for use in uses]
    paths += [(*path, a) for path in paths for a in range(4)]
    paths += [(*path, b) for path in paths if len(path) == 3 for b in range(4)]
    assert len({ddpm.derive_seed(*path) for path in paths}) == len(paths)
    assert all(0 <= ddpm.derive_seed(*path) < 2**32 for path in paths)

    asked, original = [], ddpm.derive_seed
    monkeypatch.setattr(ddpm, "derive_seed", lambda *path: asked.append(path) or original(*path))
    monkeypatch.setattr(ddpm.Run, "grid", GRID)
    train(steps=4, sample_every=2)
    assert cli("--sample", 5, "--sampling-batch", 2, "--sampling-steps", 2) == 0
    assert cli("--evaluate", 2) == 0
    assert asked.count((SEED + 1, "grid")) == 2
    others = [path for path in asked if path[1] not in ("grid", "comparison", "sampling")]
    assert len({original(*path) for path in asked}) == len(others) + 3
    training = [path for path in asked if path[1] == "training"]
    assert training == [(SEED + 1, "training", step, 0) for step in range(4)]
    assert {path for path in asked if path[1] == "sampling"} == {(0, "sampling")}


# ---- 13. Sampling: from x_T to an image ------------------------------------------------------------------------------


def make_run(out, **settings):
    """A run whose checkpoint holds random weights, other ones in the average than in the model. Returns the averaged
    network, in the memory layout that sampling uses, so that bfloat16 rounds alike."""
    saved = train(steps=1, out=out, **settings)
    shape = {name: saved["config"][name] for name in ("dim", "dim_mults", "num_res_blocks", "attn_resolutions")}
    network = ddpm.UNet(
        saved["image_channels"],
        image_size=8,
        dropout=0.5,
        num_classes=saved["num_classes"],
        learned_variance=saved["config"]["variance"] == "learned_range",
        **shape,
    )
    saved["model"] = {name: weight.clone() for name, weight in randomise(network).state_dict().items()}
    saved["ema"] = {name: weight.clone() for name, weight in randomise(network).state_dict().items()}
    torch.save(saved, Path(out) / "checkpoint.pt")
    return network.to(memory_format=torch.channels_last)


def image_generators(seed, count):
    """A generator for each of count images, and x_T (count, 1, 8, 8), the first numbers that they give."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return generators, torch.stack([torch.randn(1, 8, 8, generator=each) for each in generators])


def drawn(network, count, batch=64, label=None, seed=0, sampler="dpm-solver", steps=None, eta=0.0, w=0.0, classes=10):
    """What --sample draws: for each batch, all x_{t−1}, …, x_0, from the samplers of GaussianDiffusion. Image i has a
    generator of its own, seeded with derive_seed(seed, "sampling") + i, whose first numbers are x_T; the batches are
    equally large."""
    batches = math.ceil(count / batch)
    size = math.ceil(count / batches)
    betas = np.linspace(0.1 / 50, 20 / 50, 50)
    diffusion = ddpm.GaussianDiffusion(betas)
    trajectories = []
    for i in range(batches):
        y = torch.arange(i * size, (i + 1) * size) % classes if label is None else torch.full((size,), label)

        def model(x_t, t, y=y):
            conditional, unconditional = network(x_t, t, y), network(x_t, t, torch.full_like(y, classes))
            return (1 + w) * conditional - w * unconditional

        generator, x_T = image_generators(ddpm.derive_seed(seed, "sampling") + i * size, size)
        if sampler == "dpm-solver":
            trajectories.append(list(diffusion.dpm_solver_sample_steps(model, x_T, steps or 10)))
        elif sampler == "ddim":
            how = dict(steps=steps or 50, eta=eta)
            trajectories.append(list(diffusion.ddim_sample_steps(model, x_T, **how, generator=generator)))
        else:
            chain, chain_model = diffusion.respace(model, steps) if steps else (diffusion, model)
            trajectories.append(list(chain.p_sample_steps(chain_model, x_T, generator=generator)))
    return [torch.stack(each) for each in trajectories]  # (S, size, 1, 8, 8) a batch


def to_grey(x):
    """[−1, 1] to 0…255, rounded to the nearest."""
    return torch.round((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)[..., 0, :, :].numpy()


def tiles(grid, columns, count):
    """The images of a grid of 8×8 images, enlarged four times, with lines of grey 64 between them, row by row."""
    grid = np.asarray(grid.convert("L"))
    rows = math.ceil(count / columns)
    assert grid.shape == (4 * (9 * rows + 1), 4 * (9 * columns + 1))
    small_grid = grid[::4, ::4]
    assert (grid == small_grid.repeat(4, 0).repeat(4, 1)).all()
    assert (small_grid[::9] == 64).all()
    assert (small_grid[:, ::9] == 64).all()
    places = [(9 * (i // columns) + 1, 9 * (i % columns) + 1) for i in range(count)]
    return np.stack([small_grid[r : r + 8, c : c + 8] for r, c in places])


WAYS = {
    "--sample 7": dict(count=7),
    "--sample 7 --sampling-batch 3 --seed 5 --sampling-steps 3": dict(count=7, batch=3, seed=5, steps=3),
    "--sample 12 --sampling-batch 4 --sampling-steps 6": dict(count=12, batch=4, steps=6),
    "--sample 5 --label 0 --sampling-steps 4": dict(count=5, label=0, steps=4),
    "--sample 5 --unconditional --sampling-steps 4": dict(count=5, label=10, steps=4),
    "--sample 21 --guidance 1.5 --sampling-steps 4": dict(count=21, w=1.5, steps=4),
    "--sample 3 --sampler ddim": dict(count=3, sampler="ddim"),
    "--sample 9 --sampler ddim --sampling-batch 4 --sampling-steps 5 --eta 0.7": dict(
        count=9, batch=4, sampler="ddim", steps=5, eta=0.7
    ),
    "--sample 5 --sampler ddim --label 3 --guidance -0.5 --sampling-steps 4": dict(
        count=5, label=3, sampler="ddim", w=-0.5, steps=4
    ),
    "--sample 3 --sampler ddim --sampling-steps 50 --eta 1": dict(count=3, sampler="ddim", steps=50, eta=1.0),
    "--sample 3 --sampler ddpm --sampling-batch 2": dict(count=3, batch=2, sampler="ddpm"),
    "--sample 5 --sampler ddpm --sampling-steps 7": dict(count=5, sampler="ddpm", steps=7),
}


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """A folder with a run of random weights, and its averaged network."""
    folder = tmp_path_factory.mktemp("random")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ddpm.Run, "grid", lambda run, step: None)
        torch.manual_seed(SEED)
        return folder, make_run("runs/digits")


@pytest.mark.parametrize("line, how", WAYS.items(), ids=WAYS)
def test_sampling_written_out(line, how, random_run, monkeypatch):
    """--sample for each sampler, number of steps, η, label, guidance, batch size and seed: every image of every batch,
    from the averaged weights without dropout, is that of GaussianDiffusion's samplers, to the grey level (one level
    where float32 rounds otherwise in a batch of both halves of guidance). samples.png shows them row by row, a column
    a class where the classes take turns."""
    folder, network = random_run
    monkeypatch.chdir(folder)
    assert cli(*line.split(), "--individual", "--no-bf16") == 0
    count = how["count"]
    want = np.concatenate([to_grey(each[-1]) for each in drawn(network, **how)])[:count]
    paths = sorted(Path("runs/digits/individual").iterdir())
    assert [path.name for path in paths] == [f"{i:05}.png" for i in range(count)]
    got = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert np.abs(got.astype(int) - want).max() <= (1 if "w" in how else 0)
    assert (got == want).mean() > 0.99
    columns = 10 if how.get("label") is None else math.ceil(count**0.5)
    grid = tiles(Image.open("runs/digits/samples.png"), min(columns, count), count)
    assert (grid == got).all()


@pytest.mark.parametrize("how", ["--sampler dpm-solver", "--sampler ddim --eta 0.7", "--sampler ddpm"])
def test_an_image_depends_on_the_seed_and_its_number_alone(how, random_run, monkeypatch):
    """The first seven images are the same whether 7, 8 or 20 are drawn, at once or in batches of 3, to one grey level,
    because float32 rounds otherwise in batches of other sizes; and no two of 20 have the same noise."""
    folder, _ = random_run
    monkeypatch.chdir(folder)
    drawn = []
    for count, batch in ((20, 64), (7, 64), (8, 3), (20, 3)):
        line = f"--sample {count} --sampling-batch {batch} --sampling-steps 4 --individual --no-bf16 {how}"
        assert cli(*line.split()) == 0
        paths = sorted(Path("runs/digits/individual").iterdir())
        assert len(paths) == count
        drawn.append(np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int))
    for images in drawn[1:]:
        assert np.abs(images[:7] - drawn[0][:7]).max() <= 1
    x = next(ddpm.Run.read("runs/digits", bf16=False).trajectory(20, sampling_steps=4))
    assert len(np.unique(x.flatten(1), axis=0)) == 20


def test_sampling_that_was_stopped_goes_on(folder, monkeypatch):
    """Ctrl-C in the third of four batches: nothing is written into individual/. The same call then draws the last two
    batches alone, and all images are those of a call that was not stopped. A call with another option, or after more
    training, draws all batches; nothing is kept of a call that came to its end."""
    train(steps=1)
    line = ["--sample", 8, "--sampling-batch", 2, "--sampling-steps", 2, "--individual", "--no-bf16"]
    calls, original = [], ddpm.Run.trajectory

    def trajectory(self, *arguments, **how):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(self, *arguments, **how)

    def draw(at, *more):
        nonlocal stop_at
        stop_at = at
        calls.clear()
        status = cli(*line, *more)
        return status, len(calls)

    def images():
        return [path.read_bytes() for path in sorted(Path("runs/digits/individual").iterdir())]

    stop_at = None
    monkeypatch.setattr(ddpm.Run, "trajectory", trajectory)
    assert draw(None) == (0, 4)
    whole = images()
    shutil.rmtree("runs/digits/individual")
    assert draw(3) == (130, 3)
    assert not Path("runs/digits/individual").exists()
    assert draw(None) == (0, 2)
    assert images() == whole
    assert draw(None) == (0, 4)
    assert draw(3) == (130, 3)
    assert draw(None, "--seed", 1) == (0, 4)
    assert draw(3, "--seed", 1) == (130, 3)
    assert draw(3) == (130, 3)
    assert len(list(Path("runs/digits/.drawn").iterdir())) == 1
    assert cli("--train", "--resume", "--steps", 2) == 0
    assert draw(None) == (0, 4)
    assert draw(3) == (130, 3)
    assert draw(None, "--animate") == (0, 3)  # batch 0 is drawn again, for its frames
    assert draw(3) == (130, 3)
    saved = read("runs/digits")
    saved["config"]["variance"] = "fixed_small"  # the settings of the run
    torch.save(saved, "runs/digits/checkpoint.pt")
    assert draw(None) == (0, 4)
    assert draw(3) == (130, 3)
    (first,) = Path("runs/digits/.drawn").glob("*/0.pt")
    first.write_bytes(first.read_bytes()[:-200])  # damaged: this batch is drawn again
    assert draw(None) == (0, 3)
    assert sorted(path.name for path in Path("runs/digits").iterdir() if path.name[0] == ".") == [
        ".samples",
        ".sampling.lock",
    ]


def test_stored_images_of_another_variance_are_drawn_again(folder, monkeypatch):
    """A caller changes σ_t² of a trained run, as README says; images of an interrupted call with β_t are not reused by
    one with β̃_t."""
    make_run("runs/digits", timesteps=3)
    run, original = ddpm.Run.read("runs/digits", bf16=False), ddpm.Run.trajectory
    calls = []

    def trajectory(self, *a, **how):
        calls.append(self.diffusion.variance_type)
        if calls[1:] == ["fixed_large"]:
            raise KeyboardInterrupt
        return original(self, *a, **how)

    def images(variance):
        calls.clear()
        run.diffusion.variance_type = variance
        ddpm.sample(run, 4, sampler="ddpm", sampling_batch=2, individual=True)
        return [path.read_bytes() for path in sorted(Path("runs/digits/individual").iterdir())]

    monkeypatch.setattr(ddpm.Run, "trajectory", trajectory)
    whole = images("fixed_small")
    with pytest.raises(KeyboardInterrupt):
        images("fixed_large")
    assert images("fixed_small") == whole
    assert calls == ["fixed_small", "fixed_small"]


def test_individual_images_do_not_stay_in_memory(folder, monkeypatch):
    """Of 40 batches of 50 images, with all 2,000 written, no more than the one that is drawn is in memory while the
    next is; then at most two beside the 1,024 images of the grid."""
    train(steps=1)
    drawn, alive, original = [], [], ddpm.to_pixels
    stored, load = [], ddpm.load_tensors

    def to_pixels(x):
        alive.append(sum(each() is not None for each in drawn))
        pixels = original(x)
        drawn.append(weakref.ref(pixels))
        return pixels

    def load_tensors(path):
        loaded = load(path)
        if Path(path).parent.parent.name == ".drawn":
            stored.append(weakref.ref(loaded))
        return loaded

    def save_individually(pixels, *where):
        alive.append(sum(each() is not None for each in stored) - 21)  # 1,024 images are parts of 21 batches
        return as_image(pixels, *where)

    as_image = ddpm.pixels_to_image
    monkeypatch.setattr(ddpm, "to_pixels", to_pixels)
    monkeypatch.setattr(ddpm, "load_tensors", load_tensors)
    monkeypatch.setattr(ddpm, "pixels_to_image", save_individually)
    how = ["--sampling-batch", 50, "--sampling-steps", 1, "--individual", "--no-bf16", "--device", "cpu"]
    assert cli("--sample", 2000, *how) == 0
    assert len(list(Path("runs/digits/individual").iterdir())) == 2000
    assert len(alive) == 40 + 1 + 2000
    assert max(alive[:40]) <= 1
    assert max(alive[40:]) <= 2


def test_no_more_is_drawn_than_is_shown(folder, monkeypatch, capsys):
    """Without --individual, samples.png is all that is written: it has 1,024 images, and no others are drawn."""
    train(steps=1)
    drawn, original = [], ddpm.Run.trajectory
    monkeypatch.setattr(
        ddpm.Run,
        "trajectory",
        lambda self, count, *more, **how: drawn.append(count) or original(self, count, *more, **how),
    )
    assert cli("--sample", 3000, "--sampling-steps", 1, "--sampling-batch", 512) == 0
    assert sum(drawn) == 1024
    line = "runs/digits/samples.png shows 1,024 images at most; --individual draws and writes all 3,000"
    assert line in capsys.readouterr().out


def test_samples_are_not_taken_for_data(folder, capsys):
    """Those of published weights, which have no log.csv beside them, drawn into a folder of images. A folder in the
    place of samples.png is named before anything is drawn."""
    publish("small")
    save(folder / "images" / "a.png", size=(8, 8))
    line = ["--sample", 2, "--weights", "small", "--sampling-steps", 1, "--individual", "--out", "images/drawn"]
    assert cli(*line) == 0
    assert len(ddpm.read_data("images", 8).images) == 1
    assert cli(*line[:-1], "images") == 0
    assert len(ddpm.read_data("images", 8).images) == 1
    save(folder / "images" / "drawn" / "b.png", size=(8, 8))
    assert len(ddpm.read_data("images", 8).images) == 2  # an image beside samples is one of the user's
    Path("images/drawn/samples.png").unlink()
    Path("images/drawn/samples.png").mkdir()
    assert cli(*line) == 2
    assert "images/drawn/samples.png is a folder: move it away" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["samples.png", "samples.gif", "individual/00000.png"])
def test_pictures_that_are_not_samples_are_not_overwritten(name, folder, capsys):
    """In a folder that is no run, and into which nothing was sampled."""
    publish("small")
    save(folder / "mine" / name, size=(8, 8))
    before = Path("mine", name).read_bytes()
    line = ["--sample", 1, "--weights", "small", "--sampling-steps", 1, "--individual", "--out"]
    assert cli(*line, "mine") == 2
    first = name.split("/")[0]
    assert f"mine/{first} is not one of --sample: move it away, or name another folder" in capsys.readouterr().err
    assert Path("mine", name).read_bytes() == before
    assert cli(*line, "other") == cli(*line, "other") == 0


def test_other_files_stay_when_a_run_is_renamed(folder, capsys):
    """The files of the earlier run are moved into a folder of its own beside them."""
    train(steps=1)
    Path("runs/digits/thesis.txt").write_text("mine")
    Path("runs/digits/pictures").mkdir()
    train(steps=2)
    assert "the earlier run in runs/digits is now runs/digits/digits-1" in capsys.readouterr().out
    assert Path("runs/digits/thesis.txt").read_text() == "mine"
    assert Path("runs/digits/pictures").is_dir()
    assert [read(out)["step"] for out in ("runs/digits/digits-1", "runs/digits")] == [1, 2]
    assert len(log_of("runs/digits")) == 1
    assert [path.name for path in Path("runs").iterdir() if path.name[0] != "."] == ["digits"]


def test_where_samples_cant_be_written_is_said_first(folder, monkeypatch, capsys):
    """A read-only folder, and a file in the place of the folder individual: nothing is drawn."""
    train(steps=1)
    monkeypatch.setattr(ddpm.Run, "trajectory", lambda *arguments, **how: pytest.fail("drawn"))
    Path("runs/digits/individual").touch()
    assert cli("--sample", 1, "--individual") == 2
    assert "runs/digits/individual is no folder: move it away" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli("--sample", 1) == 2
    assert "samples can't be written to runs/digits: it is read-only" in capsys.readouterr().err


def test_a_process_may_draw_for_days(monkeypatch):
    """The group that gathers all processes' images waits for at least a week."""
    waits = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ddpm.dist, "init_process_group", lambda backend, timeout: waits.append(timeout))
    monkeypatch.setattr(
        ddpm.dist, "all_gather_object", lambda gathered, drawn: gathered.__setitem__(slice(2), [drawn] * 2)
    )
    monkeypatch.setattr(ddpm.dist, "destroy_process_group", lambda: None)
    assert list(ddpm.gather_batches({3: torch.zeros(1)})) == [3]
    assert waits[0].total_seconds() >= 7 * 86400


def test_two_samplings_into_one_run_are_refused(folder, capsys):
    """Their files would be mixed. A sampling during a training is allowed, since they write other files."""
    train(steps=1)
    with ddpm.lock_folder(Path("runs/digits"), "sampling"):
        assert cli("--sample", 1) == 2
    assert "another sampling is running in runs/digits: wait until it ends" in capsys.readouterr().err
    assert not Path("runs/digits/samples.png").exists()
    with ddpm.lock_folder(Path("runs/digits"), "sampling"):  # nor is the run renamed meanwhile
        assert cli("--train", *flags({**TINY, "steps": 2})) == 2
    assert read("runs/digits")["step"] == 1
    with ddpm.lock_folder(Path("runs/digits")):
        assert cli("--sample", 1, "--sampling-steps", 1) == 0
    assert Path("runs/digits/samples.png").exists()


def test_a_folder_of_other_pictures_is_not_taken_for_individual(folder, capsys):
    """Only 00000.png, 00001.png and so on without a gap are an earlier call's."""
    train(steps=1)
    line = ["--sample", 2, "--sampling-steps", 1, "--individual"]
    assert cli(*line) == 0
    assert cli(*line) == 0
    save(folder / "runs" / "digits" / "individual" / "20240101.png")
    assert cli(*line) == 2
    assert (
        "individual holds 20240101.png; --sample writes 00000.png, 00001.png, …: move it away"
        in capsys.readouterr().err
    )
    assert len(list(Path("runs/digits/individual").iterdir())) == 3


def test_sampling_in_bfloat16(random_run, monkeypatch):
    """--bf16 runs the network under torch's autocast, and nothing else."""
    folder, network = random_run
    monkeypatch.chdir(folder)
    assert cli("--sample", 3, "--sampling-steps", 3, "--individual", "--bf16") == 0

    def in_bfloat16(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return network(*inputs)

    (trajectory,) = drawn(in_bfloat16, 3, steps=3)
    got = [np.asarray(Image.open(path)) for path in sorted(Path("runs/digits/individual").iterdir())]
    assert (np.stack(got) == to_grey(trajectory[-1])).mean() > 0.99


@pytest.mark.parametrize("steps, frames, milliseconds", [(5, 5, 300), (50, 50, 60), (None, 10, 150)])
def test_the_animation_shows_every_step_in_order(steps, frames, milliseconds, random_run, monkeypatch):
    """samples.gif: x_{t−1}, …, x_0 of the first batch, each frame within 6 grey levels on average (a GIF has 256
    colours), nearer to its own x_t than to the others; it ends in x_0, which is shown longest."""
    folder, network = random_run
    monkeypatch.chdir(folder)
    how = ["--sampling-steps", steps] if steps else []
    assert cli("--sample", 6, "--sampling-batch", 3, "--animate", "--no-bf16", *how) == 0
    trajectory = drawn(network, 6, batch=3, steps=steps)[0]
    want = np.stack([to_grey(x) for x in trajectory]).astype(float)
    with Image.open("runs/digits/samples.gif") as gif:
        shown, durations = [], []
        for frame in ImageSequence.Iterator(gif):
            shown.append(tiles(frame, 3, 3).astype(float))
            durations.append(frame.info["duration"])
    assert len(shown) == frames == len(want)
    distance = np.abs(np.stack(shown)[:, None] - want).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(frames)).all()
    assert (np.diag(distance) < 6).all()
    assert durations == [milliseconds] * (frames - 1) + [2000]


def test_a_long_animation_is_thinned_to_about_sixty_frames(random_run, monkeypatch):
    """Of more than 60 steps every second, third, … is shown, and x_0."""
    folder, _ = random_run
    monkeypatch.chdir(folder)
    frames = [torch.full((1, 1, 8, 8), i / 150 * 2 - 1) for i in range(151)]
    monkeypatch.setattr(ddpm.Run, "trajectory", lambda self, *_, **__: iter(frames))
    assert cli("--sample", 1, "--animate") == 0
    with Image.open("runs/digits/samples.gif") as gif:
        levels = [np.asarray(frame.convert("L"))[8, 8] for frame in ImageSequence.Iterator(gif)]
    assert levels == pytest.approx([round(i / 150 * 255) for i in [*range(0, 150, 3), 150]], abs=3)


def test_a_run_draws_what_its_checkpoint_holds(random_run, monkeypatch):
    """Run.read has the averaged weights, in evaluation mode; Run.labels takes the classes in turn, or one."""
    folder, _ = random_run
    monkeypatch.chdir(folder)
    run, saved = ddpm.Run.read("runs/digits"), read("runs/digits")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, saved["ema"][name])
        assert not torch.equal(value, saved["model"][name])
    assert not run.model.training
    assert run.labels(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert run.labels(3, 0).tolist() == [0, 0, 0]
    a, b = (ddpm.last(run.trajectory(4, seed=3, sampling_steps=3)) for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="dpm-solver, ddim or ddpm, got 'DDIM'"):
        run.trajectory(4, sampler="DDIM")
    with pytest.raises(ValueError, match="eta is DDIM's, got 0.5 with ddpm"):
        run.trajectory(4, sampler="ddpm", eta=0.5)
    with pytest.raises(ValueError, match="guidance needs labels, got 1.0 without"):
        run.trajectory(4, guidance=1.0)


def test_training_draws_grids_a_column_a_class(folder, monkeypatch):
    """samples-000002.png, every --sample-every steps and at the end: ten images of each class, by DPM-Solver in 10
    steps from the average, all grids from the same noise. The network has random weights, so that images differ."""
    averages, networks = [], []

    def grid(run, step):
        averages.append({name: weight.clone() for name, weight in run.model.state_dict().items()})
        kept = copy.deepcopy(run.model)
        networks.append((step, randomise(run.model)))
        GRID(run, step)
        networks[-1] = (step, copy.deepcopy(run.model))
        run.model.load_state_dict(kept.state_dict())

    monkeypatch.setattr(ddpm.Run, "grid", grid)
    saved = train(steps=3, sample_every=2, bf16=False, ema_decay=0.5, timesteps=60)
    assert same(averages[-1], dict(saved["ema"]))
    assert not same(averages[-1], dict(saved["model"]))
    assert [step for step, _ in networks] == [2, 3]
    diffusion = ddpm.GaussianDiffusion(np.linspace(0.1 / 60, 20 / 60, 60))
    for step, network in networks:
        _, x_T = image_generators(ddpm.derive_seed(SEED + 1, "grid"), 100)
        y = torch.arange(100) % 10
        model = lambda x_t, t, network=network, y=y: network(x_t, t, y)
        x_0 = diffusion.dpm_solver_sample_loop(model, x_T.shape, 10, noise=x_T)
        shown = tiles(Image.open(f"runs/digits/samples-{step:06}.png"), 10, 100)
        assert (shown == to_grey(x_0)).mean() > 0.99


@pytest.mark.parametrize("count, seed", [(600, 3), (251, 0), (2, 2**32 - 1)])
def test_evaluation_written_out(count, seed, folder, monkeypatch, capsys):
    """--evaluate prints means and standard errors of bits_per_dim over all batches of at most 250 held-out images,
    evenly spread over the 700 that there are, with one stream of noise for all of them; rate and distortion; the RMSE
    of x̂_0 at t = 0 on the 0…255 scale."""
    network = make_run("runs/digits", conditional=False, timesteps=6)
    images = torch.randint(0, 256, (700, 1, 8, 8), dtype=torch.uint8)
    asked = []
    monkeypatch.setattr(ddpm, "load_data", lambda *a, **how: asked.append((a[0], how.get("split"))) or (images, None))
    capsys.readouterr()
    assert cli("--evaluate", count, "--seed", seed, "--no-bf16") == 0
    said = capsys.readouterr().out
    assert asked == [("digits", "test")]

    diffusion = ddpm.build_diffusion(ddpm.preset("digits", timesteps=6))
    x = images[[700 * i // count for i in range(count)]].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(ddpm.derive_seed(seed, "evaluation"))
    batches = [diffusion.bits_per_dim(network, part, generator=generator) for part in x.chunk(math.ceil(count / 250))]
    bits = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    middle = bits["L_{t-1}"].sum(1)
    assert re.match(rf"{count} held-out \w+ of digits", said)
    for name, want in (("L_T", bits["L_T"]), ("L_{T-1}", middle), ("L_0", bits["L_0"]), ("NLL ≤", bits["total"])):
        mean, error = map(float, re.search(re.escape(name) + r" +([\d.]+) ± ([\d.]+)", said).groups())
        assert mean == pytest.approx(want.mean().item(), abs=2e-4)
        assert error == pytest.approx(want.std().item() / count**0.5, abs=2e-4)
    rate, distortion, rmse = map(float, re.search(r"rate ([\d.]+), distortion ([\d.]+) \(RMSE ([\d.]+)", said).groups())
    assert rate == pytest.approx((bits["L_T"] + middle).mean().item(), abs=2e-4)
    assert distortion == pytest.approx(bits["L_0"].mean().item(), abs=2e-4)
    assert rmse == pytest.approx(127.5 * bits["squared_error"][:, 0].mean().item() ** 0.5, abs=0.01)


# ======================================================================================================================
# The paper ends here. What follows are regression tests: data, configuration, runs, devices, several processes,
# published weights, the command line, known mistakes of other implementations, and README.
# ======================================================================================================================


# ---- 14. Data --------------------------------------------------------------------------------------------------------

FIRST_ZERO = """
0 0 5 13 9 1 0 0
0 0 13 15 10 15 5 0
0 3 15 2 0 11 8 0
0 4 12 0 0 8 8 0
0 5 8 0 0 9 8 0
0 4 11 0 1 12 7 0
0 2 14 5 10 12 0 0
0 0 6 13 10 0 0 0"""


def test_the_bundled_digits():
    """1,797 images in ten classes of the sizes that the data set's authors publish; 17 grey levels, each k of 0…16 as
    round(255 k/16); the first zero is that of scikit-learn's documentation, upright."""
    images, labels = ddpm.load_data("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels.tolist() == sorted(labels.tolist())
    assert images.unique().tolist() == [round(255 * k / 16) for k in range(17)]
    want = np.array(FIRST_ZERO.split(), dtype=int).reshape(8, 8)
    assert (images[0, 0].numpy() == np.rint(want * 255 / 16)).all()


def test_the_bundled_digits_are_the_uci_digits():
    """Image for image those of scikit-learn, sorted by class."""
    datasets = pytest.importorskip("sklearn.datasets", reason="compares with the source: pip install scikit-learn")
    digits, (images, labels) = datasets.load_digits(), ddpm.load_data("digits")
    order = np.argsort(digits.target, kind="stable")
    assert (labels.numpy() == digits.target[order]).all()
    assert ((images[:, 0].double() * 16 / 255).round().numpy() == digits.images[order]).all()


def test_every_tenth_image_is_held_out():
    """ "test" is every tenth image, "train" the others in their order, and None all; labels go along."""
    (train_, a), (test, b), (every, labels) = (ddpm.load_data("digits", split=s) for s in ("train", "test", None))
    held_out = torch.arange(1797) % 10 == 9
    assert torch.equal(test, every[held_out])
    assert torch.equal(b, labels[held_out])
    assert torch.equal(train_, every[~held_out])
    assert torch.equal(a, labels[~held_out])


def test_pixels_are_scaled_to_minus_one_and_one_and_back():
    """0…255 is [−1, 1] and back without loss; back it is rounded to the nearest and clamped."""
    pixels = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_allclose(ddpm.to_model(pixels), np.arange(256) * 2 / 255 - 1, atol=1e-6)
    assert torch.equal(ddpm.to_pixels(ddpm.to_model(pixels)), pixels)
    x = torch.tensor([-3.0, 3.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 1 - 0.9 / 255, 1 - 1.1 / 255])
    assert ddpm.to_pixels(x).tolist() == [0, 255, 0, 1, 255, 254]


def test_a_grid_is_torchvisions(folder):
    """Rows, columns, lines and the empty places of the last row are those of torchvision's make_grid, enlarged until an
    image is at least 32 pixels wide."""
    for count, channels, columns, size in ((7, 3, 3, 8), (2, 1, 10, 8), (5, 1, None, 20), (1, 3, None, 40)):
        pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
        rows = columns or math.ceil(count**0.5)
        want = torchvision.utils.make_grid(pixels, nrow=rows, padding=1, pad_value=64)
        zoom = max(1, 32 // size)
        if count == 1:  # torchvision draws no lines around a single image
            want = F.pad(want, (1, 1, 1, 1), value=64)
        got = np.asarray(ddpm.make_grid_image(pixels, columns).convert("RGB"))
        assert (got[::zoom, ::zoom] == want.permute(1, 2, 0).numpy()).all()
        assert got.shape[0] == zoom * want.shape[1]


def save(path, mode="RGB", size=(20, 12), colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_a_folder_of_images(tmp_path):
    """Subfolders of the first level are the classes. Images of any size and mode are read, composed on white, resized
    and cropped at the centre; other files are not read. Without subfolders there are no labels."""
    save(tmp_path / "cats" / "a.png")
    save(tmp_path / "cats" / "deep" / "b.JPG", size=(9, 40))
    save(tmp_path / "dogs" / "grey.png", mode="L", colour=(80, 80, 80))
    save(tmp_path / "dogs" / "palette.png", mode="P")
    save(tmp_path / "dogs" / "bilevel.gif", mode="1", colour=(255, 255, 255))
    Image.fromarray(np.full((5, 5), 257 * 100, np.uint16)).save(tmp_path / "dogs" / "deep16.png")
    Image.new("RGBA", (7, 7), (0, 0, 0, 0)).save(tmp_path / "dogs" / "clear.png")
    Image.new("RGBA", (7, 7), (0, 0, 0, 128)).save(tmp_path / "dogs" / "half.png")
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = ddpm.load_data(str(tmp_path), 16)
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    names = [p.name for p in sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".txt")]
    centre = {name: images[i, :, 8, 8].tolist() for i, name in enumerate(names)}
    assert centre["a.png"] == [255, 0, 0]
    assert centre["b.JPG"][0] > 250
    assert centre["grey.png"] == [80] * 3
    assert centre["palette.png"][0] > 250
    assert centre["bilevel.gif"] == [255] * 3
    assert centre["deep16.png"] == [100] * 3
    assert centre["clear.png"] == [255] * 3
    assert centre["half.png"] == pytest.approx([127] * 3, abs=1)
    assert ddpm.load_data(str(tmp_path / "cats" / "deep"), 8)[1] is None


def test_images_are_cropped_averaged_and_turned_upright(tmp_path):
    """The middle of a wide image and of a tall one; pixels are averaged when an image is made smaller; the orientation
    that a camera wrote into EXIF is applied."""
    for name, size, ends in (
        ("wide", (30, 10), [(0, 0, 10, 10), (20, 0, 30, 10)]),
        ("tall", (10, 30), [(0, 0, 10, 10), (0, 20, 10, 30)]),
    ):
        image = Image.new("RGB", size, "black")
        for box in ends:
            image.paste("white", box)
        image.save(tmp_path / f"{name}.png")
    assert (ddpm.load_data(str(tmp_path), 10)[0] == 0).all()
    stripes = np.zeros((40, 40), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    grey = ddpm.load_data(str(tmp_path), 10)[0][0]
    assert (grey[:, 2:-2, 2:-2].int() - 127).abs().max() <= 1  # averaged, not picked
    (tmp_path / "stripes.png").unlink()
    image = Image.new("RGB", (10, 10), "black")
    image.paste("white", (0, 0, 10, 5))  # white above, as the sensor saw it
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° clockwise to display": white on the right
    image.save(tmp_path / "turned.png", exif=exif)
    turned = ddpm.load_data(str(tmp_path), 10)[0][1]
    assert (turned[:, :, 5:] == 255).all()
    assert (turned[:, :, :5] == 0).all()


def test_what_is_read_in_a_folder(tmp_path):
    """Hidden files and folders, files that are no images, and a run's own grids are left out; a linked folder of images
    is read, a link back to its parent is not followed. Classes are in natural order."""
    for name in ("1/a.png", "2/a.png", "10/a.png", "10/._b.png", ".ipynb_checkpoints/1/c.png", "1/sub/d.PNG"):
        save(tmp_path / "images" / name)
    save(tmp_path / "elsewhere" / "e.jpg")
    (tmp_path / "images" / "11").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "1" / "back").symlink_to(tmp_path / "images")
    run = tmp_path / "images" / "runs" / "images"
    save(run / "samples-000010.png")
    (run / "log.csv").write_text("step,loss,gradient_norm,learning_rate,images_per_second\n")
    for name in ("notes.pdf", "sheet.eps", "values.h5", "1/film.mpg"):
        (tmp_path / "images" / name).write_text("no image")
    data = ddpm.read_data(str(tmp_path / "images"), 8)
    assert data.classes == ["1", "2", "10", "11"]
    assert data.labels.tolist() == [0, 0, 1, 2, 3]
    assert sorted(data.skipped) == ["film.mpg", "notes.pdf", "sheet.eps", "values.h5"]


def test_which_images_of_a_folder_are_held_out(tmp_path):
    """Those whose file has a CRC-32 divisible by ten: another image or another name changes nothing for the rest. If
    that were all of them, none is held out."""
    rng = np.random.default_rng(SEED)
    for i in range(100):
        path = tmp_path / "images" / f"{i}.png"
        save(path, size=(8, 8), colour=tuple(rng.integers(256, size=3).tolist()))
    files = {path: zlib.crc32(path.read_bytes()) % 10 == 0 for path in (tmp_path / "images").iterdir()}
    colours = {path: tuple(np.asarray(Image.open(path))[4, 4].tolist()) for path in files}

    def assert_split(files):
        for name, held_out in (("test", True), ("train", False)):
            images, _ = ddpm.load_data(str(tmp_path / "images"), 8, split=name)
            got = [tuple(image[:, 4, 4].tolist()) for image in images]
            assert sorted(got) == sorted(colours[path] for path, out in files.items() if out is held_out)

    assert_split(files)
    kept_out = next(path for path, out in files.items() if out)
    kept_out.rename(tmp_path / "images" / "zz.png")
    assert_split(files)
    added = tmp_path / "images" / "0a.png"
    save(added, size=(8, 9), colour=(1, 2, 3))
    colours[added] = (1, 2, 3)
    assert_split({**files, added: zlib.crc32(added.read_bytes()) % 10 == 0})
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((tmp_path / "images" / "zz.png").read_bytes())
    assert len(ddpm.load_data(str(tmp_path / "one"), 8, split="train")[0]) == 1


def test_grey_images_have_one_channel_and_deep_ones_are_read_right(tmp_path):
    """A folder of grey images, whatever their mode, has one channel; with one colour image it has three. 16 bits become
    8; pixels of 32 bits, whose range is not known, are refused by name."""
    save(tmp_path / "l.png", mode="L", colour=(80, 80, 80))
    save(tmp_path / "rgb.jpg", colour=(80, 80, 80))
    Image.fromarray(np.full((5, 5), 257 * 80, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((5, 5), 257 * 80, np.uint16)).save(tmp_path / "deep.tif")
    images, _ = ddpm.load_data(str(tmp_path), 4)
    assert images.shape == (4, 1, 4, 4)
    assert (images == 80).all()
    save(tmp_path / "red.png")
    assert ddpm.load_data(str(tmp_path), 4)[0].shape == (5, 3, 4, 4)
    for pixels in (np.full((5, 5), 0.5, np.float32), np.full((5, 5), 300, np.int32)):
        Image.fromarray(pixels).save(tmp_path / "values.tif")
        with pytest.raises(ValueError, match=r"values.tif can't be read as an image: .*32 bits"):
            ddpm.load_data(str(tmp_path), 4)


FORMATS = ("png", "jpg", "gif", "bmp", "ppm", "pgm", "tif", "webp", "tga", "jp2", "avif")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_image_is_read_or_named(suffix, tmp_path):
    """Forty damaged copies of a small image of each format: cut off, a byte changed, a stretch of zeros or noise. Each
    is read, or refused with a ValueError of one line that names the file."""
    rng = np.random.default_rng([SEED, FORMATS.index(suffix)])
    path = tmp_path / f"image.{suffix}"
    mode = "L" if suffix == "pgm" else "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6
    how = dict(exif=exif) if suffix in ("jpg", "png", "webp") else {}
    try:
        Image.fromarray(rng.integers(256, size=(12, 9, 3), dtype=np.uint8)).convert(mode).save(path, **how)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow can't write .{suffix}: pip install --upgrade pillow")
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for i in range(40):
        damaged, at = whole.copy(), int(rng.integers(len(whole)))
        if i % 4 == 0:
            damaged = damaged[:at]
        elif i % 4 == 1:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif i % 4 == 2:
            damaged[at : at + 16] = 0
        else:
            damaged[at : at + 16] = rng.integers(256, size=len(damaged[at : at + 16]))
        path.write_bytes(damaged.tobytes())
        try:
            assert ddpm.read_image(path, 8).shape == (3, 8, 8)
        except ValueError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    """Decoders of damaged files have raised all of these."""
    path = tmp_path / "image.png"
    save(path)
    for kind in (RuntimeError, NotImplementedError, TypeError, SyntaxError, struct.error, EOFError, MemoryError):
        monkeypatch.setattr(Image, "open", lambda path, kind=kind: (_ for _ in ()).throw(kind("two\nlines")))
        with pytest.raises(ValueError, match=f"{path} can't be read as an image: two lines"):
            ddpm.read_image(path, 8)


def test_names_that_lead_nowhere_or_have_two_lines(folder, capsys):
    """A link to a missing file is named; a file's name of two lines is printed as one."""
    save(folder / "images" / "a.png")
    Path("images/broken.png").symlink_to("missing.png")
    assert cli("--train", *flags({**TINY, "data": "images", "steps": 1})) == 2
    assert "images/broken.png can't be read as an image" in capsys.readouterr().err
    Path("images/broken.png").rename("images/two\nlines.png")
    assert cli("--train", *flags({**TINY, "data": "images", "steps": 1})) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_16_bit_images_that_would_be_read_wrongly_are_refused(tmp_path):
    """A transparent colour, which Pillow compares with 8 bits, and TIFF in which 0 is white."""
    grey = Image.fromarray(np.full((9, 9), 30000, dtype=np.uint16))
    grey.save(tmp_path / "plain.png")
    assert (ddpm.read_image(tmp_path / "plain.png", 8) == 117).all()  # 30000/257 = 116.7
    grey.save(tmp_path / "transparent.png", transparency=30000)
    grey.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    for name in ("transparent.png", "inverted.tif"):
        with pytest.raises(ValueError, match=f"{name} can't be read as an image: 16-bit .* not supported"):
            ddpm.read_image(tmp_path / name, 8)


def test_of_each_class_something_is_trained_on(tmp_path):
    """A class whose images would all be held out keeps them."""
    rng = np.random.default_rng(SEED)
    kept_out = tmp_path / "images" / "b" / "0.png"
    for _ in range(300):  # no file of 300 is divisible by ten in 2e−14 of all runs
        save(kept_out, size=(8, 8), colour=tuple(rng.integers(256, size=3).tolist()))
        if zlib.crc32(kept_out.read_bytes()) % 10 == 0:
            break
    else:
        pytest.fail("no image that would be held out")
    for i in range(40):
        save(tmp_path / "images" / "a" / f"{i}.png", size=(8, 8), colour=tuple(rng.integers(256, size=3).tolist()))
    _, labels = ddpm.load_data(tmp_path / "images", 8, split="train")
    assert (labels == 1).sum() == 1
    held_out = sum(zlib.crc32(path.read_bytes()) % 10 == 0 for path in (tmp_path / "images" / "a").iterdir())
    assert (labels == 0).sum() == 40 - held_out


def test_a_folder_with_a_log_of_its_own_is_no_run(folder, capsys):
    """log.csv of another program may begin with step,loss: the folder's images are read, and a run is not put there."""
    for name in ("a", "b"):
        save(folder / "images" / name / "0.png", size=(8, 8))
    Path("images/a/log.csv").write_text("step,loss,accuracy\n1,2,3\n")
    assert len(ddpm.read_data("images", 8).images) == 2
    assert cli("--train", *flags({**TINY, "out": "images/a"})) == 2
    assert "images/a/log.csv is not that of a run" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [None, "images", "labels"])
def test_resuming_mentions_images_that_have_changed(changed, folder, capsys):
    """Two classes whose folders exchange their names: the classes and their numbers of images are the same. Or one
    image of the second class becomes the last of the first: all images keep their places."""
    for name, red in (("cats", 0), ("dogs", 200)):
        for i in range(10):
            save(folder / "pictures" / name / f"{i}.png", size=(8, 8), colour=(red, i, 99))
    assert cli("--train", *flags({**TINY, "data": "pictures", "image_size": 8, "steps": 1})) == 0
    before = ddpm.load_data("pictures", 8, split="train")
    if changed == "images":
        Path("pictures/cats").rename("pictures/other")
        Path("pictures/dogs").rename("pictures/cats")
        Path("pictures/other").rename("pictures/dogs")
    elif changed == "labels":
        Path("pictures/dogs/0.png").rename("pictures/cats/z.png")
        after = ddpm.load_data("pictures", 8, split="train")
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False]
    capsys.readouterr()
    assert cli("--train", "--resume", "--steps", 2) == 0
    line = "the images of pictures as read, or their labels, have changed since the run's last checkpoint"
    assert (line in capsys.readouterr().out.splitlines()) == (changed is not None)


def test_classes_named_by_numbers_are_chosen_by_name(folder, capsys):
    """Of folders 1, 2 and 3, number 0 is 1: --label takes the names alone."""
    run = types.SimpleNamespace(classes=["1", "2", "x"], model=types.SimpleNamespace(num_classes=3))
    assert [ddpm.Run.find_label(run, name) for name in ("1", "2", "x")] == [0, 1, 2]
    for label in ("0", 0, 1, "y"):
        with pytest.raises(ValueError, match=f"--label must be one of 1, 2, x, got {label}$"):
            ddpm.Run.find_label(run, label)
    for names in (["0", "1", "2"], ["cats", "dogs", "x"], None):
        run.classes = names
        assert [ddpm.Run.find_label(run, label) for label in ("0", 1, "2")] == [0, 1, 2]


@pytest.mark.parametrize("where", ["alpha_composite", "fit"])
def test_too_little_memory_for_an_image_names_it(where, folder, monkeypatch):
    """While its transparency is filled, and while it is resized."""

    def exhausted(*_, **__):
        raise MemoryError

    save(folder / "a.png", mode="RGBA")
    monkeypatch.setattr(*dict(alpha_composite=(ddpm.Image, where), fit=(ddpm.ImageOps, where))[where], exhausted)
    with pytest.raises(ValueError, match="a.png can't be read as an image: MemoryError"):
        ddpm.read_image(Path("a.png"), 8)


@pytest.mark.parametrize("size, factor", [((640, 480), 4), ((480, 640), 4), ((300, 127), 1), ((60, 40), 1)])
def test_a_large_jpeg_is_reduced_as_it_is_decoded(size, factor, tmp_path):
    """By a power of two, to no less than four times image_size, here 64; other formats are not. The image differs by at
    most two grey levels from that of the whole file."""
    waves = [127.5 + 120 * np.sin(np.mgrid[0 : size[1], 0 : size[0]][i % 2] / (9 + 4 * i)) for i in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as file:
        whole = ImageOps.fit(file.convert("RGB"), (16, 16), Image.Resampling.LANCZOS)
    got = ddpm.read_image(tmp_path / "a.jpg", 16).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - np.asarray(whole)).max() <= 2
    assert ddpm.decode_image(tmp_path / "a.jpg", 16).size == (size[0] // factor, size[1] // factor)
    image.save(tmp_path / "a.png")
    assert ddpm.decode_image(tmp_path / "a.png", 16).size == size


def test_a_folder_is_described_before_training(folder, capsys):
    """How many images of which colour and size, held out, not read; classes with their numbers of images. Training
    stores the names, --label takes them, and resuming refuses other classes and mentions other images."""
    for i in range(30):
        save(folder / "pictures" / ("cats", "dogs")[i % 3 == 0] / f"{i}.png", size=(8, 8), colour=(8 * i, 0, 99))
    (folder / "pictures" / "notes.txt").write_text("")
    how = {**TINY, "data": "pictures", "image_size": 8, "steps": 2}
    assert cli("--train", *flags(how)) == 0
    held_out = sum(zlib.crc32(path.read_bytes()) % 10 == 0 for path in Path("pictures").rglob("*.png"))
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        f"pictures: 30 colour images as 8×8; {held_out} of them held out; 1 other files not read (.txt)",
        "fewer than 10 held-out images: ema_loss_held_out in log.csv can't show whether the network memorises",
        "labels: 0 = cats (20), 1 = dogs (10)",
    ]
    assert said[3].startswith(f"{30 - held_out} images of pictures, ")

    out = ("--out", "runs/pictures", "--no-bf16", "--sampling-steps", 2)
    pictures = []
    for label in ("dogs", "1"):
        assert cli("--sample", 4, "--label", label, *out) == 0
        pictures.append(Path("runs/pictures/samples.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert cli("--sample", 4, "--label", "birds", *out) == 2
    assert "--label must lie in 0…1 or be one of cats, dogs, got birds" in capsys.readouterr().err

    save(folder / "pictures" / "dogs" / "new.png", size=(8, 9))
    assert cli("--train", "--resume", "--steps", 3) == 0
    more = 31 - held_out - (zlib.crc32(Path("pictures/dogs/new.png").read_bytes()) % 10 == 0)
    if more != 30 - held_out:
        assert f"pictures has {more} images to train on; it had {30 - held_out}" in capsys.readouterr().out
    Path("pictures/cats").rename("pictures/zebras")
    assert cli("--train", "--resume", "--steps", 4) == 2
    assert "pictures has other classes than the run in runs/pictures: ['cats', 'dogs']" in capsys.readouterr().err


def test_many_classes_and_what_is_held_out_are_described(tmp_path):
    """Twenty classes are named, and five suffixes of other files. Fewer than ten held-out images are called too few."""
    images = torch.zeros(210, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(210) % 21
    for held_out, few in ((9, True), (10, False)):
        skipped = [f"{i}{suffix}" for i, suffix in enumerate([".a", ".b", ".c", ".d", ".e", ".f"] * 2)]
        data = ddpm.Data(images, labels, [str(i) for i in range(21)], torch.arange(210) < held_out, skipped)
        lines = ddpm.describe_folder(ddpm.Config("many"), data).split("\n")
        other = "12 other files not read (.a, .b, .c, .d, .e)"
        assert lines[0] == f"many: 210 grey images as 8×8; {held_out} of them held out; {other}"
        assert ("fewer than 10 held-out images" in lines[1]) == few
        assert lines[-1] == f"labels: {', '.join(f'{i} = {i} (10)' for i in range(20))}, …"
    lines = ddpm.describe_folder(ddpm.Config("many", conditional=False), data).split("\n")
    assert lines[-1] == "labels: not learned (--no-conditional)"


def test_images_beside_the_subfolders_are_a_class(folder, capsys):
    """If there are two subfolders or more; --label draws it by its name. Beside one subfolder, nothing is a class."""
    for i in range(6):
        for path in (f"1/{i}.png", f"2/{i}.png", f"{i}.png"):
            save(folder / "pictures" / path, size=(8, 8), colour=(8 * i, 0, 99))
    assert cli("--train", *flags({**TINY, "data": "pictures", "image_size": 8, "steps": 1})) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "labels: 0 = (no folder) (6), 1 = 1 (6), 2 = 2 (6)"
    assert cli("--sample", 4, "--label", "(no folder)", "--out", "runs/pictures", "--sampling-steps", 2) == 0
    assert ddpm.Run.read("runs/pictures").find_label("(no folder)") == 0
    shutil.rmtree(folder / "pictures" / "2")
    assert ddpm.load_data("pictures", 8)[1] is None


def test_all_files_that_cant_be_read_are_named_at_once(folder, capsys):
    """Three of them with the reason, and how many more there are. Where nothing can be read, the suffixes are named."""
    for i in range(5):
        save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.jpg").write_bytes(b"not an image")
    assert cli("--train", *flags({**TINY, "data": "pictures", "steps": 1})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for i in range(3):
        assert f"pictures/{i}.jpg can't be read as an image: cannot identify image file" in line
    assert line.endswith("; and 2 more")
    (folder / "phone").mkdir()
    for name in ("a.HEIC", "b.HEIC"):
        (folder / "phone" / name).write_bytes(b"")
    assert cli("--train", *flags({**TINY, "data": "phone", "steps": 1})) == 2
    assert "or in subfolders; it has 2 other files (.HEIC)" in capsys.readouterr().err


def test_a_folder_without_classes_says_so(folder, capsys):
    """With fewer than two subfolders there is nothing to learn a label from, even if --conditional asks for it."""
    for i in range(12):
        save(folder / "pictures" / "all" / f"{i}.png", size=(8, 8), colour=(8 * i, 0, 99))
    how = {**TINY, "data": "pictures", "image_size": 8, "steps": 1}
    assert cli("--train", *flags(how), "--conditional") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "labels: none (labels need two or more subfolders, one for each class)"
    assert ddpm.Run.read("runs/pictures").model.num_classes is None


@pytest.mark.parametrize("name, channels", [("mnist", 1), ("fashion_mnist", 1), ("cifar10", 3)])
def test_torchvision_data_sets_arrive_channels_first(name, channels, folder, monkeypatch):
    """torchvision's containers (a tensor for MNIST, an HWC array and a list for CIFAR-10) become uint8 (N, C, H, W) and
    int64; "test" is the test set, "train" and None the training set."""

    class Fake:
        classes = [f"class {i}" for i in range(6)]

        def __init__(self, root, train, download):
            assert (root, download) == ("data", True)
            self.data = np.zeros((6, 32, 32, 3), np.uint8) if channels == 3 else torch.zeros(6, 28, 28).byte()
            self.data[2:, 1, 3] = 7 if train else 9
            self.targets = list(range(6)) if channels == 3 else torch.arange(6)

    monkeypatch.setattr(
        torchvision.datasets, dict(mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")[name], Fake
    )
    for split, value in ((None, 7), ("train", 7), ("test", 9)):
        images, labels = ddpm.load_data(name, split=split)
        assert images.shape == ((6, 1, 28, 28) if channels == 1 else (6, 3, 32, 32))
        assert images.dtype == torch.uint8
        assert (images[2:, :, 1, 3] == value).all()
        assert images.sum() == value * 4 * channels
        assert labels.tolist() == list(range(6))
        assert labels.dtype == torch.int64


def test_one_process_downloads_and_the_others_wait(folder, monkeypatch):
    """Four threads ask for a data set at once; torchvision is called by one at a time."""
    inside, most = [], []

    class Fake:
        classes = ["one"]

        def __init__(self, root, train, download):
            inside.append(1)
            time.sleep(0.05)
            most.append(len(inside))
            inside.pop()
            self.data, self.targets = torch.zeros(6, 28, 28).byte(), torch.zeros(6).long()

    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ddpm.load_data, ["mnist"] * 4))
    assert most == [1] * 4


def test_a_failed_download_is_one_line_that_says_what_to_do(folder, monkeypatch):
    """It names the reason and the alternatives."""

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(ValueError, match="cifar10 .*Name or service not known.*--data digits"):
        ddpm.load_data("cifar10")


DAMAGED_IDX = dict(
    empty=lambda whole: b"",
    header=lambda whole: b"\x13\x37" + whole[2:],
    page=lambda whole: b"<!DOCTYPE html><title>404</title>",
    dtype=lambda whole: whole[:2] + b"\x0d" + whole[3:],
    cut=lambda whole: whole[:-1],
    fewer=lambda whole: whole[:7] + b"\x03" + whole[8:11],  # three labels for four images
)


@pytest.mark.parametrize("damage", DAMAGED_IDX)
def test_damaged_files_of_torchvision_are_one_line(damage, folder, capsys):
    """Four images of MNIST and their labels in torchvision's files, whole and damaged."""
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 4, 28, 28) + bytes(4 * 28 * 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 4) + bytes(range(4)))
    assert ddpm.load_data("mnist")[1].tolist() == [0, 1, 2, 3]
    path = raw / "train-labels-idx1-ubyte"
    path.write_bytes(DAMAGED_IDX[damage](path.read_bytes()))
    assert cli("--train", *flags({**TINY, "data": "mnist"})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"ddpm.py: error: mnist can be neither read from data/ nor downloaded \(.+\); delete its files", line
    )


# ---- 15. Configuration -----------------------------------------------------------------------------------------------

UNUSUAL = dict(
    data="pictures",
    image_size=12,
    dim=12,
    dim_mults=(1, 3),
    num_res_blocks=2,
    attn_resolutions=(6,),
    dropout=0.25,
    label_dropout=0.9,
    timesteps=30,
    schedule="cosine",
    variance="learned_range",
    prediction="velocity",
    loss="bound",
    steps=5,
    batch_size=6,
    lr=0.004,
    warmup=1,
    lr_decay="linear",
    grad_clip=0.5,
    ema_decay=0.05,
    flip=True,
    seed=SEED + 11,
    log_every=3,
    sample_every=2,
    checkpoint_every=4,
    bf16=True,
    compile=True,
    device="cpu",
    out="elsewhere",
)


@pytest.fixture(scope="module")
def unusual_run(tmp_path_factory):
    """What is seen of a run in which no field of Config has its default, nor the value of its data set's preset."""
    folder = tmp_path_factory.mktemp("unusual")
    seen = types.SimpleNamespace(labels=[], saved_at=[], grids=[], devices=[], compiled=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for i in range(20):
            save(folder / "pictures" / str(i % 2) / f"{i}.png", colour=(12 * i, 0, 255 - 12 * i))
        p_losses, forward, write = ddpm.GaussianDiffusion.p_losses, ddpm.UNet.forward, ddpm.atomic_write
        pick_device, run_to_the_end = ddpm.pick_device, ddpm.train

        def watched_train(config, *more):
            assert config.steps == UNUSUAL["steps"]  # not the 50,000 of a folder's preset
            return run_to_the_end(config, *more)

        def watched_losses(self, *batch):
            seen.diffusion = self
            return p_losses(self, *batch)

        def watched_forward(self, x, t, y=None):
            seen.network, seen.shape = self, x.shape
            answer = forward(self, x, t, y)
            if self.training:
                seen.labels += y.tolist()
                seen.dtype = answer.dtype
            return answer

        def watched_write(path, save):
            write(path, save)
            if path.name == "checkpoint.pt":
                seen.saved_at.append(torch.load(path, weights_only=True)["step"])

        def watched_compile(network, **how):
            seen.compiled += 1
            return network

        patch.setattr(ddpm.GaussianDiffusion, "p_losses", watched_losses)
        patch.setattr(ddpm.UNet, "forward", watched_forward)
        patch.setattr(ddpm, "atomic_write", watched_write)
        patch.setattr(ddpm, "pick_device", lambda name=None: seen.devices.append(name) or pick_device(name))
        patch.setattr(torch, "compile", watched_compile)
        patch.setattr(ddpm.Run, "grid", lambda run, step: seen.grids.append(step))
        patch.setattr(ddpm, "train", watched_train)
        assert cli("--train", *flags(UNUSUAL)) == 0
        seen.saved, seen.log = read("elsewhere"), log_of("elsewhere")
        seen.files = sorted(p.name for p in Path("elsewhere").iterdir())
    seen.shapes = {name: tuple(weight.shape) for name, weight in seen.saved["model"].items()}
    return seen


COSINE_30 = [math.cos((t / 30 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(31)]
WRITTEN_OUT = test_training_is_algorithm_1  # EVERYTHING and PLAIN differ in it, and it is compared there
REACHES = dict(
    data=lambda run: run.saved["image_channels"] == 3 and run.saved["num_classes"] == 2,
    image_size=lambda run: run.shape[2:] == (12, 12),
    dim=lambda run: run.shapes["conv_in.weight"][0] == 12,
    dim_mults=lambda run: (
        run.shapes["down_blocks.1.resnets.0.conv1.weight"][0] == 36
        and "down_blocks.2.resnets.0.conv1.weight" not in run.shapes
    ),
    num_res_blocks=lambda run: (
        "down_blocks.0.resnets.1.conv1.weight" in run.shapes
        and "down_blocks.0.resnets.2.conv1.weight" not in run.shapes
    ),
    attn_resolutions=lambda run: (
        "down_blocks.1.attentions.0.to_q.weight" in run.shapes
        and "down_blocks.0.attentions.0.to_q.weight" not in run.shapes
    ),
    dropout=lambda run: {m.p for m in run.network.modules() if isinstance(m, nn.Dropout)} == {0.25},
    conditional=WRITTEN_OUT,
    label_dropout=lambda run: run.labels.count(2) > len(run.labels) / 2,  # 32 of 36 expected; p = 2e−9 for half
    timesteps=lambda run: run.diffusion.timesteps == 30,
    schedule=lambda run: np.allclose(run.diffusion.alphas_cumprod[:28], np.divide(COSINE_30[1:29], COSINE_30[0])),
    variance=lambda run: run.diffusion.variance_type == "learned_range" and run.shapes["conv_out.weight"][0] == 6,
    prediction=lambda run: run.diffusion.prediction_type == "velocity",
    loss=lambda run: run.diffusion.loss_type == "bound",
    weights=lambda run: run.saved["config"]["weights"] is None,  # see test_training_starts_from_published_weights
    steps=lambda run: run.log[-1, 0] == 5 == run.saved["step"],
    batch_size=lambda run: len(run.labels) == (1 + 5) * 6,  # one step is tried first
    lr=WRITTEN_OUT,
    warmup=lambda run: np.allclose(run.log[1:, 3], [0.004 * 0.6, 0.004 * 0.4, 0.004 * 0.2]),
    lr_decay=WRITTEN_OUT,
    grad_clip=WRITTEN_OUT,
    ema_decay=WRITTEN_OUT,
    flip=WRITTEN_OUT,
    seed=WRITTEN_OUT,
    log_every=lambda run: run.log[:, 0].tolist() == [2, 3, 4, 5],  # and with each checkpoint and grid
    sample_every=lambda run: run.grids == [2, 4, 5],
    checkpoint_every=lambda run: run.saved_at == [4, 5],
    bf16=lambda run: run.dtype == torch.bfloat16,
    compile=lambda run: run.compiled == 1,
    device=lambda run: run.devices == ["cpu"],
    out=lambda run: "checkpoint.pt" in run.files,
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ddpm.Config)])
def test_every_field_of_config_reaches_what_it_configures(field, unusual_run):
    """By its flag, and over the preset of the data set. A field without an entry in REACHES fails; one that is proven
    by test_training_is_algorithm_1 differs between its two runs."""
    if REACHES[field] is WRITTEN_OUT:
        given = dict(PLAIN, **{name: value for name, value in TINY.items() if name not in PLAIN})
        default = getattr(ddpm.Config(), field)
        assert any({**given, **run}.get(field, default) != default for run in (EVERYTHING, PLAIN))
    else:
        assert REACHES[field](unusual_run)


def test_the_cifar10_preset_is_the_papers():
    """§4 and appendix B, and UNet's defaults besides."""
    paper = dict(
        image_size=32,
        dim=128,
        dim_mults=(1, 2, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(16,),
        dropout=0.1,
        conditional=False,
        timesteps=1000,
        schedule="linear",
        variance="fixed_large",
        loss="simple",
        prediction="noise",
        steps=800_000,
        batch_size=128,
        lr=2e-4,
        warmup=5000,
        lr_decay="constant",
        grad_clip=1.0,
        ema_decay=0.9999,
        flip=True,
    )
    config = dataclasses.asdict(ddpm.preset("cifar10"))
    assert {name: config[name] for name in paper} == paper
    network, diffusion = ddpm.build(ddpm.preset("cifar10"), 3, None)
    assert {name: p.shape for name, p in network.named_parameters()} == {
        name: p.shape for name, p in paper_network().named_parameters()
    }
    np.testing.assert_allclose(diffusion.betas, BETAS, rtol=1e-6)


SMALL_GREY = dict(image_size=28, dim=16, dim_mults=(1, 2, 4), attn_resolutions=(7,), steps=3000, batch_size=32)
SMALL_GREY.update(num_res_blocks=1, lr=2e-3, warmup=200, lr_decay="linear", dropout=0, flip=False, conditional=True)
SMALL_GREY.update(schedule="cosine", prediction="velocity")
SETTINGS = dict(
    digits=dict(
        image_size=8,
        dim=32,
        dim_mults=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        steps=1200,
        batch_size=128,
        lr=3e-3,
        warmup=50,
        lr_decay="linear",
        dropout=0,
        flip=False,
        conditional=True,
    ),
    mnist=SMALL_GREY,
    fashion_mnist=SMALL_GREY,
    folder=dict(
        SMALL_GREY,
        image_size=32,
        dim_mults=(1, 2, 4, 8),
        attn_resolutions=(8,),
        steps=7000,
        lr=1e-3,
    ),
    gpu=dict(
        schedule="cosine",
        prediction="velocity",
        image_size=32,
        dim=128,
        dim_mults=(1, 2, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(16,),
        steps=50_000,
        batch_size=128,
        lr=2e-4,
        warmup=500,
        lr_decay="constant",
        dropout=0.1,
        flip=False,
        conditional=True,
    ),
)


@pytest.mark.parametrize("data, settings", SETTINGS.items(), ids=SETTINGS)
def test_the_other_presets_are_those_of_readmes_results(data, settings):
    """What the images and times of README were made with; all have the paper's clipping and average, and digits and
    CIFAR-10 the paper's diffusion. --preset names one for any data."""
    config = dataclasses.asdict(ddpm.preset("some/gpu", "gpu") if data == "gpu" else ddpm.preset(data))
    paper = dict(schedule="linear", prediction="noise", timesteps=1000, variance="fixed_large", loss="simple")
    settings = {**paper, **settings, "label_dropout": 0.1}
    settings.update(grad_clip=1.0, ema_decay=0.9999, seed=0, out=f"runs/{data}")
    assert {name: config[name] for name in settings} == settings


def test_a_preset_yields_to_what_is_given():
    """preset(data, **changes) changes just these fields; without --data the data set is digits."""
    config = ddpm.preset("cifar10", lr=1e-3, flip=False)
    assert (config.lr, config.flip, config.steps) == (1e-3, False, 800_000)
    assert ddpm.preset("a/folder/of/images").out == "runs/images"
    assert ddpm.preset("digits") == ddpm.Config()


def test_a_step_that_needs_more_memory_than_there_is_is_refused(folder, monkeypatch, capsys):
    """Before the earlier run is moved."""
    train(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "total_memory", lambda device: 7 * 2**30)
        for more, inputs, number in (("--bf16", 6, 2), ("--no-bf16", 6, 4), ("--compile", 4, 4)):
            line = flags({**TINY, "batch_size": 10**12, "steps": 1, "bf16": more == "--bf16"})
            assert cli("--train", *line, more) == 2
            needed = 10**12 * 3 * inputs * 8 * 8**2 * number / 2**30  # three blocks, 8 channels, 8×8 pixels
            step = "a step on 1,000,000,000,000 images of 8×8"
            assert f"{step} needs more than {needed:,.0f} GiB of memory, there are 7: make" in capsys.readouterr().err
    assert sorted(path.name for path in Path("runs").iterdir() if not path.name.startswith(".")) == ["digits"]


def test_a_step_is_refused_only_if_it_needs_more_memory(monkeypatch):
    """What is assumed lies below what torch really keeps for the backward pass, here counted by its hooks, and above a
    third of that. To it are added the weights, their gradients, their average and Adam's two moments."""
    kept = {}
    config = ddpm.preset("digits", batch_size=4, bf16=False)
    network, _ = ddpm.build(config, 1, 10)

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = network(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)).sum()
    for weight in network.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    really = sum(kept.values())
    loss.backward()
    weights = 20 * sum(weight.numel() for weight in network.parameters())
    for memory, refused in ((weights + really, False), (weights + really // 3, True), (0.9 * weights, True)):
        memory = int(memory)
        monkeypatch.setattr(os, "sysconf", lambda name, memory=memory: 1 if name == "SC_PAGE_SIZE" else memory)
        with pytest.raises(ValueError, match="smaller") if refused else contextlib.nullcontext():
            ddpm.check_memory(config, torch.device("cpu"))


def test_a_folder_that_needs_more_memory_than_there_is_is_refused(folder, monkeypatch):
    """Before an image is read: the pixels of all images, and a copy of them."""
    save(folder / "pictures" / "1.png")
    monkeypatch.setattr(ddpm, "total_memory", lambda device: 2 * 3 * 64**2)
    ddpm.load_data("pictures", 64)
    with pytest.raises(ValueError, match="1 images as 40000×40000 need 9 GiB of memory, there are 0: make"):
        ddpm.load_data("pictures", 40_000)


def test_memory_is_measured_in_gib(monkeypatch):
    """Of the GPU by torch's counter. Of the process by getrusage, which counts KiB on Linux and bytes on macOS."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 5 * 2**30))
    assert ddpm.peak_memory(torch.device("cuda", 1)) == 3
    assert ddpm.total_memory(torch.device("cuda", 1)) == 5 * 2**30
    resource = pytest.importorskip("resource", reason="Windows has no resource module: run it on Linux or macOS")
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=5 * 2**20))
    for platform_name, want in (("linux", 5), ("darwin", 5 / 1024)):
        monkeypatch.setattr(sys, "platform", platform_name)
        assert ddpm.peak_memory(torch.device("cpu")) == want
    monkeypatch.setattr(os, "sysconf", dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=10).__getitem__)
    assert ddpm.total_memory(torch.device("cpu")) == 40_960


def test_the_preset_of_other_data_can_be_asked_for(folder, monkeypatch):
    """--preset cifar10 is the paper's settings for a folder of images; flags are laid over it."""
    configs = []
    monkeypatch.setattr(ddpm, "train", configs.append)
    assert cli("--train", "--data", "pictures", "--preset", "cifar10", "--dropout", 0.2) == 0
    paper = ddpm.preset("cifar10", dropout=0.2)
    assert configs == [dataclasses.replace(paper, data="pictures", out="runs/pictures")]
    assert ddpm.preset("digits", "cifar10").image_size == 8  # the size of the data stays


@pytest.mark.parametrize(
    "size, levels, attention",
    [(32, (1, 2, 2, 2), 16), (48, (1, 2, 2, 2), 12), (64, (1, 2, 2, 2), 16), (64, (1, 2), 16), (12, (1, 2), 12)],
)
def test_attention_fits_the_images_of_a_folder(size, levels, attention):
    """By default it is at the largest level of up to 8 pixels, with --preset gpu of up to 16: 48 pixels are halved to
    24, 12 and 6. If no level is as small as that, it is at none. What is given stays."""
    assert ddpm.preset("my_images", "gpu", image_size=size, dim_mults=levels).attn_resolutions == (attention,)
    assert ddpm.preset("my_images", image_size=48, dim_mults=(1, 2, 2, 2)).attn_resolutions == (6,)
    assert ddpm.preset("my_images").attn_resolutions == (8,)
    given = ddpm.preset("my_images", image_size=size, dim_mults=levels, attn_resolutions=(3,))
    assert given.attn_resolutions == (3,)


def test_attention_at_no_level_is_said(folder, capsys):
    """Sizes that no level has leave attention in the middle alone; no sizes mean no attention."""
    train(steps=1, attn_resolutions=(3, 5), dim_mults=(1, 2))
    assert "self-attention in the middle only: no level (8, 4 pixels) is in" in capsys.readouterr().out
    train(steps=1, attn_resolutions=(3, 4), dim_mults=(1, 2))
    assert cli("--train", *flags({**TINY, "steps": 1, "attn_resolutions": ()})) == 0
    assert "self-attention" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [48, 64])
def test_other_sizes_train_and_sample(size, folder):
    """With the levels and the attention of the preset for folders."""
    for i in range(4):
        save(folder / "pictures" / str(i % 2) / f"{i}.png", colour=(60 * i, 0, 255 - 60 * i), size=(50, 40))
    small = dict(data="pictures", image_size=size, dim=4, steps=1, batch_size=2, timesteps=10, sample_every=1)
    assert cli("--train", *flags(small)) == 0
    assert cli("--sample", 2, "--individual", "--sampling-steps", 2) == 0
    assert Image.open("runs/pictures/individual/00001.png").size == (size, size)
    assert read("runs/pictures")["config"]["attn_resolutions"] == {48: (6,), 64: (8,)}[size]


# ---- 16. Runs: log, checkpoints, resuming ----------------------------------------------------------------------------


def test_training_is_reproducible_to_the_bit(folder):
    """Every number in the checkpoint repeats, dropout included; with another seed the weights differ."""
    a, b, c = (train(steps=4, out=out, seed=seed) for out, seed in (("a", SEED), ("b", SEED), ("c", SEED + 1)))
    assert same(a, b)
    assert not same(a["model"], c["model"])


def test_the_log_holds_means(folder):
    """A row of log.csv has the means of the loss and of the gradient's norm over the steps since the row before, and
    the learning rate of its own step."""
    train(steps=4, log_every=1, out="each")
    train(steps=4, log_every=4, out="four")
    each, four = log_of("each"), log_of("four")
    assert each.shape == (4, 4)
    assert four.shape == (1, 4)
    np.testing.assert_allclose(each[:, 1:3].mean(0), four[0, 1:3], atol=1e-4)
    assert each[3, 3] == four[0, 3] == pytest.approx(3e-3 / 4)  # 1 − 3/4 of the preset's rate


def test_the_log_and_the_bar_count_images(folder, monkeypatch):
    """With a clock on which a step takes a second and a grid a hundred, two steps of 8 images are 16 images in 2 s: the
    time of a grid does not count, wherever it is drawn. The bar is given images, and where a resumed run stands."""
    bars, clock, p_losses = [], [0.0], ddpm.GaussianDiffusion.p_losses

    class Bar:
        def __init__(self, *_, **how):
            self.how, self.steps = how, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.steps.append(n)

        def set_postfix(self, loss):
            self.loss = float(loss)

        @staticmethod
        def write(text):
            assert "on held-out images" in text

    def advance(seconds):
        clock[0] += seconds

    monkeypatch.setattr(ddpm.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ddpm, "tqdm", Bar)
    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", lambda *batch: (advance(1), p_losses(*batch))[1])
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: advance(100))
    train(steps=4, sample_every=3)
    assert cli("--train", "--resume", "--steps", 6) == 0
    rows = [row.split(",") for row in Path("runs/digits/log.csv").read_text().splitlines()[1:]]
    assert [(row[0], row[4]) for row in rows] == [("2", "8"), ("3", "8"), ("4", "8"), ("6", "8")]
    assert [(bar.how["total"], bar.how["initial"], bar.steps) for bar in bars] == [(32, 0, [8] * 4), (48, 32, [8] * 2)]
    assert all((bar.how["unit"], bar.how["unit_scale"], bar.how["disable"]) == (" images", True, None) for bar in bars)
    assert [bar.loss for bar in bars] == pytest.approx([float(rows[2][1]), float(rows[3][1])], abs=1e-4)


def test_the_log_compares_training_images_with_held_out_ones(folder, monkeypatch, capsys):
    """In the line of each grid of samples, and on the screen: Eq. 14 of the averaged weights on 512 images of the
    training set and on 512 of those held out, with their labels and without dropout. They are evenly spread over each
    set; the same permutation of evenly spread t and the same ε serve both. Recomputed here for the last line."""
    monkeypatch.setattr(ddpm, "EXAMPLES", 512)
    saved = train(steps=6, log_every=2, sample_every=3, label_dropout=0.5)
    rows = [row.split(",")[5:] for row in Path("runs/digits/log.csv").read_text().splitlines()[1:]]
    assert [row == ["", ""] for row in rows] == [True, False, True, False]  # steps 2, 3, 4 and 6
    which = f"{rows[-1][0]} on training images, {rows[-1][1]} on held-out images"
    assert f"step 6: loss of the averaged weights {which}\n" in capsys.readouterr().out

    network = small(image_channels=1, dim_mults=(1,), num_classes=10)
    network.load_state_dict(saved["ema"])
    images, labels = ddpm.load_data("digits")
    held_out = torch.arange(1797) % 10 == 9
    generator = torch.Generator().manual_seed(ddpm.derive_seed(SEED + 1, "comparison"))
    t = torch.randperm(512, generator=generator) * 50 // 512
    noise = torch.randn((512, 1, 8, 8), generator=generator)
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(0.002, 0.4, 50))).float()[t].reshape(-1, 1, 1, 1)
    for cell, chosen in zip(rows[-1], (~held_out, held_out), strict=True):
        numbers = np.floor(np.arange(512) * chosen.sum().item() / 512).astype(int)
        x_start = images[chosen][numbers] / 127.5 - 1
        x_t = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
        with torch.no_grad():
            loss = (noise - network.eval()(x_t, t, labels[chosen][numbers])).square().mean()
        assert float(cell) == pytest.approx(loss.item(), abs=2e-5)


def test_nothing_is_compared_where_nothing_is_held_out(folder):
    """One image is trained on, and none is left to compare it with."""
    save(folder / "pictures" / "1.png")
    train(data="pictures", image_size=8, steps=2, sample_every=1, out="runs/pictures")
    rows = Path("runs/pictures/log.csv").read_text().splitlines()[1:]
    assert [row[-2:] for row in rows] == [",,", ",,"]


@pytest.mark.parametrize(
    "step_seconds, size, want",
    [
        (0.5, 8, None),  # 42 s to go when five seconds have passed since the fifth step: not worth saying
        (10, 8, "0.1 steps/s: 16 min to go; memory "),
        (
            100,
            8,
            "0.01 steps/s: 2 h 37 min to go (to end in an hour: {stop}; or train anew with a smaller --dim); memory ",
        ),
        (
            100,
            40,
            "0.01 steps/s: 2 h 37 min to go (to end in an hour: {stop}; or train anew with --image-size 32); memory ",
        ),
    ],
)
def test_the_time_to_go_is_foretold(step_seconds, size, want, folder, monkeypatch, capsys):
    """Once, at step 6 of 100, the first five not being timed, by a clock on which a step takes so long: 94 steps are to
    come. Grids do not count. (A power cut ends the training at step 18.)"""
    clock, p_losses, steps = [0.0], ddpm.GaussianDiffusion.p_losses, []

    def timed(*batch):
        clock[0] += step_seconds
        steps.append(1)
        if len(steps) == 18:
            raise PowerCut
        return p_losses(*batch)

    def grid(run, step):
        clock[0] += 1000

    monkeypatch.setattr(ddpm.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", timed)
    monkeypatch.setattr(ddpm.Run, "grid", grid)
    monkeypatch.setattr(ddpm.TrainingLog, "compare", lambda *_: None)
    for i in range(2):
        save(folder / "pictures" / f"{i}.png")
    data, out = ("digits", "runs/digits") if size == 8 else ("pictures", "runs/pictures")
    with pytest.raises(PowerCut):
        train(data=data, out=out, image_size=size, steps=100, sample_every=5)
    said = [line for line in capsys.readouterr().out.splitlines() if "steps/s" in line]
    if want is None:
        assert not said
    else:
        (line,) = said
        want = want.format(stop=f"Ctrl-C, then --train --resume --steps 40 --out {out}")
        assert line.startswith(want)
        assert 0.05 < float(line.removeprefix(want).removesuffix(" GiB")) < 100


def test_a_run_is_announced(folder, capsys):
    """How many images, parameters and steps, on which device and into which folder; at the end, what lies there and the
    next command."""
    weights = sum(w.numel() for w in train(steps=2)["model"].values())
    first, _, *last = capsys.readouterr().out.splitlines()
    assert first.startswith("1,618 ")
    assert f"{weights:,} parameters, cpu, 2 steps into runs/digits" in first
    assert "runs/digits: checkpoint.pt, log.csv, samples-*.png" in last[-2]
    assert "python ddpm.py --sample 64 --out runs/digits" in last[-1]
    assert cli("--train", "--resume", "--steps", 5) == 0
    assert "cpu, 3 steps into" in capsys.readouterr().out


def test_watch_is_shown_the_averaged_network(folder):
    """watch(run, step) is called every sample_every steps and at the end, with dropout off and the average's weights;
    Adam is torch's fused one."""
    seen = []
    config = ddpm.preset("digits", dim=8, dim_mults=(1,), steps=5, dropout=0.5, sample_every=2, batch_size=4, seed=SEED)
    assert (
        str(ddpm.train(config, watch=lambda run, step: seen.append((step, run, run.model.training)))) == "runs/digits"
    )
    assert [(step, training) for step, _, training in seen] == [(2, False), (4, False), (5, False)]
    saved = read("runs/digits")
    for name, value in seen[-1][1].model.state_dict().items():
        assert torch.equal(value, saved["ema"][name])
    assert saved["optimizer"]["param_groups"][0]["fused"] is True


class PowerCut(Exception):
    """Ends the process as a power cut would: no handler of ddpm.py sees it."""


@pytest.fixture
def power_cut_at(no_trial, monkeypatch):
    """power_cut_at(n) ends training in its n-th step."""

    def arrange(n):
        original, steps = ddpm.GaussianDiffusion.p_losses, []

        def p_losses(self, *batch):
            steps.append(1)
            if len(steps) == n:
                monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", original)
                raise PowerCut
            return original(self, *batch)

        monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)

    return arrange


def test_resumed_equals_uninterrupted_to_the_bit(folder, power_cut_at):
    """Cut off in step 6 with a checkpoint of step 3 and a log up to step 5, then resumed: the same weights, average,
    optimizer, schedule, step and log as without interruption, each row of the log once."""
    how = dict(steps=7, log_every=1, checkpoint_every=3, flip=True)
    whole = train(out="whole", **how)
    power_cut_at(6)
    with pytest.raises(PowerCut):
        train(out="cut", **how)
    assert read("cut")["step"] == 3
    assert log_of("cut")[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert cli("--train", "--resume", "--out", "cut") == 0
    cut = read("cut")
    for name in ("model", "ema", "optimizer", "step"):
        assert same(whole[name], cut[name]), name
    assert (log_of("whole") == log_of("cut")).all()
    assert log_of("cut")[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_resuming_without_a_checkpoint_is_refused(folder):
    """Exit status 2, and nothing is started in its place."""
    assert cli("--train", "--resume", "--out", "nowhere", *flags(dict(steps=1))) == 2
    assert not Path("nowhere").exists()


def test_a_run_resumed_with_more_steps_takes_their_learning_rate_at_once(folder, monkeypatch):
    """The linear decay of a finished run ends at 0. Resumed with twice the steps, the very next step has the rate of
    the longer run, as the log says."""
    train(steps=2, lr=2e-3)
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *_: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    assert cli("--train", "--resume", "--steps", 4, "--log-every", 1) == 0
    assert rates == pytest.approx([2e-3 * (1 - 2 / 4), 2e-3 * (1 - 3 / 4)])
    assert log_of("runs/digits")[-2:, 3] == pytest.approx(rates)


def test_a_resumed_run_takes_what_may_change_and_keeps_the_rest(folder, monkeypatch):
    """On --resume, --steps and the intervals are the command line's, the other settings the run's."""
    before = train(steps=2, lr=2e-3, lr_decay="constant", out="run")["config"]
    how = dict(steps=6, log_every=3, sample_every=5, checkpoint_every=4)
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: Path(f"grid{step}").touch())
    assert cli("--train", "--resume", "--out", "run", *flags(how)) == 0
    assert {name for name, value in read("run")["config"].items() if value != before[name]} == set(how)
    assert log_of("run")[:, 0].tolist() == [2, 3, 4, 5, 6]
    assert sorted(path.name for path in folder.glob("grid*")) == ["grid5", "grid6"]
    assert log_of("run")[-1, 3] == 2e-3


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def heeds_signals():
    """SIGINT, SIGTERM and SIGHUP have handlers, even if the tests run in the background of a shell, which ignores some
    of them."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at, status", [(1, 130), (2, 130), (3, 0)])
def test_a_signal_ends_training_after_its_step(
    at, status, number, folder, heeds_signals, no_trial, monkeypatch, capsys
):
    """A signal during step 1 or 2 of 3: the step is finished and saved, one line says how to resume, exit status 130.
    No grid is drawn after it. During the last step the run just ends. The signal handlers of before are restored, and
    the run resumes."""
    original, steps = ddpm.GaussianDiffusion.p_losses, []

    def p_losses(self, *batch):
        if torch.is_grad_enabled():  # not when losses are compared for the log
            steps.append(1)
            if len(steps) == at:
                os.kill(os.getpid(), number)
        return original(self, *batch)

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    monkeypatch.setattr(ddpm.Run, "grid", lambda run, step: Path(f"grid{step}").touch())
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ended = cli("--train", *flags({**TINY, "steps": 3, "sample_every": 1}))
    assert (ended, len(steps), read("runs/digits")["step"]) == (status, at, at)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    message = capsys.readouterr().err.splitlines()[-1:]
    how = f"stopped after step {at}; runs/digits/checkpoint.pt .*--train --resume --out runs/digits$"
    assert bool(message and re.search(how, message[0])) == (status == 130)
    assert len(list(folder.glob("grid*"))) == at - 1
    assert cli("--train", "--resume", "--steps", 4) == 0


def test_an_ignored_signal_stays_ignored_and_a_thread_records_none(folder):
    """A process that nohup started ignores SIGHUP, and one of a script in the background SIGINT: training goes on. Only
    the main thread may set handlers; training in another one works without."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ddpm.record_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not received
    finally:
        signal.signal(signal.SIGINT, before)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli, "--train", *flags({**TINY, "steps": 1})).result() == 0


def test_a_folder_that_is_trained_in_is_locked(folder, capsys):
    """A second training into it is refused, and moves nothing; another folder is free; afterwards it is free too."""
    train(steps=1)
    with ddpm.lock_folder(Path("runs/digits")):
        for more in ([], ["--resume"]):
            settings = [] if more else flags(TINY)
            assert cli("--train", *settings, "--steps", 2, *more) == 2
            assert "another training is running in runs/digits: --out names another" in capsys.readouterr().err
        assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["digits"]
        train(steps=1, out="runs/other")
    assert cli("--train", "--resume", "--steps", 2) == 0


def test_only_what_this_program_wrote_is_moved(folder, capsys):
    """A log.csv or a checkpoint.pt of something else is left where it is, and the training refused. Of a run folder
    that is a link the target is renamed, so that the next run is on the same disk."""
    for name in ("log.csv", "checkpoint.pt"):
        Path("mine").mkdir(exist_ok=True)
        Path("mine", name).write_text("kept")
        assert cli("--train", *flags({**TINY, "out": "mine"})) == 2
        assert f"mine/{name} is not that of a run: --out names another folder" in capsys.readouterr().err
        assert Path("mine", name).read_text() == "kept"
        Path("mine", name).unlink()
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    train(steps=1, out="link")
    train(steps=2, out="link")
    assert Path("link").is_symlink()
    assert read("disk")["step"] == 2
    assert read("disk-1")["step"] == 1


def test_the_log_is_repaired_on_resume(folder):
    """Rows that are none, a row without an end of line, later rows and a missing file: the checkpoint decides. A row
    that has not yet the last two columns gets them."""
    rows = ["1,0.5,1,0.001,10", "", "\0\0\0", "2;0,5;1;0,001;10;;", "2,0.4,1e-05,0.001,10,0.3,0.5"]
    rows += ["9,0.1,1,0.001,10,,", "3,0.3,1"]
    train(steps=3, log_every=1)
    Path("runs/digits/log.csv").write_text("\n".join([ddpm.LOG_HEADER.strip(), *rows]))
    assert cli("--train", "--resume", "--steps", 4) == 0
    lines = Path("runs/digits/log.csv").read_text().splitlines()
    assert lines[:3] == [ddpm.LOG_HEADER.strip(), f"{rows[0]},,", rows[4]]
    assert [line.split(",")[0] for line in lines[3:]] == ["4"]
    Path("runs/digits/log.csv").unlink()
    assert cli("--train", "--resume", "--steps", 5) == 0
    assert log_of("runs/digits")[:, 0].tolist() == [5]


WRONG = [None, -1, "a", {"a": 1}, torch.zeros(2)]


@pytest.mark.parametrize(
    "part",
    ["model", "ema", "optimizer", "step", "config", "image_channels", "num_classes", "classes", "images", "checksum"],
)
def test_a_checkpoint_with_a_wrong_part_is_refused(part, folder, trained):
    """Each part, and two settings of config, missing or of five wrong values: reading it to sample or to resume is
    refused by a ValueError of one line, which the command line prints, or works if the value is right after all."""
    right = read(trained / "runs/digits")

    def attempt(change):
        saved = {**right, "config": {**right["config"], "out": "run"}}
        change(saved)
        torch.save(saved, "run/checkpoint.pt")
        try:
            checkpoint = ddpm.read_checkpoint("run")
            ddpm.averaged_network(checkpoint)
            ddpm.prepare_training(dataclasses.replace(checkpoint["config"], steps=2), checkpoint)
        except ValueError as error:
            assert "\n" not in str(error)

    Path("run").mkdir()
    attempt(lambda saved: saved.pop(part))
    for value in WRONG:
        attempt(lambda saved, value=value: saved.update({part: value}))
    if part == "config":
        for name in ("dim_mults", "data"):
            for value in WRONG:
                attempt(lambda saved, name=name, value=value: saved["config"].update({name: value}))


def test_damage_inside_a_part_of_a_checkpoint_is_refused(folder):
    """A moment of Adam of another shape or type, or missing, would end the process at the next step; a foreign tensor
    among the averaged weights fails later. Adam's settings are not read from the checkpoint."""
    right = train(steps=1)

    def attempt(change):
        saved = copy.deepcopy(right)
        change(saved)
        torch.save(saved, "runs/digits/checkpoint.pt")
        return cli("--train", "--resume", "--steps", 2)

    moments = lambda saved: saved["optimizer"]["state"][3]
    assert attempt(lambda saved: moments(saved).update(exp_avg=torch.zeros(3))) == 2
    assert attempt(lambda saved: moments(saved).update(exp_avg_sq="x")) == 2
    assert attempt(lambda saved: moments(saved).pop("exp_avg")) == 2
    assert attempt(lambda saved: saved["optimizer"]["state"].pop(3)) == 2
    assert attempt(lambda saved: moments(saved).pop("step")) == 2
    assert attempt(lambda saved: moments(saved).update(step=torch.zeros(2))) == 2
    assert attempt(lambda saved: saved["ema"].update(more=torch.zeros(1, dtype=torch.int64))) == 2
    assert attempt(lambda saved: saved["optimizer"]["param_groups"][0].update(betas=5)) == 0
    other = read("runs/digits")
    assert attempt(lambda saved: None) == 0
    assert same(read("runs/digits")["model"], other["model"])


def test_resuming_leaves_the_checkpoint_as_it_is(folder):
    """Two runs that go on from one checkpoint in memory are equal to the bit."""
    train(steps=2)
    checkpoint = ddpm.read_checkpoint("runs/digits")
    for out in ("a", "b"):
        ddpm.train(dataclasses.replace(checkpoint["config"], steps=4, out=out), checkpoint)
    assert same(read("a"), read("b"))


def test_a_config_is_checked_again_when_training_starts(folder):
    """A value assigned later is converted, so that the checkpoint can be read, or refused."""
    config = ddpm.Config(**{**TINY, "dim_mults": (1,), "attn_resolutions": (4,)})
    config.out, config.steps = Path("a"), np.int64(1)
    ddpm.train(config)
    assert ddpm.read_checkpoint("a")["config"].out == "a"
    config.steps = 1.5
    with pytest.raises(ValueError, match="steps must be of type int"):
        ddpm.train(config)


def test_what_a_run_reads_does_not_lie_in_its_folder(folder, capsys):
    """The next run would rename it. Nor can a run be renamed from inside."""
    for i in range(4):
        save(folder / "project" / "images" / f"{i}.png", size=(8, 8))
    how = {**TINY, "image_size": 8, "steps": 1}
    for data, out in (("project/images", "project"), ("project/images", "project/images"), ("project", "./project")):
        assert cli("--train", *flags({**how, "data": data, "out": out})) == 2
        assert f"data {data} lies in out, the run's folder {out}" in capsys.readouterr().err
    publish("project/small")  # beside the images
    assert cli("--train", "--weights", "project/small", "--out", "project", "--steps", 1) == 2
    assert "weights project/small lies in out" in capsys.readouterr().err
    assert sorted(path.name for path in Path("project").iterdir()) == ["images", "small"]

    Path("inside").mkdir()
    os.chdir("inside")
    train(steps=1, out=".")
    assert cli("--train", *flags({**TINY, "steps": 2, "out": "."})) == 2
    assert "the run in . can't be renamed from inside" in capsys.readouterr().err
    assert read(".")["step"] == 1


def test_data_that_names_another_run_is_refused(folder, capsys):
    """--data b/images finds runs/images, which may be that of a/images. With --out it is the same data, moved."""
    for i in range(120):  # none of them is held out in 3e−6 of all cases
        save(folder / "a" / "images" / f"{i}.png", size=(8, 8), colour=(2 * i, 0, 0))
    train(data="a/images", image_size=8, steps=1, out="runs/images")
    shutil.copytree("a/images", "b/images")
    for line in ("--train --resume --steps 2", "--sample 1", "--evaluate 1", "--export exported"):
        assert cli(*line.split(), "--data", "b/images") == 2
        wanted = "the run in runs/images is one of a/images, not b/images: --out names a run"
        assert wanted in capsys.readouterr().err
    assert cli("--sample", 1, "--sampling-steps", 1, "--data", folder / "a" / "images") == 0
    shutil.rmtree("a")
    assert cli("--train", "--resume", "--steps", 2, "--data", "b/images", "--out", "runs/images") == 0
    assert cli("--evaluate", 1, "--data", "b/images", "--out", "runs/images") == 0
    assert read("runs/images")["config"]["data"] == "b/images"


def test_a_folder_that_may_not_be_written_beside_is_locked_inside(folder, monkeypatch):
    """As a mounted disk in a folder of the system's."""
    Path("disk").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))
    with ddpm.lock_folder(Path("disk")):
        with pytest.raises(ValueError, match="another training is running in disk"):
            with ddpm.lock_folder(Path("disk")):
                pass
    assert [path.name for path in folder.iterdir()] == ["disk"]


def test_a_link_to_itself_is_refused_in_one_line(folder, capsys):
    """As data, as a run's folder and as a place to export to."""
    train(steps=1)
    Path("loop").symlink_to("loop")
    for line in ("--train --data loop", "--train --out loop", "--sample 1 --data loop", "--export loop --out loop"):
        assert cli(*line.split()) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_weights_that_are_not_finite_are_refused(folder, capsys):
    """By --evaluate and --export as by --sample, and in published files."""
    saved = train(steps=1)
    saved["ema"]["conv_out.bias"][0] = math.inf
    torch.save(saved, "runs/digits/checkpoint.pt")
    for line in ("--sample 1", "--evaluate 1", "--export exported"):
        assert cli(*line.split()) == 2
        assert "the weights in runs/digits are not finite" in capsys.readouterr().err
    publish("small")
    weights = torch.load("small/diffusion_pytorch_model.bin", weights_only=True)
    weights["conv_out.bias"][0] = math.nan
    torch.save(weights, "small/diffusion_pytorch_model.bin")
    assert cli("--sample", 1, "--weights", "small") == 2
    assert "the weights in diffusion_pytorch_model.bin are not finite" in capsys.readouterr().err


def test_damaged_and_unusual_published_weights_are_refused(folder, capsys):
    """A flipped bit; images of other than one or three channels, of which no file can be written."""
    publish("small")
    path = Path("small/diffusion_pytorch_model.bin")
    with zipfile.ZipFile(path) as file:
        info = max(file.infolist(), key=lambda info: info.file_size)
    damaged = bytearray(path.read_bytes())
    damaged[info.header_offset + 300] ^= 4
    path.write_bytes(bytes(damaged))
    assert cli("--sample", 1, "--weights", "small") == 2
    assert "is damaged" in capsys.readouterr().err
    publish("five", dict(in_channels=5, out_channels=5))
    assert cli("--sample", 1, "--weights", "five") == 2
    assert "five has 5 channels; images have 1 or 3" in capsys.readouterr().err


def test_a_flipped_bit_in_a_checkpoint_is_found(folder, capsys):
    """Anywhere in the weights: the zip's checksums are checked."""
    train(steps=1)
    path = Path("runs/digits/checkpoint.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        tensors = [info for info in file.infolist() if "/data/" in info.filename and info.file_size > 100]
    for info in tensors[:: len(tensors) // 8]:
        damaged = bytearray(whole)
        damaged[info.header_offset + 200] ^= 4
        path.write_bytes(bytes(damaged))
        assert cli("--sample", 1) == 2
        assert "runs/digits/checkpoint.pt is no checkpoint" in capsys.readouterr().err


FOREIGN = dict(
    torchscript=lambda path: torch.jit.script(nn.Linear(2, 2)).save(path),
    legacy=lambda path: torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
    module=lambda path: torch.save(nn.Linear(2, 2), path),
    pickle=lambda path: Path(path).write_bytes(pickle.dumps({"ema": Path("x")})),
    text=lambda path: Path(path).write_text("weights\n"),
)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of newer versions, when the file is made
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_in_the_place_of_weights_are_one_line(kind, folder, capsys):
    """What other programs save under these names, as a checkpoint and as published weights: torch's warnings about it
    are not shown."""
    train(steps=1)
    publish("published")
    FOREIGN[kind]("runs/digits/checkpoint.pt")
    FOREIGN[kind]("published/diffusion_pytorch_model.bin")
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for line, name in ((["--out", "runs/digits"], "runs/digits/checkpoint.pt"), (["--weights", "published"], "")):
            assert cli("--sample", 1, *line) == 2
            said = capsys.readouterr()
            assert not said.out
            assert re.match(f"ddpm.py: error: .*{name or 'published'}.*\n$", said.err)
    assert not [str(warning.message) for warning in shown]


def test_the_fallback_of_apples_gpus_is_set_before_torch_is_imported():
    """torch reads PYTORCH_ENABLE_MPS_FALLBACK when it is imported; it is set before, unless the user has set it."""
    code = """if True:
        import os, sys
        class Watch:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
                    sys.exit()
        sys.meta_path.insert(0, Watch())
        import ddpm"""
    for given, want in ((None, "1"), ("0", "0")):
        environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
        if given:
            environment["PYTORCH_ENABLE_MPS_FALLBACK"] = given
        how = dict(cwd=HERE, env=environment, capture_output=True, text=True)
        assert subprocess.run([sys.executable, "-c", code], **how).stdout == f"{want}\n"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ddpm.Config)])
def test_every_setting_of_a_checkpoint_is_checked(field, trained, monkeypatch):
    """Missing or of five wrong values: a ValueError of one line that names the file, or, if the value is one that the
    setting may have, a Config that has it. Only prediction may be missing, which earlier versions had not."""
    monkeypatch.chdir(trained)
    right = read("runs/digits")
    missing = object()
    for value in (missing, *WRONG):
        settings = dict(right["config"], **{field: value})
        if value is missing:
            del settings[field]
        monkeypatch.setattr(ddpm, "load_tensors", lambda _, settings=settings: dict(right, config=settings))
        try:
            config = ddpm.read_checkpoint("runs/digits")["config"]
        except ValueError as error:
            assert re.match(r"runs/digits/checkpoint.pt is no checkpoint.*\(.+\)$", str(error))
        else:
            allowed = {"prediction": "noise"} if value is missing else {field: value}
            if field == "out":  # that of the folder
                allowed = {"out": "runs/digits"}
            assert getattr(config, field) in (allowed[field], str(allowed[field]))


def test_weights_of_a_checkpoint_that_are_integers_are_refused(folder, capsys):
    """They have the right shapes."""
    saved = train(steps=1)
    saved["ema"] = {name: weight.long() for name, weight in saved["ema"].items()}
    torch.save(saved, "runs/digits/checkpoint.pt")
    assert cli("--sample", 1) == 2
    assert "ema: time_embedding.linear_1.weight holds integers" in capsys.readouterr().err


def test_a_reader_that_has_gone_does_not_end_training(folder, monkeypatch):
    """The line with the time to go is written to a closed pipe; training comes to its end."""

    def closed(*_, **__):
        raise BrokenPipeError

    times = itertools.count()
    monkeypatch.setattr(ddpm.time, "perf_counter", lambda: 10.0 * next(times))
    monkeypatch.setattr(ddpm.tqdm, "write", closed)
    written = []
    monkeypatch.setattr(ddpm, "in_words", lambda seconds: written.append(seconds) or "long")
    assert train(steps=20)["step"] == 20
    assert len(written) == 1


def test_an_interruption_elsewhere_is_one_line(folder, monkeypatch, capsys):
    """Ctrl-C while the data are loaded: exit status 130."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, "read_data", interrupted)
    assert cli("--train", *flags(TINY)) == 130
    assert capsys.readouterr().err == "ddpm.py: interrupted\n"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(folder, no_trial, monkeypatch, capsys):
    """NaN at step 5 (counted from 0) of a run that logs every 4 steps and saved at 4: exit status 2, (seed, step) is
    named, and the checkpoint is still that of step 4; a run that has saved nothing yet names no checkpoint."""
    original, steps = ddpm.GaussianDiffusion.p_losses, []

    def p_losses(self, *batch):
        steps.append(1)
        return original(self, *batch) * (math.nan if len(steps) == 6 else 1)

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    how = {**TINY, "steps": 8, "log_every": 4, "checkpoint_every": 4, "seed": 7}
    assert cli("--train", *flags(how)) == 2
    assert "not finite at (seed 7, step 5); runs/digits/checkpoint.pt" in capsys.readouterr().err
    saved = read("runs/digits")
    assert saved["step"] == 4
    assert all(w.isfinite().all() for w in saved["model"].values())

    steps.clear()
    assert cli("--train", *flags({**how, "checkpoint_every": 8})) == 2
    assert capsys.readouterr().err.endswith("not finite at (seed 7, step 5); a smaller --lr than 0.003 may help\n")
    assert not Path("runs/digits/checkpoint.pt").exists()


def test_a_new_run_keeps_the_earlier_one(folder, capsys):
    """A new run in the folder of another renames the other's folder and says so."""
    train(steps=2)
    train(steps=3)
    capsys.readouterr()
    train(steps=1)
    assert "runs/digits is now runs/digits-2" in capsys.readouterr().out
    assert [read(out)["step"] for out in ("runs/digits-1", "runs/digits-2", "runs/digits")] == [2, 3, 1]


def test_on_a_mounted_disk_an_earlier_run_moves_into_a_folder(folder, monkeypatch, capsys):
    """A folder that is a mount point can't be renamed (EBUSY, pretended here): the files of its run are moved, others
    stay."""
    rename = Path.rename

    def busy(path, target):
        if path == Path("runs/digits"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    for steps in (2, 3, 1):
        train(steps=steps)
        Path("runs/digits/lost+found").touch()
    assert "runs/digits is now runs/digits/digits-2" in capsys.readouterr().out
    runs = ("runs/digits/digits-1", "runs/digits/digits-2", "runs/digits")
    assert [read(out)["step"] for out in runs] == [2, 3, 1]
    assert [len(log_of(out)) for out in runs] == [1, 2, 1]
    assert Path("runs/digits/lost+found").exists()
    assert len(list(folder.rglob("lost+found"))) == 1


def test_labels_are_learned_unless_told_otherwise(folder):
    """The checkpoint says how many classes there are: those of the data, or None with --no-conditional. The schedule is
    not among the weights."""
    saved = train(steps=1)
    assert saved["num_classes"] == 10
    parts = {"model", "ema", "optimizer", "step", "config"}
    assert set(saved) == parts | {"image_channels", "num_classes", "classes", "images", "checksum"}
    assert saved["classes"] == list("0123456789")
    assert not [name for name in [*saved["model"], *saved["ema"]] if "alphas" in name or "betas" in name]
    assert train(steps=1, conditional=False)["num_classes"] is None


def test_files_are_written_whole_or_not_at_all(folder):
    """When saving fails, atomic_write keeps the old file, leaves nothing beside it, and names the file."""
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
        with pytest.raises(OSError, match="file .*No space left on device"):
            ddpm.atomic_write(path, full)
    with pytest.raises(KeyboardInterrupt):
        ddpm.atomic_write(path, interrupted)
    assert path.read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["file"]
    ddpm.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_folders_are_written_whole_or_not_at_all(folder):
    """write_folder replaces a folder. Every writer has a temporary folder of its own. When saving fails, the old folder
    stays and nothing is left beside it."""
    path = folder / "images"
    (folder / "images.part").mkdir()
    (folder / "images.part" / "left.png").touch()
    ddpm.write_folder(path, lambda new: (new / "1.png").touch())
    assert [p.name for p in path.iterdir()] == ["1.png"]
    ddpm.write_folder(path, lambda new: (new / "2.png").touch())
    assert [p.name for p in path.iterdir()] == ["2.png"]

    def interrupted(new):
        (new / "3.png").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ddpm.write_folder(path, interrupted)
    assert [p.name for p in path.iterdir()] == ["2.png"]
    assert sorted(p.name for p in folder.iterdir()) == ["images", "images.part"]
    assert (folder / "images.part" / "left.png").exists()  # the user's own

    # Two writers at once: each is whole, the last one stays
    def beside_another(new):
        (new / "4.png").touch()
        ddpm.write_folder(path, lambda other: (other / "5.png").touch())
        assert [p.name for p in path.iterdir()] == ["5.png"]

    ddpm.write_folder(path, beside_another)
    assert [p.name for p in path.iterdir()] == ["4.png"]

    # Saving fails with an error of its own, as safetensors' on a full disk; renaming fails, as onto a mounted disk
    class ForeignError(Exception):
        pass

    def fails(new):
        (new / "6.png").touch()
        raise ForeignError("no space\nleft")

    with pytest.raises(OSError, match=r"images can't be written \(no space left\)"):
        ddpm.write_folder(path, fails)
    assert [p.name for p in path.iterdir()] == ["4.png"]
    (folder / "file").touch()
    with pytest.raises(OSError, match="file can't be replaced .*; what was written is in .*") as caught:
        ddpm.write_folder(folder / "file", lambda new: (new / "7.png").touch())
    assert (Path(str(caught.value).split(" is in ")[1]) / "7.png").exists()
    assert [p.name for p in path.iterdir()] == ["4.png"]


@pytest.fixture
def start():
    """start(*arguments) runs ddpm.py in a process of its own, with torchrun=True in two. Processes are killed, with
    their children, when the test ends."""
    processes = []

    def start(*arguments, torchrun=False, environment=None):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
        process = subprocess.Popen(
            [sys.executable, *launcher, HERE / "ddpm.py", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended, with all its children
        finally:
            process.communicate()


def wait_for(condition, process, seconds=120):
    """Wait until the condition holds, while the process runs."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "timed out"
        time.sleep(0.02)


def test_a_killed_run_resumes_to_the_same_bits(folder, start):
    """SIGKILL at a random moment of a run that saves after every step, then --resume: there is a checkpoint that loads,
    and at the end the weights are those of an uninterrupted run. Once; DDPM_TEST_KILLS=20 for twenty times in a row."""
    how = {**TINY, "lr_decay": "constant", "sample_every": 10**6, "device": "cpu"}
    command = ["--train", *flags({**how, "steps": 10**6, "checkpoint_every": 1, "out": "cut"})]
    for moment in np.random.default_rng(SEED).uniform(0.1, 0.6, int(os.environ.get("DDPM_TEST_KILLS", 1))):
        process = start(*command)
        process.stdout.readline()  # the announcement: training begins
        wait_for(Path("cut/checkpoint.pt").exists, process)
        time.sleep(moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert read("cut")["step"] > 0
        command = ["--train", "--resume", "--device", "cpu", "--out", "cut"]
    steps = read("cut")["step"] + 3
    assert cli("--train", "--resume", "--out", "cut", "--steps", steps) == 0
    whole, cut = train(**{**how, "steps": steps, "out": "whole"}), read("cut")
    for name in ("model", "ema", "optimizer", "step"):
        assert same(whole[name], cut[name]), name


# ---- 17. Several processes -------------------------------------------------------------------------------------------


def test_two_processes_are_algorithm_1_too(folder, start):
    """Two processes, with the environment that torchrun gives them: each draws its half of the batch from a seed of its
    own, gradients and the logged loss are means over both, and rank 0 alone writes and prints. Their samples are those
    of one process to the byte, and they go on where one process was stopped. One process resumes their run."""

    def both(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes = [start(*arguments, environment=dict(common, RANK=rank, LOCAL_RANK=rank)) for rank in "01"]
        outputs = [process.communicate(timeout=120) for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
            assert "images/s" not in errors  # no bars without a terminal
            assert "batches" not in errors
        assert not outputs[1][0]
        return outputs[0][0].splitlines()

    said = both("--train", *flags({**TINY, **EVERYTHING, "steps": 3, "out": "two", "device": "cpu"}))
    assert [line.split(" ")[0] for line in said] == ["1,618", "self-attention", "step", "the", "next:"]
    assert_trained_as_algorithm_1(read("two"), "two", processes=2)

    # Samples
    sampling = ["--sample", 7, "--sampling-batch", 2, "--sampling-steps", 4, "--out", "two", "--no-bf16"]
    sampling += ["--device", "cpu"]
    assert both(*sampling) == ["two/samples.png"]
    grid = Path("two/samples.png").read_bytes()
    sampling.append("--individual")
    assert cli(*sampling) == 0
    assert Path("two/samples.png").read_bytes() == grid
    files = [Path(f"two/individual/{i:05}.png") for i in range(7)]
    alone = [path.read_bytes() for path in files]

    # A drawing that was stopped after its first batch
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm.Run, "trajectory", stopped)
        assert cli(*sampling) == 130
    (store,) = Path("two/.drawn").iterdir()
    torch.save(torch.full((2, 1, 8, 8), 77, dtype=torch.uint8), store / "0.pt")
    assert cli(*sampling[:-1]) == 0
    assert Path("two/samples.png").read_bytes() == grid  # without --individual the first two images are drawn again
    assert both(*sampling) == ["two/samples.png", "two/individual"]
    assert [(np.asarray(Image.open(path)) == 77).all() for path in files] == [True, True, *[False] * 5]
    assert [path.read_bytes() for path in files[2:]] == alone[2:]

    # One process resumes
    assert cli("--train", "--resume", "--steps", 4, "--out", "two") == 0
    assert read("two")["step"] == 4


def test_a_batch_is_shared_evenly_or_refused(folder, monkeypatch):
    """Seven images between two processes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch_size 7 .*2 processes"):
        ddpm.train(ddpm.preset("digits", batch_size=7))
    assert not list(folder.iterdir())


def test_each_process_has_its_own_batch(folder, no_trial, monkeypatch):
    """torchrun numbers processes by RANK: with another rank the first batch is another one."""
    seen = []

    def p_losses(self, model, x_start, t, noise):
        seen.append((x_start, t, noise))
        raise PowerCut

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(PowerCut):
            train(steps=1, batch_size=64, out=f"run{rank}")
    (x, t, noise), (x_1, t_1, noise_1) = seen
    assert len(x) == len(x_1) == 32
    assert not torch.isclose(noise, noise_1).all(dim=(1, 2, 3)).any()
    assert not torch.equal(t, t_1)
    assert not torch.equal(x, x_1)
    assert not Path("run1").exists()  # rank 0 alone makes folders


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_processes_use_nccl_between_gpus_and_gloo_otherwise(device, backend, monkeypatch):
    """Seen from how torch.distributed is called, so that no GPU is needed."""

    def init_process_group(backend):
        raise ValueError(f"asked for {backend}")

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"asked for {backend}"):
        ddpm.share_between_processes(nn.Linear(1, 1), torch.device(device))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank's process in /proc: run it on Linux")
def test_a_signal_to_one_of_two_processes_stops_both(folder, start):
    """SIGTERM to rank 1 alone: both stop after the same step, which rank 0 saves, the job fails, and one process
    resumes from the checkpoint."""
    job = start("--train", *flags({**TINY, "steps": 10**6, "checkpoint_every": 5, "device": "cpu"}), torchrun=True)
    wait_for(Path("runs/digits/checkpoint.pt").exists, job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (rank_1,) = (int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(rank_1, signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    step = read("runs/digits")["step"]
    assert job.returncode != 0
    assert f"stopped after step {step:,};" in said
    assert cli("--train", "--resume", "--steps", step + 2) == 0
    assert read("runs/digits")["step"] == step + 2


# ---- 18. Devices -----------------------------------------------------------------------------------------------------

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it where there is one")


@NEEDS_CUDA
def test_cuda_agrees_with_the_cpu():
    """One DDIM step and one step of Algorithm 2 with the same network and noise on both devices."""
    network, x, t = randomise(small()), torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    diffusion, noise = ddpm.GaussianDiffusion(BETAS), torch.randn(2, 2, 8, 8)

    def steps(network, diffusion, x, t, noise):
        ddim = diffusion.ddim_sample(network, x, 900, 400, 0.5, noise=noise)
        return ddim.cpu(), diffusion.p_sample(network, x, t, noise=noise).cpu()

    want = steps(network, diffusion, x, t, noise)
    got = steps(*(each.cuda() for each in (network, diffusion, x, t, noise)))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "device, more",
    [
        ("cpu", ["--no-compile"]),
        pytest.param("cuda", ["--no-compile", "--no-bf16"], marks=NEEDS_CUDA),
        pytest.param("cuda", [], marks=NEEDS_CUDA),
    ],
)
def test_each_device_trains_resumes_samples_and_evaluates(device, more, folder, capsys):
    """The command line from end to end on a device; there, the same seed draws the same images."""
    more = ["--device", device, *more]
    assert cli("--train", *flags({**TINY, "steps": 5, "flip": True}), *more) == 0
    assert f" {ddpm.pick_device(device)}, 5 steps" in capsys.readouterr().out
    assert cli("--train", "--resume", "--steps", 8, *more) == 0
    log = log_of("runs/digits")
    assert log[-1, 0] == 8
    assert np.isfinite(log).all()
    for how in (("--sampler", "ddpm"), ("--guidance", 1), ("--sampler", "ddim", "--eta", 1, "--animate")):
        images = []
        for _ in range(2):
            assert cli("--sample", 6, "--sampling-batch", 3, "--sampling-steps", 4, *how, *more) == 0
            images.append(Path("runs/digits/samples.png").read_bytes())
        assert images[0] == images[1]
    assert cli("--evaluate", 5, *more) == 0
    assert "NLL" in capsys.readouterr().out


@NEEDS_CUDA
def test_cuda_graphs_train_like_single_kernels(folder):
    """The losses and gradient norms of twelve steps, each with a line in the log, compiled to CUDA graphs and not
    compiled. A graph that is replayed on old data or weights repeats the numbers of an earlier step."""
    logs = []
    for compiled in (True, False):
        out = f"compiled {compiled}"
        train(steps=12, log_every=1, lr=1e-3, dropout=0.0, bf16=False, compile=compiled, device="cuda", out=out)
        logs.append(log_of(out)[:, 1:3])
    np.testing.assert_allclose(*logs, rtol=0.02)


@NEEDS_CUDA
def test_training_on_cuda_never_waits_between_two_rows_of_the_log(folder, monkeypatch):
    """torch raises an error where the host waits for the GPU; allowed around a row of the log alone."""
    original = ddpm.GaussianDiffusion.p_losses

    def p_losses(self, *batch):
        if torch.is_grad_enabled():  # not when losses are compared for the log
            torch.cuda.set_sync_debug_mode("error")
        return original(self, *batch)

    def update(*arguments, original=ddpm.ema_update):
        original(*arguments)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    monkeypatch.setattr(ddpm, "ema_update", update)
    train(steps=4, flip=True, device="cuda", compile=False)


def count_host_reads():
    """What crosses between a GPU and the host during four steps of training that log every second, and during sampling
    with guidance. The GPU is a pretended one: a device whose tensors have shapes and no values, registered with torch
    for the rest of this process; an operation that reads a value, copies, or mixes devices is recorded by name."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    crossed, shapes = [], FakeTensorMode()

    class PretendedGPU(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            named = named or {}
            tensors = [each for each in tree_leaves((arguments, named)) if torch.is_tensor(each)]
            target = torch.device(named["device"]).type if named.get("device") else None
            places = {each.device.type for each in tensors if each.dim() or target or each.device.type == "pretended"}
            read = operation is torch.ops.aten._local_scalar_dense.default
            if "pretended" not in {*places, target}:
                return operation(*arguments, **named)
            if read or len({*places, target} - {None}) > 1:
                crossed.append(operation.overloadpacket.__name__)
            if read:
                return 1
            if target == "cpu":
                return torch.ones(arguments[0].shape, dtype=named.get("dtype"))
            arguments = tree_map_only(torch.Tensor, shapes.from_tensor, arguments)
            with shapes:
                return operation(*arguments, **named)

    p_losses = ddpm.GaussianDiffusion.p_losses

    def marked(self, *batch):
        crossed.append("step")
        return p_losses(self, *batch)

    def sample(run, step):
        labels = torch.arange(4, device="pretended:0")
        model = ddpm.classifier_free_guidance(run.model, labels, 1.0)
        crossed.append("sampling")
        for eta in (0.0, 1.0):
            run.diffusion.ddim_sample_loop(model, (4, 1, 8, 8), 2, eta)
        run.diffusion.p_sample_loop(model, (4, 1, 8, 8))
        crossed.append("sampled")

    _setup_privateuseone_for_python_backend("pretended")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tiny = dict(dim=8, dim_mults=(1,), batch_size=4, timesteps=3, steps=4, log_every=2, sample_every=4, seed=SEED)
    tiny.update(flip=True, dropout=0.1, variance="learned_range")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "pick_device", lambda name=None: torch.device("pretended", 0))
        patch.setattr(ddpm, "autocast", lambda config, device: contextlib.nullcontext())
        patch.setattr(ddpm, "atomic_write", lambda path, save: None)
        patch.setattr(ddpm, "try_step", lambda *_: None)
        patch.setattr(ddpm.TrainingLog, "compare", lambda *_: None)  # reads losses, as often as a grid is drawn
        patch.setattr(ddpm.GaussianDiffusion, "p_losses", marked)
        with PretendedGPU():
            ddpm.train(ddpm.preset("digits", **tiny), watch=sample)
    return crossed


def test_neither_training_nor_sampling_waits_for_the_gpu(host_reads):
    """Training reads from the GPU when it logs, in one copy for all steps since the last row, and at no other time.
    Sampling never does, once the labels of guidance have been checked."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs a newer torch to pretend a GPU: pip install --upgrade torch")
    process = host_reads()
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    crossed = said.splitlines()[-1].split()
    start = crossed.index("step")
    assert "_to_copy" in crossed[:start]  # the data, once
    logged = ["step", "step", "_to_copy"]
    assert crossed[start:] == [*logged, *logged, "_local_scalar_dense", "sampling", "sampled"]


def test_each_process_takes_its_own_gpu(monkeypatch):
    """torchrun numbers the processes of a machine in LOCAL_RANK; a GPU given by number is that one, and no other is
    touched. By default CUDA, else MPS, else the CPU. Seen from how torch is called, so that no GPU is needed."""
    touched, settings, there = [], [], {"cuda": True, "mps": True}

    def zeros(size, device):
        touched.append(device)
        if device == torch.device("cuda", 7):
            raise RuntimeError("invalid device ordinal\nand a trace")
        return np.zeros(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "set_device", settings.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, want in [(None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")]:
        touched.clear()
        settings.clear()
        assert PICK_DEVICE(name) == torch.device(want)
        assert touched == [torch.device(want)]
        assert settings == [torch.device(want), "high"]  # TF32
    with pytest.raises(ValueError, match="device 'cuda:7' can't be used here: invalid device ordinal$"):
        PICK_DEVICE("cuda:7")
    settings.clear()
    assert PICK_DEVICE("cpu") == torch.device("cpu")
    there["cuda"] = False
    assert PICK_DEVICE() == torch.device("mps")
    there["mps"] = False
    assert PICK_DEVICE() == torch.device("cpu")
    assert not settings
    monkeypatch.delenv("LOCAL_RANK")
    assert PICK_DEVICE("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "device, cuda, avx512, amx, given, want",
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
def test_bfloat16_is_the_default_where_the_device_computes_in_it(device, cuda, avx512, amx, given, want, monkeypatch):
    """Native support counts, not the slow emulation on GPUs before Ampere; --bf16 and --no-bf16 override it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    got = ddpm.autocast(ddpm.preset("digits", bf16=given), torch.device(device))
    assert got == (device, torch.bfloat16, want)


@pytest.mark.parametrize(
    "device, triton, given, want",
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
def test_a_network_is_compiled_by_default_on_cuda_with_triton(device, triton, given, want, monkeypatch, capsys):
    """Without Triton, as on Windows, torch.compile would end training at its first step. Rank 0 says that it takes a
    while."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: triton)
    monkeypatch.setattr(torch, "compile", lambda network, mode, dynamic: (network, mode, dynamic))
    compiled = functools.partial(ddpm.maybe_compile, ddpm.preset("digits", compile=given), torch.device(device))
    network = nn.Linear(1, 1)
    assert compiled(network) == ((network, "reduce-overhead", False) if want else network)
    assert ("--no-compile" in capsys.readouterr().err) == want
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compiled(network) == ((network, "reduce-overhead", False) if want else network)
    assert not capsys.readouterr().err


def test_several_gpus_train_without_cuda_graphs(monkeypatch):
    """DistributedDataParallel sends gradients during the backward pass."""
    monkeypatch.setattr(torch, "compile", lambda network, mode, dynamic: mode)
    network = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    config = ddpm.preset("digits", compile=True)
    assert ddpm.maybe_compile(config, torch.device("cuda"), network) == "default"


@pytest.mark.parametrize("more, times", [([], 0), (["--compile"], 1), (["--no-compile"], 0)])
def test_training_and_sampling_use_the_compiled_network(more, times, folder, monkeypatch):
    """torch.compile is called for static shapes, in the mode that captures CUDA graphs, and what it returns is what
    trains, samples and is evaluated: here a network that answers zeros."""

    class Zeros(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.num_classes, self.image_channels = network, 10, 1

        def forward(self, x, t, y=None):
            return 0 * self.network(x, t, y)

    calls = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: calls.append(how) or Zeros(network))
    settings = flags({**TINY, "steps": 3, "lr": 0.1})
    assert cli("--train", *settings, *more, "--no-bf16") == 0
    assert calls == [dict(mode="reduce-overhead", dynamic=False)] * times
    moved = read("runs/digits")["model"]["conv_out.weight"].abs().max()
    assert (moved == 0) == (times == 1)
    assert cli("--sample", 2, "--sampling-steps", 1, *more, "--no-bf16") == 0
    assert cli("--evaluate", 2, *more) == 0
    assert calls == [dict(mode="reduce-overhead", dynamic=False)] * 3 * times


def test_a_compiled_network_is_compiled_once(folder, monkeypatch):
    """torch.compile starts anew for another dtype, shape or stride: training shows the network one, and so does each
    way of sampling, from x_T to x_0."""
    original, kinds = ddpm.UNet.forward, set()

    def forward(self, *inputs, **named):
        kinds.add(tuple((each.dtype, each.shape, each.stride()) for each in (*inputs, *named.values())))
        return original(self, *inputs, **named)

    monkeypatch.setattr(ddpm.UNet, "forward", forward)
    monkeypatch.setattr(ddpm.TrainingLog, "compare", lambda *_: None)  # of the averaged weights, which are not compiled
    ways = [("--train", *flags({**TINY, "steps": 4, "flip": True}))]
    for sampler in ("ddpm", "ddim", "dpm-solver"):
        for more in ((), ("--guidance", 1)):
            ways.append(("--sample", 3, "--sampler", sampler, "--sampling-steps", 4, *more))
    for way in ways:
        kinds.clear()
        assert cli(*way) == 0
        assert len(kinds) == 1, way


def test_the_network_compiles_as_one_graph():
    """dynamo finds no graph break, labels included."""
    network = randomise(small(num_classes=3))
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


def test_too_little_memory_or_no_compiler_is_one_line(folder, monkeypatch, capsys):
    """Memory, as CUDA and as the CPU's allocator report it, and a torch.compile that fails: exit status 2 and what
    would help. The earlier run is where it was."""
    train(steps=1)
    earlier = sorted(Path("runs").rglob("*"))

    def exhausted(self, *batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total of 8.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(ddpm.GaussianDiffusion, "p_losses", exhausted)
        assert cli("--train", *flags({**TINY, "steps": 1})) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "ddpm.py: error: CUDA out of memory; a smaller --batch-size needs less"

    with monkeypatch.context() as patch:  # whose batch size is that of the run
        patch.setattr(ddpm.GaussianDiffusion, "p_losses", exhausted)
        assert cli("--train", "--resume", "--steps", 2) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm.py: error: CUDA out of memory; close other programs"

    with monkeypatch.context() as patch:
        patch.setattr(ddpm.GaussianDiffusion, "p_losses", lambda *_: torch.empty(2**60, dtype=torch.uint8))
        assert cli("--train", *flags({**TINY, "steps": 1})) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ddpm.py: error: not enough memory (")

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    for line, less in (("--sample", "a smaller --sampling-batch needs"), ("--evaluate", "fewer images need")):
        with monkeypatch.context() as patch:
            patch.setattr(ddpm.Run, "read", too_much)
            assert cli(line, 4) == 2
        assert capsys.readouterr().err == f"ddpm.py: error: CUDA out of memory; {less} less\n"

    def broken(graph, inputs):
        raise RuntimeError("no compiler\nto be found")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compile_(network, backend=broken))
    assert cli("--train", *flags({**TINY, "steps": 1}), "--compile") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"ddpm.py: error: torch.compile fails \(.*no compiler to be found.*--no-compile", line)
    assert len(line) < 280
    assert sorted(Path("runs").rglob("*")) == earlier


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps files that are open: run it on Linux or macOS")
def test_a_training_that_is_refused_at_its_first_step_leaves_nothing(folder, monkeypatch):
    """No folder, and no lock of one: neither the first run in runs/, nor one beside others."""

    def exhausted(self, *batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", exhausted)
    before = sorted(Path().rglob("*"))
    for out in ("runs/digits", "a/b/c"):
        assert cli("--train", *flags({**TINY, "steps": 1, "out": out})) == 2
        assert sorted(Path().rglob("*")) == before
    Path("a/other").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    assert cli("--train", *flags({**TINY, "steps": 1, "out": "a/b"})) == 2
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory: run it on Linux")
def test_freed_memory_is_kept(monkeypatch):
    """64 MB, allocated and freed ten times, are new pages each time, 16,384 of 4 kB; after keep_freed_memory they are
    the same pages, by the operating system's count of page faults. The command line begins with it."""
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
    assert after < 100
    assert before > 1000
    calls = []
    monkeypatch.setattr(ddpm, "keep_freed_memory", lambda: calls.append(1))
    assert cli("--sample", 1, "--out", "nowhere") == 2
    assert calls == [1]


# ---- 19. Published weights, and diffusers ----------------------------------------------------------------------------

DIFFUSERS = "compares with another library: pip install diffusers"

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


def publish(folder, changes=None, seed=SEED):
    """Write a network with random weights as it would be published. Returns the network."""
    config = {**SMALLER, **(changes or {})}
    torch.manual_seed(seed)
    network = randomise(
        ddpm.UNet(
            config["in_channels"],
            dim_mults=tuple(width // 128 for width in config["block_out_channels"]),
            num_res_blocks=config["layers_per_block"],
            attn_resolutions=(config["sample_size"],),
            image_size=config["sample_size"],
        )
    )
    Path(folder).mkdir()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), Path(folder) / "diffusion_pytorch_model.bin")
    return network


def test_published_weights_are_loaded(folder):
    """Every weight, by its name, from .bin and .safetensors, and under the names that older files give attention; .bin
    is preferred. The arguments of UNet are those of config.json."""
    network, x, t = publish("published"), torch.randn(2, 1, 8, 8), torch.tensor([7, 990])
    weights = network.state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {functools.reduce(lambda n, new: n.replace(new, old_names[new]), old_names, n): w for n, w in weights.items()}
    assert old.keys() != weights.keys()
    shutil.copytree("published", "old")
    torch.save(old, "old/diffusion_pytorch_model.bin")
    Path("old/diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    for name in ("published", "old"):
        loaded, shape = ddpm.load_published(name)
        assert shape == dict(dim=128, dim_mults=(1, 2), num_res_blocks=1, image_size=8, attn_resolutions=(8,))
        assert torch.equal(loaded(x, t), network(x, t))
        assert not loaded.training


def test_safetensors_are_loaded(folder):
    """Where there is no .bin and the package is installed."""
    safetensors = pytest.importorskip("safetensors.torch", reason="reads .safetensors: pip install safetensors")
    network, x, t = publish("published"), torch.randn(2, 1, 8, 8), torch.tensor([7, 990])
    Path("published/diffusion_pytorch_model.bin").unlink()
    safetensors.save_file(network.state_dict(), "published/diffusion_pytorch_model.safetensors")
    assert torch.equal(ddpm.load_published("published")[0](x, t), network(x, t))


def test_published_weights_are_sampled_from(folder):
    """--sample --weights draws with the paper's diffusion, by DPM-Solver or Algorithm 2, into runs/NAME or --out."""
    network = publish("small")
    how = ["--individual", "--seed", 5, "--no-bf16"]
    diffusion = ddpm.GaussianDiffusion(BETAS)
    assert cli("--sample", 2, "--weights", "small", "--sampling-steps", 6, *how) == 0
    _, x_T = image_generators(ddpm.derive_seed(5, "sampling"), 2)
    want = to_grey(diffusion.dpm_solver_sample_loop(network, x_T.shape, 6, noise=x_T))
    got = [np.asarray(Image.open(path)) for path in sorted(Path("runs/small/individual").iterdir())]
    assert np.abs(np.stack(got).astype(int) - want).max() <= 1
    assert (
        cli("--sample", 2, "--weights", "small", "--sampler", "ddpm", "--sampling-steps", 3, "--out", "other", *how)
        == 0
    )
    generators, x_T = image_generators(ddpm.derive_seed(5, "sampling"), 2)
    chain, model = diffusion.respace(network, 3)
    want = to_grey(chain.p_sample_loop(model, x_T.shape, noise=x_T, generator=generators))
    got = [np.asarray(Image.open(path)) for path in sorted(Path("other/individual").iterdir())]
    assert np.abs(np.stack(got).astype(int) - want).max() <= 1


def test_training_starts_from_published_weights(folder, capsys):
    """--train --weights with a learning rate of 0 leaves them as they are, without labels. Channels that differ from
    the data's are refused before anything is written, and so is a flag that the weights decide."""
    network = publish("small")
    publish("coloured", dict(in_channels=3, out_channels=3))
    assert cli("--train", "--weights", "coloured", "--steps", 1) == 2
    assert "digits has 1 channels, coloured 3" in capsys.readouterr().err
    assert cli("--train", "--weights", "small", "--dim", 64, "--steps", 1) == 2
    assert "--dim" in capsys.readouterr().err
    assert cli("--train", "--weights", "small", "--variance", "learned_range", "--steps", 1) == 2
    assert "learned_range" in capsys.readouterr().err
    assert cli("--train", "--weights", "small", "--prediction", "velocity", "--steps", 1) == 2
    assert "prediction must be noise, as of small, got velocity" in capsys.readouterr().err
    assert not Path("runs").exists()
    how = dict(steps=1, lr=0, batch_size=2, weights="small", sample_every=1000, timesteps=50, seed=SEED)
    assert cli("--train", *flags(how)) == 0
    saved = read("runs/digits")
    assert saved["num_classes"] is None
    assert saved["config"]["weights"] == "small"
    for i in range(2):
        save(folder / "images" / f"{i}.png", mode="L", size=(8, 8))
    assert cli("--train", "--data", "images", *flags(how)) == 0  # a folder's own settings are others
    config = read("runs/images")["config"]
    assert (config["prediction"], config["schedule"]) == ("noise", "linear")
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(saved["model"][name], weight, rtol=0, atol=0)


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
        (dict(block_out_channels=[64, 128]), "norm_num_groups can't be 32"),
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
    """Each field of config.json that changes what diffusers' U-Net computes. The configuration of the last row is
    accepted, and its empty file of weights refused. One line of at most 200 characters says why."""
    config = {name: value for name, value in {**SMALLER, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        ddpm.load_published(tmp_path)
    reason = str(refusal.value).partition(str(tmp_path))[2]
    assert reason
    assert len(reason) <= 250
    assert "\n" not in reason


def test_published_weights_that_would_run_code_are_refused_unrun(tmp_path):
    """A .bin is a pickle, and a pickle may hold any call: this one would make a folder."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "config.json").write_text(json.dumps(SMALLER))
    torch.save({"conv_in.weight": Malicious()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        ddpm.load_published(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_network_equals_diffusers_unet_of_the_published_configuration(tmp_path):
    """google/ddpm-cifar10-32's configuration with random weights, saved by diffusers in both formats: the same 328
    names as UNet()'s, its arguments, and the same ε to 1e−5 of its size."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    theirs = randomise(diffusers.UNet2DModel(**PUBLISHED).eval())
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "safetensors")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([7, 990])
    shapes = {name: weight.shape for name, weight in paper_network().state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert len(shapes) == 328
    for kind in ("bin", "safetensors"):
        network, shape = ddpm.load_published(tmp_path / kind)
        assert shape == dict(dim=128, dim_mults=(1, 2, 2, 2), num_res_blocks=2, image_size=32, attn_resolutions=(16,))
        with torch.no_grad():
            want, got = theirs(x, t).sample, network(x, t)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_published_weights_draw_what_diffusers_draws(folder):
    """--sample --weights: 50 steps of DDIM from the same noise give the image of diffusers' network and scheduler, to
    half a grey level."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    theirs = randomise(diffusers.UNet2DModel(**SMALLER).eval())
    theirs.save_pretrained("small", safe_serialization=False)
    how = ["--sampler", "ddim", "--individual", "--seed", 5, "--no-bf16"]
    assert cli("--sample", 2, "--weights", "small", *how) == 0
    scheduler = diffusers.DDIMScheduler(T, timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(50)
    _, x = image_generators(ddpm.derive_seed(5, "sampling"), 2)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    for i, want in enumerate(x):
        image = np.asarray(Image.open(f"runs/small/individual/{i:05}.png"), dtype=float)
        assert np.abs(image - (want[0].clamp(-1, 1).numpy() + 1) * 127.5).max() < 0.51


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_steps_equal_diffusers(variance, clip):
    """DDPMScheduler's step for the same ε, x_t and z, to 1e−5 of x's size, once its coefficients are computed in
    float64: accumulated in float32, they are off by 5e−5 near x_0."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    scheduler = diffusers.DDPMScheduler(T, variance_type=variance, clip_sample=clip)
    scheduler.alphas_cumprod = torch.as_tensor(BARS)
    scheduler.set_timesteps(T)
    diffusion, eps, x_t = ddpm.GaussianDiffusion(BETAS, variance), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for t in [0, 1, 2, 17, 400, 998, 999]:
        z = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(t))
        want = scheduler.step(eps, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        got = diffusion.p_sample(lambda x_t, t: eps, x_t, t, clip_denoised=clip, noise=z)
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_steps_equal_diffusers(eta, clip):
    """DDIMScheduler with trailing spacing, step by step, for S that divide T (elsewhere its prev_t is wrong), with ε
    recomputed from the clamped x̂_0, which it does when told to (use_clipped_model_output)."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    scheduler = diffusers.DDIMScheduler(T, timestep_spacing="trailing", clip_sample=clip, set_alpha_to_one=True)
    diffusion = ddpm.GaussianDiffusion(BETAS)
    for steps in (1, 2, 5, 10, 50, 200, 500, 1000):
        scheduler.set_timesteps(steps)
        timesteps = diffusion.ddim_timesteps(steps)
        assert timesteps == scheduler.timesteps.tolist()
        for t, s in {*pairs_of(timesteps)[:: max(1, steps // 25)], (timesteps[-1], -1)}:
            x_t, eps, z = (torch.randn(1, 1, 2, 2) for _ in range(3))
            want = scheduler.step(eps, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
            got = diffusion.ddim_sample(lambda x_t, t, eps=eps: eps, x_t, t, s, eta, clip, noise=z)
            assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max()), (steps, t)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 100])
def test_dpm_solver_steps_equal_diffusers(steps):
    """DPMSolverMultistepScheduler (2M, "dpmsolver++") over the same timesteps, every step without clamp, for the model
    ε_θ = tanh(x_t): to 1e−4 of x's size, because the scheduler computes its λ in float32."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        T, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    diffusion = ddpm.GaussianDiffusion(BETAS)
    scheduler.set_timesteps(timesteps=diffusion.dpm_solver_timesteps(steps))
    want = x_T = torch.randn(4, 1, 4, 4)
    ours = diffusion.dpm_solver_sample_steps(lambda x_t, t: torch.tanh(x_t), x_T, steps, clip_denoised=False)
    for t, got in zip(scheduler.timesteps, ours, strict=True):
        want = scheduler.step(torch.tanh(want), t, want).prev_sample
        assert (got - want).abs().max() < 1e-4 * max(1, want.abs().max()), t


EXPORTED = dict(
    labels=dict(),
    plain=dict(conditional=False),
    learned_variance=dict(variance="learned_range", conditional=False),
    no_attention=dict(attn_resolutions=(), dim_mults=(1, 2)),
    three_levels=dict(dim_mults=(1, 2, 2), attn_resolutions=(4, 2), num_res_blocks=2, conditional=False),
    cosine=dict(schedule="cosine", conditional=False, variance="fixed_small", dim=16),
    velocity=dict(prediction="velocity", conditional=False),
)


@pytest.mark.parametrize("settings", EXPORTED.values(), ids=EXPORTED)
def test_an_exported_run_is_the_same_function(settings, folder, capsys):
    """--export writes the averaged weights by their published names, a config.json whose fields say what the network
    is, and the schedule. Nothing else is written, and a second export into the folder is refused."""
    network = make_run("runs/digits", **settings)
    capsys.readouterr()
    assert cli("--export", "out/exported") == 0
    assert "out/exported" in capsys.readouterr().out
    names = {path.name for path in Path("out/exported").iterdir()}
    (weights_file,) = [name for name in names if name.startswith("diffusion_pytorch_model")]
    config, scheduler = (
        json.loads(Path("out/exported", f"{n}.json").read_text()) for n in ("config", "scheduler_config")
    )
    unconditional = network.num_classes is None and settings.get("variance") != "learned_range"
    assert names == {weights_file, "config.json", "scheduler_config.json"} | (
        {"model_index.json"} if unconditional else set()
    )
    assert [path.name for path in Path("out").iterdir()] == ["exported"]

    if weights_file.endswith(".bin"):
        weights = torch.load(Path("out/exported", weights_file), weights_only=True)
    else:
        weights = pytest.importorskip("safetensors.torch").load_file(Path("out/exported", weights_file))
    assert same(dict(weights), dict(network.state_dict()))
    given = {**TINY, **settings}
    mults = given["dim_mults"] if isinstance(given["dim_mults"], tuple) else (given["dim_mults"],)
    attention_at = given["attn_resolutions"] if isinstance(given["attn_resolutions"], tuple) else (4,)
    down = ["AttnDownBlock2D" if 8 // 2**i in attention_at else "DownBlock2D" for i in range(len(mults))]
    want = dict(
        sample_size=8,
        in_channels=1,
        out_channels=2 if settings.get("variance") == "learned_range" else 1,
        block_out_channels=[given["dim"] * mult for mult in mults],
        layers_per_block=given["num_res_blocks"],
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        add_attention=bool(attention_at),
        num_class_embeds=11 if given.get("conditional", True) else None,
        norm_num_groups=1,
    )
    assert {name: config[name] for name in want} == want
    assert {name: config[name] for name in PUBLISHED if name not in want and name != "_class_name"} == {
        name: PUBLISHED[name] for name in PUBLISHED if name not in want and name != "_class_name"
    }
    if settings.get("schedule") == "cosine":
        f = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(51)]
        want = [min(1 - b / a, 0.999) for a, b in zip(f, f[1:], strict=False)]
        assert scheduler["trained_betas"] == pytest.approx(want, rel=1e-9)
    else:
        assert (scheduler["beta_start"], scheduler["beta_end"]) == pytest.approx((1e-4 * 20, 0.02 * 20))
        assert scheduler["trained_betas"] is None
    assert scheduler["num_train_timesteps"] == 50
    assert scheduler["variance_type"] == settings.get("variance", "fixed_large")
    assert scheduler["prediction_type"] == ("v_prediction" if "prediction" in settings else "epsilon")
    assert (scheduler["timestep_spacing"], scheduler["clip_sample"]) == ("trailing", True)

    assert cli("--export", "out/exported") == 2
    assert "out/exported" in capsys.readouterr().err
    assert {path.name for path in Path("out/exported").iterdir()} == names


@pytest.mark.parametrize("settings", EXPORTED.values(), ids=EXPORTED)
def test_an_exported_run_is_the_same_function_in_diffusers(settings, folder):
    """UNet2DModel.from_pretrained gives the same output to 1e−5 of its size, labels and v included; DDIMPipeline and
    DDPMPipeline draw from an unconditional network with a fixed variance, DDIM's images being those of --sample."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    network = make_run("runs/digits", **settings)
    assert cli("--export", "exported") == 0
    theirs = diffusers.UNet2DModel.from_pretrained("exported").eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 44]), torch.tensor([0, 10])
    labels = (y,) if network.num_classes else ()
    with torch.no_grad():
        want, got = network(x, t, *labels), theirs(x, t, *labels).sample
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    if network.num_classes or settings.get("variance") == "learned_range":
        return
    pipeline = diffusers.DDIMPipeline.from_pretrained("exported")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    images = pipeline(2, generator, num_inference_steps=10, use_clipped_model_output=True, output_type="np").images
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
    diffusion = ddpm.build_diffusion(ddpm.Config(**read("runs/digits")["config"]))
    x_0 = diffusion.ddim_sample_loop(network, x_T.shape, 10, noise=x_T)
    np.testing.assert_allclose(images[..., 0], (x_0[:, 0].clamp(-1, 1) + 1) / 2, atol=1e-3)
    pipeline = diffusers.DDPMPipeline.from_pretrained("exported")
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline(1, num_inference_steps=50, output_type="np").images).all()


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(schedule="cosine", variance="fixed_small"), dict(prediction="velocity")],
    ids=["linear", "cosine", "velocity"],
)
def test_an_exported_run_is_sampled_from_as_the_run_is(settings, folder):
    """--sample --weights FOLDER draws with the schedule and the variance that were exported, by every sampler: the
    same images as from the run. An empty folder may exist before."""
    make_run("runs/digits", conditional=False, dim=16, attn_resolutions=(8,), **settings)
    Path("exported").mkdir()
    assert cli("--export", "exported") == 0
    for sampler in ("dpm-solver", "ddim", "ddpm"):
        how = ["--sample", 3, "--sampler", sampler, "--sampling-steps", 5, "--no-bf16"]
        assert cli(*how, "--out", "runs/digits") == 0
        assert cli(*how, "--weights", "exported", "--out", "again") == 0
        assert Path("again/samples.png").read_bytes() == Path("runs/digits/samples.png").read_bytes()


DIFFUSERS_DEFAULT = dict(timesteps=1000, schedule="linear", variance="fixed_small", prediction="noise")
LINEAR = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
F_20 = [math.cos((t / 20 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(21)]
COSINE_BETAS = [min(1 - b / a, 0.999) for a, b in zip(F_20, F_20[1:], strict=False)]


@pytest.mark.parametrize(
    "scheduler, want",
    [
        (None, {}),
        (LINEAR, DIFFUSERS_DEFAULT),
        (dict(LINEAR, variance_type="fixed_large"), dict(DIFFUSERS_DEFAULT, variance="fixed_large")),
        (
            dict(LINEAR, num_train_timesteps=20, trained_betas=COSINE_BETAS),
            dict(DIFFUSERS_DEFAULT, timesteps=20, schedule="cosine"),
        ),
        (dict(LINEAR, prediction_type="v_prediction"), dict(DIFFUSERS_DEFAULT, prediction="velocity")),
        (dict(LINEAR, prediction_type="sample"), "prediction_type can't be 'sample'"),
        (dict(LINEAR, beta_schedule="scaled_linear"), "beta_schedule can't be 'scaled_linear'"),
        (dict(num_train_timesteps=1000), DIFFUSERS_DEFAULT),
        (dict(LINEAR, beta_schedule=None), "beta_schedule can't be None"),
        (dict(LINEAR, clip_sample_range=2.0), "clip_sample_range can't be 2.0"),
        (dict(LINEAR, clip_sample=False), "clip_sample can't be False"),
        (dict(LINEAR, rescale_betas_zero_snr=True), "rescale_betas_zero_snr can't be True"),
        (dict(LINEAR, thresholding=True), "thresholding can't be True"),
        (dict(LINEAR, beta_end=0.03), "neither the linear nor the cosine"),
        (dict(LINEAR, variance_type="fixed_small_log"), "fixed_small_log"),
        (dict(LINEAR, num_train_timesteps="many"), "scheduler_config.json"),
    ],
)
def test_the_schedule_of_published_weights(scheduler, want, tmp_path):
    """scheduler_config.json gives T, the schedule and the variance; without it nothing is changed. What a Config can't
    describe is refused with the reason."""
    if scheduler is not None:
        (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    if isinstance(want, dict):
        assert ddpm.published_schedule(tmp_path) == want
    else:
        with pytest.raises(ValueError, match=want):
            ddpm.published_schedule(tmp_path)


# ---- 20. What is refused ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a labelled run, an unlabelled one, and things that are neither."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ddpm.Run, "grid", lambda run, step: None)
        train(steps=1, conditional=False, out="runs/plain")
        train(steps=1, label_dropout=0, out="runs/no_dropout")
        train(steps=1)
        for name in ("not_finite", "foreign_files"):
            saved = train(steps=1, out=name)
        saved["ema"]["conv_in.weight"][0] = math.nan
        torch.save(saved, "not_finite/checkpoint.pt")
        save(folder / "foreign_files" / "individual" / "00000.png")
        (folder / "foreign_files" / "individual" / "mine.txt").write_text("kept")
        os.utime("runs/digits/checkpoint.pt")  # the newest
    (folder / "empty").mkdir()
    save(folder / "broken" / "good.png")
    (folder / "broken" / "bad.png").write_bytes(b"not an image")
    save(folder / "truncated" / "cut.png", size=(200, 200))
    (folder / "truncated" / "cut.png").write_bytes((folder / "truncated" / "cut.png").read_bytes()[:80])
    whole = (folder / "runs" / "digits" / "checkpoint.pt").read_bytes()
    for name, content in (("text", b"no checkpoint"), ("nothing", b""), ("cut", whole[: len(whole) // 2])):
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").write_bytes(content)

    class Malicious:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    for name, content in (("foreign", {"weights": torch.zeros(3)}), ("malicious", {"config": Malicious()})):
        (folder / name).mkdir()
        torch.save(content, folder / name / "checkpoint.pt")
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
    ("--train --label-dropout 1", "label_dropout must be below 1: --no-conditional learns no labels"),
    ("--train --batch-size 1" + 400 * "0", "batch_size must lie between -2\\^63 and 2\\^63"),
    ("--sample 1" + 30 * "0", "--sample must lie in 1…1000000000, got 1000"),
    ("--sample 4 --guidance 1e308", "guidance must lie in -1000…1000"),
    ("--sample 4 --device meta", "device 'meta' can't be used here"),
    ("--sample 4 --device hpu", "device 'hpu' can't be used here"),
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
    ("--train --data nowhere --steps 1", "nowhere"),
    ("--train --data empty --steps 1", "no images in empty"),
    ("--train --data broken --steps 1", "broken/bad.png"),
    ("--sample 4 --out runs/no_dropout --guidance 1", "--guidance and --unconditional need .* --label-dropout above 0"),
    ("--sample 4 --out runs/no_dropout --unconditional", "--guidance and --unconditional need .* --label-dropout"),
    ("--train --data truncated --steps 1", "truncated/cut.png"),
    ("--train --data runs/digits/checkpoint.pt --steps 1", "checkpoint.pt"),
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
    ("--sample 4 --out malicious", "malicious/checkpoint.pt is no checkpoint"),
    ("--sample 4 --sampling-steps 0", "--sampling-steps must lie in 1…50, got 0"),
    ("--sample 4 --sampling-steps 51", "--sampling-steps must lie in 1…50, got 51"),
    ("--sample 4 --sampler ddim --eta -0.5", "eta .*-0.5"),
    ("--sample 4 --sampler ddim --eta 1.5", "eta .*1.5"),
    ("--sample 4 --sampler ddim --eta nan", "eta .*nan"),
    ("--sample 4 --eta 0.5", "--eta 0.5 is DDIM's: it goes with --sampler ddim only"),
    ("--sample 4 --guidance inf", "--guidance .*inf"),
    ("--sample 4 --label 10", "--label must lie in 0…9, got 10"),
    ("--train --no-conditional --label-dropout 0.1", "--label-dropout goes with labels"),
    ("--train --attn-resolutions 0", "attn_resolutions .*0"),
    ("--train --prediction x_start", "prediction.*x_start"),
    ("--train --preset laptop", "preset.*laptop"),
    ("--train --dim 4096 --dim-mults 64 --num-res-blocks 16", "needs more than .* GiB of memory"),
    ("--sample 4 --label -1", "--label .*-1"),
    ("--sample 4 --label 3 --unconditional", "--unconditional goes with neither"),
    ("--sample 4 --guidance 1 --unconditional", "--unconditional goes with neither"),
    ("--sample 4 --out runs/plain --label 1", "learned labels; that in runs/plain did not"),
    ("--sample 4 --out runs/plain --guidance 1", "learned labels; that in runs/plain did not"),
    ("--sample 4 --sampler ddpm --eta 0.5", "--eta 0.5 is DDIM's"),
    ("--sample 4 --sampler euler", "sampler.*euler"),
    ("--sample 4 --sampling-batch 0", "--sampling-batch .*0"),
    ("--sample 4 --seed -2", "--seed .*-2"),
    ("--sample 4 --out runs/digits --data digits", "--data digits does not go with --out runs/digits"),
    ("--export new --out runs/digits --data digits", "--data digits does not go with --out runs/digits"),
    ("--evaluate 2 --out runs/digits --data nowhere", "nowhere is neither a data set"),
    ("--train --resume --steps 3 --out runs/digits --data nowhere", "nowhere is neither a data set"),
    ("--sample 4 --out=", "--out must not be empty"),
    ("--train --data=", "--data must not be empty"),
    ("--sample 4 --out not_finite", "the weights in not_finite are not finite"),
    ("--sample 4 --individual --out foreign_files", "foreign_files/individual holds mine.txt"),
    ("--sample 4 --seed 4294967296", "--seed must lie in 0…4294967295, got 4294967296$"),
    ("--sample 4 --lr 1", "--lr does not go with --sample"),
    ("--sample 4 --steps 10", "--steps does not go with --sample"),
    ("--sample 4 --resume", "--resume does not go with --sample"),
    ("--evaluate 0", "--evaluate .*0"),
    ("--evaluate --eta 1", "--eta does not go with --evaluate"),
    ("--evaluate 2 --out runs/no_dropout", "--evaluate gives no labels: .*--label-dropout above 0"),
]


def test_settings_from_python_become_plain_values(folder):
    """Paths and NumPy's numbers are stored as text, ints and floats, so that the checkpoint can be read."""
    settings = dict(
        TINY, dim_mults=[np.int64(1)], attn_resolutions=np.array([4]), steps=np.int64(1), lr=np.float32(0.5)
    )
    config = ddpm.preset("digits", **settings, flip=np.bool_(True), out=Path("A"))
    assert (config.steps, config.lr, config.flip, config.out, config.dim_mults) == (1, 0.5, True, "A", (1,))
    assert {type(value) for value in dataclasses.asdict(config).values()} <= {int, float, bool, str, tuple, type(None)}
    ddpm.train(config)
    assert ddpm.read_checkpoint(Path("A"))["config"] == config


SMALLEST = dict(
    image_size=1, dim=4, num_res_blocks=1, timesteps=2, steps=1, batch_size=1, warmup=0, lr=0.0, dropout=0.0
)


@pytest.mark.parametrize("name, value", SMALLEST.items(), ids=SMALLEST)
def test_the_smallest_values_are_taken(name, value):
    """What is refused is below them."""
    assert getattr(ddpm.preset("digits", **{name: value}), name) == value
    with pytest.raises(ValueError, match=name):
        ddpm.preset("digits", **{name: value - 1})


def test_a_grid_has_ten_images_of_at_most_sixteen_classes(folder):
    """With 20 classes 160 images of the first 16, a column each; --sample then makes a square grid of all in turn.
    Sampling and evaluation start from seed 0 unless told otherwise."""
    asked = []

    def trajectory(count, labels, seed, **how):
        asked.append(labels.tolist())
        return iter([torch.zeros(count, 1, 8, 8)])

    network = types.SimpleNamespace(num_classes=20)
    run = ddpm.Run(ddpm.preset("digits", out=str(folder)), network, types.SimpleNamespace(timesteps=10))
    run.trajectory = trajectory
    GRID(run, 1)
    assert asked == [[i % 16 for i in range(160)]]
    tiles(Image.open(folder / "samples-000001.png"), 16, 160)

    ddpm.sample(run, 40)
    assert asked[1] == [i % 20 for i in range(40)]
    tiles(Image.open(folder / "samples.png"), 7, 40)
    assert all(inspect.signature(f).parameters["seed"].default == 0 for f in (ddpm.sample, ddpm.evaluate))


@pytest.mark.parametrize("count", [1, 90])
def test_the_experiment_memory_measures_the_nearest_training_images(count, folder, monkeypatch, capsys):
    """Of the run that is there, whatever its settings, also where nothing is held out: the distances of the samples,
    and of held-out images if there are any, recomputed here one by one."""
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / "pictures" / f"{i}.bmp")  # whose bytes, and CRC, no encoder changes
    train(data="pictures", image_size=8, steps=1, out="runs/pictures")
    samples = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    axes = [mock.MagicMock(), mock.MagicMock()]
    monkeypatch.setattr(bench_ddpm, "make_figure", lambda *_, **__: ("figure", axes))
    monkeypatch.setattr(bench_ddpm, "draw", lambda settings, run, count: samples)
    capsys.readouterr()
    assert bench_ddpm.memory(bench_ddpm.Settings(data="pictures")) == "figure"
    said = capsys.readouterr().out

    images = ddpm.read_data("pictures", 8)
    train_images = images.images[~images.held_out].double().numpy()
    sets = {"samples": samples.double().numpy()}
    if count == 90:
        sets["held-out images"] = images.images[images.held_out].double().numpy()
    assert ("held-out" in said) == (count == 90)
    for name, chosen in sets.items():
        nearest = [min(((a - b) ** 2).mean() ** 0.5 for b in train_images) for a in chosen]
        cells = re.search(rf"{name}[ |]+(\d+)[ |]+([\d.]+)[ |]+([\d.]+)[ |]+([\d.]+)", said).groups()
        want = [len(chosen), np.median(nearest), np.quantile(nearest, 0.1), min(nearest)]
        np.testing.assert_allclose([float(cell) for cell in cells], want, atol=0.051)
    grid = np.asarray(axes[0].imshow.call_args[0][0])
    assert grid.shape[:2] == (4 * (10 * 9 + 1), 4 * (min(6, len(train_images) + 1) * 9 + 1))
    with pytest.raises(ValueError, match="runs/pictures holds a run of pictures, not of other/pictures: move it away"):
        bench_ddpm.memory(bench_ddpm.Settings(data="other/pictures"))


def test_any_terminal_can_print_everything(folder, monkeypatch):
    """In encodings without β and ᾱ, what can't be printed is a question mark; where the reader of the output has gone,
    as head has, the exit status is 1 and nothing is on stderr."""

    def printed(encoding, run, *arguments):
        output, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", errors)
            assert not run(*arguments)
        for stream in (output, errors):
            stream.seek(0)
        assert errors.read() == ""
        return output.read()

    monkeypatch.setattr(sys, "argv", ["bench_ddpm.py", "--list"])
    for encoding in ("ascii", "cp1252"):
        for line in ("--help", "--train --help", "--sample --help", "--evaluate --help"):
            assert "ddpm.py" in printed(encoding, cli, *line.split())
        assert "objectives" in printed(encoding, bench_ddpm.main)

    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, HERE / "ddpm.py", "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_help_is_true_for_every_preset(capsys):
    """--train --help says for each option the value of the digits, and of each preset that differs."""
    assert cli("--train", "--help") == 0
    text = re.sub(r", --no-\S+", "", " ".join(capsys.readouterr().out.split()))
    named = {"folder": "a folder", "gpu": "--preset gpu"}

    def typed(value):
        if isinstance(value, bool):
            return "on" if value else "off"
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    for field in dataclasses.fields(ddpm.Config):
        if field.metadata["shown"] or field.name == "data":
            continue
        flag = re.escape("--" + field.name.replace("_", "-"))
        said = re.search(rf" {flag}[ ,](?:(?! --).)*?\(default: (.*?)\)", text.replace("--preset gpu", "PRESET_GPU"))
        first, *others = said[1].replace("PRESET_GPU", "--preset gpu").split("; ")
        values = dict.fromkeys(ddpm.PRESETS, first)
        for other in others:
            value, names = other.split(" for ")
            for name in names.split(", "):
                values[next((key for key, shown in named.items() if shown == name), name)] = value
        for name in ddpm.PRESETS:
            config = ddpm.preset(name) if name in ddpm.DATA_SETS else ddpm.preset("images", name)
            assert values[name] == typed(getattr(config, field.name)), (field.name, name)


def test_closed_streams_and_the_total_of_an_evaluation(folder, monkeypatch):
    """With stdout and stderr closed everything runs. In an encoding without ≤ the total is printed."""
    train(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert cli("--sample", 1, "--sampling-steps", 2) == 0
        assert cli("--sample", 1, "--out", "missing") == 2
    assert Path("runs/digits/samples.png").exists()
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert cli("--evaluate", 2) == 0
    output.seek(0)
    assert re.search(r"total: NLL \? +\d", output.read())


def test_one_process_of_torchrun_evaluates_and_exports(folder, monkeypatch, capsys):
    """The others have nothing to do, and would write the same files."""
    train(steps=1)
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli("--evaluate", 2) == 0
    assert cli("--export", "exported") == 0
    assert capsys.readouterr().out == ""
    assert not Path("exported").exists()
    monkeypatch.setenv("RANK", "0")
    assert cli("--export", "exported") == 0
    assert Path("exported").exists()
    assert cli("--evaluate", 2) == 0
    assert "NLL" in capsys.readouterr().out


HALF = [
    dict(RANK="1"),
    dict(RANK="2", WORLD_SIZE="2"),
    dict(WORLD_SIZE="0"),
    dict(WORLD_SIZE="2"),
    dict(RANK="x", WORLD_SIZE="2"),
    dict(RANK="0", WORLD_SIZE="x"),
    dict(RANK="-1", WORLD_SIZE="2"),
]


@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_of_torchruns_environment_is_refused(half, folder, monkeypatch, capsys):
    """Sampling would end without a file, and training with a strange error."""
    for name, value in half.items():
        monkeypatch.setenv(name, value)
    assert cli("--train", *flags(TINY)) == 2
    wanted = "RANK must be a number below WORLD_SIZE, got RANK=[^ ]+ and WORLD_SIZE=[^ ]+: torchrun sets both"
    assert re.search(wanted, capsys.readouterr().err)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("line, words", REFUSED, ids=[line or "nothing" for line, _ in REFUSED])
def test_the_command_line_refuses(line, words, trained, monkeypatch, capsys):
    """One line that names the value, exit status 2, nothing written, no code of a foreign checkpoint run."""
    monkeypatch.chdir(trained)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert cli(*line.split()) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert message[0].startswith("ddpm.py: error: ")
    assert re.search(words, message[0]), message
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def bad_values(field):
    """Values that a flag can't have: of another type, outside its bounds or choices."""
    if field.metadata["choices"]:
        return ["none-of-these"]
    if field.type not in (int, float, tuple):
        return []
    low, high = field.metadata["low"], field.metadata["high"]
    outside = [low - 1] * (low > -math.inf) + [high + 1] * (high < math.inf)
    return ["many", "nan", "1e400", *map(str, outside)]


@pytest.mark.parametrize(
    "mode, field, value",
    [
        (mode, field.name, value)
        for mode, kind in (("--train", ddpm.Config), ("--sample 1", ddpm.Sampling))
        for field in dataclasses.fields(kind)
        for value in bad_values(field)
    ],
)
def test_every_flag_refuses_what_it_cannot_be(mode, field, value, trained, monkeypatch, capsys):
    """One line that names the flag and the value, exit status 2."""
    monkeypatch.chdir(trained)
    assert cli(*mode.split(), f"--{field.replace('_', '-')}={value}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"ddpm.py: error: .*{field.replace('_', '[-_]')}", line)
    assert value in line or float(value) == math.inf


X, T_AND_1 = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
PUBLIC = dict(
    split=(lambda: ddpm.load_data("digits", split="val"), "split must be train, test or None, got 'val'"),
    steps_of_1_5=(lambda: ddpm.preset("digits", steps=1.5), "steps must be of type int, got 1.5"),
    steps_none=(lambda: ddpm.preset("digits", steps=None), "steps must be of type int, got None"),
    steps_true=(lambda: ddpm.preset("digits", steps=True), "steps must be of type int, got True"),
    lr_text=(lambda: ddpm.preset("digits", lr="0.1"), "lr must be of type float, got '0.1'"),
    flip_text=(lambda: ddpm.preset("digits", flip="no"), "flip must be of type bool, got 'no'"),
    dim_mults_text=(lambda: ddpm.preset("digits", dim_mults="12"), "dim_mults must be of type tuple, got '12'"),
    no_betas=(lambda: ddpm.GaussianDiffusion([]), "betas"),
    beta_of_1=(lambda: ddpm.GaussianDiffusion([0.5, 1.0]), "betas"),
    beta_of_0=(lambda: ddpm.GaussianDiffusion([0.0, 0.5]), "betas"),
    betas_nan=(lambda: ddpm.GaussianDiffusion([math.nan]), "betas"),
    betas_square=(lambda: ddpm.GaussianDiffusion([[0.5]]), "betas"),
    variance=(lambda: ddpm.GaussianDiffusion([0.5, 0.999], "big"), "big"),
    loss=(lambda: ddpm.GaussianDiffusion([0.5, 0.999], loss="l2"), "l2"),
    pixels=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X.to(torch.uint8), T_AND_1, X), "uint8"),
    noise=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1, X[:1]), r"\(1, 1, 4, 4\)"),
    t_short=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1[:1]), r"\(2,\)"),
    t_float=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1 / 2), "int64"),
    t_negative=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1 - 1), "-1"),
    t_large=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, 1000), "0…999, got 1000"),
    t_below=(lambda: ddpm.GaussianDiffusion(BETAS).p_sample(predicts_zero, X, -1), "-1"),
    t_too_large=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1 + 999), "0…999, got .*1000"),
    model=(
        lambda: ddpm.GaussianDiffusion(BETAS).p_sample(lambda x, t: x[:, :, :2], X, 5),
        r"must return \(2, 1, 4, 4\), got \(2, 1, 2, 4\)",
    ),
    model_learned=(
        lambda: ddpm.GaussianDiffusion(BETAS, "learned_range").p_sample(predicts_zero, X, 5),
        r"must return \(2, 2, 4, 4\), got \(2, 1, 4, 4\)",
    ),
    eta=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_sample(predicts_zero, X, 5, 3, eta=1.2), "1.2"),
    prev_t=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_sample(predicts_zero, X, 5, 5), "prev_t=5"),
    ddim_t=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_sample(predicts_zero, X, 1000, 3), "got 1000"),
    prev_t_high=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_sample(predicts_zero, X, 5, 2000), "prev_t=2000 with t=5"),
    prev_t_low=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_sample(predicts_zero, X, 5, -2), "prev_t=-2"),
    encode=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_encode_loop(predicts_zero, X.to(torch.uint8), 1), "uint8"),
    steps_0=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_timesteps(0), "got 0"),
    steps_T=(lambda: ddpm.GaussianDiffusion(BETAS).ddim_timesteps(1001), "1001"),
    no_classes=(lambda: ddpm.classifier_free_guidance(ddpm.UNet(dim=4, image_size=8), T_AND_1, 1.0), "num_classes"),
    label=(lambda: ddpm.classifier_free_guidance(Labelled(), T_AND_1 + 4, 1.0), "5"),
    label_low=(lambda: ddpm.classifier_free_guidance(Labelled(), T_AND_1 - 1, 1.0), "-1"),
    size=(lambda: ddpm.UNet(image_size=30), "30 can't be halved 3 times.*multiple of 8"),
    deep=(lambda: small(dim_mults=(1, 1, 1, 1))(torch.zeros(2, 2, 4, 4), T_AND_1), "multiples of 8, got"),
    size_0=(lambda: ddpm.UNet(image_size=0), "0"),
    dim=(lambda: small(dim=6), "6"),
    no_levels=(lambda: small(dim_mults=()), r"at least 1, got \(\), 2, 1 and None"),
    no_channels_in_a_level=(lambda: small(dim_mults=(1, 0)), r"at least 1, got \(1, 0\)"),
    no_blocks=(lambda: small(num_res_blocks=0), "at least 1, got .*, 0 and None"),
    no_image_channels=(lambda: small(image_channels=0), "at least 1, got .*, 0, 1 and None"),
    classes_below_0=(lambda: small(num_classes=-3), "at least 1, got .* and -3"),
    seed_below_0=(lambda: ddpm.preset("digits", seed=-1), "seed must lie in 0…4294967295, got -1"),
    seed_large=(lambda: ddpm.preset("digits", seed=2**32), "seed must lie in 0…4294967295, got 4294967296"),
    noise_int=(lambda: ddpm.GaussianDiffusion(BETAS).q_sample(X, T_AND_1, X.long()), "floats, got torch.int64"),
    embedding=(lambda: ddpm.SinusoidalPositionEmbeddings(7), "7"),
    embedding_2=(lambda: ddpm.SinusoidalPositionEmbeddings(2), "2"),
    channels=(lambda: small()(X, T_AND_1), r"\(2, 1, 4, 4\)"),
    odd=(lambda: small()(torch.zeros(2, 2, 5, 4), T_AND_1), r"\(2, 2, 5, 4\)"),
    flat=(lambda: small()(torch.zeros(2, 2, 4), T_AND_1), r"\(2, 2, 4\)"),
    labels=(lambda: small()(torch.zeros(2, 2, 4, 4), T_AND_1, T_AND_1), "num_classes"),
    levels=(lambda: ddpm.preset("digits", dim_mults=()), "dim_mults"),
    choice=(lambda: ddpm.preset("digits", schedule="x"), "x"),
)


@pytest.mark.parametrize("call, words", PUBLIC.values(), ids=PUBLIC)
def test_public_functions_refuse(call, words):
    """A ValueError with the offending value."""
    with pytest.raises(ValueError, match=words):
        call()


# ---- 21. Known mistakes ----------------------------------------------------------------------------------------------
# Most were shipped by public implementations of DDPM or DDIM. Each is put into ddpm.py in place of the right line, and
# the test named beside it must then fail.

MISTAKES = [
    (
        "noise at the last step",
        "return mean + broadcast(t > 0, x_t) * variance.sqrt() * z",
        "return mean + variance.sqrt() * z",
        functools.partial(test_no_noise_at_the_last_step, variance="fixed_large", sigma2=BETAS),
    ),
    (
        "a velocity's sign",
        "prediction = extract(self.sqrt_alphas_cumprod, t, x_t) * prediction + noise_part",
        "prediction = noise_part - extract(self.sqrt_alphas_cumprod, t, x_t) * prediction",
        test_errors_of_a_velocity_are_not_magnified,
    ),
    (
        "a velocity trained with the weight of the noise",
        "error = error / extract(self.sqrt_alphas_cumprod, t, x_t)",
        "error = error / 1",
        functools.partial(test_the_loss_of_a_velocity_written_out, "fixed_large"),
    ),
    (
        "the last DDIM step goes to alpha_bar of t = 0",
        "return self._alphas_cumprod[t] if t >= 0 else 1.0",
        "return self._alphas_cumprod[max(t, 0)]",
        test_ddim_stays_on_the_line_from_noise_to_x_0,
    ),
    (
        "DDIM reads alpha_bar one step early",
        "alpha_bar_s = self._alpha_bar(s)",
        "alpha_bar_s = self._alpha_bar(s - 1)",
        test_ddim_stays_on_the_line_from_noise_to_x_0,
    ),
    (
        "a short DDIM run starts below T-1",
        "return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]",
        "return [self.timesteps // steps * i for i in range(steps - 1, -1, -1)]",
        test_ddim_timesteps_are_trailing,
    ),
    (
        "DDIM over all T steps begins at index T",
        "return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]",
        "return [round(self.timesteps * i / steps) for i in range(steps, 0, -1)]",
        test_ddim_timesteps_are_trailing,
    ),
    (
        "an S that does not divide T gives more than S steps",
        "return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]",
        "return list(range(self.timesteps - 1, -1, -(self.timesteps // steps)))",
        test_ddim_timesteps_are_trailing,
    ),
    (
        "prev_t = -1 indexes the array from its end",
        "return self._alphas_cumprod[t] if t >= 0 else 1.0",
        "return self._alphas_cumprod[t]",
        test_ddim_stays_on_the_line_from_noise_to_x_0,
    ),
    (
        "the EMA averages the schedule's buffers",
        "self.register_buffer(name, coefficient.to(dtype), persistent=False)",
        "self.register_buffer(name, coefficient.to(dtype))",
        test_coefficients_are_buffers_outside_the_state_dict,
    ),
    (
        "no EMA at sampling time",
        'network.load_state_dict(checkpoint["ema"])',
        'network.load_state_dict(checkpoint["model"])',
        test_a_run_draws_what_its_checkpoint_holds,
    ),
    (
        "the predicted x_0 is not clamped",
        "def p_mean_variance(self, model, x_t, t, clip_denoised=True):",
        "def p_mean_variance(self, model, x_t, t, clip_denoised=False):",
        test_the_clamp_is_on_by_default,
    ),
    (
        "t is never T-1 in training",
        "t = torch.randint(diffusion.timesteps, (len(chosen),), device=images.device)",
        "t = torch.randint(diffusion.timesteps - 1, (len(chosen),), device=images.device)",
        test_algorithm_1_draws_what_the_paper_says,
    ),
    (
        "the network is given t/T",
        "prediction = model(x_t, t)\n",
        "prediction = model(x_t, t / self.timesteps)\n",
        functools.partial(test_the_model_is_given_t_as_it_is, t=17),
    ),
    (
        "the network ignores t",
        "angles = t[:, None] * omega",
        "angles = 0 * t[:, None] * omega",
        test_the_network_depends_on_x_t_and_y,
    ),
    (
        "images on [0, 1]",
        "return pixels.float() / 127.5 - 1",
        "return pixels.float() / 255",
        test_pixels_are_scaled_to_minus_one_and_one_and_back,
    ),
    (
        "the root is missing on 1 - alpha_bar",
        'register("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())',
        'register("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod))',
        test_equation_4_is_equation_2_composed,
    ),
    (
        "the root is missing on alpha_bar",
        'register("sqrt_alphas_cumprod", alphas_cumprod.sqrt())',
        'register("sqrt_alphas_cumprod", alphas_cumprod)',
        test_equation_4_is_equation_2_composed,
    ),
    (
        "the logarithm of a zero variance",
        'register("posterior_log_variance", positive_variance.log())',
        'register("posterior_log_variance", posterior_variance.log())',
        functools.partial(test_bits_per_dim_is_finite, variance="fixed_small"),
    ),
    (
        "the cosine schedule is not capped",
        "return (1 - f[1:] / f[:-1]).clamp(max=0.999)",
        "return 1 - f[1:] / f[:-1]",
        functools.partial(test_cosine_schedule_is_capped_at_every_length, timesteps=10),
    ),
    (
        "alpha_bar is accumulated in float32",
        "alphas_cumprod = alphas.cumprod(0)",
        "alphas_cumprod = alphas.float().cumprod(0).double()",
        test_coefficients_are_computed_in_float64,
    ),
    (
        "the linear schedule keeps its ends at T << 1000",
        "return 1e-4 * scale, min(0.02 * scale, 0.999)",
        "return 1e-4, 0.02",
        functools.partial(test_short_schedules_end_in_noise, schedule="linear"),
    ),
    (
        "the time is added after both convolutions",
        """        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
""",
        """        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
""",
        test_blocks_start_as_the_identity,
    ),
    (
        "batch norm",
        "self.norm1 = group_norm(in_channels, groups)",
        "self.norm1 = nn.BatchNorm2d(in_channels)",
        test_images_of_a_batch_are_independent,
    ),
    (
        "guidance with the wrong sign",
        "(1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]",
        "(1 + scale) * conditional[:, :c] + scale * unconditional[:, :c]",
        functools.partial(test_guidance_mixes_as_the_paper_says, w=0.5),
    ),
    (
        "guidance off by one",
        "(1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]",
        "scale * conditional[:, :c] + (1 - scale) * unconditional[:, :c]",
        functools.partial(test_guidance_mixes_as_the_paper_says, w=0.5),
    ),
    (
        "dropout stays on while sampling",
        "ema = copy.deepcopy(model).eval()",
        "ema = copy.deepcopy(model)",
        test_watch_is_shown_the_averaged_network,
    ),
    (
        "resuming forgets the EMA",
        'self.ema.load_state_dict(checkpoint["ema"])',
        'self.ema.load_state_dict(checkpoint["model"])',
        test_resumed_equals_uninterrupted_to_the_bit,
    ),
    (
        "resuming forgets the optimizer",
        'self.restore_optimizer(checkpoint["optimizer"]["state"])',
        "pass",
        test_resumed_equals_uninterrupted_to_the_bit,
    ),
    (
        "resuming restarts the data order",
        'torch.manual_seed(derive_seed(config.seed, "training", step, rank))',
        'torch.manual_seed(derive_seed(config.seed, "training", step - state.step, rank))',
        test_resumed_equals_uninterrupted_to_the_bit,
    ),
    (
        "the clamped x_0 keeps its old noise in DDIM",
        "predicted_noise = self.predict_noise(x_t, t, pred_x_start)",
        "pass",
        test_clamped_ddim_recomputes_its_noise,
    ),
    (
        "interpolation noises to t and decodes from t-1",
        "return last(self.p_sample_steps(model, x_t, t, generator=generator))",
        "return last(self.p_sample_steps(model, x_t, t - 1, generator=generator))",
        test_interpolation_is_figure_8,
    ),
    (
        "--resume without a checkpoint starts from scratch",
        'if "resume" in given:\n        checkpoint',
        'if Path(given.get("out", "runs/digits"), "checkpoint.pt").exists():\n        checkpoint',
        test_resuming_without_a_checkpoint_is_refused,
    ),
    (
        "label dropout is taken for an integer",
        "< config.label_dropout",
        "< int(config.label_dropout)",
        functools.partial(test_training_is_algorithm_1, settings=EVERYTHING),
    ),
    (
        "DPM-Solver extrapolates twice as far",
        "extrapolated = pred_x_start + ratio / 2 *",
        "extrapolated = pred_x_start + ratio *",
        functools.partial(test_dpm_solver_in_its_own_exponential_form, steps=7, clip=False),
    ),
    (
        "DPM-Solver extrapolates from an extrapolation",
        "pred_x_start_r = pred_x_start",
        "pred_x_start_r = extrapolated",
        functools.partial(test_dpm_solver_in_its_own_exponential_form, steps=7, clip=False),
    ),
    (
        "DPM-Solver does not clamp what it extrapolates",
        "extrapolated = extrapolated.clamp(-1, 1)",
        "pass",
        functools.partial(test_dpm_solver_in_its_own_exponential_form, steps=7, clip=True),
    ),
    (
        "DPM-Solver's timesteps end at t = 0",
        "steps, endpoint=False)",
        "steps)",
        functools.partial(test_dpm_solver_timesteps_are_even_in_log_snr, schedule=ddpm.linear_beta_schedule),
    ),
    (
        "encoding takes x_0 for x_1",
        "x_t = self._combine(x_start, predicted_noise, timesteps[0])",
        "x_t = x_start",
        functools.partial(test_encoding_written_out, steps=37, clip=False),
    ),
    (
        "DDIM with S = T runs another sampler",
        "x_t = self.ddim_sample(model, x_t, t, prev_t, eta, clip_denoised, generator=generator)",
        "x_t = self.p_sample(model, x_t, t, clip_denoised, generator=generator)",
        test_all_T_steps_of_ddim_are_still_ddim,
    ),
]


@pytest.mark.filterwarnings("ignore:√ᾱ_T")
@pytest.mark.parametrize("right, wrong, test", [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_known_mistake_turns_its_test_red(right, wrong, test, request, monkeypatch):
    """A copy of ddpm.py with the wrong line takes the place of ddpm in this file, and the test's assertion fails."""
    source = (HERE / "ddpm.py").read_text()
    assert source.count(right) == 1
    mistaken = types.ModuleType("ddpm")
    mistaken.__file__ = ddpm.__file__
    exec(compile(source.replace(right, wrong), "ddpm.py with a mistake", "exec"), mistaken.__dict__)
    mistaken.pick_device = ddpm.pick_device
    mistaken.EXAMPLES = ddpm.EXAMPLES
    fixtures = [name for name in inspect.signature(test).parameters if name not in getattr(test, "keywords", {})]
    arguments = {name: request.getfixturevalue(name) for name in fixtures}
    mistaken.Run.grid = ddpm.Run.grid
    monkeypatch.setattr(sys.modules[__name__], "ddpm", mistaken)
    with pytest.raises(AssertionError):
        test(**arguments)


# ---- 22. README ------------------------------------------------------------------------------------------------------


def readme_table():
    """The rows of README's table paper ↔ code ↔ test: what the paper has, names in ddpm.py, tests."""
    rows = []
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and "`test_" in cells[2]:
            rows.append((cells[0], re.findall(r"`(\w+)`", cells[1]), re.findall(r"`(test_\w+)`", cells[2])))
    return rows


class Calls:
    """Records which functions of README's table each test calls, and which tests pass."""

    def __init__(self, patch):
        self.calls, self.passed = {}, set()
        for name in {name for _, names, _ in readme_table() for name in names}:
            kinds = [ddpm, *ddpm.GaussianDiffusion.__mro__]
            owner = next(kind for kind in kinds if name in vars(kind))
            original = getattr(owner, name)
            if inspect.isclass(original):
                patch.setattr(original, "__init__", self.recorded(name, original.__init__))
            else:
                patch.setattr(owner, name, self.recorded(name, original))

    def recorded(self, name, function):
        @functools.wraps(function)
        def call(*arguments, **named):
            test, _, phase = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
            if phase == "(call)":
                self.calls.setdefault(test.partition("::")[2].partition("[")[0], set()).add(name)
            return function(*arguments, **named)

        return call

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid.partition("::")[2].partition("[")[0])


@pytest.fixture(autouse=True, scope="session")
def calls(request, on_one_thread_of_the_cpu):
    """Calls of this session, from its first test on."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Calls(patch)
        request.config.pluginmanager.register(recorder)
        yield recorder
        request.config.pluginmanager.unregister(recorder)


def test_readmes_table_names_every_equation():
    """Equations 1 to 15 and both algorithms of DDPM, the equations used of DDIM and Improved DDPM; all names exist."""
    numbers = {"DDPM": set(), "DDIM": set(), "Improved DDPM": set()}
    for paper, names, tests in readme_table():
        match = re.match(r"(DDIM|Improved DDPM)? ?Eq\. ([\d, ]+)", paper)
        if match:
            numbers[match[1] or "DDPM"] |= set(map(int, match[2].strip(" ,").split(",")))
        assert names, paper
        assert all(hasattr(ddpm, name) or hasattr(ddpm.GaussianDiffusion, name) for name in names), names
        assert all(callable(globals().get(name)) for name in tests), tests
    assert numbers == {"DDPM": set(range(1, 16)), "DDIM": {12, 16}, "Improved DDPM": {15, 16, 17}}
    assert {"Algorithm 1", "Algorithm 2"} <= {paper for paper, _, _ in readme_table()}


def test_the_tests_in_readmes_table_call_the_functions_beside_them(calls):
    """Each test of a row called each function of the row in this session. Needs the tests to have run before."""
    rows = [(names, test) for _, names, tests in readme_table() for test in tests if test in calls.passed]
    if not rows:
        pytest.skip("none of the tests that README names has run: run the whole suite")
    missing = {test: set(names) - calls.calls.get(test, set()) for names, test in rows}
    assert not {test: names for test, names in missing.items() if names}


def test_readme_names_what_exists():
    """Every test that README's text names, and every image, which weigh less than 2 MB together; the two commands are
    on its first screen."""
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert callable(globals().get(name)), name
    images = [HERE / path for path in re.findall(r"\]\((assets/[^)]+)\)", text)]
    assert images
    assert sum(path.stat().st_size for path in images) < 2_000_000
    first_screen = text[:1500]
    assert "python ddpm.py --train" in first_screen
    assert "pytest" in first_screen


def test_readmes_links_point_to_the_lines_that_define_the_names():
    """[`name`](file.py#L123) is a link to the line with def name or class name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 50
    for name, file, line in links:
        text = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", text), (name, file, line)


def test_readmes_python_example_runs():
    """As it stands, but for fewer images and DDIM steps."""
    code = re.search(r"```python\n(import torch\n.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    assert "8, 3, 32, 32" in code
    assert "steps=50" in code
    names = {}
    exec(code.replace("(8,", "(1,").replace("steps=50", "steps=2"), names)
    assert names["loss"].item() > 0
    assert names["samples"].shape == (1, 3, 32, 32)
