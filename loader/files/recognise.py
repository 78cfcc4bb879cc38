"""What a file is that is not the wanted model, and where in ComfyUI it belongs.

One table of recognisers for tensors, first hit first, and one for files that are no GGUF file at all. The names are
those by which ComfyUI's ``comfy/model_detection.py`` and ``comfy/sd.py`` tell models apart, diffusers' and llama.cpp's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

MAX_NAMES = 4096
MAX_NAME_LENGTH = 128
HEAD_BYTES = 512
MAX_SAFETENSORS_HEADER = 100_000_000
SHOWN_TEXT = 60


@dataclass(frozen=True)
class Recognised:
    """What a file is ("a Flux transformer") and what to do with it, in full sentences."""

    what: str
    advice: str


@dataclass(frozen=True)
class Recogniser:
    """A kind of file.

    Attributes:
        what, advice: see :class:`Recognised`.
        names: parts of tensors' names, each with its alternatives separated by ``|``. The file has, for each, a
            tensor with such a part in its name; so prefixes do not matter.
        shape: the shape of the tensor found first, where names alone do not tell.
        architectures: values of ``general.architecture`` that mean this kind.
    """

    what: str
    advice: str
    names: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    architectures: tuple[str, ...] = ()

    def fits(self, names: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file's tensors are of this kind; ``names`` are theirs, one a line."""
        hits = [_find(alternatives.split("|"), names) for alternatives in self.names]
        return None not in hits and (self.shape is None or shapes.get(hits[0]) == self.shape)


def _find(parts: Sequence[str], names: str) -> str | None:
    """The first line of ``names`` with one of the parts in it."""
    for part in parts:
        position = names.find(part)
        if position >= 0:
            end = names.find("\n", position)
            return names[names.rfind("\n", 0, position) + 1 : end if end >= 0 else None]
    return None


def _transformer(model: str) -> str:
    return (
        f"Load it with a loader for {model}: a GGUF file with 'Unet Loader (GGUF)' of ComfyUI-GGUF, "
        "any other with ComfyUI's 'Load Diffusion Model'."
    )


def _unet(model: str) -> str:
    return (
        f"Load it with a loader for {model}: a GGUF file with 'Unet Loader (GGUF)' of ComfyUI-GGUF, "
        "a checkpoint with ComfyUI's 'Load Checkpoint'."
    )


_TEXT_ENCODER = (
    "AuraFlow's text encoder is Pile-T5-XL; this one belongs in models/text_encoders, "
    "for 'CLIPLoader (GGUF)' of ComfyUI-GGUF or ComfyUI's 'Load CLIP'."
)
_LORA = "Move it to models/loras and apply it with 'Load LoRA' after the model is loaded."
_LORA_NAME = (
    ".lora_A|.lora_B|.lora_a|.lora_b|.lora_up|.lora_down|lora.up.|lora.down.|.lokr_w|.hada_w|.oft_blocks|.dora_scale"
)
_T5_MLP = "enc.blk.0.ffn_up.weight|encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
_UMT5_BIAS = "enc.blk.1.attn_rel_b|encoder.block.1.layer.0.SelfAttention.relative_attention_bias"
_LANGUAGE_MODELS = (
    *("llama", "llama4", "mistral3", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl"),
    *("gemma", "gemma2", "gemma3", "gemma3n", "phi2", "phi3", "deepseek2", "gpt2", "gptneox", "gpt-oss"),
    *("falcon", "mamba", "bert", "command-r", "glm4", "granite", "starcoder2", "stablelm", "olmo2"),
)


RECOGNISERS = (
    Recogniser(
        "a LoRA for AuraFlow",
        _LORA,
        (_LORA_NAME, "double_layers|single_layers|joint_transformer_blocks"),
    ),
    Recogniser(
        "a LoRA",
        "It is a LoRA for another model than AuraFlow: move it to models/loras and use it with that model.",
        (_LORA_NAME,),
    ),
    Recogniser(
        "an AuraFlow transformer",
        "Move it to models/diffusion_models and load it with 'Load AuraFlow (GGUF)'.",
        ("double_layers.0.attn.w1q.weight|joint_transformer_blocks.0.attn.add_q_proj.weight",),
        architectures=("aura",),
    ),
    Recogniser(
        "a Chroma transformer",
        _transformer("Chroma"),
        ("distilled_guidance_layer.",),
        architectures=("chroma",),
    ),
    Recogniser(
        "a HunyuanVideo transformer",
        _transformer("HunyuanVideo"),
        ("txt_in.individual_token_refiner.blocks.0.|context_embedder.token_refiner.refiner_blocks.0.",),
        architectures=("hyvid",),
    ),
    Recogniser(
        "a Flux transformer",
        _transformer("Flux"),
        ("double_blocks.0.img_attn.norm.key_norm.|single_transformer_blocks.0.proj_mlp.",),
        architectures=("flux",),
    ),
    Recogniser(
        "a Stable Diffusion 3 transformer",
        _transformer("Stable Diffusion 3"),
        ("joint_blocks.0.context_block.attn.qkv.|transformer_blocks.0.ff_context.net.0.proj.",),
        architectures=("sd3",),
    ),
    Recogniser(
        "a Wan transformer",
        _transformer("Wan"),
        ("head.modulation|condition_embedder.text_embedder.linear_1.", "blocks.0."),
        architectures=("wan",),
    ),
    Recogniser(
        "a Qwen-Image transformer",
        _transformer("Qwen-Image"),
        ("txt_norm.weight", "transformer_blocks.0.img_mod.1."),
        architectures=("qwen_image",),
    ),
    Recogniser(
        "an LTX-Video transformer",
        _transformer("LTX-Video"),
        (
            "adaln_single.emb.timestep_embedder.linear_1.|time_embed.emb.timestep_embedder.linear_1.",
            "caption_projection.linear_1.",
            "transformer_blocks.0.scale_shift_table",
        ),
        architectures=("ltxv",),
    ),
    Recogniser(
        "a Z-Image transformer",
        _transformer("Z-Image"),
        ("cap_embedder.1.weight", "noise_refiner.0.attention."),
        shape=(3840, 2560),
    ),
    Recogniser(
        "a Lumina 2 transformer",
        _transformer("Lumina 2"),
        (
            "cap_embedder.1.weight|caption_embedder.1.weight",
            "noise_refiner.0.attention.|noise_refiner.0.attn.",
        ),
        architectures=("lumina2",),
    ),
    Recogniser(
        "a Stable Diffusion XL UNet",
        _unet("Stable Diffusion XL"),
        ("input_blocks.0.0.weight|down_blocks.0.resnets.0.conv1.weight", "label_emb.0.0.|add_embedding."),
        architectures=("sdxl",),
    ),
    Recogniser(
        "a Stable Diffusion 1 or 2 UNet",
        _unet("Stable Diffusion"),
        (
            "input_blocks.0.0.weight|down_blocks.0.resnets.0.conv1.weight",
            "input_blocks.1.1.transformer_blocks.0.attn2.|down_blocks.0.attentions.0.transformer_blocks.0.attn2.",
        ),
        architectures=("sd1",),
    ),
    Recogniser(
        "the Pile-T5-XL text encoder",
        "It is AuraFlow's text encoder, not its transformer: it belongs in models/text_encoders, "
        "a GGUF file for 'Load AuraFlow Text Encoder (GGUF)', any other for ComfyUI's 'Load CLIP'.",
        (
            _T5_MLP,
            _UMT5_BIAS,
        ),
        shape=(5120, 2048),
    ),
    Recogniser(
        "a UMT5-XXL text encoder",
        _TEXT_ENCODER,
        (
            _T5_MLP,
            _UMT5_BIAS,
        ),
        shape=(10240, 4096),
    ),
    Recogniser(
        "a T5-XXL text encoder",
        _TEXT_ENCODER,
        (_T5_MLP,),
        shape=(10240, 4096),
    ),
    Recogniser(
        "a T5 text encoder",
        _TEXT_ENCODER,
        ("enc.blk.0.attn_q.weight|encoder.block.0.layer.0.SelfAttention.q.weight",),
        architectures=("t5", "t5encoder"),
    ),
    Recogniser(
        "a CLIP-G text encoder",
        _TEXT_ENCODER,
        ("text_model.encoder.layers.30.|transformer.resblocks.30.attn.in_proj_weight",),
    ),
    Recogniser(
        "a CLIP-L text encoder",
        _TEXT_ENCODER,
        ("text_model.encoder.layers.0.mlp.fc1.weight|transformer.resblocks.0.attn.in_proj_weight",),
    ),
    Recogniser(
        "a VAE",
        "Move it to models/vae and load it with 'Load VAE'. AuraFlow takes SDXL's.",
        (
            "decoder.conv_in.weight|decoder.conv_in.conv.weight|decoder.middle.0.residual.0.gamma",
            "decoder.up|decoder.mid",
        ),
    ),
    Recogniser(
        "the vision part (mmproj) of a language model",
        "It works only beside its language model: in ComfyUI both belong in models/text_encoders.",
        ("v.blk.0.", "mm."),
        architectures=("clip",),
    ),
    Recogniser(
        "a language model",
        "Language models run in llama.cpp and the like; as the text encoder of another image model it belongs in "
        "models/text_encoders, for 'CLIPLoader (GGUF)' of ComfyUI-GGUF.",
        (
            "token_embd.weight|embed_tokens.weight",
            "blk.0.attn_q|blk.0.ssm_in.|layers.0.self_attn.|layers.0.linear_attn.",
        ),
        architectures=_LANGUAGE_MODELS,
    ),
)


def recognise(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, object]) -> Recognised | None:
    """What the tensors of a file are, by their names and shapes, else by ``general.architecture``.

    No model needs more than its first :data:`MAX_NAMES` names of :data:`MAX_NAME_LENGTH` characters to be known.
    """
    names = "\n".join(name for name in islice(shapes, MAX_NAMES) if len(name) <= MAX_NAME_LENGTH)
    for kind in RECOGNISERS:
        if kind.fits(names, shapes):
            return Recognised(kind.what, kind.advice)
    return recognise_architecture(metadata.get("general.architecture"))


def recognise_architecture(name: object) -> Recognised | None:
    """What ``general.architecture`` says a file is, None when the value is not the name of a known model."""
    for kind in RECOGNISERS:
        if name in kind.architectures:
            return Recognised(kind.what, kind.advice)
    return None


_AGAIN = "Download the file itself again."

MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "Fetch the file itself with `git lfs pull`."),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "If it holds a workflow, drop it into ComfyUI's window."),
    (b"\xff\xd8\xff", "a JPEG image", _AGAIN),
    (b"PK\x03\x04", "a zip archive or a torch checkpoint", "Unpack the archive; convert a checkpoint to safetensors."),
    (b"\x80\x02", "a pickled torch checkpoint", "Convert it to safetensors, then with `auraflow-gguf convert`."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it."),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it."),
)


def recognise_bytes(head: bytes, path: str | os.PathLike) -> tuple[str, str] | None:
    """What a file is that is not a GGUF file, by its first bytes.

    Args:
        head: the file's beginning, of which :data:`HEAD_BYTES` are looked at.
        path: the file.

    Returns:
        what was found and what to do, or None when the bytes tell nothing.
    """
    head = head[:HEAD_BYTES]
    if not head:
        return "an empty file", "The download did not start: download the file again."
    if not any(head):
        return "nothing but zero bytes at its beginning", "The download is unfinished: download the file again."
    for magic, found, advice in MAGICS:
        if head.startswith(magic):
            return found, advice
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER:
        load = "Load it" if os.fspath(path).lower().endswith(".safetensors") else "Rename it to .safetensors, load it"
        return "a safetensors file", f"{load} with 'Load Diffusion Model', or convert it with `auraflow-gguf convert`."
    return _recognise_text(head)


def _recognise_text(head: bytes) -> tuple[str, str] | None:
    words = " ".join(head.decode("utf-8-sig", errors="ignore").split())
    if not words.isprintable():
        return None
    if words.lower().startswith(("<!doctype html", "<html", "<?xml")):
        return (
            "a web page",
            "The link led to a page, often an error or a login, and not to the file: open it in a browser.",
        )
    if words.startswith(("{", "[")):
        return "a JSON text", "It is a workflow or a model's configuration: pick the model file beside it."
    if " " in words:
        shown = words if len(words) <= SHOWN_TEXT else words[:SHOWN_TEXT] + "…"
        return f'the text "{shown}"', "The server answered with a message instead of the file: see what it says."
    return None
