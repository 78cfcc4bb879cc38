"""Run by test_library.py in a process of its own: ComfyUI as a library, without a server. Executes every node.

    python as_library.py PACK BASE_DIRECTORY

PACK is the pack's folder; the base directory has the models. The last line of the output is JSON: what came out.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys

from comfy.cli_args import args

pack, args.base_directory = sys.argv[1:]
args.cpu = True

import comfy.utils  # noqa: E402 (these read the arguments)
import torch  # noqa: E402

import nodes  # noqa: E402

executed: list[str] = []


def run(node_id: str, **inputs) -> tuple:
    """What a script does with a node of either of ComfyUI's kinds: its outputs."""
    executed.append(node_id)
    node = nodes.NODE_CLASS_MAPPINGS[node_id]()
    outputs = getattr(node, node.FUNCTION)(**inputs)
    return outputs if isinstance(outputs, tuple) else outputs.args


def measure_little() -> None:
    """Have fit choose for the two last weights alone, in types that are packed in no time; see test_fit_node.py."""
    package = nodes.NODE_CLASS_MAPPINGS["AuraFlowGGUFFit"].__module__.rpartition(".nodes.")[0]
    fit, measuring = (importlib.import_module(f"{package}.quantizer.quality.{name}") for name in ("fit", "measuring"))
    grouped = measuring.group_weights
    measuring.group_weights = lambda names: grouped(names)[-2:]
    fit.MEASURED_QUICKLY, fit.NEAREST = ("Q4_0",), 0
    fit.WRITTEN = measuring.WRITTEN = ("Q4_0", "Q8_0")


def main() -> dict[str, object]:
    if not asyncio.run(nodes.load_custom_node(pack)):
        sys.exit("the pack was not loaded")
    (model,) = run("AuraFlowGGUFLoader", model_name="model.gguf", compute_dtype="float32")
    (model,) = run("AuraFlowLoraLoader", model=model, lora_name="lora.safetensors", strength=1.0)
    generator = torch.Generator().manual_seed(1)
    conditioning = [[torch.randn(1, 6, 2048, generator=generator), {}]]
    sampling = {"model": model, "seed": 1, "steps": 1, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
    sampling |= {"positive": conditioning, "negative": conditioning}
    sampling["latent_image"] = {"samples": torch.zeros(1, 4, 8, 8)}
    (sampled,) = run("KSampler", denoise=1.0, **sampling)
    (collected,) = run("AuraFlowGGUFImportance", filename_prefix="library", **sampling)
    (calibrated,) = run("AuraFlowGGUFCalibration", filename_prefix="library", **sampling)
    another = {"filename_prefix": "library", "continue_from": "library_00001_.safetensors"}
    run("AuraFlowGGUFCalibration", **another, **sampling)
    (saved,) = run("AuraFlowGGUFSave", model=model, type="Q4_0", filename_prefix="diffusion_models/library")
    (converted,) = run("AuraFlowGGUFConvert", source="diffusion_models/model.gguf", type="Q4_0", output_name="made")
    measure_little()
    calibration = "library_00002_.safetensors"
    fitted, _ = run("AuraFlowGGUFFit", model=model, calibration=calibration, size=2.0, output_name="fitted", quick=True)
    (report,) = run("AuraFlowGGUFInspect", model_name="model.gguf")
    (clip,) = run("AuraFlowGGUFTextEncoderLoader", text_encoder_name="text.gguf")
    tokens = clip.tokenize("a cat", tokenizer_options={"pile_t5xl_min_length": 0})
    return {
        "ours": [name for name, node in nodes.NODE_CLASS_MAPPINGS.items() if "/AuraFlow" in str(node.CATEGORY)],
        "executed": executed,
        "server": "server" in sys.modules,
        "progress hook": comfy.utils.PROGRESS_BAR_HOOK is not None,
        "sampled": sampled["samples"].flatten().tolist(),
        "collected": collected["samples"].flatten().tolist(),
        "calibrated": calibrated["samples"].flatten().tolist(),
        "files": [saved, converted],
        "fitted": fitted,
        "report": report,
        "conditioning": list(clip.encode_from_tokens_scheduled(tokens)[0][0].shape),
    }


with torch.inference_mode():
    print(json.dumps(main()))
