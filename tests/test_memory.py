"""Batch sizes follow the memory that is free."""

from __future__ import annotations

import pytest

from biorewards import memory


@pytest.mark.parametrize(
    ("free", "pixels", "at_once", "wanted"),
    [
        (10**12, 96 * 96, 1, 16),  # plenty: the size that is fastest on a CPU
        (2 * memory.BYTES_A_PIXEL * 9216 * 8, 9216, 1, 8),  # half of it holds exactly eight crops
        (2 * memory.BYTES_A_PIXEL * 9216 * 8, 9216, 2, 4),  # two batches at work share it
        (2 * memory.BYTES_A_PIXEL * 9216 * 7, 9216, 1, 4),
        (0, 9216, 1, 1),  # never nothing
    ],
)
def test_the_batch_is_the_largest_power_of_two_that_fits(
    free: int, pixels: int, at_once: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert memory.choose_batch_size("cpu", pixels, at_once) == wanted


def test_a_container_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes("cpu") > 0, "no limit file: what the machine has"
    (tmp_path / "memory.current").write_text("60\n")
    (tmp_path / "memory.max").write_text("100\n")
    assert memory.free_bytes("cpu") == 40
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes("cpu") > 10**6


def test_freed_memory_is_kept_but_for_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(key: int, value: int) -> int:
            seen.append((key, value))
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    for name in memory._MALLOPT:
        monkeypatch.delenv(name, raising=False)
    assert memory.keep_freed_memory() and sorted(key for key, _ in seen) == [-3, -1]
    seen.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert memory.keep_freed_memory() and [key for key, _ in seen] == [-3]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # a libc without mallopt
    assert not memory.keep_freed_memory()
