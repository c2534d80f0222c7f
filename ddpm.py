"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020) in one file, with DDIM, DPM-Solver++ and guidance.

Read it beside the paper, from top to bottom. Sections 1 to 6 are the method, of this paper and of those that the
functions name; the rest is plumbing.
    1 noise schedules     2 diffusion: Algorithm 2     3 guidance     4 network     5 training: Algorithm 1
    6 sampling: DDIM, DPM-Solver++, the likelihood, and from a trained network to image files
    7 data     8 configuration     9 files and devices     10 published weights     11 command line

Equation, algorithm and section numbers are the paper's unless another paper is named. The paper counts t = 1…T with
ᾱ_0 = 1; the code counts t = 0…T−1, so code t = paper t − 1. An argument t is the code's: int64 (B,), or one int for the
whole batch; ddim_sample, p_sample_steps and interpolate take ints only. Formulas of this paper have the paper's t,
those of DDIM, DPM-Solver and respacing the code's, where t = −1 denotes x_0. Images are float (B, C, H, W) in [−1, 1].

    python ddpm.py --train         # train on handwritten digits: any machine, a few minutes
    python ddpm.py --sample 64     # draw samples from the trained network; --data FOLDER trains on your own images
    python ddpm.py --help          # everything else
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

# Apple's GPUs have no kernel for log_ndtr: the CPU takes over. (No effect if torch was imported before.)
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ---- 1. Noise schedules ----------------------------------------------------------------------------------------------


def linear_beta_schedule(timesteps, start=0.0001, end=0.02):
    """β_1, …, β_T evenly spaced from start to end (§4). Returns (T,) float64. The defaults assume T = 1000."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps, s=0.008):
    """ᾱ_t = f(t)/f(0) with f(t) = cos²((t/T + s)/(1 + s) · π/2) (Improved DDPM Eq. 17), so β_t = 1 − ᾱ_t/ᾱ_{t−1},
    at most 0.999. Returns (T,) float64."""
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    f = torch.cos((t / timesteps + s) / (1 + s) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# ---- 2. Diffusion ----------------------------------------------------------------------------------------------------


def extract(coefficients, t, x):
    """Returns coefficients[t] in x's dtype. For t (B,) its shape is (B, 1, …, 1), to broadcast against x (B, …); for an
    int t it is a single number."""
    return broadcast(coefficients[t], x).to(x.dtype)


def broadcast(values, x):
    """values (B,) as (B, 1, …, 1), to broadcast against x (B, …); a single number stays one."""
    if not torch.is_tensor(values) or values.dim() == 0:
        return values
    return values.reshape(-1, *[1] * (x.dim() - 1))


def sample_noise(shape, like, generator=None, noise=None):
    """Returns noise if it is given, or else a sample of N(0, I) of this shape, with the dtype and device of like.
    generator is a torch.Generator, or a list of them with one for each image. Raises ValueError if noise has another
    shape, if noise or like are integers, or for another number of generators than images."""
    if not like.is_floating_point():
        raise ValueError(f"images must be floats scaled to [-1, 1], got {like.dtype}")
    if noise is None and isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{shape[0]} images need as many generators, got {len(generator)}")
        return torch.cat([sample_noise((1, *shape[1:]), like, each) for each in generator])
    if noise is None:
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    if noise.shape != torch.Size(shape):
        raise ValueError(f"shapes differ: {tuple(shape)} and noise {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be floats, got {noise.dtype}")
    return noise


class DDPM(nn.Module):
    """The forward process q (Eq. 2), the reverse process p_θ (Eq. 1) and the losses between them, for given betas (T,):
    the paper's §2 and §3. GaussianDiffusion (section 6) inherits from it and adds samplers: use that class.

    A model is any callable model(x_t, t) that returns its prediction, shaped like x_t; it receives t as int64 (B,).
    With a learned variance it also returns v, which sets the variance: concatenated to the prediction's channels.

    prediction: "noise" is ε_θ; "velocity" is √ᾱ_t ε − √(1−ᾱ_t) x_0, known as v-prediction (Salimans & Ho, 2022, §4).
    In x̂_0, an error of ε_θ is multiplied by √(1−ᾱ_t)/√ᾱ_t, an error of the velocity by √(1−ᾱ_t) only.
    variance is σ_t² of p_θ (§3.2): "fixed_large" is β_t, optimal if x_0 ~ N(0, I); "fixed_small" is β̃_t, optimal if
    x_0 is a single point; "learned_range" interpolates between their logarithms with v (Improved DDPM Eq. 15).
    loss: "simple" is the squared error of the prediction (Eq. 14), with a learned variance L_hybrid (Improved DDPM Eq.
    16); "bound" is Eq. 5.
    dtype is that of the coefficients, which are computed in float64. They are buffers outside the state dict.

    Raises ValueError unless 0 < β_t < 1. Warns if √ᾱ_T > 0.05: x_T then still contains x_0, so that sampling from
    N(0, I) starts from the wrong distribution."""

    def __init__(self, betas, variance="fixed_large", loss="simple", dtype=torch.float32, prediction="noise"):
        super().__init__()
        # Checks
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            got = f"shape {tuple(betas.shape)}"
            if betas.numel():
                got += f" and values in {betas.min():g}…{betas.max():g}"
            raise ValueError(f"betas must be one row of numbers strictly between 0 and 1, got {got}")
        if variance not in ("fixed_large", "fixed_small", "learned_range"):
            raise ValueError(f"variance must be fixed_large, fixed_small or learned_range, got {variance!r}")
        if loss not in ("simple", "bound"):
            raise ValueError(f"loss must be simple or bound, got {loss!r}")
        if prediction not in ("noise", "velocity"):
            raise ValueError(f"prediction must be noise or velocity, got {prediction!r}")
        self.timesteps = len(betas)
        self.variance_type = variance
        self.loss_type = loss
        self.prediction_type = prediction

        # α_t, ᾱ_t, ᾱ_{t−1} (which is 1 at paper t = 1) and β̃_t (Eq. 7).
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        self._alphas_cumprod = alphas_cumprod.tolist()  # Python floats, for the samplers of section 6
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas

        # β̃_1 = 0 has no logarithm; like the authors' code, use that of β̃_2 (of β_1 if T = 1).
        positive_variance = posterior_variance.clone()
        positive_variance[0] = posterior_variance[1] if len(betas) > 1 else betas[0]

        signal_left = alphas_cumprod[-1].sqrt()
        if signal_left > 0.05:
            message = f"√ᾱ_T = {signal_left:.3f}, so x_T still contains x_0: more or larger betas make it < 0.05"
            warnings.warn(message, stacklevel=2)

        # The coefficients of the formulas below, each indexed by t. Those of Eq. 7 are of x_0 and of x_t.
        def register(name, coefficient):
            self.register_buffer(name, coefficient.to(dtype), persistent=False)

        register("betas", betas)
        register("log_betas", betas.log())
        register("alphas_cumprod", alphas_cumprod)
        register("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        register("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())
        register("posterior_variance", posterior_variance)
        register("posterior_log_variance", positive_variance.log())
        register("posterior_mean_x_start", alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod))
        register("posterior_mean_x_t", alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod))

    # -- Forward process --
    def q_sample(self, x_start, t, noise=None):
        """Sample x_t ~ q(x_t|x_0) in one step: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε (Eq. 4)."""
        noise = sample_noise(x_start.shape, x_start, noise=noise)
        self._check(x_start, t)
        mean = extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return mean + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start, x_t, t):
        """Returns mean, variance and log variance of q(x_{t−1}|x_t, x_0) (Eq. 6, 7):
        μ̃_t = √ᾱ_{t−1} β_t/(1−ᾱ_t) · x_0 + √α_t (1−ᾱ_{t−1})/(1−ᾱ_t) · x_t and β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t) · β_t.
        At code t = 0 the variance is 0, and its logarithm is replaced by that of code t = 1."""
        self._check(x_t, t, x_start)
        mean = extract(self.posterior_mean_x_start, t, x_t) * x_start + extract(self.posterior_mean_x_t, t, x_t) * x_t
        return mean, extract(self.posterior_variance, t, x_t), extract(self.posterior_log_variance, t, x_t)

    # -- Training loss --
    def p_losses(self, model, x_start, t, noise=None):
        """Returns the loss of a batch, a scalar.

        "simple" is ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖², averaged over images, channels and pixels (Eq. 14). For a
        velocity it is the squared error of the velocity, 1/ᾱ_t times that of ε. A learned variance adds 0.001 L_vlb
        without gradient through ε_θ, so that the bound trains v only (L_hybrid, Improved DDPM Eq. 16).
        "bound" is L in bits/dim without the constant L_T (Eq. 5). For a fixed variance and paper t > 1 its terms are
        the squared error weighted as in Eq. 12, plus a constant.
        Both bounds are unbiased only if t is drawn uniformly."""
        noise = sample_noise(x_start.shape, x_start, noise=noise)
        x_t = self.q_sample(x_start, t, noise)
        predicted_noise, v = self._predict(model, x_t, t)

        if self.loss_type == "bound":
            bound, _ = self.bound_term(x_start, x_t, t, predicted_noise, v)
            return self.timesteps * bound.mean()
        error = noise - predicted_noise
        if self.prediction_type == "velocity":  # ε − ε_θ = √ᾱ_t (velocity − predicted velocity)
            error = error / extract(self.sqrt_alphas_cumprod, t, x_t)
        loss = error.square().mean()  # Eq. 14
        if v is not None:
            bound, _ = self.bound_term(x_start, x_t, t, predicted_noise.detach(), v)
            loss = loss + 0.001 * self.timesteps * bound.mean()
        return loss

    # -- Reverse process --
    def predict_x_start(self, x_t, t, noise):
        """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ) / √ᾱ_t (Eq. 15): Eq. 4 solved for x_0."""
        self._check(x_t, t, noise)
        signal_part = x_t - extract(self.sqrt_one_minus_alphas_cumprod, t, x_t) * noise
        return signal_part / extract(self.sqrt_alphas_cumprod, t, x_t)

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        """Returns μ_θ, σ_t² and log σ_t² of p_θ(x_{t−1}|x_t), and x̂_0. The mean is μ_θ = μ̃_t(x_t, x̂_0) (Eq. 11).
        Without the clamp this is exactly Algorithm 2's (x_t − β_t/√(1−ᾱ_t) ε_θ) / √α_t. clip_denoised first clamps x̂_0
        to [−1, 1], as the authors' code does although the paper does not say so: no image lies outside, and early in
        sampling, where 1/√ᾱ_t magnifies every error of ε_θ, the clamp keeps colours from saturating."""
        self._check(x_t, t)
        predicted_noise, v = self._predict(model, x_t, t)
        return self._mean_variance(x_t, t, predicted_noise, v, clip_denoised)

    def _mean_variance(self, x_t, t, predicted_noise, v, clip_denoised):
        """μ_θ (Eq. 11), σ_t², log σ_t² and x̂_0 for a given prediction ε_θ and v."""
        pred_x_start = self.predict_x_start(x_t, t, predicted_noise)
        if clip_denoised:
            pred_x_start = pred_x_start.clamp(-1, 1)
        mean, variance, log_variance = self.q_posterior(pred_x_start, x_t, t)  # Eq. 11, and β̃_t
        if self.variance_type == "fixed_large":  # at code t = 0 the authors' code has log β̃_2, for a smaller L_0
            variance = extract(self.betas, t, x_t)
            log_variance = extract(self.log_betas, t, x_t)
        elif self.variance_type == "learned_range":
            log_variance = v * extract(self.log_betas, t, x_t) + (1 - v) * log_variance
            variance = log_variance.exp()
        return mean, variance, log_variance, pred_x_start

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip_denoised=True, noise=None, generator=None):
        """One step of Algorithm 2: x_{t−1} = μ_θ(x_t, t) + σ_t z with z ~ N(0, I), but z = 0 at the last step."""
        mean, variance, _, _ = self.p_mean_variance(model, x_t, t, clip_denoised)
        z = sample_noise(x_t.shape, x_t, generator, noise)
        return mean + broadcast(t > 0, x_t) * variance.sqrt() * z

    def p_sample_steps(self, model, x_t, t=None, clip_denoised=True, generator=None):
        """Algorithm 2 step by step, for progress bars and animations, from x_t at code t (default: T−1) to x_0."""
        start = self.timesteps - 1 if t is None else t
        self._check(x_t, start)
        for t in range(start, -1, -1):
            x_t = self.p_sample(model, x_t, t, clip_denoised, generator=generator)
            yield x_t

    def p_sample_loop(self, model, shape, clip_denoised=True, noise=None, generator=None):
        """Algorithm 2: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(shape, like=self.betas, generator=generator, noise=noise)
        return last(self.p_sample_steps(model, x_t, clip_denoised=clip_denoised, generator=generator))

    # -- Variational bound and score --
    def bound_term(self, x_start, x_t, t, predicted_noise, v, clip_denoised=False):
        """The term of Eq. 5 at t, estimated from x_t and the prediction for it: at code t = 0 L_0 = −log p_θ(x_0|x_1)
        (Eq. 13), else L_{t−1} = KL(q(x_{t−1}|x_t, x_0) ‖ p_θ(x_{t−1}|x_t)), which Eq. 8 to 10 rewrite for a fixed σ_t².
        Returns it in bits/dim (B,), and x̂_0. A loss must not clamp: no gradient flows through a clamped x̂_0."""
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        mean, _, log_variance, pred_x_start = self._mean_variance(x_t, t, predicted_noise, v, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        decoder = -discretized_gaussian_log_likelihood(x_start, mean, log_variance)
        is_first = broadcast(torch.as_tensor(t == 0, device=x_t.device), x_t)
        term = torch.where(is_first, decoder, kl)
        return term.flatten(1).mean(1) / math.log(2), pred_x_start

    def score(self, model, x_t, t):
        """∇_{x_t} log q(x_t) ≈ −ε_θ(x_t, t) / √(1−ᾱ_t): ε_θ is the score, up to a factor (§3.2)."""
        self._check(x_t, t)
        predicted_noise, _ = self._predict(model, x_t, t)
        return -predicted_noise / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    # -- Calling the model, and argument check --
    def _predict(self, model, x_t, t):
        """Returns ε_θ(x_t, t), and v (None if the variance is fixed), in x_t's dtype."""
        # The call, and checks of what is returned
        t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
        prediction = model(x_t, t)
        if not torch.is_tensor(prediction):
            raise ValueError(f"the model must return a tensor, got {type(prediction).__name__}")
        prediction = prediction.to(x_t.dtype)
        channels = x_t.shape[1] * (2 if self.variance_type == "learned_range" else 1)
        wanted = (len(x_t), channels, *x_t.shape[2:])
        if prediction.shape != wanted:
            inputs = f"with variance={self.variance_type} and x_t {tuple(x_t.shape)}"
            raise ValueError(f"{inputs} the model must return {wanted}, got {tuple(prediction.shape)}")

        # v of a learned variance
        v = None
        if self.variance_type == "learned_range":
            prediction, v = prediction.chunk(2, dim=1)

        # ε = √ᾱ_t velocity + √(1−ᾱ_t) x_t
        if self.prediction_type == "velocity":
            if x_t.dtype in (torch.float16, torch.bfloat16):  # Eq. 15 would magnify the rounding of this sum
                raise ValueError(f"a velocity needs x_t in float32 or float64, got {x_t.dtype}")
            noise_part = extract(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t
            prediction = extract(self.sqrt_alphas_cumprod, t, x_t) * prediction + noise_part
        return prediction, v

    def _check(self, x, t, *others):
        """Raise ValueError for what PyTorch would accept silently: shapes that broadcast, negative t."""
        # Images and noise
        if not x.is_floating_point():
            raise ValueError(f"images must be floats scaled to [-1, 1], got {x.dtype}")
        for other in [each for each in others if each is not None]:
            if other.shape != x.shape:
                raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(other.shape)}")
            if not other.is_floating_point():
                raise ValueError(f"noise and images must be floats, got {other.dtype}")

        # t
        if isinstance(t, (int, np.integer)):
            in_range = 0 <= t < self.timesteps
        elif not torch.is_tensor(t):
            raise ValueError(f"t must be an int or int64 of shape ({len(x)},), got {t!r}")
        elif t.shape != x.shape[:1] or t.dtype != torch.int64:
            raise ValueError(f"t must be int64 of shape ({len(x)},), got {t.dtype} of shape {tuple(t.shape)}")
        else:  # on a GPU, reading the values would force a synchronisation
            in_range = t.device.type != "cpu" or ((0 <= t) & (t < self.timesteps)).all()
        if not in_range:
            got = f"{t.min()}…{t.max()}" if torch.is_tensor(t) else t
            raise ValueError(f"t must lie in 0…{self.timesteps - 1}, got {got}")


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
    way; a learned variance is that predicted with labels. Raises ValueError if the model has no classes, scale is not
    finite or a label is out of range."""
    # Checks
    no_label = getattr(model, "num_classes", None)
    if not no_label:
        raise ValueError("guidance needs a model that was built with num_classes")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not ((0 <= labels) & (labels <= no_label)).all():
        raise ValueError(f"labels must lie in 0…{no_label} ({no_label} is no label), got {labels.tolist()}")

    def guided(x_t, t):
        if scale == 0:
            return model(x_t, t, labels)
        # With labels and without, as one batch
        both_labels = torch.cat([labels, torch.full_like(labels, no_label)])
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both_labels)
        conditional, unconditional = both.chunk(2)
        c = x_t.shape[1]  # further channels are v
        prediction = (1 + scale) * conditional[:, :c] - scale * unconditional[:, :c]
        return torch.cat([prediction, conditional[:, c:]], dim=1)

    return guided


# ---- 4. Network ------------------------------------------------------------------------------------------------------
# The paper's U-Net (appendix B). Modules are named as in diffusers, so that published weights load (section 10).


def group_norm(channels, groups=32):
    """Group normalisation with gcd(channels, groups) groups; the paper has 32."""
    return nn.GroupNorm(math.gcd(channels, groups), channels, eps=1e-6)


def zero(module):
    """Zero-initialise a module, so that the residual branch or the network that it ends starts as 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class SinusoidalPositionEmbeddings(nn.Module):
    """t (B,) → (B, dim): sin(t ω_i), then cos(t ω_i), with frequencies ω_i falling geometrically from 1 to 1/10000."""

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


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection; the time embedding is added between them."""

    def __init__(self, in_channels, out_channels, time_dim, dropout=0.0, groups=32):
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
        # In a Sequential, because the published name is to_out.0
        self.to_out = nn.Sequential(zero(nn.Linear(channels, channels)))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT  # (B, HW, C)
        # Plain products: F.scaled_dot_product_attention is slower in bfloat16 at these small sizes.
        similarity = (self.to_q(h) / math.sqrt(h.shape[2])) @ self.to_k(h).mT  # (B, HW, HW)
        h = self.to_out(similarity.softmax(2) @ self.to_v(h))
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
    nothing. UNet appends at most one layer that changes the size, and calls them. Their names are diffusers'."""

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

    Norms have up to 32 groups as in the paper if dim ≥ 128; smaller networks have up to dim/16, because smaller groups
    are slow on a CPU. Raises ValueError unless dim is a multiple of 4 and image_size of 2^(number of levels − 1), and
    for sizes and numbers below 1, and a dropout outside [0, 1)."""

    def __init__(
        self,
        image_channels=3,
        dim=128,  # channels at full resolution, a multiple of 4
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
        self.image_channels = image_channels
        self.num_classes = num_classes
        self.halvings = len(dim_mults) - 1
        # Checks
        if image_size < 1 or image_size % 2**self.halvings:
            needed = f"as dim_mults {tuple(dim_mults)} needs: it must be a multiple of {2**self.halvings}"
            raise ValueError(f"image_size {image_size} can't be halved {self.halvings} times, {needed}")
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        counts = [*dim_mults, image_channels, num_res_blocks, 1 if num_classes is None else num_classes]
        if not dim_mults or min(counts) < 1:
            got = f"got {tuple(dim_mults)}, {image_channels}, {num_res_blocks} and {num_classes}"
            raise ValueError(f"dim_mults, image_channels, num_res_blocks and num_classes must be at least 1, {got}")

        # Time and label
        time_dim = time_dim or 4 * dim
        self.position = SinusoidalPositionEmbeddings(dim)
        layers = OrderedDict(linear_1=nn.Linear(dim, time_dim), silu=nn.SiLU(), linear_2=nn.Linear(time_dim, time_dim))
        self.time_embedding = nn.Sequential(layers)
        self.class_embedding = None
        if num_classes:  # from N(0, I), as nn.Embedding does, which on the meta device takes seconds
            self.class_embedding = nn.Embedding.from_pretrained(torch.randn(num_classes + 1, time_dim), freeze=False)

        # Down; skip_channels are the channels of each skip connection, in order.
        groups = 32 if dim >= 128 else max(1, dim // 16)
        new_level = functools.partial(Level, time_dim=time_dim, dropout=dropout, groups=groups)
        widths = [dim * mult for mult in dim_mults]
        channels = dim
        size = image_size
        skip_channels = [dim]
        self.conv_in = nn.Conv2d(image_channels, dim, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            in_channels = [channels] + [width] * (num_res_blocks - 1)
            level = new_level(in_channels, width, attention=size in attn_resolutions)
            skip_channels += [width] * num_res_blocks
            channels = width
            if i < self.halvings:
                level.downsamplers.append(Downsample(width))
                skip_channels.append(width)
                size //= 2
            self.down_blocks.append(level)

        # Middle: attention between the two residual blocks.
        self.mid_block = new_level([channels, channels], channels, attention=bool(attn_resolutions))
        self.mid_block.attentions[1] = nn.Identity()  # none after the second block

        # Up: each residual block also takes the last skip connection that is left
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            in_channels = []
            for _ in range(num_res_blocks + 1):
                in_channels.append(channels + skip_channels.pop())
                channels = width
            level = new_level(in_channels, width, attention=size in attn_resolutions)
            if i > 0:
                level.upsamplers.append(Upsample(width))
                size *= 2
            self.up_blocks.append(level)

        # Out
        self.conv_norm_out = group_norm(channels, groups)
        self.conv_out = zero(nn.Conv2d(channels, image_channels * (2 if learned_variance else 1), 3, padding=1))

    def forward(self, x, t, y=None):
        # Checks
        multiple = 2**self.halvings
        if x.dim() != 4 or x.shape[1] != self.image_channels or any(n % multiple for n in x.shape[2:]):
            needed = f"(B, {self.image_channels}, H, W), H and W multiples of {multiple}"
            raise ValueError(f"x must be {needed}, got {tuple(x.shape)}")
        if y is not None and self.class_embedding is None:
            raise ValueError("labels given to a network that was built without num_classes")

        # Time and label
        emb = self.time_embedding(self.position(t).to(x.dtype))
        if self.class_embedding is not None:
            y = torch.full_like(t, self.num_classes) if y is None else y
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
    the end (default: Run.grid). Under torchrun, each process computes its share of every batch and rank 0 writes."""
    # Set-up
    rank, world_size = rank_and_world_size()
    images, labels, state, diffusion = prepare_training(config, checkpoint)
    watch = watch or Run.grid
    with start_training(config, state, images, labels, diffusion) as (network, log, stop_requested, bar):
        for step in range(state.step, config.steps):
            torch.manual_seed(derive_seed(config.seed, "training", step, rank))  # so that a resumed run draws the same
            chosen = torch.randint(len(images), (config.batch_size // world_size,), device=images.device)
            y = None if labels is None else labels[chosen]

            # Algorithm 1, with random flips and label dropout in training_loss
            # fmt: off
            x_start = to_model(images[chosen])                                                 # x_0 ~ q(x_0)
            t = torch.randint(diffusion.timesteps, (len(chosen),), device=images.device)       # t ~ Uniform({1, …, T})
            noise = torch.randn_like(x_start)                                                  # ε ~ N(0, I)
            loss = training_loss(network, diffusion, config, x_start, t, noise, y, state.model.num_classes)
            loss.backward()                                                                    # ∇_θ ‖ε − ε_θ(x_t, t)‖²
            # fmt: on

            # Adam's step, and the EMA of the weights
            gradient_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
            state.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            state.optimizer.step()
            state.optimizer.zero_grad()
            ema_update(state.ema, state.model, step, config.ema_decay)

            # Log, checkpoint, samples
            done = step + 1
            bar.update(config.batch_size)
            log.add(loss, gradient_norm)
            stopped = stop_requested()
            save = stopped or done == config.steps or done % config.checkpoint_every == 0
            draw = not stopped and (done == config.steps or done % config.sample_every == 0)
            if draw and rank == 0:
                log.compare(state, diffusion)
            if save or draw or done % config.log_every == 0:
                mean_loss = log.write()
                bar.set_postfix(loss=f"{mean_loss:.4f}")
            if save and rank == 0:
                state.save(done)
            if stopped:
                break
            if draw and rank == 0:
                with log.pause():
                    watch(Run(config, state.ema, diffusion), done)

    # The end, or an interruption
    if dist.is_initialized():
        leave_processes()
    if stopped and rank == 0 and done < config.steps:
        saved = f"stopped after step {done:,}; {config.out}/checkpoint.pt holds it"
        raise KeyboardInterrupt(f"{saved}; resume with: python ddpm.py --train --resume --out {config.out}")
    return Path(config.out)


def prepare_training(config, checkpoint):
    """Returns images and labels (or None) to train on, the state to train, and the diffusion."""
    _, world_size = rank_and_world_size()
    if config.batch_size % world_size:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the {world_size} processes sharing it")

    check_options(config)
    if checkpoint is None:
        check_new_run(config)

    # Data, network, diffusion
    device = pick_device(config.device)
    check_memory(config, device)
    images, labels, classes, checksum, examples = load_training_data(config, device)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model, diffusion = build(config, images.shape[1], len(classes) if classes else None)
    if config.weights and checkpoint is None:
        load_initial_weights(model, config)
    model = model.to(device, memory_format=torch.channels_last)

    # The average of the weights, and Adam
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=True)

    # All of these from a checkpoint, if there is one
    state = TrainingState(config, model, ema, optimizer, classes, len(images), checksum, examples)
    if checkpoint is not None:
        state.restore(checkpoint)
    return images, labels, state, diffusion.to(device)


@contextlib.contextmanager
def start_training(config, state, images, labels, diffusion):
    """Context manager of a training: locks the run's folder, joins the processes, compiles the network, tries a step,
    makes the folder, records signals, shows a bar. Gives the network to call, the log, stop_requested and the bar."""
    rank, _ = rank_and_world_size()
    with lock_folder(Path(config.out)) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            announce(config, state, images)
        network, cpu_group = share_between_processes(state.model, images.device)
        network = maybe_compile(config, images.device, network)
        try_step(network, diffusion, config, state, images, labels)
        if rank == 0:
            start_folder(Path(config.out), state.step)
        with record_signals() as signals, training_bar(config, state.step) as bar:
            log = TrainingLog(config, cpu_group, state.step, images.device)
            yield network, log, functools.partial(any_process_received, signals, cpu_group), bar


def try_step(network, diffusion, config, state, images, labels):
    """Compute the gradients of one batch and drop them, so that a batch that is too large for the memory, or a compiler
    that does not work, shows before an earlier run is renamed."""
    _, world_size = rank_and_world_size()
    chosen = torch.arange(config.batch_size // world_size, device=images.device) % len(images)
    x_start = to_model(images[chosen])
    y = None if labels is None else labels[chosen]
    t = torch.zeros_like(chosen)
    noise = torch.randn_like(x_start)
    loss = training_loss(network, diffusion, config, x_start, t, noise, y, state.model.num_classes)
    loss.backward()
    state.optimizer.zero_grad()


def training_loss(network, diffusion, config, x_start, t, noise, y, no_label):
    """The loss of a batch, with random flips if config.flip. y are its labels or None; some of them are replaced by
    no_label, so that the network also learns ε_θ(x_t) without a label, which guidance needs."""
    # Random flips
    if config.flip:
        flipped = torch.randint(2, (len(x_start),), device=x_start.device).bool()
        x_start = torch.where(broadcast(flipped, x_start), x_start.flip(3), x_start)

    # Label dropout
    if y is not None:
        dropped = torch.rand(len(y), device=y.device) < config.label_dropout
        y = torch.where(dropped, no_label, y)

    # Eq. 14 or 5
    with autocast(config, x_start.device):
        return diffusion.p_losses(functools.partial(network, y=y), x_start, t, noise)


def learning_rate(config, step):
    """Adam's learning rate at a step: it rises linearly to config.lr over config.warmup steps. With config.lr_decay
    "linear" it is also multiplied by 1 − step/steps, which reaches 0 after the last step."""
    factor = min(1.0, (step + 1) / (config.warmup + 1))
    if config.lr_decay == "linear":
        factor = factor * (1 - step / config.steps)
    return config.lr * factor


@torch.no_grad()
def ema_update(averaged, model, n, decay):
    """w̄ ← d w̄ + (1 − d) w for all weights, with d = min(decay, (1 + n)/(10 + n)) after n updates, so that a short run
    does not average its initial weights; the first update copies the weights. (torch's AveragedModel reads n from the
    device, which would make every step wait for it.)"""
    d = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - d)


# ---- 6. Sampling -----------------------------------------------------------------------------------------------------
# Later samplers, and the paper's §4: GaussianDiffusion. From a trained network to image files: Run, sample, evaluate.


def last(iterable):
    """The last item of an iterable, such as x_0 of a sampler that is a generator."""
    for item in iterable:
        result = item
    return result


class GaussianDiffusion(DDPM):
    """DDPM, plus the samplers of later papers, which need fewer network calls, and the interpolation and the likelihood
    of the paper's §4. Arguments and errors are those of DDPM (section 2)."""

    # -- DDIM --
    def _alpha_bar(self, t):
        """ᾱ_t as a Python float, so in float64 on any device; t = −1 denotes x_0, where ᾱ = 1."""
        return self._alphas_cumprod[t] if t >= 0 else 1.0

    def predict_noise(self, x_t, t, x_start):
        """ε = (x_t − √ᾱ_t x_0) / √(1−ᾱ_t): Eq. 4 solved for ε."""
        self._check(x_t, t, x_start)
        noise_part = x_t - extract(self.sqrt_alphas_cumprod, t, x_t) * x_start
        return noise_part / extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def _predict_both(self, model, x_t, t, clip_denoised):
        """x̂_0 (Eq. 15), clamped if clip_denoised, and the ε that gives x_t from this x̂_0 (Eq. 4)."""
        predicted_noise, _ = self._predict(model, x_t, t)
        pred_x_start = self.predict_x_start(x_t, t, predicted_noise)
        if clip_denoised:
            pred_x_start = pred_x_start.clamp(-1, 1)
            predicted_noise = self.predict_noise(x_t, t, pred_x_start)
        return pred_x_start, predicted_noise

    def _combine(self, x_start, noise, s, sigma=0.0):
        """DDIM Eq. 12 without σ z: √ᾱ_s x_0 + √(1−ᾱ_s−σ²) ε at an int s, which for σ = 0 is Eq. 4."""
        alpha_bar_s = self._alpha_bar(s)
        return math.sqrt(alpha_bar_s) * x_start + math.sqrt(1 - alpha_bar_s - sigma**2) * noise

    def _check_steps(self, steps):
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must lie in 1…{self.timesteps}, got {steps}")

    def ddim_timesteps(self, steps):
        """Returns S = steps distinct timesteps, a list of ints, evenly spaced and decreasing from T−1, the only one
        at which the network was trained on pure noise ("trailing", Lin et al., 2023)."""
        self._check_steps(steps)
        return [round(self.timesteps * i / steps) - 1 for i in range(steps, 0, -1)]

    @torch.no_grad()
    def ddim_sample(self, model, x_t, t, prev_t, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """One step of DDIM from t to an earlier s = prev_t, both ints; s = −1 denotes x_0 (DDIM Eq. 12, 16):
        x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε_θ(x_t) + σ z with σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s).
        η = 0 is deterministic; η = 1 over all T steps is Algorithm 2 with σ_t² = β̃_t. If x̂_0 is clamped, ε_θ is
        then recomputed from x̂_0 and x_t (Eq. 4)."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0…1, got {eta}")
        self._check(x_t, t, noise)
        if torch.is_tensor(t) or torch.is_tensor(prev_t) or not -1 <= prev_t < t:
            raise ValueError(f"t and prev_t must be ints, prev_t in -1…t-1, got prev_t={prev_t} with t={t}")
        pred_x_start, predicted_noise = self._predict_both(model, x_t, t, clip_denoised)

        # σ (DDIM Eq. 16), then x_s (DDIM Eq. 12): its part without noise, and σ z
        alpha_bar_t = self._alpha_bar(t)
        alpha_bar_s = self._alpha_bar(prev_t)
        sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * math.sqrt(1 - alpha_bar_t / alpha_bar_s)
        x_s = self._combine(pred_x_start, predicted_noise, prev_t, sigma)
        if eta > 0:
            x_s = x_s + sigma * sample_noise(x_t.shape, x_t, generator, noise)
        return x_s

    def ddim_sample_steps(self, model, x_t, steps, eta=0.0, clip_denoised=True, generator=None):
        """DDIM from x_T = x_t step by step: yields as many tensors as steps, the last of which is x_0."""
        timesteps = self.ddim_timesteps(steps)
        for t, prev_t in zip(timesteps, [*timesteps[1:], -1], strict=True):
            x_t = self.ddim_sample(model, x_t, t, prev_t, eta, clip_denoised, generator=generator)
            yield x_t

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=True, noise=None, generator=None):
        """DDIM in S = steps steps: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(shape, like=self.betas, generator=generator, noise=noise)
        return last(self.ddim_sample_steps(model, x_t, steps, eta, clip_denoised, generator))

    @torch.no_grad()
    def ddim_encode_loop(self, model, x_start, steps, clip_denoised=True):
        """DDIM's step with η = 0 upwards in S = steps steps, from x_0 to the x_T from which ddim_sample_loop returns
        x_0, up to an error that falls as 1/S (DDIM §4.3). The network has seen no image without noise: ε_θ(x_0) is
        evaluated at t = 0."""
        timesteps = self.ddim_timesteps(steps)[::-1]
        self._check(x_start, 0)

        # From x_0 to the first timestep
        predicted_noise, _ = self._predict(model, x_start, 0)
        x_t = self._combine(x_start, predicted_noise, timesteps[0])

        # From each timestep to the next
        for t, next_t in itertools.pairwise(timesteps):
            pred_x_start, predicted_noise = self._predict_both(model, x_t, t, clip_denoised)
            x_t = self._combine(pred_x_start, predicted_noise, next_t)
        return x_t

    # -- DPM-Solver++ --
    @functools.cached_property
    def _lambdas(self):
        """λ_t = ½ log(ᾱ_t/(1−ᾱ_t)) for every t, half the logarithm of the signal-to-noise ratio, as Python floats."""
        return [0.5 * math.log(alpha_bar / (1 - alpha_bar)) for alpha_bar in self._alphas_cumprod]

    def dpm_solver_timesteps(self, steps):
        """Returns S = steps distinct timesteps, a list of ints decreasing from T−1: the starts of S equal steps from
        λ_{T−1} to λ_0, rounded to timesteps. With few steps none is t = 0, where a call changes the image by a few
        grey levels only."""
        self._check_steps(steps)
        lambdas = np.array(self._lambdas)
        even = np.linspace(lambdas[-1], lambdas[0], steps, endpoint=False)
        timesteps = [self.timesteps - 1]
        for i in range(1, steps):
            nearest = int(np.abs(lambdas - even[i]).argmin())
            # Distinct: below the timestep before, and with room for those after it
            timesteps.append(min(timesteps[-1] - 1, max(nearest, steps - 1 - i)))
        return timesteps

    @torch.no_grad()
    def dpm_solver_sample_steps(self, model, x_t, steps, clip_denoised=True):
        """DPM-Solver++(2M) step by step (Lu et al., 2022): DDIM's step with η = 0 from t to s, but x̂_0 is extrapolated
        from x̂_0(x_t) and x̂_0(x_r), r > t being the previous step's: x̂_0(x_t) + h/(2h′) (x̂_0(x_t) − x̂_0(x_r)) with
        h = λ_s − λ_t and h′ = λ_t − λ_r. ε is then recomputed from it and x_t (Eq. 4). The first step and the last, to
        x_0 where λ = ∞, are DDIM's. Before the last step the error falls as 1/S², until the rounding of timesteps
        counts."""
        timesteps = self.dpm_solver_timesteps(steps)
        r = pred_x_start_r = None  # the previous step's timestep, and x̂_0 there
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            pred_x_start, predicted_noise = self._predict_both(model, x_t, t, clip_denoised)
            extrapolated = pred_x_start
            # x̂_0 extrapolated in λ to the middle of the step
            if r is not None and s >= 0:
                ratio = (self._lambdas[s] - self._lambdas[t]) / (self._lambdas[t] - self._lambdas[r])
                extrapolated = pred_x_start + ratio / 2 * (pred_x_start - pred_x_start_r)
                if clip_denoised:
                    extrapolated = extrapolated.clamp(-1, 1)
                predicted_noise = self.predict_noise(x_t, t, extrapolated)
            x_t = self._combine(extrapolated, predicted_noise, s)
            r = t
            pred_x_start_r = pred_x_start
            yield x_t

    def dpm_solver_sample_loop(self, model, shape, steps, clip_denoised=True, noise=None, generator=None):
        """DPM-Solver++(2M) in S = steps steps: from x_T ~ N(0, I) of the given shape, or from noise, to x_0."""
        x_t = sample_noise(shape, like=self.betas, generator=generator, noise=noise)
        return last(self.dpm_solver_sample_steps(model, x_t, steps, clip_denoised))

    # -- Algorithm 2 in fewer steps --
    def respace(self, model, steps):
        """Algorithm 2 in S = steps steps (Improved DDPM §4). Returns a diffusion over ddim_timesteps(S) only, whose
        β' = 1 − ᾱ_t/ᾱ_s for neighbours s < t, and the model for it, which sees the original t."""
        timesteps = self.ddim_timesteps(steps)[::-1]
        alphas_cumprod = torch.tensor([self._alpha_bar(t) for t in timesteps], dtype=torch.float64)
        betas = 1 - alphas_cumprod / F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        diffusion = GaussianDiffusion(betas, self.variance_type, self.loss_type, self.betas.dtype, self.prediction_type)
        original_t = torch.tensor(timesteps, device=self.betas.device)
        return diffusion.to(self.betas.device), lambda x_t, t: model(x_t, original_t[t])

    # -- Interpolation and likelihood (§4) --
    def interpolate(self, model, x_start_a, x_start_b, t, weight, noise=None, generator=None):
        """Diffuse two images to the same t, mix them, (1−λ) x_t + λ x'_t with λ = weight, and denoise from t (Fig. 8).
        Both get the same noise, so that the mixture has the noise level of t for every λ; the paper does not say."""
        noise = sample_noise(x_start_a.shape, x_start_a, generator, noise)
        x_t = (1 - weight) * self.q_sample(x_start_a, t, noise) + weight * self.q_sample(x_start_b, t, noise)
        return last(self.p_sample_steps(model, x_t, t, generator=generator))

    @torch.no_grad()
    def bits_per_dim(self, model, x_start, clip_denoised=True, generator=None):
        """The bound on −log₂ p_θ(x_0) (Eq. 3) in bits/dim, term by term (Eq. 5, 13), with one sample of ε for each t.
        Returns a dict: "total" (B,) is the sum of "L_T" (B,), "L_{t-1}" (B, T−1), whose column i is code t = i + 1,
        and "L_0" (B,); "squared_error" (B, T) of x̂_0 at code t is on the [−1, 1] scale: 127.5 times its root is Fig.
        5's RMSE. x_start holds 8-bit pixels scaled to [−1, 1]; L_0 is meaningless for other data, and for x_start in
        half precision, which raises ValueError."""
        if x_start.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"bits/dim need x_start in float32 or float64, got {x_start.dtype}")
        terms = []
        squared_errors = []
        for t in range(self.timesteps):
            x_t = self.q_sample(x_start, t, sample_noise(x_start.shape, x_start, generator))
            predicted_noise, v = self._predict(model, x_t, t)
            term, pred_x_start = self.bound_term(x_start, x_t, t, predicted_noise, v, clip_denoised)
            terms.append(term)
            squared_errors.append((pred_x_start - x_start).square().flatten(1).mean(1))
        terms = torch.stack(terms, dim=1)

        # L_T = KL(q(x_T|x_0) ‖ N(0, I))
        mean = self.sqrt_alphas_cumprod[-1] * x_start
        log_variance = self.sqrt_one_minus_alphas_cumprod[-1].square().log()
        kl = normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance))
        prior = kl.flatten(1).mean(1) / math.log(2)
        bits = {"L_T": prior, "L_{t-1}": terms[:, 1:], "L_0": terms[:, 0], "total": prior + terms.sum(1)}
        bits["squared_error"] = torch.stack(squared_errors, dim=1)
        return bits


SAMPLERS = ("dpm-solver", "ddim", "ddpm")


@dataclasses.dataclass
class Run:
    """A trained network with everything that sampling needs."""

    config: "Config"
    model: nn.Module
    diffusion: GaussianDiffusion
    classes: list = None  # the names of the labels

    @classmethod
    def read(cls, out, device=None, bf16=None, compile=None):
        """The run in a folder, with its averaged weights."""
        device = pick_device(device)
        checkpoint = read_checkpoint(out)
        config = dataclasses.replace(checkpoint["config"], bf16=bf16, compile=compile)
        network = averaged_network(checkpoint)
        return cls.ready(config, network, build_diffusion(config), device, checkpoint["classes"])

    @classmethod
    def of_weights(cls, folder, out=None, device=None, bf16=None, compile=None):
        """Published weights, which are averages already, with the diffusion published beside them (default: the
        paper's)."""
        device = pick_device(device)
        model, shape = load_published(folder)
        if model.image_channels not in (1, 3):
            raise ValueError(f"{folder} has {model.image_channels} channels; images have 1 or 3")
        settings = {**shape, **published_schedule(folder)}
        out = out or f"runs/{resolve(folder).name}"
        config = preset("cifar10", **settings, bf16=bf16, compile=compile, out=out)
        return cls.ready(config, model, build_diffusion(config), device)

    @classmethod
    def ready(cls, config, model, diffusion, device, classes=None):
        """A network moved to the device and, if config says so, compiled."""
        model = model.to(device, memory_format=torch.channels_last).eval()
        model = maybe_compile(config, device, model)
        return cls(config, model, diffusion.to(device), classes)

    @property
    def device(self):
        """The device that samples are drawn on."""
        return self.diffusion.betas.device

    def trajectory(self, count, labels=None, seed=0, sampler="dpm-solver", sampling_steps=None, eta=0.0, guidance=0.0):
        """Returns an iterator that yields count images after each sampling step, at last x_0. All noise of image i
        is drawn from seed + i, so that an image does not depend on the others. labels is (count,) or None.
        sampling_steps is S (default: for DPM-Solver 10, for DDIM 50, or T if that is less; for Algorithm 2 T)."""
        # Checks
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}, got {sampler!r}")
        if eta != 0 and sampler != "ddim":
            raise ValueError(f"eta is DDIM's, got {eta} with {sampler}")
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), got {tuple(labels.shape)}")
        if guidance != 0 and labels is None:
            raise ValueError(f"guidance needs labels, got {guidance} without")

        # x_T ~ N(0, I)
        generators = [torch.Generator(self.device).manual_seed(int(seed) + i) for i in range(count)]
        shape = (count, self.model.image_channels, self.config.image_size, self.config.image_size)
        x_t = sample_noise(shape, like=self.diffusion.betas, generator=generators)

        # ε_θ, with labels and guidance
        guided = self.model
        if labels is not None:
            guided = classifier_free_guidance(self.model, labels.to(self.device), guidance)

        def model(x_t, t):
            with autocast(self.config, self.device):
                return guided(x_t, t)

        # x_T → x_0
        diffusion = self.diffusion
        if sampler == "ddpm":
            if sampling_steps is not None:
                diffusion, model = diffusion.respace(model, sampling_steps)
            return diffusion.p_sample_steps(model, x_t, generator=generators)
        if sampling_steps is None:
            sampling_steps = min({"dpm-solver": 10, "ddim": 50}[sampler], diffusion.timesteps)
        if sampler == "ddim":
            return diffusion.ddim_sample_steps(model, x_t, sampling_steps, eta, generator=generators)
        return diffusion.dpm_solver_sample_steps(model, x_t, sampling_steps)

    def labels(self, count, label=None):
        """(count,) labels: every class in turn, or the one of the given name or number. None for a network without
        labels."""
        if not self.model.num_classes:
            return None
        if label is not None:
            return torch.full((count,), self.find_label(label))
        return torch.arange(count) % self.model.num_classes

    def find_label(self, label):
        """The number of a class, given by its name or, unless other names are numbers, by its number. Raises ValueError
        if there is no such class."""
        names = [name or NO_FOLDER for name in self.classes or []]
        numbers = [str(i) for i in range(self.model.num_classes)]
        if label in names:
            return names.index(label)
        if names != numbers and any(name.isdecimal() for name in names):
            raise ValueError(f"--label must be one of {', '.join(names)}, got {label}")
        if str(label) in numbers:
            return int(label)
        words = [name for name in names if not name.isdecimal()]
        known = f" or be one of {', '.join(words)}" if words else ""
        raise ValueError(f"--label must lie in 0…{numbers[-1]}{known}, got {label}")

    def grid(self, step):
        """Write a grid of samples, with a column for each class (at most 16), named after the training step."""
        count = 64
        columns = labels = None
        if self.model.num_classes:
            columns = min(self.model.num_classes, MAX_COLUMNS)
            count = 10 * columns
            labels = torch.arange(count) % columns
        seed = derive_seed(self.config.seed, "grid")
        pixels = to_pixels(last(self.trajectory(count, labels, seed)))
        path = Path(self.config.out) / f"samples-{step:06}.png"
        atomic_write(path, functools.partial(make_grid_image(pixels, columns).save, format="PNG"))


def sample(run, count, seed=0, **options):
    """Draw count images, at most 1,024 unless individual, with the options of Sampling, and write them into the run's
    folder. Returns the paths written.

    Image i depends on seed and i only, to rounding: not on the count, the batches, or the processes that share them.
    Batches are equally large, so that a compiled network sees one shape."""
    # Checks
    options = Sampling(**options)
    check_sampling(options, run)
    count = operator.index(count)
    seed = operator.index(seed)
    if not 1 <= count <= 10**9:
        raise ValueError(f"--sample must lie in 1…{10**9}, got {count}")
    out = Path(run.config.out)
    check_output(out, options.individual)

    # Batches
    rank, world_size = rank_and_world_size()
    if count > SHOWN and not options.individual:
        if rank == 0:
            print(f"{out}/samples.png shows {SHOWN:,} images at most; --individual draws and writes all {count:,}")
        count = SHOWN
    num_batches = math.ceil(count / options.sampling_batch)
    batch_size = math.ceil(count / num_batches)

    # Labels, and a column of the grid for each class, unless there are many
    labels = None
    if not options.unconditional:
        labels = run.labels(num_batches * batch_size, options.label)
    columns = None
    if labels is not None and options.label is None and run.model.num_classes <= MAX_COLUMNS:
        columns = run.model.num_classes

    # Every process draws its share of the batches; with --individual, into files
    with lock_folder(out, "sampling") if rank == 0 else contextlib.nullcontext():
        try:
            drawn = ImageStore(out, run, batch_size, seed, options) if options.individual else {}
            frames = draw_batches(run, drawn, num_batches, batch_size, labels, seed, options)
            if world_size > 1:
                drawn = gather_batches(drawn)
            if rank > 0:
                return []
            # Rank 0 writes
            if world_size > 1 and not all(i in drawn for i in range(num_batches)):
                raise ValueError(f"some images are not there: all processes need the same run in the same {out}")
            images = itertools.chain.from_iterable(drawn[i] for i in range(num_batches))
            paths = write_samples(out, itertools.islice(images, count), columns, options.individual, frames)
        except KeyboardInterrupt:
            if not options.individual:
                raise
            raise KeyboardInterrupt("interrupted; repeat the command to draw the remaining images") from None
        if options.individual:
            drawn.remove()
        return paths


def draw_batches(run, drawn, num_batches, batch_size, labels, seed, options):
    """Draw this process's share of the batches into drawn, which maps i to the uint8 images of batch i. Batches in it
    are skipped, except batch 0 if options.animate: its x_t after every step are returned, else an empty list."""
    rank, world_size = rank_and_world_size()
    sampler_options = {name: getattr(options, name) for name in ("sampler", "sampling_steps", "eta", "guidance")}
    frames = []
    for i in tqdm(range(rank, num_batches, world_size), unit=" batches", disable=hide_bar()):
        animate = options.animate and i == 0
        if i in drawn and not animate:
            continue
        # From x_T to x_0
        batch_labels = None if labels is None else labels[i * batch_size : (i + 1) * batch_size]
        first_seed = derive_seed(seed, "sampling") + i * batch_size
        trajectory = run.trajectory(batch_size, batch_labels, first_seed, **sampler_options)
        for x_t in tqdm(trajectory, unit=" steps", leave=False, disable=hide_bar()):
            if animate:
                frames.append(to_pixels(x_t).cpu())
        if not x_t.isfinite().all():
            raise ValueError("the samples are not finite")
        drawn[i] = to_pixels(x_t).cpu()
    return frames


def evaluate(run, count, seed=0):
    """Print the bound on −log₂ p_θ(x_0) of count held-out images, term by term (Eq. 5). No labels are given."""
    if count < 1:
        raise ValueError(f"--evaluate must be at least 1, got {count}")
    if run.model.num_classes and run.config.label_dropout == 0:
        raise ValueError("--evaluate gives no labels: it needs a network trained with --label-dropout above 0")
    # Held-out images
    images, _ = load_data(run.config.data, run.config.image_size, run.device, split="test")
    if not len(images):
        raise ValueError(f"no image of {run.config.data} is held out from training: it has too few")
    if images.shape[1:] != (run.model.image_channels, run.config.image_size, run.config.image_size):
        wants = f"{run.model.image_channels} channels and {run.config.image_size} pixels"
        raise ValueError(f"the network in {run.config.out} wants {wants}, the images of {run.config.data} do not fit")
    count = min(count, len(images))
    images = images[spread(count, images)]  # which may be sorted by class

    # The terms of all images, in batches of at most 250
    generator = torch.Generator(run.device).manual_seed(derive_seed(seed, "evaluation"))
    batches = []
    for pixels in tqdm(images.chunk(math.ceil(len(images) / 250)), unit=" batches", disable=hide_bar()):
        with autocast(run.config, run.device):
            batches.append(run.diffusion.bits_per_dim(run.model, to_model(pixels), generator=generator))
    bits = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    # Rate and distortion (§4.3), and the root mean square error of x̂_0 at t = 0 in grey levels
    middle = bits["L_{t-1}"].sum(1)
    rate = bits["L_T"] + middle
    rmse = 127.5 * bits["squared_error"][:, 0].mean().sqrt()
    terms = {"L_T": bits["L_T"], "L_1 … L_{T-1}": middle, "L_0": bits["L_0"], "total: NLL ≤": bits["total"]}

    # The table: mean ± standard error
    print(f"{len(images)} held-out images of {run.config.data}, in bits/dim:")
    for name, value in terms.items():
        error = value.std(correction=min(1, len(value) - 1)) / len(value) ** 0.5
        print(f"  {name:14} {value.mean():.4f} ± {error:.4f}")
    print(f"  rate {rate.mean():.4f}, distortion {bits['L_0'].mean():.4f} (RMSE {rmse:.2f} of 255)")


# ======================================================================================================================
# The method ends here; what follows is plumbing: data, options, files, devices, published weights, the command line.
# ======================================================================================================================

# ---- 7. Data ---------------------------------------------------------------------------------------------------------

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # names in torchvision.datasets
DATA_SETS = ("digits", *TORCHVISION)


@dataclasses.dataclass
class Data:
    """What a data set holds."""

    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), or None
    classes: list  # the names of the labels, or None
    held_out: torch.Tensor  # bool (N,): the images that training does not see
    skipped: tuple = ()  # the names of files in a folder that are not images

    def split(self, name):
        """The images and labels of "train", of "test" (what is held out), or of None (all)."""
        if name is None:
            return self.images, self.labels
        chosen = self.held_out if name == "test" else ~self.held_out
        return self.images[chosen], None if self.labels is None else self.labels[chosen]


def load_data(name_or_folder, image_size=32, device="cpu", split=None):
    """Returns images, uint8 (N, C, H, W), and labels, int64 (N,) or None, on the device.

    "digits" is assets/digits.png. "mnist", "fashion_mnist" and "cifar10" are torchvision's, downloaded into data/ if
    they are not there. Anything else is a folder of images, resized and cropped to image_size, whose subfolders are the
    classes, in natural order (2 before 10). split="test" is what training does not see: torchvision's test set, every
    tenth of the digits, and those images of a folder whose file has a CRC-32 divisible by ten, unless that is a whole
    class. "train" is the rest; None is everything (torchvision's training set).
    Raises ValueError for a folder that does not exist or has no images, an unreadable image, a failed download."""
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be train, test or None, got {split!r}")
    images, labels = read_data(name_or_folder, image_size, split).split(split)
    if labels is not None:
        labels = labels.to(device)
    return images.to(device), labels


def read_data(name_or_folder, image_size, split=None):
    """The whole data set, as Data; of torchvision's, the training set or with split="test" the test set."""
    name_or_folder = str(name_or_folder)
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if name_or_folder in TORCHVISION:
        return load_torchvision(name_or_folder, split)
    if name_or_folder == "digits":
        return load_digits()
    return load_folder(Path(name_or_folder), image_size)


def load_torchvision(name, split):
    """torchvision's training set, or with split="test" its test set. One process downloads, others wait."""
    from torchvision import datasets  # here, because it takes as long to import as all the rest

    # A lock, so that processes do not download into the same files
    folder = Path("data")
    try:
        folder.mkdir(exist_ok=True)
        writable = os.access(folder, os.W_OK)
        with FileLock(folder / ".lock") if writable else contextlib.nullcontext():
            dataset = getattr(datasets, TORCHVISION[name])(str(folder), train=split != "test", download=True)
        if len(dataset.targets) != len(dataset.data):
            raise ValueError(f"{len(dataset.data)} images and {len(dataset.targets)} labels")
    except Exception as error:  # a damaged file may raise any exception
        raise ValueError(
            f"{name} can be neither read from data/ nor downloaded ({in_one_line(error)}); "
            "delete its files there if they are damaged; without a network use --data digits or --data FOLDER, or put "
            "torchvision's files into data/"
        ) from None

    # Channels first
    images = torch.as_tensor(dataset.data)
    if images.dim() == 3:
        images = images[:, None]  # (N, H, W) → (N, 1, H, W)
    else:
        images = images.permute(0, 3, 1, 2)  # (N, H, W, C) → (N, C, H, W)
    held_out = torch.full((len(images),), split == "test")
    return Data(images.contiguous(), torch.as_tensor(dataset.targets), list(dataset.classes), held_out)


def load_digits():
    """The 1,797 digits of assets/digits.png: ten rows of 8×8 tiles, one row a digit, padded with black tiles."""
    sheet = image_to_pixels(Image.open(Path(__file__).parent / "assets" / "digits.png"))[0]
    tiles = sheet.reshape(10, 8, -1, 8).transpose(1, 2)  # (10, tiles in a row, 8, 8)
    labels, columns = torch.nonzero(tiles.flatten(2).any(2), as_tuple=True)
    held_out = torch.arange(len(labels)) % 10 == 9
    return Data(tiles[labels, columns][:, None], labels, [str(digit) for digit in range(10)], held_out)


# A folder of images

IMAGE_SUFFIXES = set(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm .pnm .tga .jp2 .avif".split())


def load_folder(folder, image_size):
    """All images below the folder; those below one of its subfolders are one class."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a data set (digits, {', '.join(TORCHVISION)}) nor a folder")

    # The files
    files = list(find_files(folder))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    skipped = [path.name for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if not paths:
        found = f"; it has {len(skipped):,} other files ({suffixes(skipped)})" if skipped else ""
        raise ValueError(
            f"no images in {folder}: it needs .png, .jpg or other image files, in it or in subfolders{found}"
        )

    # Their memory, twice, since the training set is a copy
    size = 2 * len(paths) * 3 * image_size**2
    memory = total_memory(torch.device("cpu"))
    if size > memory:
        needed = f"need {size / 2**30:.0f} GiB of memory, there are {memory / 2**30:.0f}"
        raise ValueError(f"{len(paths):,} images as {image_size}×{image_size} {needed}: make --image-size smaller")

    # Their pixels, and which are held out
    images = torch.empty((len(paths), 3, image_size, image_size), dtype=torch.uint8)
    held_out = torch.empty(len(paths), dtype=torch.bool)
    errors = []
    for i, path in enumerate(tqdm(paths, "reading", unit=" images", leave=False, delay=2, disable=hide_bar())):
        try:
            images[i] = read_image(path, image_size)
        except ValueError as error:
            errors.append(str(error))
            continue
        held_out[i] = zlib.crc32(path.read_bytes()) % 10 == 0
    if errors:
        more = f"; and {len(errors) - 3:,} more" if len(errors) > 3 else ""
        raise ValueError("; ".join(errors[:3]) + more)
    if all((image == image[:1]).all() for image in images):
        images = images[:, :1].clone()  # all are grey

    # The classes. With two subfolders or more, the images beside them are one, too, named "".
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    classes = sorted(set(names), key=natural_order)
    labels = torch.tensor([classes.index(name) for name in names])
    for label in range(len(classes)):  # a class is never held out as a whole
        if held_out[labels == label].all():
            held_out[labels == label] = False
    if len(set(classes) - {""}) < 2:
        return Data(images, None, None, held_out, skipped)
    return Data(images, labels, classes, held_out, skipped)


def suffixes(names):
    """The suffixes of files, or their names if they have none, five at most, as one text."""
    return ", ".join(sorted({Path(name).suffix or name for name in names})[:5])


SAMPLES = ("samples.png", "samples.gif", "individual")  # what --sample writes
SAMPLES_MARK = ".samples"  # a file of this name marks a folder into which samples were written


def find_files(folder, parents=()):
    """The files below a folder in natural order, links followed. Hidden ones, runs and samples are left out."""
    real = resolve(folder)
    if real in parents or is_run(folder):
        return
    left_out = SAMPLES if (folder / SAMPLES_MARK).exists() else ()
    for path in sorted(folder.iterdir(), key=lambda path: natural_order(path.name)):
        if path.name.startswith(".") or path.name in left_out:
            continue
        if path.is_dir():
            yield from find_files(path, (*parents, real))
        elif path.is_file() or path.is_symlink():  # a link to nothing is named as one that can't be read
            yield path


def is_run(folder):
    """Whether a folder is that of a run: its log.csv begins as those of ddpm.py do."""
    log = folder / "log.csv"
    start = b"step,loss,gradient_norm,"
    if not log.is_file():
        return False
    with open(log, "rb") as file:
        return file.read(len(start)) == start


def natural_order(name):
    """The key that sorts names as people do: a2 before a10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def decode_image(path, image_size):
    """An image file as a PIL image, RGB, or RGBA if it may be transparent, turned upright. A large JPEG is reduced as
    it is decoded, to at least 4 × image_size on each side. May raise any exception if it is damaged."""
    with Image.open(path) as file:
        file.draft(None, (4 * image_size, 4 * image_size))
        if file.mode == "F" or (file.mode == "I" and file.format not in ("PNG", "PPM")):
            raise ValueError("its pixels have 32 bits or a sign; 8 or 16 bits are read")
        image = file
        if file.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            if "transparency" in file.info:
                raise ValueError("16-bit images with a transparent colour are not supported")
            if getattr(file, "tag_v2", {}).get(262) == 0:
                raise ValueError("16-bit TIFF in which 0 is white is not supported")
            image = file.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
        image = ImageOps.exif_transpose(image)
        opaque = image.mode in ("1", "L", "RGB", "CMYK", "YCbCr") and "transparency" not in image.info
        return image.convert("RGB" if opaque else "RGBA")


def read_image(path, image_size):
    """An image file as RGB, uint8 (3, image_size, image_size), on white where it is transparent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode_image(path, image_size)
        # On white, then resized and cropped
        if image.mode == "RGBA":
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    except Exception as error:
        raise ValueError(f"{path} can't be read as an image: {in_one_line(error)}") from None
    return image_to_pixels(image)


def load_training_data(config, device):
    """Returns images, labels (None if the network is not to learn them), the names of the classes (None likewise), a
    checksum of images and labels, and examples for TrainingLog.compare. Rank 0 says what a folder holds."""
    data = read_data(config.data, config.image_size)
    if data.images.shape[2:] != (config.image_size, config.image_size):
        raise ValueError(f"image_size must be {data.images.shape[2]} for {config.data}, got {config.image_size}")
    rank, _ = rank_and_world_size()
    if rank == 0 and config.data not in DATA_SETS:
        print(describe_folder(config, data))

    # The training set, and what is held out; torchvision keeps its test set apart.
    images, labels = data.split("train")
    if config.data in TORCHVISION:
        test_images, test_labels = read_data(config.data, config.image_size, "test").split("test")
    else:
        test_images, test_labels = data.split("test")
    classes = data.classes
    if not config.conditional:
        labels = test_labels = classes = None
    checksum = zlib.crc32(images.contiguous().numpy())
    if labels is not None:
        checksum = zlib.crc32(labels.contiguous().numpy(), checksum)

    # Examples of both
    examples = []
    if len(test_images):
        examples = [choose_examples(images, labels, device), choose_examples(test_images, test_labels, device)]
    labels = None if labels is None else labels.to(device)
    return images.to(device), labels, classes, checksum, examples


EXAMPLES = 512
NO_FOLDER = "(no folder)"  # how the class "" is shown, and named with --label


def spread(count, images):
    """The indices of count images, evenly spread over a data set; repeated if it has fewer."""
    return torch.arange(count) * len(images) // count


def choose_examples(images, labels, device):
    """EXAMPLES images and labels, evenly spread over a data set, and repeated if it has fewer."""
    chosen = spread(EXAMPLES, images)
    return images[chosen].to(device), None if labels is None else labels[chosen].to(device)


def describe_folder(config, data):
    """What was read from a folder: images, colours, size, classes with their numbers of images, and what was not."""
    # The images, and other files
    count, channels, height, width = data.images.shape
    colour = "colour" if channels == 3 else "grey"
    held_out = data.held_out.sum().item()
    lines = [f"{config.data}: {count:,} {colour} images as {height}×{width}; {held_out:,} of them held out"]
    if data.skipped:
        lines[0] += f"; {len(data.skipped):,} other files not read ({suffixes(data.skipped)})"
    if held_out < 10:
        lines.append(
            "fewer than 10 held-out images: ema_loss_held_out in log.csv can't show whether the network memorises"
        )
    # The classes
    if data.classes and not config.conditional:
        lines.append("labels: not learned (--no-conditional)")
    elif data.classes:
        counts = data.labels.bincount().tolist()
        named = [f"{i} = {name or NO_FOLDER} ({counts[i]:,})" for i, name in enumerate(data.classes[:20])]
        more = ["…"] if len(data.classes) > 20 else []
        lines.append("labels: " + ", ".join([*named, *more]))
    else:
        lines.append("labels: none (labels need two or more subfolders, one for each class)")
    return "\n".join(lines)


def image_to_pixels(image):
    """A PIL image, grey or RGB, as uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def pixels_to_image(pixels):
    """uint8 (C, H, W) as a PIL image, grey or RGB."""
    pixels = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_model(pixels):
    """uint8 0…255 → float [−1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x):
    """float [−1, 1] → uint8 0…255; values outside are clamped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---- 8. Configuration ------------------------------------------------------------------------------------------------


def option(default, help, low=-math.inf, high=math.inf, choices=None, shown=None):
    """A dataclass field that is also a command-line flag, with its --help text, bounds and choices. shown replaces the
    default in the help text."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, low=low, high=high, choices=choices, shown=shown)
    )


def convert_option(value, kind, name):
    """A value as a plain int, float, bool, str or tuple of ints, as a checkpoint holds it; from NumPy's numbers and a
    Path, too. Raises ValueError if it is none of that kind."""
    wrong = ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    try:
        # Numbers
        if kind is bool and isinstance(value, (bool, np.bool_)):
            return bool(value)
        if kind is int and not isinstance(value, bool):
            return operator.index(value)
        if kind is float and not isinstance(value, (bool, str)):
            return float(value)
        # Tuples, and text
        if kind is tuple and not isinstance(value, str):
            return tuple(operator.index(number) for number in value)
        if kind is str and isinstance(value, (str, os.PathLike, int, np.integer)):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    raise wrong


def check_options(options, spell=str):
    """Convert the fields of a dataclass of options to their types. Raise ValueError for one outside its bounds or
    choices. spell(name) is the name of a field in messages."""
    for field in dataclasses.fields(options):
        name = spell(field.name)
        value = getattr(options, field.name)
        if value is not None or field.default is not None:
            value = convert_option(value, field.type, name)
            setattr(options, field.name, value)
        low = field.metadata["low"]
        high = field.metadata["high"]
        choices = field.metadata["choices"]
        # One of the choices
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

        # Each number in its bounds
        if field.type not in (int, float, tuple) or value is None:
            continue
        for number in value if field.type is tuple else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError(f"{name} must lie between -2^63 and 2^63")
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number}")
            if high == math.inf and number < low:
                raise ValueError(f"{name} must be at least {low}, got {number}")
            if not low <= number <= high:
                raise ValueError(f"{name} must lie in {low}…{high}, got {number}")


@dataclasses.dataclass
class Config:
    """Everything a run depends on. Every field is a flag of --train and is stored in the checkpoint."""

    # Data
    data: str = option("digits", "digits, mnist, fashion_mnist, cifar10, or a folder of images")

    # Network
    image_size: int = option(8, "height and width in pixels; a folder's images are resized and cropped to it", 1, 4096)
    dim: int = option(32, "channels at full resolution, a multiple of 4", 4, 4096)
    dim_mults: tuple = option((1, 2), "channels of each level, in multiples of dim; each level halves the size", 1, 64)
    num_res_blocks: int = option(1, "residual blocks per level", 1, 16)
    attn_resolutions: tuple = option((4,), "sizes in pixels at which there is self-attention", 1, 4096)
    dropout: float = option(0.0, "dropout probability in the residual blocks", 0, 0.99)

    # Labels
    conditional: bool = option(True, "learn the labels, if the data have them")
    label_dropout: float = option(0.1, "fraction of the labels hidden in training, which guidance needs", 0, 1)

    # Diffusion
    timesteps: int = option(1000, "T, the number of steps of the forward process", 2, 100000)
    schedule: str = option(
        "linear",
        "β_t: cosine, or linear as in the paper, scaled by 1000/T",
        choices=("linear", "cosine"),
    )
    variance: str = option(
        "fixed_large",
        "σ_t² of the reverse process: β_t, β̃_t, or learned between the two",
        choices=("fixed_large", "fixed_small", "learned_range"),
    )
    prediction: str = option(
        "noise",
        "what the network predicts: ε, or the velocity √ᾱ_t ε − √(1−ᾱ_t) x_0",
        choices=("noise", "velocity"),
    )
    loss: str = option("simple", "Eq. 14, or the bound of Eq. 5", choices=("simple", "bound"))

    # Optimisation
    weights: str = option(None, "a folder of published weights to start from", shown="none")
    steps: int = option(1200, "training steps", 1)
    batch_size: int = option(128, "images per step, over all processes together", 1)
    lr: float = option(3e-3, "Adam's learning rate", 0, 1)
    warmup: int = option(50, "steps over which the learning rate rises linearly", 0)
    lr_decay: str = option(
        "linear",
        "the learning rate after the warm-up: constant, or falling linearly towards 0",
        choices=("constant", "linear"),
    )
    grad_clip: float = option(1.0, "the gradient's norm is clipped at this value; 0 does not clip", 0)
    ema_decay: float = option(
        0.9999, "largest decay of the averaged weights; at step n it is at most (1 + n)/(10 + n)", 0, 0.999999
    )
    flip: bool = option(False, "mirror half of the images left to right")

    # Reproducibility, log, checkpoints
    seed: int = option(0, "seed of everything random", 0, 2**32 - 1)
    log_every: int = option(50, "steps between two lines of log.csv", 1)
    sample_every: int = option(500, "steps between two grids of samples", 1)
    checkpoint_every: int = option(500, "steps between two checkpoints", 1)

    # Machine and folder
    bf16: bool = option(None, "compute in bfloat16", shown="where the processor supports it natively")
    compile: bool = option(None, "torch.compile the network, which takes a minute", shown="on CUDA with Triton")
    device: str = option(None, "cuda, cuda:1 (the second), mps or cpu", shown="the first one available")
    out: str = option(None, "the run's folder", shown="runs/<data>; with --resume the newest run in runs/")

    def __post_init__(self):
        check_options(self)
        if not self.dim_mults:
            raise ValueError(f"dim_mults needs at least one level, got {self.dim_mults}")
        if not self.data:
            raise ValueError("data must not be empty")
        self.out = self.out or f"runs/{resolve(self.data).name}"


@dataclasses.dataclass
class Source:
    """The run that --sample, --evaluate and --export read; --sample also takes published weights."""

    out: str = option(None, "the folder of a run", shown="the newest run in runs/")
    data: str = option(
        None,
        "the run in runs/<data>, an alternative to --out; with --evaluate and --out, where its data are now",
        shown="none",
    )
    weights: str = option(None, "a folder of published weights instead of a run", shown="none")


@dataclasses.dataclass
class Sampling:
    """How --sample draws, and what it writes besides samples.png."""

    sampler: str = option(
        "dpm-solver",
        "dpm-solver (second order), ddim, or ddpm for Algorithm 2",
        choices=SAMPLERS,
    )
    sampling_steps: int = option(
        None, "S, the number of steps, 1…T", shown="10 for dpm-solver, 50 for ddim, T for ddpm"
    )
    eta: float = option(0.0, "noise of ddim: 0 is deterministic, 1 adds as much as ddpm with fixed_small", 0, 1)
    guidance: float = option(0.0, "weight of classifier-free guidance; 0 is none", -1000, 1000)
    label: str = option(None, "the class to draw, by name or number", shown="all in turn")
    unconditional: bool = option(False, "draw without labels")
    sampling_batch: int = option(64, "images drawn at once", 1, 100000)
    individual: bool = option(False, "also write every image as a PNG of its own")
    animate: bool = option(False, "also write the reverse process as a GIF")

    def __post_init__(self):
        check_options(self, as_flag)


def check_sampling(options, run):
    """Raise ValueError for options of Sampling that do not fit the run or each other."""
    # Steps
    timesteps = run.diffusion.timesteps
    if options.sampling_steps is not None and not 1 <= options.sampling_steps <= timesteps:
        raise ValueError(f"--sampling-steps must lie in 1…{timesteps}, got {options.sampling_steps}")
    # Labels and guidance
    classes = run.model.num_classes
    wants_label = options.label is not None or options.guidance != 0
    if not classes and wants_label:
        raise ValueError(f"--label and --guidance need a network that learned labels; that in {run.config.out} did not")
    if classes and run.config.label_dropout == 0 and (options.unconditional or options.guidance != 0):
        raise ValueError("--guidance and --unconditional need a network trained with --label-dropout above 0")
    if options.unconditional and wants_label:
        raise ValueError("--unconditional goes with neither --label nor --guidance")
    if options.label is not None:
        run.find_label(options.label)


# The paper's appendix B for CIFAR-10, and settings for other data sets; Config's defaults are those of the digits.
PAPER = dict(
    image_size=32,
    dim=128,
    dim_mults=(1, 2, 2, 2),
    num_res_blocks=2,
    attn_resolutions=(16,),
    dropout=0.1,
    conditional=False,
    steps=800_000,
    lr=2e-4,
    warmup=5000,
    lr_decay="constant",
    flip=True,
    sample_every=10_000,
    checkpoint_every=5000,
)
SMALL = dict(
    dim=16,
    schedule="cosine",
    prediction="velocity",
    batch_size=32,
    warmup=200,
)
GREY_28 = dict(
    SMALL,
    image_size=28,
    dim_mults=(1, 2, 4),
    attn_resolutions=(7,),
    steps=3000,
    lr=2e-3,
    sample_every=1000,
)
FOLDER = dict(
    SMALL,
    image_size=32,
    dim_mults=(1, 2, 4, 8),
    attn_resolutions=(8,),
    steps=7000,
    lr=1e-3,
    sample_every=1000,
)
GPU = dict(
    PAPER,
    conditional=True,
    schedule="cosine",
    prediction="velocity",
    flip=False,
    steps=50_000,
    warmup=500,
    sample_every=1000,
    checkpoint_every=1000,
)
PRESETS = dict(digits={}, mnist=GREY_28, fashion_mnist=GREY_28, cifar10=PAPER, folder=FOLDER, gpu=GPU)


def preset(data, name=None, **changes):
    """The default Config of a data set, with changes to its fields. name selects another preset than the data set's."""
    if name not in (None, *PRESETS):
        raise ValueError(f"the name must be one of {', '.join(PRESETS)}, got {name!r}")
    settings = dict(PRESETS[name or (data if data in DATA_SETS else "folder")], data=data)
    if data in DATA_SETS:  # whose images have one size
        settings["image_size"] = PRESETS[data].get("image_size", Config.image_size)
    config = Config(**{**settings, **changes})
    # In a folder, self-attention is at the largest level that is not above the preset's size.
    if data not in DATA_SETS and "attn_resolutions" not in changes:
        limit = config.attn_resolutions[0]
        fitting = [size for size in level_sizes(config) if size <= limit]
        config.attn_resolutions = (max(fitting, default=limit),)
    return config


def level_sizes(config):
    """The height of the images at each level of the network."""
    return [config.image_size // 2**i for i in range(len(config.dim_mults))]


def build_diffusion(config):
    """The diffusion of a Config. The linear schedule's ends are scaled by 1000/T, so that x_T is noise for every T."""
    betas = cosine_beta_schedule(config.timesteps)
    if config.schedule == "linear":
        betas = linear_beta_schedule(config.timesteps, *linear_ends(config.timesteps))
    return GaussianDiffusion(betas, config.variance, config.loss, prediction=config.prediction)


def linear_ends(timesteps):
    """β_1 and β_T of the linear schedule."""
    scale = 1000 / timesteps
    return 1e-4 * scale, min(0.02 * scale, 0.999)


def build_network(config, image_channels, num_classes):
    """The network of a Config."""
    return UNet(
        image_channels,
        config.dim,
        config.dim_mults,
        config.num_res_blocks,
        config.attn_resolutions,
        config.image_size,
        config.dropout,
        num_classes=num_classes,
        learned_variance=config.variance == "learned_range",
    )


def build(config, image_channels, num_classes):
    """The network and the diffusion of a Config."""
    return build_network(config, image_channels, num_classes), build_diffusion(config)


# ---- 9. Files and devices --------------------------------------------------------------------------------------------

# Helpers


def in_one_line(error):
    """The message of an exception, or else its type, as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def derive_seed(seed, use, *numbers):
    """A 32-bit seed for one use of randomness, such as derive_seed(seed, "training", step, rank). Different uses and
    different numbers give independent streams: children of seed in NumPy's SeedSequence."""
    spawn_key = (int.from_bytes(use.encode(), "big"), *numbers)
    return np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1).item()


# Devices


def pick_device(name=None):
    """The device of that name (default: CUDA, else MPS, else the CPU). Under torchrun, "cuda" is each process's own
    GPU. Enables TF32 on CUDA. Raises ValueError if the device can't be used."""
    # By default, the fastest there is
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"

    # A device that is not there, or not supported by this torch, raises here.
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, device=device).tolist()
    except Exception as error:  # a device without its library may raise any exception
        raise ValueError(
            f"device {name!r} can't be used here: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None

    # One GPU for this process, and TF32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def autocast(config, device):
    """A context manager for bfloat16, if config.bf16 says so (default: where the processor supports it natively). It
    does not cost quality; a CPU with such instructions trains the digits 1.3 times as fast, the paper's network 1.5
    times."""
    enabled = config.bf16
    if enabled is None and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    elif enabled is None and device.type == "cpu":
        enabled = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(enabled))


def maybe_compile(config, device, network):
    """The network, compiled if config.compile says so (default: on CUDA with Triton, which torch installs on Linux
    only). On one GPU it then runs as CUDA graphs, which train the paper's network 2.5 times as fast: launching its
    kernels one by one takes longer than their work."""
    # By default, only where torch.compile works and pays
    wanted = config.compile
    if wanted is None:
        from torch.utils._triton import has_triton

        wanted = device.type == "cuda" and has_triton()
    if not wanted:
        return network

    rank, _ = rank_and_world_size()
    if rank == 0:
        print("compiling the network takes about a minute; --no-compile skips it", file=sys.stderr)

    # Shapes are static. Among several GPUs gradients are exchanged during the backward pass, which a graph can't do.
    mode = "reduce-overhead"
    if isinstance(network, nn.parallel.DistributedDataParallel):
        mode = "default"
    return torch.compile(network, mode=mode, dynamic=False)


def keep_freed_memory():
    """Tell glibc's malloc to keep freed memory: returning it to the system and faulting it in again takes a third of a
    small network's time on a CPU. No effect without glibc."""
    if sys.platform != "linux":
        return
    import ctypes

    # As in malloc.h
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


# Processes


def rank_and_world_size():
    """The number of this process and the number of processes, set by torchrun. Raises ValueError if one is missing."""
    rank = os.environ.get("RANK")
    world_size = os.environ.get("WORLD_SIZE")
    if rank in (None, "0") and world_size in (None, "1"):
        return 0, 1
    known = f"{rank}".isdecimal() and f"{world_size}".isdecimal()
    if not known or not int(rank) < int(world_size):
        got = f"RANK={rank} and WORLD_SIZE={world_size}"
        raise ValueError(f"RANK must be a number below WORLD_SIZE, got {got}: torchrun sets both, else unset both")
    return int(rank), int(world_size)


def share_between_processes(model, device):
    """With several processes, joins them. Returns the model with gradients averaged over them, and a group for values
    on the CPU (None with one process)."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return model, None
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    cpu_group = dist.new_group(backend="gloo")
    return nn.parallel.DistributedDataParallel(model), cpu_group


def gather_batches(drawn):
    """Wait for all processes. Returns their {i: images of batch i} as one dictionary; an ImageStore has them all."""
    _, world_size = rank_and_world_size()
    stored = isinstance(drawn, ImageStore)
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # a process may draw for long
    gathered = [None] * world_size
    dist.all_gather_object(gathered, None if stored else drawn)
    leave_processes()
    if stored:
        return drawn
    return {i: pixels for part in gathered for i, pixels in part.items()}


def leave_processes():
    """Leave the group of processes. The pause lets its threads finish: torch 2.6 may wait for them forever."""
    time.sleep(0.2)
    dist.destroy_process_group()


@contextlib.contextmanager
def record_signals():
    """Context manager that records the first SIGINT, SIGTERM and SIGHUP (a closed terminal) in a list; a second of
    the same kind has its usual effect. One that is ignored, as by nohup, stays ignored. Does nothing outside
    the main thread."""
    received = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.getsignal(number) for number in heeded}

    def record(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    try:
        for number in handlers:
            signal.signal(number, record)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def any_process_received(signals, cpu_group):
    """Whether record_signals of this process or, with several, of any other has recorded one."""
    if cpu_group is None:
        return len(signals) > 0
    received = torch.tensor(len(signals))
    dist.all_reduce(received, group=cpu_group)
    return received.item() > 0


# Files


def temporary_path(path):
    """A hidden name beside path for what is not complete yet, another one for each writer."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")


def atomic_write(path, save):
    """Call save(file) on a temporary file, fsync it and rename it: path is always the complete old or new file."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch turns a full disk into a RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            reason = error.__context__ or error
            raise OSError(f"{path} can't be written ({reason}); a previous version is intact") from None
        raise


def write_folder(path, save):
    """Call save(folder) on an empty temporary folder, then rename it to path, replacing what is there."""
    # The new folder
    temporary = temporary_path(path)
    temporary.mkdir(parents=True)
    try:
        save(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):  # safetensors has one of its own for a full disk
            raise OSError(f"{path} can't be written ({in_one_line(error)})") from None
        raise

    # Replace the old folder
    try:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except OSError as error:
        raise OSError(f"{path} can't be replaced ({error.strerror}); what was written is in {temporary}") from None


def make_grid_image(pixels, columns=None):
    """Images, uint8 (N, C, H, W), as one grid (default: a square one), row by row, with grey lines between them; small
    images are enlarged."""
    # Lines and empty places
    count, channels, height, width = pixels.shape
    columns = min(count, columns or math.ceil(count**0.5))
    rows = math.ceil(count / columns)
    grid = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 64, dtype=torch.uint8)

    # The images
    for i, image in enumerate(pixels.cpu()):
        top = i // columns * (height + 1) + 1
        left = i % columns * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = image
    zoom = max(1, 32 // width)
    return pixels_to_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))


def check_output(out, individual):
    """Make the folder for samples. Raises ValueError if it can't be written to, or if what would be replaced there is
    not of an earlier call."""
    # The folder itself
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"samples can't be written to {out}: it is read-only")

    # The files, and the folder individual
    for name in SAMPLES:
        if (out / name).exists() and not is_run(out) and not (out / SAMPLES_MARK).exists():
            raise ValueError(f"{out / name} is not one of --sample: move it away, or name another folder with --out")
    for name in ("samples.png", "samples.gif"):
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder: move it away")
    folder = out / "individual"
    if individual and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise ValueError(f"{folder} is no folder: move it away")
    if individual and folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        others = set(names) - {f"{i:05}.png" for i in range(len(names))}
        if others:
            raise ValueError(f"{folder} holds {min(others)}; --sample writes 00000.png, 00001.png, …: move it away")


SHOWN = 1024  # images in samples.png, at most
MAX_COLUMNS = 16  # a grid has a column for each class, up to this many classes


def write_samples(out, images, columns, individual, frames):
    """Write samples.png and, if wanted, the folder individual and samples.gif. images is an iterator over uint8
    (C, H, W). Returns the paths written."""
    # The grid
    (out / SAMPLES_MARK).touch()
    paths = [out / "samples.png"]
    shown = list(itertools.islice(images, SHOWN))
    grid = make_grid_image(torch.stack(shown), columns)
    atomic_write(paths[0], functools.partial(grid.save, format="PNG"))

    # Every image as a file of its own
    def save_individually(folder):
        for i, image in enumerate(itertools.chain(shown, images)):
            pixels_to_image(image).save(folder / f"{i:05}.png")

    if individual:
        paths.append(out / "individual")
        write_folder(paths[-1], save_individually)

    # About 60 of the frames at 60 ms each; 25 or fewer share 1.5 seconds. The last one stays for two seconds.
    if frames:
        milliseconds = max(60, 1500 // len(frames))
        chosen = frames[: -1 : math.ceil(len(frames) / 60)]
        grids = [make_grid_image(frame, columns) for frame in [*chosen, frames[-1]]]
        paths.append(out / "samples.gif")
        save_gif = functools.partial(
            grids[0].save,
            format="GIF",
            save_all=True,
            append_images=grids[1:],
            loop=0,
            duration=[milliseconds] * len(chosen) + [2000],
        )
        atomic_write(paths[-1], save_gif)
    return paths


class ImageStore:
    """Maps i to the images of batch i, which --individual keeps as files in the folder .drawn of the run: memory does
    not grow with their number, and a call that was stopped can be repeated to draw the others. What was drawn with
    other weights, another seed or other options is removed. All processes need the same folder."""

    def __init__(self, out, run, batch_size, seed, options):
        # What the images depend on
        weights = 0
        for weight in (run.diffusion.betas, *run.model.parameters()):
            weights = zlib.crc32(weight.detach().float().cpu().numpy().tobytes(), weights)
        how = {**dataclasses.asdict(run.config), **dataclasses.asdict(options)}
        for name in ("out", "data", "device", "compile", "sampling_batch", "individual", "animate"):
            del how[name]
        how["variance"] = run.diffusion.variance_type  # a caller may have changed it
        note = json.dumps({**how, "weights": weights, "seed": seed, "batch_size": batch_size}).encode()

        # A folder named after it; rank 0 removes others
        self.root = out / ".drawn"
        self.folder = self.root / hashlib.sha256(note).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, _ = rank_and_world_size()
        if rank == 0:
            for other in set(self.root.iterdir()) - {self.folder}:
                shutil.rmtree(other, ignore_errors=True)

    def path(self, i):
        """The file of batch i."""
        return self.folder / f"{i}.pt"

    def __contains__(self, i):
        try:
            load_tensors(self.path(i))
        except Exception:  # a damaged file may raise any exception
            return False
        return True

    def __getitem__(self, i):
        return load_tensors(self.path(i))

    def __setitem__(self, i, pixels):
        atomic_write(self.path(i), functools.partial(torch.save, pixels))

    def remove(self):
        """Remove all images."""
        shutil.rmtree(self.root, ignore_errors=True)


# The folder of a run: checkpoint.pt, log.csv, samples-*.png


@dataclasses.dataclass
class TrainingState:
    """What a checkpoint holds. step is the number of steps done before this process."""

    config: Config
    model: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    classes: list  # the names of the labels, or None
    images: int  # the number of images trained on
    checksum: int  # of these images and their labels
    examples: list = ()  # for TrainingLog.compare; not in the checkpoint
    step: int = 0

    def restore(self, checkpoint):
        """Load a checkpoint. Raises ValueError if it is of other data, or has all its steps already."""
        # Checks
        config = self.config
        classes = checkpoint["num_classes"]
        step = checkpoint["step"]
        if classes != self.model.num_classes:
            counts = f"{self.model.num_classes or 'no'} classes, the run in {config.out} {classes or 'none'}"
            raise ValueError(f"{config.data} has {counts}")
        if checkpoint["classes"] not in (None, self.classes):
            raise ValueError(f"{config.data} has other classes than the run in {config.out}: {checkpoint['classes']}")
        if checkpoint["image_channels"] != self.model.image_channels:
            before = checkpoint["image_channels"]
            raise ValueError(
                f"{config.data} has {self.model.image_channels} channels, the run in {config.out} {before}"
            )
        if step >= config.steps:
            raise ValueError(f"{config.out} has its {step:,} steps already: use --steps N with a larger N")

        # Its parts
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        try:
            self.restore_optimizer(checkpoint["optimizer"]["state"])
        except Exception as error:  # a damaged state may raise any exception
            reason = f"its part optimizer can't be restored ({in_one_line(error)})"
            raise ValueError(f"{config.out}/checkpoint.pt: {reason}") from None
        self.step = step

        # Changed data are allowed
        rank, _ = rank_and_world_size()
        if rank == 0 and checkpoint["images"] not in (None, self.images):
            print(f"{config.data} has {self.images:,} images to train on; it had {checkpoint['images']:,}")
        elif rank == 0 and checkpoint["checksum"] not in (None, self.checksum):
            print(f"the images of {config.data} as read, or their labels, have changed since the run's last checkpoint")

    def restore_optimizer(self, state):
        """Load Adam's moments. May raise any exception if they do not fit the weights."""
        self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=copy.deepcopy(state)))
        for weight in self.model.parameters():
            for name, shape in (("exp_avg", weight.shape), ("exp_avg_sq", weight.shape), ("step", ())):
                value = self.optimizer.state[weight][name]
                if value.shape != shape or not value.is_floating_point():
                    raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}")

    def save(self, step):
        """Write checkpoint.pt."""
        checkpoint = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        checkpoint["step"] = step
        checkpoint["config"] = dataclasses.asdict(self.config)
        checkpoint["image_channels"] = self.model.image_channels
        checkpoint["num_classes"] = self.model.num_classes
        checkpoint["classes"] = self.classes
        checkpoint["images"] = self.images
        checkpoint["checksum"] = self.checksum
        atomic_write(Path(self.config.out) / "checkpoint.pt", functools.partial(torch.save, checkpoint))


def read_checkpoint(out):
    """The checkpoint in a run's folder."""
    path = Path(out) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: --out names the folder of a run; python ddpm.py --train makes one")
    try:
        checkpoint = load_tensors(path)
        check_checkpoint(checkpoint, out)
    except Exception as error:  # a malformed file may raise any exception
        reason = in_one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} is no checkpoint of ddpm.py, or not a whole one ({reason})") from None
    return checkpoint


def load_tensors(path):
    """What torch.save wrote, read without running code that it may contain (weights_only). May raise any exception if
    it is damaged; a changed bit shows in the checksums of the zip file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def check_checkpoint(checkpoint, out):
    """Turn the settings of a checkpoint into a Config. May raise any exception if a part is missing, has another type,
    or does not fit the network of that Config."""
    # Settings and numbers; "prediction" is newer than the others
    missing = {field.name for field in dataclasses.fields(Config)} - {"prediction", *checkpoint["config"]}
    if missing:
        raise ValueError(f"config has no {min(missing)}")
    checkpoint["config"] = Config(**dict(checkpoint["config"], out=str(out)))
    for name in ("images", "checksum", "classes"):  # which earlier versions did not write
        checkpoint.setdefault(name, None)
    for name, least in {"step": 1, "image_channels": 1, "num_classes": 1, "images": 1, "checksum": 0}.items():
        value = checkpoint[name]
        absent = name in ("num_classes", "images", "checksum") and value is None
        if not absent and (type(value) is not int or value < least):
            raise ValueError(f"{name} is {value!r}")
    classes = checkpoint["classes"]
    if classes is not None and [type(name) for name in classes] != [str] * (checkpoint["num_classes"] or 0):
        raise ValueError(f"classes is {classes!r}")
    # Names and shapes of the weights, against those of a network without values
    with torch.device("meta"):
        network = build_network(checkpoint["config"], checkpoint["image_channels"], checkpoint["num_classes"])
    wanted = {name: weight.shape for name, weight in network.state_dict().items()}
    for part in ("model", "ema"):
        found = {name: weight.shape for name, weight in checkpoint[part].items()}
        differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(f"{part}: {name} is {found.get(name)}, not {wanted.get(name)}")
        integers = [name for name, weight in checkpoint[part].items() if not weight.is_floating_point()]
        if integers:
            raise ValueError(f"{part}: {integers[0]} holds integers")
    # The optimizer's state is checked when it is restored.
    if not isinstance(checkpoint["optimizer"], dict):
        raise ValueError(f"optimizer is {checkpoint['optimizer']!r}")


def averaged_network(checkpoint):
    """The network of a checkpoint, with the averaged weights. Raises ValueError if they are not finite."""
    network = build_network(checkpoint["config"], checkpoint["image_channels"], checkpoint["num_classes"])
    network.load_state_dict(checkpoint["ema"])
    check_finite(network, checkpoint["config"].out)
    return network.eval()


def check_finite(network, source):
    """Raise ValueError unless all weights are finite."""
    if not all(weight.isfinite().all() for weight in network.parameters()):
        raise ValueError(f"the weights in {source} are not finite")


@contextlib.contextmanager
def lock_folder(out, use="training"):
    """Context manager that keeps other trainings, or other samplings, out of a run's folder; the lock ends with the
    process. A training's lock is .NAME.lock beside the folder, because the folder may be renamed. A sampling's lock is
    inside it, and so is a training's if the parent folder is read-only. If the caller fails, folders that were made for
    the lock alone are removed. Raises ValueError if another process holds the lock."""
    # The lock's place
    real = resolve(out)
    if not real.name or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is no folder for a run: --out names one")
    path = real.with_name(f".{real.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if use == "sampling" or (real.is_dir() and not os.access(path.parent, os.W_OK)):
        path = real / f".{use}.lock"

    # Held until the caller is done
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            except BaseException:
                if not real.exists():
                    remove_lock(path, made)
                raise
    except Timeout:
        advice = "wait until it ends" if use == "sampling" else "--out names another folder"
        raise ValueError(f"another {use} is running in {out}: {advice}") from None


def remove_lock(path, made):
    """Remove a lock's file and the folders made for it, unless they are in use; Windows keeps files that are open."""
    with contextlib.suppress(OSError):
        path.unlink()
        for folder in made:
            folder.rmdir()


def resolve(path):
    """The absolute path with links resolved; a link to itself is returned unresolved."""
    return Path(os.path.realpath(path))


def check_new_run(config):
    """Raise ValueError if no label would be learned, if what a training reads lies in its run's folder, which a later
    run renames, or if a log.csv or checkpoint.pt there is not a run's, or if the current folder lies in that run's."""
    if config.conditional and config.label_dropout == 1:
        raise ValueError("label_dropout must be below 1: --no-conditional learns no labels")

    # What the folder holds
    out = resolve(config.out)
    for name in ("log.csv", "checkpoint.pt"):
        if (out / name).exists() and not is_run(out):
            raise ValueError(f"{config.out}/{name} is not that of a run: --out names another folder")
    here = resolve(".")
    if (out / "checkpoint.pt").exists() and out in (here, *here.parents):
        raise ValueError(f"the run in {config.out} can't be renamed from inside: --out names another folder")

    # What the training reads
    for name in ("data", "weights"):
        given = getattr(config, name)
        if given in DATA_SETS or given is None:
            continue
        folder = resolve(given)
        if out in (folder, *folder.parents):
            raise ValueError(f"{name} {given} lies in out, the run's folder {config.out}: --out names another one")


LOG_HEADER = "step,loss,gradient_norm,learning_rate,images_per_second,ema_loss,ema_loss_held_out\n"


def start_folder(out, first_step):
    """For a new run (first_step = 0), make an empty folder; an earlier run there is renamed. For a resumed run, cut
    log.csv off at first_step."""
    # The rows to keep, or the new name of an earlier run
    rows = []
    if first_step > 0:
        rows = read_rows(out / "log.csv", first_step)
    elif (out / "checkpoint.pt").exists():
        with lock_folder(out, "sampling"):
            pass  # no samples are drawn from the earlier run
        print(f"the earlier run in {out} is now {rename_folder(out)}")

    # The folder, and log.csv in it
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "log.csv", lambda file: file.write("".join([LOG_HEADER, *rows]).encode()))


RUN_FILES = ("checkpoint.pt", "log.csv", "samples-*.png", *SAMPLES)  # what a run's folder holds


def rename_folder(folder):
    """Rename a folder to NAME-1, NAME-2, … and make a new one; of a link, the target. If it holds other files, too, or
    is a mounted disk, the files of the run are moved into a folder of that name in it. Returns the new path."""
    # The first number that is free
    if folder.is_symlink():
        folder = resolve(folder)
    n = 1
    while folder.with_name(f"{folder.name}-{n}").exists() or (folder / f"{folder.name}-{n}").exists():
        n += 1

    # Renamed
    written = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if not [path for path in folder.iterdir() if path not in written and not path.name.startswith(".")]:
        with contextlib.suppress(OSError):
            renamed = folder.rename(folder.with_name(f"{folder.name}-{n}"))
            folder.mkdir()
            return renamed

    # Or the files moved
    renamed = folder / f"{folder.name}-{n}"
    renamed.mkdir()
    for path in written:
        path.rename(renamed / path.name)
    return renamed


def read_rows(path, last_step):
    """The rows of a log.csv up to a step. What is no whole row is left out; a missing file has none. Rows of an earlier
    version, without the last two columns, get them empty."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").splitlines()
    rows = [line for line in lines if re.fullmatch(r"\d+(,[-+.\de]+){4}(,[.\d]*,[.\d]*)?", line)]
    rows = [row if row.count(",") == 6 else f"{row},," for row in rows]
    return [f"{row}\n" for row in rows if int(row.split(",")[0]) <= last_step]


def announce(config, state, images):
    """Print what is trained."""
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(
        f"{len(images):,} images of {config.data}, {parameters:,} parameters, {images.device}, "
        f"{config.steps - state.step:,} steps into {config.out}"
    )
    sizes = level_sizes(config)
    if config.attn_resolutions and not set(sizes) & set(config.attn_resolutions):
        levels = ", ".join(map(str, sizes))
        print(f"self-attention in the middle only: no level ({levels} pixels) is in --attn-resolutions")


def check_memory(config, device):
    """Raise ValueError if a training step certainly needs more memory than there is. (A system that runs out of memory
    may kill the process without a message.)"""
    # Each residual block, of which a level has 2n + 1, keeps its layers' inputs: six, or four if compiled or on a GPU
    with autocast(config, device):
        bytes_per_value = 2 if torch.is_autocast_enabled(device.type) else 4
    kept = 6 if device.type == "cpu" and not config.compile else 4
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in build_network(config, 1, None).parameters())
    needed = 0
    for size, mult in zip(level_sizes(config), config.dim_mults, strict=True):
        blocks = 2 * config.num_res_blocks + 1
        needed += config.batch_size * blocks * kept * mult * config.dim * size**2 * bytes_per_value
    if device.type == "cuda":  # a GPU for each process
        _, world_size = rank_and_world_size()
        needed /= world_size
    needed += 5 * 4 * weights  # gradients, the EMA and Adam's two moments, too
    memory = total_memory(device)
    if needed > memory:
        raise ValueError(
            f"a step on {config.batch_size:,} images of {config.image_size}×{config.image_size} needs more than "
            f"{needed / 2**30:,.0f} GiB of memory, there are {memory / 2**30:.0f}: make --batch-size, --image-size or "
            "--dim smaller"
        )


def total_memory(device):
    """The bytes of memory that the GPU or the machine has; infinity if that can't be known."""
    if device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(device)
        return memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def in_words(seconds):
    """A duration of a minute or more, as in "2 h 05 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def peak_memory(device):
    """The most memory that was used so far in GiB: of the GPU, or of the process. None if it can't be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    units = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def hide_bar():
    """tqdm's disable: only rank 0 shows a bar, and only on a terminal, which is what None means."""
    rank, _ = rank_and_world_size()
    return None if rank == 0 else True


def training_bar(config, first_step):
    """The progress bar, counted in images."""
    return tqdm(
        total=config.steps * config.batch_size,
        initial=first_step * config.batch_size,
        unit=" images",
        unit_scale=True,
        disable=hide_bar(),
    )


class TrainingLog:
    """Writes log.csv: means over the steps since the line before. Prints an estimate of the time, and compared losses.
    Losses stay on the device until a line is written, so that no step waits for the GPU."""

    def __init__(self, config, cpu_group, first_step, device):
        self.config = config
        self.cpu_group = cpu_group
        self.device = device
        self.done = first_step
        self.history = []
        self.compared = ["", ""]
        self.since = time.perf_counter()
        self.timed_from = first_step + 5  # the first steps are slower
        self.timed_since = None

    @contextlib.contextmanager
    def pause(self):
        """Context manager for what is not counted as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that steps in the queue are counted
        paused = time.perf_counter()
        yield
        seconds = time.perf_counter() - paused
        self.since += seconds
        if self.timed_since is not None:
            self.timed_since += seconds

    def add(self, loss, gradient_norm):
        """Record a step."""
        self.history.append(torch.stack([loss.detach(), gradient_norm]))
        self.done += 1
        if self.done == self.timed_from:
            self.timed_since = time.perf_counter()
        elif self.timed_since is not None and time.perf_counter() - self.timed_since >= 5:
            self.print_estimate()

    def print_estimate(self):
        """Print, once, how long the rest of the training will take, if that is a minute or more, and its memory."""
        # How long
        steps_per_second = (self.done - self.timed_from) / (time.perf_counter() - self.timed_since)
        self.timed_since = None
        seconds = (self.config.steps - self.done) / steps_per_second
        rank, _ = rank_and_world_size()
        if rank > 0 or seconds < 60:
            return
        # The line
        text = f"{steps_per_second:.3g} steps/s: {in_words(seconds)} to go"
        if seconds > 3600:
            steps = self.done + 3600 * steps_per_second
            smaller = "--image-size 32" if self.config.image_size > 32 else "a smaller --dim"
            resume = f"--train --resume --steps {10 * round(steps / 10)} --out {self.config.out}"
            text += f" (to end in an hour: Ctrl-C, then {resume}; or train anew with {smaller})"
        memory = peak_memory(self.device)
        if memory is not None:
            text += f"; memory {memory:.1f} GiB"
        self.say(text)

    def say(self, text):
        """Print a line above the bar. A closed stdout (as with | head) does not end the training."""
        with contextlib.suppress(OSError):
            tqdm.write(text)

    @torch.no_grad()
    def compare(self, state, diffusion):
        """For the next line, and printed: the loss of the averaged weights on training images and on held-out ones, 512
        of each, with the same t, evenly spread, and the same ε every time. Where it rises on the held-out images and
        falls on the others, the network memorises its training images."""
        with self.pause():
            for i, (images, labels) in enumerate(state.examples):
                generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "comparison"))
                timesteps = torch.randperm(len(images), generator=generator) * diffusion.timesteps // len(images)
                losses = []
                for chosen in torch.arange(len(images)).split(min(64, self.config.batch_size)):
                    x_start = to_model(images[chosen])
                    t = timesteps[chosen].to(self.device)
                    noise = torch.randn(x_start.shape, generator=generator).to(self.device)
                    model = functools.partial(state.ema, y=None if labels is None else labels[chosen])
                    with autocast(self.config, self.device):
                        losses.append(len(t) / len(images) * diffusion.p_losses(model, x_start, t, noise))
                self.compared[i] = f"{sum(losses):.6f}"
        if state.examples:
            which = "{} on training images, {} on held-out images".format(*self.compared)
            self.say(f"step {self.done:,}: loss of the averaged weights {which}")

    def write(self):
        """Write a line. Returns the mean loss. Raises ValueError if a loss is not finite."""
        # One copy from the device; the mean over processes
        losses, norms = torch.stack(self.history, dim=1).float().cpu()
        rank, world_size = rank_and_world_size()
        if self.cpu_group is not None:
            dist.all_reduce(losses, group=self.cpu_group)
            losses /= world_size
        self.check_finite(losses, norms)

        now = time.perf_counter()
        speed = len(self.history) * self.config.batch_size / (now - self.since)
        lr = learning_rate(self.config, self.done - 1)
        if rank == 0:
            means = f"{losses.mean():.6f},{norms.mean():.4f}"
            compared = ",".join(self.compared)
            with open(Path(self.config.out) / "log.csv", "a") as file:
                file.write(f"{self.done},{means},{lr:.3g},{speed:.0f},{compared}\n")

        self.since = now
        self.history.clear()
        self.compared = ["", ""]
        return losses.mean()

    def check_finite(self, losses, norms):
        """Raise ValueError with the first step whose loss or gradient is not finite."""
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            step = self.done - len(finite) + int(finite.int().argmin())
            path = Path(self.config.out) / "checkpoint.pt"
            kept = f"{path} is the last good one; " if path.exists() else ""
            raise ValueError(
                f"loss or gradient is not finite at (seed {self.config.seed}, step {step}); "
                f"{kept}a smaller --lr than {self.config.lr:g} may help"
            )


# ---- 10. Published weights -------------------------------------------------------------------------------------------
# Folders of diffusers' UNet2DModel, such as google/ddpm-cifar10-32: config.json, and diffusion_pytorch_model.bin or
# .safetensors; scheduler_config.json and model_index.json for its pipelines.

# Fields of config.json that have one value for every UNet. For the first five, diffusers' default is another value.
FIXED_FIELDS = dict(
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
# For these it is the same, so that config.json may leave them out.
DEFAULT_FIELDS = dict(
    act_fn="silu",
    attn_norm_num_groups=None,
    center_input_sample=False,
    class_embed_type=None,
    downsample_type="conv",
    mid_block_scale_factor=1,
    mid_block_type="UNetMidBlock2D",
    resnet_time_scale_shift="default",
    time_embedding_dim=None,
    time_embedding_type="positional",
    upsample_type="conv",
)
# Fields of scheduler_config.json that have one value here, diffusers' default.
FIXED_SCHEDULE = dict(clip_sample=True, clip_sample_range=1.0, rescale_betas_zero_snr=False, thresholding=False)
# diffusers' names of what a network predicts, and Config's.
PREDICTION_TYPES = dict(epsilon="noise", v_prediction="velocity")


def describe_network(network, image_size):
    """The config.json of a UNet. Raises ValueError for what a UNet2DModel can't be."""
    # The levels
    levels = network.down_blocks
    widths = [level.resnets[-1].conv2.out_channels for level in levels]
    attention = [isinstance(level.attentions[0], AttentionBlock) for level in levels]

    # What diffusers can't express
    groups = sorted({module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)})
    if len(groups) > 1:
        raise ValueError(f"diffusers has one number of groups for all norms, this network has {groups}")
    dim = network.conv_in.out_channels
    if dim != widths[0]:
        raise ValueError(f"diffusers needs dim_mults that begin with 1, got {[width // dim for width in widths]}")

    return dict(
        **FIXED_FIELDS,
        **DEFAULT_FIELDS,
        sample_size=image_size,
        in_channels=network.image_channels,
        out_channels=network.conv_out.out_channels,
        block_out_channels=widths,
        layers_per_block=len(levels[0].resnets),
        norm_num_groups=groups[0],
        down_block_types=["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        up_block_types=["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        add_attention=isinstance(network.mid_block.attentions[0], AttentionBlock),
        num_class_embeds=network.num_classes + 1 if network.num_classes else None,
    )


def load_published(folder):
    """Returns the UNet of a published folder, and its arguments but for image_channels, as a dict.

    Raises ValueError for what can't be read and, with the field's name, for a config.json that describes another
    function than UNet's. .safetensors are read if there is no .bin and the package of that name is installed."""
    folder = Path(folder)
    file = folder / "diffusion_pytorch_model.bin"
    try:
        # The network that config.json describes
        config = json.loads((folder / "config.json").read_text())
        shape = read_shape(config)
        network = UNet(config["in_channels"], **shape)
        check_published(config, describe_network(network, shape["image_size"]))

        # Its weights
        if file.with_suffix(".safetensors").exists() and not file.exists():
            from safetensors.torch import load_file

            weights = load_file(file.with_suffix(".safetensors"))
        else:
            weights = load_tensors(file)
        network.load_state_dict({current_name(name): weight for name, weight in weights.items()})
        check_finite(network, file.name)
    except ImportError:
        raise ValueError(f"{folder} holds .safetensors, which need that package: pip install safetensors") from None
    except Exception as error:  # a malformed file may raise any exception
        raise ValueError(f"{folder} is no published network that fits here: {in_one_line(error)}") from None
    return network.eval(), shape


def read_shape(config):
    """UNet's arguments for a config.json."""
    widths = config["block_out_channels"]
    dim = widths[0]
    attn_resolutions = []
    for i, kind in enumerate(config["down_block_types"]):
        if kind == "AttnDownBlock2D":
            attn_resolutions.append(config["sample_size"] >> i)
    return dict(
        dim=dim,
        dim_mults=tuple(width // dim for width in widths),
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=tuple(attn_resolutions),
        image_size=config["sample_size"],
    )


def check_published(config, expected):
    """Raise ValueError for a field of config.json that is not as expected, an absent one having diffusers' default."""
    defaults = dict(DEFAULT_FIELDS, add_attention=True, norm_num_groups=32, num_class_embeds=None)
    config = {**defaults, **config}
    for name in sorted({*config, *expected}):
        # These do not change what a trained network computes.
        if name.startswith("_") or name in ("dropout", "num_train_timesteps"):
            continue
        value = config.get(name, "left out")
        if name not in expected or value != expected[name]:
            raise ValueError(f"{name} can't be {value!r}")


def current_name(name):
    """A weight's name; files of before 2023 call the layers of attention differently."""
    name = name.replace(".query.", ".to_q.").replace(".key.", ".to_k.").replace(".value.", ".to_v.")
    return name.replace(".proj_attn.", ".to_out.0.")


def load_initial_weights(model, config):
    """Load the published weights config.weights into a new network."""
    start, _ = load_published(config.weights)
    if start.image_channels != model.image_channels:
        raise ValueError(f"{config.data} has {model.image_channels} channels, {config.weights} {start.image_channels}")
    if config.variance == "learned_range":
        raise ValueError(f"variance can't be learned_range with --weights: {config.weights} has no output for v")
    prediction = published_schedule(config.weights).get("prediction", "noise")
    if config.prediction != prediction:
        raise ValueError(f"prediction must be {prediction}, as of {config.weights}, got {config.prediction}")
    model.load_state_dict(start.state_dict())


def published_schedule(folder):
    """Config's settings of the diffusion for the scheduler_config.json of a published folder; none without it.
    Raises ValueError if it is none that a Config can describe."""
    path = Path(folder) / "scheduler_config.json"
    if not path.is_file():
        return {}
    try:
        # Its betas, and what the network predicts
        scheduler = json.loads(path.read_text())
        timesteps = scheduler["num_train_timesteps"]
        betas = scheduler.get("trained_betas")
        if betas is None:
            if scheduler.get("beta_schedule", "linear") != "linear":
                raise ValueError(f"beta_schedule can't be {scheduler['beta_schedule']!r}")
            betas = linear_beta_schedule(timesteps, scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
        betas = torch.as_tensor(betas, dtype=torch.float32)
        for name, value in FIXED_SCHEDULE.items():
            if scheduler.get(name, value) != value:
                raise ValueError(f"{name} can't be {scheduler[name]!r}")
        published = scheduler.get("prediction_type", "epsilon")
        if published not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type can't be {published!r}")
        prediction = PREDICTION_TYPES[published]

        # The schedule that has these betas
        variance = scheduler.get("variance_type", "fixed_small")
        for schedule in ("linear", "cosine"):
            config = Config(timesteps=timesteps, schedule=schedule, variance=variance)
            if torch.allclose(build_diffusion(config).betas, betas, rtol=1e-5, atol=0):
                return dict(timesteps=timesteps, schedule=schedule, variance=variance, prediction=prediction)
        raise ValueError("its betas are neither the linear nor the cosine schedule")
    except Exception as error:  # a malformed file may raise any exception
        raise ValueError(f"{path} is no schedule that fits here: {in_one_line(error)}") from None


def export(checkpoint, folder):
    """Write a run's averaged network as a folder that diffusers loads: UNet2DModel.from_pretrained(folder) is the same
    function, with class_labels = num_classes for "no label". DDPMPipeline and DDIMPipeline draw from it if it has no
    labels and a fixed variance. (A learned v is exported as it is; diffusers' scheduler expects 2v − 1.)"""
    # A new folder only
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: --export makes a new one")

    # What to write
    config = checkpoint["config"]
    network = averaged_network(checkpoint)
    network_config = describe_network(network, config.image_size)
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}

    def save(folder):
        write_json(folder / "config.json", dict(_class_name="UNet2DModel", dropout=config.dropout, **network_config))
        write_json(folder / "scheduler_config.json", dict(_class_name="DDPMScheduler", **describe_schedule(config)))

        # The pipelines know no labels, and DDIMPipeline no learned variance.
        if network.num_classes is None and config.variance != "learned_range":
            index = dict(unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
            write_json(folder / "model_index.json", dict(_class_name="DDPMPipeline", **index))

        # The weights
        try:
            from safetensors.torch import save_file

            save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        except ImportError:
            torch.save(weights, folder / "diffusion_pytorch_model.bin")

    write_folder(resolve(folder), save)


def describe_schedule(config):
    """The scheduler_config.json of a Config."""
    start, end = linear_ends(config.timesteps)
    trained_betas = None
    if config.schedule == "cosine":
        trained_betas = cosine_beta_schedule(config.timesteps).tolist()
    prediction_type = next(theirs for theirs, ours in PREDICTION_TYPES.items() if ours == config.prediction)
    return dict(
        num_train_timesteps=config.timesteps,
        beta_schedule="linear",
        beta_start=start,
        beta_end=end,
        trained_betas=trained_betas,
        variance_type=config.variance,
        prediction_type=prediction_type,
        clip_sample=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def write_json(path, value):
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- 11. Command line ------------------------------------------------------------------------------------------------


def options_of(kind, *names):
    """The fields of a dataclass of options, all of them or those of the given names, by name."""
    return {field.name: field for field in dataclasses.fields(kind) if not names or field.name in names}


# The modes, and the options that each takes.
MACHINE = options_of(Config, "device", "bf16", "compile")
RUN = options_of(Source, "out", "data")
RESUME = options_of(Config, "steps", "log_every", "sample_every", "checkpoint_every", "out", "data")
MODES = {
    "train": options_of(Config),
    "train --resume": {**RESUME, **MACHINE},
    "sample": {**options_of(Source), **options_of(Sampling), **options_of(Config, "seed"), **MACHINE},
    "evaluate": {**RUN, **options_of(Config, "seed"), **MACHINE},
    "export": RUN,
}
USAGE = {
    "train": "--train [--resume] [options]",
    "sample": "--sample N [options]",
    "evaluate": "--evaluate [N] [options]",
    "export": "--export FOLDER [options]",
}


def as_flag(name):
    """The flag of an option: batch_size → --batch-size."""
    return "--" + name.replace("_", "-")


def as_typed(value):
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def describe_default(field):
    """The default of an option, and those of the presets that have another one."""
    if field.metadata["shown"]:
        return field.metadata["shown"]

    # Other defaults, and the data sets that have each
    presets = {}
    spoken = {"folder": "a folder", "gpu": "--preset gpu"}
    for name, settings in PRESETS.items():
        value = settings.get(field.name, field.default)
        if value != field.default:
            presets.setdefault(as_typed(value), []).append(spoken.get(name, name))
    others = [f"{value} for {', '.join(names)}" for value, names in presets.items()]
    return "; ".join([as_typed(field.default), *others])


def add_option(parser, field):
    """Add an option of any kind to an argument parser."""
    flag = as_flag(field.name)
    text = f"{field.metadata['help']} (default: {describe_default(field)})".replace("%", "%%")
    if field.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif field.type is tuple:
        parser.add_argument(flag, type=int, nargs="*", metavar="N", help=text)
    elif field.metadata["choices"]:
        parser.add_argument(flag, choices=field.metadata["choices"], help=text)
    else:
        metavar = {int: "N", float: "X", str: "NAME"}[field.type]
        parser.add_argument(flag, type=field.type, metavar=metavar, help=text)


def add_modes(parser):
    """Add the flags that choose the mode."""
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--train", action="store_true", help="train a network")
    modes.add_argument("--sample", type=int, metavar="N", help="draw N samples from a trained network")
    modes.add_argument(
        "--evaluate",
        type=int,
        nargs="?",
        const=256,
        metavar="N",
        help="print the likelihood bound of N held-out images in bits/dim (default: 256)",
    )
    modes.add_argument("--export", metavar="FOLDER", help="write a trained network as a folder that diffusers loads")


def add_training_modes(parser):
    """Add the flags of --train that are not fields of Config."""
    names = " ".join(as_flag(name) for name in MODES["train --resume"])
    parser.add_argument("--resume", action="store_true", help=f"continue a run; takes only {names}")
    text = "take the defaults of another data set, of a folder, or those for a GPU (default: those of --data)"
    parser.add_argument("--preset", choices=list(PRESETS), help=text)


def new_parser(**settings):
    """An argument parser that leaves out what is not given and reports an error in one line."""
    parser = argparse.ArgumentParser(
        "ddpm.py",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **settings,
    )
    parser.error = lambda message: parser.exit(2, f"ddpm.py: error: {message}\n")
    return parser


def help_text(arguments):
    """What --help prints: the options of the mode that is among the arguments, or else the modes."""
    # A mode's options
    flags = [argument.split("=")[0] for argument in arguments]
    for mode, usage in USAGE.items():
        if as_flag(mode) in flags:
            defaults = "The first default is that of the digits; others follow where they differ."
            parser = new_parser(usage=f"python ddpm.py {usage}", description=defaults if mode == "train" else None)
            if mode == "train":
                add_training_modes(parser)
            for field in MODES[mode].values():
                add_option(parser, field)
            return parser.format_help()

    # The modes
    parser = new_parser(
        usage="python ddpm.py MODE [options]",
        description="MODE is one of these; python ddpm.py --train --help shows the options of --train, and so on.",
    )
    add_modes(parser)
    return parser.format_help()


def parse(arguments):
    """Returns the mode of a command line, and a dict of what was given. Exits for --help, an unknown flag, and a flag
    that the mode does not take."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(arguments), end="", flush=True)
        sys.exit(0)

    # What is given, of all modes' flags
    parser = new_parser()
    add_modes(parser)
    add_training_modes(parser)
    options = {name: field for fields in MODES.values() for name, field in fields.items()}
    for field in options.values():
        add_option(parser, field)
    given = vars(parser.parse_args(arguments))

    # The mode
    mode = next((name for name in MODES if name in given), None)
    if mode is None:  # reported last, so that a misspelt flag is named
        parser.error("one of --train, --sample N, --evaluate and --export FOLDER is required; see --help")
    allowed = {mode}
    if mode == "train" and "resume" in given:
        mode = "train --resume"
        allowed.add("resume")
    elif mode == "train":
        allowed.add("preset")

    # What it takes
    for name, value in given.items():
        if value == "":
            parser.error(f"{as_flag(name)} must not be empty")
    allowed.update(MODES[mode])
    for name in given:
        if name not in allowed:
            parser.error(f"{as_flag(name)} does not go with --{mode}")
    return mode, given


def find_run(given):
    """The folder of the run that --out or --data names, or else of the newest."""
    if "out" in given:
        return given["out"]
    if "data" in given:
        return preset(given["data"]).out

    # The newest
    checkpoints = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise ValueError("no run in runs/ yet: python ddpm.py --train makes one, --out names one elsewhere")
    return str(checkpoints[-1].parent)


def check_named(config, given):
    """Raise ValueError if --data, given without --out, differs from the data of the run that it names."""
    if "data" in given and "out" not in given and resolve(given["data"]) != resolve(config.data):
        raise ValueError(f"the run in {config.out} is one of {config.data}, not {given['data']}: --out names a run")


def refuse_two_runs(given):
    """--sample and --export need no data, so that --data could only name another run than --out."""
    if "out" in given and "data" in given:
        raise ValueError(f"--data {given['data']} does not go with --out {given['out']}: both name a run")


def given_machine(given):
    """The given options among --device, --bf16 and --compile."""
    return {name: given[name] for name in MACHINE if name in given}


def run_train(given):
    """--train: a new run, from published weights if --weights names them, or with --resume an old one."""
    settings = {name: value for name, value in given.items() if name not in ("train", "resume", "preset")}

    # --resume
    if "resume" in given:
        checkpoint = read_checkpoint(find_run(given))
        check_named(checkpoint["config"], given)
        config = dataclasses.replace(checkpoint["config"], **settings)
        out = train(config, checkpoint)

    # A new run
    else:
        defaults = {"data": "digits"}
        if "weights" in given:
            _, shape = load_published(given["weights"])
            shape["conditional"] = False
            for name in shape:
                if name in given:
                    raise ValueError(f"{as_flag(name)} does not go with --weights, which have their own")
            defaults.update(shape)
            defaults.update({"schedule": "linear", "prediction": "noise", **published_schedule(given["weights"])})
        config = preset(**{**defaults, **settings}, name=given.get("preset"))
        if "label_dropout" in given and not config.conditional:
            raise ValueError(
                "--label-dropout goes with labels, which --no-conditional does not learn: add --conditional"
            )
        out = train(config)

    # What to do next
    rank, _ = rank_and_world_size()
    if rank == 0:
        print(f"the run is in {out}: checkpoint.pt, log.csv, samples-*.png")
        print(f"next: python ddpm.py --sample 64 --out {out}")


def run_sample(given):
    """--sample, from a run or from published weights."""
    refuse_two_runs(given)
    if "eta" in given and given.get("sampler") != "ddim":
        raise ValueError(f"--eta {given['eta']} is DDIM's: it goes with --sampler ddim only")
    if "weights" not in given:
        run = Run.read(find_run(given), **given_machine(given))
        check_named(run.config, given)
    elif "data" in given:
        raise ValueError("--data does not go with --weights, which are no run of a data set")
    else:
        run = Run.of_weights(given["weights"], given.get("out"), **given_machine(given))
    options = {name: value for name, value in given.items() if name in options_of(Sampling)}
    for path in sample(run, given["sample"], given.get("seed", 0), **options):
        print(path)


def run_evaluate(given):
    """--evaluate."""
    run = Run.read(find_run(given), **given_machine(given))
    check_named(run.config, given)
    if "data" in given:
        run.config = dataclasses.replace(run.config, data=given["data"])
    evaluate(run, given["evaluate"], given.get("seed", 0))


def run_export(given):
    """--export."""
    refuse_two_runs(given)
    checkpoint = read_checkpoint(find_run(given))
    check_named(checkpoint["config"], given)
    export(checkpoint, given["export"])
    print(f"diffusers.UNet2DModel.from_pretrained({given['export']!r}) loads it")
    if checkpoint["config"].variance == "learned_range":
        print("its second half of the channels is v; diffusers' DDPMScheduler expects 2 v - 1")


def prepare_terminal():
    """Let a terminal that has no β print ? in its place, and replace streams that are closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def main(arguments=None):
    """Run the command line. User errors end with one line and exit status 2, interruptions with status 130."""
    prepare_terminal()

    # The mode, or the line that says what is wrong
    advice = "close other programs"
    try:
        mode, given = parse(sys.argv[1:] if arguments is None else arguments)
        advice = {
            "train": "a smaller --batch-size needs less",
            "sample": "a smaller --sampling-batch needs less",
            "evaluate": "fewer images need less",
        }.get(mode, advice)
        keep_freed_memory()
        if not 0 <= given.get("seed", 0) < 2**32:
            raise ValueError(f"--seed must lie in 0…{2**32 - 1}, got {given['seed']}")
        if mode == "sample":
            run_sample(given)
        elif mode in ("train", "train --resume"):
            run_train(given)
        elif rank_and_world_size()[0] > 0:  # under torchrun, one process does the rest
            return
        elif mode == "evaluate":
            run_evaluate(given)
        else:
            run_export(given)
        sys.stdout.flush()
        return
    except BrokenPipeError:  # stdout was closed (as with | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        status = 2
        line = f"error: {error}"
    except KeyboardInterrupt as interruption:
        status = 130
        line = str(interruption) or "interrupted"
    except torch.OutOfMemoryError as error:
        status = 2
        line = f"error: {str(error).split('. ')[0]}; {advice}"
    except torch._dynamo.exc.TorchDynamoException as error:
        status = 2
        line = f"error: torch.compile fails ({in_one_line(error)}); use --no-compile"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        status = 2
        line = f"error: not enough memory ({in_one_line(error)}); {advice}"
    print(f"ddpm.py: {' '.join(line.splitlines())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
