"""The proof on public implementations: what is red there, and no more, is what peers/expected.txt lists."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PEERS = dict(
    denoising_diffusion_pytorch="denoising-diffusion-pytorch==2.3.4",
    diffusers="diffusers==0.42.1",
    diffusers_unet="diffusers==0.42.1",
    labml_nn="labml-nn==0.5.1",
    smalldiffusion="smalldiffusion==0.5.0",
)


@pytest.mark.parametrize("adapter, package", PEERS.items(), ids=PEERS)
def test_a_peer_is_red_where_it_is_known_to_be(adapter, package):
    """A line of expected.txt is the start of the names of red tests, and of no green one; each red test has a line."""
    name, version = package.split("==")
    if version not in [each.version for each in importlib.metadata.distributions(name=name)]:
        pytest.skip(f"pip install {package}")
    lines = (HERE / "peers/expected.txt").read_text().splitlines()
    known = [line.split(" ", 1)[1].rsplit(" ", 1)[0] for line in lines if line.startswith(f"{adapter} ")]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "test_ddpm.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "DDPM"))}
    environment["DDPM"] = f"peers/{adapter}.py"
    out = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True).stdout
    results = re.findall(r"^(PASSED|FAILED) \S*?::(.*?)(?: - .*)?$", out, re.MULTILINE)
    red = [test for result, test in results if result == "FAILED"]
    green = [test for result, test in results if result == "PASSED"]
    assert green, out
    assert [test for test in red if not test.startswith(tuple(known))] == [], "red, and not known to be"
    assert [start for start in known if not any(test.startswith(start) for test in red)] == [], "not red any more"
    assert [test for test in green if test.startswith(tuple(known))] == [], "green, and known to be red"
