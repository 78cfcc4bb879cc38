"""AuraFlow GGUF: ComfyUI nodes that load, run and make GGUF files of AuraFlow transformers."""

WEB_DIRECTORY = "./web"
"""What ComfyUI serves to the browser: the inspector's panel and the help pages."""


async def comfy_entrypoint():
    """The extension object that ComfyUI (V3) asks a node pack for."""
    from .nodes import AuraFlowGGUFExtension

    return AuraFlowGGUFExtension()
