"""Scoring beside sampling, and where a step's time goes."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from rl.rewards import Judge, Judged


class Clock:
    """Seconds of a step's parts; on a GPU its work is waited for at every lap."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.began = self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str, less: float = 0.0) -> None:
        """Put the time since the last lap down to `name`, less what belongs elsewhere."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last - less
        self.last = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self.last - self.began


class Scorer:
    """Scores batches in the order given: on a GPU in a thread with a stream of its own, while the next batch is
    rolled out; on a CPU at once, where two would only share the cores. Numbers are the same either way.

    seconds: that scoring took, whether or not something else ran beside it.
    """

    def __init__(self, judge: Judge, device: torch.device) -> None:
        self.judge, self.device, self.seconds = judge, device, 0.0
        self.overlaps = device.type == "cuda"
        self._parts: list[Future[Judged]] = []

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score") if self.overlaps else None
        self._stream = torch.cuda.Stream(self.device) if self.overlaps else None  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, images: Tensor, target: Tensor) -> None:
        """Score images (B, C, H, W) in [0, 1] of classes target (B,)."""
        if self._pool is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self.device))
            self._parts.append(self._pool.submit(self._beside, images, target, ready))
            return
        done: Future[Judged] = Future()
        done.set_result(self._score(images, target))
        self._parts.append(done)

    def _beside(self, images: Tensor, target: Tensor, ready: torch.cuda.Event) -> Judged:
        with torch.cuda.stream(self._stream):
            ready.wait(self._stream)
            return self._score(images, target)  # ends with copies to the CPU, which wait for the stream

    def _score(self, images: Tensor, target: Tensor) -> Judged:
        began = time.perf_counter()
        judged = self.judge(images, target)
        self.seconds += time.perf_counter() - began
        return judged

    def result(self) -> Judged:
        """All scores, in order; waits for them. Raises what scoring raised."""
        parts = [part.result() for part in self._parts]
        return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))
