"""diffusers' DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler and guidance under the names of ddpm.py. Where
they have an option for what ddpm.py does, such as trailing timesteps, it is set.

DDPM=peers/diffusers.py pytest runs the mathematical part of the proof on it."""

import copy
import sys
import unittest
from pathlib import Path

import torch

try:
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise unittest.SkipTest("pip install diffusers==0.42.1") from error

sys.path.append(str(Path(__file__).parent))
from shared import as_batch, computing_in, drawing, lacks


def linear_beta_schedule(timesteps, start=0.0001, end=0.02):
    return diffusers.DDPMScheduler(timesteps, start, end).betas


def cosine_beta_schedule(timesteps):
    return diffusers.DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2").betas


class GaussianDiffusion:
    def __init__(self, betas, variance="fixed_small", dtype=torch.float32, prediction="noise"):
        self.dtype = dtype
        self.timesteps = len(betas)
        self.learned = variance == "learned_range"
        self.original_t = torch.arange(len(betas))  # other numbers after respace
        config = dict(num_train_timesteps=len(betas), trained_betas=list(map(float, betas)))
        config["prediction_type"] = {"noise": "epsilon", "velocity": "v_prediction"}[prediction]
        v = dict(variance_type=variance) if self.learned else {}
        self.ddpm, self.ddim, self.dpm_solver = {}, {}, {}
        for clip in (False, True):  # an option of a scheduler, not of its step
            how = dict(timestep_spacing="trailing", clip_sample=clip)
            with computing_in(dtype):
                self.ddpm[clip] = diffusers.DDPMScheduler(**config, **how, variance_type=variance)
                self.ddim[clip] = diffusers.DDIMScheduler(**config, **how)
                self.dpm_solver[clip] = diffusers.DPMSolverMultistepScheduler(**config, **v, thresholding=clip)

    def call(self, model, x_t, t, with_v=True):
        """The model's output. The package's v lies in [−1, 1]."""
        output = model(x_t, as_batch(t, x_t))
        noise, *v = output.chunk(1 + self.learned, dim=1)
        return torch.cat([noise, *(2 * each - 1 for each in v)], dim=1) if with_v else noise

    def q_sample(self, x_start, t, noise=None):
        t = self.original_t[as_batch(t, x_start)]
        return self.ddpm[False].add_noise(x_start, torch.randn_like(x_start) if noise is None else noise, t)

    def images(self, scheduler, outputs, x_t, t, noise):
        """A step for each image on its own, as a step has one t: yields x_{t−1}, x̂_0 and σ_t²."""
        for output, x, i, z in zip(outputs, x_t, self.original_t[as_batch(t, x_t)].tolist(), noise, strict=True):
            with drawing(self.dtype, z[None]):
                x_s, pred_x_start = scheduler.step(output[None], i, x[None], return_dict=False)
            variance = scheduler._get_variance(i, output[None, len(x) :])
            yield x_s, pred_x_start, (variance.exp() if self.learned else variance).expand(x_s.shape)

    def predict_x_start(self, x_t, t, noise):
        return torch.cat([each[1] for each in self.images(self.ddpm[False], noise, x_t, t, 0 * x_t)])

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        steps = self.images(self.ddpm[clip_denoised], self.call(model, x_t, t), x_t, t, 0 * x_t)
        mean, pred_x_start, variance = map(torch.cat, zip(*steps, strict=True))
        return mean, variance, variance.log(), pred_x_start

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip_denoised=True, noise=None, generator=None):
        scheduler, output = self.ddpm[clip_denoised], self.call(model, x_t, t)
        if noise is not None:
            return torch.cat([each[0] for each in self.images(scheduler, output, x_t, t, noise)])
        if torch.is_tensor(t):
            lacks("batch of different t in a step")
        return scheduler.step(output, int(self.original_t[t]), x_t, generator).prev_sample

    def p_sample_steps(self, model, x_t, t=None, clip_denoised=True, generator=None):
        for i in range(self.timesteps - 1 if t is None else t, -1, -1):
            x_t = self.p_sample(model, x_t, i, clip_denoised, generator=generator)
            yield x_t

    def p_sample_loop(self, model, shape, clip_denoised=True, noise=None, generator=None):
        x_T = randn_tensor(shape, generator, dtype=self.dtype) if noise is None else noise
        return list(self.p_sample_steps(model, x_T, None, clip_denoised, generator))[-1]

    def ddim_timesteps(self, steps):
        self.ddim[True].set_timesteps(steps)
        return self.ddim[True].timesteps.tolist()

    @torch.no_grad()
    def ddim_sample(self, model, x_t, t, prev_t, eta=0.0, clip_denoised=True, noise=None, generator=None, steps=None):
        """From t the scheduler goes to t − T // S: takes an S for which that is prev_t, unless S is given."""
        if steps is None:
            steps = self.timesteps // max(1, t - prev_t)
            if self.timesteps // steps != t - prev_t and prev_t >= 0:
                lacks("step from this t to this s")
            self.ddim[clip_denoised].set_timesteps(steps)
        how = dict(eta=eta, use_clipped_model_output=True, generator=generator, variance_noise=noise)
        return self.ddim[clip_denoised].step(self.call(model, x_t, t, with_v=False), t, x_t, **how).prev_sample

    def ddim_sample_steps(self, model, x_t, steps, eta=0.0, clip_denoised=True, generator=None):
        self.ddim[clip_denoised].set_timesteps(steps)
        for t in self.ddim[clip_denoised].timesteps.tolist():
            x_t = self.ddim_sample(model, x_t, t, None, eta, clip_denoised, None, generator, steps)
            yield x_t

    def ddim_sample_loop(self, model, shape, steps, eta=0.0, clip_denoised=True, noise=None, generator=None):
        x_T = randn_tensor(shape, generator, dtype=self.dtype) if noise is None else noise
        return list(self.ddim_sample_steps(model, x_T, steps, eta, clip_denoised, generator))[-1]

    def dpm_solver_timesteps(self, steps):
        self.dpm_solver[True].set_timesteps(steps)
        return self.dpm_solver[True].timesteps.tolist()

    @torch.no_grad()
    def dpm_solver_sample_steps(self, model, x_t, steps, clip_denoised=True):
        scheduler = self.dpm_solver[clip_denoised]
        with computing_in(self.dtype):
            scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            output = self.call(model, x_t, t)
            with computing_in(self.dtype):
                x_t = scheduler.step(output, t, x_t).prev_sample
            yield x_t

    def dpm_solver_sample_loop(self, model, shape, steps, clip_denoised=True, noise=None, generator=None):
        x_T = randn_tensor(shape, generator, dtype=self.dtype) if noise is None else noise
        return list(self.dpm_solver_sample_steps(model, x_T, steps, clip_denoised))[-1]

    def respace(self, model, steps):
        short = copy.deepcopy(self)
        short.ddpm[False].set_timesteps(steps)
        short.ddpm[True].set_timesteps(steps)
        short.original_t = short.ddpm[True].timesteps.flip(0)
        short.timesteps = len(short.original_t)
        return short, lambda x_t, t: model(x_t, short.original_t[t])


def classifier_free_guidance(model, labels, scale):
    guider = ClassifierFreeGuidance(scale, use_original_formulation=True)
    both = [labels, torch.full_like(labels, model.num_classes)]
    return lambda x_t, t: guider.forward(*(model(x_t, t, y) for y in both[: guider.num_conditions])).pred
