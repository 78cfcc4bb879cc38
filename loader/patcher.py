"""ComfyUI's model patchers, for models whose weights are packed.

ComfyUI applies a patch (a LoRA, a merge) by replacing the weight with a patched one. A packed weight cannot
take a patch without becoming dense, three times its size. So the packed weight stays as it is: patches of low
rank are computed beside it (low_rank.py), and all others are handed to ComfyUI as weight functions, which are
applied to the dequantized weight when it is used. Everything else (clones, offloading, dense weights, saving)
is ComfyUI's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic, wipe_lowvram_weight

from .layout import is_packed
from .low_rank import LowRank, low_rank

# ComfyUI's dynamic VRAM loads modules of at most this many bytes whole, and calls no weight function for
# them. Weights this small are patched by ComfyUI itself, which makes them dense.
_ALWAYS_LOADED_BYTES = 16 * 1024


class WeightPatches:
    """A weight function: a list of ComfyUI's patches, applied to a dense weight.

    Args:
        key: the weight's name in the model's state dict.
        patches: as in ``ModelPatcher.patches[key]``.
        original_weights: as ComfyUI's ``calculate_weight`` takes them, for patches that refer to the base.
    """

    def __init__(self, key: str, patches: list[tuple], original_weights: dict | None = None):
        self.key = key
        self.patches = patches
        self.original_weights = original_weights

    def __call__(self, weight):
        return comfy.lora.calculate_weight(
            self.patches, weight, self.key, intermediate_dtype=weight.dtype, original_weights=self.original_weights
        )


class HookPatches(WeightPatches):
    """The patches of the hooks that are active now; removed when the hooks change."""


class _PackedWeightPatching:
    """What both patchers do differently for packed weights."""

    def load(self, device_to=None, *args, **kwargs):
        beside = self._low_rank_patches(device_to)
        with self._packed_patches_as_functions(without=beside):
            super().load(device_to, *args, **kwargs)
        self._remove_low_rank()
        for key, factors in beside.items():
            self._module_of(key).low_rank = factors
            self.model.model_loaded_weight_memory += factors.nbytes

    def partially_unload(self, *args, **kwargs):
        with self._packed_patches_as_functions(without=self.patches):
            return super().partially_unload(*args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._remove_functions(WeightPatches)
            self._remove_low_rank()
            # ComfyUI forgets these after a full load with forced casts, which text encoders have, and its next load in
            # low VRAM then takes such modules for loaded ones and leaves their patches out.
            for module in self.model.modules():
                if hasattr(module, "prev_comfy_cast_weights"):
                    wipe_lowvram_weight(module)

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        self._remove_functions(HookPatches)
        if hooks is None:
            return
        original_weights = self.get_key_patches()
        for key, patches in self.get_combined_hook_patches(hooks).items():
            if self._is_packed(key):
                self._module_of(key).weight_function.append(HookPatches(key, patches, original_weights))

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if not self._is_packed(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        if not whitelist_keys_set:
            self._remove_functions(HookPatches)

    def state_dict_for_saving(self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        """What a saved checkpoint holds: every weight dense, in main memory, its patches applied."""
        names = self.model.diffusion_model.state_dict()
        weights = {name: self._dense_weight(f"diffusion_model.{name}") for name in names}
        return self.model.state_dict_for_saving(weights, clip_state_dict, vae_state_dict, clip_vision_state_dict)

    def dense_state_dict(self) -> dict[str, torch.Tensor]:
        """Every weight by the model's own name, dense, in main memory, its patches applied."""
        return {name: self._dense_weight(name) for name in self.model.state_dict()}

    def _dense_weight(self, key: str) -> torch.Tensor:
        if key in self.patches and key not in self.backup:  # what is in the backup has its patches applied
            weight = self.patch_weight_to_device(key, device_to=self.load_device, return_weight=True)
        else:
            weight = comfy.utils.get_attr(self.model, key)
        return (weight.dequantize() if is_packed(weight) else weight.detach()).cpu()

    @contextlib.contextmanager
    def _packed_patches_as_functions(self, without: Container[str]):
        """Shows ComfyUI the patches of packed weights as weight wrappers, ``without`` these, while it attaches them."""
        patches, wrappers = self.patches, self.weight_wrapper_patches
        self.patches = {key: value for key, value in patches.items() if not self._is_packed(key)}
        self.weight_wrapper_patches = wrappers.copy()
        for key in patches.keys() - self.patches.keys():
            if key in without:
                continue
            self.weight_wrapper_patches[key] = [WeightPatches(key, patches[key]), *wrappers.get(key, [])]
        try:
            yield
        finally:
            self.patches, self.weight_wrapper_patches = patches, wrappers

    def _low_rank_patches(self, device: torch.device) -> dict[str, LowRank]:
        beside = {}
        for key, patches in self.patches.items():
            dtype = comfy.utils.get_attr(self.model, key).dtype
            if self._is_packed(key) and (factors := low_rank(patches, device, dtype)):
                beside[key] = factors
        return beside

    def _module_of(self, key: str) -> torch.nn.Module:
        return comfy.utils.get_attr(self.model, key.rpartition(".")[0])

    def _remove_low_rank(self) -> None:
        for module in self.model.modules():
            if getattr(module, "low_rank", None) is not None:
                module.low_rank = None

    def _is_packed(self, key: str) -> bool:
        weight = comfy.utils.get_attr(self.model, key)
        return is_packed(weight) and weight.nbytes > _ALWAYS_LOADED_BYTES

    def _remove_functions(self, kind: type[WeightPatches]) -> None:
        for module in self.model.modules():
            functions = getattr(module, "weight_function", ())
            if any(isinstance(function, kind) for function in functions):
                module.weight_function = [f for f in functions if not isinstance(f, kind)]


class GGUFModelPatcher(_PackedWeightPatching, ModelPatcher):
    """The static patcher: CPUs, and GPUs without dynamic VRAM."""


class GGUFModelPatcherDynamic(_PackedWeightPatching, ModelPatcherDynamic):
    """The patcher for dynamic VRAM."""

    def __new__(cls, model=None, load_device=None, offload_device=None, *args, **kwargs):
        if load_device is not None and comfy.model_management.is_device_cpu(load_device):
            return GGUFModelPatcher(model, load_device, offload_device, *args, **kwargs)
        return super().__new__(cls)

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        if type(clone) is ModelPatcher:  # disable_dynamic=True: ComfyUI names its static class itself
            clone.__class__ = GGUFModelPatcher
        return clone


def for_packed_weights(patcher: ModelPatcher) -> GGUFModelPatcher | GGUFModelPatcherDynamic:
    """ComfyUI's freshly made patcher as the one of the same kind that knows packed weights, all else unchanged."""
    patcher.__class__ = GGUFModelPatcherDynamic if patcher.is_dynamic() else GGUFModelPatcher
    return patcher
