"""smalldiffusion under the names of ddpm.py. Its x is x_t/√ᾱ_t and its time is σ = √(1−ᾱ_t)/√ᾱ_t.

DDPM=peers/smalldiffusion.py pytest runs the mathematical part of the proof on it."""

import copy
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch import nn

try:
    from accelerate import Accelerator
    from smalldiffusion import ModelMixin, PredV, Scaled, Schedule, ScheduleCosine, ScheduleDDPM, diffusion
    from smalldiffusion.model import alpha
except ImportError as error:
    raise unittest.SkipTest("pip install smalldiffusion==0.5.0") from error

sys.path.append(str(Path(__file__).parent))
from shared import as_batch, drawing, lacks

BETAS = mock.patch.object(diffusion, "sigmas_from_betas", lambda betas: betas)


def linear_beta_schedule(timesteps, start=0.0001, end=0.02):
    with BETAS:
        return ScheduleDDPM(timesteps, start, end).sigmas


def cosine_beta_schedule(timesteps):
    with BETAS:
        return ScheduleCosine(timesteps).sigmas


class Model(nn.Module, ModelMixin):
    """A function model(x_t, t) as the package's networks are."""

    def __init__(self, function, schedule, shape):
        super().__init__()
        self.function = function
        self.schedule = schedule
        self.input_dims = tuple(shape[1:])

    def forward(self, x, sigma, cond=None):
        t = index(self.schedule, sigma.flatten())
        return self.function(x, t.expand(len(x)))


MODELS = {"noise": Scaled(Model), "velocity": PredV(Scaled(Model))}  # Scaled shows the model √ᾱ_t x


def index(schedule, sigmas):
    """The t of each σ."""
    return (schedule.sigmas[:, None] - sigmas).abs().argmin(0)


class GaussianDiffusion:
    def __init__(self, betas, variance="fixed_small", dtype=torch.float32, prediction="noise"):
        if variance != "fixed_small":
            raise ValueError(variance)
        self.dtype = dtype
        self.timesteps = len(betas)
        self.prediction = prediction
        self.schedule = Schedule(diffusion.sigmas_from_betas(torch.as_tensor(betas).to(dtype)))
        self.sequence = self.schedule.sample_sigmas(self.timesteps)
        self.accelerator = Accelerator(cpu=True)

    def model(self, function, shape):
        return MODELS[self.prediction](function, self.schedule, shape)

    def training_sample(self, x_start, t, noise):
        """x_0, σ and ε, as the package draws them, but with this t and ε."""
        t = as_batch(t, x_start)
        if (t < 0).any():
            lacks("t that is given")
        with drawing(x_start.dtype, noise), mock.patch.object(torch, "randint", lambda *_, **__: t):
            return diffusion.generate_train_sample(x_start, self.schedule)[:3]

    def q_sample(self, x_start, t, noise=None):
        seen = []
        model = self.model(lambda x_t, t: seen.append(x_t) or x_t, x_start.shape)
        model.get_loss(*self.training_sample(x_start, t, noise))
        return seen[0]

    def p_losses(self, model, x_start, t, noise=None):
        return self.model(model, x_start.shape).get_loss(*self.training_sample(x_start, t, noise))

    def samples(self, model, shape, sigmas, x=None, mu=0.5, clip_denoised=None, noise=None, generator=None):
        """x_t after each step of the package's sampler. The last, whose x is x_0, is returned as it is."""
        if clip_denoised:
            lacks("clamp of x̂_0")
        if x is not None and x.shape != torch.Size(shape):
            lacks("shape beside the noise")
        x = None if x is None else x / alpha(sigmas[0]).sqrt().to(x)
        model = self.model(model, shape)
        with drawing(self.dtype, noise, generator):
            steps = diffusion.samples(model, sigmas, mu=mu, batchsize=shape[0], xt=x, accelerator=self.accelerator)
            steps = list(steps)
        return [x * alpha(sigma).sqrt().to(x) for x, sigma in zip(steps[:-1], sigmas[1:-1], strict=True)] + steps[-1:]

    def p_mean_variance(self, *arguments, **options):
        lacks("mean and variance of its steps")

    def p_sample(self, model, x_t, t, clip_denoised=None, noise=None, generator=None):
        if torch.is_tensor(t):
            lacks("batch of different t in samples")
        return self.ddim_sample(model, x_t, t, t - 1, 1.0, clip_denoised, noise, generator)

    def p_sample_loop(self, model, shape, clip_denoised=None, noise=None, generator=None):
        return self.samples(model, shape, self.sequence, noise, 0.5, clip_denoised, None, generator)[-1]

    def ddim_timesteps(self, steps):
        return index(self.schedule, self.schedule.sample_sigmas(steps)[:-1]).tolist()

    def ddim_sample(self, model, x_t, t, prev_t, eta=0.0, clip_denoised=None, noise=None, generator=None):
        """From σ_t to σ_s. Where x_0 is asked for, the package ends its sequences with σ of t = 0."""
        sigmas = self.schedule[[t, max(prev_t, 0)]]
        (x_s,) = self.samples(model, x_t.shape, sigmas, x_t, self.mu(eta), clip_denoised, noise, generator)
        return x_s if prev_t < 0 else x_s * alpha(sigmas[1]).sqrt().to(x_s)

    def mu(self, eta):
        """Its DDIM is μ = 0, its DDPM is μ = ½."""
        return {0.0: 0.0, 1.0: 0.5}[eta] if eta in (0, 1) else lacks("η between 0 and 1")

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=None, noise=None, generator=None):
        sigmas = self.schedule.sample_sigmas(steps)
        return self.samples(model, shape, sigmas, noise, self.mu(eta), clip_denoised, None, generator)[-1]

    def respace(self, model, steps):
        short = copy.copy(self)
        short.sequence = self.schedule.sample_sigmas(steps)
        short.schedule = Schedule(short.sequence[:-1].flip(0))
        short.timesteps = steps
        original_t = index(self.schedule, short.schedule.sigmas)
        return short, lambda x_t, t: model(x_t, original_t[t])


def classifier_free_guidance(model, labels, scale):
    def guided(x_t, t):
        class Guided(nn.Module, ModelMixin):
            cond_embed = mock.Mock(null_cond=model.num_classes)

            def forward(self, x, sigma, cond=None):
                return model(x, torch.cat([t] * (len(x) // len(t))), cond)

        return Guided().predict_eps_cfg(x_t, torch.tensor(1.0), labels, scale)

    return guided
