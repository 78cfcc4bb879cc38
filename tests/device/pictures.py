"""What is sampled of a MODEL on the CPU and on the device: as it is, and with patches."""

from __future__ import annotations

from ..host.patches import KINDS, MODULATION, MORE_LINEARS, lora, lora_hooks, patched
from ..host.sampling import QUICK, sample

# One linear for each kind of patch: of all widths, in a layer and outside, with modulation that stays off the device.
ATTENTION = [f"double_layers.0.attn.{name}" for name in ("w1q", "w1v", "w2o", "w1k")]
PLACES = [MODULATION, *(name for name in MORE_LINEARS if name != MODULATION), *ATTENTION]


def with_every_kind(model):
    """All kinds of patches at once, each on a linear of its own."""
    for kind, name in zip(KINDS, PLACES, strict=True):
        model = patched(model, kind, 0.8, (name,))
    return model


def picture(model):
    return sample(model, **QUICK)


def picture_with_every_kind(model):
    return picture(with_every_kind(model))


def picture_with_hooks(model):
    return sample(
        model, **QUICK | {"steps": 4}, hooks=lora_hooks(model, lora, (0.2, 1.5), (MODULATION, "final_linear"))
    )


def picture_with_lora(model):
    return picture(patched(model, lora))
