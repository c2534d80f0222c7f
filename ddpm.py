"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020) in one file, with DDIM, DPM-Solver++ and guidance.

Read it beside the paper, from top to bottom:
    1 noise schedules   2 diffusion: loss, Algorithm 2, bound, DDIM   3 guidance   4 network   5 training: Algorithm 1
The rest runs it:
    6 data   7 configuration   8 devices and files   9 from a run to images   10 published weights   11 command line

Equations, algorithms and sections are the paper's unless another paper is named.
t is 0…T−1: the paper's t minus 1. t = −1 is x_0, where ᾱ = 1. (The names x_0, x_1, x_T and L_0, L_T keep the paper's
numbers.) An argument t is int64 (B,), or one int for all images. Images are float (B, C, H, W) in [−1, 1].

    python ddpm.py --train         # train on handwritten digits: any machine, about a minute
    python ddpm.py --sample 64     # draw samples from the trained network; --train --data FOLDER trains on your images
    python ddpm.py --help          # everything else
"""

import argparse
import copy
import ctypes
import datetime
import glob
import io
import itertools
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

# Apple's GPUs have no kernel for log_ndtr: the CPU takes over. (No effect if torch was imported before.)
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm


# ---- 1. Noise schedules ----------------------------------------------------------------------------------------------
def linear_beta_schedule(timesteps, start=0.0001, end=0.02):
    """β_t evenly spaced from start to end (§4). Returns (T,) float64. The defaults assume T = 1000."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps, s=0.008):
    """β_t = 1 − ᾱ_t/ᾱ_{t−1}, at most 0.999, with ᾱ_{t−1} = f(t)/f(0) and f(t) = cos²((t/T + s)/(1 + s) · π/2)
    (Improved DDPM Eq. 17). Returns (T,) float64."""
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    f = torch.cos((t / timesteps + s) / (1 + s) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# ---- 2. Diffusion ----------------------------------------------------------------------------------------------------
def extract(coefficients, t, x):
    """Returns coefficients[t] in x's dtype, shaped (B, 1, …, 1) to broadcast against x (B, …). Raises ValueError if x
    holds integers. (gather refuses a negative t, which indexing would count from the end.)"""
    if not x.is_floating_point():
        raise ValueError(f"images must be floats scaled to [-1, 1], got {x.dtype}")
    if not torch.is_tensor(t):
        t = torch.full((len(x),), t, device=x.device)
    values = coefficients.gather(0, t).to(x.dtype)
    return values.reshape(-1, *[1] * (x.dim() - 1))


def sample_noise(like, generator=None, noise=None):
    """Returns noise if it is given, else a sample of N(0, I) shaped like a tensor, on its device, in its dtype.
    generator is a torch.Generator, or a list of them, one for each image."""
    if noise is not None:
        return noise.view_as(like)  # raises for another number of values, which would broadcast
    if isinstance(generator, list):
        return torch.stack([sample_noise(x, each) for x, each in zip(like, generator, strict=True)])
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def last(iterable):
    """The last item of an iterable: x_0 of a sampler's steps."""
    for item in iterable:
        result = item
    return result


VARIANCES = ("fixed_large", "fixed_small", "learned_range")
LOSSES = ("simple", "bound")
PREDICTIONS = ("noise", "velocity")


class GaussianDiffusion(nn.Module):
    """The forward process q (Eq. 2), the reverse process p_θ (Eq. 1), the losses and the samplers for betas (T,).

    A model is any callable model(x_t, t), t being int64 (B,), that returns its prediction, shaped like x_t; with a
    learned variance also v, concatenated to the prediction's channels.

    prediction: "noise" is ε_θ; "velocity" is √ᾱ_t ε − √(1−ᾱ_t) x_0, known as v-prediction (Salimans & Ho, 2022, §4).
    variance is σ_t² of p_θ (§3.2): "fixed_large" is β_t, optimal if x_0 ~ N(0, I); "fixed_small" is β̃_t, optimal if
    x_0 is a single point; "learned_range" interpolates between their logarithms with v (Improved DDPM Eq. 15).
    loss: "simple" is Eq. 14; "bound" is Eq. 5. dtype is that of the coefficients, buffers outside the state dict.

    Raises ValueError unless 0 < β_t < 1 and dtype is a float type, and for an unknown option. Warns if √ᾱ_{T−1} > 0.05:
    x_T then still contains x_0, so that sampling from N(0, I) starts from the wrong distribution."""

    def __init__(self, betas, variance="fixed_large", loss="simple", dtype=torch.float32, prediction="noise"):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if not ((betas > 0) & (betas < 1)).all() or not dtype.is_floating_point:
            raise ValueError(f"betas must lie between 0 and 1 as floats, got {betas.min():g}…{betas.max():g}, {dtype}")
        for option, choices in ((variance, VARIANCES), (loss, LOSSES), (prediction, PREDICTIONS)):
            if option not in choices:
                raise ValueError(f"{option!r} must be one of {', '.join(choices)}")
        self.timesteps = len(betas)
        self.variance_type = variance
        self.loss_type = loss
        self.prediction_type = prediction

        # α_t, ᾱ_t, ᾱ_{t−1} and β̃_t (Eq. 7)
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # float64 for the samplers; index −1 is x_0

        # β̃_0 = 0 has no logarithm: as in the authors' code, log β̃_1 replaces it (if T = 1, log β_0)
        positive_variance = posterior_variance.clone()
        positive_variance[0] = posterior_variance[1] if len(betas) > 1 else betas[0]

        # The factors of the formulas below; posterior_mean_… are those of Eq. 7
        coefficients = dict(
            betas=betas,
            log_betas=betas.log(),
            alphas_cumprod=alphas_cumprod,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
            posterior_variance=posterior_variance,
            posterior_log_variance=positive_variance.log(),
            posterior_mean_x_start=alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod),
            posterior_mean_x_t=alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
            t_is_positive=torch.arange(len(betas)) > 0,
        )
        for name, coefficient in coefficients.items():
            self.register_buffer(name, coefficient.to(dtype), persistent=False)

        signal_left = math.sqrt(alphas_cumprod[-1])
        if signal_left > 0.05:
            warnings.warn(f"√ᾱ_{{T−1}} = {signal_left:.3f} is above 0.05: x_T still contains x_0", stacklevel=2)

    # -- Forward process --
    def q_sample(self, x_start, t, noise=None):
        """Sample x_t ~ q(x_t|x_0) in one step: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε (Eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise.view_as(x_start)
        mean = extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return mean + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start, x_t, t):
        """Returns mean, variance and log variance of q(x_{t−1}|x_t, x_0) (Eq. 6, 7):
        μ̃_t = √ᾱ_{t−1} β_t/(1−ᾱ_t) · x_0 + √α_t (1−ᾱ_{t−1})/(1−ᾱ_t) · x_t and β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t) · β_t.
        At t = 0 the variance is 0, and its logarithm is replaced by that at t = 1."""
        mean = extract(self.posterior_mean_x_start, t, x_t) * x_start
        mean = mean + extract(self.posterior_mean_x_t, t, x_t) * x_t
        variance = extract(self.posterior_variance, t, x_t)
        log_variance = extract(self.posterior_log_variance, t, x_t)
        return mean, variance, log_variance

    # -- Training loss --
    def p_losses(self, model, x_start, t, noise=None):
        """Returns the loss, a scalar: ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖², averaged over all values (Eq. 14).

        For a velocity it is the squared error of the velocity, 1/ᾱ_t times that of ε. A learned variance adds
        0.001 L_vlb without gradient through x̂_0, so that the bound trains v only (L_hybrid, Improved DDPM Eq. 16).
        loss="bound" is L in bits/dim without the constant L_T (Eq. 5). For a fixed variance and t > 0 its terms are the
        squared error weighted as in Eq. 12, plus a constant. Both bounds are unbiased only if t is drawn uniformly."""
        noise = torch.randn_like(x_start) if noise is None else noise.view_as(x_start)
        x_t = self.q_sample(x_start, t, noise)
        pred_x_start, predicted_noise, v = self.predict(model, x_t, t)
        loss = (noise - predicted_noise).square().mean()  # Eq. 14

        # A velocity's error: √ᾱ_t (ε − ε_θ) − √(1−ᾱ_t) (x_0 − x̂_0), in the form of Eq. 4
        if self.prediction_type == "velocity":
            loss = self.q_sample(noise - predicted_noise, t, pred_x_start - x_start).square().mean()
        if self.loss_type == "bound":  # Eq. 5
            loss = self.timesteps * self.bound_term(x_start, x_t, t, pred_x_start, v).mean()
        elif v is not None:  # L_hybrid
            bound = self.bound_term(x_start, x_t, t, pred_x_start.detach(), v)
            loss = loss + 0.001 * self.timesteps * bound.mean()
        return loss

    # -- Reverse process --
    def predict_x_start(self, x_t, t, noise):
        """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ) / √ᾱ_t (Eq. 15)."""
        signal_part = x_t - extract(self.sqrt_one_minus_alphas_cumprod, t, x_t) * noise.view_as(x_t)
        return signal_part / extract(self.sqrt_alphas_cumprod, t, x_t)

    def predict_noise(self, x_t, t, x_start):
        """ε = (x_t − √ᾱ_t x_0) / √(1−ᾱ_t): Eq. 4 solved for ε."""
        noise_part = x_t - extract(self.sqrt_alphas_cumprod, t, x_t) * x_start.view_as(x_t)
        return noise_part / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def predict(self, model, x_t, t, clip_denoised=False):
        """Calls the model. Returns x̂_0, ε_θ, and v (None if the variance is fixed), in x_t's dtype. clip_denoised
        clamps x̂_0 to [−1, 1]; ε_θ is then recomputed from it and x_t (Eq. 4). Raises ValueError for a wrong shape."""
        if not torch.is_tensor(t):
            t = torch.full((len(x_t),), t, device=x_t.device)
        prediction = model(x_t, t).to(x_t.dtype)
        parts = 2 if self.variance_type == "learned_range" else 1
        wanted = (len(x_t), parts * x_t.shape[1], *x_t.shape[2:])
        if prediction.shape != wanted:
            raise ValueError(f"the model must return {wanted} for {self.variance_type}, got {tuple(prediction.shape)}")
        v = None
        if parts == 2:
            prediction, v = prediction.chunk(2, dim=1)

        if self.prediction_type == "noise":
            predicted_noise = prediction
            pred_x_start = self.predict_x_start(x_t, t, predicted_noise)
        else:  # by Eq. 4's factors: √ᾱ_t x_t − √(1−ᾱ_t) velocity, and √ᾱ_t velocity + √(1−ᾱ_t) x_t
            pred_x_start = self.q_sample(x_t, t, -prediction)
            predicted_noise = self.q_sample(prediction, t, x_t)
        if clip_denoised:
            pred_x_start = pred_x_start.clamp(-1, 1)
            predicted_noise = self.predict_noise(x_t, t, pred_x_start)
        return pred_x_start, predicted_noise, v

    def p_posterior(self, pred_x_start, x_t, t, v):
        """Returns mean, variance and log variance of p_θ(x_{t−1}|x_t) for a given x̂_0: μ_θ = μ̃_t(x_t, x̂_0) (Eq. 11)."""
        mean, variance, log_variance = self.q_posterior(pred_x_start, x_t, t)  # Eq. 11, and β̃_t
        if self.variance_type == "fixed_large":  # at t = 0 the authors' code has log β̃_1, for a lower L_0
            variance = extract(self.betas, t, x_t)
            log_variance = extract(self.log_betas, t, x_t)
        elif self.variance_type == "learned_range":
            log_variance = v * extract(self.log_betas, t, x_t) + (1 - v) * log_variance
            variance = log_variance.exp()
        return mean, variance, log_variance

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        """Returns μ_θ, σ_t² and log σ_t² of p_θ(x_{t−1}|x_t), and x̂_0. clip_denoised first clamps x̂_0 to [−1, 1], as
        the authors' code does although the paper does not say so: no image lies outside, and early in sampling, where
        1/√ᾱ_t magnifies every error of ε_θ, the clamp keeps colours from saturating."""
        pred_x_start, _, v = self.predict(model, x_t, t, clip_denoised)
        return *self.p_posterior(pred_x_start, x_t, t, v), pred_x_start

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip_denoised=True, noise=None, generator=None):
        """One step of Algorithm 2: x_{t−1} = μ_θ(x_t, t) + σ_t z with z ~ N(0, I), but z = 0 at t = 0. If x̂_0 is not
        clamped, μ_θ is exactly (x_t − β_t/√(1−ᾱ_t) ε_θ) / √α_t (Eq. 11)."""
        mean, variance, _, _ = self.p_mean_variance(model, x_t, t, clip_denoised)
        z = sample_noise(x_t, generator, noise) * extract(self.t_is_positive, t, x_t)
        return mean + variance.sqrt() * z

    def p_sample_steps(self, model, x_t, t=None, clip_denoised=True, generator=None):
        """Algorithm 2 step by step, for progress bars and animations, from x_t at an int t (default: T−1) to x_0."""
        start = self.timesteps - 1 if t is None else t
        for t in range(start, -1, -1):
            x_t = self.p_sample(model, x_t, t, clip_denoised, generator=generator)
            yield x_t

    def p_sample_loop(self, model, shape, clip_denoised=True, noise=None, generator=None):
        """Algorithm 2: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(self.betas.new_empty(shape), generator, noise)
        return last(self.p_sample_steps(model, x_t, clip_denoised=clip_denoised, generator=generator))

    # -- Variational bound, score, interpolation --
    def bound_term(self, x_start, x_t, t, pred_x_start, v):
        """The term of Eq. 5 at t, estimated from x_t and the prediction for it, in bits/dim (B,): at t = 0
        L_0 = −log p_θ(x_0|x_1) (Eq. 13), else L_t = KL(q(x_{t−1}|x_t, x_0) ‖ p_θ(x_{t−1}|x_t)), in the paper L_{t−1},
        which Eq. 8 to 12 rewrite for a fixed σ_t². A loss must not clamp x̂_0: no gradient flows through the clamp."""
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        mean, _, log_variance = self.p_posterior(pred_x_start, x_t, t, v)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        decoder = -discretized_gaussian_log_likelihood(x_start, mean, log_variance)
        term = torch.where(extract(self.t_is_positive, t, x_t) > 0, kl, decoder)
        return term.flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, model, x_start, clip_denoised=True, generator=None):
        """The bound on −log₂ p_θ(x_0) (Eq. 3) in bits/dim, term by term (Eq. 5, 13), with one sample of ε for each t.
        Returns a dict: "total" (B,) is the sum of "L_T" (B,), "L_{t-1}" (B, T−1), its columns L_1 to L_{T−1}, and
        "L_0" (B,); "squared_error" (B, T) of x̂_0 is on the [−1, 1] scale: 127.5 times its root is Fig. 5's RMSE.
        x_start holds 8-bit pixels scaled to [−1, 1]; L_0 is meaningless for other data."""
        terms = []
        squared_errors = []
        for t in range(self.timesteps):
            x_t = self.q_sample(x_start, t, sample_noise(x_start, generator))
            pred_x_start, _, v = self.predict(model, x_t, t, clip_denoised)
            terms.append(self.bound_term(x_start, x_t, t, pred_x_start, v))
            squared_errors.append((pred_x_start - x_start).square().flatten(1).mean(1))
        terms = torch.stack(terms, dim=1)

        # L_T = KL(q(x_T|x_0) ‖ N(0, I))
        mean = self.sqrt_alphas_cumprod[-1] * x_start
        log_variance = self.sqrt_one_minus_alphas_cumprod[-1].square().log()
        zero = torch.zeros_like(mean)
        kl = normal_kl(mean, log_variance, zero, zero)
        prior = kl.flatten(1).mean(1) / math.log(2)
        return {
            "L_T": prior,
            "L_{t-1}": terms[:, 1:],
            "L_0": terms[:, 0],
            "total": prior + terms.sum(1),
            "squared_error": torch.stack(squared_errors, dim=1),
        }

    def score(self, model, x_t, t):
        """∇_{x_t} log q(x_t) ≈ −ε_θ(x_t, t) / √(1−ᾱ_t): ε_θ is the score, up to a factor (§3.2)."""
        _, predicted_noise, _ = self.predict(model, x_t, t)
        return -predicted_noise / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def interpolate(self, model, x_start_a, x_start_b, t, weight, noise=None, generator=None):
        """Diffuse two images to the same int t, mix them, (1−λ) x_t + λ x'_t with λ = weight, and denoise from t
        (Fig. 8). Both get the same noise, which the paper leaves open, so that the mixture has t's noise level."""
        noise = sample_noise(x_start_a, generator, noise)
        x_t_a = self.q_sample(x_start_a, t, noise)
        x_t_b = self.q_sample(x_start_b, t, noise)
        x_t = (1 - weight) * x_t_a + weight * x_t_b
        return last(self.p_sample_steps(model, x_t, t, generator=generator))

    # -- Fewer steps: DDIM --
    def ddim_timesteps(self, steps):
        """Returns S = steps distinct timesteps, a list of ints, evenly spaced and decreasing from T−1, the only t at
        which the network has seen pure noise ("trailing", Lin et al., 2023). Raises ValueError unless 1 ≤ S ≤ T."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"the sampling steps must lie in 1…{self.timesteps}, got {steps}")
        return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]

    def ddim_mean(self, pred_x_start, predicted_noise, s, sigma=0.0):
        """√ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε_θ at an int s (DDIM Eq. 12 without σ z); for σ = 0 this is Eq. 4."""
        alpha_bar_s = self.alpha_bars[s]
        return math.sqrt(alpha_bar_s) * pred_x_start + math.sqrt(1 - alpha_bar_s - sigma**2) * predicted_noise

    @torch.no_grad()
    def ddim_sample(self, model, x_t, t, prev_t, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """One step of DDIM from t to an earlier s = prev_t, both ints (DDIM Eq. 12, 16):
        x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε_θ(x_t) + σ z with σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s). η = 0 is deterministic;
        η = 1 over all T steps is Algorithm 2 with σ_t² = β̃_t. Raises ValueError unless −1 ≤ s < t and 0 ≤ η ≤ 1."""
        if not (-1 <= prev_t < t and 0 <= eta <= 1):
            raise ValueError(f"DDIM needs -1 <= prev_t < t and 0 <= eta <= 1, got t={t}, prev_t={prev_t}, eta={eta}")
        pred_x_start, predicted_noise, _ = self.predict(model, x_t, t, clip_denoised)
        alpha_bar_t = self.alpha_bars[t]
        alpha_bar_s = self.alpha_bars[prev_t]
        sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * math.sqrt(1 - alpha_bar_t / alpha_bar_s)
        mean = self.ddim_mean(pred_x_start, predicted_noise, prev_t, sigma)
        z = 0.0 if eta == 0 and noise is None else sample_noise(x_t, generator, noise)  # which checks a given noise
        return mean + sigma * z

    def ddim_sample_steps(self, model, x_t, steps, eta=0.0, clip_denoised=True, generator=None):
        """DDIM from x_T = x_t step by step: yields as many tensors as steps, the last of which is x_0."""
        for t, prev_t in itertools.pairwise([*self.ddim_timesteps(steps), -1]):
            x_t = self.ddim_sample(model, x_t, t, prev_t, eta, clip_denoised, generator=generator)
            yield x_t

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """DDIM in S = steps steps: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(self.betas.new_empty(shape), generator, noise)
        return last(self.ddim_sample_steps(model, x_t, steps, eta, clip_denoised, generator))

    @torch.no_grad()
    def ddim_encode_loop(self, model, x_start, steps, clip_denoised=True):
        """DDIM's step with η = 0 upwards in S = steps steps, from x_0 to the x_T from which ddim_sample_loop returns
        x_0, up to an error that falls as 1/S (DDIM §4.3). ε_θ(x_0) is evaluated at t = 0, for lack of t = −1."""
        timesteps = self.ddim_timesteps(steps)[::-1]
        _, predicted_noise, _ = self.predict(model, x_start, 0)
        x_t = self.ddim_mean(x_start, predicted_noise, timesteps[0])
        for t, next_t in itertools.pairwise(timesteps):
            pred_x_start, predicted_noise, _ = self.predict(model, x_t, t, clip_denoised)
            x_t = self.ddim_mean(pred_x_start, predicted_noise, next_t)
        return x_t

    # -- Fewer steps: DPM-Solver++ --
    def half_log_snr(self, t):
        """λ_t = ½ log(ᾱ_t/(1−ᾱ_t)) at an int t, half the logarithm of the signal-to-noise ratio, as a float."""
        return 0.5 * math.log(self.alpha_bars[t] / (1 - self.alpha_bars[t]))

    def dpm_solver_timesteps(self, steps):
        """Returns S = steps distinct timesteps, a list of ints decreasing from T−1: the starts of S equal steps of λ
        up to λ_0, rounded to timesteps. They begin at λ_{T−1}, but not below −5.1, where x_t is noise and a call
        changes nothing: the cosine schedule reaches −10. Raises ValueError unless 1 ≤ S ≤ T."""
        timesteps = self.ddim_timesteps(steps)[:1]  # T−1 alone; raises unless 1 ≤ S ≤ T
        lambdas = np.array([self.half_log_snr(t) for t in range(self.timesteps)])
        even = np.linspace(max(lambdas[-1], -5.1), lambdas[0], steps, endpoint=False)
        for i in range(1, steps):
            nearest = int(np.abs(lambdas - even[i]).argmin())
            # Below the timestep before, and with room for those after it
            timesteps.append(min(timesteps[-1] - 1, max(nearest, steps - 1 - i)))
        return timesteps

    @torch.no_grad()
    def dpm_solver_sample_steps(self, model, x_t, steps, clip_denoised=True):
        """DPM-Solver++(2M) step by step (Lu et al., 2022): DDIM's step with η = 0 from t to s, but x̂_0 is extrapolated
        from x̂_0(x_t) and x̂_0(x_r), r > t being the previous step's: x̂_0(x_t) + h/(2h′) (x̂_0(x_t) − x̂_0(x_r)) with
        h = λ_s − λ_t and h′ = λ_t − λ_r; then ε from it and x_t (Eq. 4). The first and the last step are DDIM's."""
        r = pred_x_start_r = None  # the previous step's timestep, and x̂_0 there
        for t, s in itertools.pairwise([*self.dpm_solver_timesteps(steps), -1]):
            pred_x_start, predicted_noise, _ = self.predict(model, x_t, t, clip_denoised)
            extrapolated = pred_x_start
            if r is not None and s >= 0:
                h = self.half_log_snr(s) - self.half_log_snr(t)
                previous_h = self.half_log_snr(t) - self.half_log_snr(r)
                extrapolated = pred_x_start + h / (2 * previous_h) * (pred_x_start - pred_x_start_r)
                if clip_denoised:
                    extrapolated = extrapolated.clamp(-1, 1)
                predicted_noise = self.predict_noise(x_t, t, extrapolated)
            x_t = self.ddim_mean(extrapolated, predicted_noise, s)
            r = t
            pred_x_start_r = pred_x_start
            yield x_t

    def dpm_solver_sample_loop(self, model, shape, steps, clip_denoised=True, noise=None, generator=None):
        """DPM-Solver++(2M) in S = steps steps: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(self.betas.new_empty(shape), generator, noise)
        return last(self.dpm_solver_sample_steps(model, x_t, steps, clip_denoised))

    # -- Fewer steps: Algorithm 2 --
    def respace(self, model, steps):
        """Algorithm 2 in S = steps steps (Improved DDPM §4). Returns a diffusion over ddim_timesteps(S) only, whose
        β' = 1 − ᾱ_t/ᾱ_s for neighbours s < t, and the model for it, which sees the original t."""
        timesteps = self.ddim_timesteps(steps)[::-1]
        neighbours = itertools.pairwise([-1, *timesteps])
        betas = [1 - self.alpha_bars[t] / self.alpha_bars[s] for s, t in neighbours]
        diffusion = GaussianDiffusion(
            betas,
            variance=self.variance_type,
            loss=self.loss_type,
            dtype=self.betas.dtype,
            prediction=self.prediction_type,
        )
        original_t = torch.tensor(timesteps, device=self.betas.device)
        return diffusion.to(self.betas.device), lambda x_t, t: model(x_t, original_t[t])


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)) in nats, elementwise."""
    variance_ratio = torch.exp(log_variance1 - log_variance2)
    squared_distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + variance_ratio + squared_distance)


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    """log p(x) in nats, elementwise: the log of the mass of N(mean, e^log_variance) on [x − 1/255, x + 1/255], where
    the bin of −1 extends to −∞ and that of 1 to +∞ (Eq. 13). x holds 8-bit pixels scaled to [−1, 1]."""
    sigma = torch.exp(0.5 * log_variance)
    upper = (x + 1 / 255 - mean) / sigma
    lower = (x - 1 / 255 - mean) / sigma

    # log Φ is accurate in the left tail only, so bins right of the mean are mirrored: Φ(b) − Φ(a) = Φ(−a) − Φ(−b).
    log_near = torch.special.log_ndtr(torch.where(x < mean, upper, -lower))
    log_far = torch.special.log_ndtr(torch.where(x < mean, lower, -upper))
    inside = log_near + torch.log(-torch.expm1(log_far - log_near))
    at_the_ends = torch.special.log_ndtr(torch.where(x < 0, upper, -lower))
    return torch.where(x.abs() > 0.999, at_the_ends, inside)


# ---- 3. Guidance -----------------------------------------------------------------------------------------------------
def classifier_free_guidance(model, labels, scale):
    """ε̃ = (1 + w) ε_θ(x_t, c) − w ε_θ(x_t), w = scale (Ho & Salimans, 2022). Returns a model(x_t, t) for any sampler.

    labels is int64 (B,). model(x_t, t, y) takes y = model.num_classes for "no label"; with and without labels run as
    one batch. w = 0 is conditional sampling without guidance, w = −1 unconditional sampling. Velocities mix in the same
    way; a learned variance is that of the prediction with labels."""

    def guided(x_t, t):
        if scale == 0:
            return model(x_t, t, labels)
        both_labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both_labels)
        conditional, unconditional = both.chunk(2)
        c = x_t.shape[1]  # further channels are v
        prediction = (1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]
        return torch.cat([prediction, conditional[:, c:]], dim=1)

    return guided


# ---- 4. Network ------------------------------------------------------------------------------------------------------
# The paper's U-Net (appendix B). Modules are named as in diffusers, so that published weights load (section 10).
def group_norm(channels, groups):
    """Group normalisation with gcd(channels, groups) groups; the paper has 32."""
    return nn.GroupNorm(math.gcd(channels, groups), channels, eps=1e-6)


def zero(module):
    """Zero-initialise a module, so that the residual branch or the network that it ends starts as 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_position_embeddings(t, dim):
    """t (B,) → (B, dim): sin(t ω_i), then cos(t ω_i), with frequencies ω_i falling geometrically from 1 to 1/10000."""
    half = dim // 2
    omega = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection, and the time embedding between them."""

    def __init__(self, in_channels, out_channels, time_dim, dropout, groups):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """softmax(q kᵀ/√C) v with one head and a residual connection: every pixel attends to every other."""

    def __init__(self, channels, groups=32):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(zero(nn.Linear(channels, channels)))  # published as to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT  # (B, HW, C)
        # Plain products: F.scaled_dot_product_attention is slower in bfloat16 at these small sizes.
        q = self.to_q(h) / math.sqrt(h.shape[2])
        k = self.to_k(h)
        v = self.to_v(h)
        h = self.to_out((q @ k.mT).softmax(2) @ v)
        return x + h.mT.reshape(x.shape)


class Downsample(nn.Module):
    """Halve the size with a stride-2 convolution, padded right and bottom only, as TensorFlow's SAME does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest-neighbour interpolation, followed by a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The layers of one resolution: a residual block for each number in in_channels, each followed by attention or by
    nothing. UNet adds the layer that changes the size. The names are diffusers'."""

    def __init__(self, in_channels, out_channels, time_dim, dropout, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        for channels in in_channels:
            self.resnets.append(ResidualBlock(channels, out_channels, time_dim, dropout, groups))
            self.attentions.append(AttentionBlock(out_channels, groups) if attention else nn.Identity())


class UNet(nn.Module):
    """ε_θ(x_t, t), or ε_θ(x_t, t, y) with num_classes. UNet() is the paper's CIFAR-10 network, 35,746,307 parameters.

    Norms have up to 32 groups as in the paper if dim ≥ 128, else up to dim/16, because many small groups are slow on a
    CPU. Raises ValueError unless image_size is a multiple of 2^(number of levels − 1) and num_res_blocks > 0."""

    def __init__(
        self,
        image_channels=3,
        dim=128,  # channels at full resolution, even and at least 4
        dim_mults=(1, 2, 2, 2),  # channels of each level, in multiples of dim; each level halves the size
        num_res_blocks=2,  # per level on the way down; there is one more on the way up
        attn_resolutions=(16,),  # sizes at which attention follows each residual block; if any, also in the middle
        image_size=32,  # which decides the levels that have attention; a multiple of 2^(number of levels − 1)
        dropout=0.1,  # in the residual blocks
        time_dim=None,  # width of the time embedding (default: 4 dim)
        num_classes=None,  # labels y are int64 (B,); num_classes itself, or y = None, means "no label"
        learned_variance=False,  # twice the output channels, for v
    ):
        super().__init__()
        halvings = len(dim_mults) - 1
        if image_size % 2**halvings or num_res_blocks < 1:
            needed = f"image_size a multiple of {2**halvings}, num_res_blocks at least 1"
            raise ValueError(f"needed: {needed}; got {image_size} and {num_res_blocks}")
        self.image_channels = image_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.dim = dim

        # Time and label
        time_dim = time_dim or 4 * dim
        layers = OrderedDict(
            linear_1=nn.Linear(dim, time_dim),
            silu=nn.SiLU(),
            linear_2=nn.Linear(time_dim, time_dim),
        )
        self.time_embedding = nn.Sequential(layers)
        self.class_embedding = nn.Embedding(num_classes + 1, time_dim) if num_classes else None

        # Down; skip_channels are the channels of each skip connection, in order.
        groups = 32 if dim >= 128 else max(1, dim // 16)
        new_level = partial(Level, time_dim=time_dim, dropout=dropout, groups=groups)
        widths = [dim * mult for mult in dim_mults]
        channels = dim
        skip_channels = [dim]
        self.conv_in = nn.Conv2d(image_channels, dim, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            in_channels = [channels] + [width] * (num_res_blocks - 1)
            level = new_level(in_channels, width, attention=image_size >> i in attn_resolutions)
            skip_channels += [width] * num_res_blocks
            channels = width
            if i < halvings:
                level.downsamplers.append(Downsample(width))
                skip_channels.append(width)
            self.down_blocks.append(level)

        # Middle
        self.mid_block = new_level([channels, channels], channels, attention=bool(attn_resolutions))
        self.mid_block.attentions[1] = nn.Identity()  # attention stands between the two blocks only

        # Up: each residual block also takes the last skip connection that is left
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            in_channels = []
            for _ in range(num_res_blocks + 1):
                in_channels.append(channels + skip_channels.pop())
                channels = width
            level = new_level(in_channels, width, attention=image_size >> i in attn_resolutions)
            if i > 0:
                level.upsamplers.append(Upsample(width))
            self.up_blocks.append(level)

        self.conv_norm_out = group_norm(channels, groups)
        out_channels = image_channels * (2 if learned_variance else 1)
        self.conv_out = zero(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x, t, y=None):
        if y is not None and self.class_embedding is None:
            raise ValueError("labels given to a network that was built without num_classes")

        # Time and label; view raises unless there is one of each for every image: one would broadcast.
        t = t.view(len(x))
        emb = self.time_embedding(sinusoidal_position_embeddings(t, self.dim).to(x.dtype))
        if self.class_embedding is not None:
            y = torch.full_like(t, self.num_classes) if y is None else y.view(len(x))
            emb = emb + self.class_embedding(y)

        # Down
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(block(h, emb))
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)

        # Middle
        for block, attention in zip(self.mid_block.resnets, self.mid_block.attentions, strict=True):
            h = attention(block(h, emb))

        # Up
        for level in self.up_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                h = torch.cat([h, skips.pop()], dim=1)
                h = attention(block(h, emb))
            for upsample in level.upsamplers:
                h = upsample(h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))


# ---- 5. Training: Algorithm 1 ----------------------------------------------------------------------------------------
def train(config, checkpoint=None, watch=None):
    """Algorithm 1, with Adam, a moving average of the weights (EMA), a log and checkpoints. Returns the run's folder.
    checkpoint, from read_checkpoint, resumes a run. watch(run, step) is called every config.sample_every steps and at
    the end (default: Run.write_grid). Under torchrun the processes share each batch; rank 0 writes; others return None.

    A resumed run equals an uninterrupted one, bit for bit on a CPU: a step draws by (seed, step, rank) alone. SIGINT,
    SIGTERM and SIGHUP end it after a step, with a checkpoint and KeyboardInterrupt. Raises ValueError if the loss or
    the gradient is not finite; no checkpoint then holds it."""
    # Data, network, diffusion
    device = pick_device(config.device)
    rank, world_size = join_processes(config, device)
    training_set, held_out_set, classes = load_training_data(config, device)
    images, labels = training_set
    torch.manual_seed(derive_seed(config.seed, "weights"))
    network = build_network(config, images.shape[1], classes).to(device, memory_format=torch.channels_last)
    diffusion = build_diffusion(config).to(device)
    ema = copy.deepcopy(network).eval()
    optimizer = torch.optim.Adam(network.parameters(), config.lr, fused=True)

    # The state of an earlier run
    first_step = 0
    rows = ["step,loss,gradient_norm,learning_rate,ema_loss,ema_loss_held_out\n"]
    if checkpoint is not None:
        if checkpoint["classes"] != classes:
            raise ValueError(f"{config.data} has the classes {classes}, the run {config.out} {checkpoint['classes']}")
        network.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]
        rows = checkpoint["log"]
    if first_step >= config.steps:
        raise ValueError(f"{config.out} was trained for {first_step:,} steps: give --steps a larger number")

    # The model that the loop calls, and the run's folder
    model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
    model = maybe_compile(config, device, model)
    out = None
    if rank == 0:
        out = new_folder(config) if checkpoint is None else Path(config.out)
        config = replace(config, out=str(out))
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"{num_parameters:,} parameters, {device}, {config.steps - first_step:,} steps into {out}")

    history = []  # losses and gradient norms since the last row of the log, on the device, so that no step waits for it
    bar = tqdm(total=config.steps, initial=first_step, unit=" steps", disable=None if rank == 0 else True)
    with bar, record_signals() as signals:
        for step in range(first_step, config.steps):
            torch.manual_seed(derive_seed(config.seed, "training", step, rank))
            chosen = torch.randint(len(images), (config.batch_size // world_size,), device=device)

            # fmt: off
            x_start = to_model(images[chosen])                                                 # x_0 ~ q(x_0)
            if config.flip:
                flipped = torch.rand(len(chosen), 1, 1, 1, device=device) < 0.5
                x_start = torch.where(flipped, x_start.flip(3), x_start)
            y = None
            if classes:  # some labels are hidden, so that the network learns ε_θ(x_t) too, which guidance needs
                hidden = torch.rand(len(chosen), device=device) < config.label_dropout
                y = labels[chosen].masked_fill(hidden, len(classes))
            t = torch.randint(diffusion.timesteps, (len(chosen),), device=device)              # t ~ Uniform({0…T−1})
            noise = torch.randn_like(x_start)                                                  # ε ~ N(0, I)
            with autocast(config, device):
                loss = diffusion.p_losses(partial(model, y=y), x_start, t, noise)
            loss.backward()                                                                    # ∇_θ ‖ε − ε_θ(x_t, t)‖²
            # fmt: on
            gradient_norm = nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
            lr = learning_rate(config, step)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            ema_update(ema, network, step, config.ema_decay)

            # Is anything due? All processes stop after the same step.
            history.append(torch.stack([loss.detach(), gradient_norm]))
            bar.update()
            done = step + 1
            stop = torch.tensor(len(signals))
            if world_size > 1:
                dist.all_reduce(stop)
            draw = done == config.steps or done % config.sample_every == 0
            save = done == config.steps or done % config.checkpoint_every == 0 or stop
            if not (draw or save or done % config.log_every == 0):
                continue

            # Log: means since the row before, over all processes; checkpoint, samples
            means = torch.stack(history).mean(0) / world_size
            if world_size > 1:
                dist.all_reduce(means)
            mean_loss, mean_norm = means.tolist()
            if not math.isfinite(mean_loss + mean_norm):
                first = done - len(history) + 1
                raise ValueError(f"loss or gradient is not finite in steps {first}…{done}; a smaller --lr may help")
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            if rank == 0:
                compared = ","  # ema_loss and ema_loss_held_out: empty
                if draw and len(held_out_set[0]):
                    seen = ema_loss(config, diffusion, ema, *training_set)
                    unseen = ema_loss(config, diffusion, ema, *held_out_set)
                    compared = f"{seen:.6f},{unseen:.6f}"
                    bar.write(f"step {done:,}: EMA loss {seen:.6f} on training images, {unseen:.6f} on held-out images")
                rows.append(f"{done},{mean_loss:.6f},{mean_norm:.4f},{lr:.3g},{compared}\n")
                with suppress(PermissionError):  # a spreadsheet may lock it; the next row rewrites all
                    (out / "log.csv").write_text("".join(rows))
                if save:
                    state = dict(
                        config=vars(config),
                        classes=classes,
                        step=done,
                        model=network.state_dict(),
                        ema=ema.state_dict(),
                        optimizer=optimizer.state_dict(),
                        log=rows,
                    )
                    save_atomically(state, out / "checkpoint.pt")
                if draw:
                    (watch or Run.write_grid)(Run(config, ema, diffusion, classes, device), done)
            if stop:
                break
            history.clear()

    if world_size > 1:
        time.sleep(0.2)  # without this pause torch 2.6 may hang in the next line
        dist.destroy_process_group()
    if stop and done < config.steps and rank == 0:
        resume = f"python ddpm.py --train --resume --out={shlex.quote(str(out))}"
        raise KeyboardInterrupt(f"stopped after step {done:,}, which {out}/checkpoint.pt holds; go on with: {resume}")
    return out


def learning_rate(config, step):
    """Adam's learning rate at a step: it rises linearly to config.lr over config.warmup steps. With config.lr_decay
    "linear" it is also multiplied by 1 − step/steps, which reaches 0 after the last step."""
    factor = min(1.0, (step + 1) / (config.warmup + 1))
    if config.lr_decay == "linear":
        factor *= 1 - step / config.steps
    return config.lr * factor


@torch.no_grad()
def ema_update(averaged, model, n, decay):
    """w̄ ← d w̄ + (1 − d) w for all weights, with d = min(decay, (1 + n)/(10 + n)) after n updates, so that a short run
    does not average its initial weights; the first update copies the weights."""
    d = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - d)


@torch.no_grad()
def ema_loss(config, diffusion, ema, images, labels):
    """The loss of the averaged weights on 512 images, evenly spaced over a dataset and repeated if it has fewer, with
    the same t and ε every time. If it rises on held-out images and falls on training images, the network memorises."""
    chosen = torch.arange(512) * len(images) // 512
    torch.manual_seed(derive_seed(config.seed, "comparison"))
    timesteps = torch.randperm(len(chosen), device=images.device) * diffusion.timesteps // len(chosen)
    losses = []
    for indices, t in zip(chosen.split(64), timesteps.split(64), strict=True):
        y = labels[indices] if ema.num_classes else None
        with autocast(config, images.device):
            loss = diffusion.p_losses(partial(ema, y=y), to_model(images[indices]), t)
        losses.append(loss.item())
    return sum(losses) / len(losses)


# ======================================================================================================================
# The paper ends here; what follows runs it: data, configuration, devices, files, published weights, the command line.
# ======================================================================================================================

# ---- 6. Data ---------------------------------------------------------------------------------------------------------
TORCHVISION = dict(
    mnist=datasets.MNIST,
    fashion_mnist=datasets.FashionMNIST,
    cifar10=datasets.CIFAR10,
)
DATASETS = ("digits", *TORCHVISION)
IMAGE_SUFFIXES = set(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm .avif".split())


def load_data(name_or_folder, image_size=32, split=None):
    """Returns images, uint8 (N, C, H, W), and labels, int64 (N,) or None. Raises ValueError if they can't be read.

    "digits" is assets/digits.png; "mnist", "fashion_mnist" and "cifar10" are torchvision's, downloaded into data/.
    Anything else is a folder of images, resized and cropped to image_size; its subfolders are the classes.
    split="test" is what training does not see: torchvision's test set, every tenth of the digits, and those images of a
    folder whose file has a CRC-32 divisible by ten, unless that is a whole class; "train" is the rest, None is all."""
    images, labels, classes, held_out = read_data(name_or_folder, image_size)
    chosen = {None: slice(None), "train": ~held_out, "test": held_out}[split]
    return images[chosen], labels[chosen] if classes else None


def read_data(name_or_folder, image_size):
    """Returns images, labels, the names of the classes (None without classes), and bool (N,): which are held out."""
    if name_or_folder == "digits":
        return load_digits()
    if name_or_folder in TORCHVISION:
        return load_torchvision(name_or_folder)
    return load_folder(name_or_folder, image_size)


def load_digits():
    """The 1,797 digits of assets/digits.png: ten rows of 8×8 tiles, one row a digit, padded with black tiles."""
    path = Path(__file__).parent / "assets/digits.png"
    if not path.exists():
        raise ValueError(f"digits needs {path}, which comes with ddpm.py's repository; --data takes a folder of images")
    sheet = pil_to_tensor(Image.open(path))[0]
    tiles = sheet.reshape(10, 8, -1, 8).transpose(1, 2)  # (10, tiles in a row, 8, 8)
    labels, columns = torch.nonzero(tiles.flatten(2).any(2), as_tuple=True)
    held_out = torch.arange(len(labels)) % 10 == 9
    return tiles[labels, columns][:, None], labels, list("0123456789"), held_out


def load_torchvision(name):
    """torchvision's training set, and its test set, which is held out."""
    try:
        parts = [TORCHVISION[name]("data", train=train, download=True) for train in (True, False)]
    except RuntimeError as error:  # as torchvision reports a failed download
        raise ValueError(f"{name} is not in data/ and can't be downloaded: {error}") from None
    images = torch.cat([torch.as_tensor(part.data) for part in parts])
    images = images.reshape(*images.shape[:3], -1)  # (N, H, W, C)
    images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.cat([torch.as_tensor(part.targets) for part in parts])
    held_out = torch.arange(len(images)) >= len(parts[0].data)
    return images, labels, parts[0].classes, held_out


def load_folder(folder, image_size):
    """All images below a folder except hidden ones and those of runs. Those below one subfolder are one class."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is neither a dataset ({', '.join(DATASETS)}) nor a folder")

    def natural_order(name):  # a2 before a10
        return re.sub(r"\d+", lambda number: number[0].zfill(20), name), name

    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True), key=natural_order)
    paths = [Path(name) for name in names]
    runs = {path.parent for path in paths if path.name == "checkpoint.pt"}
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = [path for path in paths if runs.isdisjoint(path.parents)]
    if not paths:
        raise ValueError(f"no images in {folder}: it needs {' '.join(sorted(IMAGE_SUFFIXES))} files; runs are skipped")

    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    held_out = torch.empty(len(paths), dtype=torch.bool)
    bar = tqdm(paths, "reading", unit=" images", leave=False, delay=2, disable=None)
    for i, path in enumerate(bar):
        content = Path(folder, path).read_bytes()
        held_out[i] = zlib.crc32(content) % 10 == 0
        try:
            images[i] = read_image(content, image_size)
        except Exception as error:  # a damaged file may raise any exception
            raise ValueError(f"{folder}/{path} can't be read as an image: {error}") from None
    if (images == images[:, :1]).all():
        images = images[:, :1].clone()  # all are grey

    # Images beside at least two subfolders are a class of their own.
    subfolders = [path.parts[0] if len(path.parts) > 1 else "(no folder)" for path in paths]
    classes = sorted(set(subfolders), key=natural_order)
    labels = torch.tensor([classes.index(name) for name in subfolders])
    for label in labels.unique():  # a class is never held out as a whole
        if held_out[labels == label].all():
            held_out[labels == label] = False
    if len(set(classes) - {"(no folder)"}) < 2:
        classes = None
    return images, labels, classes, held_out


def read_image(content, image_size):
    """The bytes of an image file as RGB, uint8 (3, image_size, image_size), upright, on white where transparent."""
    image = Image.open(io.BytesIO(content))
    image.draft(None, (4 * image_size, 4 * image_size))  # a large JPEG is reduced as it is decoded: 25 times as fast
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert would clip
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return pil_to_tensor(ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS))


def load_training_data(config, device):
    """Returns (images, labels) to train on, those held out, and the classes' names or None. Rank 0 reads first."""
    rank, world_size = rank_and_world_size()
    if rank > 0:
        dist.barrier()
    images, labels, classes, held_out = read_data(config.data, config.image_size)
    if world_size > 1 and rank == 0:
        dist.barrier()
    if images.shape[2] != config.image_size:
        raise ValueError(f"--image-size must be {images.shape[2]} for {config.data}, got {config.image_size}")
    if not config.conditional:
        classes = None
    if rank == 0:
        shape = tuple(images.shape[1:])
        print(f"{config.data}: {len(images):,} images of {shape}, {held_out.sum():,} held out; labels: {classes}")
    training_set = images[~held_out].to(device), labels[~held_out].to(device)
    held_out_set = images[held_out].to(device), labels[held_out].to(device)
    return training_set, held_out_set, classes


def to_model(pixels):
    """uint8 0…255 → float [−1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x):
    """float [−1, 1] → uint8 0…255; values outside are clamped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---- 7. Configuration ------------------------------------------------------------------------------------------------
def option(default, help, **arguments):
    """A dataclass field whose metadata are arguments of argparse for its flag."""
    return field(default=default, metadata=dict(arguments, default=default, help=help))


@dataclass
class Config:
    """Everything a run depends on. Every field is a flag of --train and is stored in the checkpoint."""

    # Data
    data: str = option("digits", "digits, mnist, fashion_mnist, cifar10, or a folder of images")
    conditional: bool = option(True, "learn the labels, if the dataset has them")
    label_dropout: float = option(0.1, "fraction of the labels hidden in training, which guidance needs")

    # Network
    image_size: int = option(8, "height and width; images of a folder are resized and cropped to it")
    dim: int = option(16, "channels at full resolution, even and at least 4")
    dim_mults: tuple = option((1, 2), "channels of each level, in multiples of dim; each level halves the size")
    num_res_blocks: int = option(1, "residual blocks per level")
    attn_resolutions: tuple = option((), "image sizes at which there is self-attention")
    dropout: float = option(0.0, "dropout probability in the residual blocks")

    # Diffusion
    timesteps: int = option(1000, "T, the number of steps of the forward process")
    schedule: str = option("linear", "β_t; the paper's linear one is scaled by 1000/T", choices=("linear", "cosine"))
    variance: str = option("fixed_large", "σ_t² of the reverse process: β_t, β̃_t, or learned", choices=VARIANCES)
    prediction: str = option("noise", "what the network predicts: ε, or √ᾱ_t ε − √(1−ᾱ_t) x_0", choices=PREDICTIONS)
    loss: str = option("simple", "Eq. 14, or the bound of Eq. 5", choices=LOSSES)

    # Optimisation
    steps: int = option(1400, "training steps")
    batch_size: int = option(128, "images per step, over all processes together")
    lr: float = option(6e-3, "Adam's learning rate")
    warmup: int = option(50, "steps over which the learning rate rises linearly", type=int)
    lr_decay: str = option("linear", "linear: multiplied by 1 − step/steps", choices=("constant", "linear"))
    grad_clip: float = option(1.0, "the gradient's norm is clipped at this value; 0 does not clip")
    ema_decay: float = option(0.9999, "decay of the averaged weights; at step n at most (1 + n)/(10 + n)")
    flip: bool = option(False, "mirror half of the images left to right")

    # Seed, log, checkpoints
    seed: int = option(0, "seed of everything random", type=int)
    log_every: int = option(50, "steps between two rows of log.csv")
    sample_every: int = option(500, "steps between two grids of samples")
    checkpoint_every: int = option(500, "steps between two checkpoints")

    # Machine and folder; None is decided when the run starts
    bf16: bool = option(None, "bfloat16; None: if the processor supports it")
    compile: bool = option(None, "torch.compile; None: on CUDA with Triton")
    device: str = option(None, "cuda, cuda:1 (the second), mps or cpu; None: the first one available")
    out: str = option(None, "the run's folder; None: a new one in runs/")


# The paper's appendix B for CIFAR-10, and settings for other datasets; Config's defaults are those of the digits.
PAPER = dict(
    image_size=32,
    dim=128,
    dim_mults=(1, 2, 2, 2),
    num_res_blocks=2,
    attn_resolutions=(16,),
    dropout=0.1,
    conditional=False,
    flip=True,
    steps=800_000,
    lr=2e-4,
    warmup=5000,
    lr_decay="constant",
    sample_every=10_000,
    checkpoint_every=5000,
)
GPU = dict(
    PAPER,
    conditional=True,
    flip=False,
    schedule="cosine",
    prediction="velocity",
    steps=50_000,
    warmup=500,
    sample_every=1000,
    checkpoint_every=1000,
)
GREY_28 = dict(
    image_size=28,
    dim_mults=(1, 2, 4),
    attn_resolutions=(7,),
    schedule="cosine",
    prediction="velocity",
    steps=3000,
    batch_size=32,
    lr=2e-3,
    warmup=200,
    sample_every=1000,
)
FOLDER = dict(
    GREY_28,
    image_size=32,
    dim_mults=(1, 2, 4, 8),
    attn_resolutions=(8,),
    steps=7000,
    lr=1e-3,
)
PRESETS = dict(
    digits={},
    mnist=GREY_28,
    fashion_mnist=GREY_28,
    cifar10=PAPER,
    folder=FOLDER,
    gpu=GPU,
)


def preset(data, name=None, **changes):
    """The default Config of a dataset, with changes to its fields. name selects another preset than the dataset's."""
    own = data if data in DATASETS else "folder"
    settings = dict(PRESETS[name or own], data=data)
    if data in DATASETS:  # whose images have one size
        settings["image_size"] = PRESETS[data].get("image_size", Config.image_size)
    return Config(**{**settings, **changes})


def build_diffusion(config):
    """The diffusion of a Config. The linear schedule's ends are scaled by 1000/T, so that x_T is noise for T > 1."""
    betas = cosine_beta_schedule(config.timesteps)
    if config.schedule == "linear":
        scale = 1000 / config.timesteps
        betas = linear_beta_schedule(config.timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
    return GaussianDiffusion(betas, config.variance, config.loss, prediction=config.prediction)


def build_network(config, image_channels, classes):
    """The network of a Config; classes is a list of names or None."""
    names = ("dim", "dim_mults", "num_res_blocks", "attn_resolutions", "image_size", "dropout")
    settings = {name: getattr(config, name) for name in names}
    num_classes = len(classes) if classes else None
    learned_variance = config.variance == "learned_range"
    return UNet(image_channels, **settings, num_classes=num_classes, learned_variance=learned_variance)


# ---- 8. Devices and files --------------------------------------------------------------------------------------------
def derive_seed(seed, use, *numbers):
    """A 32-bit seed for one use of randomness, independent of other uses and numbers, by NumPy's SeedSequence."""
    spawn_key = (int.from_bytes(use.encode(), "big"), *numbers)
    return np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1).item()


def pick_device(name):
    """The device of that name (None: a GPU if there is one). Under torchrun, "cuda" is a GPU for each process."""
    if name is None:
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def autocast(config, device):
    """A context manager for bfloat16, if config.bf16 says so (default: on a GPU or CPU that computes in it natively).
    Such a CPU trains the paper's network 1.6 times as fast; on small networks bfloat16 gains nothing."""
    enabled = config.bf16
    if enabled is None and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    elif enabled is None and device.type == "cpu":
        enabled = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(enabled))


def maybe_compile(config, device, network):
    """The network, compiled if config.compile says so (default: on CUDA with Triton, which torch installs on Linux).
    On one GPU it then runs as CUDA graphs: launching the kernels one by one takes longer than their work."""
    from torch.utils._triton import has_triton

    enabled = config.compile
    if enabled is None:
        enabled = device.type == "cuda" and has_triton()
    if not enabled:
        return network
    # DistributedDataParallel exchanges gradients during the backward pass, which a CUDA graph can't capture.
    mode = "default" if dist.is_initialized() else "reduce-overhead"
    return torch.compile(network, mode=mode, dynamic=False)


def keep_freed_memory():
    """Make glibc's malloc keep freed memory: to fault it in again takes a third of a small network's time on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, as in malloc.h
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def rank_and_world_size():
    """The number of this process and the number of processes, set by torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(config, device):
    """Joins the processes of torchrun. Returns rank and world size. Raises ValueError if they can't share a batch."""
    rank, world_size = rank_and_world_size()
    if config.batch_size % world_size:
        raise ValueError(f"--batch-size {config.batch_size} can't be shared equally by {world_size} processes")
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # rank 0 may read data for long
    return rank, world_size


@contextmanager
def record_signals():
    """Context manager that records the first SIGINT, SIGTERM and SIGHUP (a closed terminal) in a list; a second one of
    the same kind has its usual effect. One that is ignored, as by nohup, stays ignored."""
    received = []
    handlers = {}

    def record(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, record)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def new_folder(config):
    """Makes the folder of a new run: config.out, or the first free one of runs/NAME, runs/NAME-2, …, NAME being that of
    the data. Raises ValueError if config.out holds a run."""
    if config.out:
        out = Path(config.out)
        if (out / "checkpoint.pt").exists():
            raise ValueError(f"{out} holds a run: --resume continues it, another --out starts a new one")
        out.mkdir(parents=True, exist_ok=True)
        return out
    name = Path(config.data).resolve().name
    Path("runs").mkdir(exist_ok=True)
    for n in itertools.count(1):
        out = Path("runs", name if n == 1 else f"{name}-{n}")
        with suppress(FileExistsError):
            out.mkdir()
            return out


def newest_run():
    """The folder in runs/ with the newest checkpoint."""
    newest = max(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
    if newest is None:
        raise ValueError("no run in runs/ yet: python ddpm.py --train makes one, --out names one elsewhere")
    return newest.parent


def save_atomically(state, path):
    """Write a checkpoint to a temporary file and rename it, so that path always holds a complete one."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(out):
    """Returns the checkpoint in a run's folder as a dict, its "config" as a Config, and as "network" the averaged
    network. No code that the file may hold is run. Raises ValueError if it is damaged or was not written by ddpm.py."""
    path = Path(out) / "checkpoint.pt"
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # a bad member or None: torch.load checks no checksums
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            config = Config(**{**checkpoint["config"], "out": str(out)})
            image_channels = checkpoint["ema"]["conv_in.weight"].shape[1]
            network = build_network(config, image_channels, checkpoint["classes"])
            for part in ("model", "ema"):
                network.load_state_dict(checkpoint[part])
        except Exception as error:  # a damaged file may raise any exception
            damaged = f"{type(error).__name__}: {error}"
    if damaged:
        raise ValueError(f"{path} is damaged or was not written by this version of ddpm.py ({damaged})"[:300])
    return {**checkpoint, "config": config, "network": network.eval()}


def make_grid_image(pixels, columns):
    """Images, uint8 (N, C, H, W), as one PIL image, row by row; small ones are enlarged. columns=None: a square."""
    columns = columns or math.ceil(len(pixels) ** 0.5)
    grid = make_grid(pixels, nrow=columns, padding=1, pad_value=64)
    zoom = max(1, 32 // pixels.shape[3])
    return ImageOps.scale(to_pil_image(grid), zoom, Image.Resampling.NEAREST)


# ---- 9. From a run to images -----------------------------------------------------------------------------------------
SAMPLERS = {"dpm-solver": 10, "ddim": 50, "ddpm": math.inf}  # and the default of S, which is at most T
MAX_COLUMNS = 16  # with more classes, the grids of training show the first 16, and samples.png is square


@dataclass
class Run:
    """A trained network with everything that sampling needs."""

    config: Config
    model: nn.Module
    diffusion: GaussianDiffusion
    classes: list  # the names of the labels, or None
    device: torch.device

    @classmethod
    def read(cls, out, device=None, bf16=None, compile=None):
        """The run in a folder, with its averaged weights. Raises ValueError as read_checkpoint does."""
        checkpoint = read_checkpoint(out)
        config = replace(checkpoint["config"], device=device, bf16=bf16, compile=compile)
        return cls.prepare(config, checkpoint["network"], build_diffusion(config), checkpoint["classes"])

    @classmethod
    def prepare(cls, config, network, diffusion, classes):
        """A run with the network on the device of the Config and, if that says so, compiled."""
        device = pick_device(config.device)
        network = network.to(device, memory_format=torch.channels_last).eval()
        model = maybe_compile(config, device, network)
        return cls(config, model, diffusion.to(device), classes, device)

    def trajectory(
        self,
        count,
        labels=None,
        seed=0,
        sampler="dpm-solver",
        sampling_steps=None,
        eta=0.0,
        guidance=0.0,
    ):
        """Returns an iterator that yields count images after each sampling step, at last x_0. All noise of image i
        is drawn from seed + i, so that an image does not depend on the others. labels is (count,) or None.
        sampling_steps is S (default: that of SAMPLERS). Raises ValueError for options that do not go together."""
        if eta and sampler != "ddim":
            raise ValueError("--eta needs --sampler ddim")
        if guidance and labels is None:
            raise ValueError("--guidance needs labels")
        if (guidance or labels is None) and self.model.num_classes and self.config.label_dropout == 0:
            raise ValueError("--guidance and --unconditional need a network trained with --label-dropout above 0")

        generators = [torch.Generator(self.device).manual_seed(seed + i) for i in range(count)]
        shape = (count, self.model.image_channels, self.config.image_size, self.config.image_size)
        x_t = sample_noise(self.diffusion.betas.new_empty(shape), generators)

        model = self.model
        if labels is not None:
            model = classifier_free_guidance(model, labels.to(self.device), guidance)
        model = autocast(self.config, self.device)(model)  # which decorates a function, too
        steps = min(SAMPLERS[sampler], self.diffusion.timesteps) if sampling_steps is None else sampling_steps
        if sampler == "dpm-solver":
            return self.diffusion.dpm_solver_sample_steps(model, x_t, steps)
        if sampler == "ddim":
            return self.diffusion.ddim_sample_steps(model, x_t, steps, eta, generator=generators)
        diffusion, model = self.diffusion.respace(model, steps)
        return diffusion.p_sample_steps(model, x_t, generator=generators)

    def labels(self, count, label=None):
        """Labels (count,): every class in turn, or the one called label; its number will do unless the names are
        numbers. None for a network without labels. Raises ValueError if there is no such class."""
        if label is None:
            return torch.arange(count) % self.model.num_classes if self.model.num_classes else None
        known = {name: i for i, name in enumerate(self.classes or [])}
        if not any(name.isdecimal() for name in known):
            known |= {str(i): i for i in range(len(known))}
        if label not in known:
            raise ValueError(f"--label must be one of: {', '.join(known) or '(no labels were learned)'}; got {label}")
        return torch.full((count,), known[label])

    def write_grid(self, step):
        """Write a grid of samples, ten of each class in a column (at most 16), named after the training step."""
        columns = min(self.model.num_classes or 10, MAX_COLUMNS)
        labels = torch.arange(10 * columns) % columns if self.model.num_classes else None
        trajectory = self.trajectory(10 * columns, labels, derive_seed(self.config.seed, "grid"))
        pixels = to_pixels(last(trajectory))
        make_grid_image(pixels, columns).save(Path(self.config.out) / f"samples-{step:06}.png")


def sample(
    run,
    count,
    seed=0,
    label=None,
    unconditional=False,
    sampling_batch=64,
    individual=False,
    animate=False,
    **how,
):
    """Draw count images and write them into the run's folder: samples.png, one grid; with individual also
    individual/00000.png and on, each as it is drawn; with animate samples.gif, the reverse process of the first batch.
    how are the options of Run.trajectory. Raises ValueError as it does, and if the samples are not finite.

    Image i depends on seed and i only, up to rounding: not on the count, the batches, or the processes that share them.
    Several processes write individual images only."""
    rank, world_size = rank_and_world_size()
    if world_size > 1 and not individual:
        raise ValueError("several processes need --individual")
    out = Path(run.config.out)
    folder = out / "individual"

    # Equal batches, so that a compiled network sees one shape; every process draws its share of them.
    batch_size = math.ceil(count / math.ceil(count / sampling_batch))
    labels = None if unconditional else run.labels(count + batch_size, label)  # the last batch is filled up
    disable = None if rank == 0 else True
    drawn = []
    frames = []
    for start in tqdm(range(rank * batch_size, count, world_size * batch_size), unit=" batches", disable=disable):
        batch_labels = None if labels is None else labels[start : start + batch_size]
        trajectory = run.trajectory(batch_size, batch_labels, derive_seed(seed, "sampling") + start, **how)
        for x_t in tqdm(trajectory, unit=" steps", leave=False, disable=disable):
            if animate and start == 0:
                frames.append(to_pixels(x_t).cpu())
        if not x_t.isfinite().all():
            raise ValueError("the samples are not finite")
        (folder if individual else out).mkdir(parents=True, exist_ok=True)  # not before something is drawn
        drawn.append(to_pixels(x_t).cpu()[: count - start])
        if individual:
            for number, pixels in enumerate(drawn[-1], start):
                to_pil_image(pixels).save(folder / f"{number:05}.png")

    if individual:
        for path in folder.glob("*.png"):  # of an earlier, larger call
            if path.stem.isdecimal() and int(path.stem) >= count:
                path.unlink(missing_ok=True)

    # One grid, with a column for each class unless there are many
    columns = None
    if labels is not None and label is None and run.model.num_classes <= MAX_COLUMNS:
        columns = run.model.num_classes
    if world_size == 1:
        make_grid_image(torch.cat(drawn), columns).save(out / "samples.png")
    if frames:  # at most 61 of them, 0.1 s each; the last one stays for 2 s
        chosen = [*frames[: -1 : math.ceil(len(frames) / 60)], frames[-1]]
        durations = [100] * (len(chosen) - 1) + [2000]
        grids = [make_grid_image(frame, columns) for frame in chosen]
        grids[0].save(out / "samples.gif", save_all=True, append_images=grids[1:], loop=0, duration=durations)


def evaluate(run, count, seed):
    """Print the bound on −log₂ p_θ(x_0) of up to count held-out images, term by term (Eq. 5). No labels are given.
    Raises ValueError for a network that was never trained without them, and if no image is held out."""
    if run.model.num_classes and run.config.label_dropout == 0:
        raise ValueError("--evaluate gives no labels: it needs a network trained with --label-dropout above 0")
    images, _ = load_data(run.config.data, run.config.image_size, split="test")
    if not len(images):
        raise ValueError(f"no image of {run.config.data} is held out from training: it has too few")
    shape = (run.model.image_channels, run.config.image_size, run.config.image_size)
    if images.shape[1:] != shape:
        raise ValueError(f"{run.config.data} has images of {tuple(images.shape[1:])}, the network needs {shape}")
    count = min(count, len(images))
    images = images[torch.arange(count) * len(images) // count]  # evenly spaced, since they may be sorted by class

    generator = torch.Generator(run.device).manual_seed(derive_seed(seed, "evaluation"))
    batches = []
    for pixels in tqdm(images.chunk(math.ceil(len(images) / 256)), unit=" batches", disable=None):
        with autocast(run.config, run.device):
            x_start = to_model(pixels.to(run.device))
            batches.append(run.diffusion.bits_per_dim(run.model, x_start, generator=generator))
    bits = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    # Mean ± standard error; L_T + L_1 + … + L_{T-1} is the rate, L_0 the distortion (§4.3)
    print(f"{len(images)} held-out images of {run.config.data}, in bits/dim:")
    bits["L_1 … L_{T-1}"] = bits["L_{t-1}"].sum(1)
    for name in ("L_T", "L_1 … L_{T-1}", "L_0", "total"):
        error = bits[name].std(correction=min(1, len(images) - 1)) / len(images) ** 0.5
        print(f"  {name:13} {bits[name].mean():.4f} ± {error:.4f}")


# ---- 10. Published weights -------------------------------------------------------------------------------------------
# diffusers, an optional package, reads and writes its own format; this section maps its names to ours.

# What a network predicts: our name → that of diffusers, and back
PREDICTION_TYPES = dict(noise="epsilon", velocity="v_prediction", epsilon="noise", v_prediction="velocity")
CLAMP = dict(clip_sample=True, clip_sample_range=1.0, thresholding=False)  # the clamp that the samplers here apply


def describe_network(network):
    """The arguments of the UNet2DModel that is this UNet."""
    levels = network.down_blocks
    attention = [isinstance(level.attentions[0], AttentionBlock) for level in levels]
    return dict(
        sample_size=network.image_size,
        in_channels=network.image_channels,
        out_channels=network.conv_out.out_channels,
        block_out_channels=[level.resnets[-1].conv2.out_channels for level in levels],
        layers_per_block=len(levels[0].resnets),
        down_block_types=["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        up_block_types=["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        add_attention=isinstance(network.mid_block.attentions[0], AttentionBlock),
        num_class_embeds=network.num_classes + 1 if network.num_classes else None,
        norm_num_groups=network.conv_norm_out.num_groups,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


@torch.no_grad()
def copy_weights(source, target):
    """Copies the weights between a UNet and a UNet2DModel, whose v is 2v − 1 for our v. Raises ValueError, naming the
    fields of config.json that differ, unless both then return the same for a random input."""
    network, published = (source, target) if isinstance(source, UNet) else (target, source)
    channels = network.image_channels  # the further ones are v
    same = False
    with suppress(RuntimeError):  # names or shapes differ
        target.load_state_dict(source.state_dict())
        if target is published:
            target.conv_out.weight[channels:].mul_(2)
            target.conv_out.bias[channels:].mul_(2).sub_(1)
        else:
            target.conv_out.weight[channels:].div_(2)
            target.conv_out.bias[channels:].add_(1).div_(2)
        x = torch.randn(2, channels, network.image_size, network.image_size)
        t = torch.tensor([10, 700])
        y = torch.tensor([0, 1]) if network.num_classes else None
        ours = network(x, t, y)
        ours[:, channels:].mul_(2).sub_(1)
        theirs = published(x, t, class_labels=y).sample
        same = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if not same:
        wanted = type(published)(**describe_network(network)).config
        found = [f"{name}={value!r}" for name, value in published.config.items() if value != wanted.get(name)]
        raise ValueError(f"UNet can't be this UNet2DModel: {', '.join(found) or 'groups or dim_mults differ'}")


def read_published(folder, out=None, **machine):
    """The run of published weights: a folder of DDPMPipeline or of UNet2DModel, with the betas, prediction and variance
    of the scheduler in it or beside it (default: the paper's). machine: device, bf16, compile. Raises ValueError for
    settings that UNet or GaussianDiffusion does not support. The last class is taken for "no label"."""
    import diffusers

    folder = Path(folder)
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    plain = [*place.glob("*model.safetensors*"), *place.glob("*model.bin*")]
    variant = None if plain else "fp16"
    options = dict(variant=variant, low_cpu_mem_usage=False, local_files_only=True)
    published = diffusers.UNet2DModel.from_pretrained(place, **options).eval()

    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    for place in (folder.parent / "scheduler", folder / "scheduler", folder):
        if (place / "scheduler_config.json").exists():
            scheduler = diffusers.DDPMScheduler.from_pretrained(place)
    process = scheduler.config
    for name, value in CLAMP.items():
        if process[name] != value:
            raise ValueError(f"the scheduler of {folder} clamps differently: {name}={process[name]}")

    shape = published.config
    size, *others = np.unique(shape.sample_size).tolist()  # of one number, or of height and width
    if others or not size:
        raise ValueError(f"{folder}: sample_size={shape.sample_size}, but images must be square and their size known")
    widths = shape.block_out_channels
    levels = enumerate(shape.down_block_types)
    attn_resolutions = [size >> i for i, kind in levels if kind == "AttnDownBlock2D"]
    config = preset(
        "cifar10",
        image_size=size,
        dim=widths[0],
        dim_mults=[width // widths[0] for width in widths],
        num_res_blocks=shape.layers_per_block,
        attn_resolutions=attn_resolutions or [0] * shape.add_attention,  # [0]: in the middle only
        timesteps=len(scheduler.betas),
        variance=process.variance_type.removesuffix("_log"),
        prediction=PREDICTION_TYPES.get(process.prediction_type, process.prediction_type),
        out=out or f"runs/{folder.resolve().name}",
        **machine,
    )
    diffusion = GaussianDiffusion(scheduler.betas, config.variance, prediction=config.prediction)
    classes = [str(i) for i in range(shape.num_class_embeds - 1)] if shape.num_class_embeds else None
    network = build_network(config, shape.in_channels, classes).eval()
    copy_weights(published, network)
    return Run.prepare(config, network, diffusion, classes)


def export(out, folder):
    """Write a run's averaged network as a folder that diffusers loads: UNet2DModel.from_pretrained(folder) is the same
    function, with class_labels = num_classes for "no label", and with 2v − 1 for v; DDPMScheduler.from_pretrained and,
    without labels, DDPMPipeline.from_pretrained draw from it. Raises FileExistsError if the folder exists, and
    ValueError for a network that a UNet2DModel can't be."""
    import diffusers

    checkpoint = read_checkpoint(out)
    config = checkpoint["config"]
    network = checkpoint["network"]
    published = diffusers.UNet2DModel(**describe_network(network), dropout=config.dropout).eval()
    copy_weights(network, published)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=config.timesteps,
        trained_betas=build_diffusion(config).betas.tolist(),
        variance_type=config.variance,
        prediction_type=PREDICTION_TYPES[config.prediction],
        timestep_spacing="trailing",
    )
    Path(folder).mkdir(parents=True)
    published.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    if network.num_classes is None:  # the pipelines know no labels
        diffusers.DDPMPipeline(published, scheduler).save_config(folder)


# ---- 11. Command line ------------------------------------------------------------------------------------------------
MODES = ("train", "sample", "evaluate", "export")
HELP = {"-h", "--help"}
MACHINE = ("device", "bf16", "compile")
RESUME = ("steps", "log_every", "sample_every", "checkpoint_every", "out", *MACHINE)


def positive_int(text):
    """The argparse type of an int of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_fields(parser, names, **changes):
    """Add the flags of some fields of Config, with changes to their arguments. An int without a type is at least 1."""
    kinds = {
        bool: dict(action=argparse.BooleanOptionalAction),
        int: dict(type=positive_int),
        float: dict(type=float),
        tuple: dict(type=int, nargs="*"),
        str: {},
    }
    for each in fields(Config):
        if each.name in names:
            arguments = {**kinds[each.type], **each.metadata, **changes}
            parser.add_argument("--" + each.name.replace("_", "-"), **arguments)


def parse(arguments):
    """Returns the mode of a command line and its options, a dict. Only the flags of the mode exist."""
    flags = {argument.split("=")[0] for argument in arguments}
    mode = next((name for name in MODES if f"--{name}" in flags), None)
    parser = argparse.ArgumentParser(
        "ddpm.py",
        usage=f"python ddpm.py --{mode} ..." if mode else "python ddpm.py MODE ... (MODE --help shows its options)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--train", action="store_true", help="train a network")
    modes.add_argument("--sample", type=positive_int, metavar="N", help="draw N samples from a trained network")
    bound = "print the likelihood bound of N held-out images in bits/dim; 256 if N is left out"
    modes.add_argument("--evaluate", type=positive_int, metavar="N", nargs="?", const=256, help=bound)
    modes.add_argument("--export", metavar="FOLDER", help="write a trained network as a folder that diffusers loads")

    add = parser.add_argument
    if mode == "train":
        add("--resume", action="store_true", help="continue a run, by default the newest in runs/")
    if mode == "train" and "--resume" in flags:
        add_fields(parser, RESUME, default=argparse.SUPPRESS)
    elif mode == "train":
        add("--preset", choices=PRESETS, help="defaults of another dataset; None: those of --data")
        add_fields(parser, vars(Config()))
        known, _ = parser.parse_known_args([argument for argument in arguments if argument not in HELP])
        parser.set_defaults(**vars(preset(known.data, known.preset)))
    elif mode:
        add("--out", help="the run's folder; None: the newest in runs/")
    if mode in ("sample", "evaluate"):
        add("--weights", metavar="FOLDER", help="published weights instead of a run; needs diffusers")
        add("--seed", type=int, default=0, help="seed of everything random")
        add_fields(parser, MACHINE)
    if mode == "evaluate":
        add("--data", help="where the held-out images are; None: where the run had them")
    if mode == "sample":
        add("--sampler", choices=SAMPLERS, default="dpm-solver", help="ddpm is Algorithm 2")
        steps = "S, at most T; None: 10 for dpm-solver, 50 for ddim, T for ddpm"
        add("--sampling-steps", type=positive_int, metavar="S", help=steps)
        add("--eta", type=float, default=0.0, help="noise of ddim; 1 is as much as ddpm with fixed_small")
        add("--guidance", type=float, default=0.0, help="weight of classifier-free guidance")
        labels = parser.add_mutually_exclusive_group()
        labels.add_argument("--label", help="the class to draw, by name or number; None: all in turn")
        labels.add_argument("--unconditional", action="store_true", help="draw without labels")
        add("--sampling-batch", type=positive_int, default=64, help="images drawn at once")
        add("--individual", action="store_true", help="also write every image as a PNG of its own")
        add("--animate", action="store_true", help="also write the reverse process as a GIF")
    arguments = ["--help"] if HELP & flags else arguments  # argparse would ask for N first
    options = vars(parser.parse_args(arguments))
    for name in {*MODES, "preset"} - {mode}:
        options.pop(name, None)
    return mode, options


def run_mode(mode, options):
    """Run a parsed command line."""
    value = options.pop(mode)
    out = options.pop("out", None)
    if mode == "train":
        checkpoint = None
        if options.pop("resume"):
            checkpoint = read_checkpoint(out or newest_run())
            config = replace(checkpoint["config"], **options)
        else:
            config = Config(**options, out=out)
        folder = train(config, checkpoint)
        if folder:
            print(f"next: python ddpm.py --sample 64 --out={shlex.quote(str(folder))}")
    elif mode == "export":
        export(out or newest_run(), value)
        print(f"diffusers.UNet2DModel.from_pretrained({value!r}) loads it")
    else:
        weights = options.pop("weights")
        machine = {name: options.pop(name) for name in MACHINE}
        if weights:
            run = read_published(weights, out, **machine)
        else:
            run = Run.read(out or newest_run(), **machine)
        if mode == "evaluate":
            run.config.data = options["data"] or run.config.data
            evaluate(run, value, options["seed"])
        else:
            sample(run, value, **options)
            print(f"samples in {run.config.out}")


def main(arguments=None):
    """Run a command line. A ValueError, OSError or ImportError ends with one line and status 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without β shows ?
    keep_freed_memory()
    status = 2
    try:
        run_mode(*parse(sys.argv[1:] if arguments is None else arguments))
        return
    except (ValueError, OSError) as error:
        message = f"error: {error}"
    except ImportError as error:
        message = f"error: {error}: pip install {error.name}"
    except KeyboardInterrupt as interruption:
        status = 130
        message = str(interruption) or "interrupted"
    print("ddpm.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
