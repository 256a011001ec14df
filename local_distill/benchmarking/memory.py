"""Memory: the most that one call has alive at a time."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile

from local_distill.benchmarking.cases import Way

__all__ = ["peak_bytes"]


def peak_bytes(way: Way, device: torch.device) -> int:
    """The highest sum of bytes that one call had from torch's allocator, its result included.

    Convention: what was there before the call does not count. On a CPU the sum is that of the
    profiler's record of allocations; buffers of the BLAS do not go through torch's allocator.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000).relu_(), torch.device("cpu"))
        4000
    """
    return _on_cuda(way, device) if device.type == "cuda" else _on_cpu(way)


def _on_cpu(way: Way) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of each start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = way()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del kept
    return peak


def _on_cuda(way: Way, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = way()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
