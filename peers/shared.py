"""What the adapters share. An adapter translates arguments and nothing else: the package computes."""

import contextlib
import unittest
from unittest import mock

import numpy as np
import torch


def lacks(what):
    """Skips the test: the package has no such thing."""
    raise unittest.SkipTest(f"the package has no {what}")


@contextlib.contextmanager
def computing_in(dtype):
    """Where a package says float32, it computes in dtype, so that a red test in float64 is not one of rounding."""
    in_numpy = np.float64 if dtype == torch.float64 else np.float32
    with mock.patch.object(torch, "float32", dtype), mock.patch.object(np, "float32", in_numpy):
        yield


@contextlib.contextmanager
def drawing(dtype, noise=None, generator=None):
    """torch.randn and torch.randn_like return noise first, if it is given, and then draw from the generator."""
    if isinstance(generator, list):
        lacks("generator for each image")
    given, randn = [] if noise is None else [noise], torch.randn

    def draw(shape, **options):
        if given and given[0].shape != torch.Size(shape):
            lacks("noise argument here")
        options["dtype"] = options.get("dtype") or dtype
        return given.pop() if given else randn(shape, **{"generator": generator, **options})

    def draw_like(x):
        return draw(x.shape, dtype=x.dtype, device=x.device)

    with mock.patch.object(torch, "randn", draw), mock.patch.object(torch, "randn_like", draw_like):
        yield


def as_batch(t, x):
    return t if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)


def as_images(x):
    """x as (B, C, H, W), which is all that some packages accept; None stays None."""
    return x if x is None or x.dim() == 4 else x.flatten(1)[:, :, None, None]
