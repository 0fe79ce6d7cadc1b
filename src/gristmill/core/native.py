"""Just-in-time build of C++ kernels: once a machine, in a few seconds, loaded through ctypes with no header of torch.

Without a compiler, or with GRISTMILL_KERNELS=0, there are none, and torch computes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gristmill.core.io import sync

FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
FOLDER = Path(__file__).parent  # of vectors.h, which kernels of all parts include
BUILD_SECONDS = 300
log = logging.getLogger(__name__)


def build_library(sources: Sequence[Path], name: str) -> ctypes.CDLL | None:
    """The compiled library of some source files, or None where it cannot be had. It is kept in the user's cache under this name."""
    if os.environ.get("GRISTMILL_KERNELS") == "0":
        return None
    compiler = os.environ.get("CXX", "g++")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
    try:
        path = folder / f"{name}-{_key(compiler, sources)}.so"
        if not path.exists():
            _build(compiler, sources, path)
        return ctypes.CDLL(str(path))
    except subprocess.TimeoutExpired:
        log.warning("The compiler took over %d s: torch computes instead of the %s kernels, slower.", BUILD_SECONDS, name)
    except (OSError, subprocess.SubprocessError) as e:
        log.info("no compiled %s kernels, torch computes instead: %s", name, e)
    return None


def _key(compiler: str, sources: Sequence[Path]) -> str:
    """Cache key: another source or header beside one, compiler or processor needs another library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=BUILD_SECONDS).stdout
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if cpu.exists() else ""
    headers = sorted(header for folder in {FOLDER, *(source.parent for source in sources)} for header in folder.glob("*.h"))
    files = (file.read_bytes() for file in (*sources, *headers))
    parts = (*files, version, " ".join(FLAGS).encode(), flags.encode(), platform.machine().encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=10).hexdigest()


def _build(compiler: str, sources: Sequence[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:  # beside the goal, so that the last step is a rename
        built = Path(temporary) / path.name
        command = [compiler, *FLAGS, f"-I{FOLDER}", "-o", str(built), *map(str, sources)]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
        sync(built)  # half a library would crash whoever loads it
        built.replace(path)
