"""The autoencoder: equal to diffusers' AutoencoderKL, in both file layouts."""

import json

from support.cli import UserError

import pytest
import torch
from tiny import relative, tensor

import vae
from checkpoints import load_vae


@torch.no_grad()
@pytest.mark.parametrize("layout", ["single", "diffusers"])
@pytest.mark.parametrize("channels", [16, 8])
def test_encoding_and_decoding_equal_diffusers(channels, layout, write, answers, tmp_path):
    key = f"vae/{channels}/{layout}"
    if layout == "single":
        path = write(key, "first_stage_model.")
    else:
        write(key, "", 2, "sd3/vae/diffusion_pytorch_model.safetensors")
        path = tmp_path / "sd3"
    model = load_vae(path)
    assert model.config == vae.VAEConfig(channels, 16, groups=4)
    image = tensor("image", (2, 3, 48, 32)).tanh()
    mean, std = model.posterior(image)
    z = tensor("z", (2, channels, 6, 4))
    assert relative(mean, answers[f"{key}/mean"]) < 1e-5
    assert relative(std, answers[f"{key}/std"]) < 1e-5
    assert relative(model.encode(image), answers[f"{key}/latent"]) < 1e-5
    assert relative(model.decode(z), answers[f"{key}/image"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_other_prefixes_load(prefix, write, answers):
    model = load_vae(write("vae/16/single", prefix))
    image = model.decode(tensor("z", (2, 16, 6, 4)))
    assert relative(image, answers["vae/16/single/image"]) < 1e-5


@torch.no_grad()
def test_samples_have_the_moments_of_the_posterior(write):
    model = load_vae(write("vae/16/single"))
    image = tensor("image", (1, 3, 16, 16)).tanh()
    mean, std = model.posterior(image)
    many = model.encode(image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert relative(many.mean(0), (mean[0] - 0.0609) * 1.5305) < 0.1
    assert relative(many.std(0), std[0] * 1.5305) < 0.05


def test_the_full_size_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = vae.VAE()
    assert len(model.state_dict()) == 244
    assert model.encoder.norm_out.num_groups == model.decoder.norm_out.num_groups == 32
    assert sum(p.numel() for p in model.encoder.parameters()) == 34_274_208
    assert sum(p.numel() for p in model.decoder.parameters()) == 49_545_475


def test_sides_must_be_multiples_of_eight(write):
    model = load_vae(write("vae/16/single"))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 12, 16))


def test_files_without_an_autoencoder_are_refused(write):
    with pytest.raises(UserError, match="no SD3.5 autoencoder"):
        load_vae(write("mmdit/sd3.5-large/single", "model.diffusion_model."))


@torch.no_grad()
def test_the_groups_of_the_norms_come_from_config_json(write, answers, tmp_path):
    """The golden autoencoder has 4 groups, which no shape shows."""
    write("vae/16/diffusers", "", 0, "sd3/vae/diffusion_pytorch_model.safetensors")
    config, z = tmp_path / "sd3" / "vae" / "config.json", tensor("z", (2, 16, 6, 4))
    expected = answers["vae/16/diffusers/image"]
    config.write_text(json.dumps({"norm_num_groups": 4, "latent_channels": 16}))
    assert relative(load_vae(tmp_path / "sd3").decode(z), expected) < 1e-5
    config.write_text(json.dumps({"norm_num_groups": 8}))
    assert relative(load_vae(tmp_path / "sd3").decode(z), expected) > 1e-2
    for wrong in ({"norm_num_groups": 3}, {"norm_num_groups": "4"}, {"latent_channels": 4}, []):
        config.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="sd3"):
            load_vae(tmp_path / "sd3")
