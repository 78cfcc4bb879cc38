"""From the bytes of a GGUF file to a model, room by room: each knows the ones before it, and none after it.

``quant_types``  what a quantization type is: its block and its formula
``files``        what a file is: its bytes, its table of tensors, the models that this may be, the errors
``kernels``      how a packed weight is computed with: tiles and C on CPUs, Triton on GPUs
``weights``      how a packed weight is held: a tensor of comfy-kitchen; a file as a state dict
``comfyui``      the door to ComfyUI: MODEL and CLIP, patches, LoRA, the modulation cache
``diffusers``    the door to diffusers

tests/test_rooms.py holds them to it.
"""
