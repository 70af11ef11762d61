"""What a number may depend on beside the options: device, types, versions."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch


class Environment(TypedDict):
    """``environment`` in ``results.json``."""

    device: str
    device_type: str
    cpu_threads: int
    dtypes: dict[str, str]
    python: str
    versions: dict[str, str]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory taken so far: on the GPU by tensors, otherwise by this process."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device, dtype: str) -> Environment:
    """Return device, types and versions, as ``results.json`` holds them.

    Args:
        device: Where members were trained.
        dtype: Type of their weights.
    """
    packages = ("torch", "lightning", "torchmetrics", "ntk-ensembles")
    return {
        "device": _gpu_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "dtypes": {"weights": dtype.removeprefix("torch."), "stored_deviations": "float16"},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _gpu_name(device: torch.device) -> str:
    """Return the model, if it is in this machine: runs can be merged elsewhere."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "a GPU of another machine"


def _cpu_name() -> str:
    """Return the processor's model where the system knows it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
