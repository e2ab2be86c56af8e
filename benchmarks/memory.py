"""Peak extra memory of a call, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

import torch

# A child process builds what it measures from this: () -> (small call for warming up, the call itself).
Build = Callable[..., tuple[Callable[[], object], Callable[[], object]]]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure(build: Build, arguments: tuple[object, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    warm, call = build(*arguments)
    warm()
    warm()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _child(pipe, build: Build, arguments: tuple[object, ...], threads: int) -> None:  # type: ignore[no-untyped-def]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends this process
    try:
        pipe.send(_measure(build, arguments, threads))
    except Exception as error:  # the parent raises it with the child's words
        pipe.send(f"{type(error).__name__}: {error}")


def peak_extra_cpu(build: Build, arguments: tuple[object, ...], threads: int) -> int:
    """Bytes by which resident memory rose above its level before the call, at the peak of one call.

    The child starts clean (fork server), runs a small call twice, so that libraries and thread pools are loaded, and
    gives free memory back; then the call's own buffers are what raises the high-water mark. Resolution: a page a
    buffer, and the kernel's counters are batched, so figures below about 0.5 MiB mean "none".
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, build, arguments, threads))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = "the child ended without an answer"
    except KeyboardInterrupt:
        process.kill()
        raise
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"measuring memory failed: {answer}")
    return int(answer)


def peak_extra_cuda(call: Callable[[], object]) -> int:
    """Bytes allocated above the level before the call, at the peak of one call on the current GPU."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
