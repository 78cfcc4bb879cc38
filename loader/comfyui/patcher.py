"""ComfyUI's model patchers, for models whose weights are packed.

ComfyUI applies a patch (a LoRA, a merge) by replacing the weight with a patched one. A packed weight cannot
take a patch without becoming dense, three times its size. So the packed weight stays as it is: patches of low
rank are computed beside it (low_rank.py), and all others are handed to ComfyUI as weight functions, which are
applied to the dequantized weight when it is used; when the whole model is loaded and memory is left, weights with
those other patches do become dense, as long as it lasts. Modulation weights that stay off the device (modulation.py)
are left out of what ComfyUI loads and counts, and always patched in use. Everything else (clones, offloading, dense
weights, saving) is ComfyUI's own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container

import comfy.model_management
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic, move_weight_functions, wipe_lowvram_weight
from comfy.patcher_extension import CallbacksMP

from ..weights.layout import is_packed
from .int8 import scale_bytes
from .low_rank import LowRank, is_low_rank, low_rank
from .modulation import mapped_bytes, mapped_linears, table_of
from .ops import is_in_map, original_in_map
from .weight_patches import HookPatches, WeightPatches


class _PackedWeightPatching:
    """What both patchers do differently for packed weights."""

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing):
        # At the end of the process there is nothing to give back, and PyTorch aborts when tensors such as packed ones
        # are used, which ComfyUI 0.16 does here.
        if not is_finalizing():
            super().__del__()

    def model_size(self):
        if self.size <= 0:
            size = comfy.model_management.module_size(self.model) + scale_bytes(self.model)
            self.size = size - mapped_bytes(self.model)
        return self.size

    def _load_list(self, *args, **kwargs):
        mapped = set(mapped_linears(self.model).values())
        return [entry for entry in super()._load_list(*args, **kwargs) if entry[-2] not in mapped]

    def load(self, device_to=None, lowvram_model_memory=0, *args, full_load=False, **kwargs):
        self._let_go_of_low_rank(device_to)
        beside = self._low_rank_patches(device_to)
        size = sum(factors.nbytes for factors in beside.values())
        if lowvram_model_memory:  # 0: as much as it takes
            lowvram_model_memory = max(1, lowvram_model_memory - size)
            full_load = full_load and lowvram_model_memory > self.model_size()
        dense = self._affordable_dense(device_to, without=beside) if full_load else {}
        self._patch_mapped_linears(device_to)
        for key, factors in beside.items():
            self._module_of(key).low_rank = factors
        with self._packed_patches_as_functions(without=beside, but_not=dense):
            super().load(device_to, lowvram_model_memory, *args, full_load=full_load, **kwargs)
        self.model.model_loaded_weight_memory += size + sum(dense.values()) + scale_bytes(self.model)

    def partially_unload(self, *args, **kwargs):
        for key in self.hook_backup:  # ComfyUI has written into these
            comfy.utils.get_attr(self.model, key).original_in_map = None
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

    def detach(self, unpatch_all=True):
        if unpatch_all and (table := table_of(self.model)):
            table.clear()
        return super().detach(unpatch_all)

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        self._remove_hooks()
        combined = self.get_combined_hook_patches(hooks)
        combined = {key: patches for key, patches in combined.items() if self._is_patched_in_use(key)}
        original_weights = self.get_key_patches() if combined else None
        for key, patches in combined.items():
            if key.endswith(".weight"):
                module = self._module_of(key)
                if module.low_rank is not None:  # what the hooks patch is the weight with these
                    patches = [*module.low_rank.patches, *patches]
                self.model.low_rank_without_hooks[key] = module.low_rank
                device = self.offload_device if self._stays_mapped(key) else self.load_device
                module.low_rank = self._low_rank(key, patches, device)
                if module.low_rank is not None:
                    continue
            self._functions_of(key).append(HookPatches(key, patches, original_weights))

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if not self._is_patched_in_use(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        if not whitelist_keys_set:
            self._remove_hooks()

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
    def _packed_patches_as_functions(self, without: Container[str], but_not: Container[str] = ()):
        """Shows ComfyUI the patches of packed weights as weight wrappers, while it attaches them.

        Args:
            without: weights whose patches it is not shown.
            but_not: weights whose patches it is shown as they are, and makes the weights dense.
        """
        patches, wrappers = self.patches, self.weight_wrapper_patches
        self.patches = {k: value for k, value in patches.items() if k in but_not or not self._is_patched_in_use(k)}
        self.weight_wrapper_patches = wrappers.copy()
        for key in patches.keys() - self.patches.keys():
            if key in without:
                continue
            self.weight_wrapper_patches[key] = [WeightPatches(key, patches[key]), *wrappers.get(key, [])]
        try:
            yield
        finally:
            self.patches, self.weight_wrapper_patches = patches, wrappers

    def _patch_mapped_linears(self, device: torch.device) -> None:
        """What ComfyUI's ``load`` does for the linears that it loads; theirs are few uses, so factors stay off too."""
        for name, linear in mapped_linears(self.model).items():
            linear.weight_function, linear.bias_function = [], []
            for key in (f"{name}.weight", f"{name}.bias"):
                functions = self._functions_of(key)
                if patches := self.patches.get(key):
                    if factors := self._low_rank(key, patches, self.offload_device):
                        linear.low_rank = factors
                    else:
                        functions.append(WeightPatches(key, patches))
                functions.extend(self.weight_wrapper_patches.get(key, ()))
            move_weight_functions(linear, device)

    def _affordable_dense(self, device: torch.device, without: Container[str]) -> dict[str, int]:
        """Patched weights for which there is memory to keep them dense, and the bytes that each then takes more.

        Half of what is free is left: this does not know how much sampling takes.
        """
        if self.is_dynamic():
            return {}
        management = comfy.model_management
        spare = (management.get_free_memory(device) - self.model_size() - management.minimum_inference_memory()) / 2
        dense = {}
        for key in self.patches:
            # what has been loaded with its patches as a function is not patched again
            loaded = getattr(self._module_of(key), "comfy_patched_weights", False)
            if key in without or loaded or self._stays_mapped(key) or not self._is_patched_in_use(key):
                continue
            weight = comfy.utils.get_attr(self.model, key)
            more = weight.numel() * weight.dtype.itemsize - weight.nbytes
            if more <= spare:
                dense[key] = more
                spare -= more
        return dense

    def _low_rank_patches(self, device: torch.device) -> dict[str, LowRank]:
        beside = {}
        for key, patches in self.patches.items():
            loaded = self._is_patched_in_use(key) and not self._stays_mapped(key)
            if loaded and (factors := self._low_rank(key, patches, device)):
                beside[key] = factors
        return beside

    def _low_rank(self, key: str, patches: list[tuple], device: torch.device) -> LowRank | None:
        weight, held = comfy.utils.get_attr(self.model, key), self._module_of(key).low_rank
        dtype = self._factors_dtype(weight)
        if held is not None and held.is_of(patches, device, dtype):
            return held
        return low_rank(key, patches, weight.shape, device, dtype)

    def _factors_dtype(self, weight: torch.Tensor) -> torch.dtype:
        return self.model.get_dtype_inference() if isinstance(self.model, BaseModel) else weight.dtype

    def _module_of(self, key: str) -> torch.nn.Module:
        return comfy.utils.get_attr(self.model, key.rpartition(".")[0])

    def _let_go_of_low_rank(self, device: torch.device) -> None:
        """Removes the factors that are not those of a load to a device, before it makes its own."""
        self._remove_hooks()
        for name, module in self.model.named_modules():
            if getattr(module, "low_rank", None) is None:
                continue
            key = f"{name}.weight"
            to = self.offload_device if self._stays_mapped(key) else device
            if not module.low_rank.is_of(self.patches.get(key, ()), to, self._factors_dtype(module.weight)):
                module.low_rank = None

    def _remove_low_rank(self) -> None:
        self.model.low_rank_without_hooks.clear()
        for module in self.model.modules():
            if getattr(module, "low_rank", None) is not None:
                module.low_rank = None

    def _remove_hooks(self) -> None:
        self._remove_functions(HookPatches)
        for key, factors in self.model.low_rank_without_hooks.items():
            self._module_of(key).low_rank = factors
        self.model.low_rank_without_hooks.clear()

    def _is_patched_in_use(self, key: str) -> bool:
        """Whether patches of a weight leave it as it is and act when it is used."""
        weight = comfy.utils.get_attr(self.model, key)
        return self._stays_mapped(key) or is_packed(weight)

    def _stays_mapped(self, key: str) -> bool:
        return getattr(self._module_of(key), "stays_mapped", False)

    def _functions_of(self, key: str) -> list:
        """The functions that ComfyUI applies to a weight, or to a bias, when it is used."""
        return getattr(self._module_of(key), f"{key.rpartition('.')[2]}_function")

    def _remove_functions(self, kind: type[WeightPatches]) -> None:
        for module in self.model.modules():
            for name in ("weight_function", "bias_function"):
                functions = getattr(module, name, ())
                if any(isinstance(function, kind) for function in functions):
                    setattr(module, name, [f for f in functions if not isinstance(f, kind)])


class GGUFModelPatcher(_PackedWeightPatching, ModelPatcher):
    """The static patcher: CPUs, and GPUs without dynamic VRAM."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if not force_patch_weights and self._differs_by_factors(device_to):
            extra_memory -= self._exchange_factors(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def _differs_by_factors(self, device: torch.device) -> bool:
        """Whether the model is loaded with other patches than these, and both leave the weights as they are. ComfyUI
        would take all of it off the device, and load it again."""
        model = self.model
        if model.current_weight_patches_uuid in (None, self.patches_uuid) or model.device != device:
            return False
        mapped = set(mapped_linears(model).values())
        functions = (m for m in model.modules() if m not in mapped and _has_functions(m))
        if self.backup or self.hook_backup or self.weight_wrapper_patches or any(functions):
            return False
        if self.get_all_callbacks(CallbacksMP.ON_LOAD):  # which ComfyUI calls when it loads other patches
            return False
        beside = (item for item in self.patches.items() if not self._stays_mapped(item[0]))
        return all(self._is_patched_in_use(key) and is_low_rank(patches) for key, patches in beside)

    def _exchange_factors(self, device: torch.device) -> int:
        """Puts these patches in the place of those that the model is loaded with; the bytes that they take more."""
        before = self._factors_bytes()
        try:
            self._let_go_of_low_rank(device)
            for key, factors in self._low_rank_patches(device).items():
                self._module_of(key).low_rank = factors
            self._patch_mapped_linears(device)
        except Exception:
            self.detach()
            raise
        more = self._factors_bytes() - before
        self.model.model_loaded_weight_memory += more
        self.model.current_weight_patches_uuid = self.patches_uuid
        return more

    def _factors_bytes(self) -> int:
        held = (getattr(m, "low_rank", None) for m in self.model.modules() if not getattr(m, "stays_mapped", False))
        return sum(factors.nbytes for factors in held if factors is not None)

    def pin_weight_to_device(self, key):
        # What lies in the file's map cannot be page-locked safely: neither do weights begin at pages there, nor do all
        # drivers take a mapped file's. A weight that is pinned gets memory of its own, as ComfyUI's dense ones have, as
        # long as it is.
        weight = comfy.utils.get_attr(self.model, key)
        if comfy.model_management.MAX_PINNED_MEMORY > 0 and is_in_map(weight):
            comfy.utils.set_attr_param(self.model, key, weight.clone())
            comfy.utils.get_attr(self.model, key).original_in_map = weight
        super().pin_weight_to_device(key)
        if key not in self.pinned:
            self._back_into_map(key)

    def unpin_weight(self, key):
        super().unpin_weight(key)
        self._back_into_map(key)

    def _back_into_map(self, key: str) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        original = original_in_map(weight)
        if original is not None and comfy.model_management.is_device_cpu(weight.device):
            comfy.utils.set_attr(self.model, key, original)


class GGUFModelPatcherDynamic(_PackedWeightPatching, ModelPatcherDynamic):
    """The patcher for dynamic VRAM."""

    def __new__(cls, model=None, load_device=None, offload_device=None, *args, **kwargs):
        if load_device is not None and comfy.model_management.is_device_cpu(load_device):
            return GGUFModelPatcher(model, load_device, offload_device, *args, **kwargs)
        return super().__new__(cls)

    def load(self, *args, dirty=False, **kwargs):
        """With ``dirty``, ComfyUI's word for other patches than before, it sends every weight to the device anew. Those
        of packed weights change nothing there: what is resident stays."""
        resident = {m: m._v_signature for m in self.model.modules() if dirty and _unpatched_on_device(m)}
        super().load(*args, dirty=dirty, **kwargs)
        for module, signature in resident.items():
            if _unpatched_on_device(module):
                module._v_signature = signature

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        if type(clone) is ModelPatcher:  # disable_dynamic=True: ComfyUI names its static class itself
            clone.__class__ = GGUFModelPatcher
        return clone


def _has_functions(module: torch.nn.Module) -> bool:
    return any(getattr(module, f"{name}_function", None) for name in ("weight", "bias"))


def _unpatched_on_device(module: torch.nn.Module) -> bool:
    """Whether what dynamic VRAM keeps of a module's parameters is what the file has: patches act when they are used."""
    functions = (getattr(module, f"{name}_lowvram_function", None) for name in ("weight", "bias"))
    return hasattr(module, "_v") and not any(functions)


def for_packed_weights(patcher: ModelPatcher) -> GGUFModelPatcher | GGUFModelPatcherDynamic:
    """ComfyUI's freshly made patcher as the one of the same kind that knows packed weights, all else unchanged."""
    patcher.model.low_rank_without_hooks = {}
    patcher.__class__ = GGUFModelPatcherDynamic if patcher.is_dynamic() else GGUFModelPatcher
    return patcher
