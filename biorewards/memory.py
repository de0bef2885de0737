"""How many crops fit: batch sizes from the memory that is free."""

from __future__ import annotations

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
