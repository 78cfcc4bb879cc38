"""Makes model files of seeded random weights: right in names, shapes and size, and finite in their output."""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Literal

import gguf
import numpy as np
import torch

from ..loader.files.architecture import NATIVE, Architecture, Size
from ..loader.files.auraflow import AURAFLOW
from ..loader.files.matching import Match, annotations, match
from ..loader.files.pile_t5 import HEAD_SIZE, PILE_T5_XL, STACK
from ..loader.quant_types.base import QuantType
from ..quantizer.convert import CHUNK, convert
from ..quantizer.quality.groups import group_weights
from ..quantizer.quality.layers import ERRORS_KEY as FIT_ERRORS
from ..quantizer.quality.layers import GROUPS_KEY as FIT_GROUPS
from ..quantizer.quantize import quantize
from ..quantizer.recipe import Recipe, recipe_for
from ..quantizer.writer import ALIGNMENT, TensorSpec, write_gguf
from .cache import cache_folder, locked

VERSION = 2
"""Part of the cached files' names: to be raised when what is in them changes."""

MIXTURE_VERSION = 3
"""The same, of the file in a mixture of types: to be raised when the recipe changes."""

BLOCKS = 4096
"""Of each type and size of row, in a file that is packed without being quantized."""

Shapes = dict[str, tuple[int, ...]]

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def cached_auraflow() -> Path:
    """AuraFlow of one double and one single layer at full width as a Q4_K_M GGUF file, made if it is lacking."""

    def make(target: Path) -> None:
        convert(cached_checkpoint(), target, "Q4_K_M")

    return _cached("diffusion_models", "random-auraflow-1-1-Q4_K_M.gguf", make, MIXTURE_VERSION)


def cached_checkpoint() -> Path:
    """The same AuraFlow in bfloat16 as a safetensors file, made if it is lacking."""

    def make(target: Path) -> None:
        make_auraflow(target, double_layers=1, single_layers=1, seed=0)

    return _cached("diffusion_models", "random-auraflow-1-1.safetensors", make)


def cached_text_encoder() -> Path:
    """A Pile-T5-XL text encoder as a Q8_0 GGUF file, made if it is lacking."""

    def make(target: Path) -> None:
        source = target.with_suffix(".safetensors")
        make_text_encoder(source)
        convert(source, target, "Q8_0")

    return _cached("text_encoders", "random-pile-t5-xl-Q8_0.gguf", make)


def cached_vae() -> Path:
    """An SDXL VAE, made if it is lacking."""
    return _cached("vae", "random-sdxl-vae.safetensors", make_vae)


def _cached(kind: str, name: str, make: Callable[[Path], None], version: int = VERSION) -> Path:
    stem, suffix = name.rsplit(".", 1)
    target = cache_folder() / "models" / kind / f"{stem}.v{version}.{suffix}"
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            print(f"Making {target} (once; it may take some minutes)", flush=True)
            with TemporaryDirectory(dir=target.parent) as folder:
                make(Path(folder) / name)
                (Path(folder) / name).replace(target)
    return target


def make_auraflow(
    path: Path,
    double_layers: int,
    single_layers: int,
    seed: int,
    spelling: Literal["native", "diffusers"] = "native",
    dtype: torch.dtype = torch.bfloat16,
    positional: int = 4096,
) -> None:
    """Writes an AuraFlow transformer at full width as a safetensors file.

    Args:
        path: the file; overwritten.
        double_layers, single_layers: how many of each.
        seed: the same seed gives the same weights in both spellings.
        spelling: of the tensors' names. In diffusers' the halves of ``norm_out.linear`` stand the other way round.
        dtype: of all tensors: float32, float16 or bfloat16.
        positional: N, the square number of positional encodings.
    """

    natives = auraflow_shapes(double_layers, single_layers, positional)
    names = {AURAFLOW.spell(native, spelling) if spelling == "diffusers" else native: native for native in natives}

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        row, _ = AURAFLOW.find(names[name], "native")
        weight = random_weight(names[name], shape, seed)
        return weight.roll(shape[0] // 2, dims=0) if row.swap_halves and spelling == "diffusers" else weight

    shapes = {name: natives[native] for name, native in names.items()}
    write_safetensors(path, shapes, values, dtype)


def make_packed_auraflow(
    path: Path,
    recipe: Recipe,
    double_layers: int,
    single_layers: int,
    positional: int = 4096,
    seed: int = 0,
    widths: Mapping[str, int] = MappingProxyType({}),
    count: int = BLOCKS,
) -> None:
    """Writes an AuraFlow transformer as a GGUF file without quantizing all of it, at full width unless told otherwise.

    Each quantized tensor is put together at random from ``count`` blocks that are quantized: the numbers are those of
    a converted file, and take seconds to make in any type.

    Args:
        path: the file; overwritten.
        recipe: which type each tensor gets.
        double_layers, single_layers: how many of each.
        positional: N, the square number of positional encodings.
        seed: of everything.
        widths: dimensions of ``AURAFLOW.fixed`` that are others.
        count: how many blocks of each type and size of row are quantized.
    """
    shapes = auraflow_shapes(double_layers, single_layers, positional, widths)
    tensors = [TensorSpec(name, shape, recipe.type_of(name, shape, torch.bfloat16)) for name, shape in shapes.items()]
    random = np.random.default_rng(seed)

    @functools.cache
    def blocks(quant_type: QuantType, columns: int) -> np.ndarray:
        weights = random_weight(f"{quant_type.name}-{columns}", (count, quant_type.block_size), seed)
        scale = math.sqrt(quant_type.block_size / columns)  # as of a tensor with so many columns
        return quantize(weights * scale, quant_type)

    def data(tensor: TensorSpec) -> Iterator[memoryview]:
        if tensor.type.block_size == 1:
            weight = random_weight(tensor.name, tensor.shape, seed)
            yield memoryview(quantize(weight.reshape(-1, tensor.shape[-1]), tensor.type))
            return
        made = blocks(tensor.type, tensor.shape[-1])
        for begin in range(0, tensor.size, CHUNK):
            chosen = random.integers(count, size=min(CHUNK, tensor.size - begin) // tensor.type.block_size)
            yield memoryview(made[chosen])

    write_gguf(path, {"general.architecture": AURAFLOW.name}, tensors, data, overwrite=True)


def auraflow_shapes(
    double_layers: int,
    single_layers: int,
    positional: int = 4096,
    widths: Mapping[str, int] = MappingProxyType({}),
) -> Shapes:
    """Shapes of AuraFlow's required tensors by native name, at ComfyUI's width or with ``widths`` of their own."""
    sizes = {"positional_encoding_length": positional, "double_layers": double_layers, "single_layers": single_layers}
    return native_shapes(AURAFLOW, {**AURAFLOW.fixed, **widths, **sizes})


def native_shapes(architecture: Architecture, sizes: Mapping[str, int]) -> Shapes:
    """Shapes of a model's required tensors by native name, given all dimensions and the numbers of layers by stack."""
    return {
        row.name(NATIVE, layer): tuple(s.times * sizes[s.dimension] if isinstance(s, Size) else s for s in row.shape)
        for row in architecture.rows
        if row.required
        for layer in (range(sizes[row.stack]) if row.stack else [None])
    }


def make_text_encoder(path: Path, seed: int = 0, layers: int = 24) -> None:
    """Writes a Pile-T5-XL encoder (2.4 GB, float16) with the names of the published files.

    T5 does not divide attention's logits by √(head size); as in T5's own initialization, the weights of the queries
    are smaller instead. Without, each layer magnifies float32's rounding.
    """

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        weight = random_weight(name, shape, seed)
        return weight / math.sqrt(HEAD_SIZE) if name.endswith("SelfAttention.q.weight") else weight

    write_safetensors(path, native_shapes(PILE_T5_XL, PILE_T5_XL.fixed | {STACK: layers}), values, torch.float16)


def make_vae(path: Path, seed: int = 0) -> None:
    """Writes SDXL's VAE (335 MB, float32) with the names of the published files."""
    write_safetensors(path, vae_shapes(), lambda name, shape: random_weight(name, shape, seed), torch.float32)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """``shape`` float32, seeded by ``seed`` and ``name``: norms around 1, biases around 0 with deviation 0.02, all
    else normal with deviation 1/√(inputs), which keeps the size of what passes through."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode())))
    if len(shape) == 1:
        return noise.mul_(0.02).add_(1.0 if name.endswith(".weight") else 0.0)
    inputs = shape[1:] if len(shape) == 4 else shape[-1:]
    return noise.div_(math.sqrt(math.prod(inputs)))


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str, tuple[int, ...]], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Writes a safetensors file tensor by tensor, so that no more than one is in memory.

    Args:
        path: the file; overwritten.
        shapes: of every tensor, in file order.
        values: called with name and shape, gives the tensor in any dtype.
        dtype: what is stored: float32, float16 or bfloat16.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            values(name, shape).to(dtype).flatten().view(torch.uint8).numpy().tofile(file)


def vae_shapes() -> Shapes:
    """Shapes of SDXL's VAE; ComfyUI's ``comfy/ldm/modules/diffusionmodules/model.py``."""
    widths, latent = (128, 256, 512, 512), 4
    shapes: Shapes = {}

    def convolution(name: str, width_in: int, width_out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (width_out, width_in, kernel, kernel)
        shapes[f"{name}.bias"] = (width_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, width_in: int, width_out: int) -> None:
        norm(f"{name}.norm1", width_in)
        convolution(f"{name}.conv1", width_in, width_out)
        norm(f"{name}.norm2", width_out)
        convolution(f"{name}.conv2", width_out, width_out)
        if width_in != width_out:
            convolution(f"{name}.nin_shortcut", width_in, width_out, kernel=1)

    def middle(name: str) -> None:
        residual(f"{name}.block_1", widths[-1], widths[-1])
        norm(f"{name}.attn_1.norm", widths[-1])
        for projection in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.attn_1.{projection}", widths[-1], widths[-1], kernel=1)
        residual(f"{name}.block_2", widths[-1], widths[-1])

    convolution("encoder.conv_in", 3, widths[0])
    width = widths[0]
    for level, width_out in enumerate(widths):
        for block in range(2):
            residual(f"encoder.down.{level}.block.{block}", width, width_out)
            width = width_out
        if level < len(widths) - 1:
            convolution(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid")
    norm("encoder.norm_out", width)
    convolution("encoder.conv_out", width, 2 * latent)
    convolution("quant_conv", 2 * latent, 2 * latent, kernel=1)

    convolution("post_quant_conv", latent, latent, kernel=1)
    convolution("decoder.conv_in", latent, width)
    middle("decoder.mid")
    for level, width_out in reversed(list(enumerate(widths))):
        for block in range(3):
            residual(f"decoder.up.{level}.block.{block}", width, width_out)
            width = width_out
        if level > 0:
            convolution(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    convolution("decoder.conv_out", width, 3)
    return shapes


def full_size(recipe: str | Recipe) -> tuple[Match, list[TensorSpec]]:
    """AuraFlow v0.3 (4 double and 32 single layers) as a recipe would write it: what it is, and its tensors."""
    shapes = auraflow_shapes(double_layers=4, single_layers=32, positional=9216)
    recipe = recipe_for(recipe, imatrix=True) if isinstance(recipe, str) else recipe
    tensors = [TensorSpec(name, shape, recipe.type_of(name, shape, torch.bfloat16)) for name, shape in shapes.items()]
    return match(AURAFLOW, shapes, metadata={}, path="AuraFlow v0.3"), tensors


def write_hollow_fit(path: Path) -> Path:
    """The same as `fit` would write it, with types by chance and errors that fit to them."""
    groups = group_weights(auraflow_shapes(double_layers=4, single_layers=32))
    random = np.random.default_rng(0)
    types = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    places = random.normal(2.5, 1.2, len(groups)).round().clip(0, len(types) - 1).astype(int)
    rules = tuple(
        (name.removesuffix(".weight"), types[place])
        for group, place in zip(groups, places, strict=True)
        for name in group.weights
    )
    errors = (2.0**-places * random.uniform(0.5, 1, len(groups)) / 500).tolist()
    extra = {FIT_GROUPS: [group.name for group in groups], FIT_ERRORS: errors}
    return write_hollow(path, Recipe("fit", 15, rules), extra)


def write_hollow(path: Path, recipe: str | Recipe, extra: Mapping[str, list] = MappingProxyType({})) -> Path:
    """Write a GGUF file of AuraFlow v0.3's size with a true header and zeros for weights, in a hole of the file system:
    it takes no room on most disks, and can be inspected, not run. ``extra`` are further metadata."""
    found, tensors = full_size(recipe)
    metadata = annotations(found) | extra
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture")))
    writer.add_name("AuraFlow v0.3")
    writer.add_file_type((recipe_for(recipe, imatrix=True) if isinstance(recipe, str) else recipe).file_type)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    end = 0
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(tensor.type.id)
        shape = (*tensor.shape[:-1], tensor.type.row_bytes(tensor.shape[-1]))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT
    os.truncate(path, header + end)
    return path
