"""Work on rows of a weight in tiles, on every core of a CPU: a thread takes the next tile when it is done with one.

On Linux these are torch's own threads. After an operation they keep their cores for milliseconds, waiting for another
one, so that other threads would have to wait for them: a step with a pool's takes up to a quarter longer. Where torch's
OpenMP cannot be asked for them, and in a forked process, which has none of its parent's, a pool does it, which needs
threadpoolctl.
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

_FIRST_PROCESS = os.getpid()

_local = threading.local()
_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def in_tiles(work: Callable[[int, int], object], rows: int, tile_rows: int, multiple: int = 1) -> None:
    """Calls ``work(start, stop)`` for tiles of at most ``tile_rows`` rows, on as many threads as torch has.

    All tiles but the last are of a multiple of so many rows, one at least, and all of about the same.

    The torch operations of each thread stay on its own core; where there are neither torch's threads nor a pool's, all
    tiles are taken by the caller, and torch's threads share each operation. ``work`` runs in inference mode and without
    autocast, whatever the caller's mode.

    Raises:
        what ``work`` raises first; tiles that no thread has begun by then are left.
    """
    threads = torch.get_num_threads()
    units = -(-rows // multiple)
    rounds = -(-units // (max(1, tile_rows // multiple) * threads))
    tiles = min(units, rounds * threads)  # as many for each thread: none waits for the last tile
    bounds = [min(rows, units * i // tiles * multiple) for i in range(tiles + 1)] if tiles else []
    pairs = iter(list(itertools.pairwise(bounds)))
    errors: list[BaseException] = []

    def take_tiles() -> None:
        try:
            with torch.inference_mode():
                for start, stop in pairs:
                    if errors:
                        break
                    work(start, stop)
        except BaseException as error:
            errors.append(error)

    with torch.autocast("cpu", enabled=False):
        _on_threads(take_tiles, threads)
    if errors:
        raise errors.pop(0)


def tile(elements: int, dtype: torch.dtype, purpose: str = "") -> torch.Tensor:
    """This thread's buffer of at least ``elements`` of a dtype, made once and kept, in memory of the CPU.

    Args:
        purpose: what tells buffers apart that are in use at the same time.
    """
    tiles, key = vars(_local).setdefault("tiles", {}), (dtype, purpose)
    tile = tiles.get(key)
    if tile is None or tile.numel() < elements:
        tile = tiles[key] = None  # the smaller one goes first
        with torch.inference_mode(False):  # for use in any mode
            tile = tiles[key] = torch.empty(elements, dtype=dtype, device="cpu")
    return tile[:elements]


def _on_threads(run: Callable[[], None], threads: int) -> None:
    """Calls ``run``, which raises nothing, on each of so many threads, or once."""
    if threads > 1 and os.getpid() == _FIRST_PROCESS and _torchs_openmp() is not None:
        _on_torchs_threads(run, threads)
    elif threads > 1 and threadpool_limits is not None:
        workers = _workers(threads)
        for worker in [workers.submit(run) for _ in range(threads)]:
            worker.result()
    else:
        run()


_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _torchs_openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch runs on, or None where it is not found.

    It is asked by ``GOMP_parallel(function, argument, threads, flags)``, what GCC makes of ``omp parallel`` (libgomp's
    manual, "The libgomp ABI"); LLVM's and Intel's OpenMP have it too.
    """
    if not sys.platform.startswith("linux"):
        return None
    loaded = ctypes.CDLL(None)  # torch finds its own there too, or what was loaded in its place
    if not hasattr(loaded, "GOMP_parallel"):
        return None
    loaded.GOMP_parallel.argtypes = (_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    loaded.GOMP_parallel.restype = None
    return loaded


def _on_torchs_threads(run: Callable[[], None], threads: int) -> None:
    """Calls ``run`` on the caller's thread and on those that torch has for it.

    For Python the latter are new threads at each call. So their tiles are kept by the caller's, by their numbers.
    """
    openmp, local = _torchs_openmp(), vars(_local)
    kept = local.setdefault("tiles_of_team", {0: local.setdefault("tiles", {})})  # the caller is the first

    def member(_: int | None) -> None:
        _local.tiles = kept.setdefault(openmp.omp_get_thread_num(), {})
        run()

    openmp.GOMP_parallel(_Member(member), None, threads, 0)


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
