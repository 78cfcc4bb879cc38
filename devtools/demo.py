"""``dev.py demo``: a GGUF file, a real ComfyUI with the pack in it, a prompt, an image."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from . import random_models
from .cache import cache_folder
from .hosts import Host


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    output = cache_folder() / "output"
    output.mkdir(parents=True, exist_ok=True)
    if hosts:
        return _in_comfyui(hosts[0], options, output)
    print("No ComfyUI was found and none could be cloned: running the GGUF file through diffusers instead.")
    print("Set COMFYUI_PATH to a ComfyUI folder for the demo in ComfyUI.", flush=True)
    from .diffusers_demo import paint_latents

    print(paint_latents(options.model or random_models.cached_auraflow(), output, options.steps))
    return 0


def _in_comfyui(host: Host, options: argparse.Namespace, output: Path) -> int:
    from .server import PromptError, Server, ServerError, load_workflow, set_inputs, set_text_encoder

    model = options.model or random_models.cached_auraflow()
    text_encoder = options.text_encoder or random_models.cached_text_encoder()
    vae = options.vae or random_models.cached_vae()
    workflow = load_workflow("text_to_image")
    set_inputs(workflow, "AuraFlowGGUFLoader", model_name=model.name)
    set_text_encoder(workflow, text_encoder)
    set_inputs(workflow, "VAELoader", vae_name=vae.name)
    set_inputs(workflow, "EmptyLatentImage", width=options.size, height=options.size)
    set_inputs(workflow, "KSampler", steps=options.steps)
    if options.prompt:
        workflow["positive"]["inputs"]["text"] = options.prompt

    models = {"diffusion_models": model.parent, "text_encoders": text_encoder.parent, "vae": vae.parent}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        server = Server(host, Path(base), models, output)
        print(f"Starting ComfyUI {host.version} from {host.path}", flush=True)
        try:
            with server:
                images = server.prompt(workflow, _show)
                print(*images, sep="\n", flush=True)
                if options.keep:
                    print(f"ComfyUI is at {server.url}; press Ctrl-C to end it.", flush=True)
                    server.wait()
        except PromptError as error:
            print(f"The workflow failed. {error}\nThe end of the server's log:\n{server.log_tail()}", file=sys.stderr)
            return 1
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _show(node: str, step: int, steps: int) -> None:
    print(f"  {node} {step}/{steps}", flush=True)
