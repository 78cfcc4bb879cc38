"""An accelerator for machines that have none: a device of PyTorch's with memory of its own.

``memory.cpp`` is its memory, which ends, its counters and its streams, whose order is checked; ``operators.cpp`` gives
it the CPU's operators, which refuse tensors of two devices; ``build.py`` compiles them; ``accelerator.py`` is what
``torch.cuda`` is for CUDA. Nothing of it knows ComfyUI or this pack.
"""
