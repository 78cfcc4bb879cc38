"""The loaders and the inspector in their host: what they list, what they give, when they run again."""

import asyncio
import inspect
import os
import shutil

import comfy.model_management
import folder_paths
import pytest
import torch
from auraflow_gguf import comfy_entrypoint
from auraflow_gguf.devtools import random_models
from auraflow_gguf.loader.comfyui import model as model_module
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.nodes.folders import register_gguf_folders

from .aura_files import make_gguf


@pytest.fixture(scope="module")
def pack_nodes():
    async def load():
        extension = await comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(load())}


@pytest.fixture
def models(pack_nodes, tmp_path, monkeypatch):
    """A folder of models that ComfyUI knows, as from extra_model_paths.yaml, with a file in a subfolder."""
    known = folder_paths.folder_names_and_paths
    for key in ("diffusion_models", "unet_gguf"):
        paths, extensions = known[key]
        monkeypatch.setitem(known, key, (list(paths), set(extensions)))
    folder = tmp_path / "unet"
    (folder / "pony").mkdir(parents=True)
    shutil.copy(make_gguf("Q4_0"), folder / "pony" / "v7.gguf")
    (folder / "other.safetensors").touch()
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    folder_paths.add_model_folder_path("unet_gguf", str(tmp_path / "of another pack"))
    register_gguf_folders()
    folder_paths.filename_list_cache.clear()
    return folder


NAME = os.path.join("pony", "v7.gguf")


@pytest.mark.parametrize(
    ("multiplies", "flag", "expected"),
    [(False, None, torch.float32), (True, None, torch.bfloat16), (True, "fp32_unet", torch.float32)],
)
def test_auto_on_a_cpu_that_multiplies_bfloat16(pack_nodes, models, caplog, monkeypatch, multiplies, flag, expected):
    monkeypatch.setattr(comfy.model_management, "cpu_state", comfy.model_management.CPUState.CPU)  # as --cpu does
    monkeypatch.setattr(model_module, "multiplies_bfloat16", lambda: multiplies)
    if flag:
        monkeypatch.setattr(model_module.args, flag, True)
    with caplog.at_level("INFO"):
        (model,) = pack_nodes["AuraFlowGGUFLoader"].execute(NAME).result
    assert model.model.get_dtype_inference() == expected
    assert ("compute_dtype float32" in caplog.text) == (expected == torch.bfloat16)


def test_files_of_all_folders_are_listed_and_those_of_other_packs_kept(pack_nodes, models):
    names = pack_nodes["AuraFlowGGUFLoader"].define_schema().inputs[0].options
    assert NAME in names
    assert "other.safetensors" not in names
    assert str(models.parent / "of another pack") in folder_paths.get_folder_paths("unet_gguf")


def test_a_folder_that_is_added_after_the_pack_was_loaded_is_searched(pack_nodes, models, tmp_path):
    node = pack_nodes["AuraFlowGGUFLoader"]
    later = tmp_path / "later"
    later.mkdir()
    os.link(models / "pony" / "v7.gguf", later / "later.gguf")
    with pytest.raises(FileNotFoundError, match=r"later\.gguf"):
        node.execute("later.gguf")
    folder_paths.add_model_folder_path("diffusion_models", str(later))
    assert str(later / "later.gguf") in node.fingerprint_inputs("later.gguf")
    assert "later.gguf" in node.define_schema().inputs[0].options
    assert "later.gguf" in pack_nodes["AuraFlowGGUFInspect"].define_schema().inputs[0].options
    folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(later))
    assert node.execute("later.gguf").args[0].model


def test_text_encoders_are_listed_from_both_folders_and_loaded_anew_when_replaced(pack_nodes, tmp_path, monkeypatch):
    known = folder_paths.folder_names_and_paths
    folders = [tmp_path / name for name in ("text_encoders", "clip")]
    for folder in folders:
        folder.mkdir()
        (folder / f"{folder.name}.gguf").touch()
        (folder / f"{folder.name}.safetensors").touch()
    monkeypatch.setitem(known, "text_encoders", ([str(folder) for folder in folders], {".safetensors"}))
    monkeypatch.setitem(known, "clip_gguf", ([], set()))
    register_gguf_folders()
    folder_paths.filename_list_cache.clear()
    node = pack_nodes["AuraFlowGGUFTextEncoderLoader"]
    assert node.define_schema().inputs[0].options == ["clip.gguf", "text_encoders.gguf"]
    before = node.fingerprint_inputs("clip.gguf")
    os.utime(folders[1] / "clip.gguf", ns=(1, 1))
    assert node.fingerprint_inputs("clip.gguf") != before
    with pytest.raises(ModelFileError, match=r"clip\.gguf: found an empty file"):
        node.execute("clip.gguf")


def test_the_inspector_lists_transformers_and_text_encoders_and_keeps_them_apart(pack_nodes, models, monkeypatch):
    """Also where a transformer's subfolder has the text encoders' name, and both have a file of one name."""
    text_encoder = random_models.cached_text_encoder()
    folder = models.parent / "text encoders"
    for name in ("pony/v7.gguf", "t5.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(text_encoder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_gguf", ([str(folder)], {".gguf"}))
    (models / "text_encoders").mkdir()
    shutil.copy(make_gguf("Q4_0"), models / "text_encoders" / "t5.gguf")
    folder_paths.filename_list_cache.clear()
    node = pack_nodes["AuraFlowGGUFInspect"]
    options = node.define_schema().inputs[0].options
    same = os.path.join("text_encoders", "t5.gguf")
    assert [
        name for name in (NAME, same, f"text_encoders/{NAME}", "text_encoders/t5.gguf") if name not in options
    ] == []

    def kind(name: str) -> str:
        (panel,) = node.execute(name).ui["inspection"]
        return panel["architecture"]

    assert kind(NAME) == kind(same) == "aura"
    assert kind(f"text_encoders/{NAME}") == "t5encoder"
    shutil.rmtree(models / "text_encoders")
    folder_paths.filename_list_cache.clear()
    before = node.fingerprint_inputs("text_encoders/t5.gguf")
    (folder / "t5.gguf").unlink()
    (folder / "t5.gguf").touch()
    assert node.fingerprint_inputs("text_encoders/t5.gguf") != before
    (panel,) = node.execute("text_encoders/t5.gguf").ui["inspection"]
    assert panel["refusal"]["found"] == "an empty file (0 bytes)"


def test_a_replaced_file_is_loaded_anew(pack_nodes, models):
    node = pack_nodes["AuraFlowGGUFLoader"]
    before = node.fingerprint_inputs(NAME)
    assert node.fingerprint_inputs(NAME) == before
    assert node.fingerprint_inputs(NAME, "float16") != before
    os.utime(models / NAME, ns=(1, 1))
    assert node.fingerprint_inputs(NAME) != before


def test_a_replaced_part_of_a_split_file_counts(pack_nodes, models):
    node = pack_nodes["AuraFlowGGUFLoader"]
    first, second = (models / f"[a]-0000{number}-of-00002.gguf" for number in (1, 2))
    first.touch()
    before = node.fingerprint_inputs(first.name)
    second.touch()
    both = node.fingerprint_inputs(first.name)
    os.utime(second, ns=(1, 1))
    assert len({before, both, node.fingerprint_inputs(first.name)}) == 3


def test_two_loaders_share_no_setting(pack_nodes, models):
    node = pack_nodes["AuraFlowGGUFLoader"]
    half, full = (node.execute(NAME, dtype).args[0] for dtype in ("bfloat16", "float32"))
    assert half.model.get_dtype_inference() == torch.bfloat16
    assert full.model.get_dtype_inference() == torch.float32
    assert half.model.diffusion_model.modF[1].weight.dtype == torch.bfloat16
    assert full.model.diffusion_model.modF[1].weight.dtype == torch.float32


def test_every_input_and_output_is_explained(pack_nodes):
    assert {"AuraFlowGGUFLoader", "AuraFlowLoraLoader"} <= set(pack_nodes)
    for node in pack_nodes.values():
        schema = node.define_schema()
        assert schema.description
        assert all(part.tooltip for part in (*schema.inputs, *schema.outputs)), schema.node_id


def test_an_input_that_a_prompt_leaves_out_has_the_editors_value(pack_nodes, models):
    seen = 0
    for name, node in pack_nodes.items():
        parameters = inspect.signature(node.execute).parameters
        for given in node.define_schema().inputs:
            default = parameters[given.id].default
            if default is not inspect.Parameter.empty:
                shown = given.options[0] if given.default is None else given.default
                assert default == shown, (name, given.id)
                seen += 1
    assert seen > 10
