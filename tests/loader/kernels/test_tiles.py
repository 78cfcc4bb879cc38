"""Work in tiles: each is taken once, on torch's threads or on a pool's, and the process stays as it was."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from auraflow_gguf.devtools import ROOT
from auraflow_gguf.loader.kernels import tiles
from auraflow_gguf.loader.kernels.tiles import in_tiles, tile

ROWS = 43
SEVERAL = ["torch", "pool"] if sys.platform.startswith("linux") else ["pool"]  # who has several threads for us


@pytest.fixture(params=[*SEVERAL, "neither"])
def whose(request, monkeypatch):
    """Whose threads: a pool's where torch has none to give, and without threadpoolctl the caller's."""
    if request.param == "torch":
        assert tiles._torchs_openmp() is not None
    else:
        monkeypatch.setattr(tiles, "_torchs_openmp", lambda: None)
    monkeypatch.setattr(tiles, "_pools", {})
    if request.param == "neither":
        monkeypatch.setattr(tiles, "threadpool_limits", None)
    return request.param


@pytest.mark.parametrize("tile_rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("rows", [0, 1, 2, ROWS])
def test_each_row_is_taken_once(whose, threads, rows, tile_rows):
    taken = []
    in_tiles(lambda start, stop: taken.append(range(start, stop)), rows, tile_rows)
    assert max(map(len, taken), default=0) <= tile_rows
    assert sorted(row for part in taken for row in part) == list(range(rows))


@pytest.mark.parametrize(("rows", "tile_rows"), [(0, 16), (5, 16), (8, 4), (ROWS, 16), (ROWS, 24), (ROWS, 1000)])
def test_tiles_of_a_multiple_of_rows(threads, rows, tile_rows):
    taken = []
    in_tiles(lambda start, stop: taken.append((start, stop)), rows, tile_rows, 8)
    taken.sort()
    assert [row for start, stop in taken for row in range(start, stop)] == list(range(rows))
    assert all(start % 8 == 0 and 0 < stop - start <= max(8, tile_rows) for start, stop in taken)
    sizes = [-(-(stop - start) // 8) for start, stop in taken]
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_a_small_weight_has_tiles_for_all_threads(whose, threads):
    starts = []
    in_tiles(lambda start, stop: starts.append((start, stop)), rows=ROWS, tile_rows=1000)
    assert sorted(starts) == [(0, 14), (14, 28), (28, 43)]


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("whose", SEVERAL, indirect=True)
def test_threads_work_at_once_and_keep_their_tiles(whose, threads):
    together, seen, held = threading.Barrier(threads, timeout=30), set(), []

    def work(start: int, stop: int) -> None:
        together.wait()
        assert torch.is_inference_mode_enabled()
        held.append(tile(5, torch.float32))  # so that a new one would lie elsewhere
        seen.add((threading.get_native_id(), held[-1].data_ptr()))

    for _ in range(3):
        in_tiles(work, rows=threads, tile_rows=1)
    if whose == "torch":
        assert threading.get_native_id() in {thread for thread, _ in seen}
    assert len({thread for thread, _ in seen}) == threads
    assert len({address for _, address in seen}) == threads


def test_the_callers_autocast_is_not_the_works(whose, threads):
    dtypes = set()
    with torch.autocast("cpu", torch.bfloat16):
        in_tiles(lambda start, stop: dtypes.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype), ROWS, 1)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_one_tile_is_the_callers_and_the_next_call_works(whose, threads, error):
    taken = []

    def work(start: int, stop: int) -> None:
        taken.append(start)
        if start == 3:
            raise error("row 3")
        if start > 3:
            time.sleep(0.001)

    with pytest.raises(error, match="row 3"):
        in_tiles(work, 10_000, 1)
    assert len(taken) < 10_000
    taken.clear()
    in_tiles(lambda start, stop: taken.append(start), ROWS, 1)
    assert sorted(taken) == list(range(ROWS))


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_callers_at_once(whose, threads):
    all_here = threading.Barrier(4, timeout=30)

    def call(number: int) -> bool:
        all_here.wait()
        for _ in range(50):
            out = torch.zeros(ROWS)

            def write(start: int, stop: int) -> None:
                buffer = tile(stop - start, torch.float32).fill_(number)
                time.sleep(0)
                out[start:stop] += buffer  # noqa: B023

            in_tiles(write, ROWS, 4)
            if not torch.equal(out, torch.full((ROWS,), float(number))):
                return False
        return True

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(4)))


def _new_threads_number() -> int:
    """On how many cores torch works in a thread that is new."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_it_leaves_the_numbers_of_threads_as_they_are(whose, threads):
    for number in (threads, 2):
        torch.set_num_threads(number)
        in_tiles(lambda start, stop: torch.randn(300, 300) @ torch.randn(300, 300), ROWS, 4)
        assert torch.get_num_threads() == _new_threads_number() == number
    if whose == "pool":
        assert {tiles._workers(2).submit(torch.get_num_threads).result() for _ in range(20)} == {1}


IN_A_NEW_PROCESS = """
import dev
dev.register_pack()
import os, sys
import torch
from auraflow_gguf.loader.kernels import tiles
threads = torch.get_num_threads()  # setting them would break factorizations itself
if sys.argv[1] == "pool":
    tiles._torchs_openmp = lambda: None
torch.ones(1 << 22).mul_(2)
torch.randn(8, 8) @ torch.randn(8, 8)
before = len(os.listdir("/proc/self/task")) if sys.platform.startswith("linux") else 0
tiles.in_tiles(lambda start, stop: torch.randn(300, 300) @ torch.randn(300, 300), 40, 4)
if sys.platform.startswith("linux"):
    new = len(os.listdir("/proc/self/task")) - before
    assert new == 0 if sys.argv[1] == "torch" else new <= threads
(torch.eye(384) - 0.01 * torch.randn(8, 384, 384)).inverse()
"""


@pytest.mark.parametrize("whose", SEVERAL)
def test_torchs_threads_suffice_and_its_factorizations_still_work(whose):
    """In a process of its own: what breaks them lasts."""
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, whose], cwd=ROOT, check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")
@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("whose", SEVERAL, indirect=True)
def test_a_forked_process_has_threads_of_its_own(whose, threads):
    x, weight = torch.randn(5, 300), torch.randn(ROWS, 300)

    def product() -> torch.Tensor:
        out = torch.empty(5, ROWS)
        in_tiles(lambda start, stop: torch.mm(x, weight[start:stop].t(), out=out[:, start:stop]), ROWS, 4)
        return out

    expected = product()
    child = os.fork()
    if child == 0:
        equal = False
        try:
            equal = torch.equal(product(), expected)
        finally:
            os._exit(0 if equal else 1)
    for _ in range(300):
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert finished
    assert os.waitstatus_to_exitcode(status) == 0
