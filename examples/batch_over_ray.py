"""Makes the pictures of a list of prompts with several workers, on one machine or over a Ray cluster: docs/scale.md.

Each worker is an actor of Ray with the models in it, loaded with ComfyUI as a library. This process hands out the
prompts and writes the pictures, so that none is lost, made in two places, or half there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import painter
from painter import RECORD, Job, Painter, Settings
from PIL import Image

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers; read when it is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray will do in future, says its warning

try:
    import ray
except ModuleNotFoundError:
    sys.exit("Ray is needed: pip install ray")

PACK = Path(__file__).resolve().parent.parent
TRIES = 2  # of a prompt
PATIENCE = 120  # seconds
OBJECT_STORE = 128 << 20  # bytes, of a Ray that this starts: a few pictures on their way


class BatchError(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclass(frozen=True)
class Worker:
    """An actor that is a `Painter`. ``place`` is its process and machine, empty until it has loaded."""

    number: int
    actor: Any
    place: str = ""


class Run:
    """Gives the jobs to the workers until each is made or has failed twice.

    Args:
        jobs: what to make.
        settings: for the workers.
        workers: how many at most.
        cpus: of each worker.
        output: the folder for the pictures.
    """

    def __init__(self, jobs: list[Job], settings: Settings, workers: int, cpus: float, output: Path):
        self.settings, self.output, self.total = settings, output, len(jobs)
        self.actor = ray.remote(num_gpus=settings.gpus, num_cpus=cpus, max_restarts=0)(Painter)
        self.queue = deque(jobs)
        self.failures: Counter[Job] = Counter()
        self.failed: dict[Job, str] = {}
        self.made = 0
        self.began: float | None = None
        self.idle: list[Worker] = []
        self.running: dict[ray.ObjectRef, tuple[Worker, Job | None, float]] = {}
        for number in range(1, min(workers, len(jobs)) + 1):
            self._hire(number)

    def work(self) -> None:
        """Returns when nothing is left to do; ``made`` and ``failed`` say what came of it.

        Raises:
            BatchError: the models cannot be loaded, or no worker is left.
        """
        while self.made + len(self.failed) < self.total:
            while self.queue and self.idle:
                self._start(self.idle.pop(), self.queue.popleft())
            if not self.running:
                raise BatchError("no worker is left; what they printed is above")
            done, _ = ray.wait(list(self.running), timeout=PATIENCE)
            if not done:
                if all(job is None for _, job, _ in self.running.values()):
                    say("no worker has loaded the models yet: that takes long, or the cluster has no room for one")
                continue
            worker, job, began = self.running.pop(done[0])
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                if job is None:
                    raise BatchError(f"a worker cannot load the models: {error.cause}") from None
                self._failed(job, str(error.cause))
                self.idle.append(worker)
            except ray.exceptions.RayError as error:
                self._died(worker, job, error)
            else:
                if job is None:
                    worker = Worker(worker.number, worker.actor, result)
                    self.began = self.began or time.monotonic()
                    say(f"worker {worker.number} has loaded the models: {worker.place}")
                else:
                    self._write(job, result)
                    seconds = time.monotonic() - began
                    say(
                        f"[{self.made + len(self.failed)}/{self.total}] line {job.line}, seed {job.seed}: "
                        f"worker {worker.number}, {seconds:.1f} s{self._left()}"
                    )
                self.idle.append(worker)

    def _hire(self, number: int) -> None:
        actor = self.actor.remote()
        self.running[actor.load.remote(self.settings)] = (Worker(number, actor), None, time.monotonic())

    def _start(self, worker: Worker, job: Job) -> None:
        self.running[worker.actor.paint.remote(job)] = (worker, job, time.monotonic())

    def _failed(self, job: Job, reason: str) -> None:
        self.failures[job] += 1
        if self.failures[job] < TRIES:
            say(f"line {job.line} failed and is tried once more: {reason}")
            self.queue.append(job)
        else:
            self.failed[job] = reason
            say(f"[{self.made + len(self.failed)}/{self.total}] line {job.line} FAILED: {reason}")

    def _died(self, worker: Worker, job: Job | None, error: Exception) -> None:
        """A worker of which nothing more is heard. One that had loaded is replaced: each death costs a try of a job."""
        reason = str(error).strip().splitlines()[0]
        with contextlib.suppress(Exception):
            ray.kill(worker.actor)
        if job is None:
            say(f"worker {worker.number} died while it loaded the models, and is not replaced: {error}")
            return
        say(f"worker {worker.number} ({worker.place}) died at line {job.line}, and is replaced")
        self._failed(job, f"its worker died ({reason})")
        self._hire(worker.number)

    def _write(self, job: Job, picture: bytes) -> None:
        path = self.output / picture_name(job)
        partial = path.with_suffix(".part")
        partial.write_bytes(picture)
        partial.replace(path)
        self.made += 1

    def _left(self) -> str:
        if not self.made:
            return ""
        left = (time.monotonic() - self.began) / self.made * (self.total - self.made - len(self.failed))
        return f"; about {left / 60:.0f} min left" if left > 90 else ""


def read_jobs(path: Path, seed: int) -> list[Job]:
    """The jobs in a list of prompts, one a line; empty lines are left out.

    Args:
        path: a text file of ``prompt`` or ``seed<TAB>prompt``, or a .jsonl file of objects with ``prompt`` and, if
            wanted, ``seed`` and ``negative``.
        seed: of the first line where it says none; each further line counts one up.

    Raises:
        BatchError: a line is something else.
    """
    jobs = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        said: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                said = json.loads(line)
            except json.JSONDecodeError:
                said = None
        elif "\t" in line:
            first, _, prompt = line.partition("\t")
            said = {"prompt": prompt.strip(), "seed": int(first) if first.strip().isdecimal() else first}
        said = {"seed": seed + number - 1, "negative": "", **said} if isinstance(said, dict) else {}
        wrong = {name: said.get(name) for name, kind in KINDS.items() if type(said.get(name)) is not kind}
        if wrong or said.keys() - KINDS or not 0 <= said["seed"] < 1 << 64:
            raise BatchError(
                f"{path}, line {number}: found {line.strip()[:80]!r}, expected a prompt, after a seed and a tab if "
                'wanted; in a .jsonl file {"prompt": "…", "seed": 1, "negative": "…"}, the latter two if wanted. '
                "A seed is a whole number from 0 to 2⁶⁴ - 1."
            )
        jobs.append(Job(number, said["prompt"], said["negative"], said["seed"]))
    return jobs


KINDS = {"prompt": str, "seed": int, "negative": str}


def picture_name(job: Job) -> str:
    return f"{job.line:05d}-{job.seed}.png"


def not_made(jobs: list[Job], settings: Settings, output: Path) -> list[Job]:
    """The jobs whose pictures an earlier run has not made.

    Raises:
        BatchError: a picture of that name is there which was made of something else.
    """
    todo = []
    for job in jobs:
        path = output / picture_name(job)
        if not path.exists():
            todo.append(job)
            continue
        try:
            with Image.open(path) as image:
                made_of = image.info.get(RECORD)
        except OSError:
            made_of = None
        if made_of != settings.record(job):
            raise BatchError(
                f"{path}: found a picture made of {made_of or 'something unknown'}, expected one of "
                f"{settings.record(job)}. Remove it, or give another folder."
            )
    return todo


def room(gpus: float, cpus: float) -> int:
    """How many workers of this size the machines of the cluster have room for."""
    wanted = {name: share for name, share in {"GPU": gpus, "CPU": cpus}.items() if share}
    return sum(min(int(have.get(name, 0) / share) for name, share in wanted.items()) for have in machines())


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def shares(options: argparse.Namespace) -> tuple[int, float, float]:
    """The number of workers, and each one's GPUs and CPUs: as told, else a GPU each, and CPUs as they are there.

    Raises:
        BatchError: no machine has room for a worker.
    """
    gpus = options.gpus if options.gpus is not None else float(any(have.get("GPU") for have in machines()))
    workers = options.workers or (max(1, room(gpus, 0)) if gpus else 1)
    cpus = options.cpus
    if cpus is None:
        most = int(max(have.get("CPU", 0) for have in machines()))
        cpus = next((cpus for cpus in range(most, 1, -1) if room(gpus, cpus) >= workers), 1)
    fits = room(gpus, cpus)
    if not fits:
        raise BatchError(f"no machine has the {gpus:g} GPUs and {cpus:g} CPUs of a worker: give --gpus and --cpus")
    if fits < workers:
        say(f"there is room for {fits} of {workers} workers; give --gpus and --cpus for smaller ones")
    return workers, gpus, cpus


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    output = options.output
    try:
        jobs = read_jobs(options.prompts, options.seed)
        settings = settings_of(options)
        output.mkdir(parents=True, exist_ok=True)
        todo = not_made(jobs, settings, output)
        say(f"{len(jobs) - len(todo)} of {len(jobs)} pictures are there")
        failed = make(todo, settings, options) if todo else {}
    except KeyboardInterrupt:
        say("stopped; the same command goes on where this run was")
        return 130
    except (BatchError, OSError, ConnectionError) as error:
        print(f"batch_over_ray.py: {error}", file=sys.stderr)
        return 1
    say(f"{len(jobs) - len(failed)} of {len(jobs)} pictures are in {output}")
    for job, reason in failed.items():
        say(f"line {job.line} was not made: {reason}")
    return 1 if failed else 0


PATHS = ("comfyui", "pack", "transformer", "text_encoder", "vae")
LOOKS = ("width", "height", "steps", "cfg", "sampler", "scheduler", "shift", "min_tokens")


def settings_of(options: argparse.Namespace) -> Settings:
    paths = {name: os.path.abspath(getattr(options, name)) for name in PATHS}
    return Settings(**paths, **{name: getattr(options, name) for name in LOOKS})


def make(jobs: list[Job], settings: Settings, options: argparse.Namespace) -> dict[Job, str]:
    """Makes pictures over Ray, and returns the jobs that failed, each with the reason."""
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        ray.init(options.address, logging_level="warning", **(local if options.address == "local" else {}))
        ray.cloudpickle.register_pickle_by_value(painter)  # the machines need not find the module
        workers, gpus, cpus = shares(options)
        say(f"{workers} workers, each with {gpus:g} GPUs and {cpus:g} CPUs")
        run = Run(jobs, replace(settings, gpus=gpus, threads=max(1, int(cpus))), workers, cpus, options.output)
        run.work()
        return run.failed
    finally:
        ray.shutdown()


def positive(kind: type) -> Callable[[str], Any]:
    """For argparse: a number above 0."""

    def number(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise ValueError(text)
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The pictures of a list of prompts, made by workers over Ray.")
    add = parser.add_argument
    add("prompts", type=Path, help="a prompt or seed, tab, prompt a line; or .jsonl with prompt, seed and negative")
    add("output", type=Path, help="the folder for the pictures, LINE-SEED.png; those that are there are not made again")
    add("--comfyui", required=True, help="ComfyUI's folder; this and all files below under one path on every machine")
    add("--transformer", required=True, help="an AuraFlow GGUF file")
    add("--text-encoder", required=True, help="Pile-T5-XL, GGUF or not")
    add("--vae", required=True, help="SDXL's VAE")
    add("--pack", default=PACK, help="this pack's folder, by default the one that this script is in")
    add(
        "--address",
        default="local",
        help="of a Ray cluster, such as auto or ray://HOST:10001; by default a new one here",
    )
    add("--workers", type=positive(int), help="how many; by default one for each GPU, else one")
    add("--gpus", type=float, help="of each worker, such as 0.5; by default 1 where there are any; 0 is the CPU")
    add(
        "--cpus",
        type=positive(float),
        help="of each worker, which has as many threads; by default as there are",
    )
    add("--seed", type=int, default=0, help="of the first line that says none; further lines count up (default 0)")
    add("--width", type=positive(int), default=1024)
    add("--height", type=positive(int), default=1024)
    add("--steps", type=positive(int), default=25)
    add("--cfg", type=float, default=3.5)
    add("--sampler", default="euler")
    add("--scheduler", default="simple")
    add("--shift", type=float, help="of ModelSamplingAuraFlow; by default the model's own")
    add("--min-tokens", type=int, help="to which texts are filled up (T5TokenizerOptions), for Pony V7 768")
    return parser


if __name__ == "__main__":
    sys.exit(main())
