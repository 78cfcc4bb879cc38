"""The node Convert to AuraFlow GGUF."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.text_encoders.aura_t5
import folder_paths
from comfy_api.latest import io, ui

from ..loader.files.parts import PARTS
from ..quantizer.recipe import RECIPES
from .feedback import show_line, shown_progress
from .folders import MODEL_FOLDER, TEXT_ENCODER_FOLDER, file_names, fingerprint, full_path
from .sampling import IMATRICES, NO_FILE

_SOURCE_FOLDERS = {  # ComfyUI's keys of what is in each
    "diffusion_models": ("diffusion_models", MODEL_FOLDER),
    "checkpoints": ("checkpoints",),
    "text_encoders": ("text_encoders", TEXT_ENCODER_FOLDER),
}
_TARGET_FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders"}
_AUTO = "auto"


def type_input() -> io.Combo.Input:
    return io.Combo.Input(
        "type",
        options=list(RECIPES),
        default="Q4_K_M",
        tooltip="Q8_0 is near lossless, Q4_K_M a third of 16 bit. IQ1_S, IQ2_XXS and IQ2_XS need an imatrix.",
    )


def tensor_types_input() -> io.String.Input:
    return io.String.Input(
        "tensor_types",
        default="",
        multiline=True,
        advanced=True,
        tooltip="Types that go before the recipe's, one PATTERN=TYPE a line: single_layers.*.mlp.c_proj=Q6_K",
    )


def rules(tensor_types: str) -> list[str]:
    return [line.strip() for line in tensor_types.splitlines() if line.strip()]


class AuraFlowGGUFConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFConvert",
            display_name="Convert to AuraFlow GGUF",
            category="advanced/AuraFlow",
            description=(
                "Makes a GGUF file from an AuraFlow or Pony V7 checkpoint, or from their text encoder's, in one step "
                "and tensor by tensor, so that a large model needs little memory."
            ),
            search_aliases=["gguf", "quantize", "convert", "q4_k_m"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=_sources(),
                    tooltip="A checkpoint in any spelling; of a sharded one, any part.",
                ),
                type_input(),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip=(
                        "The file's name in models/diffusion_models, a text encoder's in models/text_encoders. "
                        "Empty: the source's name and the type."
                    ),
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name."),
                IMATRICES.input("imatrix", tooltip="An importance matrix in output/imatrix.", optional=True),
                tensor_types_input(),
                io.Combo.Input(
                    "part",
                    options=[_AUTO, *PARTS],
                    default=_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What to convert. auto: what the source is; of an all-in-one checkpoint the transformer.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The file that was made.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str, **kwargs) -> str:
        return f"{fingerprint(*_located(source))} {sorted(kwargs.items())}"

    @classmethod
    def execute(
        cls,
        source: str,
        type: str,
        output_name: str = "",
        overwrite: bool = False,
        imatrix: str = NO_FILE,
        tensor_types: str = "",
        part: str = _AUTO,
    ) -> io.NodeOutput:
        from ..quantizer.convert import convert, model_name, part_in  # needs libgguf, the other nodes do not

        path = full_path(*_located(source))
        part = part_in(path) if part == _AUTO else part
        target = target_path(output_name or f"{model_name(path)}-{type}", _TARGET_FOLDERS[part])
        convert(
            path,
            target,
            type,
            overwrite=overwrite,
            tensor_types=rules(tensor_types),
            imatrix=IMATRICES.path(imatrix),
            part=part,
            tokenizer=_tokenizer() if part == "text_encoder" else None,
            progress=shown_progress(),
        )
        show_line(cls, str(target))
        return io.NodeOutput(str(target), ui=ui.PreviewText(str(target)))


def _sources() -> list[str]:
    """The choices: a folder of ``models`` with the name of a file in it."""
    names = (f"{folder}/{name}" for folder, keys in _SOURCE_FOLDERS.items() for key in keys for name in file_names(key))
    return list(dict.fromkeys(names))  # other packs list GGUF files under both keys


def _located(source: str) -> tuple[str, str]:
    """ComfyUI's key of the folder that a choice is in, and its name there."""
    folder, _, name = source.partition("/")
    if folder not in _SOURCE_FOLDERS:
        raise ValueError(f"{source} is in none of the folders {', '.join(_SOURCE_FOLDERS)}.")
    keys = _SOURCE_FOLDERS[folder]
    return next((key for key in keys if name in file_names(key)), keys[0]), name


def _tokenizer() -> Path:
    """ComfyUI's own copy of Pile-T5's."""
    return Path(comfy.text_encoders.aura_t5.__file__).with_name("t5_pile_tokenizer") / "tokenizer.model"


def target_path(name: str, folder: str) -> Path:
    """Where a file of a name is to be made in a folder of models, by ComfyUI's key of it.

    Raises:
        ValueError: the name is that of no file in that folder itself.
    """
    if name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"{name} is not a file's name: give one without a folder.")
    name = name if name.lower().endswith(".gguf") else f"{name}.gguf"
    paths = folder_paths.get_folder_paths(folder)
    # ComfyUI lists the older names, models/unet and models/clip, first: files go where the tooltip says.
    named = (path for path in paths if os.path.basename(path) == folder)
    return Path(next(named, paths[0]), name)
