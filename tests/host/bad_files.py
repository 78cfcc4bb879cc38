"""Files that a loader has to refuse."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from auraflow_gguf.devtools import random_models


def write_flux(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("double_blocks.0.img_attn.norm.key_norm.scale", np.ones(128, np.float32))
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", np.ones((96, 32), np.float16))
    _write(writer)


def write_text_encoder(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float16))
    writer.add_tensor("enc.blk.0.attn_q.weight", np.ones((32, 32), np.float16))
    _write(writer)


def write_truncated(path: Path) -> None:
    with open(random_models.cached_auraflow(), "rb") as whole:
        path.write_bytes(whole.read(2**20))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
