"""ComfyUI as a library that makes pictures from a few settings: what a worker of batch_over_ray.py is, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    import torch

RECORD = "auraflow-gguf"
"""The key of a picture's text that says what it was made of."""


@dataclass(frozen=True)
class Job:
    """A line of the list: its number, from 1, the prompt, the negative prompt and the seed."""

    line: int
    prompt: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run have in common, by the names of batch_over_ray.py's options."""

    comfyui: str
    pack: str
    transformer: str
    text_encoder: str
    vae: str
    width: int
    height: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    shift: float | None
    min_tokens: int | None
    gpus: float = 0
    threads: int = 1

    def record(self, job: Job) -> str:
        """What decides how a job's picture looks, as JSON; files by their names."""
        said = asdict(self) | asdict(job)
        for name in ("comfyui", "pack", "gpus", "threads", "line"):
            del said[name]
        return json.dumps(said | {name: Path(said[name]).name for name in ("transformer", "text_encoder", "vae")})


class Painter:
    """Holds the models and makes pictures; what a worker is."""

    def load(self, settings: Settings) -> str:
        """Loads ComfyUI and the models; returns which machine and process this is.

        Raises:
            RuntimeError: something cannot be loaded; the message is the reason.
        """
        for path in (settings.comfyui, settings.pack, settings.transformer, settings.text_encoder, settings.vae):
            if not os.path.exists(path):
                raise RuntimeError(f"{path} is not there on {socket.gethostname()}, where a worker needs it")
        with in_words():
            sys.path.insert(0, settings.comfyui)
            from comfy.cli_args import args

            args.cpu = settings.gpus == 0
            import comfy.utils
            import torch

            import nodes

            torch.set_num_threads(settings.threads)
            comfy.utils.set_progress_bar_enabled(False)
            if not asyncio.run(nodes.load_custom_node(settings.pack)):
                raise ImportError(f"ComfyUI could not load the nodes in {settings.pack}")
            self.settings = settings
            with torch.inference_mode():
                self._load_models()
        return f"process {os.getpid()} on {socket.gethostname()}"

    def paint(self, job: Job) -> bytes:
        """A job's picture, as a PNG file.

        Raises:
            RuntimeError: it cannot be made; the message is the reason.
        """
        import torch

        with in_words(), torch.inference_mode():
            settings = self.settings
            positive, negative = (self._encode(text) for text in (job.prompt, job.negative))
            (latent,) = run("EmptyLatentImage", width=settings.width, height=settings.height, batch_size=1)
            (samples,) = run(
                "KSampler",
                model=self.model,
                seed=job.seed,
                steps=settings.steps,
                cfg=settings.cfg,
                sampler_name=settings.sampler,
                scheduler=settings.scheduler,
                positive=positive,
                negative=negative,
                latent_image=latent,
                denoise=1.0,
            )
            (images,) = run("VAEDecode", vae=self.vae, samples=samples)
            return as_png(images[0], settings.record(job))

    def _load_models(self) -> None:
        settings = self.settings
        (self.model,) = run("AuraFlowGGUFLoader", model_name=known("unet_gguf", settings.transformer))
        if settings.shift is not None:
            from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

            (self.model,) = ModelSamplingAuraFlow().patch_aura(self.model, settings.shift)
        if settings.text_encoder.endswith(".gguf"):
            name = known("clip_gguf", settings.text_encoder)
            (self.clip,) = run("AuraFlowGGUFTextEncoderLoader", text_encoder_name=name)
        else:
            name = known("text_encoders", settings.text_encoder)
            (self.clip,) = run("CLIPLoader", clip_name=name, type="stable_diffusion")
        if settings.min_tokens is not None:
            for option in ("min_padding", "min_length"):
                self.clip.set_tokenizer_option(f"pile_t5xl_{option}", settings.min_tokens)
        (self.vae,) = run("VAELoader", vae_name=known("vae", settings.vae))
        self.encoded: dict[str, Any] = {}

    def _encode(self, text: str) -> Any:
        if text not in self.encoded:
            while len(self.encoded) > 1:  # this prompt's and the negative one, which most lines share
                del self.encoded[next(iter(self.encoded))]
            (self.encoded[text],) = run("CLIPTextEncode", clip=self.clip, text=text)
        self.encoded[text] = self.encoded.pop(text)
        return self.encoded[text]


def as_png(image: torch.Tensor, record: str) -> bytes:
    """A PNG file of an image ``(height, width, 3)`` of 0 to 1, with the text that says what it was made of."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text(RECORD, record)
    Image.fromarray((image * 255).round().byte().cpu().numpy()).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def run(node_id: str, **inputs: Any) -> tuple:
    """A node of ComfyUI, of either of its kinds: its outputs."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS[node_id]()
    outputs = getattr(node, node.FUNCTION)(**inputs)
    return outputs if isinstance(outputs, tuple) else outputs.args


def known(kind: str, path: str) -> str:
    """Makes a file's folder the first of ComfyUI's folders of a kind; returns the name that the file has there."""
    import folder_paths

    folder_paths.add_model_folder_path(kind, os.path.dirname(path), is_default=True)
    return os.path.basename(path)


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turns each exception into one that every process knows, since the pack's are known to the workers alone."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "ModelFileError":
            raise RuntimeError(str(error)) from None
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
