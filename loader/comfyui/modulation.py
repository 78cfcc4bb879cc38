"""The modulation cache: a third of AuraFlow's weights, used once a timestep and not once a step.

Every block shifts, scales and gates its activations by vectors that it computes from the timestep alone: ``modC``,
``modX``, ``modCX`` and ``modF`` of ``silu(t_embedder(timestep))``. These linears are a third of the parameters, and
what they give for one timestep is one row of 0.74 M numbers, the same for every token, image and prompt. So the rows of
all timesteps of a schedule are computed in one pass over the weights, which stay where the file is mapped and visit the
device one at a time; the blocks then read their part of the row.

A timestep that the schedule does not have, between two steps of some samplers, is computed when it first comes. Rows
are kept as long as the weights' patches, the compute type and the device are the same, over runs and clones, the last
``MAX_ROWS`` of them. A block that gets another vector than ComfyUI's own, from a patch, and training compute as if
there were no cache.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from comfy.ldm.aura.mmdit import MMDiT, TimestepEmbedder
from comfy.model_base import AuraFlow
from comfy.model_management import module_size
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

MAX_ROWS = 100
"""Rows kept, 1.5 MB each in 16 bit: at most 150 MB on the compute device, and 30 MB for a schedule of 20 steps."""

WRAPPER_KEY = "auraflow_gguf.modulation"

_MODEL = "diffusion_model."


class Modulation(torch.nn.Sequential):
    """``SiLU, Linear`` of a block, which may be looked up instead.

    Args:
        layers: what it takes the place of; names in the state dict stay the same.
        table: where its vectors are.
        start: position of its first number in a row of the table.
    """

    def __init__(self, layers: torch.nn.Sequential, table: ModulationTable, start: int):
        super().__init__(*layers)
        self.linear.stays_mapped = True
        self.table = table
        self.start = start
        self.stop = start + self.linear.out_features

    @property
    def linear(self) -> torch.nn.Linear:
        return self[1]

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        """``(batch, hidden)`` → ``(batch, out_features)``."""
        if vector is self.table.vector:
            return self.table.row[:, self.start : self.stop]
        return super().forward(vector)


class CachedTimestepEmbedder(TimestepEmbedder):
    """ComfyUI's embedder of timesteps, whose vectors may be looked up instead; it shares the other's weights."""

    def __init__(self, embedder: TimestepEmbedder, table: ModulationTable):
        torch.nn.Module.__init__(self)
        self.mlp = embedder.mlp
        self.frequency_embedding_size = embedder.frequency_embedding_size
        self.table = table

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``(batch,)`` timesteps → ``(batch, hidden)`` in ``dtype``."""
        return super().forward(t, dtype) if self.table.vector is None else self.table.vector


class ModulationTable:
    """The rows of one model, and the ones that it uses now.

    Attributes:
        vector: ``(batch, hidden)``, the embedded timesteps of the evaluation that runs, or None where none is cached.
        row: ``(batch, numbers)``, the modulation of all blocks, one after the other.
        passes: how often rows were computed, each time in one pass over the weights.
    """

    def __init__(self):
        self.vector: torch.Tensor | None = None
        self.row: torch.Tensor | None = None
        self.passes = 0
        self._rows: OrderedDict[tuple[Hashable, float], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return sum(vector.nbytes + row.nbytes for vector, row in self._rows.values())

    def clear(self) -> None:
        self._rows.clear()

    @contextlib.contextmanager
    def at(
        self,
        timesteps: list[float],
        model: MMDiT,
        setting: Hashable,
        schedule: Callable[[], list[float]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Iterator[None]:
        """Has the blocks read the rows of ``timesteps`` as long as the context lasts.

        Args:
            timesteps: one for each entry of the batch.
            model: whose rows these are.
            setting: what the rows depend on besides the timestep.
            schedule: gives all timesteps of the run, in order; called when a row is missing.
            dtype, device: of the computation.
        """
        setting = (setting, dtype, device)
        missing = [t for t in dict.fromkeys(timesteps) if (setting, t) not in self._rows]
        if missing:
            ahead = schedule()
            ahead = ahead[ahead.index(missing[0]) :] if missing[0] in ahead else []
            absent = [t for t in dict.fromkeys((*missing, *ahead)) if (setting, t) not in self._rows]
            self._compute(model, setting, absent[: max(MAX_ROWS, len(missing))], dtype, device)
        found = [self._rows[setting, t] for t in timesteps]
        for t in timesteps:
            self._rows.move_to_end((setting, t))
        while len(self._rows) > MAX_ROWS:
            self._rows.popitem(last=False)
        if len(set(timesteps)) == 1:
            self.vector, self.row = (part.expand(len(timesteps), -1) for part in found[0])
        else:
            self.vector, self.row = (torch.stack(parts) for parts in zip(*found, strict=True))
        try:
            yield
        finally:
            self.vector = self.row = None

    def _compute(
        self, model: MMDiT, setting: Hashable, timesteps: list[float], dtype: torch.dtype, device: torch.device
    ) -> None:
        vectors = model.t_embedder(torch.tensor(timesteps, dtype=torch.float32, device=device), dtype)
        modules: list[Modulation] = [model.get_submodule(place) for place in _places(model)]
        rows = vectors.new_empty(len(timesteps), modules[-1].stop)
        for module in modules:
            rows[:, module.start : module.stop] = module(vectors)
        # Each row in memory of its own, that goes when the row goes.
        for t, vector, row in zip(timesteps, vectors, rows, strict=True):
            self._rows[setting, t] = vector.clone(), row.clone()
        self.passes += 1


def install(patcher: ModelPatcher) -> ModulationTable:
    """Gives a freshly loaded AuraFlow, and all later clones of its patcher, a modulation cache.

    The modulation linears then belong to no device: see ``ops.GGUFOps.Linear.stays_mapped``.
    """
    model: MMDiT = patcher.model.diffusion_model
    table = patcher.model.modulation_table = ModulationTable()
    start = 0
    for place in _places(model):
        owner, _, name = place.rpartition(".")
        module = Modulation(model.get_submodule(place), table, start)
        setattr(model.get_submodule(owner), name, module)
        start = module.stop
    model.t_embedder = CachedTimestepEmbedder(model.t_embedder, table)
    patcher.size = 0  # to be counted anew
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _with_cached_modulation)
    return table


def without_cache(patcher: ModelPatcher) -> ModelPatcher:
    """A clone whose modulation is computed in every evaluation, by every linear."""
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    return clone


def table_of(model: torch.nn.Module) -> ModulationTable | None:
    """The modulation cache of a model, if it has one."""
    return getattr(model, "modulation_table", None)


def mapped_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The modulation linears that stay off the device, by their name in the model; none where there is no cache."""
    if table_of(model) is None:
        return {}
    inner: MMDiT = model.diffusion_model
    return {f"{_MODEL}{place}.1": inner.get_submodule(place).linear for place in _places(inner)}


def mapped_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that stay off the device."""
    return sum(module_size(linear) for linear in mapped_linears(model).values())


def _places(model: MMDiT) -> Iterator[str]:
    for number in range(len(model.double_layers)):
        yield f"double_layers.{number}.modC"
        yield f"double_layers.{number}.modX"
    for number in range(len(model.single_layers)):
        yield f"single_layers.{number}.modCX"
    yield "modF"


def _with_cached_modulation(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """Wraps ComfyUI's ``BaseModel.apply_model``; outside of what torch.compile sees."""
    model: AuraFlow = executor.class_obj
    table, patcher = table_of(model), model.current_patcher
    if table is None or patcher is None or torch.is_grad_enabled():
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def timesteps(sigmas: torch.Tensor) -> list[float]:
        return model.model_sampling.timestep(sigmas).float().tolist()

    def schedule() -> list[float]:
        sigmas = transformer_options.get("sample_sigmas")
        return [] if sigmas is None else timesteps(sigmas[sigmas > 0])

    setting = _state(patcher)
    with table.at(timesteps(t), model.diffusion_model, setting, schedule, model.get_dtype_inference(), x.device):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class _Same:
    """An object as part of a key: equal to itself alone, and alive as long as the key is."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _state(patcher: ModelPatcher) -> Hashable:
    """What is done to the weights that modulation depends on: patches, active hooks, wrappers, replaced forwards."""
    linears = mapped_linears(patcher.model)
    for name, module in patcher.model.diffusion_model.t_embedder.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[f"{_MODEL}t_embedder.{name}"] = module
    hooked = patcher.get_combined_hook_patches(patcher.current_hooks)
    state = []
    for name, linear in linears.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            patches = (*patcher.patches.get(key, ()), *hooked.get(key, ()))
            for strength, value, strength_model, offset, function in patches:
                state.append((key, strength, _Same(value), strength_model, offset, _Same(function)))
            state += [(key, function) for function in patcher.weight_wrapper_patches.get(key, ())]
        if forward := vars(linear).get("forward"):  # ComfyUI's bypass LoRA
            state.append((name, forward))
    return tuple(state)
