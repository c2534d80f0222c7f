"""DDPM in one file: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020), with DDIM, guidance and a U-Net.

Read it beside the paper, from top to bottom. "Eq. 4" is the paper's own number; other papers are named. The paper
counts t = 1…T with ᾱ_0 = 1, the code counts t = 0…T−1 as the whole field does: code t = paper t − 1. Pictures x are
float tensors (B, C, H, W) scaled to [−1, 1]; t is int64 (B,), or one plain int for the whole batch.

    python ddpm.py --train         # learns to draw digits, on any machine, in minutes
    python ddpm.py --sample 64     # draws some
    python ddpm.py --help          # everything else
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

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
    """β_1 … β_T in equal steps from start to end (§4) → (T,) float64. The defaults were made for T = 1000."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps, s=0.008):
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2), β_t = 1 − ᾱ_t/ᾱ_{t−1}, at most 0.999 → (T,) float64
    (Improved DDPM Eq. 17)."""
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    f = torch.cos((t / timesteps + s) / (1 + s) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# ---- 2. The diffusion ------------------------------------------------------------------------------------------------


def broadcast(values, x):
    """(B,) → (B, 1, 1, 1), to multiply x (B, C, H, W), or as many dimensions as x has; a single number stays one."""
    return values.reshape(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(values) and values.dim() else values


def _randn(shape, like, generator):
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def last(steps):
    for x_t in steps:
        pass
    return x_t


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)) in nats, element by element."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    """log p(x) in nats, element by element: the mass of N(mean, e^log_variance) on [x − 1/255, x + 1/255], where the
    bin of −1 opens to −∞ and that of 1 to +∞ (Eq. 13). x holds 8-bit pixels scaled to [−1, 1]."""
    sigma = torch.exp(0.5 * log_variance)
    upper, lower = (x + 1 / 255 - mean) / sigma, (x - 1 / 255 - mean) / sigma
    # Φ(b) − Φ(a) = Φ(−a) − Φ(−b): in the left tail, and there alone, log Φ keeps its digits however far out.
    near, far = torch.where(x < mean, upper, -lower), torch.where(x < mean, lower, -upper)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inside = log_near + torch.log(-torch.expm1(log_far - log_near))
    return torch.where(x < -0.999, torch.special.log_ndtr(upper),
                       torch.where(x > 0.999, torch.special.log_ndtr(-lower), inside))


class GaussianDiffusion(nn.Module):
    """The forward process q (Eq. 2), the reverse process p_θ (Eq. 1) and the losses between them, for betas (T,).

    A model is any callable model(x_t, t) → ε_θ, shaped like x_t; t arrives as int64 (B,). With a learned variance it
    returns ε_θ and v stacked on the channels.
    variance is σ_t² of p_θ (§3.2): "fixed_large" is β_t, right for x_0 ~ N(0, I); "fixed_small" is β̃_t, right for a
    single x_0; "learned_range" goes from one to the other with v (Improved DDPM Eq. 15).
    loss is "simple" (Eq. 14; with a learned variance L_hybrid, Improved DDPM Eq. 16) or "bound" (Eq. 5).

    Coefficients are computed in float64 and kept in dtype, in buffers that are neither saved nor averaged.
    Refused: betas that are not one row of numbers strictly between 0 and 1, unknown names. Betas that leave signal in
    x_T, so that sampling starts from the wrong prior, are warned about.
    """

    def __init__(self, betas, variance="fixed_large", loss="simple", dtype=torch.float32):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be one row of numbers strictly between 0 and 1, got {betas}")
        if variance not in ("fixed_large", "fixed_small", "learned_range"):
            raise ValueError(f"variance must be fixed_large, fixed_small or learned_range, got {variance!r}")
        if loss not in ("simple", "bound"):
            raise ValueError(f"loss must be simple or bound, got {loss!r}")
        self.timesteps, self.variance_type, self.loss_type = len(betas), variance, loss

        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas
        # β̃ of paper t = 1 is 0 and has no logarithm: its neighbour stands in, as in the authors' code.
        neighbour = torch.cat([posterior_variance, betas])[1:2]
        if alphas_cumprod[-1].sqrt() > 0.05:
            warnings.warn(f"√ᾱ_T = {alphas_cumprod[-1].sqrt():.3f}: x_T keeps that much of x_0, so samples that start "
                          "from pure noise start wrong; use more or larger betas, until it is below 0.05")

        def keep(name, coefficient):
            self.register_buffer(name, coefficient.to(dtype), persistent=False)

        keep("betas", betas)
        keep("log_betas", betas.log())
        keep("alphas_cumprod", alphas_cumprod)
        keep("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        keep("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())
        keep("posterior_variance", posterior_variance)
        keep("posterior_log_variance", torch.cat([neighbour, posterior_variance[1:]]).log())
        keep("posterior_mean_x_start", alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod))
        keep("posterior_mean_x_t", alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod))
        self._alphas_cumprod = [1.0, *alphas_cumprod.tolist()]                          # x_0's ᾱ = 1 in front

    def _alpha_bar(self, t):
        """ᾱ_t in float64, a number for a number; t = −1 is x_0."""
        if torch.is_tensor(t):
            return torch.tensor(self._alphas_cumprod, dtype=torch.float64)[t.cpu() + 1]
        return self._alphas_cumprod[t + 1]

    def _check(self, x, t, *others):
        """Refuse what would broadcast or wrap around in silence."""
        if not x.is_floating_point():
            raise ValueError(f"pictures must be floats scaled to [-1, 1], got {x.dtype}")
        for other in others:
            if other is not None and other.shape != x.shape:
                raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(other.shape)}")
        if not torch.is_tensor(t):
            if not 0 <= t < self.timesteps:
                raise ValueError(f"t must lie in 0…{self.timesteps - 1}, got {t}")
        elif t.shape != x.shape[:1] or t.dtype != torch.int64:
            raise ValueError(f"t must be int64 of shape ({len(x)},), got {t.dtype} of shape {tuple(t.shape)}")
        elif t.device.type == "cpu" and not ((0 <= t) & (t < self.timesteps)).all():   # elsewhere the look would wait
            raise ValueError(f"t must lie in 0…{self.timesteps - 1}, got {t}")

    def _start(self, shape, noise, generator):
        """x_T ~ N(0, I) of the given shape, or noise, which must have it."""
        if noise is None:
            return _randn(shape, self.betas, generator)
        if noise.shape != torch.Size(shape):
            raise ValueError(f"shapes differ: {tuple(shape)} and noise {tuple(noise.shape)}")
        return noise

    def _predict(self, model, x_t, t):
        """ε_θ(x_t, t), and v or None."""
        t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
        prediction = model(x_t, t).to(x_t.dtype)
        channels = x_t.shape[1] * (2 if self.variance_type == "learned_range" else 1)
        if prediction.shape != (len(x_t), channels, *x_t.shape[2:]):
            raise ValueError(f"with variance={self.variance_type} and x_t {tuple(x_t.shape)} the model must return "
                             f"{channels} channels, got {tuple(prediction.shape)}")
        return prediction.split(x_t.shape[1], dim=1) if self.variance_type == "learned_range" else (prediction, None)

    # Forward process

    def q_sample(self, x_start, t, noise=None):
        """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, a draw from q(x_t|x_0) in one jump (Eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        self._check(x_start, t, noise)
        return (broadcast(self.sqrt_alphas_cumprod[t], x_start) * x_start
                + broadcast(self.sqrt_one_minus_alphas_cumprod[t], x_start) * noise)

    def q_posterior(self, x_start, x_t, t):
        """Mean, variance and log variance of q(x_{t−1}|x_t, x_0) (Eq. 6, 7):
        μ̃_t = √ᾱ_{t−1} β_t/(1−ᾱ_t) · x_0 + √α_t (1−ᾱ_{t−1})/(1−ᾱ_t) · x_t,  β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t) · β_t.
        At code t = 0 the variance is 0, and its logarithm that of code t = 1."""
        self._check(x_t, t, x_start)
        mean = (broadcast(self.posterior_mean_x_start[t], x_t) * x_start
                + broadcast(self.posterior_mean_x_t[t], x_t) * x_t)
        return mean, broadcast(self.posterior_variance[t], x_t), broadcast(self.posterior_log_variance[t], x_t)

    # Objective

    def p_losses(self, model, x_start, t, noise=None):
        """L_simple = ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖², the mean over pictures, channels and pixels (Eq. 14).

        With a learned variance + 0.001 L_vlb, in which ε_θ is held still, so that the bound trains v alone. With
        loss="bound", L itself (Eq. 5, in bits/dim, less the constant L_T): Eq. 12's weights where x_0 is not reached.
        t must be drawn uniformly for either to be unbiased."""
        noise = torch.randn_like(x_start) if noise is None else noise
        self._check(x_start, t, noise)
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type == "bound":
            return self.timesteps * self.bound_term(model, x_start, x_t, t, clip_denoised=False)[0].mean()
        predicted_noise, v = self._predict(model, x_t, t)
        loss = (noise - predicted_noise).square().mean()
        if v is not None:
            held = torch.cat([predicted_noise.detach(), v], dim=1)
            bound = self.bound_term(lambda x_t, t: held, x_start, x_t, t, clip_denoised=False)[0].mean()
            loss = loss + 0.001 * self.timesteps * bound
        return loss

    # Reverse process

    def predict_x_start(self, x_t, t, noise):
        """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t (Eq. 15): Eq. 4 solved for x_0."""
        self._check(x_t, t, noise)
        return ((x_t - broadcast(self.sqrt_one_minus_alphas_cumprod[t], x_t) * noise)
                / broadcast(self.sqrt_alphas_cumprod[t], x_t))

    def predict_noise(self, x_t, t, x_start):
        """ε = (x_t − √ᾱ_t x_0) / √(1−ᾱ_t): Eq. 4 solved for ε."""
        self._check(x_t, t, x_start)
        return ((x_t - broadcast(self.sqrt_alphas_cumprod[t], x_t) * x_start)
                / broadcast(self.sqrt_one_minus_alphas_cumprod[t], x_t))

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        """μ_θ, σ_t², log σ_t² of p_θ(x_{t−1}|x_t), and x̂_0: μ_θ = μ̃_t(x_t, x̂_0) (Eq. 11).

        Unclamped, that is Algorithm 2's (x_t − β_t/√(1−ᾱ_t) ε_θ) / √α_t to the letter. clip_denoised clamps x̂_0 to
        [−1, 1] first, as the authors' code does and the paper does not say: no picture lies outside, and early in
        sampling, where 1/√ᾱ_t magnifies every error of ε_θ, the clamp is what keeps the colours from saturating."""
        self._check(x_t, t)
        noise, v = self._predict(model, x_t, t)
        x_start = self.predict_x_start(x_t, t, noise)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean, variance, log_variance = self.q_posterior(x_start, x_t, t)
        if self.variance_type == "fixed_large":
            variance, log_variance = broadcast(self.betas[t], x_t), broadcast(self.log_betas[t], x_t)
        elif self.variance_type == "learned_range":
            log_variance = v * broadcast(self.log_betas[t], x_t) + (1 - v) * log_variance
            variance = log_variance.exp()
        return mean, variance, log_variance, x_start

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip_denoised=True, noise=None, generator=None):
        """x_{t−1} = μ_θ(x_t, t) + σ_t z, z ~ N(0, I), and z = 0 at the last step: one line of Algorithm 2."""
        self._check(x_t, t, noise)
        mean, variance, _, _ = self.p_mean_variance(model, x_t, t, clip_denoised)
        z = _randn(x_t.shape, x_t, generator) if noise is None else noise
        return mean + broadcast(t > 0, x_t) * variance.sqrt() * z

    @torch.no_grad()
    def p_sample_steps(self, model, x_t, t=None, clip_denoised=True, generator=None):
        """Yield x_{t−1}, …, x_0 from x_t; t is T−1 unless given. Algorithm 2, for who wants to watch."""
        for t in reversed(range(self.timesteps if t is None else t + 1)):
            x_t = self.p_sample(model, x_t, t, clip_denoised, generator=generator)
            yield x_t

    def p_sample_loop(self, model, shape, clip_denoised=True, noise=None, generator=None):
        """x_T ~ N(0, I), or noise; then Algorithm 2 down to x_0, of the given shape."""
        x_t = self._start(shape, noise, generator)
        return last(self.p_sample_steps(model, x_t, clip_denoised=clip_denoised, generator=generator))

    def respace(self, model, steps):
        """The same process seen at S = steps of its T times, and the model for it: Algorithm 2 in S steps (Improved
        DDPM §4). β' = 1 − ᾱ_t/ᾱ_s between neighbours s < t of ddim_timesteps; the model is asked at the old t."""
        timesteps = torch.tensor(self.ddim_timesteps(steps)[::-1])
        alphas_cumprod = self._alpha_bar(timesteps)
        betas = 1 - alphas_cumprod / F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        timesteps = timesteps.to(self.betas.device)
        return (GaussianDiffusion(betas, self.variance_type, self.loss_type, self.betas.dtype).to(self.betas.device),
                lambda x_t, t: model(x_t, timesteps[t]))

    def interpolate(self, model, x_start_a, x_start_b, t, weight, noise=None, generator=None):
        """Diffuse two pictures to the same t, mix (1−λ) x_t + λ x'_t, λ = weight, and decode from that t (Fig. 8).
        Both take the same noise, so that at λ = ½ the mix keeps its level."""
        noise = _randn(x_start_a.shape, x_start_a, generator) if noise is None else noise
        x_t = (1 - weight) * self.q_sample(x_start_a, t, noise) + weight * self.q_sample(x_start_b, t, noise)
        return last(self.p_sample_steps(model, x_t, t, generator=generator))

    # DDIM

    def ddim_timesteps(self, steps):
        """S of the T timesteps, evenly spaced, T−1 first ("trailing", Lin et al., 2023) → list of int, falling.
        It begins at T−1 because there alone x_t is what the network knows as noise."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must lie in 1…{self.timesteps}, got {steps}")
        return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]

    @torch.no_grad()
    def ddim_sample(self, model, x_t, t, prev_t, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε_θ(x_t) + σ z for any s = prev_t < t (DDIM Eq. 12); s = −1 is x_0, of ᾱ = 1.
        σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s) (DDIM Eq. 16): η = 0 is deterministic, η = 1 over all T steps is
        Algorithm 2 with σ_t² = β̃_t. A clamped x̂_0 takes its ε with it, so that the two still explain x_t."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0…1, got {eta}")
        self._check(x_t, t, noise)
        backwards = (-1 <= prev_t) & (prev_t < t)
        if not (backwards.all() if torch.is_tensor(backwards) else backwards):
            raise ValueError(f"prev_t must lie in -1…t-1, got prev_t={prev_t} with t={t}")
        predicted_noise, _ = self._predict(model, x_t, t)
        x_start = self.predict_x_start(x_t, t, predicted_noise)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
            predicted_noise = self.predict_noise(x_t, t, x_start)

        alpha_bar_t, alpha_bar_s = self._alpha_bar(t), self._alpha_bar(prev_t)
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t)) ** 0.5 * (1 - alpha_bar_t / alpha_bar_s) ** 0.5
        to_x_start, to_noise = alpha_bar_s**0.5, (1 - alpha_bar_s - sigma**2) ** 0.5
        to_x_start, to_noise, sigma = (broadcast(c, x_t).to(x_t.dtype).to(x_t.device) if torch.is_tensor(c) else c
                                       for c in (to_x_start, to_noise, sigma))
        x_s = to_x_start * x_start + to_noise * predicted_noise
        if eta == 0:
            return x_s
        z = _randn(x_t.shape, x_t, generator) if noise is None else noise
        return x_s + sigma * z

    @torch.no_grad()
    def ddim_sample_steps(self, model, x_t, steps, eta=0.0, clip_denoised=True, generator=None):
        """Yield the S = steps successors of x_T = x_t, x_0 last."""
        timesteps = self.ddim_timesteps(steps)
        for t, prev_t in zip(timesteps, [*timesteps[1:], -1]):
            x_t = self.ddim_sample(model, x_t, t, prev_t, eta, clip_denoised, generator=generator)
            yield x_t

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """x_T ~ N(0, I), or noise; then S = steps steps of DDIM down to x_0, of the given shape."""
        x_t = self._start(shape, noise, generator)
        return last(self.ddim_sample_steps(model, x_t, steps, eta, clip_denoised, generator))

    # Likelihood and score

    def bound_term(self, model, x_start, x_t, t, clip_denoised):
        """The term of Eq. 5 that x_t holds, in bits/dim (B,), and x̂_0: L_{t−1}, the KL of q(x_{t−1}|x_t, x_0) to
        p_θ(x_{t−1}|x_t), for a fixed σ_t² that of Eq. 8, 9 and 10; at code t = 0 L_0 = −log p_θ(x_0|x_1) by Eq. 13."""
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        mean, _, log_variance, predicted_x_start = self.p_mean_variance(model, x_t, t, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        decoder = -discretized_gaussian_log_likelihood(x_start, mean, log_variance)
        term = torch.where(broadcast(torch.as_tensor(t == 0, device=x_t.device), x_t), decoder, kl)
        return term.flatten(1).mean(1) / math.log(2), predicted_x_start

    @torch.no_grad()
    def bits_per_dim(self, model, x_start, clip_denoised=True, generator=None):
        """The bound on −log₂ p(x_0) (Eq. 3) in bits/dim, by its terms (Eq. 5, 13), one draw of ε for each t → dict:
        "total" (B,) = "L_T" (B,) + the sum of "L_{t-1}" (B, T−1), column i being code t = i + 1, + "L_0" (B,);
        "squared_error" (B, T), of x̂_0 against x_0 at code t on the [−1, 1] scale, draws Fig. 5.
        x_start holds 8-bit pixels scaled to [−1, 1]; for other data L_0 means nothing."""
        terms, errors = [], []
        for t in range(self.timesteps):
            x_t = self.q_sample(x_start, t, _randn(x_start.shape, x_start, generator))
            term, predicted_x_start = self.bound_term(model, x_start, x_t, t, clip_denoised)
            terms.append(term)
            errors.append((predicted_x_start - x_start).square().flatten(1).mean(1))
        last = self.timesteps - 1
        mean, variance = self.sqrt_alphas_cumprod[last] * x_start, self.sqrt_one_minus_alphas_cumprod[last].square()
        prior = normal_kl(mean, variance.log(), torch.zeros_like(mean), torch.zeros_like(variance))
        prior = prior.flatten(1).mean(1) / math.log(2)
        terms = torch.stack(terms, dim=1)
        return {"total": prior + terms.sum(1), "L_T": prior, "L_{t-1}": terms[:, 1:], "L_0": terms[:, 0],
                "squared_error": torch.stack(errors, dim=1)}

    def score(self, model, x_t, t):
        """∇_{x_t} log q(x_t) ≈ −ε_θ(x_t, t) / √(1−ᾱ_t) (§3.2): the network is a score, up to its scale."""
        self._check(x_t, t)
        return -self._predict(model, x_t, t)[0] / broadcast(self.sqrt_one_minus_alphas_cumprod[t], x_t)


# ---- 3. Guidance -----------------------------------------------------------------------------------------------------


def classifier_free_guidance(model, labels, scale):
    """ε̃ = (1 + w) ε_θ(x_t, c) − w ε_θ(x_t), w = scale (Ho & Salimans, 2022) → again a model(x_t, t), for any sampler.

    labels: int64 (B,). model(x_t, t, y) takes y = model.num_classes for "no label"; both halves go through it as one
    batch. w = 0 is plain conditional sampling, w = −1 unconditional. A learned variance is taken from the labelled
    half. Refused: a model without classes, labels out of range."""
    null = getattr(model, "num_classes", None)
    if not null:
        raise ValueError("guidance needs a model that was built with num_classes")
    if not ((0 <= labels) & (labels <= null)).all():
        raise ValueError(f"labels must lie in 0…{null} ({null} is no label), got {labels.tolist()}")

    def guided(x_t, t):
        if scale == 0:
            return model(x_t, t, labels)
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null)]))
        (labelled, v), (unlabelled, _) = (half.tensor_split([x_t.shape[1]], dim=1) for half in both.chunk(2))
        return torch.cat([(1 + scale) * labelled - scale * unlabelled, v], dim=1)

    return guided


# ---- 4. The network --------------------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """32 groups, as in the paper; fewer where the channels don't divide by so many."""

    def __init__(self, channels, groups=32):
        super().__init__(math.gcd(channels, groups), channels, eps=1e-6)


def zero(module):
    """The module with all its weights at 0, so that the block it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class SinusoidalPositionEmbeddings(nn.Module):
    """t (B,) → (B, dim): sin(t ω_i) and then cos(t ω_i), with ω from 1 down to 1/10000 in equal ratios."""

    def __init__(self, dim):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the embedding's width must be even and at least 4, got {dim}")
        self.dim = dim

    def forward(self, t):
        half = self.dim // 2
        omega = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        angles = t[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class AttentionBlock(nn.Module):
    """softmax(q kᵀ/√C) v over the pixels, one head, with a residual: every place sees every other."""

    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).mT                                            # (B, HW, C)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = self.out((q / math.sqrt(q.shape[2]) @ k.mT).softmax(2) @ v)
        return x + h.mT.reshape(x.shape)


class ResidualBlock(nn.Module):
    """Two convolutions with a residual; the time is added between them (appendix B), attention follows where asked."""

    def __init__(self, in_channels, out_channels, time_dim, dropout=0.0, attention=False, groups=32):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = AttentionBlock(out_channels, groups) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Downsample(nn.Module):
    """Half the size, by a stride-2 convolution padded right and bottom only, as TensorFlow's SAME did."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x, emb=None):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: every pixel becomes four, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb=None):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """ε_θ(x_t, t), or ε_θ(x_t, t, y) with num_classes. UNet() is the paper's CIFAR-10 network, 35,746,307 parameters.

    dim · dim_mults are the widths, a level each, and each level has half the size of the last; num_res_blocks a level,
    one more on the way up; attention where the size is in attn_resolutions, and in the middle; none without any.
    time_dim is 4 dim unless given. y (B,) int64 in 0…num_classes, where num_classes itself, or no y at all, is "no
    label". learned_variance doubles the output channels. Norms have the paper's 32 groups from dim = 128 on, below it
    dim/16: on a CPU groups of fewer than 16 channels take twice as long. Refused: an image_size that can't be halved
    len(dim_mults) − 1 times, a dim that is no multiple of 4."""

    def __init__(self, image_channels=3, dim=128, dim_mults=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,),
                 image_size=32, dropout=0.1, time_dim=None, num_classes=None, learned_variance=False):
        super().__init__()
        self.halvings, self.num_classes, self.image_channels = len(dim_mults) - 1, num_classes, image_channels
        if image_size < 1 or image_size % 2**self.halvings:
            raise ValueError(f"image_size {image_size} can't be halved {self.halvings} times, as the "
                             f"{len(dim_mults)} levels of dim_mults {tuple(dim_mults)} ask: it must be a multiple of "
                             f"{2**self.halvings}")
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        time_dim = time_dim or 4 * dim
        self.position = SinusoidalPositionEmbeddings(dim)
        self.time = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.label = nn.Embedding(num_classes + 1, time_dim) if num_classes else None

        groups = 32 if dim >= 128 else max(1, dim // 16)
        block = functools.partial(ResidualBlock, time_dim=time_dim, dropout=dropout, groups=groups)
        channels, size, skips = dim, image_size, [dim]
        self.conv_in = nn.Conv2d(image_channels, dim, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(dim_mults):
            for _ in range(num_res_blocks):
                self.down.append(block(channels, dim * mult, attention=size in attn_resolutions))
                channels = dim * mult
                skips.append(channels)
            if level < self.halvings:
                self.down.append(Downsample(channels))
                size //= 2
                skips.append(channels)
        self.mid = nn.ModuleList(block(channels, channels, attention=attention)
                                 for attention in (bool(attn_resolutions), False))
        for level, mult in reversed(list(enumerate(dim_mults))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(channels + skips.pop(), dim * mult, attention=size in attn_resolutions))
                channels = dim * mult
            if level > 0:
                self.up.append(Upsample(channels))
                size *= 2
        self.norm_out = GroupNorm(channels, groups)
        self.conv_out = zero(nn.Conv2d(channels, image_channels * (2 if learned_variance else 1), 3, padding=1))

    def forward(self, x, t, y=None):
        if x.dim() != 4 or x.shape[1] != self.image_channels or any(n % 2**self.halvings for n in x.shape[2:]):
            raise ValueError(f"x must be (B, {self.image_channels}, H, W), H and W multiples of {2**self.halvings}, "
                             f"got {tuple(x.shape)}")
        if y is not None and self.label is None:
            raise ValueError("labels given to a network that was built without num_classes")
        emb = self.time(self.position(t).to(x.dtype))
        if self.label is not None:
            emb = emb + self.label(torch.full_like(t, self.num_classes) if y is None else y)
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(h if isinstance(layer, Upsample) else torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


# Published weights: what config.json must say, what it may also leave out, and how UNet calls the parts.
MUST_SAY = dict(attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
MAY_SAY = dict(act_fn="silu", attn_norm_num_groups=None, center_input_sample=False, class_embed_type=None,
               downsample_type="conv", mid_block_scale_factor=1, mid_block_type="UNetMidBlock2D", norm_num_groups=32,
               num_class_embeds=None, resnet_time_scale_shift="default", time_embedding_dim=None,
               time_embedding_type="positional", upsample_type="conv")
FREE = ("sample_size", "in_channels", "layers_per_block", "dropout", "num_train_timesteps")
NAMES = {r"time_embedding\.linear_1": "time.0", r"time_embedding\.linear_2": "time.2", "time_emb_proj": "time",
         r"mid_block\.resnets": "mid", r"mid_block\.attentions\.0": "mid.0.attention", "conv_norm_out": "norm_out",
         "conv_shortcut": "shortcut", "group_norm": "norm", r"to_out\.0|proj_attn": "out",
         "to_q|query": "qkv.0", "to_k|key": "qkv.1", "to_v|value": "qkv.2"}


def in_one_line(error):
    """What an exception says, as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def load_published(folder):
    """The network of a folder like google/ddpm-cifar10-32's: config.json, and diffusion_pytorch_model.bin (torch reads
    it) or .safetensors (the package of that name does) → the UNet, and its arguments but for image_channels.

    Refused: what can't be read, and, with the field's name, a config.json that asks for what UNet is not."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        shape = published_shape(config)
        file = folder / "diffusion_pytorch_model.bin"
        if file.with_suffix(".safetensors").exists() and not file.exists():
            from safetensors.torch import load_file
            weights = load_file(file.with_suffix(".safetensors"))
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        network = UNet(config["in_channels"], **shape)
        network.load_state_dict(renamed(weights, shape["num_res_blocks"]))
    except ImportError:
        raise ValueError(f"{folder} holds .safetensors, which need that package: pip install safetensors") from None
    except Exception as error:                                # whatever a foreign file makes the readers raise
        raise ValueError(f"{folder} is no published network that fits here: {in_one_line(error)}") from None
    return network.eval(), shape


def published_shape(config):
    """UNet's arguments that make it the network of a config.json."""
    widths, attention = config["block_out_channels"], [kind == "AttnDownBlock2D" for kind in config["down_block_types"]]
    dim = max(128, widths[0] // 128 * 128)                    # so that all our group norms have 32 groups
    can = dict(MUST_SAY, **MAY_SAY, out_channels=config["in_channels"], add_attention=any(attention),
               block_out_channels=[width // dim * dim for width in widths],
               down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
               up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)])
    says = {**MAY_SAY, "add_attention": True, **config}
    for name in sorted({*can, *config}):
        if name[0] != "_" and name not in FREE and (name not in can or says.get(name, "left out") != can[name]):
            raise ValueError(f"{name} can't be {says.get(name, 'left out')!r}")
    return dict(dim=dim, dim_mults=tuple(width // dim for width in widths), num_res_blocks=config["layers_per_block"],
                attn_resolutions=tuple(config["sample_size"] >> i for i, here in enumerate(attention) if here),
                image_size=config["sample_size"])


def renamed(weights, num_res_blocks):
    """Published weights under UNet's names; each attention's query, key and value become one."""
    def place(match):
        way, level, kind, i = match.groups()
        blocks = num_res_blocks + (way == "up")
        i = int(level) * (blocks + 1) + (blocks if "samplers" in kind else int(i))
        return f"{way}.{i}.attention" if kind == "attentions" else f"{way}.{i}"

    parts = {}
    for name, weight in weights.items():
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", place, name)
        for theirs, ours in NAMES.items():
            name = re.sub(theirs, ours, name)
        parts.setdefault(re.sub(r"qkv\.\d", "qkv", name), {})[name] = weight
    return {name: torch.cat([weight for _, weight in sorted(part.items())]) for name, part in parts.items()}


# ---- 5. Data ---------------------------------------------------------------------------------------------------------

TORCHVISION = dict(mnist=datasets.MNIST, fashion_mnist=datasets.FashionMNIST, cifar10=datasets.CIFAR10)


def load_data(name_or_folder, image_size=32, device="cpu", split=None):
    """Pictures, uint8 (N, C, H, W), and their labels, int64 (N,) or None, on the device.

    "digits" lies in assets/digits.png; "mnist", "fashion_mnist" and "cifar10" come through torchvision, downloaded into
    data/ when absent; anything else is a folder of pictures, resized and cropped to image_size, whose subfolders are
    the classes. split: None is all there is (of torchvision's sets the training half); "test" what training must not
    see: torchvision's test half, every tenth picture of the others; "train" the rest.
    Refused: a folder that is not there, holds no picture or one that can't be read; a download that fails."""
    if name_or_folder in TORCHVISION:
        try:
            dataset = TORCHVISION[name_or_folder]("data", train=split != "test", download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name_or_folder} is not in data/ and can't be downloaded ({error}); without a network "
                             "use --data digits or --data FOLDER, or put torchvision's files into data/") from None
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous().to(device), torch.as_tensor(dataset.targets).to(device)
    images, labels = load_digits() if name_or_folder == "digits" else load_folder(Path(name_or_folder), image_size)
    if split:
        chosen = (torch.arange(len(images)) % 10 == 9) == (split == "test")
        images, labels = images[chosen], None if labels is None else labels[chosen]
    return images.to(device), None if labels is None else labels.to(device)


def load_digits():
    """The 1,797 digits of assets/digits.png: ten rows of 8×8 tiles, a digit each, rows filled up with black."""
    sheet = pil_to_tensor(Image.open(Path(__file__).parent / "assets" / "digits.png"))[0]
    tiles = sheet.reshape(10, 8, -1, 8).transpose(1, 2)                           # (10, tiles in a row, 8, 8)
    labels, places = torch.nonzero(tiles.flatten(2).any(2), as_tuple=True)
    return tiles[labels, places][:, None], labels


def load_folder(folder, image_size):
    """Every picture below the folder; those of one subfolder are one class."""
    if not folder.is_dir():
        raise ValueError(f"no data set and no folder: {folder} (data sets: digits, {', '.join(TORCHVISION)})")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions() and p.is_file())
    if not paths:
        raise ValueError(f"no pictures in {folder}: it needs .png, .jpg or other picture files, in it or in subfolders")
    images = []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = file.convert("I").point(lambda v: v / 257) if file.mode.startswith("I;16") else file
                image = ImageOps.exif_transpose(image).convert("L" if image.mode == "I" else "RGBA").convert("RGBA")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} can't be read as a picture: {error}") from None
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        images.append(pil_to_tensor(ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)))
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(names))
    return torch.stack(images), torch.tensor([classes.index(n) for n in names]) if len(classes) > 1 else None


def to_model(pixels):
    """uint8 0…255 → float [−1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x):
    """float [−1, 1] → uint8 0…255, what lies outside being clamped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---- 6. Training -----------------------------------------------------------------------------------------------------


def option(default, help, low=-math.inf, high=math.inf, choices=None):
    """A field of Config, with what --help says of it and what it may be."""
    return dataclasses.field(default=default, metadata=dict(help=help, bounds=(low, high, choices)))


@dataclasses.dataclass
class Config:
    """All that a run depends on. The command line has a flag for each field and the checkpoint keeps them."""

    data: str = option("digits", "digits, mnist, fashion_mnist, cifar10, or a folder of pictures")
    image_size: int = option(8, "height and width, pixels; a folder's pictures are resized and cropped to it", 1, 4096)
    dim: int = option(32, "channels at full size; a multiple of 4", 4, 4096)
    dim_mults: tuple = option((1, 2), "channels of each level in multiples of dim, each level half the size", 1, 64)
    num_res_blocks: int = option(1, "residual blocks a level", 1, 16)
    attn_resolutions: tuple = option((4,), "sizes in pixels that have self-attention", 1, 4096)
    dropout: float = option(0.0, "dropout in the residual blocks, a probability", 0, 0.99)
    conditional: bool = option(True, "learn the labels, where the data have them")
    label_dropout: float = option(0.1, "share of the labels hidden in training, which is what guidance needs", 0, 1)
    timesteps: int = option(1000, "T, steps of the forward process", 2, 100000)
    schedule: str = option("linear", "β_t; the paper's is linear, here scaled by 1000/T", choices=("linear", "cosine"))
    variance: str = option("fixed_large", "σ_t² of the reverse process: β_t, β̃_t, or learned between the two",
                           choices=("fixed_large", "fixed_small", "learned_range"))
    loss: str = option("simple", "Eq. 14, or the bound of Eq. 5", choices=("simple", "bound"))
    weights: str = option(None, "a folder of published weights to start from, or with --sample to draw from")
    steps: int = option(1200, "training steps", 1)
    batch_size: int = option(128, "pictures a step, over all processes together", 1)
    lr: float = option(3e-3, "Adam's learning rate", 0, 1)
    warmup: int = option(50, "steps over which the learning rate rises from 0", 0)
    lr_decay: str = option("linear", "the learning rate after warm-up: constant, or falling to 0 at the last step",
                           choices=("constant", "linear"))
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", 0)
    ema_decay: float = option(0.9999, "decay of the averaged weights, a step", 0, 0.999999)
    flip: bool = option(False, "mirror half of the pictures left to right")
    seed: int = option(0, "seed of everything random")
    log_every: int = option(50, "steps between two lines of log.csv", 1)
    sample_every: int = option(500, "steps between two sample grids", 1)
    checkpoint_every: int = option(500, "steps between two checkpoints", 1)
    bf16: bool = option(None, "compute in bfloat16; unless said, where the processor has instructions for "
                        "it, which on a CPU is 1.3 (digits) to 1.5 times (the paper's network) as fast")
    compile: bool = option(None, "torch.compile the network, a minute at the start; unless said, on CUDA "
                           "with Triton only")
    device: str = option(None, "cuda (cuda:1 is the second), mps or cpu; unless said, the first that is there")
    out: str = option(None, "the run's folder; runs/<data> unless said")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low, high, choices = getattr(self, field.name), *field.metadata["bounds"]
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
            for number in value if field.type is tuple else [value] * (field.type in (int, float)):
                if not low <= number <= high:
                    raise ValueError(f"{field.name} must lie in {low}…{high}, got {number}")
        if not self.dim_mults:
            raise ValueError(f"dim_mults needs at least one level, got {self.dim_mults}")
        self.out = self.out or f"runs/{Path(self.data).resolve().name}"


PAPER = dict(image_size=32, dim=128, dim_mults=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1,
             conditional=False, steps=800_000, lr=2e-4, warmup=5000, lr_decay="constant", flip=True,
             sample_every=10_000, checkpoint_every=5000)
GREY_28 = dict(image_size=28, dim_mults=(1, 2, 2), attn_resolutions=(7,), steps=3000, batch_size=64, lr=2e-3,
               warmup=200, sample_every=1000)
FOLDER = dict(PAPER, dim=64, conditional=True, steps=50_000, lr=5e-4, warmup=500, sample_every=1000,
              checkpoint_every=500)
PRESETS = dict(digits={}, mnist=GREY_28, fashion_mnist=GREY_28, cifar10=PAPER)


def preset(data, **changes):
    """The Config that suits a data set, with changes."""
    return Config(**{"data": data, **PRESETS.get(data, FOLDER), **changes})


def build_diffusion(config):
    """The diffusion that a config asks for; the linear schedule's ends are scaled by 1000/T."""
    scale = 1000 / config.timesteps
    betas = (linear_beta_schedule(config.timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
             if config.schedule == "linear" else cosine_beta_schedule(config.timesteps))
    return GaussianDiffusion(betas, config.variance, config.loss)


def build(config, image_channels, num_classes):
    """The network and the diffusion that a config asks for."""
    model = UNet(image_channels, config.dim, config.dim_mults, config.num_res_blocks, config.attn_resolutions,
                 config.image_size, config.dropout, num_classes=num_classes,
                 learned_variance=config.variance == "learned_range")
    return model, build_diffusion(config)


def rank_and_world_size():
    """The number of this process, and how many share the work, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name=None):
    """The device of that name, or the best there is; under torchrun each process's own GPU. CUDA is put to TF32."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def autocast(config, device):
    """bfloat16 where the processor computes in it: it costs no quality, and a CPU that has it trains the digits 1.3
    times and the paper's network 1.5 times as fast."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
    return torch.autocast(device.type, torch.bfloat16, enabled=native if config.bf16 is None else config.bf16)


def keep_freed_memory():
    """Have glibc keep what a step frees for the next one. To hand it back and take it again, page by page, is a third
    of a small network's time on a CPU. Without glibc nothing happens."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                                  # as malloc.h has them
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def maybe_compile(config, device, network, mode=None):
    """The network through torch.compile, if config.compile says so or, where it is silent, on CUDA with Triton, which
    torch brings along on Linux alone."""
    wanted = config.compile
    if wanted is None:
        from torch.utils._triton import has_triton
        wanted = device.type == "cuda" and has_triton()
    if wanted and rank_and_world_size()[0] == 0:
        print("the network is compiled first, a minute or so: --no-compile does without", file=sys.stderr)
    return torch.compile(network, mode=mode, dynamic=False) if wanted else network


def derive_seed(seed, use, *numbers):
    """A 32-bit seed for one use of randomness, such as derive_seed(seed, "training", step, rank). Different uses and
    different numbers give different streams: children of seed in NumPy's SeedSequence."""
    spawn_key = (int.from_bytes(use.encode(), "big"), *numbers)
    return np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1).item()


def learning_rate(config, step):
    """The share of config.lr that a step takes: a linear rise over config.warmup steps, then config.lr_decay."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    return rise * (1 - step / config.steps if config.lr_decay == "linear" else 1.0)


@torch.no_grad()
def ema_update(averaged, model, n, decay):
    """w̄ ← d w̄ + (1 − d) w for all weights, d = min(decay, (1 + n)/(10 + n)) after n updates, so that a short run
    averages too; the first copies. (torch's AveragedModel reads n from the device: every step would wait for it.)"""
    d = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - d)


def atomic_write(path, save):
    """save(file) beside, synced, then renamed: at any instant path is the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):                  # torch turns a full disk into a RuntimeError
            raise OSError(f"{path} can't be written ({error.__context__ or error}); what it held is whole") from None
        raise


def read_checkpoint(out, device="cpu"):
    """The checkpoint of a run's folder, without running any code that it may hold."""
    path = Path(out) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: --out names the folder of a run; python ddpm.py --train makes one")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return {**checkpoint, "config": Config(**{**checkpoint["config"], "out": str(out)})}
    except Exception as error:                                # whatever a foreign file makes torch's reader raise
        raise ValueError(f"{path} is no checkpoint of ddpm.py, or not a whole one ({type(error).__name__})") from None


LOG = "step,loss,gradient_norm,learning_rate,images_per_second\n"


def start_folder(out, first):
    """An empty folder for a new run, an earlier run's being moved aside; or an old run's, its log cut at step first."""
    rows = []
    if first:
        rows = (out / "log.csv").read_text().splitlines(keepends=True)[1:]
    elif (out / "checkpoint.pt").exists():
        aside = next(p for n in range(1, 10**6) if not (p := out.with_name(f"{out.name}-{n}")).exists())
        print(f"the earlier run in {out} is now {out.rename(aside)}")
    out.mkdir(parents=True, exist_ok=True)
    kept = [LOG, *(row for row in rows if int(row.split(",")[0]) <= first)]
    atomic_write(out / "log.csv", lambda file: file.write("".join(kept).encode()))


@contextlib.contextmanager
def signals_noted():
    """A list that a first SIGINT or SIGTERM is put into; a second one ends the process."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config, checkpoint=None, watch=None):
    """Algorithm 1 with what makes it work in practice → the run's folder.

    checkpoint, from read_checkpoint, goes on with a run. watch(run, step) is called every config.sample_every steps and
    at the end; unless given, it draws a grid. Under torchrun every process works on its share of each batch."""
    rank, ranks = rank_and_world_size()
    if config.batch_size % ranks:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the {ranks} processes that share it")
    device, out = pick_device(config.device), Path(config.out)
    images, labels = load_data(config.data, config.image_size, device, split="train")
    if images.shape[2:] != (config.image_size, config.image_size):
        raise ValueError(f"image_size must be {images.shape[2]} for {config.data}, got {config.image_size}")
    num_classes = int(labels.max()) + 1 if config.conditional and labels is not None else None
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model, diffusion = build(config, images.shape[1], num_classes)
    if config.weights and not checkpoint:
        start, _ = load_published(config.weights)
        if start.image_channels != images.shape[1]:
            raise ValueError(f"{config.data} has {images.shape[1]} channels, {config.weights} {start.image_channels}")
        model.load_state_dict(start.state_dict())
    model, diffusion = model.to(device, memory_format=torch.channels_last), diffusion.to(device)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate, config))
    parts = dict(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler)
    first = 0
    if checkpoint:
        if checkpoint["num_classes"] != num_classes:
            raise ValueError(f"{config.data} has {num_classes} classes, the run in {out} {checkpoint['num_classes']}")
        first = checkpoint["step"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    if rank == 0:
        start_folder(out, first)
        print(f"{len(images):,} pictures of {config.data}, {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{device}, {config.steps - first:,} steps into {out}")
    network = model
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")
        network = nn.parallel.DistributedDataParallel(model)
    network = maybe_compile(config, device, network)
    batch_size = config.batch_size // ranks                                                  # of this process

    history, since = [], time.perf_counter()
    bar = tqdm(total=config.steps * config.batch_size, initial=first * config.batch_size, unit=" images",
               unit_scale=True, disable=None if rank == 0 else True)
    with signals_noted() as noted, bar:
        for step in range(first, config.steps):
            torch.manual_seed(derive_seed(config.seed, "training", step, rank))
            chosen = torch.randint(len(images), (batch_size,), device=device)
            x_start = to_model(images[chosen])                                               # x_0 ~ q(x_0)
            t = torch.randint(diffusion.timesteps, (batch_size,), device=device)             # t ~ Uniform{1 … T}
            noise = torch.randn_like(x_start)                                                # ε ~ N(0, I)
            if config.flip:
                mirrored = torch.randint(2, (batch_size,), device=device).bool()
                x_start = torch.where(broadcast(mirrored, x_start), x_start.flip(3), x_start)
            y = None
            if num_classes:
                hidden = torch.rand(batch_size, device=device) < config.label_dropout
                y = torch.where(hidden, num_classes, labels[chosen])
            with autocast(config, device):
                loss = diffusion.p_losses(functools.partial(network, y=y), x_start, t, noise)
            loss.backward()                                                                  # ∇_θ ‖ε − ε_θ(x_t, t)‖²
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ema_update(ema, model, step, config.ema_decay)

            done = step + 1
            history.append(torch.stack([loss.detach(), norm]))
            bar.update(config.batch_size)
            stop = torch.tensor(float(bool(noted)))
            if ranks > 1:
                dist.all_reduce(stop, group=control)
            save = stop or done == config.steps or done % config.checkpoint_every == 0
            if save or done % config.log_every == 0:
                losses, norms = torch.stack(history, dim=1).float().cpu()
                if ranks > 1:
                    dist.all_reduce(losses, group=control)
                    losses /= ranks
                finite = losses.isfinite() & norms.isfinite()
                if not finite.all():
                    raise ValueError(f"loss or gradient is not finite at (seed {config.seed}, step "
                                     f"{done - len(history) + int(finite.int().argmin())}); {out}/checkpoint.pt is the "
                                     f"last good one; a smaller --lr than {config.lr:g} may help")
                speed, since = len(history) * config.batch_size / (time.perf_counter() - since), time.perf_counter()
                bar.set_postfix(loss=f"{losses.mean():.4f}")
                if rank == 0:
                    with open(out / "log.csv", "a") as file:
                        file.write(f"{done},{losses.mean():.6f},{norms.mean():.4f},{config.lr * learning_rate(config, step):.3g},"
                                   f"{speed:.0f}\n")
                history.clear()
            if rank == 0 and save:
                state = {name: part.state_dict() for name, part in parts.items()}
                state.update(step=done, config=dataclasses.asdict(config), image_channels=images.shape[1],
                             num_classes=num_classes)
                atomic_write(out / "checkpoint.pt", functools.partial(torch.save, state))
            if rank == 0 and (done == config.steps or done % config.sample_every == 0) and not stop:
                (watch or Run.grid)(Run(config, ema, diffusion), done)
                since = time.perf_counter()
            if stop:
                break
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0 and stop and done < config.steps:
        raise KeyboardInterrupt(f"stopped after step {done:,}; {out}/checkpoint.pt holds it, go on with: "
                                f"python ddpm.py --train --resume --out {out}")
    return out


# ---- 7. Sampling and the command line --------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A trained network with all that sampling needs."""

    config: Config
    model: nn.Module
    diffusion: GaussianDiffusion

    @classmethod
    def ready(cls, config, model, diffusion, device):
        """A network on the device, as fast there as config lets it: compiled, it is one CUDA graph a call."""
        model = model.to(device, memory_format=torch.channels_last).eval()
        return cls(config, maybe_compile(config, device, model, "reduce-overhead"), diffusion.to(device))

    @classmethod
    def read(cls, out, device=None, bf16=None, compile=None):
        """The run of a folder, with its averaged weights."""
        device, checkpoint = pick_device(device), read_checkpoint(out)
        config = dataclasses.replace(checkpoint["config"], bf16=bf16, compile=compile)
        model, diffusion = build(config, checkpoint["image_channels"], checkpoint["num_classes"])
        model.load_state_dict(checkpoint["ema"])
        return cls.ready(config, model, diffusion, device)

    @classmethod
    def of_weights(cls, folder, out=None, device=None, bf16=None, compile=None):
        """Published weights, which were averaged already, with the paper's diffusion."""
        device, (model, shape) = pick_device(device), load_published(folder)
        out = out or f"runs/{Path(folder).resolve().name}"
        config = preset("cifar10", **shape, bf16=bf16, compile=compile, out=out)
        return cls.ready(config, model, build_diffusion(config), device)

    @property
    def device(self):
        """Where it draws."""
        return self.diffusion.betas.device

    def trajectory(self, count, labels=None, seed=0, sampler="ddim", sampling_steps=None, eta=0.0, guidance=0.0):
        """An iterator over x_{t−1}, …, x_0 of count pictures, all noise being the seed's; labels (count,) or None.
        sampling_steps is S; unless given, 50 or T if that is less for DDIM, and T for Algorithm 2."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (count, self.model.image_channels, self.config.image_size, self.config.image_size)
        x_t = torch.randn(shape, generator=generator, device=self.device)
        model = self.model
        if labels is not None:
            model = classifier_free_guidance(model, labels.to(self.device), guidance)
        model, diffusion = autocast(self.config, self.device)(functools.partial(model)), self.diffusion
        if sampler == "ddim":
            steps = min(50, diffusion.timesteps) if sampling_steps is None else sampling_steps
            return diffusion.ddim_sample_steps(model, x_t, steps, eta, generator=generator)
        if sampling_steps is not None:
            diffusion, model = diffusion.respace(model, sampling_steps)
        return diffusion.p_sample_steps(model, x_t, generator=generator)

    def labels(self, count, label=None):
        """Every class in turn, or one label; None for a network without classes."""
        if not self.model.num_classes:
            return None
        return torch.arange(count) % self.model.num_classes if label is None else torch.full((count,), label)

    def grid(self, step):
        """Write a grid of samples, a column a class, named after a step of training."""
        classes = self.model.num_classes
        count = 10 * min(classes, 16) if classes else 64
        seed = derive_seed(self.config.seed, "grid")
        pixels = to_pixels(last(self.trajectory(count, self.labels(count), seed)))
        path = Path(self.config.out) / f"samples-{step:06}.png"
        atomic_write(path, functools.partial(make_grid_image(pixels, classes).save, format="PNG"))


def make_grid_image(pixels, columns=None):
    """Pictures, uint8 (N, C, H, W), as one grid, small ones enlarged."""
    grid = make_grid(pixels.cpu(), nrow=columns or math.ceil(len(pixels) ** 0.5), padding=1, pad_value=64)
    zoom = max(1, 32 // pixels.shape[-1])
    return to_pil_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))


def sample(run, count, label=None, unconditional=False, sampling_batch=64, individual=False, animate=False, seed=0,
           **how):
    """Draw count pictures as Run.trajectory does and write them into the run's folder → the paths written.

    Batches are equally large, so that a compiled network sees one shape. Batch i starts from (seed, i), so that the
    pictures do not depend on how many processes share the batches."""
    if count < 1 or sampling_batch < 1:
        raise ValueError(f"--sample and --sampling-batch must be at least 1, got {count} and {sampling_batch}")
    rank, ranks = rank_and_world_size()
    quiet = None if rank == 0 else True
    batches = math.ceil(count / sampling_batch)
    size = math.ceil(count / batches)
    labels = None if unconditional else run.labels(batches * size, label)
    columns = run.model.num_classes if labels is not None and label is None else None
    drawn, frames = {}, []
    for i in tqdm(range(rank, batches, ranks), unit=" batches", disable=quiet):
        part = None if labels is None else labels[i * size:(i + 1) * size]
        steps = run.trajectory(size, part, derive_seed(seed, "sampling", i), **how)
        for x_t in tqdm(steps, unit=" steps", leave=False, disable=quiet):
            if animate and i == 0:
                frames.append(to_pixels(x_t).cpu())
        drawn[i] = to_pixels(x_t).cpu()
    if ranks > 1:
        dist.init_process_group("gloo")
        gathered = [None] * ranks
        dist.all_gather_object(gathered, drawn)
        drawn = {i: pixels for part in gathered for i, pixels in part.items()}
        dist.destroy_process_group()
    if rank:
        return []

    out = Path(run.config.out)
    out.mkdir(parents=True, exist_ok=True)
    pixels, paths = torch.cat([drawn[i] for i in sorted(drawn)])[:count], [out / "samples.png"]
    atomic_write(paths[0], functools.partial(make_grid_image(pixels[:1024], columns).save, format="PNG"))
    if individual:
        fresh = out / "individual.part"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for i, one in enumerate(pixels):
            to_pil_image(one).save(fresh / f"{i:05}.png")
        shutil.rmtree(out / "individual", ignore_errors=True)
        paths.append(fresh.rename(out / "individual"))
    if animate:
        shown = [*frames[:-1:math.ceil(len(frames) / 60)], frames[-1]]
        first, *rest = [make_grid_image(frame, columns) for frame in shown]
        paths.append(out / "samples.gif")
        atomic_write(paths[-1], functools.partial(first.save, format="GIF", save_all=True, append_images=rest, loop=0,
                                           duration=[60] * len(rest) + [2000]))
    return paths


def evaluate(run, count, seed=0):
    """Print the bound on −log₂ p(x_0) of count held-out pictures, term by term (Eq. 5)."""
    if count < 1:
        raise ValueError(f"--evaluate must be at least 1, got {count}")
    images, _ = load_data(run.config.data, run.config.image_size, run.device, split="test")
    if not len(images):
        raise ValueError(f"{run.config.data} holds too few pictures to have kept any from training: it takes ten")
    generator, terms, images = torch.Generator(run.device), [], images[:count]
    generator.manual_seed(derive_seed(seed, "evaluation"))
    for pixels in tqdm(images.chunk(math.ceil(len(images) / 250)), unit=" batches", disable=None):
        with autocast(run.config, run.device):
            terms.append(run.diffusion.bits_per_dim(run.model, to_model(pixels), generator=generator))
    bits = {name: torch.cat([term[name] for term in terms]) for name in terms[0]}
    rate = bits["L_T"] + bits["L_{t-1}"].sum(1)
    rmse = 127.5 * bits["squared_error"][:, 0].mean().sqrt()
    print(f"{len(rate)} held-out pictures of {run.config.data}, in bits/dim:")
    for name, value in [("L_T", bits["L_T"]), ("L_1 … L_{T-1}", bits["L_{t-1}"].sum(1)), ("L_0", bits["L_0"]),
                        ("total: NLL ≤", bits["total"])]:
        print(f"  {name:14} {value.mean():.4f} ± {value.std() / len(value) ** 0.5:.4f}")
    print(f"  rate {rate.mean():.4f}, distortion {bits['L_0'].mean():.4f} (RMSE {rmse:.2f} of 255)")


FIELDS = [field.name for field in dataclasses.fields(Config)]
MACHINE = ("device", "bf16", "compile")
RUN = ("out", "data", *MACHINE)                                        # which run, and what does not change its result
MODES = {
    "train": ("train", *FIELDS),
    "train --resume": ("train", "resume", *RUN, "steps", "log_every", "sample_every", "checkpoint_every"),
    "sample": ("sample", *RUN, "weights", "seed", "sampler", "sampling_steps", "eta", "guidance", "label",
               "unconditional", "sampling_batch", "individual", "animate"),
    "evaluate": ("evaluate", *RUN, "seed"),
}


def parse(arguments):
    """The command line → its mode, and a dict of what was given. A flag that the mode would pass over is refused."""
    parser = argparse.ArgumentParser("ddpm.py", description="Train a DDPM, sample from it, evaluate it.",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"ddpm.py: error: {message}\n")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--train", action="store_true", help="train a network")
    modes.add_argument("--sample", type=int, metavar="N", help="draw N pictures from the last run, or that of --out")
    modes.add_argument("--evaluate", type=int, nargs="?", const=256, metavar="N",
                       help="bits/dim of N held-out pictures (256)")
    parser.add_argument("--resume", action="store_true", help="with --train: go on with the last run, or that of --out")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", choices=("ddpm", "ddim"), help="ddim unless said, or ddpm: Algorithm 2")
    sampling.add_argument("--sampling-steps", type=int, metavar="S", help="steps, 1…T (50 of DDIM, T of DDPM)")
    sampling.add_argument("--eta", type=float, help="noise of DDIM, 0…1: 0 has none, 1 is DDPM's (0)")
    sampling.add_argument("--guidance", type=float, metavar="W", help="weight of classifier-free guidance (0: none)")
    sampling.add_argument("--label", type=int, metavar="K", help="the class to draw (all in turn)")
    sampling.add_argument("--unconditional", action="store_true", help="draw without a label")
    sampling.add_argument("--sampling-batch", type=int, metavar="B", help="pictures drawn at once (64)")
    sampling.add_argument("--individual", action="store_true", help="write each sample as a PNG of its own too")
    sampling.add_argument("--animate", action="store_true", help="write the reverse process as a GIF too")
    training = parser.add_argument_group("training", "The defaults in brackets are those of --data digits; "
                                                     "--data cifar10 takes the paper's.")
    for field in dataclasses.fields(Config):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        text += "" if field.default is None else f" ({field.default})"
        if field.type is bool:
            training.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif field.type is tuple:
            training.add_argument(flag, type=int, nargs="*", metavar="N", help=text)
        else:
            training.add_argument(flag, type=field.type, choices=field.metadata["bounds"][2], help=text)
    given = vars(parser.parse_args(arguments))
    mode = next((name for name in MODES if name in given), None)
    if not mode:                                                           # said last, so that a misspelt flag is named
        parser.error("one of --train, --sample N and --evaluate is required")
    if mode == "train" and "resume" in given:
        mode = "train --resume"
    for name in given:
        if name not in MODES[mode]:
            parser.error(f"--{name.replace('_', '-')} does not go with --{mode}")
    return mode, given


def find_run(given):
    """The run's folder that --out or --data names, or the newest."""
    if "out" in given or "data" in given:
        return given.get("out") or preset(given["data"]).out
    checkpoints = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not checkpoints:
        raise ValueError("no run in runs/ yet: python ddpm.py --train makes one, --out names one elsewhere")
    return str(checkpoints[-1].parent)


def run_train(given):
    """--train, anew or from published weights, or --resume."""
    given.pop("train")
    if given.pop("resume", False):
        checkpoint = read_checkpoint(find_run(given))
        given.pop("data", None)
        config = dataclasses.replace(checkpoint["config"], **given)
        if checkpoint["step"] >= config.steps:
            raise ValueError(f"{config.out} has its {checkpoint['step']:,} steps already: --steps N goes on to N")
        out = train(config, checkpoint)
    else:
        shape = {**load_published(given["weights"])[1], "conditional": False} if "weights" in given else {}
        for name in shape:
            if name in given:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --weights, which have their own")
        out = train(preset(**{"data": "digits", **shape, **given}))
    if rank_and_world_size()[0] == 0:
        print(f"the run is in {out}: checkpoint.pt, log.csv, samples-*.png")
        print(f"next: python ddpm.py --sample 64 --out {out}")


def run_sample(given):
    """--sample: refuse what does not fit the run, then draw."""
    machine = [given.get(name) for name in MACHINE]
    if "weights" in given:
        if "data" in given:
            raise ValueError("--data does not go with --weights, which are no run of a data set")
        run = Run.of_weights(given["weights"], given.get("out"), *machine)
    else:
        run = Run.read(find_run(given), *machine)
    how = {name: value for name, value in given.items() if name not in ("sample", "weights", *RUN)}
    guidance, label, classes = how.get("guidance", 0.0), how.get("label"), run.model.num_classes
    if how.get("sampler") == "ddpm" and "eta" in how:
        raise ValueError(f"--eta {how['eta']} is DDIM's: --sampler ddpm has the variance that it was trained with")
    if not math.isfinite(guidance):
        raise ValueError(f"--guidance must be finite, got {guidance}")
    if not classes and (label is not None or guidance):
        raise ValueError(f"--label and --guidance need a network that learned labels; that in {run.config.out} did not")
    if how.get("unconditional") and (label is not None or guidance):
        raise ValueError("--unconditional goes with neither --label nor --guidance")
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"--label must lie in 0…{classes - 1}, got {label}")
    for path in sample(run, given["sample"], **how):
        print(path)


def main(arguments=None):
    """What the user can put right ends in one line and status 2, an interruption in one line and status 130."""
    mode, given = parse(arguments)
    keep_freed_memory()
    try:
        if not 0 <= given.get("seed", 0) < 2**32:
            raise ValueError(f"--seed must lie in 0…{2**32 - 1}, got {given['seed']}")
        if mode == "sample":
            run_sample(given)
        elif mode == "evaluate":
            run = Run.read(find_run(given), *[given.get(name) for name in MACHINE])
            evaluate(run, given["evaluate"], given.get("seed", 0))
        else:
            run_train(given)
        return
    except (ValueError, OSError) as error:
        status, line = 2, f"error: {error}"
    except KeyboardInterrupt as interruption:
        status, line = 130, interruption or "interrupted"
    except torch.OutOfMemoryError as error:
        status, line = 2, f"error: {str(error).split('. ')[0]}; a smaller --batch-size or --sampling-batch needs less"
    except torch._dynamo.exc.TorchDynamoException as error:
        status, line = 2, f"error: torch.compile fails ({in_one_line(error)}); --no-compile does without"
    print(f"ddpm.py: {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
