"""``save_pretrained`` of a model with packed weights: dense, as the libraries load it, or refused."""

from __future__ import annotations

import os
import types
from collections.abc import Callable

import torch

from ..files.errors import listed
from .modules import dense_state_dict


def save_dense(model: torch.nn.Module, empty: Callable[[], torch.nn.Module]) -> None:
    """Have a model's ``save_pretrained`` save its weights dense.

    Args:
        model: the model; its class stays the library's own, which is the one that the saved files name.
        empty: makes the same model without weights, on the device meta.
    """

    def save_pretrained(self: torch.nn.Module, save_directory: str | os.PathLike, **options) -> None:
        """The library's own, of the dequantized weights; takes the memory of the dense model.

        Raises:
            ValueError: what would be saved is not what this model computes.
        """
        dense, weights = empty(), dense_state_dict(self)
        known = dense.state_dict().keys()
        if adapters := [name for name in weights if ".base_layer." in name or ".lora_" in name]:
            raise ValueError(
                f"The model has adapters ({listed(adapters)}), which are not part of it: "
                "remove them with unload_lora_weights() before it is saved, and save them with save_lora_weights()."
            )
        if others := sorted(weights.keys() - known):
            raise ValueError(
                f"The file has weights that {type(self).__name__} does not know ({listed(others)}) and would leave out "
                "when it is loaded: the model cannot be saved for it."
            )
        if away := [name for name, weight in weights.items() if weight.is_meta]:
            raise ValueError(
                f"The weights are offloaded ({listed(away)}): remove the hooks (remove_all_hooks()) before saving."
            )
        dense.load_state_dict(weights, assign=True)
        type(self).save_pretrained(dense, save_directory, **options)

    model.save_pretrained = types.MethodType(save_pretrained, model)
