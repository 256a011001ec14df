"""The machine: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from local_distill.benchmarking.cases import Way
from local_distill.benchmarking.timing import calls_to_fill, device_clock, take_turns

__all__ = ["Machine", "Rates", "describe_machine", "measure_rates"]


class Rates(NamedTuple):
    """What the machine was seen to reach, the best of some repeats.

    Attributes:
        copy_bytes: bytes a second, read and written, of a copy far larger than the caches.
        product_flops: floating-point operations a second of a large square product.
    """

    copy_bytes: float
    product_flops: float


class Machine(NamedTuple):
    """What was measured on; no names of hosts or people.

    Attributes:
        processor: the CPU's name.
        cores: how many this process may use.
        threads: torch's.
        device: the GPU's name, or "cpu".
        system: of the operating system.
        load: load average over the last minute when the run began, None where there is none.
        python: version.
        torch: version.
    """

    processor: str
    cores: int
    threads: int
    device: str
    system: str
    load: float | None
    python: str
    torch: str


def describe_machine(device: torch.device) -> Machine:
    """This machine, as far as it can be seen."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _all_cores(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        system=f"{platform.system()} {platform.machine()}",
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        torch=str(torch.__version__),
    )


def _all_cores() -> int:
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_rates(
    device: torch.device, dtype: torch.dtype, *, repeats: int = 15, quick: bool = False
) -> Rates:
    """Copy bandwidth and product rate of this machine, with the threads that torch has now.

    Args:
        device: where.
        dtype: of the product.
        repeats: the best of these counts.
        quick: smaller tensors; what fits into large caches is then copied faster than memory is.
    """
    large = device.type == "cuda"
    shrink = 8 if quick else 1
    copied = _copy_rate((1024 if large else 512) * 2**20 // shrink, device, repeats)
    return Rates(
        copied,
        _product_rate((8192 if large else 2048) // (4 if quick else 1), device, dtype, repeats),
    )


def _copy_rate(count: int, device: torch.device, repeats: int) -> float:
    """Bytes a second, of ``count`` bytes read and as many written."""
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, repeats)


def _product_rate(side: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Flops a second, of two square matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2.0 * side**3 / _best(lambda: torch.mm(left, right, out=product), device, repeats)


def _best(way: Way, device: torch.device, repeats: int) -> float:
    clock = device_clock(device)
    way()
    calls_to_fill(way, 0.02, clock)  # the clock rate of an idle machine takes a while to rise
    return min(take_turns({"it": way}, repeats=repeats, least_seconds=0.02, clock=clock)["it"])
