"""How fast ddpm.py is, and what share of the machine that is.

    pytest bench_ddpm.py            # CPU, and CUDA where there is one; a table at the end
    pip install diffusers           # adds the same network and steps of diffusers, timed in turn with ours

Every share is measured within the run: floating-point operations, counted by torch, a second, over the rate of a large
float32 matrix product on the same device. A ratio to diffusers is the median of its times over the median of ours,
taken alternately. Absolute times depend on the machine and on what else it does; shares and ratios hardly do.
"""

import functools
import statistics
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ddpm

BATCH = {("digits", "cpu"): 128, ("cifar10", "cpu"): 2, ("digits", "cuda"): 2048, ("cifar10", "cuda"): 128}
ROWS = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """One table when all is done."""
    yield
    heading = ("what", "network", "device", "milliseconds", "images/s", "of the matrix rate", "diffusers' time / ours")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n")
        for row in [heading, *ROWS]:
            print("| {:26} | {:7} | {:6} | {:>12} | {:>8} | {:>18} | {:>22} |".format(*row))


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, device):
    start = clock(device)
    work()
    return clock(device) - start


@functools.cache
def matrix_rate(device):
    """Floating-point operations a second of a float32 matrix product, the best of 20."""
    n = 8192 if device == "cuda" else 1536
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(20))


@functools.cache
def network(name, device):
    torch.manual_seed(0)
    channels, classes = (1, 10) if name == "digits" else (3, None)
    model, diffusion = ddpm.build(ddpm.preset(name), channels, classes)
    return model.to(device, memory_format=torch.channels_last), diffusion.to(device)


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
    return (
        x,
        torch.randint(1000, (n,), device=device),
        torch.randint(10, (n,), device=device) if name == "digits" else None,
    )


def record(benchmark, what, name, device, work, other=None, rounds=9):
    """Time work, and in turn with it other, and add a row to the table."""
    for each in (work, other or work):
        each()
    theirs = []
    with FlopCounterMode(display=False) as counter:
        work()

    def both():
        if other:
            theirs.append(timed(other, device))
        return (), {}

    benchmark.pedantic(lambda: timed(work, device), setup=both, rounds=rounds)
    seconds, n = benchmark.stats.stats.median, BATCH[name, device]
    flops = counter.get_total_flops()
    ROWS.append(
        (
            what,
            name,
            device,
            f"{1000 * seconds:.2f}",
            f"{n / seconds:.0f}",
            f"{flops / seconds / matrix_rate(device):.0%}" if flops else "",
            f"{statistics.median(theirs) / seconds:.2f}" if other else "",
        )
    )
    benchmark.extra_info.update(zip(("what", "network", "device", "ms", "images/s", "share", "ratio"), ROWS[-1]))


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
    noise, diffusion = torch.randn_like(x), network(name, device)[1]
    record(benchmark, "q_sample", name, device, lambda: diffusion.q_sample(x, t, noise), rounds=50)


@on_all
def test_forward(benchmark, name, device):
    (x, t, y), model, other = batch(name, device), network(name, device)[0].eval(), peer(name, device)
    last = x.contiguous(memory_format=torch.channels_last)
    record(
        benchmark,
        "network",
        name,
        device,
        torch.inference_mode()(lambda: model(last, t, y)),
        other and torch.inference_mode()(lambda: other(x, t, y)),
    )


@on_all
def test_training_step(benchmark, name, device):
    """Forward, backward, clipping and Adam: what Algorithm 1 costs. Autocast as training decides it, diffusers in
    float32."""
    (x, t, y), (model, diffusion), other = batch(name, device), network(name, device), peer(name, device)
    model.train()
    last, config = x.contiguous(memory_format=torch.channels_last), ddpm.preset(name)

    def step(parameters, optimizer, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ours = torch.optim.Adam(model.parameters(), 0.0, fused=True)
    theirs = other and torch.optim.AdamW(other.parameters(), 0.0)

    def work():
        with ddpm.autocast(config, torch.device(device)):
            loss = diffusion.p_losses(functools.partial(model, y=y), last, t)
        step(model.parameters(), ours, loss)

    record(
        benchmark,
        "training step",
        name,
        device,
        work,
        other and (lambda: step(other.parameters(), theirs, (other(x, t, y).sample - x).square().mean())),
        rounds=7,
    )
    model.eval()


@on_all
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_one_step(benchmark, name, device, sampler):
    """One reverse step, network included, against diffusers' network and scheduler."""
    (x, t, y), (model, diffusion), other = batch(name, device), network(name, device), peer(name, device)
    last, given = x.contiguous(memory_format=torch.channels_last), functools.partial(model, y=y)
    if other:
        from diffusers import DDIMScheduler, DDPMScheduler

        scheduler = DDPMScheduler(1000) if sampler == "ddpm" else DDIMScheduler(1000, timestep_spacing="trailing")
        scheduler.set_timesteps(50 if sampler == "ddim" else 1000)
    work = (
        (lambda: diffusion.p_sample(given, last, 500))
        if sampler == "ddpm"
        else (lambda: diffusion.ddim_sample(given, last, 499, 479))
    )
    time_ = torch.full_like(t, 499)
    record(
        benchmark,
        f"one {sampler.upper()} step",
        name,
        device,
        torch.inference_mode()(work),
        other and torch.inference_mode()(lambda: scheduler.step(other(x, time_, y).sample, 499, x)),
    )


@on_all
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_sampling_end_to_end(benchmark, name, device, steps):
    """From x_T to x_0 by DDIM; the last column is this over S times the bare network, which the loop may exceed by
    little."""
    if device == "cpu" and (steps == 1000 or name == "cifar10" and steps > 10):
        pytest.skip(f"{steps} steps of {name} take minutes on a CPU: run it on a CUDA device")
    (x, t, y), (model, diffusion) = batch(name, device), network(name, device)
    last, given = x.contiguous(memory_format=torch.channels_last), functools.partial(model.eval(), y=y)
    with torch.inference_mode():
        bare = lambda: [given(last, t) for _ in range(steps)]
        loop = lambda: diffusion.ddim_sample_loop(given, x.shape, steps, noise=last)
        loop(), bare()
        pairs = [(timed(loop, device), timed(bare, device)) for _ in range(3)]
        record(benchmark, f"DDIM, S = {steps}", name, device, torch.inference_mode()(loop), rounds=3)
    ratio = statistics.median(a / b for a, b in pairs)
    ROWS[-1] = (*ROWS[-1][:-1], f"loop / bare = {ratio:.3f}")
