"""Files of other models and other formats: what they are said to be."""

import json

import pytest
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.matching import match
from auraflow_gguf.loader.files.recognise import recognise, recognise_architecture, recognise_bytes


def layers(stack, count, **tensors):
    """``count`` layers of the tensors; in their names ``__`` stands for a dot."""
    return {f"{stack}.{i}.{name.replace('__', '.')}": shape for i in range(count) for name, shape in tensors.items()}


FLUX = {
    "img_in.weight": (3072, 64),
    "txt_in.weight": (3072, 4096),
    "vector_in.in_layer.weight": (3072, 768),
    "final_layer.linear.weight": (64, 3072),
    **layers(
        "double_blocks",
        19,
        img_attn__norm__key_norm__scale=(128,),
        img_attn__qkv__weight=(9216, 3072),
        img_mod__lin__weight=(18432, 3072),
        txt_mlp__0__weight=(12288, 3072),
    ),
    **layers("single_blocks", 38, linear1__weight=(21504, 3072), modulation__lin__weight=(9216, 3072)),
}
FLUX_DIFFUSERS = {
    "x_embedder.weight": (3072, 64),
    "context_embedder.weight": (3072, 4096),
    "norm_out.linear.weight": (6144, 3072),
    "proj_out.weight": (64, 3072),
    **layers("transformer_blocks", 19, attn__to_q__weight=(3072, 3072), ff__net__0__proj__weight=(12288, 3072)),
    **layers(
        "single_transformer_blocks",
        38,
        attn__to_q__weight=(3072, 3072),
        attn__to_k__weight=(3072, 3072),
        attn__to_v__weight=(3072, 3072),
        norm__linear__weight=(9216, 3072),
        proj_mlp__weight=(12288, 3072),
    ),
}
CHROMA = {
    "distilled_guidance_layer.in_proj.weight": (5120, 64),
    "distilled_guidance_layer.norms.0.scale": (5120,),
} | {name: shape for name, shape in FLUX.items() if "mod" not in name and "vector_in" not in name}
SD3 = {
    "pos_embed": (1, 36864, 1536),
    "x_embedder.proj.weight": (1536, 16, 2, 2),
    "context_embedder.weight": (1536, 4096),
    "t_embedder.mlp.0.weight": (1536, 256),
    "t_embedder.mlp.2.weight": (1536, 1536),
    **layers(
        "joint_blocks", 24, context_block__attn__qkv__weight=(4608, 1536), x_block__attn__qkv__weight=(4608, 1536)
    ),
}
SD3_DIFFUSERS = {
    "pos_embed.pos_embed": (1, 36864, 1536),
    "pos_embed.proj.weight": (1536, 16, 2, 2),
    "pos_embed.proj.bias": (1536,),
    "context_embedder.weight": (1536, 4096),
    "norm_out.linear.weight": (3072, 1536),
    "proj_out.weight": (64, 1536),
    **layers(
        "transformer_blocks",
        24,
        attn__add_q_proj__weight=(1536, 1536),
        ff_context__net__0__proj__weight=(6144, 1536),
        norm1_context__linear__weight=(9216, 1536),
    ),
}
SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
SD15 = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3),
}
WAN = {
    "patch_embedding.weight": (5120, 16, 1, 2, 2),
    "head.modulation": (1, 2, 5120),
    "head.head.weight": (64, 5120),
    "text_embedding.0.weight": (5120, 4096),
    **layers("blocks", 40, ffn__0__weight=(13824, 5120), self_attn__q__weight=(5120, 5120)),
}
HUNYUAN_VIDEO = {
    "img_in.proj.weight": (3072, 16, 1, 2, 2),
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,),
    "txt_in.input_embedder.weight": (3072, 4096),
    **layers("double_blocks", 20, img_attn__qkv__weight=(9216, 3072), txt_attn__qkv__weight=(9216, 3072)),
    **layers("single_blocks", 40, linear1__weight=(21504, 3072)),
}
LTXV = {
    "patchify_proj.weight": (2048, 128),
    "adaln_single.emb.timestep_embedder.linear_1.weight": (2048, 256),
    "adaln_single.emb.timestep_embedder.linear_1.bias": (2048,),
    "caption_projection.linear_1.weight": (2048, 4096),
    "proj_out.weight": (128, 2048),
    **layers("transformer_blocks", 28, attn2__to_k__weight=(2048, 2048), scale_shift_table=(6, 2048)),
}
QWEN_IMAGE = {
    "img_in.weight": (3072, 64),
    "txt_in.weight": (3072, 3584),
    "txt_norm.weight": (3584,),
    "proj_out.weight": (64, 3072),
    "norm_out.linear.weight": (6144, 3072),
    **layers("transformer_blocks", 60, attn__add_q_proj__weight=(3072, 3072), img_mod__1__weight=(18432, 3072)),
}


def lumina(width, text_width):
    return {
        "cap_embedder.0.weight": (text_width,),
        "cap_embedder.1.weight": (width, text_width),
        "noise_refiner.0.attention.k_norm.weight": (96,),
        **layers("layers", 26, attention__qkv__weight=(3 * width, width)),
    }


def t5_llama_cpp(layer_count, width, inner, vocabulary, bias_in_every_layer):
    return {
        "token_embd.weight": (vocabulary, width),
        "enc.output_norm.weight": (width,),
        **layers("enc.blk", layer_count, attn_q__weight=(width, width), ffn_up__weight=(inner, width)),
        **layers("enc.blk", layer_count if bias_in_every_layer else 1, attn_rel_b__weight=(32, width // 64)),
    }


def t5_hugging_face(layer_count, width, inner, vocabulary, bias_in_every_layer):
    bias = {"layer__0__SelfAttention__relative_attention_bias__weight": (32, width // 64)}
    linears = {
        "layer__0__SelfAttention__q__weight": (width, width),
        "layer__1__DenseReluDense__wi_1__weight": (inner, width),
    }
    return {
        "shared.weight": (vocabulary, width),
        **layers("encoder.block", layer_count, **linears),
        **layers("encoder.block", layer_count if bias_in_every_layer else 1, **bias),
    }


CLIP_L = {
    "text_model.embeddings.token_embedding.weight": (49408, 768),
    **layers("text_model.encoder.layers", 12, mlp__fc1__weight=(3072, 768), self_attn__q_proj__weight=(768, 768)),
}
CLIP_G = {
    "text_model.embeddings.token_embedding.weight": (49408, 1280),
    **layers("text_model.encoder.layers", 32, mlp__fc1__weight=(5120, 1280)),
}
LLAMA = {
    "token_embd.weight": (128256, 4096),
    "output_norm.weight": (4096,),
    **layers("blk", 32, attn_q__weight=(4096, 4096), ffn_gate__weight=(14336, 4096)),
}
MMPROJ = {
    "mm.0.weight": (3584, 5120),
    "v.patch_embd.weight": (1280, 3, 14, 14),
    **layers("v.blk", 32, attn_q__weight=(1280, 1280), ffn_up__weight=(5120, 1280)),
}
VAE = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
    "decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
WAN_VAE = {
    "decoder.conv1.weight": (384, 16, 3, 3, 3),
    "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
    "decoder.upsamples.0.residual.2.weight": (384, 384, 3, 3, 3),
}
FLUX_LORA = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (16, 3072),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (9216, 16),
    "lora_unet_double_blocks_0_img_attn_qkv.alpha": (),
}
AURAFLOW_LORA = {
    "diffusion_model.double_layers.0.attn.w1q.lora_A.weight": (16, 3072),
    "diffusion_model.double_layers.0.attn.w1q.lora_B.weight": (3072, 16),
}
AURAFLOW_LOKR = {
    "lycoris_single_layers_4_mlp_c_fc1.lokr_w1": (16, 16),
    "lycoris_single_layers_4_mlp_c_fc1.lokr_w2": (512, 192),
}
AURAFLOW_DIFFUSERS_LORA = {
    "transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight": (16, 3072),
    "transformer.joint_transformer_blocks.0.attn.to_q.lora_B.weight": (3072, 16),
}


def transformer(model, kind="transformer"):
    return (
        f"{kind}, expected an AuraFlow transformer. Load it with a loader for {model}: "
        "a GGUF file with 'Unet Loader (GGUF)' of ComfyUI-GGUF, any other with ComfyUI's 'Load Diffusion Model'."
    )


def unet(model, kind):
    return (
        f"{kind}, expected an AuraFlow transformer. Load it with a loader for {model}: "
        "a GGUF file with 'Unet Loader (GGUF)' of ComfyUI-GGUF, a checkpoint with ComfyUI's 'Load Checkpoint'."
    )


def text_encoder(kind):
    return (
        f"{kind}, expected an AuraFlow transformer. AuraFlow's text encoder is Pile-T5-XL; this one belongs in "
        "models/text_encoders, for 'CLIPLoader (GGUF)' of ComfyUI-GGUF or ComfyUI's 'Load CLIP'."
    )


PILE_T5 = (
    "the Pile-T5-XL text encoder, expected an AuraFlow transformer. "
    "It is AuraFlow's text encoder, not its transformer: it belongs in models/text_encoders, a GGUF file for "
    "'Load AuraFlow Text Encoder (GGUF)', any other for ComfyUI's 'Load CLIP'."
)
A_LANGUAGE_MODEL = (
    "a language model, expected an AuraFlow transformer. Language models run in llama.cpp and the like; as the text "
    "encoder of another image model it belongs in models/text_encoders, for 'CLIPLoader (GGUF)' of ComfyUI-GGUF."
)
A_VAE = (
    "a VAE, expected an AuraFlow transformer. Move it to models/vae and load it with 'Load VAE'. AuraFlow takes SDXL's."
)
AN_AURAFLOW_LORA = (
    "a LoRA for AuraFlow, expected an AuraFlow transformer. "
    "Move it to models/loras and apply it with 'Load LoRA' after the model is loaded."
)
A_LORA = (
    "a LoRA, expected an AuraFlow transformer. "
    "It is a LoRA for another model than AuraFlow: move it to models/loras and use it with that model."
)

OTHER_MODELS = {
    "flux1-dev-Q4_K_S.gguf": (FLUX, transformer("Flux", "a Flux transformer")),
    "flux-diffusers.gguf": (FLUX_DIFFUSERS, transformer("Flux", "a Flux transformer")),
    "flux-all-in-one.safetensors": (
        {f"model.diffusion_model.{name}": shape for name, shape in FLUX.items()}
        | {f"vae.{name}": shape for name, shape in VAE.items()},
        transformer("Flux", "a Flux transformer"),
    ),
    "chroma-unlocked-v50-Q8_0.gguf": (CHROMA, transformer("Chroma", "a Chroma transformer")),
    "sd3.5_medium-Q8_0.gguf": (SD3, transformer("Stable Diffusion 3", "a Stable Diffusion 3 transformer")),
    "sd3-diffusers.gguf": (SD3_DIFFUSERS, transformer("Stable Diffusion 3", "a Stable Diffusion 3 transformer")),
    "sd_xl_base_1.0.safetensors": (SDXL, unet("Stable Diffusion XL", "a Stable Diffusion XL UNet")),
    "v1-5-pruned.safetensors": (SD15, unet("Stable Diffusion", "a Stable Diffusion 1 or 2 UNet")),
    "wan2.1-t2v-14b-Q4_0.gguf": (WAN, transformer("Wan", "a Wan transformer")),
    "hunyuan-video-t2v-720p-Q4_K_M.gguf": (
        HUNYUAN_VIDEO,
        transformer("HunyuanVideo", "a HunyuanVideo transformer"),
    ),
    "ltx-video-2b-v0.9-Q4_0.gguf": (LTXV, transformer("LTX-Video", "an LTX-Video transformer")),
    "qwen-image-Q4_K_M.gguf": (QWEN_IMAGE, transformer("Qwen-Image", "a Qwen-Image transformer")),
    "lumina2-Q8_0.gguf": (lumina(2304, 2304), transformer("Lumina 2", "a Lumina 2 transformer")),
    "z_image_turbo-Q8_0.gguf": (lumina(3840, 2560), transformer("Z-Image", "a Z-Image transformer")),
    "pile-t5-xl-Q8_0.gguf": (t5_llama_cpp(24, 2048, 5120, 32128, True), PILE_T5),
    "pile-t5-xl.safetensors": (t5_hugging_face(24, 2048, 5120, 32128, True), PILE_T5),
    "umt5-xxl-encoder-Q5_K_M.gguf": (
        t5_llama_cpp(24, 4096, 10240, 256384, True),
        text_encoder("a UMT5-XXL text encoder"),
    ),
    "umt5-xxl.safetensors": (t5_hugging_face(24, 4096, 10240, 256384, True), text_encoder("a UMT5-XXL text encoder")),
    "t5-v1_1-xxl-encoder-Q8_0.gguf": (
        t5_llama_cpp(24, 4096, 10240, 32128, False),
        text_encoder("a T5-XXL text encoder"),
    ),
    "t5xxl_fp16.safetensors": (t5_hugging_face(24, 4096, 10240, 32128, False), text_encoder("a T5-XXL text encoder")),
    "flan-t5-xl-Q8_0.gguf": (t5_llama_cpp(24, 2048, 5120, 32128, False), text_encoder("a T5 text encoder")),
    "clip_l.gguf": (CLIP_L, text_encoder("a CLIP-L text encoder")),
    "clip_g.gguf": (CLIP_G, text_encoder("a CLIP-G text encoder")),
    "Meta-Llama-3-8B.Q4_K_M.gguf": (LLAMA, A_LANGUAGE_MODEL),
    "mmproj-Qwen2.5-VL-7B-F16.gguf": (
        MMPROJ,
        "the vision part (mmproj) of a language model, expected an AuraFlow transformer. "
        "It works only beside its language model: in ComfyUI both belong in models/text_encoders.",
    ),
    "sdxl_vae.safetensors": (VAE, A_VAE),
    "pig_wan_vae.gguf": (WAN_VAE, A_VAE),
    "flux-style.safetensors": (FLUX_LORA, A_LORA),
    "aura-style.safetensors": (AURAFLOW_LORA, AN_AURAFLOW_LORA),
    "pony-v7-style.safetensors": (AURAFLOW_LOKR, AN_AURAFLOW_LORA),
    "aura-diffusers-style.safetensors": (AURAFLOW_DIFFUSERS_LORA, AN_AURAFLOW_LORA),
}


@pytest.mark.parametrize(("name", "shapes", "message"), [(name, *row) for name, row in OTHER_MODELS.items()])
def test_other_models(name, shapes, message):
    with pytest.raises(ModelFileError) as caught:
        match(AURAFLOW, shapes, metadata={"general.architecture": "pig"}, path=f"models/unet/{name}")
    assert str(caught.value) == f"{name}: found {message}"


def test_the_metadata_speak_when_the_tensors_do_not():
    with pytest.raises(ModelFileError) as caught:
        match(AURAFLOW, {"layer.0": (4, 4)}, metadata={"general.architecture": "qwen2vl"}, path="qwen.gguf")
    assert str(caught.value) == f"qwen.gguf: found {A_LANGUAGE_MODEL}"


def test_the_tensors_outweigh_the_metadata():
    assert recognise(WAN, {"general.architecture": "flux"}).what == "a Wan transformer"


@pytest.mark.parametrize("stack", ["double_layers.0.attn.w1q", "joint_transformer_blocks.0.attn.add_q_proj"])
def test_auraflow_itself(stack):
    recognised = recognise({f"model.{stack}.weight": (3072, 3072)}, {})
    assert recognised.what == AURAFLOW.title
    assert recognised.advice == "Move it to models/diffusion_models and load it with 'Load AuraFlow (GGUF)'."


def test_a_name_of_two_lines():
    assert recognise({"a\nenc.blk.0.ffn_up.weight": (10240, 4096)}, {}) is None


def test_unknown_tensors():
    assert recognise({"a.b.c": (1, 2)}, {"general.architecture": "cow"}) is None
    assert recognise({}, {}) is None


@pytest.mark.parametrize("name", ["pig", "", None, 3, ("flux",)])
def test_unknown_architectures(name):
    assert recognise_architecture(name) is None


SAFETENSORS = b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}'
PAGE = "The link led to a page, often an error or a login, and not to the file: open it in a browser."
MESSAGE = "The server answered with a message instead of the file: see what it says."
CONFIGURATION = "It is a workflow or a model's configuration: pick the model file beside it."

OTHER_FORMATS = {
    "nothing": (b"", "an empty file", "The download did not start: download the file again."),
    "zeros": (
        bytes(4096),
        "nothing but zero bytes at its beginning",
        "The download is unfinished: download the file again.",
    ),
    "a page": (b"<!DOCTYPE html>\n<html lang=en>\n<title>404</title>", "a web page", PAGE),
    "a page after a BOM and blank lines": (b"\xef\xbb\xbf\n\n<HTML><body>", "a web page", PAGE),
    "an error of a storage service": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a web page", PAGE),
    "an answer": (b"Invalid username or password.", 'the text "Invalid username or password."', MESSAGE),
    "a long answer": (
        b"Access to this model is restricted.\nYou must be authenticated to access it.",
        'the text "Access to this model is restricted. You must be authenticate…"',
        MESSAGE,
    ),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4012345678\n",
        "a Git LFS pointer instead of the file",
        "Fetch the file itself with `git lfs pull`.",
    ),
    "JSON": (json.dumps({"nodes": [{"type": "KSampler", "title": "é"}]}).encode(), "a JSON text", CONFIGURATION),
    "JSON not in ASCII": ('[\n  "été"\n]'.encode(), "a JSON text", CONFIGURATION),
    "a PNG": (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        "a PNG image",
        "If it holds a workflow, drop it into ComfyUI's window.",
    ),
    "a JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG image", "Download the file itself again."),
    "a zip": (
        b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl",
        "a zip archive or a torch checkpoint",
        "Unpack the archive; convert a checkpoint to safetensors.",
    ),
    "a pickle": (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a pickled torch checkpoint",
        "Convert it to safetensors, then with `auraflow-gguf convert`.",
    ),
    "gzip": (b"\x1f\x8b\x08\x00", "a gzip archive", "Unpack it."),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive", "Unpack it."),
    "RAR": (b"Rar!\x1a\x07\x01\x00", "a RAR archive", "Unpack it."),
    "safetensors": (
        SAFETENSORS,
        "a safetensors file",
        "Rename it to .safetensors, load it with 'Load Diffusion Model', or convert it with `auraflow-gguf convert`.",
    ),
}


@pytest.mark.parametrize(("head", "found", "advice"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_other_formats(head, found, advice):
    assert recognise_bytes(head, "model.gguf") == (found, advice)


def test_safetensors_of_the_right_name():
    _, advice = recognise_bytes(SAFETENSORS, "folder/model.SafeTensors")
    assert advice == "Load it with 'Load Diffusion Model', or convert it with `auraflow-gguf convert`."


@pytest.mark.parametrize(
    "head",
    [b"\x00\x01\x02\x03random", b"XGUF\x03\x00\x00\x00", b"word", b"\xff" * 8 + b"{" + b"\x00" * 8, b"{\x00\x01"],
)
def test_bytes_that_tell_nothing(head):
    assert recognise_bytes(head, "model.gguf") is None
