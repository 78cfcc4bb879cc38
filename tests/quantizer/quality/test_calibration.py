"""Calibration files: what is kept of a sampling, and what is refused of a file."""

import json
import os

import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.quantizer.quality.calibration import (
    TIMESTEPS,
    Calibration,
    Sampling,
    read_calibration,
    write_calibration,
)
from auraflow_gguf.quantizer.quality.inputs import Noise, check_size
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WIDTH = 12


def picture(seed=0, steps=8, sides=("positive", "negative"), shape=(6, 10)):
    """Timesteps, latents and texts of a sampling; the negative text is the same in all."""
    generator = torch.Generator().manual_seed(seed)
    texts = {"positive": torch.randn(5, WIDTH, generator=generator), "negative": torch.ones(3, WIDTH)}
    latents = torch.randn(steps, 4, *shape, generator=generator)
    return [1 - step / steps for step in range(steps)], latents, {side: texts[side] for side in sides}


@pytest.fixture
def calibration():
    calibration = Calibration(name="a.safetensors")
    for seed in range(4):
        calibration = calibration.adding(f"seed {seed}", *picture(seed))
    return calibration


def test_a_file_gives_back_what_was_written(calibration, tmp_path):
    write_calibration(tmp_path / "a.safetensors", calibration)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    read = read_calibration(tmp_path / "a.safetensors")
    assert read.fingerprint() == calibration.fingerprint()
    assert [entry.made for entry in read.pictures] == ["seed 0", "seed 1", "seed 2", "seed 3"]
    pairs = zip(read.evaluations(WIDTH), calibration.evaluations(WIDTH), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.latent, theirs.latent)
        assert torch.equal(ours.text, theirs.text)
        assert ours.timestep == theirs.timestep
    tensors = load_file(tmp_path / "a.safetensors")  # safetensors' own reader
    assert sum(name.startswith("text.") for name in tensors) == 5  # the negative text once
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "auraflow-calibration"


def test_timesteps_of_all_the_sampling_are_kept_with_their_latents(calibration):
    timesteps, latents, texts = picture(steps=20)
    kept = Calibration().adding("", timesteps, latents, texts).pictures[0]
    assert len(kept.timesteps) == TIMESTEPS
    assert 0.8 < kept.timesteps[0] < 0.95
    assert 0.05 < kept.timesteps[-1] < 0.2
    for timestep, latent in zip(kept.timesteps, kept.latents, strict=True):
        assert torch.equal(latent, latents[timesteps.index(timestep)].to(torch.bfloat16))


def test_a_part_is_held_back(calibration):
    chosen, held_back = calibration.choosing(), calibration.held_back()
    everything = {evaluation.text.sum().item() for evaluation in calibration.evaluations(WIDTH)}
    parts = [{e.text.sum().item() for e in part.evaluations(WIDTH)} for part in (chosen, held_back)]
    negative = 3.0 * WIDTH
    assert parts[0] | parts[1] == everything
    assert parts[0] & parts[1] == {negative}  # other prompts
    assert len(chosen.evaluations(WIDTH)) == 3 * len(held_back.evaluations(WIDTH))
    single = Calibration().adding("", *picture())
    times = [{e.timestep for e in part.evaluations(WIDTH)} for part in (single.choosing(), single.held_back())]
    assert [len(part) for part in times] == [2, 2]
    assert not times[0] & times[1]
    assert len({calibration.fingerprint(), chosen.fingerprint(), held_back.fingerprint()}) == 3
    assert not torch.equal(Noise().held_back().evaluations(4)[0].latent, Noise().evaluations(4)[0].latent)


def test_a_single_timestep_cannot_be_parted():
    single = Calibration(name="a").adding("", *picture(steps=1))
    assert len(single.choosing().evaluations(WIDTH)) == 2
    with pytest.raises(ModelFileError, match="no part can be held back"):
        single.held_back().evaluations(WIDTH)


def test_what_does_not_fit_the_model_is_refused(calibration):
    with pytest.raises(ModelFileError, match="found texts of width 12, expected 13"):
        calibration.evaluations(13)
    check_size(calibration, "aura.gguf", 25)
    with pytest.raises(ModelFileError, match="found positions for a latent of 8 × 8, expected 10 × 10"):
        check_size(calibration, "aura.gguf", 16)


class Transformer(torch.nn.Module):
    """Called as ComfyUI calls its own."""

    def forward(self, latents, timesteps, context, transformer_options):
        return latents


def test_what_the_transformer_gets_is_collected():
    """Both sides in one batch, or one after the other; of a batch of two pictures the first."""
    timesteps, latents, texts = picture(shape=(7, 10))
    model = Transformer()
    together, apart = Sampling(), Sampling()

    def batch(*sides):
        return torch.cat([texts[side][:3].expand(2, -1, -1) for side in sides])

    with together.collecting(model):
        for timestep, latent in zip(timesteps, latents, strict=True):
            four = torch.stack([latent, latent + 1] * 2)
            options = {"cond_or_uncond": [1, 0]}
            model(four, torch.full((4,), timestep), context=batch("negative", "positive"), transformer_options=options)
    with apart.collecting(model):
        for timestep, latent in zip(timesteps, latents, strict=True):
            for number, side in enumerate(("positive", "negative")):
                two = torch.stack([latent, latent + 1])
                options = {"cond_or_uncond": [number]}
                model(two, torch.full((2,), timestep), batch(side), transformer_options=options)
            part = torch.zeros(1, 4, 2, 2)  # an area with a prompt of its own
            model(part, torch.full((1,), timestep), batch("positive"), transformer_options={"cond_or_uncond": [0]})
    model(latents[:1], torch.zeros(1), batch("positive"), transformer_options={})  # after the context: not collected
    expected = Calibration().adding(
        "x", torch.tensor(timesteps).tolist(), latents, {side: text[:3] for side, text in texts.items()}
    )
    assert expected.pictures[0].latents.shape == (TIMESTEPS, 4, 6, 10)
    for sampling in (together, apart):
        assert sampling.added_to(Calibration(), "x").fingerprint() == expected.fingerprint()


def changed(path, metadata=None, tensors=None, **entry):
    with safe_open(path, "pt") as file:
        values = file.metadata() | (metadata or {})
    if entry:
        pictures = json.loads(values["pictures"])
        pictures[1] |= entry
        values["pictures"] = json.dumps(pictures)
    save_file(load_file(path) | (tensors or {}), path, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"format": "pt"}}, "a safetensors file of something else"),
        ({"metadata": {"version": "2"}}, "version 2 of calibration files, expected version 1"),
        ({"metadata": {"pictures": "[]"}}, "no pictures"),
        ({"metadata": {"pictures": "{"}}, "a table of pictures that cannot be read"),
        ({"metadata": {"pictures": "[3]"}}, "a table of pictures that cannot be read"),
        ({"positive": 99}, "no text.99 in bfloat16"),
        ({"positive": None, "negative": None}, "no texts for picture 1"),
        ({"timesteps": [0.5, 0.4, 0.3]}, "4 latents at timesteps"),
        ({"timesteps": [500, 400, 300, 200]}, "4 latents at timesteps"),
        ({"tensors": {"latents.1": torch.zeros(4, 3, 6, 10, dtype=torch.bfloat16)}}, r"latents of shape \(4, 3, 6, 10"),
        ({"tensors": {"latents.1": torch.zeros(4, 4, 6, 9, dtype=torch.bfloat16)}}, r"latents of shape \(4, 4, 6, 9"),
        ({"tensors": {"latents.1": torch.zeros(4, 4, 6, 10)}}, "no latents.1 in bfloat16"),
        ({"tensors": {"text.0": torch.full((5, WIDTH), torch.nan, dtype=torch.bfloat16)}}, "NaN or infinity in text.0"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(calibration, tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    write_calibration(path, calibration)
    changed(path, **change)
    with pytest.raises(ModelFileError, match=message):
        read_calibration(path)


def test_a_file_is_replaced_only_on_request(calibration, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(ModelFileError, match="found a file of that name"):
        write_calibration(path, calibration)
    assert path.read_text() == "precious"
    write_calibration(path, calibration, overwrite=True)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelFileError, match="cut off"):
        read_calibration(path)
    with pytest.raises(ModelFileError, match="no such file"):
        read_calibration(tmp_path / "b.safetensors")
