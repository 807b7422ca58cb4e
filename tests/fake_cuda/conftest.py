"""The CUDA device that does nothing, compiled once."""

import shutil
from pathlib import Path

import pytest
import torch

from support import processes
from support.paths import SUPPORT


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    """The compiled device."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile a device that does nothing")
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    source = SUPPORT / "fake_cuda_device.cpp"
    done = processes.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", *headers, source, "-o", library, *libraries], limit=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return library
