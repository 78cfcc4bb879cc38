"""Builds the bytes of GGUF files, valid ones and broken ones, field by field and without gguf-py."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALAR_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"} | {
    U64: "Q",
    I64: "q",
    F64: "d",
}


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor table with its data.

    Attributes:
        name: ``bytes`` for a name that is not UTF-8.
        sizes: as GGUF stores them, innermost first.
        type_id: ggml's number of the type.
        data: the packed bytes.
        offset: where the table says that the data are; None for the next aligned place.
    """

    name: str | bytes
    sizes: Sequence[int]
    type_id: int
    data: bytes
    offset: int | None = None


def gguf_bytes(*args, **kwargs) -> bytes:
    """The file that `gguf_fields` describes."""
    return b"".join(gguf_fields(*args, **kwargs))


def gguf_fields(
    metadata: Sequence[tuple] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_value_count: int | None = None,
) -> list[bytes]:
    """The fields of a file in order: every number, string length, string, padding and tensor's data by itself.

    Args:
        metadata: (key, value type, value); an array's value is (element type, elements).
        tensors: the tensors in the order of table and data.
        alignment: where the data go; the metadata must name it too if it is not 32.
        tensor_count, key_value_count: what the header says, if not the truth.
    """
    fields = [
        magic,
        struct.pack("<I", version),
        struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count),
        struct.pack("<Q", len(metadata) if key_value_count is None else key_value_count),
    ]
    for key, value_type, value in metadata:
        fields += [*string(key), struct.pack("<I", value_type), *encode(value_type, value)]
    end = 0
    for tensor in tensors:
        start = end + -end % alignment
        fields += string(tensor.name)
        fields.append(struct.pack("<I", len(tensor.sizes)))
        fields += [struct.pack("<Q", size) for size in tensor.sizes]
        fields.append(struct.pack("<I", tensor.type_id))
        fields.append(struct.pack("<Q", start if tensor.offset is None else tensor.offset))
        end = start + len(tensor.data)
    position = sum(map(len, fields))
    for tensor in tensors:
        padding = bytes(-position % alignment)
        fields += [padding, tensor.data]
        position += len(padding) + len(tensor.data)
    return fields


def string(text: str | bytes) -> list[bytes]:
    data = text.encode() if isinstance(text, str) else text
    return [struct.pack("<Q", len(data)), data]


def encode(value_type: int, value) -> list[bytes]:
    if value_type == STRING:
        return string(value)
    if value_type == ARRAY:
        element_type, elements = value
        fields = [struct.pack("<I", element_type), struct.pack("<Q", len(elements))]
        if element_type in SCALAR_CODES:
            return [*fields, struct.pack(f"<{len(elements)}{SCALAR_CODES[element_type]}", *elements)]
        return fields + [field for element in elements for field in encode(element_type, element)]
    return [struct.pack("<" + SCALAR_CODES[value_type], value)]
