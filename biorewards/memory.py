"""Batch sizes from the memory that is free, and freed memory that is kept for the next batch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

#: Crops a batch where memory is no concern. On a CPU larger batches fall out of the cache and are no faster; on a
#: GPU they fill the device.
WANTED = {"cpu": 16, "cuda": 256}
#: Memory that a crop's activations and masks take at their peak, bytes a pixel (measured with bundled networks: 250).
BYTES_A_PIXEL = 300
#: Share of the free memory that batches may take.
SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be had on a device; of a container's own limit where it has one."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def choose_batch_size(device: torch.device | str, pixels: int, at_once: int = 1) -> int:
    """Crops of `pixels` px that a batch may hold with `at_once` batches at work: a power of two, at least 1."""
    wanted = WANTED.get(torch.device(device).type, WANTED["cuda"])
    fit = int(SHARE * free_bytes(device) / (BYTES_A_PIXEL * pixels * at_once))
    return max(1, min(wanted, 1 << max(0, fit.bit_length() - 1)))


#: Parameters of glibc's `mallopt` by the environment variables of the same meaning, and what they are set to, bytes:
#: blocks up to 32 MiB (the most that it takes) come from the heap, which is handed back from 1 GiB on.
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30), "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20)}


def keep_freed_memory() -> bool:
    """Let glibc keep what a batch frees for the next one: without, a tenth of the time goes into page faults.

    For the whole process, so it is for programs to call, not for the library. A variable of the same meaning in the
    environment is left alone. Returns whether anything was set; other allocators are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    taken = [mallopt(*pair) for name, pair in _MALLOPT.items() if name not in os.environ]
    return any(taken)
