"""What the GPU benchmarks share: time of calls, and what the device can do at best."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

ROUNDS_MS = 200.0  # a figure is the median over so many milliseconds of replays, or over two


class Timing(NamedTuple):
    """Milliseconds of a call, and how they were measured: "replayed", "launched" or by the host's "clock"."""

    ms: float
    how: str


class Limits(NamedTuple):
    """What this device reached: bytes per second of a copy, reading and writing, and FLOP per second of a matrix product."""

    bandwidth: float
    rate: float

    def milliseconds(self, bytes_moved: float, operations: float) -> float:
        """The least time that moves so many bytes and computes so many operations."""
        return max(bytes_moved / self.bandwidth, operations / self.rate) * 1e3


def replay_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one of the calls, from replays of a CUDA graph of them all: without the time that launching takes.

    With inputs that together are larger than the GPU's cache, the calls find nothing of each other in it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is compiled at the first launch
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    try:
        return _median_ms(graph.replay) / len(calls)
    finally:
        graph.reset()


def launched_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """The same by launching: for calls that wait for the device, or that a CUDA graph cannot hold."""

    def once() -> None:
        for call in calls:
            call()

    once()
    return _median_ms(once) / len(calls)


def _median_ms(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < ROUNDS_MS and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """The same on a CPU, by the clock, once each: to try things out."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e3 / len(calls)


def timing(calls: Sequence[Callable[[], Any]], device: torch.device, waits: bool = False) -> Timing:
    """Time of one of the calls on this device, launched if they wait for it or a graph cannot hold them."""
    if device.type != "cuda":
        return Timing(host_ms(calls), "clock")
    if not waits:
        try:
            return Timing(replay_ms(calls), "replayed")
        except RuntimeError:  # if it is about more than the graph, it comes again
            torch.cuda.synchronize()
    return Timing(launched_ms(calls), "launched")


def measure_limits(device: torch.device, tiny: bool) -> Limits:
    """Copy 4 GB and multiply two 8192 x 8192 bfloat16 matrices of random numbers."""
    numbers, side = (1 << 12, 32) if tiny else (1 << 30, 8192)
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, device=device, generator=generator).bfloat16()
    rate = 2 * side**3 / (timing([lambda: left @ right] * 4, device).ms * 1e-3)
    source = torch.empty(numbers, dtype=torch.float32, device=device).normal_(generator=generator)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (timing([lambda: target.copy_(source)] * 2, device).ms * 1e-3)
    return Limits(bandwidth, rate)
