"""labml's annotated implementations under the names of ddpm.py: DDPM, with σ_t² = β_t, and from its Stable Diffusion
DDPMSampler, with σ_t² = β̃_t, DDIMSampler and guidance.

DDPM=peers/labml_nn.py pytest runs the mathematical part of the proof on it."""

import sys
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch import nn

try:
    from labml_nn.diffusion.ddpm import DenoiseDiffusion, unet
    from labml_nn.diffusion.ddpm.evaluate import Sampler

    with mock.patch.dict(sys.modules, transformers=mock.MagicMock()):  # only its text encoder needs that package
        from labml_nn.diffusion.stable_diffusion.latent_diffusion import LatentDiffusion
        from labml_nn.diffusion.stable_diffusion.sampler import DiffusionSampler
        from labml_nn.diffusion.stable_diffusion.sampler.ddim import DDIMSampler
        from labml_nn.diffusion.stable_diffusion.sampler.ddpm import DDPMSampler
except ImportError as error:
    raise unittest.SkipTest("pip install labml-nn==0.5.1") from error

sys.path.append(str(Path(__file__).parent))
from shared import as_batch, as_images, computing_in, drawing, lacks

AttentionBlock = unet.AttentionBlock


def linear_beta_schedule(timesteps):
    return DenoiseDiffusion(None, timesteps, torch.device("cpu")).beta


class Model(nn.Module):
    """A function model(x_t, t) as the package's networks are."""

    function = None

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # tells the package the device

    def forward(self, x, t, context=None):
        return self.function(x, t)


class GaussianDiffusion:
    def __init__(self, betas, variance="fixed_large", dtype=torch.float32):
        if variance not in ("fixed_large", "fixed_small"):
            raise ValueError(variance)
        self.fixed_large = variance == "fixed_large"
        self.dtype = dtype
        self.timesteps = len(betas)
        self.betas = torch.as_tensor(betas)
        self.model = Model()
        self.to(torch.device("cpu"))

    def to(self, device):
        model, steps = self.model.to(device), self.timesteps
        with computing_in(self.dtype):
            with mock.patch.object(torch, "linspace", lambda *_, **__: self.betas.to(self.dtype)):
                self.diffusion = DenoiseDiffusion(model, steps, device)
            with mock.patch.object(torch, "linspace", lambda *_, **__: self.betas.sqrt()):  # which it squares
                self.latent = LatentDiffusion(model, None, None, 1.0, steps, 0, 0).to(device)
        self.sampler = Sampler(self.diffusion, 1, 1, device)
        self.small = DDPMSampler(self.latent)
        return self

    def use(self, model, x, clip_denoised):
        """The package calls this model."""
        if clip_denoised:
            lacks("clamp of x̂_0")
        self.model.function = lambda x_t, t: as_images(model(x_t.reshape(-1, *x.shape[1:]), t))

    def q_sample(self, x_start, t, noise=None):
        x_t = self.diffusion.q_sample(as_images(x_start), as_batch(t, x_start), as_images(noise))
        return x_t.reshape(x_start.shape)

    def p_losses(self, model, x_start, t, noise=None):
        self.use(model, x_start, None)
        with mock.patch.object(torch, "randint", lambda *_, **__: t):
            return self.diffusion.loss(as_images(x_start), as_images(noise))

    def predict_x_start(self, x_t, t, noise):
        return self.sampler.p_x0(as_images(x_t), as_batch(t, x_t), as_images(noise)).reshape(x_t.shape)

    def p_sample(self, model, x_t, t, clip_denoised=None, noise=None, generator=None):
        self.use(model, x_t, clip_denoised)
        x = as_images(x_t)
        with drawing(self.dtype, as_images(noise), generator), torch.no_grad():
            if self.fixed_large:
                return self.diffusion.p_sample(x, as_batch(t, x)).reshape(x_t.shape)
            if torch.is_tensor(t):
                lacks("batch of different t in DDPMSampler")
            return self.small.p_sample(x, None, as_batch(t, x), t)[0].reshape(x_t.shape)

    def p_sample_loop(self, model, shape, clip_denoised=None, noise=None, generator=None):
        x_T = torch.empty(shape, dtype=self.dtype, device=self.sampler.device)
        self.use(model, x_T, clip_denoised)
        with drawing(self.dtype, as_images(noise), generator), torch.no_grad():
            x_T = torch.randn(as_images(x_T).shape, device=x_T.device)
            if self.fixed_large:
                return self.sampler._sample_x0(x_T, self.timesteps).reshape(shape)
            return self.small.sample(x_T.shape, None, x_last=x_T).reshape(shape)

    def ddim(self, steps, eta=0.0):
        with computing_in(self.dtype):
            return DDIMSampler(self.latent, steps, ddim_eta=eta)

    def ddim_timesteps(self, steps):
        return self.ddim(steps).time_steps[::-1].tolist()

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=None, noise=None, generator=None):
        x_T = torch.empty(shape, dtype=self.dtype, device=self.sampler.device)
        self.use(model, x_T, clip_denoised)
        with drawing(self.dtype, as_images(noise), generator):
            return self.ddim(steps, eta).sample(as_images(x_T).shape, None).reshape(shape)

    def interpolate(self, model, x_start_a, x_start_b, t, weight, noise=None, generator=None):
        self.use(model, x_start_a, None)
        with drawing(self.dtype, noise, generator), torch.no_grad():
            return self.sampler.interpolate(x_start_a, x_start_b, weight, t)


def classifier_free_guidance(model, labels, scale):
    model.n_steps = 1
    no_labels = torch.full_like(labels, model.num_classes)
    sampler = DiffusionSampler(model)
    return lambda x_t, t: sampler.get_eps(x_t, t, labels, uncond_scale=1 + scale, uncond_cond=no_labels)
