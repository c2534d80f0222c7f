"""How fast ddpm.py is, what share of the machine that is, and what the paper's experiments show.

    python bench_ddpm.py NAME       # an experiment of the paper or an exercise of the tutorial; --help lists them
    pytest bench_ddpm.py            # timings on CPU, and CUDA where there is one; a table at the end
    pip install diffusers           # adds the same network and steps of diffusers, timed in turn with ours

Every share is measured within the run: floating-point operations a second, counted by torch, over the rate of a large
matrix product on the same device in the same precision, bfloat16 where ddpm.py would compute in it. A ratio to
diffusers, which computes as it comes, eagerly in float32, is the median of its times over the median of ours, taken
alternately. Absolute times depend on the machine and on what else it does; shares and ratios hardly do.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from scipy import linalg
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import ddpm

BATCH = {("digits", "cpu"): 128, ("cifar10", "cpu"): 2, ("digits", "cuda"): 2048, ("cifar10", "cuda"): 128}
HEADING = ("what", "network", "device", "milliseconds", "images/s", "of the matrix rate", "diffusers' time / ours")
ROWS = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Memory is kept as ddpm.py's command line keeps it, for diffusers too; one table when all is done."""
    ddpm.keep_freed_memory()
    request.config._benchmarksession.quiet = True
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n")
        for row in [HEADING, ["-" * 14, "-" * 7, "-" * 6, *["---:"] * 4], *ROWS]:
            print("| {:14} | {:7} | {:6} | {:>12} | {:>10} | {:>18} | {:>22} |".format(*row))


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, device):
    start = clock(device)
    work()
    return clock(device) - start


def autocast(name, device):
    """The precision that training and sampling have on the device."""
    return ddpm.autocast(ddpm.preset(name), torch.device(device))


@functools.cache
def matrix_rate(name, device):
    """Floating-point operations a second of a matrix product, the best of 20."""
    n = 8192 if device == "cuda" else 1536
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    with autocast(name, device):
        dtype = (a @ b).dtype
    a, b = a.to(dtype), b.to(dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(20))


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@functools.cache
def network(name, device):
    """The network, and the run that draws from it as --sample does: on CUDA compiled."""
    torch.manual_seed(0)
    channels, classes = (1, 10) if name == "digits" else (3, None)
    model, diffusion = ddpm.build(ddpm.preset(name), channels, classes)
    return model, ddpm.Run.ready(ddpm.preset(name), model, diffusion, torch.device(device))


@functools.cache
def peer(name, device):
    """diffusers' U-Net of the same shape, or None where it is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    torch.manual_seed(0)
    digits = dict(
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
    cifar10 = dict(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        dropout=0.1,
    )
    return UNet2DModel(**(digits if name == "digits" else cifar10)).to(device)


def batch(name, device):
    n, size = BATCH[name, device], 8 if name == "digits" else 32
    x = torch.randn(n, 1 if name == "digits" else 3, size, size, device=device)
    t = torch.randint(1000, (n,), device=device)
    return x, t, torch.randint(10, (n,), device=device) if name == "digits" else None


def record(benchmark, what, name, device, work, operations=0, other=None, rounds=9):
    """Time work, and in turn with it other, and add a row to the table."""
    theirs = []

    def before():
        if other:
            theirs.append(timed(other, device))
        return (), {}

    benchmark.pedantic(lambda: timed(work, device), setup=before, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0)
    seconds, n = benchmark.stats.stats.median, BATCH[name, device]
    share = f"{operations / seconds / matrix_rate(name, device):.0%}" if operations else ""
    ratio = f"{statistics.median(theirs) / seconds:.2f}" if other else ""
    ROWS.append(
        [
            what,
            name,
            device,
            f"{1000 * seconds:,.{2 if seconds < 1 else 0}f}",
            f"{n / seconds:,.{'0f' if n > 10 * seconds else '2g'}}",
            share,
            ratio,
        ]
    )
    benchmark.extra_info.update(zip(HEADING, ROWS[-1], strict=False))


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run it where there is one")
on_all = pytest.mark.parametrize(
    "name, device",
    [
        ("digits", "cpu"),
        ("cifar10", "cpu"),
        pytest.param("digits", "cuda", marks=NO_CUDA),
        pytest.param("cifar10", "cuda", marks=NO_CUDA),
    ],
)


@on_all
def test_q_sample(benchmark, name, device):
    x, t, _ = batch(name, device)
    noise, diffusion = torch.randn_like(x), network(name, device)[1].diffusion
    record(benchmark, "q_sample", name, device, lambda: diffusion.q_sample(x, t, noise), rounds=50)


@on_all
def test_forward(benchmark, name, device):
    (x, t, y), (model, run), other = batch(name, device), network(name, device), peer(name, device)
    with torch.no_grad():
        record(
            benchmark,
            "network",
            name,
            device,
            autocast(name, device)(lambda: run.model(x, t, y)),
            flops(lambda: model(x, t, y)),
            other and (lambda: other(x, t, y)),
        )


@on_all
def test_training_step(benchmark, name, device):
    """Forward, backward, clipping and Adam: what Algorithm 1 costs."""
    (x, t, y), (model, run), other = batch(name, device), network(name, device), peer(name, device)
    compiled = ddpm.maybe_compile(ddpm.preset(name), torch.device(device), model.train())

    def loss(network):
        with autocast(name, device):
            return run.diffusion.p_losses(functools.partial(network, y=y), x, t)

    def step(parameters, optimizer, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ours = torch.optim.Adam(model.parameters(), 0.0, fused=True)
    theirs = other and torch.optim.AdamW(other.parameters(), 0.0)
    record(
        benchmark,
        "training step",
        name,
        device,
        lambda: step(model.parameters(), ours, loss(compiled)),
        flops(lambda: step(model.parameters(), ours, loss(model))),
        other and (lambda: step(other.parameters(), theirs, (other(x, t, y).sample - x).square().mean())),
    )
    model.eval()


@on_all
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_one_step(benchmark, name, device, sampler):
    """One reverse step, network included, against diffusers' network and scheduler."""
    (x, t, y), (model, run), other = batch(name, device), network(name, device), peer(name, device)
    given, time_ = autocast(name, device)(functools.partial(run.model, y=y)), torch.full_like(t, 499)
    if other:
        from diffusers import DDIMScheduler, DDPMScheduler

        scheduler = DDPMScheduler(1000) if sampler == "ddpm" else DDIMScheduler(1000, timestep_spacing="trailing")
        scheduler.set_timesteps(50 if sampler == "ddim" else 1000)
    work = (
        (lambda: run.diffusion.p_sample(given, x, 499))
        if sampler == "ddpm"
        else (lambda: run.diffusion.ddim_sample(given, x, 499, 479))
    )
    with torch.no_grad():
        record(
            benchmark,
            f"one {sampler.upper()} step",
            name,
            device,
            work,
            flops(lambda: model(x, t, y)),
            other and (lambda: scheduler.step(other(x, time_, y).sample, 499, x)),
        )


@on_all
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_sampling_end_to_end(benchmark, name, device, steps):
    """From x_T to x_0 by DDIM. The last column is the time of the loop over that of the network's calls in it."""
    (x, t, y), (model, run) = batch(name, device), network(name, device)
    given, inside, whole = autocast(name, device)(functools.partial(run.model, y=y)), [], []

    def watched(x_t, t):
        start = clock(device)
        prediction = given(x_t, t)
        inside.append(clock(device) - start)
        return prediction

    def loop():
        whole.append(timed(lambda: run.diffusion.ddim_sample_loop(watched, x.shape, steps, noise=x), device))

    with torch.no_grad():
        operations = steps * flops(lambda: model(x, t, y))
    record(benchmark, f"DDIM, S = {steps}", name, device, loop, operations, rounds=1 if steps == 1000 else 5)
    ROWS[-1][-1] = f"loop / network = {sum(whole) / sum(inside):.3f}"


# ---- The paper's experiments and the tutorial's exercises: python bench_ddpm.py NAME ---------------------------------


def base(lab):
    """The run that `python ddpm.py --train --data …` makes; it is made if it is not there yet."""
    return finished(ddpm.preset(lab.data, device=lab.device))


def trained(lab, seed, **changes):
    """A run with these changes to the data set's preset and the experiment's budget; how far its samples are from the
    data, four times on its way, goes to curve.csv."""
    name = "-".join([lab.data, str(lab.steps), *(f"{value or 'none'}" for value in changes.values()), f"seed{seed}"])
    budget = dict(steps=lab.steps, sample_every=max(1, lab.steps // 4), log_every=max(1, lab.steps // 20))
    config = ddpm.preset(
        lab.data,
        **changes,
        **budget,
        seed=seed,
        device=lab.device,
        out=f"runs/experiments/{name}",
    )

    images = real(lab)

    def watch(run, step):
        far = frechet(draw(lab, run, sampling_steps=20), images)
        with open(Path(config.out) / "curve.csv", "w" if step == config.sample_every else "a") as file:
            file.write(f"{step},{far}\n")

    return finished(config, watch)


def finished(config, watch=None):
    """The run of a config: read if it is done, gone on with if it was interrupted."""
    checkpoint = None
    if (Path(config.out) / "checkpoint.pt").exists():
        checkpoint = ddpm.read_checkpoint(config.out)
        if dataclasses.replace(checkpoint["config"], device=config.device) != config:
            raise ValueError(f"{config.out} holds a run with other settings: move it away")
    if checkpoint is None or checkpoint["step"] < config.steps:
        ddpm.train(config, checkpoint, watch)
    return ddpm.Run.read(config.out, config.device)


def real(lab, split=None):
    return ddpm.load_data(lab.data, ddpm.preset(lab.data).image_size, split=split)[0]


def draw(lab, run, count=None, labels=None, diffusion=None, **how):
    """Samples, uint8 (N, C, H, W), every class in turn unless given labels; diffusion in place of the run's."""
    count = count or lab.samples
    labels = run.labels(count) if labels is None else labels
    if diffusion:
        run = dataclasses.replace(run, diffusion=diffusion.to(run.device))
    parts = []
    for i in tqdm(range(0, count, lab.batch), unit=" batches", leave=False, disable=None):
        part = None if labels is None else labels[i : i + lab.batch]
        x = ddpm.last(run.trajectory(min(lab.batch, count - i), part, ddpm.derive_seed(lab.seed, "sampling", i), **how))
        parts.append(ddpm.to_pixels(x).cpu())
    return torch.cat(parts)


def with_variance(run, variance):
    """The run's diffusion with another σ_t² of the two fixed ones."""
    return ddpm.build_diffusion(dataclasses.replace(run.config, variance=variance))


def frechet(a, b):
    """‖m − m'‖² + tr(S + S' − 2 (S S')^½) between Gaussians fitted to the pixels of two sets, uint8 (N, C, H, W), which
    are averaged down to 8×8 where they are larger. (The FID is this on the features of an Inception network.)"""

    def fitted(pixels):
        x = ddpm.to_model(pixels)
        x = x if x.shape[-1] <= 8 else functional.adaptive_avg_pool2d(x, 8)
        x = x.flatten(1).double().numpy()
        return x.mean(0), numpy.cov(x.T)

    (m, s), (n, r) = fitted(a), fitted(b)
    root = linalg.eigvals(s @ r).real.clip(0) ** 0.5
    return float(((m - n) ** 2).sum() + numpy.trace(s + r) - 2 * root.sum())


def bits(lab, run, diffusion=None):
    """bits_per_dim of held-out pictures, averaged over them."""
    x = ddpm.to_model(real(lab, "test")[: lab.held_out].to(run.device))
    diffusion = (diffusion or run.diffusion).to(run.device)
    generator = torch.Generator(run.device).manual_seed(lab.seed)
    return {name: terms.mean(0) for name, terms in diffusion.bits_per_dim(run.model, x, generator=generator).items()}


def spread(values, digits=3):
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def show_table(heading, rows):
    for row in [heading, ["---"] * len(heading), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


def column(out, name):
    """A column of the log.csv in a run's folder, with the steps."""
    with open(Path(out) / "log.csv") as file:
        rows = list(csv.DictReader(file))
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def curve(run):
    return zip(
        *(map(float, line.split(",")) for line in (Path(run.config.out) / "curve.csv").read_text().split()),
        strict=False,
    )


def draw_curves(axes, groups):
    """Loss and distance against steps: a line a group, a thin one a seed."""
    for colour, (name, runs) in zip(("C0", "C1", "C2"), groups.items(), strict=False):
        for ax, lines in zip(
            axes, ([column(run.config.out, "loss") for run in runs], [tuple(curve(run)) for run in runs]), strict=False
        ):
            for steps, values in lines:
                ax.plot(steps, values, colour, alpha=0.3, lw=1)
            ax.plot(lines[0][0], numpy.mean([values for _, values in lines], 0), colour, label=name)
    for ax, title in zip(axes, ("training loss, L_simple", "Fréchet distance"), strict=False):
        ax.set(xlabel="step", title=title, yscale="log")


def schedules(lab):
    """Exercise 1: the cosine schedule against the linear one."""
    groups = {name: [trained(lab, seed, schedule=name) for seed in lab.seeds] for name in ("linear", "cosine")}
    figure, axes = lab.plot.subplots(1, 4, figsize=(12, 2.6), layout="constrained")
    rows = []
    for name, runs in groups.items():
        alphas_cumprod = runs[0].diffusion.alphas_cumprod.cpu()
        axes[0].plot(alphas_cumprod, label=name)
        axes[1].plot(alphas_cumprod / (1 - alphas_cumprod), label=name)
        far = [list(curve(run))[1] for run in runs]
        nll = [bits(lab, run)["total"].item() for run in runs]
        rows.append([name, *(spread(each) for each in zip(*far, strict=False)), spread(nll)])
    axes[0].set(xlabel="t", title="ᾱ_t")
    axes[1].set(xlabel="t", title="signal to noise, ᾱ_t/(1 − ᾱ_t)", yscale="log")
    draw_curves(axes[2:], groups)
    axes[0].legend()
    steps = [f"distance, {int(step)} steps" for step in next(curve(runs[0]))]
    show_table(["schedule", *steps, "bits/dim"], rows)
    return figure


def attention(lab):
    """Exercise 2: the network with self-attention, and without any."""
    with_it = ddpm.preset(lab.data).attn_resolutions
    groups = {
        "with attention": [trained(lab, seed, schedule="linear") for seed in lab.seeds],
        "without": [trained(lab, seed, attn_resolutions=()) for seed in lab.seeds],
    }
    rows = []
    for name, runs in groups.items():
        parameters = f"{sum(p.numel() for p in runs[0].model.parameters()):,}"
        loss = [statistics.mean(column(run.config.out, "loss")[1][-5:]) for run in runs]
        far = [list(curve(run))[1][-1] for run in runs]
        rows.append([name, parameters, spread(loss, 4), spread(far)])
    figure, axes = lab.plot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    draw_curves(axes, groups)
    axes[0].legend()
    show_table([f"at {with_it} pixels and in the middle", "parameters", "loss, last quarter", "distance"], rows)
    return figure


def guidance(lab):
    """Exercise 3: what classifier-free guidance buys and costs, judged by a classifier trained on the real pictures."""
    run = base(lab)
    if not run.model.num_classes:
        raise ValueError(f"{lab.data} was learned without labels: guidance needs --data digits")
    judge = classifier(lab)
    images, labels = ddpm.load_data(lab.data, run.config.image_size)
    scales, agreement, diversity, far, examples = (0, 0.5, 1, 2, 4, 8), [], [], [], []
    asked, one_each = run.labels(lab.samples), torch.arange(run.model.num_classes)
    variance = within(images, labels)
    for w in scales:
        pixels = draw(lab, run, guidance=w)
        agreement.append((judge(ddpm.to_model(pixels)).argmax(1) == asked).float().mean().item())
        diversity.append(within(pixels, asked) / variance)
        far.append(frechet(pixels, images))
        examples.append(draw(lab, run, run.model.num_classes, one_each, guidance=w))
    rows = [
        [w, f"{a:.1%}", f"{d:.2f}", f"{f:.3f}"] for w, a, d, f in zip(scales, agreement, diversity, far, strict=False)
    ]
    show_table(["w", "agrees with the label", "variance within a class, real = 1", "distance"], rows)
    figure, (left, *others) = lab.plot.subplots(
        1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=[1, 1.3, 1.3]
    )
    grid = ddpm.make_grid_image(torch.stack(examples, 1).flatten(0, 1), len(scales))
    left.imshow(grid, cmap="gray")
    left.set(xlabel="w", yticks=[])
    left.set_xticks([(i + 0.5) * grid.width / len(scales) for i in range(len(scales))], scales)
    curves = {"agrees with the label, %": [100 * a for a in agreement], "Fréchet distance": far}
    for ax, (title, values) in zip(others, curves.items(), strict=False):
        ax.plot(diversity, values, "o-")
        for w, x, y in zip(scales, diversity, values, strict=False):
            ax.annotate(f"{w}", (x, y), (3, 4), textcoords="offset points")
        ax.set(xlabel="variance within a class, real = 1", title=title)
    return figure


def within(pixels, labels):
    """The variance of pictures about the mean of their class, summed over pixels."""
    return statistics.mean(ddpm.to_model(pixels[labels == k]).var(0).sum().item() for k in labels.unique())


def classifier(lab):
    """A small convolutional network trained on the real pictures that diffusion trains on."""
    (images, labels), (held_out, answers) = (
        ddpm.load_data(lab.data, ddpm.preset(lab.data).image_size, split=split) for split in ("train", "test")
    )
    torch.manual_seed(lab.seed)
    layers = [nn.LazyConv2d(32, 3, padding=1), nn.ReLU(), nn.LazyConv2d(64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.LazyConv2d(64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.4), nn.LazyLinear(128)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.4), nn.Linear(128, int(labels.max()) + 1))
    network(ddpm.to_model(images[:2]))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in tqdm(range(1500), unit=" steps", leave=False, disable=None):
        chosen = torch.randint(len(images), (64,))
        x = ddpm.to_model(images[chosen])
        functional.cross_entropy(network(x + 0.05 * torch.randn_like(x)), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    network = torch.no_grad()(network.eval().forward)
    right = (network(ddpm.to_model(held_out)).argmax(1) == answers).float().mean()
    print(f"the classifier is right on {right:.1%} of {len(answers):,} held-out real pictures")
    return network


def steps(lab):
    """Exercise 4: DDIM and Algorithm 2 in S steps, the quality and the time of each (DDIM's Table 1)."""
    run, images = base(lab), real(lab)
    leading = with_variance(run, "fixed_large")
    leading.ddim_timesteps = lambda s: list(range(0, leading.timesteps, leading.timesteps // s))[s - 1 :: -1]
    small, large = with_variance(run, "fixed_small"), with_variance(run, "fixed_large")
    kinds = {
        "η = 0": dict(eta=0.0),
        "η = 0.5": dict(eta=0.5),
        "η = 1, β̃_t": dict(sampler="ddpm", diffusion=small),
        "β_t": dict(sampler="ddpm", diffusion=large),
        "β_t, times that end at t = 0": dict(sampler="ddpm", diffusion=leading),
    }
    counts = [s for s in (5, 10, 20, 50, 100, 250, 1000) if s <= run.diffusion.timesteps]
    far, seconds = {kind: [] for kind in kinds}, []
    for s in counts:
        for kind, how in kinds.items():
            start = time.perf_counter()
            far[kind].append(frechet(draw(lab, run, sampling_steps=s, **how), images))
            if kind == "η = 0":
                seconds.append(time.perf_counter() - start)
    rows = [
        [s, *(f"{far[kind][i]:.3f}" for kind in kinds), f"{seconds[i]:.1f}", f"{seconds[-1] / seconds[i]:.1f}×"]
        for i, s in enumerate(counts)
    ]
    show_table(["S", *kinds, f"seconds for {lab.samples:,} (η = 0)", "faster"], rows)
    figure, ax = lab.plot.subplots(figsize=(5, 3), layout="constrained")
    for kind, values in far.items():
        ax.plot(counts, values, "o-", label=kind)
    ax.set(xscale="log", yscale="log", xlabel="S, network calls a sample", ylabel="Fréchet distance")
    ax.legend()
    return figure


def objectives(lab):
    """Table 1 and 2: the bound L, L_simple, and L_hybrid with a learned variance: bits against samples."""
    kinds = {
        "L, β_t": (dict(loss="bound"), "fixed_large"),
        "L_simple, β_t": (dict(schedule="linear"), "fixed_large"),
        "L_simple, β̃_t": (dict(schedule="linear"), "fixed_small"),
        "L_hybrid, learned": (dict(variance="learned_range"), "learned_range"),
    }
    few, rows, images = (10, 20, 50), [], real(lab)
    figure, (left, right) = lab.plot.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for name, (changes, variance) in kinds.items():
        results, each_t = [], []
        for seed in lab.seeds:
            run = trained(lab, seed, **changes)
            diffusion = with_variance(run, variance)
            terms = bits(lab, run, diffusion)
            ancestral = functools.partial(draw, lab, run, diffusion=diffusion, sampler="ddpm")
            far = [frechet(ancestral(sampling_steps=s), images) for s in few]
            results.append([terms["total"].item(), terms["L_{t-1}"].sum().item(), terms["L_0"].item(), *far])
            each_t.append(torch.cat([terms["L_0"][None], terms["L_{t-1}"]]).cpu())
        columns = list(zip(*results, strict=False))
        rows.append([name, *(spread(values) for values in columns)])
        left.plot(range(1, run.diffusion.timesteps + 1), torch.stack(each_t).mean(0), label=name)
        right.plot(few, [statistics.mean(values) for values in columns[3:]], "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="t", title="the bound's term at t, bits/dim")
    right.set(xscale="log", yscale="log", xlabel="S", title="Fréchet distance, Algorithm 2 in S steps")
    right.legend()
    show_table(["loss, σ_t²", "NLL ≤, bits/dim", "L_1 … L_{T−1}", "L_0", *(f"distance, S = {s}" for s in few)], rows)
    return figure


def decoding(lab):
    """Fig. 5: rate and distortion as sampling goes on, and one against the other."""
    run = base(lab)
    terms = bits(lab, run)
    rmse = 127.5 * terms["squared_error"].sqrt().flip(0).cpu()
    rate = (terms["L_T"] + functional.pad(terms["L_{t-1}"], (1, 0)).flip(0).cumsum(0)).cpu()
    labels = ("reverse steps", "rate, bits/dim", "distortion, RMSE of 255")
    figure, axes = lab.plot.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for ax, x, y in zip(axes, (range(len(rmse)), range(len(rmse)), rate), (rmse, rate, rmse), strict=False):
        ax.plot(x, y)
    for ax, (x, y) in zip(axes, ((0, 2), (0, 1), (1, 2)), strict=False):
        ax.set(xlabel=labels[x], ylabel=labels[y])
    show_table(
        ["rate, bits/dim", "distortion L_0, bits/dim", "RMSE of 255"],
        [[f"{rate[-1]:.3f}", f"{terms['L_0']:.3f}", f"{rmse[-1]:.2f}"]],
    )
    return figure


def progress(lab):
    """§2 and Fig. 6 as strips: x_0 drowning in noise; x_t coming out of it; and x̂_0, what the network makes of x_t."""
    run, images, rows = base(lab), real(lab), 4
    last = run.diffusion.timesteps - 1
    shown = [round(last * i / 11) for i in range(12)]
    x_start = ddpm.to_model(images[:: len(images) // rows][:rows]).to(run.device)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(lab.seed)).to(run.device)
    forwards = [run.diffusion.q_sample(x_start, t, noise) for t in shown]
    model, labels = run.model, torch.arange(rows, device=run.device) * 3 + 1
    if run.model.num_classes:
        model = ddpm.classifier_free_guidance(run.model, labels % run.model.num_classes, 0)
    torch.manual_seed(lab.seed)
    x_t, backwards, guesses = torch.randn_like(x_start), [], []
    with torch.no_grad():
        for t in reversed(range(last + 1)):
            if t in shown:
                backwards.append(x_t)
                guesses.append(run.diffusion.p_mean_variance(model, x_t, t)[3])
            x_t = run.diffusion.p_sample(model, x_t, t)
    backwards[-1] = x_t
    strips = [torch.stack(strip, 1).flatten(0, 1) for strip in (forwards, backwards, guesses)]
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(strips)), len(shown))


DEPTHS = (999, 750, 500, 250, 125)


def sharing(lab):
    """Fig. 7: samples that share x_t, a row for each t: x_0, x_t, and eight pictures that p_θ makes of it."""
    run, images, rows = base(lab), real(lab), []
    x_start = ddpm.to_model(images[len(images) // 3][None]).to(run.device)
    for t in DEPTHS:
        torch.manual_seed(lab.seed)
        x_t = run.diffusion.q_sample(x_start, t)
        x = ddpm.last(run.diffusion.p_sample_steps(run.model, x_t.expand(8, *x_t.shape[1:]), t))
        rows.append(torch.cat([x_start, x_t, x]))
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), 10)


def interpolation(lab):
    """Fig. 8: between two real pictures, λ from 0 to 1, a row for each depth t."""
    run, images, rows = base(lab), real(lab), []
    a, b = (ddpm.to_model(images[i][None]).to(run.device) for i in (len(images) // 3, len(images) * 3 // 4))
    weights = torch.linspace(0, 1, 9, device=run.device).reshape(-1, 1, 1, 1)
    for t in DEPTHS:
        torch.manual_seed(lab.seed)
        many, noise = (9, *a.shape[1:]), torch.randn_like(a)
        x = run.diffusion.interpolate(run.model, a.expand(many), b.expand(many), t, weights, noise.expand(many))
        rows.append(torch.cat([a, x, b]))
    return ddpm.make_grid_image(ddpm.to_pixels(torch.cat(rows)), 11)


def training_cost(batch, size, device):
    """Seconds and peak bytes of a step of ddpm.train, the paper's settings but for the batch and the pictures' size."""
    ddpm.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            noise = torch.randint(256, (3, size, size), dtype=torch.uint8)
            to_pil_image(noise).save(Path(folder) / f"{i}.png")
        shape = dict(data=folder, image_size=size, batch_size=batch, device=device)
        config = dataclasses.replace(ddpm.preset("cifar10"), **shape, steps=3, log_every=1, out=f"{folder}/run")
        out = ddpm.train(config, watch=lambda run, step: None)
        seconds = batch / column(out, "images_per_second")[1][-1]
    if ddpm.pick_device(device).type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost(lab):
    """What a training step of the paper's network costs, in time and in memory, by batch and by pixels."""
    figure, axes = lab.plot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    lines = {"batch": [(16, 32), (32, 32), (64, 32), (128, 32)], "size": [(16, 16), (16, 32), (16, 64)]}
    seconds, peaks = {}, {}
    for case in sorted({*lines["batch"], *lines["size"]}):  # each in a process of its own, which alone knows its peak
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            seconds[case], peak = fresh.submit(training_cost, *case, lab.device).result()
            peaks[case] = peak / 2**30
    for what, cases in lines.items():
        for ax, values in zip(axes, (seconds, peaks), strict=False):
            x = [n * size**2 / 1024 for n, size in cases]
            ax.plot(x, [values[case] for case in cases], "o-", label=f"by {what}")
    rows = [
        [n, f"{size}×{size}", f"{seconds[n, size]:.2f}", f"{1000 * seconds[n, size] / n:.0f}", f"{peak:.2f}"]
        for (n, size), peak in peaks.items()
    ]
    axes[0].set(xlabel="batch × pixels / 32²", title="seconds a step", xlim=0, ylim=0)
    axes[1].set(xlabel="batch × pixels / 32²", title="peak memory, GiB", xlim=0, ylim=0)
    axes[0].legend()
    show_table(["batch", "pixels", "seconds a step", "milliseconds a picture", "peak, GiB"], rows)
    return figure


EXPERIMENTS = (schedules, attention, guidance, steps, objectives, decoding, progress, sharing, interpolation, cost)


def main():
    parser = argparse.ArgumentParser(
        description="The paper's experiments and the tutorial's exercises: a table, and a picture.",
        epilog="\n".join(f"{each.__name__:14} {each.__doc__.splitlines()[0]}" for each in EXPERIMENTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=[each.__name__ for each in EXPERIMENTS])
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion_mnist or cifar10 (digits)")
    parser.add_argument("--steps", type=int, default=500, help="training steps where networks are compared (500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings (0 1 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (0)")
    parser.add_argument("--samples", type=int, default=1797, help="samples a distance is measured on (1797)")
    parser.add_argument("--batch", type=int, default=600, help="samples drawn at once (600)")
    parser.add_argument("--held-out", type=int, default=180, help="held-out pictures whose bits are measured (180)")
    parser.add_argument("--device", help="cuda, mps or cpu; unless said, the first of them that is there")
    parser.add_argument("--pictures", type=Path, default=Path("runs"), help="folder the picture goes to (runs)")
    parser.error = lambda message: parser.exit(2, f"bench_ddpm.py: error: {message}\n")
    lab = parser.parse_args()
    try:
        lab.plot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        parser.error("the curves are drawn by matplotlib: pip install matplotlib")
    start = time.perf_counter()
    try:
        drawn = globals()[lab.experiment](lab)
    except (ValueError, OSError) as error:
        parser.error(error)
    lab.pictures.mkdir(parents=True, exist_ok=True)
    path = lab.pictures / f"{lab.experiment}.png"
    drawn.save(path) if hasattr(drawn, "save") else drawn.savefig(path, dpi=90)
    print(path)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
