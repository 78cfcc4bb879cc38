"""AuraFlow GGUF: ComfyUI nodes that load, run and make GGUF files of AuraFlow transformers."""


async def comfy_entrypoint():
    """The extension object that ComfyUI (V3) asks a node pack for."""
    from .nodes import AuraFlowGGUFExtension

    return AuraFlowGGUFExtension()
