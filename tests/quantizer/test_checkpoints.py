"""Every kind of source gives the same tensors; a damaged one is refused in plain words."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.quantizer.checkpoints import gguf as module
from auraflow_gguf.quantizer.checkpoints import open_checkpoint
from safetensors.torch import save_file

from .small_model import save_sharded

WEIGHTS = {
    "a.weight": torch.arange(64.0).reshape(2, 32).sub(20),
    "a.bias": torch.tensor([0.5, -3.0], dtype=torch.float16),
    "b.weight": torch.arange(32.0).reshape(1, 32).to(torch.bfloat16),
}


def check(checkpoint, weights=WEIGHTS):
    assert dict(checkpoint.shapes) == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        read = checkpoint.read(name)
        assert checkpoint.dtype(name) == read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.packed(name) is None


def test_one_safetensors_file(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    weights = {str(dtype): WEIGHTS["a.weight"].to(dtype) for dtype in dtypes}
    save_file(weights, tmp_path / "a.safetensors", metadata={"modelspec.title": "A"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.metadata == {"modelspec.title": "A"}
    assert checkpoint.files == (str(tmp_path / "a.safetensors"),)
    assert set(checkpoint.shapes) == set(weights)
    for name, tensor in weights.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.double(), tensor.double())


def test_shards_by_their_index_by_one_of_them_and_by_their_folder(tmp_path):
    folder = tmp_path / "pony" / "transformer"
    folder.mkdir(parents=True)
    weights = dict(sorted(WEIGHTS.items()))
    index = save_sharded(folder, weights)
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    for source in (index, shard, folder, tmp_path / "pony"):
        check(open_checkpoint(source), weights)
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"no file {shard.name} beside it.*Download the missing part"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),  # diffusers' and transformers'
        ("model-0000{}-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("pony.v7-0000{}-of-00002.safetensors", "pony.v7.safetensors.index.json"),
    ],
)
def test_shards_of_a_variant(tmp_path, shard, index):
    names = list(WEIGHTS)
    files = {name: shard.format(1 + (place >= 2)) for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: WEIGHTS[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / index).write_text(json.dumps({"weight_map": files}))
    for source in (tmp_path / shard.format(2), tmp_path / index, tmp_path):
        assert open_checkpoint(source).shapes.keys() == WEIGHTS.keys()
    (tmp_path / index).unlink()
    for source in (tmp_path / shard.format(1), tmp_path):
        with pytest.raises(ModelFileError, match=f"part 1 of 2, and no index of the parts.*{index} beside it|pony"):
            open_checkpoint(source)


def test_the_only_part_needs_no_index(tmp_path):
    save_file(WEIGHTS, tmp_path / "model-00001-of-00001.safetensors")
    check(open_checkpoint(tmp_path / "model-00001-of-00001.safetensors"))


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    (tmp_path / "folder").mkdir()
    index = tmp_path / "folder" / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "../outside.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"no file \.\./outside\.safetensors beside it"):
        open_checkpoint(index)


@pytest.mark.parametrize("text", ["<html>", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "c"}}'])
def test_a_broken_index(tmp_path, text):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ModelFileError, match="expected the index of a sharded safetensors checkpoint"):
        open_checkpoint(index)


def test_the_plain_checkpoint_among_variants(tmp_path):
    save_file(WEIGHTS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    check(open_checkpoint(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match=r"several checkpoints: .*fp16\.safetensors, other\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("nest", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin"])
def test_torch_files(tmp_path, nest, ending):
    torch.save(nest(WEIGHTS), tmp_path / f"a.{ending}")
    check(open_checkpoint(tmp_path / f"a.{ending}"))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_a_torch_file_with_code_is_refused(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"torch\.load refuses"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_torch_file_that_ends_early_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFileError, match=r"torch\.load refuses"):
        open_checkpoint(tmp_path / "a.pt")


def test_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)  # two rows at a time
    packed = gguf.quants.quantize(
        np.linspace(-3, 3, 160, dtype=np.float32).reshape(5, 32), gguf.GGMLQuantizationType.Q8_0
    )
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "aura")
    writer.add_tensor("a.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("a.bias", WEIGHTS["a.bias"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.metadata["general.architecture"] == "aura"
    assert checkpoint.dtype("a.weight") == torch.float32
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(checkpoint.read("a.weight").numpy(), expected)
    quant_type, rows = checkpoint.packed("a.weight")
    assert quant_type.name == "Q8_0"
    assert np.array_equal(rows.numpy(), packed)
    assert checkpoint.dtype("a.bias") == torch.float16
    assert torch.equal(checkpoint.read("a.bias"), WEIGHTS["a.bias"])
    assert checkpoint.packed("a.bias") is None


@pytest.mark.parametrize(
    ("scale_name", "companions"),
    [
        ("a.scale_weight", {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn), "a.scale_input": torch.ones(())}),
        ("a.weight_scale", {"a.comfy_quant": torch.zeros(20, dtype=torch.uint8), "a.input_scale": torch.ones(1)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8(tmp_path, scale_name, companions, dtype):
    weight = WEIGHTS["a.weight"].to(dtype)
    tensors = {"a.weight": weight, scale_name: torch.tensor(0.37), "b.weight": weight.clone(), **companions}
    save_file(tensors, tmp_path / "a.safetensors")
    expected = weight.float() * torch.tensor(0.37)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.shapes) == {"a.weight", "b.weight"}
    assert checkpoint.dtype("a.weight") == torch.float32
    assert torch.equal(checkpoint.read("a.weight"), expected)
    assert checkpoint.dtype("b.weight") == dtype
    assert torch.equal(checkpoint.read("b.weight").float(), weight.float())


def test_other_quantized_weights_are_refused(tmp_path):
    blocks = {"a.weight": WEIGHTS["a.weight"].to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(2, 1)}
    save_file(blocks | {"b.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=r"a.weight_scale of shape \(2, 1\), expected one scale"):
        checkpoint.read("a.weight")
    with pytest.raises(ModelFileError, match=r"b.weight as torch.int8, expected floating-point"):
        checkpoint.read("b.weight")


@pytest.mark.parametrize("companion", ["weight_scale_2", "weight_s_channel", "weight.absmax"])
def test_formats_with_other_scales_are_refused_by_name(tmp_path, companion):
    blocks = {"a.weight": torch.zeros(2, 2, dtype=torch.uint8), f"a.{companion}": torch.ones(1)}
    save_file(blocks, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=f"another quantized format than fp8 .a.{companion}.*Convert the original"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_tensor_of_another_part_may_have_any_dtype(tmp_path):
    if hasattr(torch, "float8_e8m0fnu"):
        other = torch.ones(2).to(torch.float8_e8m0fnu)
        save_file(WEIGHTS | {"other.scale": other}, tmp_path / "a.safetensors")
        assert open_checkpoint(tmp_path / "a.safetensors").dtype("other.scale") == other.dtype


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file, expected a safetensors file"),
        (b"<!DOCTYPE html><html>", "found a web page, expected a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a Git LFS pointer.*`git lfs pull`"),
        (bytes(range(100, 130)), "found 30 bytes that do not begin like one"),
        (struct.pack("<Q", 500) + b"{", "found the end of the file after 9 bytes, expected at least 508 bytes"),
        (with_header(b"{nonsense}"), "found a header that is not JSON"),
        (with_header(b"[" * 10000), "found a header that is not JSON"),
        (with_header([1, 2]), "found a header that is not a table"),
        (with_header({"__metadata__": 3}), "found a header that is not a table"),
        (with_header({"a": 3}), "found a tensor a described as 3"),
        (with_header({"a": TENSOR | {"dtype": "F4"}}), "found a tensor a described as {'dtype': 'F4'"),
        (with_header({"a": TENSOR | {"data_offsets": [0]}}), "found a tensor a described as"),
        (
            with_header({"a": TENSOR | {"data_offsets": [0, 4]}}, bytes(8)),
            r"found a tensor a of shape \[2\] in 4 bytes",
        ),
        (
            with_header({"a": TENSOR | {"data_offsets": [-8, 0]}}, bytes(8)),
            r"found a tensor a of shape \[2\] in 8 bytes",
        ),
        (with_header({"a": TENSOR}, bytes(7)), "The file is cut off: download or copy it again."),
    ],
)
def test_a_broken_safetensors_file(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-340])
    with pytest.raises(ModelFileError, match="The file is cut off"):
        checkpoint.read("a.weight")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match="a folder without a safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ModelFileError, match=r"the ending '\.txt'"):
        open_checkpoint(tmp_path / "a.txt")


def test_the_fingerprint_depends_on_names_shapes_dtypes_and_metadata(tmp_path):
    def fingerprint(weights, metadata=None):
        save_file(weights, tmp_path / "a.safetensors", metadata=metadata)
        return open_checkpoint(tmp_path / "a.safetensors").fingerprint()

    plain = fingerprint(WEIGHTS)
    others = (
        fingerprint({"c" + name: tensor for name, tensor in WEIGHTS.items()}),
        fingerprint({name: tensor.float() for name, tensor in WEIGHTS.items()}),
        fingerprint({name: tensor.reshape(-1) for name, tensor in WEIGHTS.items()}),
        fingerprint(WEIGHTS, {"modelspec.title": "A"}),
    )
    assert len(plain) == 64
    assert plain == fingerprint(WEIGHTS)
    assert len({plain, *others}) == 5
