"""Making GGUF files: checkpoint → recipe → packed tensors → file. Imports without ComfyUI."""
