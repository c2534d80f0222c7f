"""The experiments of the paper with ddpm.py, and how fast ddpm.py is.

    python bench_ddpm.py NAME       # an experiment: prints a table, writes an image, or both; figures need matplotlib
    python bench_ddpm.py --list     # the names of the experiments; --help shows the options
    pytest bench_ddpm.py            # timings on the CPU, and on CUDA if available; needs pytest-benchmark
    pip install diffusers           # optional: adds timings of the same network and steps in diffusers

The first half of the file holds the experiments: the paper's tables and figures, and the exercises of README.

The second half holds the timings. Each is a median, and is also reported relative to what the machine can do in the
same run. "of the matrix rate" is the number of floating-point operations per second, counted by torch, divided by that
of a large matrix product on the same device in the same precision (bfloat16 where ddpm.py would use it). "diffusers'
time / ours" divides medians measured alternately; diffusers runs with its defaults, eager and in float32, but for
the rows named "tuned". Times depend on the machine and its load; these two ratios hardly do.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ddpm

# ======================================================================================================================
# Experiments: python bench_ddpm.py NAME
# ======================================================================================================================


@dataclasses.dataclass
class Settings:
    """The settings of an experiment. Every field is a flag of the command line."""

    data: str = ddpm.option("digits", "digits, mnist, fashion_mnist, cifar10, or a folder of images")
    steps: int = ddpm.option(500, "training steps where networks are compared", 1)
    seeds: tuple = ddpm.option((0, 1, 2), "seeds of these trainings", 0, 2**32 - 1)
    seed: int = ddpm.option(0, "seed of samples and of everything else that is random", 0, 2**32 - 1)
    samples: int = ddpm.option(1797, "samples that a distance is measured on", 2)
    batch: int = ddpm.option(600, "samples drawn at once", 1)
    held_out: int = ddpm.option(180, "held-out images whose bits/dim are measured", 1)
    device: str = ddpm.option(None, "cuda, mps or cpu", shown="the first one available")
    pictures: str = ddpm.option("runs", "folder that NAME.png is written to")

    def __post_init__(self):
        ddpm.check_options(self, ddpm.as_flag)


# ---- Runs, images and samples ----------------------------------------------------------------------------------------


def load_images(settings, split=None):
    """The images of the data set, uint8 (N, C, H, W): all of them, or those of a split ("train", "test")."""
    images, _ = ddpm.load_data(settings.data, ddpm.preset(settings.data).image_size, split=split)
    return images


def load_held_out(settings):
    """settings.held_out of the held-out images, evenly spread, or all of them if there are fewer."""
    images = load_images(settings, "test")
    return images[ddpm.spread(min(settings.held_out, len(images)), images)]


def read_or_train(config, watch=None):
    """The run of a Config: read if it is complete, resumed if it was interrupted, else trained. watch is that of
    ddpm.train. Raises ValueError if its folder holds a run with another Config."""
    checkpoint = None
    if (Path(config.out) / "checkpoint.pt").exists():
        checkpoint = ddpm.read_checkpoint(config.out)
        if dataclasses.replace(checkpoint["config"], device=config.device) != config:
            raise ValueError(f"{config.out} holds a run with other settings: move it away")
    if checkpoint is None or checkpoint["step"] < config.steps:
        ddpm.train(config, checkpoint, watch)
    return ddpm.Run.read(config.out, config.device)


def base_run(settings):
    """The run that `python ddpm.py --train --data …` makes, with the preset of the data set."""
    return read_or_train(ddpm.preset(settings.data, device=settings.device))


PAPERS_DIFFUSION = dict(schedule="linear", prediction="noise")


def short_run(settings, seed, **changes):
    """A run of settings.steps steps with these changes to the preset of the data set and the paper's diffusion. Four
    times during training, the Fréchet distance of its samples to the data is written to curve.csv in its folder."""
    # The Config, and a folder named after it
    values = [str(value or "none") for value in changes.values()]
    name = "-".join([settings.data, str(settings.steps), *values, f"seed{seed}"])
    config = ddpm.preset(
        settings.data,
        **{**PAPERS_DIFFUSION, **changes},
        steps=settings.steps,
        sample_every=max(1, settings.steps // 4),
        log_every=max(1, settings.steps // 20),
        seed=seed,
        device=settings.device,
        out=f"runs/experiments/{name}",
    )

    # Training, with the distances
    images = load_images(settings)

    def write_distance(run, step):
        distance = frechet_distance(draw(settings, run, sampling_steps=20), images)
        mode = "w" if step == config.sample_every else "a"
        with open(Path(config.out) / "curve.csv", mode) as file:
            file.write(f"{step},{distance}\n")

    return read_or_train(config, write_distance)


def short_runs(settings, **changes):
    """Short runs with these changes, one for each seed."""
    return [short_run(settings, seed, **changes) for seed in settings.seeds]


def read_log(out, column):
    """The steps and one column of log.csv in the folder of a run, as two lists; without the rows where it is empty."""
    lines = ddpm.read_rows(Path(out) / "log.csv", math.inf)
    rows = [row for row in csv.DictReader([ddpm.LOG_HEADER, *lines]) if row[column]]
    steps = [int(row["step"]) for row in rows]
    values = [float(row[column]) for row in rows]
    return steps, values


def read_curve(run):
    """The steps and the Fréchet distances in curve.csv of a short run, as two lists."""
    with open(Path(run.config.out) / "curve.csv") as file:
        rows = list(csv.reader(file))
    steps = [int(step) for step, _ in rows]
    distances = [float(distance) for _, distance in rows]
    return steps, distances


def with_variance(run, variance):
    """The same run with another σ_t² of the reverse process."""
    diffusion = ddpm.build_diffusion(dataclasses.replace(run.config, variance=variance))
    return dataclasses.replace(run, diffusion=diffusion.to(run.device))


def draw(settings, run, count=None, labels=None, **options):
    """Draw count samples (default: settings.samples) in batches, with the options of Run.trajectory. labels is (count,)
    (default: every class in turn, if the network has labels). Returns uint8 (count, C, H, W) on the CPU."""
    if count is None:
        count = settings.samples
    if labels is None:
        labels = run.labels(count)

    batches = []
    for start in tqdm(range(0, count, settings.batch), unit=" batches", leave=False, disable=None):
        size = min(settings.batch, count - start)
        batch_labels = None
        if labels is not None:
            batch_labels = labels[start : start + size]
        seed = ddpm.derive_seed(settings.seed, "sampling") + start
        x = ddpm.last(run.trajectory(size, batch_labels, seed, **options))
        batches.append(ddpm.to_pixels(x).cpu())
    return torch.cat(batches)


# ---- Measures --------------------------------------------------------------------------------------------------------


def fit_gaussian(pixels):
    """The mean (D,) and the covariance (D, D) of images, uint8 (N, C, H, W), scaled to [−1, 1] and, if they are larger
    than 8×8, averaged down to that size."""
    x = ddpm.to_model(pixels)
    if x.shape[-1] > 8:
        x = F.adaptive_avg_pool2d(x, 8)
    x = x.flatten(1).double().numpy()
    return x.mean(0), np.cov(x.T)


def frechet_distance(pixels1, pixels2):
    """‖m₁ − m₂‖² + tr(S₁ + S₂ − 2 (S₁ S₂)^½) between Gaussians fitted to two sets of images, in squared pixel values on
    the [−1, 1] scale. (The FID is the same for the features of an Inception network.)"""
    mean1, covariance1 = fit_gaussian(pixels1)
    mean2, covariance2 = fit_gaussian(pixels2)
    root_eigenvalues = linalg.eigvals(covariance1 @ covariance2).real.clip(0) ** 0.5
    squared_distance = ((mean1 - mean2) ** 2).sum()
    return float(squared_distance + np.trace(covariance1 + covariance2) - 2 * root_eigenvalues.sum())


def measure_bits(settings, run):
    """The terms of GaussianDiffusion.bits_per_dim in bits/dim, averaged over held-out images."""
    pixels = load_held_out(settings)
    x_start = ddpm.to_model(pixels.to(run.device))
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    terms = run.diffusion.bits_per_dim(run.model, x_start, generator=generator)
    return {name: values.mean(0) for name, values in terms.items()}


def variance_within_classes(pixels, labels):
    """The variance of images about the mean of their class, on the [−1, 1] scale, summed over pixels and averaged over
    classes."""
    variances = []
    for label in labels.unique():
        x = ddpm.to_model(pixels[labels == label])
        variances.append(x.var(0).sum().item())
    return statistics.mean(variances)


def train_classifier(settings):
    """A small convolutional network that classifies images scaled to [−1, 1], trained on the images that the diffusion
    is trained on. Prints its accuracy on held-out images. Returns a function from images to logits."""
    image_size = ddpm.preset(settings.data).image_size
    images, labels = ddpm.load_data(settings.data, image_size, split="train")
    test_images, test_labels = ddpm.load_data(settings.data, image_size, split="test")

    # Network; a batch of two sets the input sizes of the lazy layers
    torch.manual_seed(settings.seed)
    network = nn.Sequential(
        nn.LazyConv2d(32, 3, padding=1),
        nn.ReLU(),
        nn.LazyConv2d(64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LazyConv2d(64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.LazyLinear(128),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(128, int(labels.max()) + 1),
    )
    network(ddpm.to_model(images[:2]))

    # Training, with noise added to the images
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in tqdm(range(1500), unit=" steps", leave=False, disable=None):
        chosen = torch.randint(len(images), (64,))
        x = ddpm.to_model(images[chosen])
        logits = network(x + 0.05 * torch.randn_like(x))
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()

    # Accuracy
    classify = torch.no_grad()(network.eval().forward)
    predicted = classify(ddpm.to_model(test_images)).argmax(1)
    accuracy = (predicted == test_labels).float().mean()
    print(f"the classifier is right on {accuracy:.1%} of {len(test_labels):,} held-out real images")
    return classify


# ---- Tables and figures ----------------------------------------------------------------------------------------------
# An experiment makes its figure first, so that a missing matplotlib is reported before anything is computed.


def make_figure(columns, width, height, **settings):
    """A matplotlib figure, its size in inches, with a row of so many axes. Raises ValueError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", **settings)


def plot_training(axes, groups):
    """Plot training loss and Fréchet distance against steps on two axes, for lists of runs by name: a thin line for
    each run, a thick one for the mean of each list."""
    for i, (name, runs) in enumerate(groups.items()):
        losses = [read_log(run.config.out, "loss") for run in runs]
        distances = [read_curve(run) for run in runs]
        for ax, curves in zip(axes, (losses, distances), strict=True):
            for steps, values in curves:
                ax.plot(steps, values, f"C{i}", alpha=0.3, lw=1)
            mean = np.mean([values for _, values in curves], axis=0)
            ax.plot(steps, mean, f"C{i}", label=name)
    axes[0].set(xlabel="step", title="training loss, L_simple", yscale="log")
    axes[1].set(xlabel="step", title="Fréchet distance", yscale="log")


def mean_and_deviation(values, digits=3):
    """Mean ± standard deviation over the seeds, as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def print_table(heading, rows):
    """Print a table in Markdown."""
    for row in [heading, ["---"] * len(heading), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


# ---- Exercises -------------------------------------------------------------------------------------------------------
# An experiment prints its table and returns what is written to NAME.png: a matplotlib figure or a PIL image.


def schedules(settings):
    """Exercise 1: the linear and the cosine schedule; Fréchet distance during training, and bits/dim."""
    figure, axes = make_figure(4, 12, 2.6)
    groups = {
        "linear": short_runs(settings, schedule="linear"),
        "cosine": short_runs(settings, schedule="cosine"),
    }

    rows = []
    for name, runs in groups.items():
        curves = [read_curve(run) for run in runs]
        steps = curves[0][0]
        distances = zip(*(distances for _, distances in curves), strict=True)
        bits = [measure_bits(settings, run)["total"].item() for run in runs]
        rows.append([name, *map(mean_and_deviation, distances), mean_and_deviation(bits)])

        alphas_cumprod = runs[0].diffusion.alphas_cumprod.cpu()
        axes[0].plot(alphas_cumprod, label=name)
        axes[1].plot(alphas_cumprod / (1 - alphas_cumprod), label=name)

    axes[0].set(xlabel="t", title="ᾱ_t")
    axes[0].legend()
    axes[1].set(xlabel="t", title="signal to noise, ᾱ_t/(1 − ᾱ_t)", yscale="log")
    plot_training(axes[2:], groups)
    print_table(["schedule", *(f"distance, {step} steps" for step in steps), "bits/dim"], rows)
    return figure


def attention(settings):
    """Exercise 2: with and without self-attention; number of parameters, training loss, Fréchet distance."""
    figure, axes = make_figure(2, 7, 2.6)
    groups = {
        "with attention": short_runs(settings, schedule="linear"),  # the runs of schedules
        "without": short_runs(settings, attn_resolutions=()),
    }

    rows = []
    for name, runs in groups.items():
        parameters = sum(parameter.numel() for parameter in runs[0].model.parameters())
        losses = []
        distances = []
        for run in runs:
            _, loss = read_log(run.config.out, "loss")
            _, distance = read_curve(run)
            losses.append(statistics.mean(loss[-5:]))
            distances.append(distance[-1])
        rows.append([name, f"{parameters:,}", mean_and_deviation(losses, 4), mean_and_deviation(distances)])

    plot_training(axes, groups)
    axes[0].legend()
    sizes = ", ".join(f"{size}×{size}" for size in ddpm.preset(settings.data).attn_resolutions)
    print_table([f"attention at {sizes}", "parameters", "loss, last quarter", "distance"], rows)
    return figure


def guidance(settings):
    """Exercise 3: classifier-free guidance for w = 0 to 8; agreement with the label, diversity, Fréchet distance.

    Agreement is the percentage of samples whose label a classifier trained on real images predicts. Diversity is the
    variance within a class, divided by that of real images."""
    figure, axes = make_figure(3, 9, 3.2, width_ratios=[1, 1.3, 1.3])
    run = base_run(settings)
    classes = run.model.num_classes
    if not classes:
        raise ValueError(f"{settings.data} was learned without labels: guidance needs --data digits")
    classify = train_classifier(settings)

    # Samples for each w
    images, image_labels = ddpm.load_data(settings.data, run.config.image_size)
    real_variance = variance_within_classes(images, image_labels)
    labels = run.labels(settings.samples)
    scales = (0, 0.5, 1, 2, 4, 8)
    agreements = []
    diversities = []
    distances = []
    examples = []
    for scale in scales:
        pixels = draw(settings, run, guidance=scale)
        predicted = classify(ddpm.to_model(pixels)).argmax(1)
        agreements.append((predicted == labels).float().mean().item())
        diversities.append(variance_within_classes(pixels, labels) / real_variance)
        distances.append(frechet_distance(pixels, images))
        examples.append(draw(settings, run, classes, torch.arange(classes), guidance=scale))

    # Table
    rows = []
    for scale, agreement, diversity, distance in zip(scales, agreements, diversities, distances, strict=True):
        rows.append([scale, f"{agreement:.1%}", f"{diversity:.2f}", f"{distance:.3f}"])
    print_table(["w", "agrees with the label", "variance within a class, real = 1", "distance"], rows)

    # Figure: a sample of each class, in a column for each w; agreement and distance against diversity
    grid = ddpm.make_grid_image(torch.stack(examples, 1).flatten(0, 1), len(scales))
    axes[0].imshow(grid, cmap="gray")
    axes[0].set(xlabel="w", yticks=[])
    axes[0].set_xticks([(i + 0.5) * grid.width / len(scales) for i in range(len(scales))], scales)
    percentages = [100 * agreement for agreement in agreements]
    axes[1].set(title="agrees with the label, %")
    axes[2].set(title="Fréchet distance")
    for ax, values in zip(axes[1:], (percentages, distances), strict=True):
        ax.plot(diversities, values, "o-")
        for scale, diversity, value in zip(scales, diversities, values, strict=True):
            ax.annotate(f"{scale}", (diversity, value), (3, 4), textcoords="offset points")
        ax.set(xlabel="variance within a class, real = 1")
    return figure


class LeadingTimesteps(ddpm.GaussianDiffusion):
    """A diffusion with the papers' spacing of S timesteps, multiples of ⌊T/S⌋ from 0, instead of ddpm.py's, which
    starts at T−1."""

    def ddim_timesteps(self, steps):
        stride = self.timesteps // steps
        return [i * stride for i in range(steps - 1, -1, -1)]


def sampling_steps(settings):
    """Exercise 4: DPM-Solver, DDIM and Algorithm 2 in S steps; Fréchet distance, and seconds (DDIM's Table 1)."""
    figure, ax = make_figure(1, 5, 3)
    run = base_run(settings)
    timesteps = run.diffusion.timesteps

    # The samplers
    betas = ddpm.linear_beta_schedule(timesteps, *ddpm.linear_ends(timesteps))
    leading = dataclasses.replace(run, diffusion=LeadingTimesteps(betas, "fixed_large").to(run.device))
    samplers = {
        "DPM-Solver": (run, dict(sampler="dpm-solver")),
        "DDIM, η = 0": (run, dict(sampler="ddim", eta=0.0)),
        "DDIM, η = 0.5": (run, dict(sampler="ddim", eta=0.5)),
        "η = 1, β̃_t": (with_variance(run, "fixed_small"), dict(sampler="ddpm")),
        "β_t": (with_variance(run, "fixed_large"), dict(sampler="ddpm")),
        "β_t, times that end at t = 0": (leading, dict(sampler="ddpm")),
    }

    # Distances of all, and the seconds of the deterministic ones
    images = load_images(settings)
    counts = [count for count in (5, 8, 10, 20, 50, 100) if count <= timesteps]
    distances = {name: [] for name in samplers}
    seconds = {name: [] for name in samplers}
    for count in counts:
        for name, (sampled_run, options) in samplers.items():
            start = time.perf_counter()
            pixels = draw(settings, sampled_run, sampling_steps=count, **options)
            seconds[name].append(time.perf_counter() - start)
            distances[name].append(frechet_distance(pixels, images))

    # Table
    rows = []
    for i, count in enumerate(counts):
        row = [f"{distances[name][i]:.3f}" for name in samplers]
        times = [f"{seconds[name][i]:.1f}" for name in ("DPM-Solver", "DDIM, η = 0")]
        rows.append([count, *row, *times])
    print_table(["S", *samplers, "seconds, DPM-Solver", "seconds, DDIM"], rows)

    # Figure
    for name, values in distances.items():
        ax.plot(counts, values, "o-", label=name)
    ax.set(xscale="log", yscale="log", xlabel="S, network calls a sample", ylabel="Fréchet distance")
    ax.legend()
    return figure


# ---- The paper's tables and figures ----------------------------------------------------------------------------------


class PredictsMean(nn.Module):
    """A network whose output is read as μ_θ(x_t, t), as a model that returns the noise: ε_θ = (x_t − √α_t μ_θ)
    √(1−ᾱ_t)/β_t, which is Eq. 11 solved for ε_θ."""

    def __init__(self, network, diffusion):
        super().__init__()
        self.network = network
        self.diffusion = diffusion
        self.image_channels = network.image_channels
        self.num_classes = network.num_classes

    def forward(self, x_t, t, y=None):
        mean = self.network(x_t, t, y)
        betas = ddpm.extract(self.diffusion.betas, t, x_t)
        sigma = ddpm.extract(self.diffusion.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - (1 - betas).sqrt() * mean) * sigma / betas


class UnweightedMean(ddpm.GaussianDiffusion):
    """A diffusion whose loss is ‖μ̃_t(x_t, x_0) − μ_θ(x_t, t)‖², for a model that returns μ_θ."""

    def p_losses(self, model, x_start, t, noise=None):
        x_t = self.q_sample(x_start, t, noise)
        mean, _, _ = self.q_posterior(x_start, x_t, t)
        return (mean - model(x_t, t)).square().mean()


def train_mean(settings, seed, loss):
    """A run of settings.steps steps of a network that predicts μ̃, in float32 because ε_θ is a small difference of large
    numbers. loss is "bound" for Eq. 5, or "unweighted" for ‖μ̃ − μ_θ‖²."""
    how = dict(steps=settings.steps, seed=seed, device=settings.device, bf16=False)
    config = ddpm.preset(settings.data, **PAPERS_DIFFUSION, **how)
    images, labels, state, simple = ddpm.prepare_training(config, None)
    network = PredictsMean(state.model, simple)
    diffusion = ddpm.build_diffusion(dataclasses.replace(config, loss="bound"))
    if loss == "unweighted":
        network = state.model
        diffusion = UnweightedMean(ddpm.linear_beta_schedule(config.timesteps, *ddpm.linear_ends(config.timesteps)))
    diffusion = diffusion.to(images.device)

    for step in tqdm(range(config.steps), unit=" steps", leave=False, disable=None):
        torch.manual_seed(ddpm.derive_seed(seed, "training", step, 0))
        chosen = torch.randint(len(images), (config.batch_size,), device=images.device)
        x_start = ddpm.to_model(images[chosen])
        t = torch.randint(diffusion.timesteps, (len(chosen),), device=images.device)
        noise = torch.randn_like(x_start)
        y = None if labels is None else labels[chosen]
        ddpm.training_loss(network, diffusion, config, x_start, t, noise, y, state.model.num_classes).backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
        state.optimizer.param_groups[0]["lr"] = ddpm.learning_rate(config, step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        ddpm.ema_update(state.ema, state.model, step, config.ema_decay)
    return ddpm.Run(config, PredictsMean(state.ema, simple), simple)


def objectives(settings):
    """Tables 1 and 2: μ̃ or ε predicted, L, L_simple and L_hybrid; bits/dim, and Fréchet distance with few steps."""
    figure, (left, right) = make_figure(2, 8, 2.8)
    few_steps = (10, 20, 50)
    images = load_images(settings)

    # How to train, and σ_t² of the reverse process
    objectives = {
        "μ̃: L, β_t": (functools.partial(train_mean, loss="bound"), "fixed_large"),
        "μ̃: unweighted, β_t": (functools.partial(train_mean, loss="unweighted"), "fixed_large"),
        "ε: L, β_t": (functools.partial(short_run, loss="bound"), "fixed_large"),
        "ε: L_simple, β_t": (functools.partial(short_run, schedule="linear"), "fixed_large"),
        "ε: L_simple, β̃_t": (functools.partial(short_run, schedule="linear"), "fixed_small"),
        "ε: L_hybrid, learned": (functools.partial(short_run, variance="learned_range"), "learned_range"),
    }
    rows = []
    for name, (train_run, variance) in objectives.items():
        results = []
        terms_by_t = []
        for seed in settings.seeds:
            run = with_variance(train_run(settings, seed), variance)
            bits = measure_bits(settings, run)
            result = [bits["total"].item(), bits["L_{t-1}"].sum().item(), bits["L_0"].item()]
            for steps in few_steps:
                pixels = draw(settings, run, sampler="ddpm", sampling_steps=steps)
                result.append(frechet_distance(pixels, images))
            results.append(result)
            terms_by_t.append(torch.cat([bits["L_0"][None], bits["L_{t-1}"]]).cpu())

        # A list of all seeds' values for each column of the table
        columns = list(zip(*results, strict=True))
        rows.append([name, *map(mean_and_deviation, columns)])
        left.plot(range(1, run.diffusion.timesteps + 1), torch.stack(terms_by_t).mean(0), label=name)
        right.plot(few_steps, [statistics.mean(distances) for distances in columns[3:]], "o-", label=name)

    left.set(xscale="log", yscale="log", xlabel="t", title="the bound's term at t, bits/dim")
    right.set(xscale="log", yscale="log", xlabel="S", title="Fréchet distance, Algorithm 2 in S steps")
    right.legend()
    heading = ["predicted: loss, σ_t²", "NLL ≤, bits/dim", "L_1 … L_{T−1}", "L_0"]
    print_table([*heading, *(f"distance, S = {steps}" for steps in few_steps)], rows)
    return figure


def decoding(settings):
    """Fig. 5: rate in bits/dim, and distortion as the root mean square error of x̂_0 on the 0…255 scale."""
    figure, axes = make_figure(3, 10, 2.6)
    run = base_run(settings)
    bits = measure_bits(settings, run)

    # In the order of the reverse process, from t = T−1 to 0; the last step sends nothing, since L_0 is the distortion.
    rmse = 127.5 * bits["squared_error"].sqrt().flip(0).cpu()
    sent = F.pad(bits["L_{t-1}"], (1, 0)).flip(0)
    rate = (bits["L_T"] + sent.cumsum(0)).cpu()

    steps = range(len(rmse))
    axes[0].plot(steps, rmse)
    axes[0].set(xlabel="reverse steps", ylabel="distortion, RMSE of 255")
    axes[1].plot(steps, rate)
    axes[1].set(xlabel="reverse steps", ylabel="rate, bits/dim")
    axes[2].plot(rate, rmse)
    axes[2].set(xlabel="rate, bits/dim", ylabel="distortion, RMSE of 255")
    row = [f"{rate[-1]:.3f}", f"{bits['L_0']:.3f}", f"{rmse[-1]:.2f}"]
    print_table(["rate, bits/dim", "distortion L_0, bits/dim", "RMSE of 255"], [row])
    return figure


def progress(settings):
    """§2 and Fig. 6: four real images diffused to x_T, four samples denoised from x_T, and their x̂_0.

    Twelve values of t, evenly spaced from 0 to T−1, are shown from left to right; from T−1 to 0 for the samples."""
    run = base_run(settings)
    images = load_images(settings)
    count = 4
    last_t = run.diffusion.timesteps - 1
    shown = [round(last_t * i / 11) for i in range(12)]

    # Forwards, with the same noise at every t
    x_start = ddpm.to_model(images[:: len(images) // count][:count]).to(run.device)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(settings.seed)).to(run.device)
    diffused = [run.diffusion.q_sample(x_start, t, noise) for t in shown]

    # Backwards: Algorithm 2
    model = run.model
    if run.model.num_classes:
        labels = torch.arange(count, device=run.device) * 3 + 1
        model = ddpm.classifier_free_guidance(run.model, labels % run.model.num_classes, 0)
    torch.manual_seed(settings.seed)
    x_t = torch.randn_like(x_start)
    denoised = []
    predicted = []
    with torch.no_grad():
        for t in range(last_t, -1, -1):
            if t in shown:
                _, _, _, pred_x_start = run.diffusion.p_mean_variance(model, x_t, t)
                denoised.append(x_t)
                predicted.append(pred_x_start)
            x_t = run.diffusion.p_sample(model, x_t, t)
    denoised[-1] = x_t

    # A row for each image, first those of the forward process
    rows = [torch.stack(columns, 1).flatten(0, 1) for columns in (diffused, denoised, predicted)]
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), len(shown))


SHARED_T = (999, 750, 500, 250, 125)


def sharing(settings):
    """Fig. 7: samples that share x_t. Each row has another t: x_0, x_t, and eight samples of p_θ from x_t."""
    run = base_run(settings)
    images = load_images(settings)
    x_start = ddpm.to_model(images[len(images) // 3][None]).to(run.device)

    rows = []
    for t in SHARED_T:
        torch.manual_seed(settings.seed)
        x_t = run.diffusion.q_sample(x_start, t)
        copies = x_t.expand(8, -1, -1, -1)
        samples = ddpm.last(run.diffusion.p_sample_steps(run.model, copies, t))
        rows.append(torch.cat([x_start, x_t, samples]))
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), 10)


def interpolation(settings):
    """Fig. 8: interpolation between two real images. Each row has another t: one image, λ = 0 to 1, the other."""
    run = base_run(settings)
    images = load_images(settings)
    image_a = ddpm.to_model(images[len(images) // 3][None]).to(run.device)
    image_b = ddpm.to_model(images[len(images) * 3 // 4][None]).to(run.device)
    weights = torch.linspace(0, 1, 9, device=run.device).reshape(-1, 1, 1, 1)

    rows = []
    for t in SHARED_T:
        torch.manual_seed(settings.seed)
        noise = torch.randn_like(image_a)
        copies_a, copies_b, noises = (x.expand(len(weights), -1, -1, -1) for x in (image_a, image_b, noise))
        mixtures = run.diffusion.interpolate(run.model, copies_a, copies_b, t, weights, noises)
        rows.append(torch.cat([image_a, mixtures, image_b]))
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), 11)


def nearest(images, others, count):
    """For each image its count nearest others: the root mean square differences in grey levels (N, count), and which
    they are (N, count). Both are uint8 (N, C, H, W)."""
    distances = []
    for batch in images.split(100):
        both = (batch.flatten(1).float(), others.flatten(1).float())
        distances.append(torch.cdist(*both, compute_mode="donot_use_mm_for_euclid_dist").topk(count, largest=False))
    values, which = (torch.cat(parts) for parts in zip(*distances, strict=True))
    return values / images[0].numel() ** 0.5, which


def memory(settings):
    """Samples and the training images nearest to them, which would be equal if the network drew from memory.

    Takes the run in runs/<data>, whatever its settings are and even if it is unfinished; trains one if there is none.
    Each row on the left is a sample and its five nearest training images. On the right is the loss of the averaged
    weights on training images and on held-out ones, as in log.csv. The table compares as many samples as images are
    held out, at least ten: how far each is from the nearest training image. Held-out images show how far new images
    are."""
    figure, axes = make_figure(2, 8, 4.4, width_ratios=(3, 2))
    out = ddpm.preset(settings.data).out
    if (Path(out) / "checkpoint.pt").exists():
        run = ddpm.Run.read(out, settings.device)
        if ddpm.resolve(run.config.data) != ddpm.resolve(settings.data):
            raise ValueError(f"{out} holds a run of {run.config.data}, not of {settings.data}: move it away")
    else:
        run = base_run(settings)
    train, _ = ddpm.load_data(settings.data, run.config.image_size, split="train")
    held_out, _ = ddpm.load_data(settings.data, run.config.image_size, split="test")
    samples = draw(settings, run, max(10, len(held_out)))

    rows = []
    for name, images in (("samples", samples), ("held-out images", held_out)):
        if not len(images):  # a very small data set
            continue
        distances, _ = nearest(images, train, 1)
        tenth, median = distances.quantile(torch.tensor([0.1, 0.5])).tolist()
        rows.append([name, len(images), f"{median:.1f}", f"{tenth:.1f}", f"{distances.min():.1f}"])
    print_table(["RMS difference to the nearest training image", "images", "median", "lowest tenth", "least"], rows)

    _, which = nearest(samples[:10], train, min(5, len(train)))
    rows = [torch.cat([sample[None], train[row]]) for sample, row in zip(samples[:10], which, strict=True)]
    axes[0].imshow(ddpm.make_grid_image(torch.cat(rows), len(rows[0])), cmap="gray")
    axes[0].axis("off")
    for column, name in (("ema_loss", "training images"), ("ema_loss_held_out", "held-out images")):
        axes[1].plot(*read_log(run.config.out, column), "o-", label=name)
    axes[1].set(xlabel="step", title="loss of the averaged weights")
    axes[1].legend()
    return figure


# ---- DDIM's tables and figures ---------------------------------------------------------------------------------------


def reconstruction(settings):
    """DDIM's Table 2: held-out images encoded to x_T and decoded in S steps; squared error per pixel scaled to [0, 1].

    The image shows eight of them, and below them what S = 10, 50 and 1000 steps return. No labels are given."""
    run = base_run(settings)
    pixels = load_held_out(settings)
    x_start = ddpm.to_model(pixels.to(run.device))
    shown = [x_start[:: len(x_start) // 8][:8]]

    rows = []
    counts = [steps for steps in (10, 20, 50, 100, 200, 500, 1000) if steps <= run.diffusion.timesteps]
    for steps in counts:
        x_T = run.diffusion.ddim_encode_loop(run.model, x_start, steps)
        returned = run.diffusion.ddim_sample_loop(run.model, x_start.shape, steps, noise=x_T)
        squared_error = ((returned - x_start) / 2).square().mean()
        rows.append([steps, f"{squared_error:.5f}", f"{255 * squared_error.sqrt():.2f}", f"{x_T.std():.3f}"])
        if steps in (10, 50, 1000):
            shown.append(returned[:: len(x_start) // 8][:8])
    print_table(["S", "squared error per pixel", "RMSE of 255", "standard deviation of x_T"], rows)
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(shown)), 8)


def slerp(x1, x2, weight):
    """sin((1−λ)θ)/sin θ · x + sin(λθ)/sin θ · x′ with λ = weight and θ their angle (DDIM §5.3)."""
    theta = torch.arccos((x1 * x2).sum() / (x1.norm() * x2.norm()))
    return (torch.sin((1 - weight) * theta) * x1 + torch.sin(weight * theta) * x2) / torch.sin(theta)


def latents(settings):
    """DDIM's Fig. 5 and 6: the same x_T in S steps of DDIM; and spherical interpolation between two x_T.

    Upper rows: S = 5, 10, 20, 50, 100 and 1000, a column for each x_T. The table gives the mean difference of these
    images to those of S = 1000 in grey levels, and that of images from other x_T. Lower rows: four pairs of x_T, λ = 0
    to 1 from left to right, in 50 steps. Labels are given if the network learned them."""
    run = base_run(settings)
    columns = 10
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.held_out, run.model.image_channels, run.config.image_size, run.config.image_size)
    x_T = torch.randn(shape, generator=generator).to(run.device)

    def with_labels(labels):
        if labels is None:
            return run.model
        return ddpm.classifier_free_guidance(run.model, labels.to(run.device), 0)

    # Fig. 5
    model = with_labels(run.labels(len(x_T)))
    counts = [steps for steps in (5, 10, 20, 50, 100, 1000) if steps <= run.diffusion.timesteps]
    images = [ddpm.to_pixels(run.diffusion.ddim_sample_loop(model, shape, steps, noise=x_T)).cpu() for steps in counts]
    finest = images[-1].float()
    other = finest.roll(run.model.num_classes or 1, 0)  # of the same class, if there are any
    rows = [[steps, f"{(each.float() - finest).abs().mean():.1f}"] for steps, each in zip(counts, images, strict=True)]
    rows.append(["another x_T", f"{(other - finest).abs().mean():.1f}"])
    print_table(["S", f"mean difference to S = {counts[-1]}, of 255"], rows)

    # Fig. 6: the two ends of a row have the same label
    pairs = 4
    ends = x_T[: 2 * pairs].unflatten(0, (pairs, 2))
    weights = torch.linspace(0, 1, columns)
    between = torch.stack([slerp(x1, x2, weight) for x1, x2 in ends for weight in weights])
    labels = None
    if run.model.num_classes:
        labels = (torch.arange(pairs) * 3 % run.model.num_classes).repeat_interleave(columns)
    mixed = run.diffusion.ddim_sample_loop(with_labels(labels), between.shape, min(50, counts[-1]), noise=between)
    tiles = [each[:columns] for each in images] + [ddpm.to_pixels(mixed).cpu()]
    return ddpm.make_grid_image(torch.cat(tiles), columns)


# ---- The cost of training --------------------------------------------------------------------------------------------


def training_cost(batch_size, image_size, device):
    """Seconds and peak memory in bytes of a step of ddpm.train with the paper's network. To be called in a new process:
    on a CPU, the peak is that of the whole process."""
    ddpm.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            pixels = torch.randint(256, (3, image_size, image_size), dtype=torch.uint8)
            ddpm.pixels_to_image(pixels).save(Path(folder) / f"{i}.png")
        config = dataclasses.replace(
            ddpm.preset("cifar10"),
            data=folder,
            image_size=image_size,
            batch_size=batch_size,
            steps=3,
            log_every=1,
            device=device,
            out=f"{folder}/run",
        )
        out = ddpm.train(config, watch=lambda run, step: None)
        _, images_per_second = read_log(out, "images_per_second")
    import resource  # here, because Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if ddpm.pick_device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return batch_size / images_per_second[-1], peak


def cost(settings):
    """Seconds and peak memory in GiB of a training step of the paper's network, by batch size and by image size."""
    figure, axes = make_figure(2, 7, 2.6)

    # Batch size and image size of each case, measured in a new process
    by_batch = [(16, 32), (32, 32), (64, 32), (128, 32)]
    by_size = [(16, 16), (16, 32), (16, 64)]
    seconds = {}
    gibibytes = {}
    for case in sorted({*by_batch, *by_size}):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            seconds[case], peak = process.submit(training_cost, *case, settings.device).result()
        gibibytes[case] = peak / 2**30

    # Table
    rows = []
    for case, duration in seconds.items():
        batch_size, image_size = case
        milliseconds = 1000 * duration / batch_size
        size = f"{image_size}×{image_size}"
        rows.append([batch_size, size, f"{duration:.2f}", f"{milliseconds:.0f}", f"{gibibytes[case]:.2f}"])
    print_table(["batch", "pixels", "seconds per step", "milliseconds per image", "peak, GiB"], rows)

    # Figure
    for name, cases in (("by batch", by_batch), ("by size", by_size)):
        pixels = [batch_size * image_size**2 / 32**2 for batch_size, image_size in cases]
        axes[0].plot(pixels, [seconds[case] for case in cases], "o-", label=name)
        axes[1].plot(pixels, [gibibytes[case] for case in cases], "o-", label=name)
    axes[0].set(xlabel="batch × pixels / 32²", title="seconds per step", xlim=0, ylim=0)
    axes[1].set(xlabel="batch × pixels / 32²", title="peak memory, GiB", xlim=0, ylim=0)
    axes[0].legend()
    return figure


# ---- Command line ----------------------------------------------------------------------------------------------------

EXPERIMENTS = {
    "schedules": schedules,
    "attention": attention,
    "guidance": guidance,
    "steps": sampling_steps,
    "objectives": objectives,
    "decoding": decoding,
    "progress": progress,
    "sharing": sharing,
    "interpolation": interpolation,
    "memory": memory,
    "reconstruction": reconstruction,
    "latents": latents,
    "cost": cost,
}


def list_experiments():
    """The name of each experiment and the first line of its docstring, as text."""
    return "\n".join(f"{name:14} {experiment.__doc__.splitlines()[0]}" for name, experiment in EXPERIMENTS.items())


def new_parser():
    """The argument parser. It reports an error in one line, with exit status 2."""
    parser = argparse.ArgumentParser(
        "bench_ddpm.py",
        description="The paper's experiments and README's exercises: each prints a table, writes NAME.png, or both.",
        epilog=list_experiments(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"bench_ddpm.py: error: {message}\n")
    parser.add_argument(
        "experiment", nargs="?", choices=list(EXPERIMENTS), metavar="NAME", help="one of the list below"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the experiments")
    for field in dataclasses.fields(Settings):
        flag = ddpm.as_flag(field.name)
        default = field.metadata["shown"] or ddpm.as_typed(field.default)
        text = f"{field.metadata['help']} (default: {default})"
        if field.type is tuple:
            parser.add_argument(flag, type=int, nargs="+", default=field.default, metavar="N", help=text)
        else:
            parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return parser


def main():
    """Run the command line. User errors end with one line and exit status 2, interruptions with status 130."""
    ddpm.prepare_terminal()
    parser = new_parser()
    options = vars(parser.parse_args())
    name = options.pop("experiment")
    if options.pop("list"):
        print(list_experiments())
        return
    if name is None:
        parser.error("the name of an experiment is required; see --list")

    # The experiment, and its figure or image
    start = time.perf_counter()
    try:
        settings = Settings(**options)
        path = Path(settings.pictures) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"--pictures {settings.pictures} is read-only")
        result = EXPERIMENTS[name](settings)
        if isinstance(result, Image.Image):
            result.save(path)
        else:
            result.savefig(path, dpi=90)
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt as interruption:
        parser.exit(130, f"bench_ddpm.py: {str(interruption) or 'interrupted'}\n")
    print(path)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes, torch {torch.__version__}, {torch.get_num_threads()} threads")


# ======================================================================================================================
# Timings: pytest bench_ddpm.py
# ======================================================================================================================

# Images in a batch, by network ("cifar10" is the paper's) and device
BATCH_SIZE = {("digits", "cpu"): 128, ("cifar10", "cpu"): 2, ("digits", "cuda"): 2048, ("cifar10", "cuda"): 128}

# The table that is printed at the end
HEADING = ["what", "network", "device", "milliseconds", "images/s", "of the matrix rate", "diffusers' time / ours"]
ALIGNMENT = ["-" * 14, "-" * 7, "-" * 6, "---:", "---:", "---:", "---:"]
ROWS = []

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run it where there is one")
on_all = pytest.mark.parametrize(
    "name, device",
    [
        ("digits", "cpu"),
        ("cifar10", "cpu"),
        pytest.param("digits", "cuda", marks=needs_cuda),
        pytest.param("cifar10", "cuda", marks=needs_cuda),
    ],
)


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Keep freed memory, as the command line of ddpm.py does, and print the table when all timings are done."""
    ddpm.keep_freed_memory()
    request.config._benchmarksession.quiet = True
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n")
        for row in [HEADING, ALIGNMENT, *ROWS]:
            print("| {:14} | {:7} | {:6} | {:>12} | {:>10} | {:>18} | {:>22} |".format(*row))


# ---- Networks and batches --------------------------------------------------------------------------------------------


@functools.cache
def make_network(name, device):
    """Returns the network, and the Run that draws from it as --sample does, compiled on CUDA."""
    torch.manual_seed(0)
    config = ddpm.preset(name)
    if name == "digits":
        model, diffusion = ddpm.build(config, image_channels=1, num_classes=10)
    else:
        model, diffusion = ddpm.build(config, image_channels=3, num_classes=None)
    return model, ddpm.Run.ready(config, model, diffusion, torch.device(device))


@functools.cache
def make_peer(name, device):
    """diffusers' network of the same shape, or None if diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None

    torch.manual_seed(0)
    if name == "digits":
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=64,
            norm_num_groups=8,
            num_class_embeds=11,
        )
    else:
        network = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            dropout=0.1,
        )
    return network.to(device)


def make_batch(name, device):
    """Returns random x_t (B, C, H, W), t (B,) and labels (B,), None for the paper's network."""
    batch_size = BATCH_SIZE[name, device]
    shape = (batch_size, 1, 8, 8) if name == "digits" else (batch_size, 3, 32, 32)
    x = torch.randn(shape, device=device)
    t = torch.randint(1000, (batch_size,), device=device)
    labels = None
    if name == "digits":
        labels = torch.randint(10, (batch_size,), device=device)
    return x, t, labels


# ---- Measures --------------------------------------------------------------------------------------------------------


def autocast(name, device):
    """A context manager for the precision that ddpm.py trains and samples in."""
    return ddpm.autocast(ddpm.preset(name), torch.device(device))


def read_clock(device):
    """Seconds, after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_seconds(work, device):
    start = read_clock(device)
    work()
    return read_clock(device) - start


def count_operations(work):
    """The number of floating-point operations of work()."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@functools.cache
def matrix_rate(name, device):
    """Floating-point operations per second of a matrix product in the precision of ddpm.py, the best of 20."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device)
    b = torch.randn(size, size, device=device)
    with autocast(name, device):
        dtype = (a @ b).dtype
    a = a.to(dtype)
    b = b.to(dtype)
    seconds = min(measure_seconds(lambda: a @ b, device) for _ in range(20))
    return 2 * size**3 / seconds


def record(benchmark, what, name, device, ours, operations=None, theirs=None, rounds=9, remark=None):
    """Time ours() in so many rounds, alternately with theirs() of diffusers if given, and add a row to the table.
    operations is the number of floating-point operations of ours(). remark() returns the last column of the row
    (default: the ratio of the times)."""
    # Theirs is timed before each round of ours.
    their_seconds = []

    def before_round():
        if theirs is not None:
            their_seconds.append(measure_seconds(theirs, device))

    warmup_rounds = 1 if rounds > 1 else 0
    work = functools.partial(measure_seconds, ours, device)
    benchmark.pedantic(work, setup=before_round, rounds=rounds, warmup_rounds=warmup_rounds)
    if benchmark.disabled:  # pytest --benchmark-disable runs everything once, without a clock
        return

    # Milliseconds, and images per second
    seconds = benchmark.stats.stats.median
    images_per_second = BATCH_SIZE[name, device] / seconds
    row = [what, name, device]
    row.append(f"{1000 * seconds:,.2f}" if seconds < 1 else f"{1000 * seconds:,.0f}")
    row.append(f"{images_per_second:,.0f}" if images_per_second > 10 else f"{images_per_second:,.2g}")

    # The share of the matrix rate, and the ratio to diffusers
    share = ""
    if operations is not None:
        share = f"{operations / seconds / matrix_rate(name, device):.0%}"
    last_column = ""
    if remark is not None:
        last_column = remark()
    elif theirs is not None:
        last_column = f"{statistics.median(their_seconds) / seconds:.2f}"
    row += [share, last_column]
    ROWS.append(row)
    benchmark.extra_info.update(zip(HEADING, row, strict=True))


# ---- The timings -----------------------------------------------------------------------------------------------------


@on_all
def test_q_sample(benchmark, name, device):
    """x_t of a batch from x_0, without a network (Eq. 4)."""
    x, t, _ = make_batch(name, device)
    _, run = make_network(name, device)
    noise = torch.randn_like(x)
    record(benchmark, "q_sample", name, device, lambda: run.diffusion.q_sample(x, t, noise), rounds=50)


@on_all
@torch.no_grad()
def test_forward(benchmark, name, device):
    """The network alone, without gradients."""
    x, t, y = make_batch(name, device)
    model, run = make_network(name, device)
    peer = make_peer(name, device)

    @autocast(name, device)
    def ours():
        run.model(x, t, y)

    theirs = None
    if peer is not None:
        theirs = lambda: peer(x, t, y)
    operations = count_operations(lambda: model(x, t, y))
    record(benchmark, "network", name, device, ours, operations, theirs)


@on_all
def test_training_step(benchmark, name, device):
    """Algorithm 1: loss, gradients, clipping and a step of Adam."""
    x, t, y = make_batch(name, device)
    model, run = make_network(name, device)
    peer = make_peer(name, device)
    compiled = ddpm.maybe_compile(ddpm.preset(name), torch.device(device), model.train())

    def compute_loss(network):
        with autocast(name, device):
            return run.diffusion.p_losses(functools.partial(network, y=y), x, t)

    def update(network, optimizer, loss):
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # A learning rate of 0, so that every step is the same
    optimizer = torch.optim.Adam(model.parameters(), 0.0, fused=True)
    ours = lambda: update(model, optimizer, compute_loss(compiled))
    theirs = None
    if peer is not None:
        peer_optimizer = torch.optim.AdamW(peer.parameters(), 0.0)
        theirs = lambda: update(peer, peer_optimizer, (peer(x, t, y).sample - x).square().mean())
    operations = count_operations(lambda: update(model, optimizer, compute_loss(model)))
    record(benchmark, "training step", name, device, ours, operations, theirs)
    model.eval()


@on_all
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@torch.no_grad()
def test_one_step(benchmark, name, device, sampler):
    """One step of the reverse process with its network call: Algorithm 2 from t = 499, or DDIM from 499 to 479."""
    x, t, y = make_batch(name, device)
    model, run = make_network(name, device)
    peer = make_peer(name, device)
    with_labels = autocast(name, device)(functools.partial(run.model, y=y))

    if sampler == "ddpm":
        ours = lambda: run.diffusion.p_sample(with_labels, x, 499)
    else:
        ours = lambda: run.diffusion.ddim_sample(with_labels, x, 499, 479)
    theirs = None
    if peer is not None:
        scheduler = make_scheduler(sampler)
        peer_t = torch.full_like(t, 499)
        theirs = lambda: scheduler.step(peer(x, peer_t, y).sample, 499, x)
    operations = count_operations(lambda: model(x, t, y))
    record(benchmark, f"one {sampler.upper()} step", name, device, ours, operations, theirs)


def make_scheduler(sampler):
    """diffusers' scheduler for Algorithm 2 in 1000 steps, or for DDIM in 50."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if sampler == "ddpm":
        scheduler = DDPMScheduler(1000)
        scheduler.set_timesteps(1000)
    else:
        scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
        scheduler.set_timesteps(50)
    return scheduler


END_TO_END = {
    "DPM-Solver, S = 10": ("dpm_solver_sample_loop", dict(steps=10)),
    "DDIM, S = 50": ("ddim_sample_loop", dict(steps=50)),
    "Algorithm 2": ("p_sample_loop", {}),
}


@on_all
@pytest.mark.parametrize("sampler", END_TO_END)
def test_sampling_end_to_end(benchmark, name, device, sampler):
    """From x_T to x_0 by the default sampler, by DDIM and by Algorithm 2 in all T steps. The last column is the time of
    the whole loop, divided by that of the network calls in it."""
    loop_name, how = END_TO_END[sampler]
    x, t, y = make_batch(name, device)
    model, run = make_network(name, device)
    with_labels = autocast(name, device)(functools.partial(run.model, y=y))
    network_seconds = []
    loop_seconds = []

    def timed_model(x_t, t):
        start = read_clock(device)
        prediction = with_labels(x_t, t)
        network_seconds.append(read_clock(device) - start)
        return prediction

    def loop():
        return getattr(run.diffusion, loop_name)(timed_model, x.shape, **how, noise=x)

    def timed_loop():
        loop_seconds.append(measure_seconds(loop, device))

    def remark():
        return f"loop / network = {sum(loop_seconds) / sum(network_seconds):.3f}"

    with torch.no_grad():
        operations = how.get("steps", run.diffusion.timesteps) * count_operations(lambda: model(x, t, y))
    rounds = 5 if how else 1
    record(benchmark, sampler, name, device, timed_loop, operations, rounds=rounds, remark=remark)


@on_all
@pytest.mark.parametrize("expert", [False, True], ids=["as it comes", "as an expert runs it"])
@torch.no_grad()
def test_default_sampler_beside_diffusers(benchmark, name, device, expert):
    """The default sampler in S = 10 steps beside diffusers' DPMSolverMultistepScheduler in as many: its network as it
    comes, in float32; or as an expert would run it, with channels_last memory and autocast to bfloat16 wherever
    ddpm.py uses it (on CUDA compiled, too, as ours is)."""
    x, t, y = make_batch(name, device)
    model, run = make_network(name, device)
    with_labels = autocast(name, device)(functools.partial(run.model, y=y))
    ours = lambda: run.diffusion.dpm_solver_sample_loop(with_labels, x.shape, 10, noise=x)

    theirs = None
    peer = make_peer(name, device)
    if peer is not None:
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(1000, final_sigmas_type="zero")
        if expert:
            peer = copy.deepcopy(peer).to(memory_format=torch.channels_last)
            if device == "cuda":
                peer = torch.compile(peer, mode="reduce-overhead")

        def theirs():
            scheduler.set_timesteps(10)
            x_t = x
            for peer_t in scheduler.timesteps:
                with autocast(name, device) if expert else contextlib.nullcontext():
                    noise = peer(x_t, peer_t.to(device).expand(len(x_t)), y).sample
                x_t = scheduler.step(noise.float(), peer_t, x_t).prev_sample

    operations = 10 * count_operations(lambda: model(x, t, y))
    what = "S = 10, diffusers tuned" if expert else "S = 10, diffusers' defaults"
    record(benchmark, what, name, device, ours, operations, theirs, rounds=5)


if __name__ == "__main__":
    main()
