"""How fast ddpm.py is, and experiments of the papers and of the tutorial with it.

    pytest bench_ddpm.py            # timings on the CPU, and on CUDA if there is a GPU; needs pytest-benchmark
    pip install diffusers           # optional: adds timings of the same network and steps in diffusers
    python bench_ddpm.py NAME       # an experiment: prints a table, writes runs/NAME.png; curves need matplotlib
    python bench_ddpm.py            # the names of the experiments; --help shows the options

Each timing is a median. "of the matrix rate" is the number of floating-point operations per second, counted by torch,
divided by that of a large matrix product on the same device in the same precision, in the same run. "diffusers' time /
ours" divides medians measured alternately; diffusers runs with its defaults, eager and in float32, except in the rows
named "tuned". Times depend on the machine and its load; these ratios depend on them much less.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ddpm

# ======================================================================================================================
# Timings: pytest bench_ddpm.py
# ======================================================================================================================

# Images in a batch, by network ("cifar10" is the paper's) and device
BATCH_SIZE = {
    ("digits", "cpu"): 128,
    ("cifar10", "cpu"): 2,
    ("digits", "cuda"): 2048,
    ("cifar10", "cuda"): 128,
}

HEADING = ["what", "network", "device", "milliseconds", "images/s", "of the matrix rate", "diffusers' time / ours"]
ROWS = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Keep freed memory, as the command line of ddpm.py does, and print the table after the last timing."""
    ddpm.keep_freed_memory()
    request.config._benchmarksession.quiet = True
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n")
        print_table(HEADING, ROWS)


class Case:
    """A network with new weights, alone, as ddpm.py samples from it and in diffusers, and a batch for it."""

    def __init__(self, name, device):
        self.name = name
        self.device = torch.device(device)
        self.config = ddpm.preset(name, device=device)
        self.diffusion = ddpm.build_diffusion(self.config)
        classes = list("0123456789") if name == "digits" else None
        channels = 1 if name == "digits" else 3

        # The network, never compiled; the same, compiled on CUDA; the same in diffusers
        torch.manual_seed(0)
        self.network = ddpm.build_network(self.config, channels, classes)
        self.run = ddpm.Run.prepare(self.config, self.network, self.diffusion, None)
        self.peer = None
        with contextlib.suppress(ImportError):
            from diffusers import UNet2DModel

            shape = ddpm.describe_network(self.network)
            self.peer = UNet2DModel(**shape, dropout=self.config.dropout).to(device).eval()

        count = BATCH_SIZE[name, device]
        size = self.config.image_size
        self.x = torch.randn(count, channels, size, size, device=device)
        self.t = torch.full((count,), 499, device=device)
        self.y = torch.randint(10, (count,), device=device) if classes else None
        self.batch = (self.x, self.t, self.y)

    def autocast(self):
        """A context manager for the precision of ddpm.py."""
        return ddpm.autocast(self.config, self.device)

    def model(self, x_t, t):
        """ε_θ(x_t, t) as ddpm.py samples from it."""
        with self.autocast():
            return self.run.model(x_t, t, self.y)

    def measure_seconds(self, work):
        """The seconds that work() takes until the device has finished."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start

    @functools.cached_property
    def operations(self):
        """The number of floating-point operations of a call of the network."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.network(*self.batch)
        return counter.get_total_flops()

    @functools.cached_property
    def matrix_rate(self):
        """Floating-point operations per second of a matrix product in the precision of ddpm.py, the best of 20."""
        size = 8192 if self.device.type == "cuda" else 1536
        a = torch.randn(size, size, device=self.device)
        with self.autocast():
            a = (a @ a) / size
        seconds = min(self.measure_seconds(lambda: a @ a) for _ in range(20))
        return 2 * size**3 / seconds


@pytest.fixture(scope="session", params=BATCH_SIZE, ids="-".join)
def case(request):
    """Each Case in turn."""
    if "cuda" in request.param and not torch.cuda.is_available():
        pytest.skip("no CUDA device: run it where there is one")
    return Case(*request.param)


def record(benchmark, case, what, ours, theirs=None, calls=0, rounds=9):
    """Time ours() in so many rounds, alternately with theirs() of diffusers, and add a row to the table. calls is the
    number of calls of the network whose operations are in ours()."""
    their_seconds = []

    def before_round():
        if theirs is not None and case.peer is not None:
            their_seconds.append(case.measure_seconds(theirs))

    work = functools.partial(case.measure_seconds, ours)
    benchmark.pedantic(work, setup=before_round, rounds=rounds, warmup_rounds=min(1, rounds - 1))
    if benchmark.disabled:  # pytest --benchmark-disable runs everything once, without a clock
        return
    seconds = benchmark.stats.stats.median
    speed = len(case.x) / seconds
    share = calls * case.operations / seconds / case.matrix_rate
    row = [what, case.name, case.device.type]
    row.append(f"{1000 * seconds:,.2f}")
    row.append(f"{speed:,.0f}" if speed > 10 else f"{speed:.2g}")
    row.append(f"{share:.0%}" if calls else "")
    row.append(f"{statistics.median(their_seconds) / seconds:.2f}" if their_seconds else "")
    ROWS.append(row)


# ---- The timings -----------------------------------------------------------------------------------------------------


def test_q_sample(benchmark, case):
    """x_t of a batch from x_0, without a network (Eq. 4)."""
    noise = torch.randn_like(case.x)
    ours = lambda: case.diffusion.q_sample(case.x, case.t, noise)
    record(benchmark, case, "q_sample", ours, rounds=50)


@torch.no_grad()
def test_forward(benchmark, case):
    """The network alone, without gradients."""
    ours = lambda: case.model(case.x, case.t)
    theirs = lambda: case.peer(*case.batch)
    record(benchmark, case, "network", ours, theirs, calls=1)


def update(network, optimizer, loss):
    """The gradient, clipped, and a step of the optimizer."""
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def test_training_step(benchmark, case):
    """Algorithm 1: loss, gradient, clipping and a step of Adam. The learning rate is 0, so that all steps are the same.
    The gradient counts as two calls of the network."""
    case = Case(case.name, case.device.type)  # its networks stay in training mode
    network = ddpm.maybe_compile(case.config, case.device, case.network.train())
    optimizer = torch.optim.Adam(network.parameters(), 0.0, fused=True)
    noise = torch.randn_like(case.x)

    def ours():
        with case.autocast():
            loss = case.diffusion.p_losses(functools.partial(network, y=case.y), case.x, case.t, noise)
        update(network, optimizer, loss)

    theirs = None
    if case.peer is not None:
        peer = case.peer.train()
        peer_optimizer = torch.optim.AdamW(peer.parameters(), 0.0)
        loss = lambda: F.mse_loss(peer(*case.batch).sample, noise)
        theirs = lambda: update(peer, peer_optimizer, loss())
    record(benchmark, case, "training step", ours, theirs, calls=3)


@functools.cache
def new_scheduler(name, **options):
    """A scheduler of diffusers, by the name of its class, with T = 1000."""
    import diffusers

    return getattr(diffusers, name)(1000, **options)


@torch.no_grad()
def test_one_step(benchmark, case):
    """One step of Algorithm 2 with its network call."""
    ours = lambda: case.diffusion.p_sample(case.model, case.x, 499)

    def theirs():
        prediction = case.peer(*case.batch).sample
        new_scheduler("DDPMScheduler").step(prediction, 499, case.x)

    record(benchmark, case, "one step", ours, theirs, calls=1)


@torch.no_grad()
def test_algorithm_2(benchmark, case):
    """From x_T to x_0 by Algorithm 2 in 1000 steps, timed once."""
    ours = lambda: case.diffusion.p_sample_loop(case.model, case.x.shape)
    record(benchmark, case, "Algorithm 2", ours, calls=1000, rounds=1)


@pytest.mark.parametrize("tuned", ["", ", tuned"], ids=["defaults", "tuned"])
@torch.no_grad()
def test_default_sampler(benchmark, case, tuned):
    """From x_T to x_0 by the default sampler in 10 steps, beside diffusers' DPMSolverMultistepScheduler as it comes, or
    as an expert runs it: in channels_last memory, in bfloat16 wherever ddpm.py uses it, and compiled on CUDA."""
    ours = lambda: case.diffusion.dpm_solver_sample_loop(case.model, case.x.shape, 10)
    peer = case.peer
    precision = contextlib.nullcontext()
    if tuned and peer is not None:
        peer = copy.deepcopy(peer).to(memory_format=torch.channels_last)
        precision = case.autocast()
        if case.device.type == "cuda":
            peer = torch.compile(peer, mode="reduce-overhead")

    def theirs():
        scheduler = new_scheduler("DPMSolverMultistepScheduler", final_sigmas_type="zero")
        scheduler.set_timesteps(10)
        x_t = torch.randn_like(case.x)
        for t in scheduler.timesteps:
            with precision:
                noise = peer(x_t, t.to(case.device).expand(len(x_t)), case.y).sample
            x_t = scheduler.step(noise.float(), t, x_t).prev_sample

    record(benchmark, case, f"DPM-Solver, S = 10{tuned}", ours, theirs, calls=10, rounds=5)


# ======================================================================================================================
# Experiments: python bench_ddpm.py NAME
# ======================================================================================================================
# An experiment takes the options of the command line, prints its table, and returns a PIL image or a matplotlib figure.
# A figure is made first, so that a missing matplotlib is reported before anything is computed.

# ---- Runs, images, samples -------------------------------------------------------------------------------------------


def read_or_train(config, watch=None):
    """The run in config.out: resumed if it was interrupted, trained if there is none. watch is that of ddpm.train."""
    checkpoint = None
    if (Path(config.out) / "checkpoint.pt").exists():
        checkpoint = ddpm.read_checkpoint(config.out)
        if dataclasses.replace(checkpoint["config"], device=config.device) != config:
            raise ValueError(f"{config.out} holds a run with other settings: move it away")
    if checkpoint is None or checkpoint["step"] < config.steps:
        ddpm.train(config, checkpoint, watch)
    return ddpm.Run.read(config.out, config.device)


def base_run(settings):
    """The run of --run, or one with the preset of the dataset."""
    if settings.run:
        return ddpm.Run.read(settings.run, settings.device)
    out = f"runs/experiments/{Path(settings.data).resolve().name}"
    return read_or_train(ddpm.preset(settings.data, device=settings.device, out=out))


def short_run(settings, seed, **changes):
    """A run of settings.steps steps with the preset of the dataset, the paper's diffusion, and changes to them. Four
    times during training, the Fréchet distance of its samples is written to curve.csv in its folder."""
    changes = {"schedule": "linear", "prediction": "noise", **changes}
    data = Path(settings.data).resolve().name
    values = [str(value or "none") for value in changes.values()]
    name = "-".join([data, str(settings.steps), *values, f"seed{seed}"])
    quarter = max(1, settings.steps // 4)
    config = ddpm.preset(
        settings.data,
        **changes,
        steps=settings.steps,
        sample_every=quarter,
        log_every=max(1, settings.steps // 20),
        seed=seed,
        device=settings.device,
        out=f"runs/experiments/{name}",
    )

    def write_distance(run, step):
        samples = draw(settings, run, sampling_steps=20)
        distance = frechet_distance(samples, load_images(config))
        first = step == quarter
        with open(Path(config.out) / "curve.csv", "w" if first else "a") as file:
            file.write("step,distance\n" * first + f"{step},{distance}\n")

    return read_or_train(config, write_distance)


def read_curve(run, name):
    """The steps, and the second column of a CSV file in the folder of a run."""
    return np.loadtxt(Path(run.config.out) / name, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2).T


def load_images(config, split=None):
    """The images of a run's dataset, uint8 (N, C, H, W)."""
    images, _ = ddpm.load_data(config.data, config.image_size, split=split)
    return images


def load_examples(run, count, split=None):
    """count images of a run's dataset, evenly spaced, scaled to [−1, 1], on the run's device."""
    images = load_images(run.config, split)
    chosen = torch.arange(count) * len(images) // count
    return ddpm.to_model(images[chosen]).to(run.device)


def draw(settings, run, count=None, **how):
    """Samples of every class in turn, uint8 (N, C, H, W) on the CPU. how: the options of Run.trajectory."""
    count = count or settings.samples
    labels = run.labels(count)
    batches = []
    for start in tqdm(range(0, count, 500), unit=" batches", leave=False, disable=None):
        size = min(500, count - start)
        batch_labels = None if labels is None else labels[start : start + size]
        seed = ddpm.derive_seed(settings.seed, "sampling") + start
        x_start = ddpm.last(run.trajectory(size, batch_labels, seed, **how))
        batches.append(ddpm.to_pixels(x_start).cpu())
    return torch.cat(batches)


# ---- Measures, tables, figures ---------------------------------------------------------------------------------------


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
    root_eigenvalues = np.linalg.eigvals(covariance1 @ covariance2).real.clip(0) ** 0.5
    squared_distance = ((mean1 - mean2) ** 2).sum()
    return float(squared_distance + np.trace(covariance1 + covariance2) - 2 * root_eigenvalues.sum())


def find_nearest(pixels, others):
    """The five nearest others of each image: root mean square differences in grey levels, and indices, (N, 5)."""
    x = pixels.flatten(1).float()
    y = others.flatten(1).float()
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances / x.shape[1] ** 0.5).topk(5, largest=False)


def measure_bits(settings, run):
    """The terms of GaussianDiffusion.bits_per_dim in bits/dim, averaged over held-out images."""
    x_start = load_examples(run, settings.held_out, "test")
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    terms = run.diffusion.bits_per_dim(run.model, x_start, generator=generator)
    return {name: values.mean(0).cpu() for name, values in terms.items()}


def print_table(heading, rows):
    """Print a table in Markdown."""
    for row in [heading, ["---"] * len(heading), *rows]:
        cells = [str(cell) if isinstance(cell, str | int) else f"{cell:.3f}" for cell in row]
        print("| " + " | ".join(cells) + " |")


def mean_and_deviation(values):
    """Mean ± standard deviation over the seeds, as text."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def new_figure(columns, width, height):
    """A matplotlib figure, its size in inches, with a row of so many axes. Raises ValueError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", dpi=90)


def make_image(rows):
    """Images scaled to [−1, 1], a tensor (N, C, H, W) for each row, as one PIL image."""
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), len(rows[0]))


# ---- Exercises 1 and 2, the paper's tables ---------------------------------------------------------------------------


def compare(settings, variants):
    """Train with each of several changes, by name, once for each seed. The table has the number of parameters, the
    bound, L_0 in it, and Fréchet distances: by Algorithm 2 in 20 steps, and by DPM-Solver in 20 steps during training.
    The figure has the loss and the latter distances, as means over the seeds."""
    figure, (left, right) = new_figure(2, 8, 2.8)
    rows = []
    for name, changes in variants.items():
        results = []
        curves = []
        for seed in settings.seeds:
            run = short_run(settings, seed, **changes)
            bits = measure_bits(settings, run)
            samples = draw(settings, run, sampler="ddpm", sampling_steps=20)
            few_steps = frechet_distance(samples, load_images(run.config))
            distances = read_curve(run, "curve.csv")
            results.append([bits["total"], bits["L_0"], few_steps, *distances[1]])
            curves.append((read_curve(run, "log.csv"), distances))
        losses, distances = (np.mean(each, 0) for each in zip(*curves, strict=True))
        left.plot(*losses, label=name)
        right.plot(*distances, "o-", label=name)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        measures = [mean_and_deviation(values) for values in zip(*results, strict=True)]
        rows.append([name, f"{parameters:,}", *measures])

    left.set(xlabel="step", title="training loss", yscale="log")
    right.set(xlabel="step", title="Fréchet distance", yscale="log")
    right.legend()
    steps = [f"distance, {step:.0f} steps" for step in distances[0]]
    print_table(["", "parameters", "NLL ≤, bits/dim", "L_0", "Algorithm 2, S = 20", *steps], rows)
    return figure


def schedules(settings):
    """Exercise 1: does the cosine schedule train faster than the linear one?"""
    return compare(settings, {"linear": {}, "cosine": dict(schedule="cosine")})


def attention(settings):
    """Exercise 2: what is self-attention worth?"""
    config = ddpm.preset(settings.data)
    levels = config.attn_resolutions or (config.image_size // 2,)
    return compare(settings, {"with attention": dict(attn_resolutions=levels), "without": dict(attn_resolutions=())})


def objectives(settings):
    """Tables 1 and 2, Improved DDPM: the bound L, L_simple with β_t and β̃_t, L_hybrid; and the loss of a velocity."""
    variants = {
        "L, β_t": dict(loss="bound"),
        "L_simple, β_t": {},
        "L_simple, β̃_t": dict(variance="fixed_small"),
        "L_hybrid, learned": dict(variance="learned_range"),
        "velocity, β_t": dict(prediction="velocity"),
    }
    return compare(settings, variants)


# ---- Exercises 3 and 4 -----------------------------------------------------------------------------------------------


def guidance(settings):
    """Exercise 3: what does classifier-free guidance change for w = 0 to 8?
    The label agrees if it is that of the nearest training image. The variance is that about the mean of a class, summed
    over pixels. The image has a column for each w, a row for each class."""
    run = base_run(settings)
    if not run.model.num_classes:
        raise ValueError("guidance needs a network that was trained with labels: --data digits")
    data = (run.config.data, run.config.image_size)
    images, _ = ddpm.load_data(*data)
    train, train_labels = ddpm.load_data(*data, split="train")

    def measure(name, pixels, labels):
        _, which = find_nearest(pixels, train)
        agreement = (train_labels[which[:, 0]] == labels).float().mean()
        classes = [ddpm.to_model(pixels[labels == label]) for label in labels.unique()]
        variance = statistics.mean(x.var(0).sum().item() for x in classes)
        rows.append([name, f"{agreement:.1%}", variance, frechet_distance(pixels, images)])

    rows = []
    columns = []
    measure("held-out images", *ddpm.load_data(*data, split="test"))
    for scale in (0, 0.5, 1, 2, 4, 8):
        pixels = draw(settings, run, guidance=scale)
        measure(f"w = {scale}", pixels, run.labels(len(pixels)))
        columns.append(pixels[: run.model.num_classes])
    print_table(["", "agrees with the label", "variance within a class", "distance"], rows)
    return ddpm.make_grid_image(torch.stack(columns, 1).flatten(0, 1), len(columns))


def sampling_steps(settings):
    """Exercise 4: how many steps do DPM-Solver, DDIM and Algorithm 2 need? (DDIM's Table 1)"""
    figure, ax = new_figure(1, 5, 3)
    run = base_run(settings)
    samplers = {
        "DPM-Solver": dict(sampler="dpm-solver"),
        "DDIM, η = 0": dict(sampler="ddim"),
        "DDIM, η = 0.5": dict(sampler="ddim", eta=0.5),
        "DDIM, η = 1": dict(sampler="ddim", eta=1.0),  # Algorithm 2 with β̃_t
        f"Algorithm 2, {run.config.variance}": dict(sampler="ddpm"),
    }
    counts = (5, 8, 10, 20, 50, 100)
    images = load_images(run.config)
    columns = []
    for name, how in samplers.items():
        samples = [draw(settings, run, sampling_steps=steps, **how) for steps in counts]
        columns.append([frechet_distance(pixels, images) for pixels in samples])
        ax.plot(counts, columns[-1], "o-", label=name)
    ax.set(xscale="log", yscale="log", xlabel="S, network calls a sample", ylabel="Fréchet distance")
    ax.legend()
    print_table(["S", *samplers], zip(counts, *columns, strict=True))
    return figure


# ---- The papers' figures ---------------------------------------------------------------------------------------------


def decoding(settings):
    """Fig. 5: rate in bits/dim, and distortion as the root mean square error of x̂_0 on the 0…255 scale."""
    figure, axes = new_figure(3, 10, 2.6)
    bits = measure_bits(settings, base_run(settings))
    # From t = T−1 to 0. The last step sends nothing, since L_0 is the distortion.
    rmse = 127.5 * bits["squared_error"].sqrt().flip(0)
    sent = F.pad(bits["L_{t-1}"], (1, 0)).flip(0)
    rate = bits["L_T"] + sent.cumsum(0)
    axes[0].plot(rmse)
    axes[0].set(xlabel="reverse steps", ylabel="distortion, RMSE of 255")
    axes[1].plot(rate)
    axes[1].set(xlabel="reverse steps", ylabel="rate, bits/dim")
    axes[2].plot(rate, rmse)
    axes[2].set(xlabel="rate, bits/dim", ylabel="distortion, RMSE of 255")
    row = [rate[-1], bits["L_0"], rmse[-1]]
    print_table(["rate, bits/dim", "distortion L_0, bits/dim", "RMSE of 255"], [row])
    return figure


def progress(settings):
    """§2 and Fig. 6: four images diffused from t = 0 to T−1, four samples denoised from T−1 to 0, and their x̂_0."""
    run = base_run(settings)
    diffusion = run.diffusion
    last_t = diffusion.timesteps - 1
    shown = [round(last_t * i / 11) for i in range(12)]
    torch.manual_seed(settings.seed)
    x_start = load_examples(run, 4)
    noise = torch.randn_like(x_start)
    diffused = [diffusion.q_sample(x_start, t, noise) for t in shown]
    x_t = noise
    denoised = []
    predicted = []
    for t in range(last_t, -1, -1):
        if t in shown:
            denoised.append(x_t)
            pred_x_start, _, _ = diffusion.predict(run.model, x_t, t, clip_denoised=True)
            predicted.append(pred_x_start.detach())
        x_t = diffusion.p_sample(run.model, x_t, t)
    denoised[-1] = x_t
    parts = [torch.stack(part, 1) for part in (diffused, denoised, predicted)]
    return make_image([row for part in parts for row in part])


SHARED_T = (999, 750, 500, 250, 125)


def sharing(settings):
    """Fig. 7: samples that share x_t. Each row has another t: x_0, x_t, and eight samples of p_θ from x_t."""
    run = base_run(settings)
    x_start = load_examples(run, 12)[4:5]
    rows = []
    for t in SHARED_T:
        torch.manual_seed(settings.seed)
        x_t = run.diffusion.q_sample(x_start, t)
        steps = run.diffusion.p_sample_steps(run.model, x_t.expand(8, -1, -1, -1), t)
        rows.append(torch.cat([x_start, x_t, ddpm.last(steps)]))
    return make_image(rows)


def interpolation(settings):
    """Fig. 8: interpolation between two real images. Each row has another t: one image, λ = 0 to 1, the other."""
    run = base_run(settings)
    images = load_examples(run, 12)
    a = images[[4] * 9]
    b = images[[9] * 9]
    weights = torch.linspace(0, 1, 9, device=run.device).reshape(9, 1, 1, 1)
    rows = []
    for t in SHARED_T:
        torch.manual_seed(settings.seed)
        noise = torch.randn_like(a[:1]).expand_as(a)
        mixtures = run.diffusion.interpolate(run.model, a, b, t, weights, noise)
        rows.append(torch.cat([a[:1], mixtures, b[:1]]))
    return make_image(rows)


def memory(settings):
    """Ten samples, each with its five nearest training images: does the network draw from memory?
    The table has the distances of samples and of held-out images, which are new, to the nearest training image."""
    run = base_run(settings)
    train = load_images(run.config, "train")
    held_out = ddpm.to_pixels(load_examples(run, settings.held_out, "test")).cpu()
    samples = draw(settings, run, settings.held_out)
    rows = []
    for name, pixels in {"samples": samples, "held-out images": held_out}.items():
        distances, _ = find_nearest(pixels, train)
        nearest = distances[:, 0]
        rows.append([name, nearest.median(), nearest.quantile(0.1), nearest.min()])
    print_table(["RMS difference to the nearest training image", "median", "lowest tenth", "least"], rows)
    _, which = find_nearest(samples[:10], train)
    groups = torch.cat([samples[:10, None], train[which]], 1)
    return ddpm.make_grid_image(groups.flatten(0, 1), 6)


def reconstruction(settings):
    """DDIM's Table 2: held-out images encoded to x_T and decoded in S steps; squared error per pixel scaled to [0, 1].
    The image shows eight of them, and below them what S = 10, 50 and 1000 steps return."""
    run = base_run(settings)
    diffusion = run.diffusion
    x_start = load_examples(run, settings.held_out, "test")
    chosen = torch.arange(8) * len(x_start) // 8
    shown = [x_start[chosen]]
    rows = []
    for steps in (10, 20, 50, 100, 200, 500, 1000):
        x_T = diffusion.ddim_encode_loop(run.model, x_start, steps)
        returned = diffusion.ddim_sample_loop(run.model, x_start.shape, steps, noise=x_T)
        squared_error = ((returned - x_start) / 2).square().mean()
        rows.append([steps, f"{squared_error:.5f}", 255 * squared_error.sqrt(), x_T.std()])
        if steps in (10, 50, 1000):
            shown.append(returned[chosen])
    print_table(["S", "squared error per pixel", "RMSE of 255", "standard deviation of x_T"], rows)
    return make_image(shown)


def latents(settings):
    """DDIM's Fig. 5: the same x_T in S = 5, 10, 20, 50, 100 and 1000 steps of DDIM, a row for each S."""
    run = base_run(settings)
    counts = (5, 10, 20, 50, 100, 1000)
    rows = [draw(settings, run, 10, sampler="ddim", sampling_steps=steps) for steps in counts]
    return ddpm.make_grid_image(torch.cat(rows), 10)


# ---- Command line ----------------------------------------------------------------------------------------------------

PAPERS = (objectives, decoding, progress, sharing, interpolation, memory, reconstruction, latents)
EXERCISES = (schedules, attention, guidance, sampling_steps)
EXPERIMENTS = {experiment.__name__: experiment for experiment in (*EXERCISES, *PAPERS)}


def main():
    """Run the command line. ValueError and OSError end it with one line and status 2, an interruption with 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without β shows ?
    parser = argparse.ArgumentParser("bench_ddpm.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("experiment", nargs="?", choices=EXPERIMENTS, help="None: list them")
    option("--data", default="digits", help="digits, mnist, fashion_mnist, cifar10, or a folder of images")
    option("--run", metavar="FOLDER", help="a trained run, in place of one of --data with its preset")
    option("--steps", type=ddpm.positive_int, default=500, help="training steps where networks are compared")
    option("--seeds", type=int, nargs="+", default=(0, 1, 2), help="seeds of these trainings")
    option("--seed", type=int, default=0, help="seed of samples and of everything else that is random")
    option("--samples", type=ddpm.positive_int, default=1797, help="samples that a distance is measured on")
    option("--held-out", type=ddpm.positive_int, default=180, help="held-out images that are measured")
    option("--device", help="cuda, mps or cpu; None: the first one available")
    settings = parser.parse_args()
    if settings.experiment is None:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:14} {experiment.__doc__.splitlines()[0]}")
        return

    ddpm.keep_freed_memory()
    start = time.perf_counter()
    path = Path("runs", f"{settings.experiment}.png")
    path.parent.mkdir(exist_ok=True)
    try:
        result = EXPERIMENTS[settings.experiment](settings)
    except (ValueError, OSError) as error:
        parser.exit(2, f"bench_ddpm.py: error: {error}\n")
    except KeyboardInterrupt as interruption:
        parser.exit(130, f"bench_ddpm.py: {interruption}\n")
    save = result.save if isinstance(result, Image.Image) else result.savefig
    save(path)
    minutes = (time.perf_counter() - start) / 60
    print(f"{path}, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
