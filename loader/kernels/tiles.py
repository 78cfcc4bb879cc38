"""Work on rows of a weight in tiles, on every core of a CPU: a thread takes the next tile when it is done with one.

On Linux these are torch's own threads. After an operation they keep their cores for milliseconds, waiting for another
one, so that other threads would have to wait for them: steps with threads of a pool take up to a quarter longer. Where
torch's OpenMP has no call for it, and in a forked process, which has none of its parent's threads, there is such a
pool, which needs threadpoolctl.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

try:
    from threadpoolctl import threadpool_limits
except ImportError:
    threadpool_limits = None

FIRST_PROCESS = os.getpid()

_local = threading.local()
_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def in_tiles(work: Callable[[int, int], object], rows: int, tile_rows: int) -> None:
    """Calls ``work(start, stop)`` for tiles of at most ``tile_rows`` rows, on as many threads as torch has.

    The torch operations of each thread stay on its own core; where there are neither torch's threads nor a pool's, all
    tiles are taken by the caller, and torch's threads share each operation. They run in inference mode and without
    autocast, whatever the caller's mode.

    Raises:
        what ``work`` raises first; tiles that no thread has begun by then are left.
    """
    threads = torch.get_num_threads()
    rounds = max(1, -(-rows // (max(1, tile_rows) * threads)))
    tile_rows = max(1, -(-rows // (rounds * threads)))  # as many for each thread: none waits for the last tile
    starts = iter(range(0, rows, tile_rows))
    errors: list[BaseException] = []

    def take_tiles() -> None:
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                for start in starts:
                    if errors:
                        break
                    work(start, min(start + tile_rows, rows))
        except BaseException as error:
            errors.append(error)

    _on_threads(take_tiles, threads)
    if errors:
        raise errors[0]


def tile(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's buffer of at least ``elements`` of a dtype, made once and kept."""
    tiles = vars(_local).setdefault("tiles", {})
    tile = tiles.get(dtype)
    if tile is None or tile.numel() < elements:
        tile = tiles[dtype] = None  # the smaller one goes first
        with torch.inference_mode(False):  # for use in any mode
            tile = tiles[dtype] = torch.empty(elements, dtype=dtype)
    return tile[:elements]


def _on_threads(run: Callable[[], None], threads: int) -> None:
    """Calls ``run``, which raises nothing, on each of so many threads, or once."""
    if threads > 1 and os.getpid() == FIRST_PROCESS and _torchs_parallel() is not None:
        _on_torchs_threads(run, threads)
    elif threads > 1 and threadpool_limits is not None:
        workers = _workers(threads)
        for worker in [workers.submit(run) for _ in range(threads)]:
            worker.result()
    else:
        run()


_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _torchs_parallel() -> Callable[[Callable[[int], None], None, int, int], None] | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of the OpenMP that torch itself runs on, if it has one.

    It is what a compiler makes of ``#pragma omp parallel``: libgomp's, and LLVM's and Intel's have it too.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:  # torch's library, which is loaded, and those that it was linked to
        parallel = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def _on_torchs_threads(run: Callable[[], None], threads: int) -> None:
    """Calls ``run`` on the caller's thread and on those that torch has for it.

    For Python the latter are new threads at each call. So their tiles are kept for them by the caller's.
    """
    kept = vars(_local).setdefault("tiles_of_team", {})
    numbers = itertools.count()

    def member(_: int | None) -> None:
        _local.tiles = kept.setdefault(next(numbers), {})
        run()

    _torchs_parallel()(_Member(member), None, threads, 0)


def _workers(threads: int) -> ThreadPoolExecutor:
    """The threads of this process that work for its callers; a forked process has none of its parent's."""
    key = os.getpid(), threads
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, "auraflow-gguf", initializer=_stay_on_one_core)
        return _pools[key]


def _stay_on_one_core() -> None:
    """Has torch work on one core in this thread.

    ``torch.set_num_threads`` would do so too, but changes more than this thread: after it, MKL's LU factorization fails
    in all threads (torch 2.13), and with it patches such as OFT.
    """
    torch.get_num_threads()  # A thread takes the number over when it first needs it: not after this.
    threadpool_limits(1, user_api="openmp")
