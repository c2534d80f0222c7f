"""The proof of ddpm.py: each equation of the papers against an independent derivation.

    pytest                          # about a minute on two CPU cores
    DDPM_TEST_SEED=7 pytest         # the same tests with other random numbers
    DDPM=path/to/other.py pytest    # the mathematical part alone, on another implementation with the same names

The first part is read beside the papers, in their order. Each test derives the expected value independently of ddpm.py:
in closed form, in exact arithmetic, by numerical integration, or by a transcription into NumPy. The second part, below
the line "The proof ends here", tests what runs it: data, runs, sampling, published weights, the command line.

Formulas follow ddpm.py's rule: t = 0…T−1 is the paper's t − 1, and t = −1 is x_0, where ᾱ = 1. x_T is the noise that
sampling starts from. A test that compares random numbers with a distribution states its false-alarm rate, the
probability that it fails although the code is right.

Gaussian worlds. If each pixel of x_0 is distributed as N(m, s²), everything is known in closed form: x_t is distributed
as N(√ᾱ_t m, ᾱ_t s² + 1 − ᾱ_t), and jointly Gaussian with ε, with covariance √(1−ᾱ_t). The network that minimises Eq. 14
is the conditional mean, because a conditional mean minimises a squared error:

    E[ε|x_t] = √(1−ᾱ_t) (x_t − √ᾱ_t m) / (ᾱ_t s² + 1 − ᾱ_t).

With this network each step of a sampler is an affine map of (x_t, z), so the mean and the variance of every x_t can be
computed without random numbers.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import urllib.error
import warnings
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
from PIL import Image, ImageSequence
from torch import nn

import ddpm

SEED = int(os.environ.get("DDPM_TEST_SEED", 0))
HERE = Path(__file__).parent

# ---- Another implementation ------------------------------------------------------------------------------------------

OTHER = os.environ.get("DDPM")  # the file to test in place of ddpm.py


class Other:
    """That file, or a diffusion of its. A name, an argument or an option that it lacks skips the test that uses it."""

    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        if not hasattr(self.wrapped, name):
            if "PYTEST_CURRENT_TEST" not in os.environ:  # pytest looks around, or a table of the second part is made
                return getattr(OURS, name)
            pytest.skip(f"{OTHER} does not define {name}")
        value = getattr(self.wrapped, name)
        if not inspect.isroutine(value) and name != "GaussianDiffusion":
            return value

        def call(*arguments, **options):
            try:
                inspect.signature(value).bind(*arguments, **options)
            except TypeError as error:
                pytest.skip(f"{OTHER} does not define this use of {name}: {error}")
            try:
                result = value(*arguments, **options)
            except (ValueError, KeyError, NotImplementedError) as error:
                if name == "GaussianDiffusion" and options:
                    pytest.skip(f"{OTHER} does not define {name} with these options: {error}")
                raise
            if name == "respace":
                return Other(result[0]), result[1]
            return Other(result) if name in ("GaussianDiffusion", "to") else result

        return call


def load(path, name):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OURS = ddpm
if OTHER:
    ddpm = Other(load(OTHER, "ddpm_under_test"))


# ---- Worlds ----------------------------------------------------------------------------------------------------------

# The paper's schedule (§4), from its definition.
T = 1000
EVERY_T = torch.arange(T)
BETAS = np.array([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)])
BARS = np.exp(np.cumsum(np.log1p(-BETAS)))  # ᾱ_t, summed as logarithms
BARS_PREV = np.append(1.0, BARS[:-1])  # ᾱ_{t−1}
BETAS_TILDE = (1 - BARS_PREV) / (1 - BARS) * BETAS  # β̃_t of Eq. 7
LOG_TILDE = np.log(np.append(BETAS_TILDE[1], BETAS_TILDE[1:]))  # β̃_0 = 0 has no logarithm: the authors take that of β̃_1


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """One thread is faster for networks as small as these, and keeps results reproducible to the bit."""
    torch.set_num_threads(1)


def seeded_by(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def single(betas=BETAS, prediction="noise", **options):
    """A diffusion with its coefficients in float32, the default. (Only those that know velocities need the option.)"""
    if prediction != "noise":
        options["prediction"] = prediction
    return ddpm.GaussianDiffusion(torch.as_tensor(betas, dtype=torch.float64), **options)


def exact(betas=BETAS, **options):
    """A diffusion with its coefficients in float64."""
    return single(betas, dtype=torch.float64, **options)


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
        bar = column(torch.as_tensor(bars, device=x_t.device)[t], x_t)
        return (x_t - bar.sqrt() * x_start) / (1 - bar).sqrt()

    return model


def pairs_of(timesteps):
    """(t, s) for each step of a sampler; the last step goes to x_0, s = −1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


# ---- 1. Noise schedules ----------------------------------------------------------------------------------------------


def test_linear_schedule_is_the_papers():
    """§4: T = 1000, β_t evenly spaced from 1e−4 to 0.02, in float64; other ends are used as given."""
    betas = ddpm.linear_beta_schedule(T)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas, BETAS, rtol=1e-12)
    np.testing.assert_allclose(ddpm.linear_beta_schedule(5, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-12)


def cosine_in_numpy(timesteps, s=0.008):
    """ᾱ_t of the cosine schedule: f(t)/f(0) in Improved DDPM Eq. 17, but for the last β, which is capped at 0.999."""
    bars = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * math.pi / 2) ** 2
    bars[-1] = bars[-2] * (1 - 0.999)
    return bars[1:] / bars[0]


@pytest.mark.parametrize("s", [(), (0.008,), (0.02,)], ids=str)
@pytest.mark.parametrize("timesteps", [1, 10, 1000, 4000])
def test_improved_ddpm_eq_17_is_the_cosine_schedule(timesteps, s):
    """ᾱ_t is that of Eq. 17 in NumPy; s = 0.008 is the default. Without the cap, which only the last β reaches, ᾱ_{T−1}
    is 0, and Eq. 15 divides by its root."""
    betas = ddpm.cosine_beta_schedule(timesteps, *s)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(np.cumprod(1 - betas.numpy()), cosine_in_numpy(timesteps, *s), rtol=1e-9)
    x = torch.ones(1, 1)
    assert single(betas).predict_x_start(x, timesteps - 1, 0 * x).isfinite().all()


def test_a_schedule_that_leaves_signal_in_x_T_warns_with_the_number():
    """The paper's ends at T = 100 leave √ᾱ_{T−1} = 0.6, here from exact fractions. The limit is 0.05; the paper's
    schedule does not warn."""
    left = math.sqrt(math.prod(1 - Fraction(float(b)) for b in np.linspace(1e-4, 0.02, 100)))
    with pytest.warns(UserWarning, match=f"{left:.3f}"):
        single(np.linspace(1e-4, 0.02, 100))
    with pytest.warns(UserWarning, match="0.051"):
        single([1 - 0.051**2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single(BETAS)
        single([1 - 0.049**2])


WRONG_BETAS = [[0.0, 0.9], [0.5, 1.0], [-0.1, 0.99], [math.nan, 0.99]]
WRONG_OPTIONS = [dict(variance="fixed"), dict(loss="mse"), dict(prediction="x_start"), dict(dtype=torch.int32)]


@pytest.mark.parametrize("options", [*(dict(betas=betas) for betas in WRONG_BETAS), *WRONG_OPTIONS], ids=str)
def test_wrong_betas_and_options_are_refused(options):
    """β_t = 0 adds no noise, so that Eq. 7 divides by 1 − ᾱ_0 = 0; β_t = 1 leaves no image."""
    wanted = "between 0 and 1" if "betas" in options else f"{[*options.values()][0]!r}"
    with pytest.raises(ValueError, match=wanted):
        single(**options)


# ---- 2. The forward process: Eq. 2 and 4 -----------------------------------------------------------------------------


def mean_and_deviation(diffusion, timesteps=T):
    """The factors of x_0 and of ε in q_sample at every t: q_sample of (1, 0) and of (0, 1)."""
    one = torch.ones(timesteps, 1, dtype=torch.float64)
    t = torch.arange(timesteps)
    of_x_start = diffusion.q_sample(one, t, 0 * one)
    of_noise = diffusion.q_sample(0 * one, t, one)
    return of_x_start.flatten().numpy(), of_noise.flatten().numpy()


def test_eq_4_is_eq_2_composed():
    """x_t = √(1−β_t) x_{t−1} + √β_t z, one step at a time: after each of the 1000 steps, the mean and the variance are
    those of q_sample."""
    m = 1.0
    v = 0.0
    steps = []
    for beta in BETAS:
        m = math.sqrt(1 - beta) * m
        v = (1 - beta) * v + beta
        steps.append((m, math.sqrt(v)))
    np.testing.assert_allclose(np.transpose(mean_and_deviation(exact())), steps, rtol=1e-11)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 3, 5, 7), (4, 6), (2, 1, 3, 3, 3)])
def test_eq_4_for_any_shape_and_an_int_for_t(shape):
    """Any number of dimensions, channels and pixels works; an int t stands for the whole batch."""
    x, noise = normal(2, *shape)
    got = exact().q_sample(x, 500, noise)
    np.testing.assert_allclose(got, math.sqrt(BARS[500]) * x + math.sqrt(1 - BARS[500]) * noise, rtol=1e-12)
    assert torch.equal(got, exact().q_sample(x, torch.full((shape[0],), 500), noise))


ROUNDED_ONCE = dict(
    sqrt_alpha_bar=(lambda q, one: q.q_sample(one, EVERY_T, 0 * one), np.sqrt(BARS)),
    sqrt_one_minus_alpha_bar=(lambda q, one: q.q_sample(0 * one, EVERY_T, one), np.sqrt(1 - BARS)),
    eq_7_of_x_0=(lambda q, one: q.q_posterior(one, 0 * one, EVERY_T)[0], np.sqrt(BARS_PREV) * BETAS / (1 - BARS)),
    eq_7_of_x_t=(
        lambda q, one: q.q_posterior(0 * one, one, EVERY_T)[0],
        np.sqrt(1 - BETAS) * (1 - BARS_PREV) / (1 - BARS),
    ),
    beta_tilde=(lambda q, one: q.q_posterior(one, one, EVERY_T)[1], BETAS_TILDE),
    log_beta_tilde=(lambda q, one: q.q_posterior(one, one, EVERY_T)[2], LOG_TILDE),
    beta=(lambda q, one: q.p_mean_variance(predicts_zero, one, EVERY_T)[1], BETAS),
    log_beta=(lambda q, one: q.p_mean_variance(predicts_zero, one, EVERY_T)[2], np.log(BETAS)),
)


@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_coefficients_are_computed_in_float64(name):
    """Each coefficient is its float64 value rounded once to float32, which is at most 6e−8 of the value. Accumulated in
    float32, ᾱ_t would be off by up to 2.7e−7."""
    use, want = ROUNDED_ONCE[name]
    got = use(single(variance="fixed_large"), torch.ones(T, 1))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.flatten().double(), want, rtol=6.1e-8)


def test_coefficients_are_not_in_the_state_dict():
    """Neither a checkpoint nor an EMA can hold an old schedule or average one."""
    diffusion = single()
    assert not diffusion.state_dict()
    assert not list(diffusion.parameters())


def test_images_of_integers_are_refused():
    """An 8-bit image would be rounded to 0 and 1 in silence: ValueError, whatever ε is."""
    x = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floats scaled to \[-1, 1\], got torch.uint8"):
        exact().q_sample(x, 5, normal(2, 1, 4, 4))


@pytest.mark.parametrize("t", [-1, T, torch.tensor([3, -1]), torch.tensor([3, T])], ids=str)
def test_t_out_of_range_is_refused(t):
    """t = −1 would be read from the end of the coefficients: an error instead."""
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        exact().q_sample(normal(2, 1), t)


# ---- 3. The posterior: Eq. 6 and 7 -----------------------------------------------------------------------------------


@functools.cache
def bayes_rule(t, x_0, x_t):
    """Mean and variance of q(x_{t−1}|x_t, x_0) ∝ q(x_t|x_{t−1}) q(x_{t−1}|x_0), by numerical integration."""
    prior = scipy.stats.norm(math.sqrt(BARS[t - 1]) * x_0, math.sqrt(1 - BARS[t - 1]))
    x = prior.mean() + prior.std() * np.linspace(-12, 12, 200_001)  # x_{t−1}
    step = scipy.stats.norm(np.sqrt(1 - BETAS[t]) * x, math.sqrt(BETAS[t]))
    log_density = step.logpdf(x_t) + prior.logpdf(x)
    density = np.exp(log_density - log_density.max())
    mass = scipy.integrate.trapezoid(density, x)
    mean = scipy.integrate.trapezoid(density * x, x) / mass
    return mean, scipy.integrate.trapezoid(density * (x - mean) ** 2, x) / mass


@pytest.mark.parametrize("t", [1, 2, 10, 200, 500, 998, 999])
@pytest.mark.parametrize("part", ["mean", "variance", "log_variance"])
def test_eq_7_posterior_is_bayes_rule(part, t):
    """Eq. 6, 7 against Bayes' rule, normalised by numerical integration, for x_0 = −0.3 and an ε of 1.5."""
    x_t = math.sqrt(BARS[t]) * -0.3 + 1.5 * math.sqrt(1 - BARS[t])
    mean, variance = bayes_rule(t, -0.3, x_t)
    want = dict(mean=mean, variance=variance, log_variance=math.log(variance))
    one = torch.ones(1, 1, dtype=torch.float64)
    got = exact().q_posterior(-0.3 * one, x_t * one, t)[list(want).index(part)]
    assert got.item() == pytest.approx(want[part], rel=1e-7)


def test_the_log_variance_of_a_single_timestep():
    """log β̃_0 = −∞ is replaced by log β̃_1, as the test of the coefficients shows, and with T = 1 by log β_0."""
    _, _, log_variance = exact([0.999]).q_posterior(normal(2, 1), normal(2, 1), 0)
    np.testing.assert_allclose(log_variance.exp(), 0.999, rtol=1e-12)


# ---- 4. The training loss: Eq. 8 to 10, 12 and 14 --------------------------------------------------------------------


def test_eq_14_written_out():
    """L_simple is the mean over images, channels and pixels of (ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t))², in NumPy."""
    x, noise = normal(2, 5, 2, 3, 3)
    t = torch.tensor([0, 3, 500, 998, 999])
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()
    want = ((noise.numpy() - np.sin(x_t) * t.numpy().reshape(-1, 1, 1, 1) / 100) ** 2).mean()
    got = exact().p_losses(lambda x_t, t: torch.sin(x_t) * t.reshape(-1, 1, 1, 1) / 100, x, t, noise)
    assert got.item() == pytest.approx(want, rel=1e-10)
    assert exact().p_losses(lambda x_t, t: noise, x, t, noise) == 0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_eq_8_9_10_and_12_are_the_same_loss(variance):
    """Eq. 8, ‖μ̃ − μ_θ‖²/2σ², has μ̃ and μ_θ from the code and is what p_losses returns with loss="bound", times T and
    in bits. Eq. 9 and 10 put x_t(x_0, ε) into μ̃; in Eq. 12, β²/(2σ²α(1−ᾱ)) ‖ε − ε_θ‖², μ_θ of Eq. 11 is put in too. The
    three are written out here. All agree at every t > 0, for a model that answers anything. With σ_t² = β̃_t the two
    variances agree and Eq. 8's constant C is 0; with β_t it is the KL of the variances alone."""
    diffusion = exact(variance=variance, loss="bound")
    x, noise, guess = normal(3, T, 2)
    beta, bar, bar_prev, tilde = (torch.as_tensor(k)[:, None] for k in (BETAS, BARS, BARS_PREV, BETAS_TILDE))
    sigma2 = tilde if variance == "fixed_small" else beta
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * noise

    mu_tilde, _, _ = diffusion.q_posterior(x, x_t, EVERY_T)
    mu, _, _, _ = diffusion.p_mean_variance(lambda x_t, t: guess, x_t, EVERY_T, clip_denoised=False)
    eq_8 = (mu_tilde - mu).square() / (2 * sigma2)

    mu_written = (x_t - beta / (1 - bar).sqrt() * guess) / (1 - beta).sqrt()  # Eq. 11
    x_0 = (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()
    mu_tilde_of_x_0 = bar_prev.sqrt() * beta / (1 - bar) * x_0 + (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar) * x_t
    eq_9 = (mu_tilde_of_x_0 - mu_written).square() / (2 * sigma2)
    eq_10 = ((x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt() - mu_written).square() / (2 * sigma2)
    eq_12 = beta**2 / (2 * sigma2 * (1 - beta) * (1 - bar)) * (noise - guess).square()
    for each in (eq_9, eq_10, eq_12):
        np.testing.assert_allclose(eq_8[1:], each[1:], rtol=1e-6, atol=1e-12)

    c = 0.5 * ((sigma2 / tilde).log() - 1 + tilde / sigma2)
    loss = diffusion.p_losses(lambda x_t, t: guess[1:], x[1:], EVERY_T[1:], noise[1:])
    assert loss.item() == pytest.approx(T * (eq_12 + c)[1:].mean().item() / math.log(2), rel=1e-8)


def bound_in_numpy(x, noise, t, predicted_noise, v):
    """The terms of Eq. 5 at t in bits/dim, one an element: the KL of q(x_{t−1}|x_t, x_0) to N(μ_θ, σ_t²), and at t = 0
    −log₂ of the mass that Eq. 13 puts on the pixel. log σ_t² = v log β_t + (1−v) log β̃_t (Improved DDPM Eq. 15)."""
    t = np.asarray(t)
    coefficients = (BETAS, BARS, BARS_PREV, np.exp(LOG_TILDE))
    beta, bar, bar_prev, tilde = (k[t].reshape(-1, *[1] * (x.ndim - 1)) for k in coefficients)
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
    at t = 0 the mass is well above float64's smallest number. Arrays of NumPy."""
    pixels = torch.randint(0, 256, (6, 2, 3, 3))
    pixels[:, 0, 0, :2] = torch.tensor([0, 255])
    noise = normal(6, 2, 3, 3).clamp(-2, 2)
    return (pixels.double() / 127.5 - 1).numpy(), noise.numpy(), np.array([0, 0, 1, 7, 400, 999])


def as_velocity(model):
    """The model whose output for a model's ε is √ᾱ_t ε − √(1−ᾱ_t) x̂_0, with x̂_0 by Eq. 15 (Salimans, Ho, 2022, §4); a
    v stays as it is."""

    def velocity(x_t, t, *labels):
        output = model(x_t, t, *labels)
        noise = output[:, : x_t.shape[1]]
        bar = column(BARS[t], x_t)
        x_start = (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()
        prediction = bar.sqrt() * noise - (1 - bar).sqrt() * x_start
        return torch.cat([prediction, output[:, x_t.shape[1] :]], dim=1)

    velocity.num_classes = 3
    return velocity


SPOKEN = dict(noise=lambda model: model, velocity=as_velocity)
PREDICTIONS = pytest.mark.parametrize("prediction", SPOKEN)


@PREDICTIONS
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
@pytest.mark.parametrize("images", [slice(None), slice(2)], ids=["all", "L_0"])
def test_eq_5_as_a_loss_is_T_times_its_mean_term(images, variance, prediction):
    """For a t drawn uniformly: T times the mean of L_{t−1}, and of L_0 where t = 0, in bits/dim, written out in NumPy
    and scipy, for ε and for the velocity that stands for it. The prediction is far off, so that x̂_0 lies outside of
    [−1, 1] and is not clamped."""
    x, noise, t = (each[images] for each in pixels_and_noise())
    guess = np.where((t == 0).reshape(-1, 1, 1, 1), 0.5, -9) * noise
    v = dict(fixed_large=1.0, fixed_small=0.0, learned_range=torch.rand(x.shape).double())[variance]
    output = torch.as_tensor(guess)
    if variance == "learned_range":
        output = torch.cat([output, v], dim=1)
    diffusion = exact(variance=variance, loss="bound", prediction=prediction)
    loss = diffusion.p_losses(SPOKEN[prediction](lambda x_t, t: output), *map(torch.as_tensor, (x, t, noise)))
    want = T * bound_in_numpy(x, noise, t, guess, np.asarray(v)).mean()
    assert loss.item() == pytest.approx(want, rel=1e-7)


def hybrid(prediction):
    """L_hybrid for a fixed ε_θ, or the velocity that stands for it, and random v: everything that the tests below need,
    in NumPy. target is what L_simple compares with the output: ε, or √ᾱ_t ε − √(1−ᾱ_t) x_0."""
    x, noise, t = pixels_and_noise()
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = torch.as_tensor(np.sqrt(bar) * x + np.sqrt(1 - bar) * noise)
    output = SPOKEN[prediction](lambda x_t, t: torch.as_tensor(0.5 * noise))(x_t, t).clone().requires_grad_()
    v = torch.rand(x.shape).double().requires_grad_()
    model = lambda x_t, t: torch.cat([output, v], dim=1)
    diffusion = exact(variance="learned_range", prediction=prediction)
    loss = diffusion.p_losses(model, *map(torch.as_tensor, (x, t, noise)))
    loss.backward()
    return types.SimpleNamespace(
        loss=loss.item(),
        terms=functools.partial(bound_in_numpy, x, noise, t, 0.5 * noise),
        target=noise if prediction == "noise" else np.sqrt(bar) * noise - np.sqrt(1 - bar) * x,
        output=output.detach().numpy(),
        output_gradient=output.grad.numpy(),
        v=v.detach().numpy(),
        v_gradient=v.grad.numpy(),
    )


@PREDICTIONS
def test_the_hybrid_loss_written_out(prediction):
    """L_hybrid = L_simple + 0.001 L_vlb (Improved DDPM Eq. 16), t = 0 included, in NumPy. L_simple of a velocity is the
    squared error of the velocity."""
    h = hybrid(prediction)
    want = ((h.target - h.output) ** 2).mean() + 0.001 * T * h.terms(h.v).mean()
    assert h.loss == pytest.approx(want, rel=1e-8)


@PREDICTIONS
def test_the_bound_of_the_hybrid_loss_does_not_train_the_prediction(prediction):
    """Improved DDPM §3.1: the gradient of the prediction, ε_θ or a velocity, is that of L_simple, in closed form."""
    h = hybrid(prediction)
    np.testing.assert_allclose(h.output_gradient, 2 * (h.output - h.target) / h.v.size, rtol=1e-9, atol=1e-14)


@PREDICTIONS
def test_the_bound_of_the_hybrid_loss_trains_the_variance(prediction):
    """The gradient of v is that of 0.001 L_vlb, by central differences of the bound in NumPy."""
    h = hybrid(prediction)
    slope = (h.terms(h.v + 1e-5) - h.terms(h.v - 1e-5)) / 2e-5  # each term depends on its own v alone
    np.testing.assert_allclose(h.v_gradient, 0.001 * T * slope / h.v.size, rtol=1e-4, atol=1e-9 * T)
    assert (h.v_gradient != 0).all()


# ---- Velocities (Salimans, Ho, 2022, §4) -----------------------------------------------------------------------------


def respaced(diffusion, model, x_T):
    """x_0 of Algorithm 2 in 7 steps."""
    short, short_model = diffusion.respace(model, 7)
    return short.p_sample_loop(short_model, x_T.shape, noise=x_T, generator=seeded_by(3))


FIRST_AND_LAST = torch.tensor([0, 999])
USES = dict(
    mean=lambda q, model, x: q.p_mean_variance(model, x, FIRST_AND_LAST, clip_denoised=False)[0],
    variance=lambda q, model, x: q.p_mean_variance(model, x, FIRST_AND_LAST)[1],
    step=lambda q, model, x: q.p_sample(model, x, FIRST_AND_LAST, noise=x),
    ancestral=lambda q, model, x: list(q.p_sample_steps(model, x, 20, generator=seeded_by(3)))[-1],
    ddim=lambda q, model, x: q.ddim_sample_loop(model, x.shape, 7, 0.5, noise=x, generator=seeded_by(3)),
    dpm_solver=lambda q, model, x: q.dpm_solver_sample_loop(model, x.shape, 7, noise=x),
    encode=lambda q, model, x: q.ddim_encode_loop(model, x, 7),
    score=lambda q, model, x: q.score(model, x, FIRST_AND_LAST),
    respace=respaced,
    interpolate=lambda q, model, x: q.interpolate(model, x, -x, 20, 0.3, noise=x, generator=seeded_by(3)),
    bits=lambda q, model, x: q.bits_per_dim(model, x.clamp(-1, 1), generator=seeded_by(3))["total"],
    guidance=lambda q, model, x: q.dpm_solver_sample_loop(
        ddpm.classifier_free_guidance(model, torch.tensor([0, 2]), 1.5), x.shape, 7, noise=x
    ),
)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_velocity_and_the_noise_it_stands_for_give_the_same(use, variance):
    """The same function, once as ε_θ and once as the velocity, in everything that calls a model, with a fixed and with
    a learned variance, to rounding (float64)."""

    def model(x_t, t, y=None):
        shift = column(t / T if y is None else y, x_t)
        noise = torch.tanh(2 * x_t + shift)
        return noise if variance == "fixed_large" else torch.cat([noise, torch.sigmoid(x_t)], dim=1)

    model.num_classes = 3
    x = normal(2, 1, 4, 4)
    of_noise = use(exact(variance=variance), model, x)
    of_velocity = use(exact(variance=variance, prediction="velocity"), as_velocity(model), x)
    np.testing.assert_allclose(of_velocity, of_noise, rtol=1e-7, atol=1e-7)


COSINE_BARS = cosine_in_numpy(T)
COSINE = 1 - COSINE_BARS / np.append(1.0, COSINE_BARS[:-1])


@pytest.mark.parametrize("part", ["x_start", "noise"])
def test_an_exact_velocity_is_right_in_float32_at_every_t(part):
    """For the cosine schedule, whose √ᾱ_{T−1} is 5e−5, x̂_0 and ε of an exact velocity are right to 2e−6 at every t,
    T−1 included, where x̂_0 through ε and Eq. 15 is off by 2.5e−3."""
    x_start, noise = torch.randn(2, T, 8).double().clamp(-1, 1).numpy()
    bar = COSINE_BARS[:, None]
    x_t = torch.as_tensor(np.sqrt(bar) * x_start + np.sqrt(1 - bar) * noise).float()
    velocity = torch.as_tensor(np.sqrt(bar) * noise - np.sqrt(1 - bar) * x_start).float()
    diffusion = single(COSINE, prediction="velocity")
    model = lambda x_t, t: velocity
    if part == "x_start":
        _, _, _, got = diffusion.p_mean_variance(model, x_t, EVERY_T, clip_denoised=False)
        np.testing.assert_allclose(got.double(), x_start, rtol=0, atol=2e-6)
    else:
        got = diffusion.score(model, x_t, EVERY_T).double().numpy() * -np.sqrt(1 - bar)
        np.testing.assert_allclose(got, noise, rtol=0, atol=2e-6)


def test_the_loss_of_a_velocity_written_out():
    """L_simple of a velocity is the mean of (√ᾱ_t ε − √(1−ᾱ_t) x_0 − output)², in NumPy."""
    x, noise, t = pixels_and_noise()
    bar = BARS[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * noise
    want = ((np.sqrt(bar) * noise - np.sqrt(1 - bar) * x - np.sin(3 * x_t)) ** 2).mean()
    model = lambda x_t, t: torch.sin(3 * x_t)
    got = exact(prediction="velocity").p_losses(model, *map(torch.as_tensor, (x, t, noise)))
    assert got.item() == pytest.approx(want, rel=1e-9)


# ---- Numbers of 16 bits ----------------------------------------------------------------------------------------------

IN_16_BITS = dict(
    q_sample=lambda q, model, x, t: q.q_sample(x, t, x),
    q_posterior=lambda q, model, x, t: q.q_posterior(x, x, t)[0],
    mean=lambda q, model, x, t: q.p_mean_variance(model, x, t)[0],
    x_start=lambda q, model, x, t: q.p_mean_variance(model, x, t, clip_denoised=False)[3],
    p_sample=lambda q, model, x, t: q.p_sample(model, x, t, noise=x),
    p_losses=lambda q, model, x, t: q.p_losses(model, x, torch.as_tensor(t).reshape(1), x),
    score=lambda q, model, x, t: q.score(model, x, t),
)


@PREDICTIONS
@pytest.mark.parametrize("t", [300, torch.tensor([300])], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("use", IN_16_BITS.values(), ids=IN_16_BITS)
def test_x_t_of_16_bits_stays_of_16_bits(use, dtype, t, prediction):
    """With x_t in float16 or bfloat16 every function returns that dtype, whether t is an int or a tensor, and agrees
    with float32 to a few units of the dtype's rounding, for ε and for a velocity."""
    x = torch.tensor([0.5, -0.25, 0.125, 1.0]).reshape(1, 1, 2, 2)
    diffusion = single(prediction=prediction)
    model = lambda x_t, t: x_t / 2
    got = use(diffusion, model, x.to(dtype), t)
    assert got.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), use(diffusion, model, x, t), rtol=rounding, atol=rounding)


OF_A_MODEL_IN_BFLOAT16 = dict(
    ddim=lambda q, model, x: q.ddim_sample(model, x, 500, 400, 0.5, clip_denoised=False, noise=x),
    ddim_clamped=lambda q, model, x: q.ddim_sample(model, x, 500, 400, 0.5, noise=x),
    p_sample=lambda q, model, x: q.p_sample(model, x, torch.tensor([500, 3]), clip_denoised=False, noise=x),
    p_sample_clamped=lambda q, model, x: q.p_sample(model, x, torch.tensor([500, 3]), noise=x),
    score=lambda q, model, x: q.score(model, x, 500),
    p_losses=lambda q, model, x: q.p_losses(model, x, torch.tensor([500, 3]), x),
    dpm_solver=lambda q, model, x: q.dpm_solver_sample_loop(model, x.shape, 4, noise=x),
)


@PREDICTIONS
@pytest.mark.parametrize("name", OF_A_MODEL_IN_BFLOAT16)
def test_a_model_in_bfloat16_is_used_in_the_precision_of_x(name, prediction):
    """An output in bfloat16, as autocast returns it, gives the same bits as the same numbers in float32: no coefficient
    is rounded to bfloat16."""
    diffusion = single(prediction=prediction)
    x = torch.randn(2, 1, 4, 4)
    use = OF_A_MODEL_IN_BFLOAT16[name]
    got = use(diffusion, lambda x_t, t: torch.tanh(x_t).bfloat16(), x)
    assert got.dtype == torch.float32
    assert torch.equal(got, use(diffusion, lambda x_t, t: torch.tanh(x_t).bfloat16().float(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_eq_4_in_16_bits_at_every_t(dtype):
    """The factors of x_0 and ε are rounded, not ᾱ_t: in bfloat16, 1 − ᾱ_t of a rounded ᾱ_t is 0 for every t < 10."""
    one = torch.ones(T, 1, dtype=dtype)
    rounding = torch.finfo(dtype).eps
    of_noise = single().q_sample(0 * one, EVERY_T, one)
    np.testing.assert_allclose(of_noise.flatten().double(), np.sqrt(1 - BARS), rtol=rounding)
    of_x_start = single().q_sample(one, EVERY_T, 0 * one)
    np.testing.assert_allclose(of_x_start.flatten().double(), np.sqrt(BARS), rtol=rounding)


# ---- 5. The reverse process: Eq. 11, 15 and Algorithm 2 --------------------------------------------------------------


def test_eq_15_inverts_eq_4():
    """x̂_0 from the ε that was added is x_0, at every t, with x_t by Eq. 4 in NumPy."""
    x, noise = normal(2, T, 2)
    x_t = column(np.sqrt(BARS), x) * x + column(np.sqrt(1 - BARS), x) * noise
    np.testing.assert_allclose(exact().predict_x_start(x_t, EVERY_T, noise), x, atol=1e-10)


def test_eq_11_both_forms_agree_without_the_clamp():
    """At every t, μ̃_t(x_t, x̂_0), which the code computes, is Algorithm 2's (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t."""
    x_t, noise = normal(2, T, 3)
    mean, _, _, _ = exact().p_mean_variance(lambda x_t, t: noise, x_t, EVERY_T, clip_denoised=False)
    bar = BARS[:, None]
    want = (x_t.numpy() - BETAS[:, None] / np.sqrt(1 - bar) * noise.numpy()) / np.sqrt(1 - BETAS[:, None])
    np.testing.assert_allclose(mean, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["p_mean_variance", "p_sample"])
@pytest.mark.parametrize("clip", [None, True, False])
def test_x_start_is_clamped_unless_told_otherwise(clip, method, sign):
    """A model that answers ε = 0 to x_t = ±2 at t = 700 claims x̂_0 = ±2/√ᾱ_t. With the clamp, which is the default, Eq.
    7 is given ±1 instead, as in the authors' code."""
    x_t = torch.full((1, 1, 1, 1), 2.0 * sign, dtype=torch.float64)
    options = {} if clip is None else dict(clip_denoised=clip)
    if method == "p_sample":
        mean = exact().p_sample(predicts_zero, x_t, 700, noise=0 * x_t, **options)
    else:
        mean = exact().p_mean_variance(predicts_zero, x_t, 700, **options)[0]
    of_x_start = math.sqrt(BARS[699]) * BETAS[700] / (1 - BARS[700])
    of_x_t = math.sqrt(1 - BETAS[700]) * (1 - BARS[699]) / (1 - BARS[700])
    pred_x_start = 2 / math.sqrt(BARS[700]) if clip is False else 1.0
    assert mean.item() == pytest.approx(sign * (of_x_start * pred_x_start + 2 * of_x_t), rel=1e-9)


SIGMAS = dict(  # σ_t² of each variance; a learned one for v = 0.3
    fixed_large=BETAS, fixed_small=BETAS_TILDE, learned_range=np.exp(0.3 * np.log(BETAS) + 0.7 * LOG_TILDE)
)
EACH_VARIANCE = pytest.mark.parametrize("variance", SIGMAS)


def with_v(variance, model):
    """The model, with v = 0.3 beside its ε if the variance is learned."""
    if variance != "learned_range":
        return model
    return lambda x_t, t: torch.cat([model(x_t, t), torch.full_like(x_t, 0.3)], 1)


@EACH_VARIANCE
@pytest.mark.parametrize("part", ["variance", "log_variance"])
def test_the_three_variances(part, variance):
    """§3.2: β_t or β̃_t. Improved DDPM Eq. 15: exp(v log β_t + (1−v) log β̃_t), here for v = 0.3. In the logarithms β̃_0 =
    0 is replaced by β̃_1."""
    model = with_v(variance, predicts_zero)
    _, got, got_log, _ = exact(variance=variance).p_mean_variance(model, normal(T, 2), EVERY_T)
    want = SIGMAS[variance]
    if part == "log_variance":
        got = got_log
        want = LOG_TILDE if variance == "fixed_small" else np.log(want)
    np.testing.assert_allclose(got.expand(T, 2), want[:, None].repeat(2, 1), rtol=1e-9)


def test_fixed_large_is_the_default():
    """§3.2: the paper's experiments have σ_t² = β_t."""
    _, variance, _, _ = exact().p_mean_variance(predicts_zero, normal(T, 1), EVERY_T)
    np.testing.assert_allclose(variance.flatten(), BETAS, rtol=1e-9)


@EACH_VARIANCE
def test_algorithm_2_adds_noise_except_at_t_0(variance):
    """x_0 does not depend on z, and x_{t−1} contains σ_t of it elsewhere, for a batch of different t."""
    x = normal(3, 1)
    ones = torch.ones_like(x)
    t = torch.tensor([0, 1, 999])
    step = functools.partial(exact(variance=variance).p_sample, with_v(variance, predicts_zero), x, t)
    want = [0, math.sqrt(SIGMAS[variance][1]), math.sqrt(SIGMAS[variance][999])]
    np.testing.assert_allclose((step(noise=ones) - step(noise=0 * ones)).flatten(), want, rtol=1e-9)


@EACH_VARIANCE
def test_algorithm_2_in_numpy(variance):
    """Algorithm 2 transcribed from the paper, all 1000 steps, on the same noise and with the same nonlinear model."""
    generator = seeded_by(SEED + 1)
    noise = [torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64).numpy() for _ in range(T)]
    x = noise[0]
    for t in range(T - 1, -1, -1):
        z = noise[T - t] if t > 0 else 0
        mean = (x - BETAS[t] / math.sqrt(1 - BARS[t]) * np.tanh(x + t / T)) / math.sqrt(1 - BETAS[t])
        x = mean + math.sqrt(SIGMAS[variance][t]) * z
    model = with_v(variance, lambda x_t, t: torch.tanh(x_t + column(t / T, x_t)))
    loop = exact(variance=variance).p_sample_loop
    got = loop(model, (2, 1, 2, 2), clip_denoised=False, generator=seeded_by(SEED + 1))
    np.testing.assert_allclose(got, x, rtol=1e-7, atol=1e-9)


def affine_chain(step, pairs):
    """Follow N(0, 1) from x_T to x_0 through steps that are affine in (x_t, z): the slope, the offset and the weight
    of z are read off at (x_t, z) = (0, 0), (1, 0) and (0, 1). Yields (s, mean, variance, product of slopes) after each
    step from t to s."""
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    mean = 0.0
    variance = 1.0
    product = 1.0
    for t, s in pairs:
        offset, at_one, at_noise = step(x, t, s, z).flatten().tolist()
        slope = at_one - offset
        mean = slope * mean + offset
        variance = slope**2 * variance + (at_noise - offset) ** 2
        product *= slope
        yield s, mean, variance, product


EVERY_STEP = [(t, t - 1) for t in reversed(range(T))]


def ancestral(diffusion, model):
    """A step of Algorithm 2 for affine_chain."""
    return lambda x, t, s, z: diffusion.p_sample(model, x, t, clip_denoised=False, noise=z)


def test_fixed_large_is_exact_for_standard_normal_data():
    """§3.2: with σ_t² = β_t and x_0 ~ N(0, 1), every x_t of the reverse chain is N(0, 1): the optimal ε_θ is √(1−ᾱ_t)
    x_t, so μ_θ = √α_t x_t, and the variance stays α_t + β_t = 1. Only the last step, which adds no noise, leaves α_0 =
    0.9999 of it."""
    step = ancestral(exact(variance="fixed_large"), optimal(0.0, 1.0))
    for s, mean, variance, _ in affine_chain(step, EVERY_STEP):
        assert mean == pytest.approx(0, abs=1e-12)
        assert variance == pytest.approx(1 if s >= 0 else 1 - BETAS[0], abs=1e-12)


def test_fixed_small_is_exact_for_a_single_point():
    """§3.2: with σ_t² = β̃_t and a single image m as data, p_θ(x_{t−1}|x_t) = q(x_{t−1}|x_t, x_0 = m). Started from
    q(x_{T−1}|x_0) the chain would have q's marginals. N(0, 1) differs from it by −√ᾱ_{T−1} m in the mean and by
    ᾱ_{T−1} in the variance; affine steps multiply these by P and P², P being the product of the slopes so far. So x_s
    has mean (√ᾱ_s − P√ᾱ_{T−1}) m and variance 1 − ᾱ_s + P²ᾱ_{T−1}, and x_0 is m."""
    step = ancestral(exact(variance="fixed_small"), optimal(0.7, 0.0))
    for s, mean, variance, product in affine_chain(step, EVERY_STEP):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx((math.sqrt(bar) - product * math.sqrt(BARS[-1])) * 0.7, abs=1e-12)
        assert variance == pytest.approx(1 - bar + product**2 * BARS[-1], abs=1e-12)
    assert (mean, variance) == pytest.approx((0.7, 0.0), abs=1e-12)


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.1)])
@pytest.mark.parametrize("variance, sign", [("fixed_large", 1), ("fixed_small", -1)])
def test_the_error_of_a_fixed_variance_in_between(m, s, variance, sign):
    """For x_0 ~ N(m, s²) with 0 < s < 1, p(x_{t−1}|x_t) has the variance β_t (1 − β_t/v_t)/α_t with v_t = ᾱ_t s² + 1 −
    ᾱ_t, by Bayes' rule, which lies between β̃_t and β_t. So x_0 is too wide with fixed_large and too narrow with
    fixed_small, by less than 0.005 after all 1000 steps; its mean is right to 0.001."""
    true_variance = BETAS * (1 - BETAS / (BARS * s**2 + 1 - BARS)) / (1 - BETAS)
    before = BARS_PREV * s**2 + 1 - BARS_PREV  # Var(x_{t−1})
    np.testing.assert_allclose(true_variance, 1 / (1 / before + (1 - BETAS) / BETAS), rtol=1e-9)  # precisions add up
    assert (BETAS_TILDE < true_variance).all()
    assert (true_variance < BETAS).all()
    *_, (_, mean, var, _) = affine_chain(ancestral(exact(variance=variance), optimal(m, s)), EVERY_STEP)
    assert mean == pytest.approx(m, abs=1e-3)
    assert 0 < (math.sqrt(var) - s) * sign < 0.005


# A mixture ¼ N(−0.6, 0.1²) + ¾ N(0.5, 0.2²) as data: not Gaussian, and still known in closed form.
WEIGHTS = np.array([0.25, 0.75])
MEANS = np.array([-0.6, 0.5])
DEVIATIONS = np.array([0.1, 0.2])


def mixture_cdf(x):
    return (WEIGHTS * scipy.stats.norm.cdf(np.asarray(x)[..., None], MEANS, DEVIATIONS)).sum(-1)


def mixture_components(x_t, t):
    """log of weight times density of each component of q(x_t), their means and variances, and ᾱ_t."""
    bar = column(BARS[t], x_t)[..., None]
    mean = bar.sqrt() * torch.as_tensor(MEANS)
    variance = bar * torch.as_tensor(DEVIATIONS) ** 2 + 1 - bar
    log = -0.5 * (variance.log() + math.log(2 * math.pi) + (x_t[..., None] - mean) ** 2 / variance)
    return torch.as_tensor(WEIGHTS).log() + log, mean, variance, bar


def mixture_model(x_t, t):
    """E[ε|x_t]: that of each component, weighted by the component's probability given x_t."""
    log, mean, variance, bar = mixture_components(x_t, t)
    return (torch.softmax(log, -1) * (1 - bar).sqrt() * (x_t[..., None] - mean) / variance).sum(-1)


def test_algorithm_2_turns_noise_into_the_data():
    """4,000 pixels through Algorithm 2 with E[ε|x_t] of the mixture, against the mixture's distribution function by
    Kolmogorov and Smirnov: false-alarm rate 1e−6, with 0.005 allowed for the error of σ_t² = β_t (0.003 in a simulation
    of 150,000 pixels). The limit is a distance of 0.0475."""
    x_0 = exact(variance="fixed_large").p_sample_loop(mixture_model, (4000, 1), clip_denoised=False)
    distance = scipy.stats.kstest(x_0.flatten().numpy(), mixture_cdf).statistic
    assert distance < scipy.stats.kstwo.isf(1e-6, 4000) + 0.005


# ---- 6. Fewer steps: DDIM, respacing and DPM-Solver++ ----------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("steps", [0, T + 1])
def test_the_number_of_steps_lies_in_1_to_T(sampler, steps):
    """ValueError with the number."""
    with pytest.raises(ValueError, match=f"got {steps}"):
        getattr(exact(), f"{sampler}_timesteps")(steps)


def test_ddim_timesteps_are_trailing():
    """S of the T timesteps for every S from 1 to T: T−1 first (Lin et al., 2023), then falling without repetition, each
    within half a timestep of even spacing; for S = T every timestep."""
    diffusion = exact()
    for steps in range(1, T + 1):
        t = diffusion.ddim_timesteps(steps)
        assert len(t) == steps
        assert t[0] == T - 1
        assert t[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(t))
        assert all(abs(t[i] + 1 - T * (steps - i) / steps) <= 0.5 for i in range(steps))
    assert diffusion.ddim_timesteps(T) == list(range(T - 1, -1, -1))
    assert diffusion.ddim_timesteps(4) == [999, 749, 499, 249]


@pytest.mark.parametrize("t, s", [(999, 998), (999, 0), (999, -1), (500, 250), (20, 10), (20, -1), (1, 0), (0, -1)])
def test_ddim_stays_on_the_line_from_noise_to_x_0(t, s):
    """The perfect model of an image explains every x_t as √ᾱ_t x_0 + √(1−ᾱ_t) ε. With η = 0 a DDIM step from t to s
    gives √ᾱ_s x_0 + √(1−ᾱ_s) ε, for short steps and long ones; s = −1 is x_0 itself, with ᾱ = 1."""
    x_0 = torch.tensor([[0.3]], dtype=torch.float64)
    noise = torch.tensor([[-1.2]], dtype=torch.float64)
    bar = BARS[s] if s >= 0 else 1.0
    x_t = math.sqrt(BARS[t]) * x_0 + math.sqrt(1 - BARS[t]) * noise
    got = exact().ddim_sample(knows(x_0), x_t, t, s)
    np.testing.assert_allclose(got, math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eq_12_and_16_written_out(eta):
    """Each step of a 37-step run against the two equations in NumPy, for a model that is neither right nor linear."""
    model = lambda x_t, t: torch.tanh(x_t)
    for t, s in pairs_of([round(T * i / 37) - 1 for i in range(37, 0, -1)]):
        x_t, z = normal(2, 2, 1, 2, 2)
        bar_t = BARS[t]
        bar_s = BARS[s] if s >= 0 else 1.0
        eps = np.tanh(x_t.numpy())
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        x_0 = (x_t.numpy() - math.sqrt(1 - bar_t) * eps) / math.sqrt(bar_t)
        want = math.sqrt(bar_s) * x_0 + math.sqrt(max(0, 1 - bar_s - sigma**2)) * eps + sigma * z.numpy()
        got = exact().ddim_sample(model, x_t, t, s, eta=eta, clip_denoised=False, noise=z)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t, s, eta", [(1, 0, 0.0), (1, 0, 1.0), (2, 0, 0.5), (3, 1, 1.0), (500, 0, 0.0)])
def test_ddim_coefficients_are_float64_for_a_float32_diffusion(t, s, eta):
    """1 − ᾱ_1 read back in float32 would be off by 1.7e−4 of its value, and so would σ. For the perfect model of x_0 =
    0, x_s = √((1−ᾱ_s−σ²)/(1−ᾱ_t)) x_t + σ z, in float32 to 1e−5."""
    x_t, z = torch.randn(2, 64, 1)
    model = lambda x_t, t: (x_t.double() / column(np.sqrt(1 - BARS[t]), x_t).double()).float()
    sigma = eta * math.sqrt((1 - BARS[s]) / (1 - BARS[t])) * math.sqrt(1 - BARS[t] / BARS[s])
    want = math.sqrt((1 - BARS[s] - sigma**2) / (1 - BARS[t])) * x_t.double() + sigma * z.double()
    got = single().ddim_sample(model, x_t, t, s, eta=eta, clip_denoised=False, noise=z)
    np.testing.assert_allclose(got.double(), want, rtol=1e-5, atol=3e-7)


def test_clamped_ddim_recomputes_its_noise():
    """ε_θ = 0 at x_t = 2 and t = 700 is clamped to x̂_0 = 1, and ε becomes (x_t − √ᾱ_t)/√(1−ᾱ_t), so that Eq. 4 still
    gives x_t. The clamp is the default."""
    x_t = torch.full((1, 1), 2.0, dtype=torch.float64)
    got = exact().ddim_sample(predicts_zero, x_t, 700, 300)
    eps = (2 - math.sqrt(BARS[700])) / math.sqrt(1 - BARS[700])
    assert got.item() == pytest.approx(math.sqrt(BARS[300]) + math.sqrt(1 - BARS[300]) * eps, rel=1e-10)


@pytest.mark.parametrize("steps", [10, T])
def test_ddim_with_eta_0_is_deterministic(steps):
    """η = 0, the default: the image is a function of x_T alone, whatever the generator, also for S = T, which does not
    switch to Algorithm 2. η > 0 adds noise, however small η is."""
    x_T = normal(2, 1, 4, 4)
    model = lambda x_t, t: torch.tanh(x_t)
    loop = functools.partial(exact().ddim_sample_loop, model, x_T.shape, steps, noise=x_T)
    first = loop(eta=0.0, generator=seeded_by(1))
    assert torch.equal(first, loop(eta=0.0, generator=seeded_by(2)))
    assert torch.equal(first, loop())
    assert not torch.equal(loop(eta=0.01, generator=seeded_by(1)), loop(eta=0.01, generator=seeded_by(2)))


@pytest.mark.parametrize("steps", [1, 3, 49, 300, 600, T])
def test_ddim_lands_on_x_0_in_any_number_of_steps(steps):
    """With the perfect model of an image, whether S divides T or not."""
    x_0 = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64)
    np.testing.assert_allclose(exact().ddim_sample_loop(knows(x_0), x_0.shape, steps), x_0, atol=1e-10)


@pytest.mark.parametrize("steps", [7, 49, 61, 300, 600, T])
def test_ddim_is_affine_with_the_slope_of_its_timesteps(steps):
    """The slope of x_T → x_0 for x_0 ~ N(m, s²) is the product over S evenly spaced timesteps, however rounded (to 1%),
    of √(ᾱ_s/ᾱ_t) (1 − √(1−ᾱ_t) a_t) + √(1−ᾱ_s) a_t, where ε_θ = a_t (x_t − √ᾱ_t m) is the optimal model."""
    s = 0.1
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    x_0 = exact().ddim_sample_loop(optimal(0.3, s), x_T.shape, steps, clip_denoised=False, noise=x_T)
    a = np.sqrt(1 - BARS) / (BARS * s**2 + 1 - BARS)
    t = np.array([math.floor(T * (i + 1) / steps + 0.5) - 1 for i in range(steps)])
    before = np.append(1.0, BARS[t[:-1]])
    slopes = np.sqrt(before / BARS[t]) * (1 - np.sqrt(1 - BARS[t]) * a[t]) + np.sqrt(1 - before) * a[t]
    assert (x_0[1] - x_0[0]).item() == pytest.approx(np.prod(slopes), rel=0.01)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_over_all_steps_is_algorithm_2_with_beta_tilde(clip):
    """On the same noise, all T steps of DDIM with η = 1 and of Algorithm 2 with σ_t² = β̃_t give the same image. With
    σ_t² = β_t they do not."""
    model = lambda x_t, t: torch.tanh(x_t + column(t / T, x_t))
    shape = (2, 1, 2, 2)
    images = {}
    for variance in ("fixed_small", "fixed_large"):
        loop = exact(variance=variance).p_sample_loop
        images[variance] = loop(model, shape, clip_denoised=clip, generator=seeded_by(SEED))
    ddim = exact().ddim_sample_loop(model, shape, T, eta=1.0, clip_denoised=clip, generator=seeded_by(SEED))
    np.testing.assert_allclose(ddim, images["fixed_small"], rtol=1e-8, atol=1e-10)
    assert (ddim - images["fixed_large"]).abs().max() > 1e-4


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.1)])
def test_ddim_converges_to_the_flow_at_first_order(m, s):
    """The deterministic map that keeps standard scores, (x_0 − m)/s = (x_T − √ᾱ_{T−1} m)/√Var(x_{T−1}), is the
    probability flow, and DDIM is a first-order method for it: the error of its slope halves when S doubles (a ratio of
    2 ± 0.25 from 125 to 1000 steps). With all 1000 steps the slope is the product of those of the steps, √(ᾱ_s/ᾱ_t)
    (1 − √(1−ᾱ_t) a_t) + √(1−ᾱ_s) a_t for ε_θ = a_t (x_t − √ᾱ_t m)."""
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    flow = s / math.sqrt(BARS[-1] * s**2 + 1 - BARS[-1])
    errors = []
    for steps in (125, 250, 500, 1000):
        x_0 = exact().ddim_sample_loop(optimal(m, s), x_T.shape, steps, clip_denoised=False, noise=x_T).flatten()
        errors.append((x_0[1] - x_0[0]).item() / flow - 1)
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2, 2], abs=0.25)

    a = np.sqrt(1 - BARS) / (BARS * s**2 + 1 - BARS)
    slopes = np.sqrt(BARS_PREV / BARS) * (1 - np.sqrt(1 - BARS) * a) + np.sqrt(1 - BARS_PREV) * a
    assert (x_0[1] - x_0[0]).item() == pytest.approx(np.prod(slopes), rel=1e-8)
    assert x_0[0].item() == pytest.approx(m - flow * math.sqrt(BARS[-1]) * m, abs=0.02 * abs(m))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(eta):
    """DDIM is constructed so that for each x_0 its marginals are q(x_s|x_0). A single image m as data makes x̂_0 = x_0
    exact, so that this can be seen: started from N(0, 1), each x_s of a 23-step run has mean (√ᾱ_s − P√ᾱ_{T−1}) m and
    variance 1 − ᾱ_s + P²ᾱ_{T−1}, P being the product of the slopes."""
    diffusion = exact()
    step = lambda x, t, s, z: diffusion.ddim_sample(optimal(0.7, 0.0), x, t, s, eta=eta, clip_denoised=False, noise=z)
    for s, mean, variance, product in affine_chain(step, pairs_of(diffusion.ddim_timesteps(23))):
        bar = BARS[s] if s >= 0 else 1.0
        assert mean == pytest.approx((math.sqrt(bar) - product * math.sqrt(BARS[-1])) * 0.7, abs=1e-12)
        assert variance == pytest.approx(1 - bar + product**2 * BARS[-1], abs=1e-12)


@pytest.mark.parametrize("how", [{"eta": 1.2}, {"eta": -0.1}, {"prev_t": 5}, {"prev_t": 2000}, {"prev_t": -2}], ids=str)
def test_a_ddim_step_goes_to_an_earlier_t_with_eta_in_0_to_1(how):
    """ValueError with the number; t = −1 is x_0, and there is nothing before it."""
    with pytest.raises(ValueError, match=f"{list(how.values())[0]}"):
        exact().ddim_sample(predicts_zero, normal(2, 1), 5, **{"prev_t": 3, **how})


STEPS = pytest.mark.parametrize("steps", [1, 7, 50, 1000])


def kept_by(steps):
    """The timesteps that respacing keeps, rising, and the ᾱ before each: evenly spaced, the last T−1."""
    kept = [math.floor(T * (i + 1) / steps + 0.5) - 1 for i in range(steps)]
    return kept, np.append(1.0, BARS[kept[:-1]])


@STEPS
def test_respacing_keeps_alpha_bar(steps):
    """Algorithm 2 in S steps (Improved DDPM §4): the chain of S steps has the old ᾱ at the S timesteps kept."""
    kept, _ = kept_by(steps)
    short, _ = exact().respace(predicts_zero, steps)
    one = torch.ones(steps, 1, dtype=torch.float64)
    np.testing.assert_allclose(short.q_sample(one, torch.arange(steps), 0 * one)[:, 0] ** 2, BARS[kept], rtol=1e-9)
    np.testing.assert_allclose(short.q_sample(0 * one, torch.arange(steps), one)[:, 0] ** 2, 1 - BARS[kept], rtol=1e-9)


@STEPS
@EACH_VARIANCE
def test_respacing_keeps_the_variance(variance, steps):
    """σ_t² is β' of the jump from s to t, 1 − ᾱ_t/ᾱ_s, or β̃', that times (1−ᾱ_s)/(1−ᾱ_t), or between the two. The model
    is called with the t of the long chain, on which it was trained."""
    kept, before = kept_by(steps)
    asked = []
    model = with_v(variance, lambda x_t, t: asked.extend(t.tolist()) or 0 * x_t)
    short, short_model = exact(variance=variance).respace(model, steps)
    x_t = torch.ones(steps, 1, dtype=torch.float64)
    _, sigma2, _, _ = short.p_mean_variance(short_model, x_t, torch.arange(steps), clip_denoised=False)
    assert asked == kept
    jump = 1 - BARS[kept] / before
    tilde = jump * (1 - before) / (1 - BARS[kept])
    want = dict(fixed_large=jump, fixed_small=tilde, learned_range=jump**0.3 * tilde**0.7)[variance]
    first = 1 if variance == "learned_range" else 0  # where β̃' = 0 has no logarithm
    np.testing.assert_allclose(sigma2.flatten()[first:], want[first:], rtol=1e-9)


@EACH_VARIANCE
def test_respaced_algorithm_2_adds_no_noise_at_its_last_step(variance):
    """x_0 does not depend on z (Algorithm 2), although the model sees t = 19 at the last of 50 steps."""
    short, model = exact(variance=variance).respace(with_v(variance, predicts_zero), 50)
    x = normal(2, 1)
    step = functools.partial(short.p_sample, model, x, 0, clip_denoised=False)
    np.testing.assert_allclose(step(noise=torch.ones_like(x)), step(noise=torch.zeros_like(x)), atol=1e-9)


def test_respacing_a_float32_diffusion_is_accurate():
    """β'_0 = 1 − ᾱ_0 from ᾱ in float32 would be off by 6e−4 of itself: 2e−7 here, for S = T, where β' is β."""
    short, short_model = single(variance="fixed_large").respace(predicts_zero, T)
    _, variance, _, _ = short.p_mean_variance(short_model, torch.ones(T, 1), EVERY_T)
    assert variance.dtype == torch.float32
    np.testing.assert_allclose(variance.flatten().double(), BETAS, rtol=2e-7)


def test_respacing_keeps_the_loss():
    """The loss of all T steps, a bound, is the same before and after."""
    diffusion = exact(loss="bound")
    short, model = diffusion.respace(predicts_zero, T)
    x, noise = normal(2, 3, 1)
    t = torch.tensor([1, 500, 999])
    want = diffusion.p_losses(predicts_zero, x, t, noise).item()
    assert short.p_losses(model, x, t, noise).item() == pytest.approx(want, rel=1e-9)


def half_log_snr(bar):
    """λ = log(√ᾱ/√(1−ᾱ)); ∞ for ᾱ = 1."""
    with np.errstate(divide="ignore"):
        return 0.5 * np.log(bar) - 0.5 * np.log1p(-bar)


SCHEDULES = dict(linear=(BETAS, BARS), cosine=(COSINE, COSINE_BARS))
EITHER_SCHEDULE = pytest.mark.parametrize("betas, bars", SCHEDULES.values(), ids=SCHEDULES)


@EITHER_SCHEDULE
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 10, 50, 200, 999, T])
def test_dpm_solver_timesteps_are_the_starts_of_equal_steps(steps, betas, bars):
    """S of the T timesteps for any S from 1 to T: T−1 first, falling without repetition. Equal steps of λ from λ_{T−1},
    but at least −5.1, to λ_0: each timestep is the one whose λ is nearest to a step's start, except where the timesteps
    are sparser than the steps, so that it would be taken already, or none would be left for the rest: then it is the
    next one, or the largest that leaves one for each."""
    u = half_log_snr(bars)
    first = max(u[-1], -5.1)
    t = exact(betas).dpm_solver_timesteps(steps)
    assert len(t) == steps
    assert t[0] == T - 1
    assert all(a > b for a, b in itertools.pairwise(t))
    for i in range(1, steps):
        nearest = int(np.abs(u - (first + (u[0] - first) * i / steps)).argmin())
        assert t[i] == (t[i - 1] - 1 if nearest >= t[i - 1] else max(nearest, steps - 1 - i))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_dpm_solver_in_its_own_exponential_form(steps, clip):
    """DPM-Solver++(2M) as its authors write it, in NumPy: x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D with α = √ᾱ, σ =
    √(1−ᾱ), h = λ_s − λ_t and D = (1 + 1/(2r)) x̂_0(x_t) − 1/(2r) x̂_0(x_r), r = h_before/h (Lu et al., 2022, Algorithm
    2). D is x̂_0 at the first step and at the last, where h = ∞. Every step to 1e−9; S calls of the model, at its S
    times. Both x̂_0 and D are clamped by default; 7 steps extrapolate beyond [−1, 1]."""
    diffusion = exact()
    x_T = normal(4, 1, 4, 4)
    asked = []
    model = lambda x_t, t: asked.append(t.tolist()) or torch.sin(3 * x_t)
    options = {} if clip else dict(clip_denoised=False)
    got = list(diffusion.dpm_solver_sample_steps(model, x_T, steps, **options))
    times = diffusion.dpm_solver_timesteps(steps)
    assert asked == [[t] * 4 for t in times]
    assert len(got) == steps

    limit = 1.0 if clip else math.inf
    x = x_T.numpy()
    before = h_before = None
    outside = 0
    for i, (t, s) in enumerate(pairs_of(times)):
        bar_s = BARS[s] if s >= 0 else 1.0
        h = half_log_snr(bar_s) - half_log_snr(BARS[t])
        x_0 = np.clip((x - math.sqrt(1 - BARS[t]) * np.sin(3 * x)) / math.sqrt(BARS[t]), -limit, limit)
        D = x_0
        if 0 < i < steps - 1:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
            outside += (np.abs(D) > limit).sum()
            D = np.clip(D, -limit, limit)
        x = math.sqrt((1 - bar_s) / (1 - BARS[t])) * x - math.sqrt(bar_s) * np.expm1(-h) * D
        np.testing.assert_allclose(got[i], x, rtol=1e-9, atol=1e-9)
        before = x_0
        h_before = h
    assert outside > 0 or steps != 7 or not clip


def slopes_at_the_last_timestep(m, s, run):
    """The relative errors of the slope of x_T → x_t at the last t of 64, 128 and 256 steps, for x_0 ~ N(m, s²), the
    optimal model and T = 100,000; the flow's own slope is √(Var(x_t)/Var(x_{T−1}))."""
    betas = np.linspace(1e-6, 2e-4, 100_000)
    bars = np.exp(np.cumsum(np.log1p(-betas)))
    diffusion = exact(betas)
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    variances = bars * s**2 + 1 - bars
    errors = []
    for steps in (64, 128, 256):
        times = diffusion.dpm_solver_timesteps(steps)
        x_t = run(diffusion, optimal(m, s, bars), x_T, times)
        errors.append((x_t[1] - x_t[0]).item() / math.sqrt(variances[times[-1]] / variances[-1]) - 1)
    return errors


@pytest.mark.parametrize("m, s", [(0.3, 0.5), (-0.4, 0.1)])
def test_dpm_solver_converges_to_the_flow_at_second_order(m, s):
    """When S doubles, the error of the slope of the flow down to the last timestep falls to a quarter (4 ± 0.25 from 64
    to 256 steps); that of DDIM at the same times only to a half. This needs times that are hardly rounded, and so a
    fine process: T = 100,000. (The last step, from there to x_0, is DDIM's.)"""

    def dpm_solver(diffusion, model, x_T, times):
        return list(diffusion.dpm_solver_sample_steps(model, x_T, len(times), clip_denoised=False))[-2]

    def ddim(diffusion, model, x_T, times):
        for t, s in itertools.pairwise(times):
            x_T = diffusion.ddim_sample(model, x_T, t, s, clip_denoised=False)
        return x_T

    second = slopes_at_the_last_timestep(m, s, dpm_solver)
    assert [a / b for a, b in itertools.pairwise(second)] == pytest.approx([4, 4], abs=0.25)
    first = slopes_at_the_last_timestep(m, s, ddim)
    assert [a / b for a, b in itertools.pairwise(first)] == pytest.approx([2, 2], abs=0.05)
    assert abs(second[0]) < abs(first[0]) / 20


def missed(loop, steps, s, bars):
    """|standard deviation of x_0 − s| for x_0 ~ N(0, s²) and the optimal model."""
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    x_0 = loop(optimal(0.0, s, bars), x_T.shape, steps, clip_denoised=False, noise=x_T)
    return abs((x_0[1] - x_0[0]).item() * math.sqrt(bars[-1] * s**2 + 1 - bars[-1]) - s)


@EITHER_SCHEDULE
@pytest.mark.parametrize("s", [0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
def test_ten_steps_of_dpm_solver_are_closer_than_fifty_of_ddim(s, betas, bars):
    """50 steps miss the standard deviation by at most 0.3 grey levels, 10 by less than DDIM in 50, which misses it by
    1.4 or more, and 5 by less than four fifths of what DDIM in 5 misses."""
    ddim = exact(betas).ddim_sample_loop
    dpm_solver = exact(betas).dpm_solver_sample_loop
    assert 127.5 * missed(dpm_solver, 50, s, bars) < 0.3
    assert 127.5 * missed(ddim, 50, s, bars) > 1.4
    assert missed(dpm_solver, 10, s, bars) < missed(ddim, 50, s, bars)
    assert missed(dpm_solver, 5, s, bars) < 0.8 * missed(ddim, 5, s, bars)


# By T and S: what steps of equal λ from λ_{T−1} of the cosine schedule miss of s = 0.3, and for S ≥ 15, of all s below
FROM_THE_START = {
    100: {5: 0.122, 6: 0.0985, 8: 0.0508, 10: 0.0238, 15: 0.0140, 20: 0.0110, 50: 0.0030},
    1000: {5: 0.150, 6: 0.116, 8: 0.0425, 10: 0.0190, 15: 0.0173, 20: 0.0140, 50: 0.0028},
    4000: {5: 0.173, 6: 0.128, 8: 0.0476, 10: 0.0217, 15: 0.0190, 20: 0.0171, 50: 0.0037},
}


@pytest.mark.parametrize("timesteps, steps", [(T, S) for T, missed_by in FROM_THE_START.items() for S in missed_by])
def test_dpm_solver_does_not_waste_calls_on_noise(timesteps, steps):
    """Steps from λ = −5.1 miss a fifth less, 8 of T = 1000 nine tenths less: others spend a third of their calls below
    it. For S ≥ 15 it is the root mean square over s: the error of any single s changes its sign with S."""
    bars = cosine_in_numpy(timesteps)
    loop = exact(1 - bars / np.append(1.0, bars[:-1])).dpm_solver_sample_loop
    deviations = [0.3] if steps <= 10 else [0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0]
    errors = [missed(loop, steps, s, bars) for s in deviations]
    want = FROM_THE_START[timesteps][steps] * (0.1 if (timesteps, steps) == (1000, 8) else 0.8)
    assert math.sqrt(np.mean(np.square(errors))) < want


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_encoding_written_out(steps, clip):
    """DDIM §4.3: its step with η = 0 (Eq. 12) from each time to the next larger one, x_0 itself first, whose noise is
    read at t = 0, in NumPy. S calls of the model; the clamp is the default."""
    diffusion = exact()
    x_0 = 1.5 * normal(2, 1, 2, 2)
    asked = []
    model = lambda x_t, t: asked.append(t.tolist()) or torch.tanh(x_t + 1)
    options = {} if clip else dict(clip_denoised=False)
    got = diffusion.ddim_encode_loop(model, x_0, steps, **options)
    times = diffusion.ddim_timesteps(steps)[::-1]
    assert asked == [[t, t] for t in [0, *times[:-1]]]

    x = math.sqrt(BARS[times[0]]) * x_0.numpy() + math.sqrt(1 - BARS[times[0]]) * np.tanh(x_0.numpy() + 1)
    for t, later in itertools.pairwise(times):
        noise = np.tanh(x + 1)
        pred_x_start = (x - math.sqrt(1 - BARS[t]) * noise) / math.sqrt(BARS[t])
        if clip:
            pred_x_start = pred_x_start.clip(-1, 1)
            noise = (x - math.sqrt(BARS[t]) * pred_x_start) / math.sqrt(1 - BARS[t])
        x = math.sqrt(BARS[later]) * pred_x_start + math.sqrt(1 - BARS[later]) * noise
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-12)


FEW = np.linspace(0.05, 0.9, 10)  # the β_t of a short process
FEW_BARS = np.cumprod(1 - FEW)
CLIP = pytest.mark.parametrize("options", [{}, dict(clip_denoised=True), dict(clip_denoised=False)], ids=str)


def wild(x_t, t):
    """A model whose x̂_0 often lies outside of [−1, 1]."""
    return torch.tanh(3 * x_t + column(t / 10, x_t))


def assert_loop_is_its_steps(one_step, pairs, steps, loop):
    """steps yields what one_step does from t to s, one by one; loop returns the last and records no gradient. Both draw
    the same noise."""
    x_T = normal(1, 1, 2, 2).requires_grad_()
    generator = seeded_by(3)
    x = x_T
    taken = list(steps(x_T, seeded_by(3)))
    assert len(taken) == len(pairs)
    for (t, s), x_s in zip(pairs, taken, strict=True):
        x = one_step(x, t, s, generator)
        assert torch.equal(x, x_s)
    x_0 = loop(x_T, seeded_by(3))
    assert torch.equal(x_0, x)
    assert not x_0.requires_grad


@CLIP
def test_algorithm_2_as_a_loop_is_its_steps(options):
    """p_sample_steps yields x_{t−1}, …, x_0 of p_sample, p_sample_loop returns the last, both with the clamp that they
    are told; noise= is x_T."""
    q = exact(FEW)
    assert_loop_is_its_steps(
        lambda x, t, s, generator: q.p_sample(wild, x, t, generator=generator, **options),
        pairs_of(range(9, -1, -1)),
        lambda x_T, generator: q.p_sample_steps(wild, x_T, generator=generator, **options),
        lambda x_T, generator: q.p_sample_loop(wild, x_T.shape, noise=x_T, generator=generator, **options),
    )


@CLIP
def test_ddim_as_a_loop_is_its_steps(options):
    """The same for ddim_sample_steps and ddim_sample_loop, with η = 0.5."""
    q = exact(FEW)
    options = dict(options, eta=0.5)
    assert_loop_is_its_steps(
        lambda x, t, s, generator: q.ddim_sample(wild, x, t, s, generator=generator, **options),
        pairs_of(q.ddim_timesteps(5)),
        lambda x_T, generator: q.ddim_sample_steps(wild, x_T, 5, generator=generator, **options),
        lambda x_T, generator: q.ddim_sample_loop(wild, x_T.shape, 5, noise=x_T, generator=generator, **options),
    )


@CLIP
def test_dpm_solver_as_a_loop_is_its_steps(options):
    """dpm_solver_sample_loop returns the last of dpm_solver_sample_steps, which are written out above."""
    x_T = normal(1, 1, 2, 2).requires_grad_()
    x_0 = exact(FEW).dpm_solver_sample_loop(wild, x_T.shape, 5, noise=x_T, **options)
    assert torch.equal(x_0, list(exact(FEW).dpm_solver_sample_steps(wild, x_T, 5, **options))[-1])
    assert not x_0.requires_grad


@EITHER_SCHEDULE
@pytest.mark.parametrize("sampler", ["ddim_sample_loop", "dpm_solver_sample_loop"])
@pytest.mark.parametrize("steps", [1, 2, 999, T])
def test_samplers_are_finite_in_any_number_of_steps(betas, bars, steps, sampler):
    """In float32, where T steps are so short that λ hardly changes."""
    x_T = torch.randn(1, 1, 2, 2)
    x_0 = getattr(single(betas), sampler)(knows(0.3, bars), x_T.shape, steps, noise=x_T)
    assert x_0.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_interpolation_is_figure_8(weight):
    """Fig. 8: both images diffused to the same t with the same noise, mixed as (1−λ)x_t + λx'_t, and decoded by
    Algorithm 2 from that t. The model sees the mixture first, at t, whose noise has the level √(1−ᾱ_t) for every λ, and
    then every smaller t."""
    a, b, noise = normal(3, 1, 1, 2, 2)
    diffusion = exact(variance="fixed_small")
    seen = []
    model = lambda x_t, t: seen.append((t.item(), x_t)) or torch.tanh(x_t)
    got = diffusion.interpolate(model, a, b, 40, weight, noise=noise, generator=seeded_by(3))
    assert [t for t, _ in seen] == list(range(40, -1, -1))
    mixed = math.sqrt(BARS[40]) * ((1 - weight) * a + weight * b) + math.sqrt(1 - BARS[40]) * noise
    np.testing.assert_allclose(seen[0][1], mixed, rtol=1e-12)
    x = mixed
    generator = seeded_by(3)
    for t in range(40, -1, -1):
        x = diffusion.p_sample(model, x, t, generator=generator)
    np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-14)


# ---- 7. The bound: Eq. 3, 5 and 13 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.55, 1.0])
@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.1, 2.0])
def test_eq_13_is_a_distribution_over_256_values(mean, sigma):
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
    edges[0] = -np.inf
    edges[-1] = np.inf
    a = (edges[:-1] - mean) / sigma
    b = (edges[1:] - mean) / sigma
    normal_ = scipy.stats.norm
    mass = np.where(a > 0, normal_.sf(a) - normal_.sf(b), normal_.cdf(b) - normal_.cdf(a))
    near = mass > 1e-12
    np.testing.assert_allclose(log_p[near].exp(), mass[near], rtol=1e-9)

    # A bin that begins u > 0 standard deviations from the mean, of width w: e^(−u²/2) ∫ e^(−u y − y²/2) dy over [0, w].
    for k in np.flatnonzero(~near):
        u = min(abs(a[k]), abs(b[k]))
        y = np.linspace(0, 1, 20_001) * min(b[k] - a[k], 50 / u)  # beyond 50/u the integrand is below e^−50
        integral = scipy.integrate.simpson(np.exp(-u * y - y**2 / 2), x=y)
        want = -(u**2) / 2 + math.log(integral) - 0.5 * math.log(2 * math.pi)
        assert log_p[k].item() == pytest.approx(want, rel=1e-6)


def mean_bound(diffusion, model, x_start, t, timesteps):
    """The sum over t of the terms of Eq. 5, in nats, averaged over ε. The model is affine in x_t, so μ̃ − μ_θ is
    affine and the KL quadratic in ε: E[a + bε + cε²] = a + c, the mean over ε = ±1. p_losses with loss="bound" is T
    times the mean term in bits/dim."""
    x = torch.full((len(t), 1), x_start, dtype=torch.float64)
    both = [diffusion.p_losses(model, x, t, sign * torch.ones_like(x)).item() for sign in (1, -1)]
    return sum(both) / 2 * len(t) / timesteps * math.log(2)


def mean_L_T(diffusion, model, x_start):
    """L_T in nats."""
    x = torch.full((1, 1), x_start, dtype=torch.float64)
    return diffusion.bits_per_dim(model, x, clip_denoised=False)["L_T"].item() * math.log(2)


EITHER_VARIANCE = pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])


@EITHER_VARIANCE
@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.3, 0.5), (-0.4, 0.1)])
def test_eq_3_and_5_are_the_negative_log_likelihood_plus_a_kl(m, s, variance):
    """L = −log p_θ(x_0) + KL(q(x_{1:T}|x_0) ‖ p_θ(x_{1:T}|x_0)), which makes L a bound. With the optimal ε for N(m,
    s²), p_θ is one Gaussian over (x_0, …, x_T), so both are linear algebra; here for T = 8, in the paper's t. The
    decoder −log p_θ(x_0|x_1) is a density here and written out: Eq. 13 is about pixels."""
    steps = 8
    x_0 = 0.6
    beta = np.linspace(0.05, 0.9, steps)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    slope = np.sqrt(1 - bar) / (bar * s**2 + 1 - bar)  # ε = slope (x_t − √ᾱ m)
    a = (1 - beta / np.sqrt(1 - bar) * slope) / np.sqrt(1 - beta)
    b = beta / np.sqrt(1 - bar) * slope * np.sqrt(bar) * m / np.sqrt(1 - beta)
    sigma2 = beta if variance == "fixed_large" else (1 - before) / (1 - bar) * beta
    sigma2 = np.append(beta[0], sigma2[1:])  # β̃_1 = 0 has no density; any σ_1² would do, it cancels

    # The joint Gaussian of p_θ: (x_0, …, x_T) = mean + mixing z with independent z.
    mean = np.zeros(steps + 1)
    mixing = np.zeros((steps + 1, steps + 1))
    mixing[steps, steps] = 1
    for t in range(steps, 0, -1):
        mean[t - 1] = a[t - 1] * mean[t] + b[t - 1]
        mixing[t - 1] = a[t - 1] * mixing[t]
        mixing[t - 1, t - 1] = np.sqrt(sigma2[t - 1])
    joint = mixing @ mixing.T

    # p_θ(x_{1:T}|x_0) by conditioning; q(x_{1:T}|x_0) has means √ᾱ_t x_0 and covariances √(ᾱ_j/ᾱ_i) (1−ᾱ_i), i ≤ j.
    gain = joint[1:, 0] / joint[0, 0]
    after = joint[1:, 1:] - np.outer(gain, joint[0, 1:])
    shift = mean[1:] + gain * (x_0 - mean[0]) - np.sqrt(bar) * x_0
    i = np.minimum.outer(range(steps), range(steps))
    j = np.maximum.outer(range(steps), range(steps))
    path = np.sqrt(bar[j] / bar[i]) * (1 - bar[i])
    kl = np.trace(np.linalg.solve(after, path)) + shift @ np.linalg.solve(after, shift) - steps
    kl = 0.5 * (kl + np.linalg.slogdet(after)[1] - np.linalg.slogdet(path)[1])
    assert kl > -1e-12  # 0 if p_θ is exact
    want = kl - scipy.stats.norm(mean[0], joint[0, 0] ** 0.5).logpdf(x_0)

    diffusion = exact(beta, variance=variance, loss="bound")
    model = optimal(m, s, bar)
    got = mean_L_T(diffusion, model, x_0) + mean_bound(diffusion, model, x_0, torch.arange(1, steps), steps)
    error = (x_0 - a[0] * np.sqrt(bar[0]) * x_0 - b[0]) ** 2 + a[0] ** 2 * (1 - bar[0])
    decoder = 0.5 * np.log(2 * np.pi * sigma2[0]) + error / (2 * sigma2[0])
    assert got + decoder == pytest.approx(want, rel=1e-9)


def three_images():
    """Random 8-bit pixels, black and white among them, and the same scaled to [−1, 1]."""
    pixels = torch.randint(0, 256, (3, 2, 4, 4))
    pixels[:, 0, 0, :2] = torch.tensor([0, 255])
    return pixels.numpy(), pixels.double() / 127.5 - 1


@EITHER_VARIANCE
def test_bits_per_dim_of_a_perfect_model(variance):
    """A model that knows x_0 pays for the terms of t > 0 only what σ_t² ≠ β̃_t costs, nothing with fixed_small; L_T is
    the closed form, about 1e−5 bits/dim for random pixels, as in the paper; L_0 is −log₂ of the mass of N(x_0, σ_0²)
    on the pixel's own bin; x̂_0 is x_0."""
    pixels, x = three_images()
    bits = exact(variance=variance).bits_per_dim(knows(x), x)
    shapes = {"total": (3,), "L_T": (3,), "L_{t-1}": (3, T - 1), "L_0": (3,), "squared_error": (3, T)}
    assert {name: tuple(value.shape) for name, value in bits.items()} == shapes
    np.testing.assert_allclose(bits["total"], bits["L_T"] + bits["L_{t-1}"].sum(1) + bits["L_0"], rtol=1e-12)

    bar = BARS[-1]
    kl = 0.5 * (bar * x.numpy() ** 2 - bar - math.log1p(-bar)).mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(bits["L_T"], kl, rtol=1e-6)
    assert bits["L_T"].mean().item() == pytest.approx(1e-5, rel=0.5)
    sigma2 = SIGMAS[variance][1:]
    kl = 0.5 * (np.log(sigma2 / BETAS_TILDE[1:]) - 1 + BETAS_TILDE[1:] / sigma2) / math.log(2)
    np.testing.assert_allclose(bits["L_{t-1}"], np.broadcast_to(kl, (3, T - 1)), rtol=1e-6, atol=1e-12)
    assert bits["squared_error"].max() < 1e-20

    sigma2 = BETAS[0] if variance == "fixed_large" else BETAS_TILDE[1]  # β̃_1 in place of β̃_0 = 0
    decoder = scipy.stats.norm(0, math.sqrt(sigma2))
    mass = np.where((pixels == 0) | (pixels == 255), decoder.cdf(1 / 255), 2 * decoder.cdf(1 / 255) - 1)
    np.testing.assert_allclose(bits["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-9)


def test_bits_per_dim_of_a_model_that_is_wrong():
    """A model that takes x_0 + 0.003 for x_0: the squared error is 0.003² at every t, and L_0 is the mass of a shifted
    normal distribution. With the clamp, the default, a model that takes x_0 + 2 for x_0 is taken to mean 1."""
    pixels, x = three_images()
    diffusion = exact(variance="fixed_small")
    bits = diffusion.bits_per_dim(knows(x + 0.003), x, clip_denoised=False)
    np.testing.assert_allclose(bits["squared_error"], np.full((3, T), 0.003**2), rtol=1e-6)
    off = scipy.stats.norm(0.003, math.sqrt(BETAS_TILDE[1]))
    inside = off.cdf(1 / 255) - off.cdf(-1 / 255)
    mass = np.where(pixels == 0, off.cdf(1 / 255), np.where(pixels == 255, off.sf(-1 / 255), inside))
    np.testing.assert_allclose(bits["L_0"], -np.log2(mass).mean(axis=(1, 2, 3)), rtol=1e-6)
    clamped = diffusion.bits_per_dim(knows(x + 2), x)["squared_error"]
    np.testing.assert_allclose(clamped, ((1 - x) ** 2).mean((1, 2, 3))[:, None].expand(3, T), atol=1e-12)


@EITHER_VARIANCE
def test_bits_per_dim_is_finite(variance):
    """All terms are finite in float32 for a model that answers 0, although β̃_0 = 0 has no logarithm."""
    x = torch.randint(0, 256, (2, 1, 3, 3)) / 127.5 - 1
    bits = single(FEW, variance=variance).bits_per_dim(predicts_zero, x)
    assert all(value.isfinite().all() for value in bits.values())


# ---- 8. The score (§3.2) ---------------------------------------------------------------------------------------------


def test_the_score_is_the_gradient_of_the_log_density():
    """−E[ε|x_t]/√(1−ᾱ_t) is ∇ log q(x_t): the mixture's log density differentiated by autograd, at every t."""
    x_t = normal(T, 2).requires_grad_()
    log_density = torch.logsumexp(mixture_components(x_t, EVERY_T)[0], -1)
    (want,) = torch.autograd.grad(log_density.sum(), x_t)
    np.testing.assert_allclose(exact().score(mixture_model, x_t.detach(), EVERY_T), want, rtol=1e-8, atol=1e-10)


# ---- 9. Guidance (Ho, Salimans, 2022) --------------------------------------------------------------------------------


class Labelled:
    """A model with labels: ε depends on x, t and y; v = 3ε + 1, so that it can be told from ε. Records the labels of
    its calls."""

    num_classes = 4

    def __init__(self, learned_variance=False):
        self.learned_variance = learned_variance
        self.asked = []

    def __call__(self, x_t, t, y):
        self.asked.append(y.tolist())
        eps = torch.sin(x_t + column(y, x_t)) + column(t / T, x_t)
        return torch.cat([eps, eps * 3 + 1], 1) if self.learned_variance else eps


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_mixes_as_the_paper_says(w, learned_variance):
    """ε̃ = (1 + w) ε(x, c) − w ε(x): w = 0 is conditional sampling, w = −1 unconditional. v is that of ε(x, c). "No
    label" is a label too, which guidance leaves as it is."""
    x_t = normal(3, 2, 4, 5)
    t = torch.tensor([0, 5, 999])
    y = torch.tensor([0, 3, 1])
    no_label = torch.full((3,), 4)
    conditional = Labelled()(x_t, t, y)
    unconditional = Labelled()(x_t, t, no_label)
    want = (1 + w) * conditional - w * unconditional
    if learned_variance:
        want = torch.cat([want, conditional * 3 + 1], 1)
    torch.testing.assert_close(ddpm.classifier_free_guidance(Labelled(learned_variance), y, w)(x_t, t), want)
    torch.testing.assert_close(ddpm.classifier_free_guidance(Labelled(), no_label, w)(x_t, t), unconditional)


@pytest.mark.parametrize("w, asked", [(2.0, [1, 2, 4, 4]), (0.0, [1, 2])])
def test_guidance_calls_the_network_once_a_step(w, asked):
    """Both halves are one batch, the labelled one first; w = 0 needs no second half."""
    network = Labelled()
    guided = ddpm.classifier_free_guidance(network, torch.tensor([1, 2]), w)
    exact(FEW).ddim_sample_loop(guided, (2, 1, 2, 2), 5)
    assert network.asked == [asked] * 5


# ---- 10. Every random draw -------------------------------------------------------------------------------------------
# Each function that draws its own noise, and how the noise is recovered from what it returns or shows to the model. The
# model knows that x_0 = 0 (ε_θ = x_t/√(1−ᾱ_t), x̂_0 = 0), so that samples stay bounded.


def recorder(seen):
    """The model that knows x_0 = 0, recording the x_t that it is shown."""
    model = knows(0.0, FEW_BARS)
    return lambda x_t, t: seen.append(x_t) or model(x_t, t)


def noise_of_q_sample(diffusion, x, generator):
    return diffusion.q_sample(x, 9) / math.sqrt(1 - FEW_BARS[9])


def noise_of_p_losses(diffusion, x, generator):
    seen = []
    diffusion.p_losses(recorder(seen), x, torch.full((len(x),), 9, device=x.device))
    return seen[0] / math.sqrt(1 - FEW_BARS[9])


def noise_of_p_sample(diffusion, x, generator):
    return diffusion.p_sample(predicts_zero, x, 9, generator=generator) / math.sqrt(FEW[9])


def noise_of_ddim_sample(diffusion, x, generator):
    sigma = math.sqrt((1 - FEW_BARS[4]) / (1 - FEW_BARS[9])) * math.sqrt(1 - FEW_BARS[9] / FEW_BARS[4])
    return diffusion.ddim_sample(predicts_zero, x, 9, 4, eta=1.0, generator=generator) / sigma


def noise_of_bits_per_dim(diffusion, x, generator):
    seen = []
    diffusion.bits_per_dim(recorder(seen), x, generator=generator)
    return torch.stack([x_t / math.sqrt(1 - FEW_BARS[t]) for t, x_t in enumerate(seen)])


def noise_of_interpolate(diffusion, x, generator):
    """At λ = ½ separate noise for the two images would have the variance ½."""
    seen = []
    diffusion.interpolate(recorder(seen), x, x, 9, 0.5, generator=generator)
    return seen[0] / math.sqrt(1 - FEW_BARS[9])


def noise_of_p_sample_loop(diffusion, x, generator):
    """x_T, then z of each step but the last, by Eq. 7 with x_0 = 0."""
    seen = []
    diffusion.p_sample_loop(recorder(seen), x.shape, generator=generator)
    slopes = np.sqrt(1 - FEW[1:]) * (1 - FEW_BARS[:-1]) / (1 - FEW_BARS[1:])
    steps = zip(seen, seen[1:], slopes[::-1].tolist(), FEW[:0:-1].tolist(), strict=False)
    return torch.stack([seen[0], *[(x_s - slope * x_t) / math.sqrt(beta) for x_t, x_s, slope, beta in steps]])


def noise_of_ddim_sample_loop(diffusion, x, generator):
    """x_T, then z of each step but the last, with η = 1."""
    seen = []
    diffusion.ddim_sample_loop(recorder(seen), x.shape, 5, eta=1.0, generator=generator)
    noises = [seen[0]]
    for (x_t, x_s), (t, s) in zip(itertools.pairwise(seen), itertools.pairwise([9, 7, 5, 3, 1]), strict=True):
        sigma = math.sqrt((1 - FEW_BARS[s]) / (1 - FEW_BARS[t])) * math.sqrt(1 - FEW_BARS[t] / FEW_BARS[s])
        slope = math.sqrt((1 - FEW_BARS[s] - sigma**2) / (1 - FEW_BARS[t]))
        noises.append((x_s - slope * x_t) / sigma)
    return torch.stack(noises)


def noise_of_dpm_solver_sample_loop(diffusion, x, generator):
    seen = []
    diffusion.dpm_solver_sample_loop(recorder(seen), x.shape, 5, generator=generator)
    return seen[0]


NOISES = {name.removeprefix("noise_of_"): f for name, f in list(globals().items()) if name.startswith("noise_of_")}
DRAWS_OF_A_GENERATOR = pytest.mark.parametrize("name", [*NOISES][2:])  # q_sample and p_losses take none
DRAWS = pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@DRAWS
def test_noise_is_standard_normal_and_independent(draw, dtype):
    """ε, z and x_T are N(0, 1) by Kolmogorov and Smirnov, of x's dtype, and uncorrelated between any two images,
    channels, rows, columns and timesteps (by Fisher's transformation of each correlation). False-alarm rate 1e−7 for
    each of at most six statistics."""
    x = torch.zeros(8, 3, 8, 8, dtype=dtype)
    noise = draw(ddpm.GaussianDiffusion(torch.as_tensor(FEW), dtype=dtype, variance="fixed_large"), x, None)
    assert noise.dtype == dtype
    assert noise.shape[-4:] == x.shape
    noise = noise.double().numpy()
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-7
    for axis in range(noise.ndim):
        slices = np.moveaxis(noise, axis, 0).reshape(noise.shape[axis], -1)
        pairs = np.corrcoef(slices)[np.triu_indices(len(slices), 1)]
        z = np.arctanh(pairs.clip(-0.9999, 0.9999)) * math.sqrt(slices.shape[1] - 3)
        assert np.abs(z).max() < scipy.stats.norm.isf(0.5e-7 / len(pairs)), f"axis {axis}"


@EITHER_VARIANCE
@DRAWS
def test_noise_is_drawn_on_the_device_of_x(draw, variance):
    """torch's meta device has shapes without values: noise or coefficients on the CPU would be refused beside it."""
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert draw(single(FEW, variance=variance).to("meta"), x, None).device.type == "meta"


@DRAWS
def test_noise_comes_from_torchs_generator_by_default(draw):
    """The same seed gives the same noise, and the next call other noise."""
    diffusion = single(FEW, variance="fixed_large")
    x = torch.zeros(2, 1, 4, 4)
    first = draw(diffusion, x, None)
    assert not torch.equal(first, draw(diffusion, x, None))
    torch.manual_seed(SEED)
    assert torch.equal(first, draw(diffusion, x, None))


@DRAWS_OF_A_GENERATOR
def test_noise_comes_from_the_generator_that_is_given(name):
    """The same seed gives the same noise, another seed another, and torch's own generator is not used."""
    draw = functools.partial(NOISES[name], single(FEW, variance="fixed_large"), torch.zeros(2, 1, 4, 4))
    before = torch.get_rng_state()
    first = draw(seeded_by(5))
    assert torch.equal(first, draw(seeded_by(5)))
    assert not torch.equal(first, draw(seeded_by(6)))
    assert torch.equal(torch.get_rng_state(), before)


@DRAWS_OF_A_GENERATOR
def test_each_image_may_have_a_generator_of_its_own(name):
    """Of a list of generators, each gives the noise of its image, whatever the others are; another number of them than
    of images is refused."""
    draw = functools.partial(NOISES[name], single(FEW, variance="fixed_large"), torch.zeros(2, 1, 4, 4))
    ab, ac, ba = (draw([*map(seeded_by, seeds)]) for seeds in ((5, 6), (5, 7), (6, 5)))
    assert torch.equal(ab[..., 0, :, :, :], ac[..., 0, :, :, :])
    assert not torch.equal(ab[..., 1, :, :, :], ac[..., 1, :, :, :])
    assert torch.equal(ab, ba.flip(-4))
    with pytest.raises(ValueError):
        draw([*map(seeded_by, range(3))])


OF_ANOTHER_SHAPE = dict(
    q_sample=lambda q, x, noise: q.q_sample(x, 5, noise),
    p_losses=lambda q, x, noise: q.p_losses(predicts_zero, x, torch.tensor([5, 5]), noise),
    predict_x_start=lambda q, x, noise: q.predict_x_start(x, 5, noise),
    p_sample=lambda q, x, noise: q.p_sample(predicts_zero, x, 5, noise=noise),
    p_sample_loop=lambda q, x, noise: q.p_sample_loop(predicts_zero, x.shape, noise=noise),
    interpolate=lambda q, x, noise: q.interpolate(predicts_zero, x, x, 5, 0.5, noise=noise),
    ddim_sample=lambda q, x, noise: q.ddim_sample(predicts_zero, x, 5, 3, noise=noise),
    ddim_sample_loop=lambda q, x, noise: q.ddim_sample_loop(predicts_zero, x.shape, 5, noise=noise),
    dpm_solver_sample_loop=lambda q, x, noise: q.dpm_solver_sample_loop(predicts_zero, x.shape, 5, noise=noise),
    a_model=lambda q, x, noise: q.p_sample(lambda x_t, t: noise, x, 5),
    a_model_in_training=lambda q, x, noise: q.p_losses(lambda x_t, t: noise, x, torch.tensor([5, 5])),
)


@pytest.mark.parametrize("use", OF_ANOTHER_SHAPE.values(), ids=OF_ANOTHER_SHAPE)
def test_noise_of_another_shape_is_refused(use):
    """Broadcast, one ε would serve a whole batch in silence: an error instead, for noise that is given and for what a
    model returns."""
    with pytest.raises((ValueError, RuntimeError)):
        use(single(FEW), torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))


def test_a_learned_variance_needs_twice_the_channels():
    """A model that returns ε alone, or a channel too few, is refused where v is learned; so are channels at the end."""
    single(FEW, variance="learned_range").p_sample(lambda x_t, t: torch.cat([x_t, x_t], 1), torch.zeros(2, 3, 4, 4), 5)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\) .*, got \(2, 2, 4, 4\)"):
        single(FEW, variance="learned_range").p_sample(predicts_zero, torch.zeros(2, 2, 4, 4), 5)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 3\) .*, got \(2, 3, 3, 3\)"):  # v of one channel would broadcast
        single(FEW, variance="learned_range").p_sample(lambda x_t, t: x_t[:, [0, 0, 0]], torch.zeros(2, 2, 3, 3), 5)
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 3\) .*, got \(2, 3, 3, 1\)"):
        single(FEW).p_sample(lambda x_t, t: x_t.permute(0, 2, 3, 1), torch.zeros(2, 1, 3, 3), 5)


ASKS = dict(
    p_losses=lambda q, model, x, t: q.p_losses(model, x, torch.as_tensor(t).expand(2)),
    p_sample=lambda q, model, x, t: q.p_sample(model, x, t),
    score=lambda q, model, x, t: q.score(model, x, t),
)


@pytest.mark.parametrize("use", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("t", [17, torch.tensor([0, 999])], ids=["int", "tensor"])
def test_the_model_is_given_t_as_it_is(t, use):
    """int64 of shape (B,) and not divided by T; an int becomes a batch of it. Each function calls the model once."""
    seen = []
    model = lambda x_t, t: seen.append(t) or torch.zeros_like(x_t)
    use(single(), model, torch.zeros(2, 1, 2, 2), t)
    assert [each.tolist() for each in seen] == [torch.as_tensor(t).expand(2).tolist()]
    assert seen[0].dtype == torch.int64


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


def test_appendix_b_network_has_35746307_parameters():
    """As many parameters as the authors' network, 32 groups in every norm, dropout 0.1. The second convolution of each
    block, the attention's output and the last convolution start at zero, nothing else does. (Where the attention is,
    the next test proves.)"""
    network = paper_network()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
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
    h = conv(x, "conv_in", padding=1)
    channels = dim
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
            h = torch.cat([h, skips.pop()], dim=1)
            h = residual_block(h, f"up_blocks.{level}.resnets.{i}", h.shape[1], dim * mult)
            if h.shape[2] in attention_at:
                h = attention(h, f"up_blocks.{level}.attentions.{i}")
        if level < len(dim_mults) - 1:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(h, f"up_blocks.{level}.upsamplers.0.conv", padding=1)
    assert not skips
    return conv(swish(norm(h, "conv_norm_out")), "conv_out", padding=1), used


def assert_is_appendix_b(network, x, t, y=None, **shape):
    """The network's answer is that of the transcription, which uses every weight, by its published name."""
    with torch.no_grad():
        want, used = appendix_b(dict(network.named_parameters()), x, t, y, **shape)
        got = network(x, t) if y is None else network(x, t, y)
    assert used == set(dict(network.named_parameters()))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_appendix_b_network_wire_by_wire():
    """All weights of the paper's network random: attention at 16×16 and in the middle."""
    shape = dict(dim=128, groups=32, dim_mults=(1, 2, 2, 2), num_res_blocks=2, attention_at=(16,))
    network = randomise(copy.deepcopy(paper_network()))
    assert_is_appendix_b(network, torch.randn(2, 3, 32, 32), torch.tensor([7, 990]), **shape)


NETWORKS = dict(
    labels=dict(num_classes=3, learned_variance=True, time_dim=20),
    no_attention=dict(attn_resolutions=(), image_channels=1),
    deep=dict(dim=16, dim_mults=(1, 1, 3), num_res_blocks=2, attn_resolutions=(8, 2), image_channels=3),
    one_level=dict(dim_mults=(2,), num_res_blocks=3, attn_resolutions=(8,), image_size=5),
    groups=dict(dim=124, dim_mults=(1,)),
    four_levels=dict(dim_mults=(1, 1, 2, 2), image_size=24, attn_resolutions=(6, 3), dim=32),
)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_another_shape_wire_by_wire(name):
    """Any channels, levels, number of blocks and size that halves; in float64. A learned variance doubles the output's
    channels. Below a dim of 128 every norm has up to dim/16 groups, a rule of this project."""
    sizes = dict(dim=8, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_channels=2, image_size=8)
    sizes.update(NETWORKS[name])
    dim, dim_mults, num_res_blocks, attention_at, channels, size = [*sizes.values()][:6]
    network = randomise(small(**NETWORKS[name])).double()
    x = normal(2, channels, size, size)
    t = torch.tensor([7, 990])
    y = torch.tensor([0, 2]) if "num_classes" in sizes else None
    shape = dict(dim=dim, dim_mults=dim_mults, num_res_blocks=num_res_blocks, attention_at=attention_at)
    assert_is_appendix_b(network, x, t, y, groups=math.gcd(dim, max(1, dim // 16)), **shape)
    assert network(x, t).shape == (2, channels * (2 if "learned_variance" in sizes else 1), size, size)
    assert network.state_dict()["time_embedding.linear_1.weight"].shape == (sizes.get("time_dim", 4 * dim), dim)


def test_the_network_depends_on_x_t_and_y():
    """Every pixel of x (through the middle every pixel sees every other), neighbouring t, and y; no y is the last
    row of the label embedding."""
    network = randomise(small(num_classes=3))
    x = torch.randn(1, 2, 8, 8)
    t = torch.tensor([500])
    outputs = [network(x, t, torch.tensor([y])) for y in range(4)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(outputs, 2))
    assert torch.equal(outputs[3], network(x, t))
    assert len(network.class_embedding.weight) == 4
    assert (network(x, t) - network(x, t + 1)).abs().max() > 1e-5
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, t)[0, 0, 0, 0], x)
    assert (gradient != 0).all()


def test_attention_does_not_depend_on_the_scale_of_its_input():
    """Behind the group norm: block(c x) − c x is the same for c = 1 and 10."""
    block = randomise(ddpm.AttentionBlock(32))
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(block(10 * x) - 10 * x, block(x) - x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_images_of_a_batch_are_independent(training):
    """The answer for one image does not depend on the others, in training mode either: there is no batch norm."""
    network = randomise(small(num_classes=3)).train(training)
    x = torch.randn(4, 2, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    y = torch.tensor([0, 1, 2, 3])
    together = network(x, t, y)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(network(x[one], t[one], y[one]), together[one], rtol=1e-4, atol=1e-4)


def test_dropout_is_for_training_only():
    """In training mode two calls differ, in evaluation mode they do not. It stands before the second convolution."""
    network = randomise(small(dropout=0.5))
    x = torch.randn(1, 2, 8, 8)
    t = torch.tensor([5])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))
    block = randomise(ddpm.ResidualBlock(8, 8, 16, dropout=1.0, groups=8)).train()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(1, 16)), x + block.conv2.bias[:, None, None])


def test_the_network_compiles_as_one_graph():
    """dynamo finds no graph break, labels included."""
    network = randomise(small(num_classes=3))
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


REFUSED_BY_THE_NETWORK = dict(
    size=lambda: ddpm.UNet(image_size=30),
    no_blocks=lambda: small(num_res_blocks=0),
    one_t=lambda: small()(torch.zeros(4, 2, 8, 8), torch.tensor([3])),
    one_label=lambda: small(num_classes=3)(torch.zeros(4, 2, 8, 8), torch.arange(4), torch.tensor([1])),
    labels=lambda: small()(torch.zeros(2, 2, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1])),
)


@pytest.mark.parametrize("call", REFUSED_BY_THE_NETWORK.values(), ids=REFUSED_BY_THE_NETWORK)
def test_the_network_refuses(call):
    """A size that can't be halved, a level without blocks, one t or label for a batch, which would broadcast in
    silence, and labels for a network that knows none."""
    with pytest.raises((ValueError, RuntimeError)):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it where there is one")
@PREDICTIONS
def test_cuda_agrees_with_the_cpu(prediction):
    """DDIM, Algorithm 2 and the loss with the same network and noise on both devices."""
    network = randomise(small())
    diffusion = single(prediction=prediction)
    x, noise = torch.randn(2, 2, 2, 8, 8)
    t = torch.tensor([3, 900])

    def results(network, diffusion, x, t, noise):
        ddim = diffusion.ddim_sample(network, x, 900, 400, eta=0.5, noise=noise)
        step = diffusion.p_sample(network, x, t, noise=noise)
        return ddim.cpu(), step.cpu(), diffusion.p_losses(network, x, t, noise).cpu()

    want = results(network, diffusion, x, t, noise)
    got = results(*(each.to("cuda") for each in (network, diffusion, x, t, noise)))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


PROOF = set(globals())  # what follows is about ddpm.py itself, and is left out with DDPM=


# ---- 12. Training: Algorithm 1 ---------------------------------------------------------------------------------------
SETTINGS = dict(dim=8, dim_mults=(1,), num_res_blocks=1, attn_resolutions=(4,), batch_size=8, timesteps=50, warmup=2)
SETTINGS.update(seed=SEED + 1, device="cpu", bf16=False, compile=False)


def test_noise_is_viewed_as_the_images():
    """ε of shape (B, H, W) does not broadcast to (B, B, H, W): the loss of a model that returns it is 0."""
    noise = normal(3, 1, 4, 4)
    assert exact().p_losses(lambda x_t, t: noise, 0 * noise, torch.tensor([1, 500, 999]), noise[:, 0]) == 0


def train_tiny(out, checkpoint=None, watch=None, **settings):
    """Train a tiny network. Returns what the checkpoint holds, which is in the folder out."""
    config = ddpm.Config(**{**SETTINGS, **settings, "out": str(out)})
    ddpm.train(config, checkpoint, watch or (lambda run, step: None))
    return torch.load(out / "checkpoint.pt", weights_only=True)


def algorithm_1(config, processes=1):
    """Algorithm 1 and appendix B, a second time: Adam, warm-up, clipping and the moving average in plain arithmetic,
    the gradients by autograd. Each process draws its share of the batch from a seed of its own, in this order: images,
    flips, hidden labels, t, ε, dropout; gradients are averaged. Returns the weights, their average and the log's
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
    parameters = list(network.parameters())
    n = config.batch_size // processes
    m, v, average = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
    rows = []
    for step in range(config.steps):
        losses = []
        gradients = [torch.zeros_like(p) for p in parameters]
        for rank in range(processes):
            torch.manual_seed(ddpm.derive_seed(config.seed, "training", step, rank))
            chosen = torch.randint(len(images), (n,))
            x_0 = images[chosen].float() / 127.5 - 1
            if config.flip:
                mirrored = torch.rand(n) < 0.5
                x_0 = torch.stack([x.flip(2) if flip else x for x, flip in zip(x_0, mirrored, strict=True)])
            y = None
            if config.conditional:
                hidden = torch.rand(n) < config.label_dropout
                y = torch.tensor([10 if hide else int(labels[i]) for i, hide in zip(chosen, hidden, strict=True)])
            t = torch.randint(config.timesteps, (n,))
            noise = torch.randn(n, 1, 8, 8)
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
EVERYTHING.update(dropout=0.2, label_dropout=0.3, batch_size=12, log_every=1)
PLAIN = dict(steps=4, lr=1e-3, warmup=0, lr_decay="constant", grad_clip=0.0, ema_decay=0.9999, flip=False)
PLAIN.update(dropout=0.0, conditional=False, timesteps=1000, log_every=1)


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
    log = np.genfromtxt(out / "log.csv", delimiter=",", skip_header=1, ndmin=2)
    np.testing.assert_allclose(log[:, :4], rows, rtol=2e-3, atol=1e-6)
    return rows


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, dict(EVERYTHING, steps=1), PLAIN, dict(PLAIN, conditional=True, label_dropout=0.0, lr_decay="linear")],
    ids=["everything", "first-step", "plain", "labels"],
)
def test_training_is_algorithm_1(settings, tmp_path):
    """A few steps against the transcription above: with labels, flips, label dropout, dropout, warm-up, decay and
    clipping all on, after the first step (when the average is the weights), and with all off."""
    rows = assert_trained_as_algorithm_1(train_tiny(tmp_path, **settings), tmp_path)
    if settings["grad_clip"]:
        assert (rows[:, 2] > settings["grad_clip"]).all()  # so that clipping is seen


def assert_each_with_probability(p, happened):
    """Of (batches, images) that each is true with probability p, independently: the count is binomial, and the counts
    of the batches have the variance of a binomial distribution (χ², both tails). False-alarm rate 2e−6."""
    batches, n = happened.shape
    assert scipy.stats.binomtest(int(happened.sum()), batches * n, p).pvalue > 1e-6
    spread = ((happened.sum(1) - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert min(scipy.stats.chi2.sf(spread, batches), scipy.stats.chi2.cdf(spread, batches)) > 5e-7


def test_algorithm_1_draws_what_the_paper_says(tmp_path, monkeypatch):
    """Over 20 steps of 100 images: each x_0 is a training image, scaled to [−1, 1], or its mirror image, with its label
    or none, from all parts of the data alike (χ²); t is uniform on 0…T−1 (χ²); ε is standard normal (Kolmogorov and
    Smirnov); each image is mirrored with probability ½ and each label hidden with probability label_dropout,
    independently of other images and of each other (Fisher's test). False-alarm rate 1e−6 for each, 8e−6 in all."""
    seen = []
    original = ddpm.GaussianDiffusion.p_losses

    def p_losses(self, model, x_start, t, noise=None):
        if torch.is_grad_enabled():  # in training, not when losses are compared for the log
            seen.append((x_start, t, noise, model.keywords["y"]))
        return original(self, model, x_start, t, noise)

    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", p_losses)
    train_tiny(tmp_path, timesteps=5, batch_size=100, steps=20, flip=True, label_dropout=0.2)
    x, t, noise, y = (torch.cat(each) for each in zip(*seen, strict=True))
    images, labels = ddpm.load_data("digits", split="train")
    known = {tuple(image.flatten().tolist()): (i, False) for i, image in enumerate(images)}
    for i, image in enumerate(images.flip(3)):
        known.setdefault(tuple(image.flatten().tolist()), (i, True))
    pixels = ((x + 1) * 127.5).round().int()
    found = [known[tuple(image.flatten().tolist())] for image in pixels]
    index, mirrored = np.array(found).T
    assert (x.min(), x.max()) == (-1, 1)
    assert scipy.stats.chisquare(np.histogram(index, 20, (0, len(images)))[0]).pvalue > 1e-6
    assert scipy.stats.chisquare(np.bincount(t, minlength=5)).pvalue > 1e-6
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-6
    hidden = (y == 10).numpy()
    assert (y.numpy() == labels[index].numpy())[~hidden].all()
    assert_each_with_probability(0.5, mirrored.reshape(20, 100))
    assert_each_with_probability(0.2, hidden.reshape(20, 100))
    both = [[((mirrored == a) & (hidden == b)).sum() for a in (0, 1)] for b in (0, 1)]
    assert scipy.stats.fisher_exact(both).pvalue > 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [2, 3, 5, 10, 19, 20, 21, 100, 500, 1000, 4000])
def test_short_schedules_end_in_noise(timesteps, schedule):
    """§4 asks that x_T be almost N(0, I). A config scales the ends of the linear schedule by 1000/T, so that ᾱ_{T−1} <
    1e−3 for every T ≥ 2; the paper's own is 4e−5, and unscaled ends at T = 100 would leave 0.36."""
    diffusion = ddpm.build_diffusion(ddpm.Config(timesteps=timesteps, schedule=schedule))
    signal, _ = mean_and_deviation(diffusion, timesteps)
    assert signal[-1] ** 2 < 1e-3


def test_sampling_starts_from_the_averaged_weights(tmp_path):
    """The run that watch is shown, and Run.read of its folder, have the EMA, which is not the last weights, and dropout
    off."""
    runs = []
    saved = train_tiny(tmp_path, watch=lambda run, step: runs.append(run), steps=3, dropout=0.2)
    runs.append(ddpm.Run.read(tmp_path, device="cpu", bf16=False, compile=False))
    for run in runs:
        assert not run.model.training
        assert all(torch.equal(weight, saved["ema"][name]) for name, weight in run.model.state_dict().items())
    assert any(not torch.equal(weight, saved["model"][name]) for name, weight in saved["ema"].items())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Three steps and three more after a resume are six steps, bit for bit: weights, average and Adam's state."""
    settings = dict(lr_decay="constant", dropout=0.2, flip=True)
    want = train_tiny(tmp_path / "whole", steps=6, **settings)
    train_tiny(tmp_path / "parts", steps=3, **settings)
    checkpoint = ddpm.read_checkpoint(tmp_path / "parts")
    got = train_tiny(tmp_path / "parts", checkpoint, steps=6, **settings)
    for part in ("model", "ema"):
        assert all(torch.equal(weight, want[part][name]) for name, weight in got[part].items())
    for i, state in got["optimizer"]["state"].items():
        assert all(torch.equal(value, want["optimizer"]["state"][i][name]) for name, value in state.items())


def test_a_tiny_network_learns_its_images(tmp_path):
    """100 steps on four images in a folder, and sampling draws all four: the median distance of a sample to the nearest
    is below 0.5 (noise: 1.1; from one image to another: 1.4), and the loss halves."""
    (tmp_path / "images").mkdir()
    for i, halves in enumerate([(0, 255), (255, 0), (255, 255), (0, 0)]):
        pixels = np.repeat(np.array(halves, dtype=np.uint8), 2)[None].repeat(4, 0)
        for j in range(3):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}{j}.png")
    settings = dict(data=str(tmp_path / "images"), image_size=4, dim=16, steps=100, batch_size=32, lr=1e-2, warmup=10)
    train_tiny(tmp_path / "run", **settings, lr_decay="linear", timesteps=100, ema_decay=0.98, log_every=10)
    *_, x_0 = ddpm.Run.read(tmp_path / "run", device="cpu").trajectory(80, seed=SEED)
    images = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]).repeat_interleave(2, 1)
    distance, nearest = (x_0 - images[:, None, None, None]).square().flatten(2).mean(2).sqrt().min(0)
    assert distance.median() < 0.5
    assert set(nearest[distance < 0.5].tolist()) == {0, 1, 2, 3}
    losses = np.genfromtxt(tmp_path / "run" / "log.csv", delimiter=",", skip_header=1)[:, 1]
    assert losses[0] > 2 * losses[-1]


# ---- 13. Another implementation, and known mistakes ------------------------------------------------------------------


def proof_of(source, folder, monkeypatch):
    """This file as a module, with DDPM= pointing at a file that holds the source."""
    (folder / "other.py").write_text(source)
    monkeypatch.setenv("DDPM", str(folder / "other.py"))
    return load(__file__, "proof_of_other")


def test_the_proof_can_be_pointed_at_another_file(tmp_path, monkeypatch):
    """A copy of ddpm.py is green. A copy with a wrong Eq. 7 is red in that equation's mean and green in its variance; a
    method that is missing is a skip with its name. Tests of what only ddpm.py has are left out."""
    source = (HERE / "ddpm.py").read_text()
    right = proof_of(source, tmp_path, monkeypatch)
    right.test_eq_7_posterior_is_bayes_rule("mean", 10)
    right.test_interpolation_is_figure_8(0.25)
    assert not hasattr(right, "test_training_is_algorithm_1")

    wrong = source.replace("alphas.sqrt() * (1 - alphas_cumprod_prev)", "alphas * (1 - alphas_cumprod_prev)")
    wrong = proof_of(wrong.replace("def interpolate(", "def mix("), tmp_path, monkeypatch)
    wrong.test_eq_7_posterior_is_bayes_rule("variance", 10)
    with pytest.raises(AssertionError):
        wrong.test_eq_7_posterior_is_bayes_rule("mean", 10)
    with pytest.raises(pytest.skip.Exception, match="does not define interpolate"):
        wrong.test_interpolation_is_figure_8(0.25)


# Name | where it was shipped, or none | the test that must notice it; the right lines of ddpm.py; the wrong ones.
MISTAKES = """
noise at the last step | labml, smalldiffusion | test_algorithm_2_adds_noise_except_at_t_0("fixed_large")
- z = sample_noise(x_t, generator, noise) * extract(self.t_is_positive, t, x_t)
+ z = sample_noise(x_t, generator, noise)
the last DDIM step goes to ᾱ_0 | ControlNet #587 | test_ddim_stays_on_the_line_from_noise_to_x_0(20, -1)
- self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]
+ self.alpha_bars = [*alphas_cumprod.tolist(), alphas_cumprod[0].item()]
t = −1 is read from the end of ᾱ | the tutorial's ddim_sample | test_ddim_stays_on_the_line_from_noise_to_x_0(20, -1)
- alpha_bar_s = self.alpha_bars[s]
+ alpha_bar_s = self.alpha_bars[:-1][s]
DDIM reads ᾱ one step early | lucidrains #81 | test_ddim_stays_on_the_line_from_noise_to_x_0(500, 250)
- alpha_bar_s = self.alpha_bars[s]
+ alpha_bar_s = self.alpha_bars[s - 1]
a short DDIM run starts below T−1 | improved-diffusion #44 | test_ddim_timesteps_are_trailing()
- return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]
+ return [self.timesteps // steps * i for i in range(steps - 1, -1, -1)]
DDIM over all T steps begins at index T | latent-diffusion #136 | test_ddim_timesteps_are_trailing()
- return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]
+ return [round(self.timesteps * i / steps) for i in range(steps, 0, -1)]
S that does not divide T gives too many steps | improved-diffusion, tqch | test_ddim_timesteps_are_trailing()
- return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]
+ return list(range(self.timesteps - 1, -1, -(self.timesteps // steps)))
DDIM with S = T runs another sampler | lucidrains | test_ddim_with_eta_0_is_deterministic(T)
- x_t = self.ddim_sample(model, x_t, t, prev_t, eta, clip_denoised, generator=generator)
+ x_t = self.p_sample(model, x_t, t, clip_denoised, generator=generator)
the clamped x̂_0 keeps its old ε in DDIM | the default of diffusers | test_clamped_ddim_recomputes_its_noise()
- predicted_noise = self.predict_noise(x_t, t, pred_x_start)
+ pass
x̂_0 is not clamped | lucidrains #47 | test_x_start_is_clamped_unless_told_otherwise(None, "p_mean_variance", 1)
- def p_mean_variance(self, model, x_t, t, clip_denoised=True):
+ def p_mean_variance(self, model, x_t, t, clip_denoised=False):
the network is given t/T | superminddpm | test_the_model_is_given_t_as_it_is(17, ASKS["p_sample"])
- prediction = model(x_t, t).to(x_t.dtype)
+ prediction = model(x_t, t / self.timesteps).to(x_t.dtype)
the network ignores t | superminddpm | test_the_network_depends_on_x_t_and_y()
- angles = t[:, None] * omega
+ angles = 0 * t[:, None] * omega
the root is missing on 1 − ᾱ | DiffusionCLIP #16 | test_eq_4_is_eq_2_composed()
- sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt()
+ sqrt_one_minus_alphas_cumprod=1 - alphas_cumprod
the root is missing on ᾱ | DiffusionCLIP #16 | test_eq_4_is_eq_2_composed()
- sqrt_alphas_cumprod=alphas_cumprod.sqrt()
+ sqrt_alphas_cumprod=alphas_cumprod
the logarithm of a zero variance | B2-DiffuRL #2 | test_bits_per_dim_is_finite("fixed_small")
- posterior_log_variance=positive_variance.log()
+ posterior_log_variance=posterior_variance.log()
the cosine schedule is not capped | common | test_improved_ddpm_eq_17_is_the_cosine_schedule(10, ())
- return (1 - f[1:] / f[:-1]).clamp(max=0.999)
+ return 1 - f[1:] / f[:-1]
ᾱ is accumulated in float32 | diffusers, labml | test_coefficients_are_computed_in_float64("sqrt_alpha_bar")
- alphas_cumprod = alphas.cumprod(0)
+ alphas_cumprod = alphas.float().cumprod(0).double()
respacing reads ᾱ back in float32 | none | test_respacing_a_float32_diffusion_is_accurate()
- self.alpha_bars[t] / self.alpha_bars[s] for s, t in
+ self.alphas_cumprod[t].item() / (self.alphas_cumprod[s].item() if s >= 0 else 1) for s, t in
linear ends are kept at T = 100 | seven of nine that were read | test_short_schedules_end_in_noise(100, "linear")
- scale = 1000 / config.timesteps
+ scale = 1
the time is added too late | the tutorial | test_a_network_of_another_shape_wire_by_wire("no_attention")
-         h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
-         h = self.conv2(self.dropout(F.silu(self.norm2(h))))
+         h = self.conv2(self.dropout(F.silu(self.norm2(h))))
+         h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
batch norm | superminddpm | test_images_of_a_batch_are_independent(True)
- self.norm1 = group_norm(in_channels, groups)
+ self.norm1 = nn.BatchNorm2d(in_channels)
guidance with the wrong sign | common | test_guidance_mixes_as_the_paper_says(0.5, False)
- (1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]
+ (1 + scale) * conditional[:, :c] + scale * unconditional[:, :c]
guidance off by one | common | test_guidance_mixes_as_the_paper_says(0.5, False)
- (1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]
+ scale * conditional[:, :c] + (1 - scale) * unconditional[:, :c]
interpolation decodes from t − 1 | lucidrains, labml | test_interpolation_is_figure_8(0.25)
- return last(self.p_sample_steps(model, x_t, t, generator=generator))
+ return last(self.p_sample_steps(model, x_t, t - 1, generator=generator))
encoding takes x_0 for the first noisy image | none | test_encoding_written_out(37, False)
- x_t = self.ddim_mean(x_start, predicted_noise, timesteps[0])
+ x_t = x_start
DPM-Solver++ extrapolates twice as far | none | test_dpm_solver_in_its_own_exponential_form(7, False)
- h / (2 * previous_h) *
+ h / previous_h *
DPM-Solver++ extrapolates from an extrapolation | none | test_dpm_solver_in_its_own_exponential_form(7, False)
- pred_x_start_r = pred_x_start
+ pred_x_start_r = extrapolated
DPM-Solver++ does not clamp what it extrapolates | none | test_dpm_solver_in_its_own_exponential_form(7, True)
- extrapolated = extrapolated.clamp(-1, 1)
+ pass
DPM-Solver++ ends at t = 0 | none | test_dpm_solver_timesteps_are_the_starts_of_equal_steps(8, BETAS, BARS)
- steps, endpoint=False)
+ steps)
DPM-Solver++ begins at λ_{T−1} = −10 | ddpm.py itself | test_dpm_solver_does_not_waste_calls_on_noise(1000, 8)
- max(lambdas[-1], -5.1)
+ lambdas[-1]
a velocity's sign | none | test_an_exact_velocity_is_right_in_float32_at_every_t("x_start")
- pred_x_start = self.q_sample(x_t, t, -prediction)
+ pred_x_start = self.q_sample(x_t, t, prediction)
x̂_0 of a velocity through Eq. 15 | ddpm.py itself | test_an_exact_velocity_is_right_in_float32_at_every_t("x_start")
- pred_x_start = self.q_sample(x_t, t, -prediction)
+ pred_x_start = self.predict_x_start(x_t, t, self.q_sample(prediction, t, x_t))
a velocity trained with the weight of ε | none | test_the_hybrid_loss_written_out("velocity")
- loss = self.q_sample(noise - predicted_noise, t, pred_x_start - x_start).square().mean()
+ pass
L_vlb trains a velocity | none | test_the_bound_of_the_hybrid_loss_does_not_train_the_prediction("velocity")
- pred_x_start.detach(), v)
+ pred_x_start if self.prediction_type == "velocity" else pred_x_start.detach(), v)
a velocity in bfloat16 | none | test_a_model_in_bfloat16_is_used_in_the_precision_of_x("score", "velocity")
- prediction = model(x_t, t).to(x_t.dtype)
+ prediction = model(x_t, t)
the EMA averages the schedule | lucidrains #136, imagen-pytorch #25 | test_coefficients_are_not_in_the_state_dict()
- self.register_buffer(name, coefficient.to(dtype), persistent=False)
+ self.register_buffer(name, coefficient.to(dtype))
no EMA at sampling time | several | test_sampling_starts_from_the_averaged_weights(tmp_path)
- for part in ("model", "ema"):
+ for part in ("ema", "model"):
dropout stays on while sampling | labml | test_sampling_starts_from_the_averaged_weights(tmp_path)
- ema = copy.deepcopy(network).eval()
+ ema = copy.deepcopy(network)
t is never T−1 | superminddpm | test_algorithm_1_draws_what_the_paper_says(tmp_path, monkeypatch)
- t = torch.randint(diffusion.timesteps, (len(chosen),), device=device)
+ t = torch.randint(diffusion.timesteps - 1, (len(chosen),), device=device)
images in [0, 1] | imagen-pytorch #24 and #160 | test_training_is_algorithm_1(PLAIN, tmp_path)
- return pixels.float() / 127.5 - 1
+ return pixels.float() / 255
label dropout is an integer | gmongaras | test_algorithm_1_draws_what_the_paper_says(tmp_path, monkeypatch)
- < config.label_dropout
+ < int(config.label_dropout)
a batch is mirrored as a whole | none | test_algorithm_1_draws_what_the_paper_says(tmp_path, monkeypatch)
- torch.rand(len(chosen), 1, 1, 1, device=device) < 0.5
+ torch.rand(1, 1, 1, 1, device=device) < 0.5
labels are hidden for a batch as a whole | none | test_algorithm_1_draws_what_the_paper_says(tmp_path, monkeypatch)
- hidden = torch.rand(len(chosen), device=device)
+ hidden = torch.rand(1, device=device).expand(len(chosen))
resuming forgets the EMA | common | test_a_resumed_run_equals_an_uninterrupted_one(tmp_path)
- ema.load_state_dict(checkpoint["ema"])
+ ema.load_state_dict(checkpoint["model"])
resuming forgets the optimizer | common | test_a_resumed_run_equals_an_uninterrupted_one(tmp_path)
- optimizer.load_state_dict(checkpoint["optimizer"])
+ pass
resuming restarts the data order | common | test_a_resumed_run_equals_an_uninterrupted_one(tmp_path)
- torch.manual_seed(derive_seed(config.seed, "training", step, rank))
+ torch.manual_seed(derive_seed(config.seed, "training", step - first_step, rank))
"""


@pytest.mark.filterwarnings("ignore:√ᾱ_")
@pytest.mark.parametrize("block", re.split(r"\n(?![-+])", MISTAKES.strip()), ids=lambda block: block.split(" |")[0])
def test_a_known_mistake_turns_its_test_red(block, tmp_path, monkeypatch):
    """A copy of ddpm.py with the wrong line takes the place of ddpm in this file, and the test's assertion fails."""
    title, *lines = block.splitlines()
    right, wrong = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
    source = (HERE / "ddpm.py").read_text()
    assert source.count(right) == 1
    mistaken = types.ModuleType("ddpm")
    mistaken.__file__ = ddpm.__file__
    exec(compile(source.replace(right, wrong), "ddpm.py with a mistake", "exec"), mistaken.__dict__)
    monkeypatch.setattr(sys.modules[__name__], "ddpm", mistaken)
    with pytest.raises(AssertionError):
        eval(title.split(" | ")[2], globals(), dict(tmp_path=tmp_path, monkeypatch=monkeypatch))


# ======================================================================================================================
# The proof ends here; what follows tests what runs it: data, runs, processes, published weights, the command line.
# ======================================================================================================================

TINY = "--train --dim 8 --dim-mults 1 --timesteps 20 --batch-size 8 --log-every 1 --steps 4"
ENDLESS = f"{TINY} --steps 1000000 --sample-every 1000000 --lr-decay constant"
PAPER_BETAS = np.linspace(1e-4, 0.02, 1000)
MNIST = "--data mnist --timesteps 3 --dim-mults 1 1 1"
README = (HERE / "README.md").read_text()
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it where there is one")
NEEDS_DIFFUSERS = "compares with another library: pip install diffusers safetensors"


def cli(line):
    """Run a command line in this process, by default on the CPU in float32. Returns the exit status."""
    arguments = shlex.split(line)
    if {"--train", "--sample", "--evaluate"} & set(arguments):
        arguments += ["--device", "cpu"] if "--device" not in arguments else []
        arguments += ["--no-bf16"] if "--bf16" not in arguments else []
    try:
        ddpm.main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def saved(out="runs/digits"):
    """What the checkpoint of a run holds."""
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def log_rows(out="runs/digits"):
    """The cells of log.csv below the header."""
    header, *rows = Path(out, "log.csv").read_text().splitlines()
    assert header == "step,loss,gradient_norm,learning_rate,ema_loss,ema_loss_held_out"
    return [row.split(",") for row in rows]


def equal(a, b):
    """Equal bit for bit, tensors included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a, b):
    """Two runs have the same weights, average, optimizer, step and log, bit for bit."""
    for part in ("model", "ema", "optimizer", "step"):
        assert equal(saved(a)[part], saved(b)[part]), part
    assert log_rows(a) == log_rows(b)


def randomise_weights(weights):
    """Random values for a state dict, because a new network returns 0."""
    for name, weight in weights.items():
        scale = 1 / math.sqrt(weight[0].numel()) if weight.dim() > 1 else 0.1
        weights[name] = scale * torch.randn_like(weight) + (weight.dim() == 1 and name.endswith("weight"))
    return weights


def random_run(line="", out="runs/digits"):
    """Makes a run of random weights, which differ between the network and its average. Returns it as a Run."""
    assert cli(f"{TINY} --steps 1 --out {out} {line}") == 0
    checkpoint = saved(out)
    for part in ("model", "ema"):
        randomise_weights(checkpoint[part])
    torch.save(checkpoint, Path(out, "checkpoint.pt"))
    return ddpm.Run.read(out, "cpu", bf16=False)


def individual(out="runs/digits"):
    """The images in individual/, int (N, H, W)."""
    paths = sorted(Path(out, "individual").iterdir())
    assert [path.name for path in paths] == [f"{i:05}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def grey_levels(x):
    """[−1, 1] as 0…255, rounded to the nearest."""
    return ((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().int().numpy()


def tiles_of(grid, columns, count):
    """The images of a grid of 8×8 images, enlarged four times, with lines between them."""
    small = np.asarray(grid.convert("L")).astype(int)[::4, ::4]
    rows = math.ceil(count / columns)
    assert small.shape == (9 * rows + 1, 9 * columns + 1)
    tiles = small[1:, 1:].reshape(rows, 9, columns, 9)[:, :8, :, :8].swapaxes(1, 2)
    return tiles.reshape(-1, 8, 8)[:count]


def save_image(path, held_out=None):
    """Write an 8×8 image of one random colour, held out or not, and return the colour."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        colour = tuple(torch.randint(256, (3,)).tolist())
        Image.new("RGB", (8, 8), colour).save(path)
        if held_out is None or (zlib.crc32(path.read_bytes()) % 10 == 0) == held_out:
            return colour


def save_mnist(train, test):
    """Random images in the files of torchvision's MNIST below data/. Returns them as (train + test, 1, 28, 28)."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    images = torch.randint(256, (train + test, 1, 28, 28), dtype=torch.uint8)
    for part, chosen in (("train", images[:train]), ("t10k", images[train:])):
        header = struct.pack(">4i", 0x803, len(chosen), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + chosen.numpy().tobytes())
        labels = bytes(i % 10 for i in range(len(chosen)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(chosen)) + labels)
    return images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory):
    """A folder with runs: one of random weights, one as of TINY, others without labels; and with folders of images."""
    folder = tmp_path_factory.mktemp("some")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(SEED)
        for line in ("--no-conditional --out plain", "--label-dropout 0 --out never_hidden", "--out usual"):
            assert cli(f"{TINY} {line}") == 0
        random_run()
        Path("empty").mkdir()
        save_image("one/a.png", held_out=True)
        save_image("colours/a.png", held_out=True)
        save_image("colours/b.png")
        save_image("broken/good.png")
        Path("broken/bad.png").write_bytes(b"not an image")
    return folder


@contextlib.contextmanager
def spawn(*commands):
    """Runs (environment, *arguments) of Python in processes of their own, which are killed at the end."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    common = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    processes = []
    for environment, *arguments in commands:
        processes.append(subprocess.Popen([sys.executable, *arguments], env={**common, **environment}, **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until(condition, *processes):
    """Wait until a condition holds, while the processes run."""
    for _ in range(6000):
        if condition():
            return
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.02)
    pytest.fail("timed out")


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_the_bundled_digits_are_those_of_the_uci():
    """1,797 digits in ten classes, image for image those of scikit-learn; every tenth one is held out."""
    images, labels = ddpm.load_data("digits")
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    held_out = torch.arange(1797) % 10 == 9
    for split, chosen in (("test", held_out), ("train", ~held_out)):
        part = ddpm.load_data("digits", split=split)
        assert equal(list(part), [images[chosen], labels[chosen]])
    digits = pytest.importorskip("sklearn.datasets", reason="compares: pip install scikit-learn").load_digits()
    order = np.argsort(digits.target, kind="stable")
    assert (labels.numpy() == digits.target[order]).all()
    assert ((images[:, 0].double() * 16 / 255).round().numpy() == digits.images[order]).all()


def test_what_is_read_in_a_folder(folder, capsys):
    """Subfolders are the classes, in natural order. Hidden names, other files and runs are left out, links are
    followed. One line says what was read."""
    names = ["2/a.png", "2/deep/b.JPG", "10/a.gif", "1/a.bmp", "1/._c.png", ".hidden/d.png", "../elsewhere/e.webp"]
    for name in names:
        save_image(folder / "images" / name)
    Path("images/11").symlink_to(folder / "elsewhere")
    Path("images/notes.txt").write_text("not an image")
    assert cli(f"{TINY} --data images --image-size 8 --steps 1 --out images/run") == 0
    images, labels = ddpm.load_data("images", 8)
    assert labels.tolist() == [0, 1, 1, 2, 3]
    first_line = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"images: 5 images of \(3, 8, 8\), \d held out; labels: \['1', '2', '10', '11'\]", first_line)
    assert ddpm.load_data("images/2", 8)[1] is None
    save_image("images/beside.png")
    assert ddpm.load_data("images", 8)[1].bincount().tolist() == [1, 1, 2, 1, 1]


def test_images_are_read_as_they_are_shown(folder):
    """Transparency is on white, 16-bit grey is scaled and not clipped, the orientation in EXIF is applied, the middle
    is kept, pixels are averaged. If all images are grey there is one channel."""
    Image.fromarray(np.full((5, 5), 257 * 200, np.uint16)).save("a.png")
    Image.new("RGBA", (7, 7), (0, 0, 0, 0)).save("b.png")
    Image.new("RGB", (5, 5), (200, 200, 200)).save("c.jpg")
    stripes = Image.fromarray(np.tile([0, 255], (30, 60)).astype(np.uint8))  # 120 wide
    stripes.paste(255, (0, 0, 30, 30))
    stripes.save("d.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: what is above goes to the right
    halves = Image.new("RGB", (10, 10), "black")
    halves.paste("white", (0, 0, 10, 5))
    halves.save("e.png", exif=exif)
    images, labels = ddpm.load_data(".", 10)
    assert labels is None
    assert images.shape == (5, 1, 10, 10)
    assert images[0].unique().tolist() == images[2].unique().tolist() == [200]
    assert images[1].unique().tolist() == [255]
    assert (images[3, 0, :, 2:-2].int() - 127).abs().max() <= 1
    assert images[4, 0, 5].tolist() == [0] * 5 + [255] * 5
    save_image("f.png")
    assert ddpm.load_data(".", 10)[0].shape == (6, 3, 10, 10)


def test_a_large_jpeg_is_read_right(folder):
    """Reduced while it is decoded, it differs from the whole image by less than three grey levels."""
    x, y = np.meshgrid(np.arange(1200), np.arange(900))
    image = Image.fromarray((127 + 120 * np.sin(x / 150) * np.cos(y / 170)).astype(np.uint8))
    image.save("large.jpg", quality=95)
    want = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS, (150, 0, 1050, 900))).astype(int)
    assert np.abs(ddpm.load_data(".", 32)[0][0, 0].numpy() - want).max() < 3


def test_a_checksum_decides_what_is_held_out(folder):
    """An image is held out if its file's CRC-32 is divisible by ten, whatever its name and the other images are. If
    that is a whole class, all images of the class are trained on."""
    kept = [save_image(f"data/a/{i}.png", held_out=False) for i in range(3)]
    held_out = [save_image(f"data/a/{i}.png", held_out=True) for i in range(3, 5)]
    whole_class = [save_image(f"data/b/{i}.png", held_out=True) for i in range(3)]
    for split, colours, counts in (("train", kept + whole_class, [3, 3]), ("test", held_out, [2])):
        images, labels = ddpm.load_data("data", 8, split=split)
        assert [tuple(image[:, 4, 4].tolist()) for image in images] == colours
        assert labels.bincount().tolist() == counts


def test_torchvisions_test_set_is_held_out(folder, capsys):
    """Training on MNIST uses its training set, and the log compares the loss with its test set."""
    images = save_mnist(30, 20)
    for split, chosen in (("train", slice(30)), ("test", slice(30, None)), (None, slice(None))):
        got, labels = ddpm.load_data("mnist", split=split)
        assert torch.equal(got, images[chosen])
        assert labels.tolist() == [i % 10 for i in [*range(30), *range(20)]][chosen]
    assert cli(f"{TINY} --steps 1 {MNIST}") == 0
    assert capsys.readouterr().out.startswith("mnist: 50 images of (1, 28, 28), 20 held out; labels: ['0 - zero', ")
    assert float(log_rows("runs/mnist")[-1][-1]) > 0


def test_colour_data_sets_arrive_channels_first(monkeypatch):
    """CIFAR-10 is (N, H, W, C) with a list of labels in torchvision, and (N, C, H, W) here."""
    parts = np.random.default_rng(SEED).integers(256, size=(2, 6, 32, 32, 3), dtype=np.uint8)
    rest = dict(targets=list(range(6)), classes=[f"class {i}" for i in range(6)])
    fake = lambda root, train, download: types.SimpleNamespace(data=parts[int(train)], **rest)
    monkeypatch.setitem(ddpm.TORCHVISION, "cifar10", fake)
    images, labels = ddpm.load_data("cifar10", split="test")
    assert (images.numpy() == parts[0].transpose(0, 3, 1, 2)).all()
    assert labels.tolist() == list(range(6))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_is_one_line(name, folder, monkeypatch, capsys):
    """Without a network, one line says what failed."""
    offline = mock.Mock(side_effect=urllib.error.URLError("no route to host"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert cli(f"{TINY} --data {name}") == 2
    assert re.match(r"ddpm.py: error: .*(mnist|no route to host)", capsys.readouterr().err.splitlines()[-1])


# ---- Configuration ---------------------------------------------------------------------------------------------------
# For each field of Config but --checkpoint-every, which the tests of runs use, a value that TINY does not have.
FLAGS = dict(data="pictures", image_size="12", dim="12", dim_mults="1 2", num_res_blocks="2", attn_resolutions="8")
FLAGS.update(dropout="0.5", conditional=False, label_dropout="0.9", timesteps="30", schedule="cosine", seed="7")
FLAGS.update(variance="learned_range", prediction="velocity", loss="bound", steps="3", batch_size="4", lr="0.1")
FLAGS.update(warmup="1", lr_decay="constant", grad_clip="0.01", ema_decay="0.05", flip=True, log_every="2")
FLAGS.update(sample_every="2", bf16=True, compile=True, device="cpu", out="elsewhere")


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_reaches_what_it_configures(field, some_runs, folder, monkeypatch, capsys):
    """Every field of Config is a flag of --train, which goes over the data's preset and changes what a run leaves."""
    assert {each.name for each in dataclasses.fields(ddpm.Config)} == {*FLAGS, "checkpoint_every"}
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    save_image("pictures/a.png")
    flag = "--" + field.replace("_", "-")
    value = FLAGS[field]
    line = {True: flag, False: flag.replace("--", "--no-", 1)}.get(value, f"{flag} {value}")
    line += {"data": " --image-size 8", "image_size": " --data pictures"}.get(field, "")
    assert cli(f"{TINY} --out run {line}") == 0
    assert bool(compiled) == (field == "compile")
    assert ", cpu, " in capsys.readouterr().out
    runs = [some_runs / "usual", Path(value if field == "out" else "run")]
    had = saved(runs[1])["config"][field]
    assert " ".join(map(str, had if isinstance(had, tuple | list) else [had])) == str(value)
    if field not in ("compile", "device", "out"):
        usual, got = ([sorted(path.name for path in run.iterdir()), log_rows(run)] for run in runs)
        assert usual != got or not equal(*(dict(saved(run)["ema"]) for run in runs))


APPENDIX_B = dict(image_size=32, dim=128, dim_mults=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1)
APPENDIX_B.update(conditional=False, timesteps=1000, schedule="linear", variance="fixed_large", prediction="noise")
APPENDIX_B.update(loss="simple", steps=800_000, batch_size=128, lr=2e-4, warmup=5000, lr_decay="constant", flip=True)
APPENDIX_B.update(grad_clip=1.0, ema_decay=0.9999, sample_every=10_000, checkpoint_every=5000, bf16=None)
DIGITS = dict(APPENDIX_B, image_size=8, dim=16, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0)
DIGITS.update(conditional=True, steps=1400, lr=6e-3, warmup=50, lr_decay="linear", flip=False)
DIGITS.update(sample_every=500, checkpoint_every=500)
GREY = dict(DIGITS, image_size=28, dim=16, dim_mults=(1, 2, 4), attn_resolutions=(7,), steps=3000, batch_size=32)
GREY.update(lr=2e-3, warmup=200, schedule="cosine", prediction="velocity", sample_every=1000)
PICTURES = dict(GREY, image_size=32, dim_mults=(1, 2, 4, 8), attn_resolutions=(8,), steps=7000, lr=1e-3)
FAST = dict(APPENDIX_B, conditional=True, schedule="cosine", prediction="velocity", flip=False, steps=50_000)
FAST.update(warmup=500, sample_every=1000, checkpoint_every=1000)


def test_the_presets():
    """CIFAR-10 has the paper's settings (§4, appendix B); the settings of the other data are written out here."""
    settings = dict(cifar10=APPENDIX_B, digits=DIGITS, mnist=GREY, fashion_mnist=GREY, cats=PICTURES, gpu=FAST)
    for data, want in settings.items():
        config = dataclasses.asdict(ddpm.preset("cats", "gpu") if data == "gpu" else ddpm.preset(data))
        assert {name: config[name] for name in want} == want
    assert ddpm.preset("digits", "gpu").image_size == 8
    assert ddpm.preset("digits") == ddpm.Config()
    assert ddpm.preset("cifar10", lr=1.0).lr == 1.0
    assert str(ddpm.build_network(ddpm.preset("cifar10"), 3, None)) == str(ddpm.UNet())
    np.testing.assert_allclose(ddpm.build_diffusion(ddpm.preset("cifar10")).betas, PAPER_BETAS, rtol=1e-6)


@pytest.mark.parametrize("mode", ["--train", "--train --resume", "--sample", "--evaluate", "--export", ""])
def test_help_names_the_defaults(mode, capsys):
    """--help of each mode exits with status 0; that of --train has the defaults of the data's preset."""
    assert cli(f"{mode} --help") == 0
    assert f"python ddpm.py {mode.split()[0] if mode else 'MODE'}" in capsys.readouterr().out
    for data, steps in (("digits", 1400), ("cifar10", 800000)) if mode == "--train" else ():
        assert cli(f"--train --data {data} --help") == 0
        assert f"(default: {steps})" in " ".join(capsys.readouterr().out.split())


# ---- Runs: folders, log, checkpoints, resuming -----------------------------------------------------------------------


def test_two_runs_started_at_once_and_killed_resume_to_the_same_bits(folder):
    """Without --out each has a folder of its own. After SIGKILL and --resume they equal uninterrupted runs."""
    command = ({}, str(HERE / "ddpm.py"), *f"{ENDLESS} --checkpoint-every 1 --device cpu --no-bf16".split())
    with spawn(command, command) as pair:
        wait_until(lambda: len(list(folder.glob("runs/*/checkpoint.pt"))) == 2, *pair)
        for process, moment in zip(pair, np.random.default_rng(SEED).uniform(0, 0.3, 2), strict=True):
            time.sleep(moment)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits", "digits-2"]
    for out in ("runs/digits", "runs/digits-2"):
        steps = saved(out)["step"] + 3
        assert cli(f"--train --resume --out {out} --steps {steps}") == 0
        assert cli(f"{ENDLESS} --steps {steps} --out whole-{steps}{out}") == 0
        assert_same_run(out, f"whole-{steps}{out}")


def test_a_power_cut_while_a_checkpoint_is_written(folder, monkeypatch):
    """The checkpoint before it stays whole, and the run resumes from it to the same bits, with flips and dropout."""
    line = f"{TINY} --steps 8 --checkpoint-every 3 --sample-every 5 --log-every 2 --flip --dropout 0.3"
    assert cli(f"{line} --out whole") == 0
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=[None, OverflowError("power cut"), *[None] * 9]))
    with pytest.raises(OverflowError):
        cli(f"{line} --out cut")
    assert saved("cut")["step"] == 3
    assert cli("--train --resume --out cut") == 0
    assert_same_run("whole", "cut")
    assert [row[0] for row in log_rows("cut")] == ["2", "3", "4", "5", "6", "8"]


def test_the_newest_run_is_the_default(folder, capsys):
    """Every mode takes the newest run, or --out; a new run there is refused in a line that names --resume."""
    for line in ("--sample 4", "--train --resume"):
        assert cli(line) == 2
        assert "no run in runs/ yet: python ddpm.py --train makes one" in capsys.readouterr().err
    for out in ("runs/digits", "runs/digits-2"):
        assert cli(TINY) == 0
        assert f"next: python ddpm.py --sample 64 --out={out}" in capsys.readouterr().out
    os.utime("runs/digits/checkpoint.pt")
    content = Path("runs/digits/checkpoint.pt").read_bytes()
    assert cli("--sample 3") == 0
    assert capsys.readouterr().out == "samples in runs/digits\n"
    assert cli(f"{TINY} --out runs/digits") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/digits holds a run: --resume" in line
    assert Path("runs/digits/checkpoint.pt").read_bytes() == content
    assert cli("--train --resume --steps 5") == 0
    assert [saved(out)["step"] for out in ("runs/digits", "runs/digits-2")] == [5, 4]
    assert cli("--train --resume --steps 6 --out runs/digits-2 --log-every 9 --sample-every 6") == 0
    assert cli("--evaluate 2") == 0
    assert cli("--sample 1") == 0
    assert capsys.readouterr().out.endswith("samples in runs/digits-2\n")
    before, after = (saved(out)["config"] for out in ("runs/digits", "runs/digits-2"))
    assert {name for name in before if before[name] != after[name]} == {"steps", "log_every", "sample_every", "out"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_training_after_its_step(name, folder, monkeypatch, capsys):
    """It is saved, one line says how to resume to the same bits, the status is 130; an ignored signal stays ignored."""
    number = getattr(signal, name)
    assert cli(f"{TINY} --sample-every 2 --out whole") == 0
    write_grid = ddpm.Run.write_grid
    monkeypatch.setattr(ddpm.Run, "write_grid", lambda run, step: (write_grid(run, step), os.kill(os.getpid(), number)))
    before = signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore some signals
    try:
        capsys.readouterr()
        assert cli(f"{TINY} --sample-every 2 --out 'my cut'") == 130
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert signal.getsignal(number) is signal.default_int_handler
        assert re.search(r"stopped after step 3, .* python ddpm.py --train --resume --out='?my cut", line)
        assert saved("my cut")["step"] == 3
        signal.signal(number, signal.SIG_IGN)
        assert cli("--train --resume --out 'my cut'") == 0
    finally:
        signal.signal(number, before)
    assert_same_run("whole", "my cut")


def test_the_log_holds_means(folder):
    """A row has the means of the loss and the gradient's norm since the row before, and the step's learning rate."""
    for every in (1, 3):
        assert cli(f"{TINY} --log-every {every} --out {every} --warmup 1 --lr 0.1") == 0
    each, third = (np.array([row[:4] for row in log_rows(out)], dtype=float) for out in "13")
    assert third[:, 0].tolist() == [3, 4]
    np.testing.assert_allclose(third[0, 1:3], each[:3, 1:3].mean(0), atol=1e-4)
    np.testing.assert_allclose(each[:, 3], [0.05, 0.075, 0.05, 0.025])  # a warm-up of one step, then to 0


@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_the_log_compares_training_images_with_held_out_ones(precision, folder):
    """A row with a grid has Eq. 14 of the averaged weights on 512 training and 512 held-out images, for equal t, ε."""
    assert cli(f"{TINY} --steps 5 --sample-every 3 --lr 0.03 --dropout 0.3 {precision}") == 0
    rows = log_rows()
    assert [row[4:] == ["", ""] for row in rows] == [True, True, False, True, False]
    run = ddpm.Run.read("runs/digits", "cpu")
    generator = torch.Generator().manual_seed(ddpm.derive_seed(0, "comparison"))
    t = torch.randperm(512, generator=generator) * 20 // 512
    noise = torch.randn((512, 1, 8, 8), generator=generator)
    for cell, split in zip(rows[-1][4:], ("train", "test"), strict=True):
        images, labels = ddpm.load_data("digits", split=split)
        chosen = [len(images) * i // 512 for i in range(512)]
        model = lambda x_t, t, y=labels[chosen]: run.model(x_t, t, y)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "--bf16"):
            loss = run.diffusion.p_losses(model, images[chosen] / 127.5 - 1, t, noise)
        assert float(cell) == pytest.approx(loss.item(), abs=2e-5)


def test_what_is_not_finite_is_an_error(folder, capsys):
    """A loss ends the run before a checkpoint holds it; samples are not written as black images. Status 2, one line."""
    assert cli(f"{TINY} --steps 50 --lr 1e30 --warmup 0 --checkpoint-every 2 --sample-every 1000 --grad-clip 0") == 2
    assert re.search(r"not finite in steps (\d+)…\1; a smaller --lr may help\n$", capsys.readouterr().err)
    assert all(math.isfinite(float(row[1])) for row in log_rows())
    random_run(out="runs/other")
    checkpoint = saved("runs/other")
    checkpoint["ema"]["conv_out.bias"][:] = math.nan
    torch.save(checkpoint, "runs/other/checkpoint.pt")
    capsys.readouterr()
    assert cli("--sample 2 --individual") == 2
    assert capsys.readouterr().err == "ddpm.py: error: the samples are not finite\n"
    assert not list(Path("runs/other").rglob("*0.png"))


def test_grids_have_a_column_for_each_class(folder):
    """Ten images of each class, drawn by ten steps of DPM-Solver from the averaged weights; at most 16 columns."""
    run = random_run()
    assert not run.model.training
    assert equal(dict(run.model.state_dict()), dict(saved()["ema"]))
    run.write_grid(123456)
    labels = torch.arange(100) % 10
    want = grey_levels(ddpm.last(run.trajectory(100, labels, ddpm.derive_seed(0, "grid"), sampling_steps=10)))
    assert (tiles_of(Image.open("runs/digits/samples-123456.png"), 10, 100) == want).mean() > 0.99
    for i in range(20):
        save_image(f"pictures/{i}/a.png")
    assert cli(f"{TINY} --steps 1 --data pictures --image-size 8") == 0
    assert Image.open("runs/pictures/samples-000001.png").size == (4 * (9 * 16 + 1), 4 * (9 * 10 + 1))
    assert cli(f"{TINY} --steps 1 --no-conditional --out plain") == 0
    assert Image.open("plain/samples-000001.png").size == (4 * (9 * 10 + 1), 4 * (9 * 10 + 1))


def test_a_damaged_or_foreign_checkpoint_is_one_line(folder, capsys):
    """Cut off, with a flipped bit, of another program, or with code in it, which is not run: status 2, one line."""
    assert cli(TINY) == 0
    path = Path("runs/digits/checkpoint.pt")
    whole = path.read_bytes()
    contents = [whole[:-1], whole[: len(whole) // 2], b"", b"weights\n"]
    for part in ("model", "ema"):
        place = whole.index(saved()[part]["conv_in.weight"].numpy().tobytes())
        contents.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    checkpoint = saved()
    runs_code = type("RunsCode", (), {"__reduce__": lambda self: (os.mkdir, ("ran",))})
    for changes in (dict(ema=runs_code()), dict(ema={}), dict(config=dict(checkpoint["config"], unheard_of=1))):
        torch.save({**checkpoint, **changes}, "foreign.pt")
        contents.append(Path("foreign.pt").read_bytes())
    capsys.readouterr()
    for content in contents:
        path.write_bytes(content)
        for line in ("--sample 1", "--train --resume --steps 9"):
            assert cli(line) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert "runs/digits/checkpoint.pt is damaged or was not written by this version" in said
    assert not Path("ran").exists()


# ---- Sampling and evaluation -----------------------------------------------------------------------------------------


def drawn(run, count, batch=64, label=None, seed=0, sampler="dpm-solver", steps=None, eta=0.0, w=0.0, bf16=False):
    """All steps of each batch of --sample. All noise of image i is from seed derive_seed(seed, "sampling") + i."""
    num_batches = math.ceil(count / batch)
    size = math.ceil(count / num_batches)
    batches = []
    for start in range(0, num_batches * size, size):
        y = torch.arange(start, start + size) % 10 if label is None else torch.full((size,), label)

        def model(x_t, t, y=y):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return (1 + w) * run.model(x_t, t, y) - w * run.model(x_t, t, torch.full_like(y, 10))

        first = ddpm.derive_seed(seed, "sampling") + start
        generators = [torch.Generator().manual_seed(first + i) for i in range(size)]
        x_T = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators])
        if sampler == "dpm-solver":
            trajectory = run.diffusion.dpm_solver_sample_steps(model, x_T, steps or 10)
        elif sampler == "ddim":
            trajectory = run.diffusion.ddim_sample_steps(model, x_T, steps or 20, eta, generator=generators)
        else:
            chain, chain_model = run.diffusion.respace(model, steps) if steps else (run.diffusion, model)
            trajectory = chain.p_sample_steps(chain_model, x_T, generator=generators)
        with torch.no_grad():
            batches.append(list(trajectory))
    return batches


WAYS = {
    "--sample 7": dict(count=7),
    "--sample 7 --sampling-batch 3 --seed 5 --sampling-steps 3": dict(count=7, batch=3, seed=5, steps=3),
    "--sample 5 --label 0 --sampling-steps 4": dict(count=5, label=0, steps=4),
    "--sample 5 --unconditional --sampling-steps 4": dict(count=5, label=10, steps=4),
    "--sample 21 --guidance 1.5 --sampling-steps 4": dict(count=21, w=1.5, steps=4),
    "--sample 3 --sampling-steps 3 --bf16": dict(count=3, steps=3, bf16=True),
    "--sample 3 --sampler ddim": dict(count=3, sampler="ddim"),
    "--sample 9 --sampler ddim --sampling-steps 5 --eta 0.7": dict(count=9, sampler="ddim", steps=5, eta=0.7),
    "--sample 3 --sampler ddpm --sampling-batch 2": dict(count=3, batch=2, sampler="ddpm"),
    "--sample 5 --sampler ddpm --sampling-steps 7": dict(count=5, sampler="ddpm", steps=7),
}


@pytest.mark.parametrize("line", WAYS)
def test_sampling_written_out(line, some_runs, monkeypatch):
    """--sample draws what GaussianDiffusion's samplers draw, to one grey level, and samples.png shows it by class."""
    monkeypatch.chdir(some_runs)
    run = ddpm.Run.read("runs/digits", "cpu", bf16=False)
    assert cli(f"{line} --individual") == 0
    how = WAYS[line]
    count = how["count"]
    want = np.concatenate([grey_levels(batch[-1]) for batch in drawn(run, **how)])[:count]
    got = individual()
    assert np.abs(got - want).max() <= 1
    assert (got == want).mean() > 0.99
    columns = 10 if how.get("label") is None else math.ceil(count**0.5)
    assert (tiles_of(Image.open("runs/digits/samples.png"), min(columns, count), count) == got).all()


@pytest.mark.parametrize("how", ["--sampler dpm-solver", "--sampler ddim --eta 0.7", "--sampler ddpm"])
def test_an_image_depends_on_the_seed_and_its_number_alone(how, some_runs, monkeypatch):
    """Another count or --sampling-batch gives the same images; individual/ keeps none of an earlier, larger call."""
    monkeypatch.chdir(some_runs)
    draws = []
    for count, batch in ((20, 64), (7, 64), (8, 3)):
        assert cli(f"--sample {count} --sampling-batch {batch} --sampling-steps 4 --individual {how}") == 0
        draws.append(individual())
        assert len(draws[-1]) == count
    for images in draws[1:]:
        assert np.abs(images[:7] - draws[0][:7]).max() <= 1
    assert len(np.unique(draws[0].reshape(20, -1), axis=0)) == 20


@pytest.mark.parametrize("steps, frames", [(5, 5), (20, 20), (70, 36)])
def test_the_animation_shows_the_reverse_process(steps, frames, folder):
    """samples.gif shows the first batch after each step, or after about 60, for 0.1 s each, and x_0 for 2 s."""
    run = random_run("--timesteps 70")
    assert cli(f"--sample 6 --sampling-batch 3 --animate --sampler ddim --sampling-steps {steps}") == 0
    (first, _) = drawn(run, 6, batch=3, sampler="ddim", steps=steps)
    every = [*range(0, steps - 1, math.ceil(steps / 60)), steps - 1]
    want = np.stack([grey_levels(first[i]) for i in every])
    with Image.open("runs/digits/samples.gif") as gif:
        shown = [(tiles_of(frame, 3, 3), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0  # without end
    assert len(shown) == len(want) == frames
    assert np.abs(np.stack([tiles for tiles, _ in shown]) - want).mean((1, 2, 3)).max() < 6  # a GIF has 256 colours
    assert [duration for _, duration in shown] == [100] * (frames - 1) + [2000]


def test_classes_are_chosen_by_name_or_number(folder):
    """--label takes a name or a number; if names are numbers, the name."""
    images = {}
    for data, names, labels in (("words", "cat dog", "cat dog 0 1"), ("numbers", "1 7", "1 7")):
        for i, name in enumerate(names.split() * 3):
            save_image(f"{data}/{name}/{i}.png")
        random_run(f"--data {data} --image-size 8", f"runs/{data}")
        for label in labels.split():
            assert cli(f"--sample 1 --label {label}") == 0
            images[data, label] = Path(f"runs/{data}/samples.png").read_bytes()
    assert images["words", "cat"] == images["words", "0"] != images["words", "dog"] == images["words", "1"]
    assert images["numbers", "1"] != images["numbers", "7"]


def test_the_default_number_of_sampling_steps(folder):
    """10 for DPM-Solver++, 50 for DDIM, T for Algorithm 2, and T if that is less. The seed is 0."""
    for timesteps, want in ((4, [4, 4, 4]), (60, [10, 50, 60])):
        assert cli(f"{TINY} --timesteps {timesteps} --no-conditional --out run{timesteps}") == 0
        assert cli(f"--sample 1 --out run{timesteps}") == 0
        run = ddpm.Run.read(f"run{timesteps}", device="cpu")
        assert [len(list(run.trajectory(1, sampler=each))) for each in ddpm.SAMPLERS] == want
        assert torch.equal(ddpm.last(run.trajectory(1)), ddpm.last(run.trajectory(1, seed=0)))


@pytest.mark.parametrize("line, count", [("", 100), ("--bf16", 30), ("--no-conditional", 1), (MNIST, 260)])
def test_evaluation_written_out(line, count, folder, capsys):
    """--evaluate prints means and errors of bits_per_dim over evenly spaced held-out images, given no labels."""
    data = "mnist" if line == MNIST else "digits"
    images = save_mnist(20, 300)[20:] if line == MNIST else ddpm.load_data("digits", split="test")[0]
    run = random_run(line, f"runs/{data}")
    capsys.readouterr()
    assert cli(f"--evaluate {count} --seed 3 {line if line == '--bf16' else ''}") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{count} held-out images of {data}")
    x = images[[len(images) * i // count for i in range(count)]] / 127.5 - 1
    generator = torch.Generator().manual_seed(ddpm.derive_seed(3, "evaluation"))
    with torch.autocast("cpu", torch.bfloat16, enabled=line == "--bf16"):
        parts = x.chunk(math.ceil(count / 256))
        batches = [run.diffusion.bits_per_dim(run.model, part, generator=generator) for part in parts]
    bits = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    bits["L_{T-1}"] = bits["L_{t-1}"].sum(1)
    for name in ("L_T", "L_{T-1}", "L_0", "total"):
        mean, error = map(float, re.search(re.escape(name) + r" +([\d.]+) ± ([\d.]+)", said).groups())
        assert mean == pytest.approx(bits[name].mean().item(), abs=1e-4)
        assert error == pytest.approx(np.std(bits[name].numpy(), ddof=count > 1) / count**0.5, abs=1e-4)


# ---- Several processes, devices --------------------------------------------------------------------------------------

# One of two processes: it trains until it is stopped, then waits for a line, and samples.
RANK = """
import sys, ddpm
try:
    ddpm.main(sys.argv[1].split())
except SystemExit as end:
    print("status", end.code, flush=True)
sys.stdin.readline()
ddpm.main(sys.argv[2].split())
"""


def test_two_processes_train_and_sample_as_one(folder, monkeypatch, capsys):
    """Two processes train by the mean gradient, stop together, and share the images of --sample --individual."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    cpu = "--out two --device cpu --no-bf16"
    train = f"{ENDLESS} --no-conditional --warmup 0 --checkpoint-every 5 {cpu}"
    sample = f"--sample 7 --sampling-batch 2 --individual {cpu}"
    with spawn(*[(dict(common, RANK=rank, LOCAL_RANK=rank), "-c", RANK, train, sample) for rank in "01"]) as ranks:
        wait_until(Path("two/checkpoint.pt").exists, *ranks)
        ranks[1].send_signal(signal.SIGTERM)
        assert [ranks[0].stdout.readline() for _ in range(3)][2] == "status 130\n"
        (said, errors), (said_1, errors_1) = [rank.communicate("\n", timeout=120) for rank in ranks]
    step = saved("two")["step"]
    assert f"stopped after step {step:,}, " in errors.replace("\n", " ")
    assert "stopped" not in errors_1
    assert (said, said_1) == ("samples in two\n", "samples in two\n")
    got = np.array([row[:3] for row in log_rows("two")], dtype=float)
    assert got[:, 0].tolist() == list(range(1, step + 1))
    _, _, want = algorithm_1(ddpm.Config(**{**saved("two")["config"], "steps": 6}), processes=2)
    np.testing.assert_allclose(got[:6], want[:, :3], rtol=2e-3)

    images = individual("two")
    assert cli("--sample 7 --sampling-batch 2 --individual --out two") == 0
    assert (individual("two") == images).all()
    assert cli(f"--train --resume --steps {step + 2} --out two") == 0
    assert saved("two")["step"] == step + 2
    capsys.readouterr()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(f"{TINY} --batch-size 7") == 2
    assert cli("--sample 4 --out two") == 2
    refused = ["--batch-size 7 can't be shared equally by 2 processes", "several processes need --individual"]
    assert capsys.readouterr().err.splitlines() == [f"ddpm.py: error: {reason}" for reason in refused]


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("native", ["cuda", "avx512", ""])
@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_bfloat16_is_the_default_where_the_device_computes_in_it(device, native, given, monkeypatch):
    """Native support counts, not the slow emulation on older GPUs; --bf16 and --no-bf16 override it."""
    emulated = lambda including_emulation=True: including_emulation or native == "cuda"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native == "avx512")
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    default = native in dict(cuda=["cuda"], cpu=["avx512"], mps=[])[device]
    assert ddpm.autocast(ddpm.Config(bf16=given), torch.device(device)) == (default if given is None else given)


@NEEDS_CUDA
@pytest.mark.parametrize("how", ["--no-compile", "--no-compile --bf16", "--compile --bf16"])
def test_cuda_trains_resumes_samples_and_evaluates(how, folder, capsys):
    """The command line from end to end on a GPU, where the same seed draws the same images."""
    assert cli(f"{TINY} --steps 5 --flip --device cuda {how}") == 0
    assert cli(f"--train --resume --steps 8 --device cuda {how}") == 0
    assert np.isfinite(np.array([row[:4] for row in log_rows()], dtype=float)).all()
    for sampler in ("--sampler ddpm", "--guidance 1", "--sampler ddim --eta 1 --animate"):
        for out in ("samples.png", "first.png"):
            assert cli(f"--sample 6 --sampling-batch 3 --sampling-steps 4 {sampler} --device cuda {how}") == 0
            Path("runs/digits/samples.png").rename(out)
        assert Path("samples.png").read_bytes() == Path("first.png").read_bytes()
    assert cli(f"--evaluate 5 --device cuda {how}") == 0
    assert "total" in capsys.readouterr().out


@NEEDS_CUDA
def test_training_never_waits_for_the_gpu_between_two_rows_of_the_log(folder, monkeypatch):
    """torch raises an error where the host waits for the GPU; that is allowed around a row of the log alone."""
    mode = torch.cuda.set_sync_debug_mode
    p_losses = ddpm.GaussianDiffusion.p_losses
    update = ddpm.ema_update
    strict = lambda *batch: (torch.is_grad_enabled() and mode("error"), p_losses(*batch))[1]
    monkeypatch.setattr(ddpm.GaussianDiffusion, "p_losses", strict)
    monkeypatch.setattr(ddpm, "ema_update", lambda *weights: (update(*weights), mode("default")))
    assert cli(f"{TINY} --flip --device cuda --no-compile") == 0


# ---- Published weights, and diffusers --------------------------------------------------------------------------------
EXPORTED = {
    "labels": "",
    "attention": "--no-conditional --attn-resolutions 8",
    "small variance": "--no-conditional --variance fixed_small --schedule cosine",
    "learned variance": "--variance learned_range --no-conditional",
    "labels and learned variance": "--variance learned_range --prediction velocity",
    "levels": "--no-conditional --dim-mults 1 2 2 --attn-resolutions 4 --num-res-blocks 2",
}


@pytest.mark.parametrize("line", EXPORTED.values(), ids=EXPORTED)
def test_an_exported_run_is_the_same_in_diffusers(line, folder):
    """The folder of --export is the same function and draws the same images there, by Algorithm 2 in T = 100 steps and
    by DDIM in 50, and back by --weights here."""
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    run = random_run(f"{line} --timesteps 100")
    assert cli("--export exported") == 0
    theirs = diffusers.UNet2DModel.from_pretrained("exported").eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained("exported")
    y = torch.tensor([0, 9, 10]) if run.model.num_classes else None  # 10 is "no label"
    model = lambda x_t, t: run.model(x_t, t, y)
    x = x_T = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        want = model(x, torch.tensor([3, 8, 19]))
        want[:, 1:] = 2 * want[:, 1:] - 1
        got = theirs(x, torch.tensor([3, 8, 19]), class_labels=y).sample
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        ours, other = (torch.Generator().manual_seed(SEED) for _ in range(2))
        scheduler.set_timesteps(100)
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t, class_labels=y).sample, t, x, generator=other).prev_sample
        x_0 = run.diffusion.p_sample_loop(model, x_T.shape, noise=x_T, generator=ours)
        assert (x - x_0).abs().max() < 1e-3
        solver = diffusers.DDIMScheduler.from_pretrained("exported")
        solver.set_timesteps(50)
        x = x_T
        for t in solver.timesteps:
            noise = theirs(x, t, class_labels=y).sample[:, :1]
            x = solver.step(noise, t, x, use_clipped_model_output=True).prev_sample
        assert (x - run.diffusion.ddim_sample_loop(model, x_T.shape, 50, noise=x_T)).abs().max() < 1e-3
    for source, out in (("", "runs/digits"), ("--weights exported", "new/again")):
        assert cli(f"--sample 3 --sampler ddpm {source} --out {out}") == 0
    assert Path("new/again/samples.png").read_bytes() == Path("runs/digits/samples.png").read_bytes()
    assert cli("--export exported") == 2
    if y is None:
        assert diffusers.DDPMPipeline.from_pretrained("exported").unet.config.sample_size == 8


SHAPE = dict(sample_size=[8, 8], in_channels=1, out_channels=1, block_out_channels=[16, 32], layers_per_block=1)
SHAPE.update(down_block_types=["DownBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "UpBlock2D"])
SHAPE.update(norm_num_groups=1, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
SHAPE.update(attention_head_dim=None)
COSINE_V = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", variance_type="fixed_large")
WRITTEN = {
    "pipeline": ("p", COSINE_V, dict()),
    "network in a pipeline": ("p/unet", COSINE_V, dict()),
    "network and scheduler": ("n", COSINE_V, dict()),
    "network alone": ("n", None, dict()),
    "bin": ("n", dict(), dict(safe_serialization=False)),
    "shards": ("p", dict(), dict(max_shard_size="100KB")),
    "half precision": ("n", dict(), dict(variant="fp16")),
}


def publish(place, shape=SHAPE, scheduler=None, how=None):
    """Write a network of random weights and a scheduler with diffusers, as a pipeline in p/ or into n/; return both."""
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    network = diffusers.UNet2DModel(**shape).eval()
    network.load_state_dict(randomise_weights(network.state_dict()))
    process = diffusers.DDPMScheduler(**(scheduler or {}))
    network = network.half() if how and "variant" in how else network
    if place.startswith("p"):
        diffusers.DDPMPipeline(network, process).save_pretrained("p", **(how or {}))
    else:
        network.save_pretrained("n", **(how or {}))
        if scheduler is not None:
            process.save_pretrained("n")
    return network.float(), process


@pytest.mark.parametrize("place, scheduler, how", WRITTEN.values(), ids=WRITTEN)
def test_what_diffusers_writes_is_read(place, scheduler, how, folder):
    """--weights is the same function and process, in each format: 50 steps of DDIM agree within 0.01 grey levels."""
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    theirs, process = publish(place, scheduler=scheduler, how=how)
    run = ddpm.read_published(place, device="cpu", bf16=False)
    assert run.diffusion.variance_type == ("fixed_large" if scheduler is None else process.config.variance_type)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    x = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators])
    solver = diffusers.DDIMScheduler.from_config(process.config, timestep_spacing="trailing")
    solver.set_timesteps(50)
    with torch.no_grad():
        t = torch.tensor([7, 990])
        want = theirs(x, t).sample
        assert (run.model(x, t) - want).abs().max() < 1e-5 * want.abs().max()
        for t in solver.timesteps:
            x = solver.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    got = ddpm.last(run.trajectory(2, seed=5, sampler="ddim", sampling_steps=50))
    assert (got - x).abs().max() < 0.01 / 127.5


@pytest.mark.parametrize(
    "shape, scheduler, words",
    [
        (dict(attention_head_dim=8), {}, "attention_head_dim=8"),
        (dict(act_fn="gelu"), {}, "act_fn='gelu'"),
        (dict(sample_size=None), {}, "sample_size=None"),
        (dict(sample_size=[8, 16]), {}, "sample_size="),
        (dict(flip_sin_to_cos=True), {}, "flip_sin_to_cos=True"),
        ({}, dict(thresholding=True), "thresholding=True"),
        ({}, dict(clip_sample=False), "clip_sample=False"),
        ({}, dict(prediction_type="sample"), "'sample'"),
        (dict(out_channels=2), dict(variance_type="learned"), "'learned'"),
    ],
)
def test_what_cant_be_honoured_is_refused_by_name(shape, scheduler, words, folder, capsys):
    """Another network than UNet, or another process than GaussianDiffusion: one line names the setting."""
    publish("p", {**SHAPE, **shape}, scheduler)
    assert cli("--sample 1 --weights p") == 2
    assert re.search(f"^ddpm.py: error: .*{words}", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("how", ["fixed_large", "fixed_small", 0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_steps_equal_diffusers(how, clip):
    """For the same ε, x_t and z, p_sample is DDPMScheduler's step, and ddim_sample DDIMScheduler's if S divides T."""
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    ancestral = isinstance(how, str)
    diffusion = ddpm.GaussianDiffusion(PAPER_BETAS, how if ancestral else "fixed_large")
    kind = diffusers.DDPMScheduler if ancestral else diffusers.DDIMScheduler
    scheduler = kind(
        1000, clip_sample=clip, timestep_spacing="trailing", **(dict(variance_type=how) if ancestral else {})
    )
    scheduler.alphas_cumprod = torch.as_tensor(np.cumprod(1 - PAPER_BETAS))  # in float64
    for steps in (1000,) if ancestral else (1, 2, 5, 10, 50, 200, 1000):
        scheduler.set_timesteps(steps)
        timesteps = [*diffusion.ddim_timesteps(steps), -1]
        assert timesteps[:-1] == scheduler.timesteps.tolist()
        for i in {*range(0, steps, max(1, steps // 25)), steps - 1}:
            x_t, noise = torch.randn(2, 1, 1, 2, 2)
            t, s = timesteps[i : i + 2]
            model = lambda x_t, t, noise=noise: noise
            ours, theirs = (torch.Generator().manual_seed(t) for _ in range(2))
            if ancestral:
                want = scheduler.step(noise, t, x_t, theirs).prev_sample
                got = diffusion.p_sample(model, x_t, t, clip, generator=ours)
            else:
                want = scheduler.step(noise, t, x_t, how, True, theirs).prev_sample  # True: ε is recomputed
                got = diffusion.ddim_sample(model, x_t, t, s, how, clip, generator=ours)
            assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max()), (steps, t)


# ---- Command line ----------------------------------------------------------------------------------------------------
REFUSED = {
    "": "one of the arguments --train --sample --evaluate --export is required",
    "--sample 4 --lr 1": "unrecognized arguments: --lr",
    "--train --steps 0": "--steps: invalid .* '0'",
    "--train --data ''": "'' is neither a dataset .* nor a folder",
    "--train --data empty": "no images in empty",
    "--train --data broken": "broken/bad.png can't be read as an image",
    "--train --image-size 16": "--image-size must be 8 for digits, got 16",
    "--train --dim-mults 1 2 2 2 2": "image_size a multiple of 16, .* got 8",
    "--train --resume": "runs/digits was trained for 1 steps",
    "--sample 4 --out nowhere": "nowhere/checkpoint.pt",
    "--sample 4 --sampling-steps 21": "must lie in 1…20, got 21",
    "--sample 4 --label 10": "--label must be one of: 0, .*, 9; got 10",
    "--sample 4 --eta 0.5": "--eta .* --sampler ddim",
    "--evaluate 2 --data colours": "images of .3, 8, 8., the network needs .1, 8, 8.",
    "--sample 4 --out plain --guidance 1": "--guidance .* labels",
    "--sample 4 --out never_hidden --unconditional": "--unconditional need .* --label-dropout above 0",
    "--evaluate 2 --out never_hidden": "needs a network trained with --label-dropout above 0",
    "--evaluate 2 --data one": "no image of one is held out",
}


@pytest.mark.parametrize("line", REFUSED)
def test_the_command_line_refuses(line, some_runs, monkeypatch, capsys):
    """Each kind of mistake is one line that names it, with status 2, and no run is begun or changed."""
    monkeypatch.chdir(some_runs)
    before = {path: path.stat().st_mtime_ns for path in some_runs.rglob("*")}
    assert cli(line) == 2
    (message,) = [row for row in capsys.readouterr().err.splitlines() if not row.startswith("usage: ")]
    assert re.search(f"^ddpm.py: error: .*{REFUSED[line]}", message)
    assert {path: path.stat().st_mtime_ns for path in some_runs.rglob("*")} == before


def test_ddpm_alone_in_a_folder(folder, monkeypatch, capsys):
    """A copy of the one file trains on a folder of images, and says what digits and published weights need."""
    Path("ddpm.py").write_bytes((HERE / "ddpm.py").read_bytes())
    specification = importlib.util.spec_from_file_location("ddpm_alone", "ddpm.py")
    alone = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(alone)
    save_image("pictures/a.png")
    alone.main(f"{TINY} --data pictures --image-size 8 --device cpu --out run".split())
    assert saved("run")["step"] == 4
    capsys.readouterr()
    with pytest.raises(SystemExit):
        alone.main(TINY.split())
    assert re.fullmatch(r"ddpm.py: error: digits needs .*assets/digits.png, .*\n", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli("--sample 1 --weights p") == 2
    assert capsys.readouterr().err.endswith("pip install diffusers\n")


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readmes_table_names_every_equation():
    """The rows paper | code | test have all 15 equations and both algorithms, with functions and tests that exist."""
    papers = []
    for line in README.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and "`test_" in cells[2]:
            papers.append(cells[0])
            names = re.findall(r"`(\w+)`", cells[1])
            assert names
            assert all(hasattr(ddpm, name) or hasattr(ddpm.GaussianDiffusion, name) for name in names), names
    equations = " ".join(re.match(r"(?:Eq\. ([\d, ]+))?", paper)[1] or "" for paper in papers)
    assert {int(number) for number in re.findall(r"\d+", equations)} == set(range(1, 16))
    assert {"Algorithm 1", "Algorithm 2"} <= set(papers)


def test_readme_names_what_exists():
    """Every test, image, section and command line exists; sections of ddpm.py begin at the lines given."""
    assert all(callable(globals().get(name)) for name in re.findall(r"`(test_\w+)`", README))
    paths = re.findall(r"\]\(([\w/.]+\.\w+)[#)]", README)
    assert any(path.startswith("assets/") for path in paths)
    assert all((HERE / path).exists() for path in paths)
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    for section, line in re.findall(r"^\| (\d+) .*? \| (\d+)–", README, re.MULTILINE):
        assert (HERE / "ddpm.py").read_text().splitlines()[int(line) - 1].startswith(f"# ---- {section}. ")
    for line in re.findall(r"^python ddpm\.py ([^#\n]+)", README, re.MULTILINE):
        assert "--help" in line or ddpm.parse(shlex.split(line))


def test_readmes_python_example_runs():
    """As it stands, but for fewer images and steps."""
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.DOTALL)[1]
    assert "8, 3, 32, 32" in code
    assert "steps=50" in code
    names = {}
    exec(code.replace("(8,", "(1,").replace("steps=50", "steps=2"), names)
    assert names["loss"].item() > 0
    assert names["samples"].shape == (1, 3, 32, 32)


if OTHER:
    for name in set(globals()) - PROOF:
        if name.startswith("test_"):
            del globals()[name]
