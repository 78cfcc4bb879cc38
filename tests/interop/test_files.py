"""The same model in every form in which its files are met gives the same output."""

import gguf
import pytest
import torch
from auraflow_gguf.loader.diffusers.transformer import load_diffusers_transformer
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.quantizer.convert import convert
from safetensors.torch import save_file

from ..quantizer.small_model import FIXED, native_weights
from .test_diffusers import HEADS, forward, relative_error

BARE = ("positional_encoding", "register_tokens")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_file(native_weights(), folder / "auraflow.safetensors")
    convert(folder / "auraflow.safetensors", folder / "auraflow.gguf", "Q8_0", fixed=FIXED)
    return folder / "auraflow.gguf"


@pytest.fixture(scope="module")
def expected(source):
    return forward(load_diffusers_transformer(source, heads=HEADS))


def rewrite(source, target, *, architecture="aura", prefix="", flat=False, orig_shape=False, bare=None):
    """The source as another tool would have written it, by gguf-py.

    Args:
        flat: drop the leading 1 of bare parameters.
        orig_shape: and write their true shape into the metadata.
        bare: another float type for the bare parameters.
    """
    file = open_gguf(source)
    writer = gguf.GGUFWriter(target, architecture)
    if architecture is None:
        writer.kv_data[0].pop("general.architecture", None)
    for name, info in file.tensors.items():
        shape = (*info.shape[:-1], info.type.row_bytes(info.shape[-1]))
        data, raw_type = file.packed(name).numpy().reshape(shape), gguf.GGMLQuantizationType(info.type.id)
        if name in BARE:
            if orig_shape:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(info.shape))
            if bare is not None:
                dense = torch.from_numpy(data.copy()).view(torch.float32).to(bare)
                data = dense.view(torch.uint8).numpy()
                raw_type = {
                    torch.float16: gguf.GGMLQuantizationType.F16,
                    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
                    torch.float64: gguf.GGMLQuantizationType.F64,
                }[bare]
            if flat:
                data = data[0]
        writer.add_tensor(prefix + name, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    "form",
    [
        {"prefix": "model.diffusion_model."},
        {"prefix": "model."},
        {"prefix": "diffusion_model."},
        {"prefix": "transformer."},
        {"architecture": "pig"},
        {"architecture": "cow", "prefix": "model.diffusion_model."},
        {"flat": True},
        {"flat": True, "orig_shape": True, "prefix": "model.diffusion_model."},
        {"bare": torch.bfloat16},  # the small model's weights are bfloat16: no digit is lost
        {"bare": torch.float64, "flat": True},
    ],
    ids=str,
)
def test_every_form_gives_the_same_output(source, expected, tmp_path, form):
    path = rewrite(source, tmp_path / "other.gguf", **form)
    assert torch.equal(forward(load_diffusers_transformer(path, heads=HEADS)), expected)


def test_a_file_without_any_metadata(source, expected, tmp_path):
    path = rewrite(source, tmp_path / "other.gguf", architecture=None)
    assert "general.architecture" not in open_gguf(path).metadata
    assert torch.equal(forward(load_diffusers_transformer(path, heads=HEADS)), expected)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_small_linears_may_be_quantized_too(source, expected, tmp_path, type_name):
    target = tmp_path / "all.gguf"
    rules = [f"{module}*={type_name}" for module in ("t_embedder.", "cond_seq_linear", "final_linear", "modF.")]
    convert(source.with_name("auraflow.safetensors"), target, "Q8_0", tensor_types=rules, fixed=FIXED)
    file = open_gguf(target)
    for module in ("t_embedder.mlp.2", "cond_seq_linear", "final_linear", "modF.1"):
        assert file.tensors[f"{module}.weight"].type.name == type_name
        assert AURAFLOW.find(f"{module}.weight", "native")
    output = forward(load_diffusers_transformer(target, heads=HEADS))
    assert 0 < relative_error(output, expected) < 0.3
