"""What a model and this process hold in memory, measured."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

from derm_compress.model.memory import GIB


def tensor_gib(model) -> float:
    """GiB of parameters, buffers and bitsandbytes' states; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [tensor.quant_state for tensor in tensors if getattr(tensor, "quant_state", None)]
    states += [state.state2 for state in states if state.state2]
    for state in states:
        tensors += [state.absmax, state.code]
    scales = [getattr(tensor, "SCB", None) for tensor in tensors]  # LLM.int8's
    tensors += [scale for scale in scales if scale is not None]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values()) / GIB


def peak_gib(device: str = "cpu") -> float:
    """Peak of the process's resident memory, or of CUDA's allocated memory since its last reset."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    try:  # on Linux getrusage would start from the parent's peak
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # macOS counts in bytes


def host_gib() -> float:
    """GiB of the host's memory that can still be had."""
    import psutil

    return psutil.virtual_memory().available / GIB


def reset_peak(device: str = "cpu") -> None:
    """Makes peak_gib start anew, a GPU's free memory given back; off Linux a CPU's stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if str(device).startswith("cuda"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def resident_gib(device: str = "cpu") -> dict[str, float]:
    """rss_gib, rss_peak_gib of this process; on CUDA also what was allocated, reserved, in use."""
    import psutil

    held = {"rss_gib": psutil.Process().memory_info().rss / GIB, "rss_peak_gib": peak_gib()}
    if str(device).startswith("cuda"):
        from torch import cuda

        held |= {
            "allocated_peak_gib": peak_gib(device),
            "reserved_peak_gib": cuda.max_memory_reserved(device) / GIB,
        }
        free, total = cuda.mem_get_info(device)
        held["device_used_gib"] = (total - free) / GIB
    return held
