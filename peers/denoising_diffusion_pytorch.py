"""denoising-diffusion-pytorch (lucidrains) under the names of ddpm.py.

DDPM=peers/denoising_diffusion_pytorch.py pytest runs the mathematical part of the proof on it."""

import sys
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch import nn

try:
    from denoising_diffusion_pytorch import classifier_free_guidance as with_labels
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as plain
    from denoising_diffusion_pytorch import learned_gaussian_diffusion as learned
except ImportError as error:
    raise unittest.SkipTest("pip install denoising-diffusion-pytorch==2.3.4") from error

sys.path.append(str(Path(__file__).parent))
from shared import as_batch, as_images, computing_in, drawing, lacks

linear_beta_schedule = plain.linear_beta_schedule
cosine_beta_schedule = plain.cosine_beta_schedule
normal_kl = learned.normal_kl


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    scales = (0.5 * log_variance).expand_as(x)
    return learned.discretized_gaussian_log_likelihood(x, means=mean.expand_as(x), log_scales=scales)


class Model(nn.Module):
    def __init__(self, out_dim):
        super().__init__()
        self.channels, self.out_dim, self.self_condition = 1, out_dim, False

    def forward(self, x, time, x_self_cond=None):
        return self.function(x, time)


def with_choice_of_clamp(base):
    """The package's class, whose p_mean_variance has the clamp as an option, with the same option in its samplers."""

    class Diffusion(base):
        def p_mean_variance(self, x, t, x_self_cond=None, clip_denoised=True, **options):
            return super().p_mean_variance(x=x, t=t, clip_denoised=clip_denoised and self.clip, **options)

        def model_predictions(self, x, t, x_self_cond=None, clip_x_start=False, **options):
            return super().model_predictions(x, t, x_self_cond, clip_x_start and self.clip, **options)

    return Diffusion


CLASSES = dict(fixed_small=plain.GaussianDiffusion, learned_range=learned.LearnedGaussianDiffusion)


class GaussianDiffusion:
    def __init__(self, betas, variance="fixed_small", dtype=torch.float32, prediction="noise"):
        self.betas, self.dtype = torch.as_tensor(betas), dtype
        self.base = with_choice_of_clamp(CLASSES[variance])
        self.learned = variance == "learned_range"
        self.timesteps = len(betas)
        self.objective = {"noise": "pred_noise", "velocity": "pred_v"}[prediction]
        self.model = Model(out_dim=1 + self.learned)
        self.diffusion = self.build()

    def build(self, **options):
        """A diffusion of the package with these betas."""
        options.update(objective=self.objective, beta_schedule="linear", auto_normalize=False)
        with mock.patch.object(plain, "linear_beta_schedule", lambda timesteps: self.betas), computing_in(self.dtype):
            return self.base(self.model, image_size=1, timesteps=self.timesteps, **options)

    def to(self, device):
        self.diffusion.to(device)
        return self

    def use(self, diffusion, model, shape, clip_denoised=True):
        """The package's diffusion, calling this model. Its v lies in [−1, 1]."""

        def function(x_t, t):
            output = as_images(model(x_t.reshape(-1, *shape[1:]), t))
            noise, *v = output.chunk(1 + self.learned, dim=1)
            return torch.cat([noise, *(2 * each - 1 for each in v)], dim=1)

        self.model.function = function
        diffusion.clip = clip_denoised
        return diffusion

    def q_sample(self, x_start, t, noise=None):
        return self.diffusion.q_sample(x_start, as_batch(t, x_start), noise)

    def q_posterior(self, x_start, x_t, t):
        return self.diffusion.q_posterior(x_start, x_t, as_batch(t, x_t))

    def predict_x_start(self, x_t, t, noise):
        return self.diffusion.predict_start_from_noise(x_t, as_batch(t, x_t), noise)

    def p_losses(self, model, x_start, t, noise=None):
        return self.use(self.diffusion, model, x_start.shape).p_losses(as_images(x_start), t, as_images(noise))

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        diffusion = self.use(self.diffusion, model, x_t.shape, clip_denoised)
        results = diffusion.p_mean_variance(as_images(x_t), as_batch(t, x_t))
        return [each.flatten(1) if x_t.dim() == 2 else each for each in results]

    def p_sample(self, model, x_t, t, clip_denoised=True, noise=None, generator=None):
        if torch.is_tensor(t):
            lacks("batch of different t in p_sample")
        with drawing(self.dtype, as_images(noise), generator):
            diffusion = self.use(self.diffusion, model, x_t.shape, clip_denoised)
            return diffusion.p_sample(as_images(x_t), t)[0].reshape(x_t.shape)

    def p_sample_loop(self, model, shape, clip_denoised=True, noise=None, generator=None, **options):
        """By the sampler that the package's sample() chooses."""
        images = as_images(torch.empty(shape, device="meta"))
        diffusion = self.use(self.build(**options), model, shape, clip_denoised).to(self.diffusion.device)
        diffusion.channels, *diffusion.image_size = images.shape[1:]
        with drawing(self.dtype, as_images(noise), generator):
            return diffusion.sample(len(images)).reshape(shape)

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=True, noise=None, generator=None):
        how = dict(sampling_timesteps=steps, ddim_sampling_eta=eta)
        return self.p_sample_loop(model, shape, clip_denoised, noise, generator, **how)

    def ddim_timesteps(self, steps):
        pairs = []
        with mock.patch.object(plain, "tqdm", lambda each, **_: pairs.extend(each) or []):
            self.build(sampling_timesteps=steps).ddim_sample((1, 1, 1, 1))
        return [t for t, _ in pairs]

    def interpolate(self, model, x_start_a, x_start_b, t, weight, noise=None, generator=None):
        with drawing(self.dtype, noise, generator):
            return self.use(self.diffusion, model, x_start_a.shape).interpolate(x_start_a, x_start_b, t, weight)


def classifier_free_guidance(model, labels, scale):
    class Guided(with_labels.Unet):
        __init__ = nn.Module.__init__

        def forward(self, x, time, classes, cond_drop_prob=0.0):
            return model(x, time, torch.full_like(classes, model.num_classes) if cond_drop_prob else classes)

    def guided(x_t, t):
        how = dict(cond_scale=1 + scale, remove_parallel_component=False)
        prediction, _ = Guided().forward_with_cond_scale(x_t, t, labels, **how)  # as its model_predictions does
        return prediction

    return guided
