"""AuraFlow GGUF: ComfyUI nodes that load, run and make GGUF files of AuraFlow transformers.

Without ComfyUI it has `load_diffusers_transformer` and `load_diffusers_text_encoder` (docs/diffusers.md).
"""

WEB_DIRECTORY = "./web"
"""What ComfyUI serves to the browser: the inspector's panel and the help pages."""


async def comfy_entrypoint():
    """The extension object that ComfyUI (V3) asks a node pack for."""
    from .nodes import AuraFlowGGUFExtension

    return AuraFlowGGUFExtension()


def __getattr__(name: str):
    """The door to diffusers, which is imported when it is asked for."""
    if name == "load_diffusers_transformer":
        from .loader.diffusers.transformer import load_diffusers_transformer

        return load_diffusers_transformer
    if name == "load_diffusers_text_encoder":
        from .loader.diffusers.text_encoder import load_diffusers_text_encoder

        return load_diffusers_text_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
