"""What the workers of examples/batch_over_ray.py take of a machine's memory: the packed files lie in it once."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import comfy.cli_args

from ..devtools.random_models import cached_text_encoder, cached_vae
from ..devtools.server import ROOT
from ..tests.host.aura_files import make_gguf

TYPE = "Q4_0"
SETTING_TEXT = (
    f"a transformer of 1 + 1 layers in {TYPE}, the whole text encoder in Q8_0 and the VAE in float32, after a picture"
)


def measure() -> dict:
    """Linux alone tells it.

    Returns:
        ``file_bytes``, the size of the two packed files, and a row for one and for two workers: what is in memory of
        these files (``files``) and of all that the workers have (``all``), as the sum over the workers of what each
        has for itself alone would have (``rss``), and as it is, each shared page counted once (``pss``). In bytes.
    """
    if sys.platform != "linux":
        return {}
    sys.path.insert(0, str(ROOT / "examples"))
    import batch_over_ray
    import ray
    from painter import Job, Painter, Settings

    models = [make_gguf(TYPE), cached_text_encoder(), cached_vae()]
    looks = {"width": 64, "height": 64, "steps": 1, "cfg": 3.5, "sampler": "euler", "scheduler": "simple"}
    host = str(Path(comfy.cli_args.__file__).parents[1])
    settings = Settings(host, str(ROOT), *map(str, models), **looks, shift=None, min_tokens=1)
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=batch_over_ray.OBJECT_STORE)
    ray.cloudpickle.register_pickle_by_value(batch_over_ray.painter)
    rows = []
    try:
        for workers in (1, 2):
            actors = [ray.remote(num_cpus=1)(Painter).remote() for _ in range(workers)]
            places = ray.get([actor.load.remote(settings) for actor in actors])
            ray.get([actor.paint.remote(Job(1, "a cat", "", seed)) for seed, actor in enumerate(actors)])
            total: Counter[str] = Counter()
            for place in places:
                total.update(_memory(int(re.search(r"process (\d+)", place)[1]), models[:2]))
            rows.append({"workers": workers, **total})
            print(f"{workers}:", ", ".join(f"{name} {size / 1e6:.0f}" for name, size in total.items()), flush=True)
            for actor in actors:
                ray.kill(actor)
    finally:
        ray.shutdown()
    return {"file_bytes": sum(path.stat().st_size for path in models[:2]), "rows": rows}


def _memory(process: int, files: list[Path]) -> dict[str, int]:
    """Resident and proportional bytes of a process, of all and of its mappings of some files."""
    sizes = {"files_rss": 0, "files_pss": 0, "all_rss": 0, "all_pss": 0}
    of_file = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            of_file = any(rest[-1] == str(file) for file in files)
        elif name in ("Rss:", "Pss:"):
            bytes_ = int(rest[0]) * 1024
            sizes[f"all_{name[:-1].lower()}"] += bytes_
            sizes[f"files_{name[:-1].lower()}"] += bytes_ * of_file
    return sizes
