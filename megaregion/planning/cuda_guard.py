"""Loads what autograd asks of CUDA into a build of torch that has none; must run before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from megaregion.errors import UserError

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def load_guard() -> None:
    """Make this process one in which CUDA seems to be there; a build of torch for CUDA answers by itself.

    Raises:
        UserError: There is no C++ compiler, or it fails; or torch is built for CUDA and there is no GPU.
    """
    assert "torch" not in sys.modules, "torch asks for CUDA's hooks once, when it is first used"
    if not (_torch() / "lib" / "libtorch_cuda.so").exists():
        ctypes.CDLL(str(build_guard()))
    elif not Path("/dev/nvidia0").exists():
        raise UserError(
            "--device cuda without a GPU needs torch's build for processors, and this one is for CUDA; "
            "install it in another environment (--index-url https://download.pytorch.org/whl/cpu)"
        )


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_guard() -> Path:
    """Compile the library, once for a version of torch and of its source; returns its file."""
    torch = _torch()
    version = (torch / "version.py").read_bytes()
    name = hashlib.sha256(version + SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"megaregion-{os.getuid()}" / f"guard-{name}.so"
    if library.exists():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise UserError("--device cuda without a GPU needs g++ to build its 40 lines of C++; install g++")
    library.parent.mkdir(mode=0o700, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [
        compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}",
        f"-I{torch / 'include/torch/csrc/api/include'}", str(SOURCE), "-o", str(partial),
        f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"g++ cannot build {SOURCE}: {done.stderr.strip().splitlines()[0]}")
    partial.replace(library)
    return library
