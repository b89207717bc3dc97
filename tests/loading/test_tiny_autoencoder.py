"""TAESD from every format of its files, compared with diffusers' AutoencoderTiny."""

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.commands.main import main
from ldm.loading.load import DEMO_CHECKPOINT
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.tiny_autoencoder import TinyAutoencoder, TinyDecoder, TinyEncoder
from ldm.runtime.errors import FileFormatError, WeightsMismatch

PROMPT, QUICK = ["a 3d emoji of a cat face"], {"steps": 2, "seeds": 1}


@pytest.fixture(scope="module")
def theirs(diffusers):
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny().eval()


@pytest.fixture(scope="module")
def paths(theirs, tmp_path_factory):
    """Paths of `decoder` and `encoder` (authors'), `joined`, `folder` and `file` (diffusers')."""
    folder = tmp_path_factory.mktemp("taesd")
    theirs.save_pretrained(folder / "taesd")
    states = {"encoder": {}, "decoder": {}}
    for name, value in theirs.state_dict().items():
        network, _, layer, parameter = name.split(".", 3)
        states[network][f"{int(layer) + (network == 'decoder')}.{parameter}"] = value
    joined = {}
    for network, state in states.items():
        torch.save(state, folder / f"taesd_{network}.pth")
        joined |= {f"{network}.{name}": value for name, value in state.items()}
    save_file(joined, folder / "joined.safetensors")
    return {
        "decoder": folder / "taesd_decoder.pth",
        "encoder": folder / "taesd_encoder.pth",
        "joined": folder / "joined.safetensors",
        "folder": folder / "taesd",
        "file": folder / "taesd/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize(
    ("network_class", "num_parameters"), [(TinyEncoder, 1_222_532), (TinyDecoder, 1_222_531)]
)
def test_networks_have_the_published_tensors(network_class, num_parameters):
    state = network_class().state_dict()
    assert len(state) == 67
    assert sum(value.numel() for value in state.values()) == num_parameters


@pytest.mark.parametrize("name", ["joined", "folder", "file"])
def test_encoding_and_decoding_equal_diffusers(name, paths, theirs):
    model = ldm.load(vae=paths[name])
    assert isinstance(model.autoencoder, TinyAutoencoder)
    assert model.provenance["vae"]["path"] == str(paths[name])
    image, z = torch.rand(1, 3, 64, 64) * 2 - 1, 4 * torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        error = (model.encode(image) - theirs.encode(image).latents).abs().max()
        assert error < 1e-5  # observed: 0
        assert (model.decode(z) - theirs.decode(z).sample).abs().max() < 1e-5  # observed: 0


def test_a_decoder_alone_keeps_the_encoder_of_the_model(paths, theirs):
    plain, model = ldm.load(), ldm.load(vae=paths["decoder"])
    image, z = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(*(m.autoencoder.encode(image).mode() for m in (model, plain)))
        assert (model.decode(z) - theirs.decode(z).sample).abs().max() < 1e-5
    assert isinstance(plain.autoencoder, AutoencoderKL)


def test_tasks_decode_with_taesd(paths, theirs):
    model = ldm.load(vae=paths["joined"], text_encoder=DEMO_CHECKPOINT)
    latents = []
    image = ldm.txt2img(
        model, PROMPT, **QUICK, callback=lambda step, steps, x, denoised: latents.append(denoised),
        scheduler="trailing",
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs.decode(latents[-1]).sample.clamp(-1, 1)
    assert (image - expected).abs().max() < 1e-5
    assert ldm.img2img(model, PROMPT, image, strength=0.5, **QUICK).shape == image.shape


def test_previews_are_decoded_by_taesd(paths, theirs):
    model = ldm.load()
    preview = ldm.load_preview(paths["decoder"], model)
    z = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        assert (preview(z) - theirs.decode(z).sample.clamp(-1, 1)).abs().max() < 1e-5
    assert isinstance(model.autoencoder, AutoencoderKL)


@pytest.mark.slow
def test_a_command_decodes_with_taesd_and_its_image_is_reproduced(paths, tmp_path, capsys):
    flags = ["--vae", str(paths["folder"]), "--steps", "1", "--n_samples", "1", "--n_iter", "1"]
    assert main(["txt2img", "--skip_grid", "--outdir", str(tmp_path), *flags]) == 0
    path = capsys.readouterr().out.strip()
    assert main(["replay", path]) == 0
    assert "identical" in capsys.readouterr().out


def test_files_of_taesd_that_do_not_fit_are_refused(paths, tmp_path):
    with pytest.raises(WeightsMismatch, match="only the encoder of TAESD"):
        ldm.load(vae=paths["encoder"])
    state = {k: v for k, v in torch.load(paths["decoder"]).items() if not k.startswith("19.")}
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsMismatch, match=r"is not TAESD with 4 latent channels: 2 missing"):
        ldm.load(vae=tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="TAESD, a small autoencoder"):
        ldm.load(ckpt=paths["decoder"])


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_of_a_folder_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"config\.json` is (damaged|not a config)"):
        ldm.load(vae=tmp_path)


def test_taesd_of_another_family_is_warned_of(paths, tmp_path):
    (tmp_path / "taesdxl_decoder.pth").write_bytes(paths["decoder"].read_bytes())
    with pytest.warns(UserWarning, match="is for SDXL, by its name"):
        ldm.load(vae=tmp_path / "taesdxl_decoder.pth")
