"""Full-size models have the names and shapes of diffusers' modules.

Ours, and theirs built from the JSONs that we write, are on the meta device.
"""

import json

import pytest
import torch

from ldm.loading import legacy
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.diffusers import networks
from ldm.loading.diffusers.folder_configs import make_folder_configs, make_original_config
from ldm.loading.diffusers.layout import MODEL_INDEX
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_weights
from ldm.loading.legacy import translate_config
from ldm.runtime.errors import FileFormatError
from quick import slow_except

pytestmark = pytest.mark.filterwarnings("ignore")  # about the future of other packages

NAMES = (
    "v1-inference", "v1-inpainting-inference", "v1-image-variation-inference", "v2-inference",
    "v2-inference-v", "v2-inpainting-inference", "v2-midas-inference", "x4-upscaling",
    "v2-1-stable-unclip-l-inference", "v2-1-stable-unclip-h-inference", "sd_xl_base",
    "sd_xl_inpaint", "sd_xl_refiner",
)  # fmt: skip
AUTOENCODERS = {  # ch_mult, z_channels, attn_resolutions
    "kl-f4": ([1, 2, 4], 3, []),
    "kl-f8": ([1, 2, 4, 4], 4, []),
    "kl-f16": ([1, 1, 2, 2, 4], 16, [16]),
    "kl-f32": ([1, 1, 2, 2, 4, 4], 64, [16, 8]),
}
QUICK_AND_SLOW_NAMES = slow_except(NAMES, "x4-upscaling")
# Prefixes of our weights that no network of diffusers has.
NOT_IN_DIFFUSERS = (
    "conditioner.text.model.transformer.resblocks.23.", "conditioner.text.model.text_projection",
    "conditioner.text.model.logit_scale", "conditioner.depth.model.pretrained.model.head.",
    "conditioner.lowres.", "conditioner.image.noise.", "conditioner.image.clip.model.",
    # of the text tower of a CLIP that only encodes images
    "conditioner.text.model.positional_embedding", "conditioner.text.model.token_embedding.",
    "conditioner.text.model.ln_final.", "conditioner.text_2.model.logit_scale",
)  # fmt: skip


def read_shipped(name):
    folder = "stable-diffusion-xl" if name.startswith("sd_xl") else "stable-diffusion"
    return read_yaml(f"configs/{folder}/{name}.yaml")


def get_diffusers_shapes(component, config):
    """Get names and shapes of the module that diffusers or transformers builds from a JSON."""
    import diffusers
    import transformers

    config = json.loads(json.dumps(config))
    with torch.device("meta"):
        if "_class_name" in config:
            module = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            model_class = getattr(transformers, config["architectures"][0])
            module = model_class(model_class.config_class(**config))
    prefix = "text_model." if component == "text_encoder" else ""
    names = {prefix + k.removeprefix(prefix): v for k, v in module.state_dict().items()}
    return {k: tuple(v.shape) for k, v in names.items() if not k.endswith("position_ids")}


def iter_components(model, spec):
    """Yield name, JSON and weights in diffusers' names of each component."""
    files, state = make_folder_configs(model, spec), model.state_dict()
    located = set()
    for component, locations in locate_weights(model).items():
        path = f"{component}/config.json" if MODEL_INDEX in files else "config.json"
        yield component, files[path], convert_to_diffusers(locations, state)
        located |= locations.keys()
    assert all(name.startswith(NOT_IN_DIFFUSERS) for name in state.keys() - located)


@pytest.mark.parametrize("name", QUICK_AND_SLOW_NAMES)
def test_published_models_have_diffusers_names_and_shapes(name):
    published = read_shipped(name)
    spec = translate_config(published, where=name)
    for component, config, ours in iter_components(build_on_meta(spec), spec):
        shapes = {name: tuple(value.shape) for name, value in ours.items()}
        assert shapes == get_diffusers_shapes(component, config), component


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_have_diffusers_names_and_shapes(name):
    ch_mult, z_channels, attn_resolutions = AUTOENCODERS[name]
    ddconfig = {"double_z": True, "z_channels": z_channels, "resolution": 256, "in_channels": 3,
                "out_ch": 3, "ch": 128, "ch_mult": ch_mult, "num_res_blocks": 2,
                "attn_resolutions": attn_resolutions, "dropout": 0.0}  # fmt: skip
    spec = {"target": legacy.AUTOENCODER, "params": {"ddconfig": ddconfig, "embed_dim": z_channels}}
    model = build_on_meta(spec)
    for component, config, ours in iter_components(model, spec):
        shapes = {name: tuple(value.shape) for name, value in ours.items()}
        assert shapes == get_diffusers_shapes(component, config)
        assert networks.parse_vae_config(config) == spec["params"]


@pytest.mark.parametrize("name", QUICK_AND_SLOW_NAMES)
def test_configs_survive_the_round_trip_through_diffusers(name):
    """Only keys without effect differ."""
    published = read_shipped(name)
    spec = translate_config(published, where=name)
    files = json.loads(json.dumps(make_folder_configs(build_on_meta(spec), spec)))
    original = make_original_config(files)
    if not name.startswith("v1"):
        text = "conditioner_config" if name.startswith("sd_xl") else "cond_stage_config"
        assert original["model"]["params"][text] == published["model"]["params"][text]
    converted_spec = translate_config(original, where=name)
    ours, converted = build_on_meta(spec), build_on_meta(converted_spec)
    if name != "v2-inference-v":  # its YAML has 64, the models were trained at 96
        assert ours.image_size == converted.image_size
    assert ours.scale_factor == converted.scale_factor
    assert ours.parameterization == converted.parameterization
    assert torch.equal(ours.schedule.betas, converted.schedule.betas)
    shapes, converted_shapes = (
        {k: v.shape for k, v in model.state_dict().items() if "clip.model.trans" not in k}
        for model in (ours, converted)
    )
    assert shapes == converted_shapes
    assert json.loads(json.dumps(make_folder_configs(converted, converted_spec))) == files


def test_a_folder_without_an_autoencoder_is_refused():
    files = {MODEL_INDEX: {}, "unet/config.json": {}, "depth_estimator/config.json": {}}
    with pytest.raises(FileFormatError, match="`the folder` has no `vae/config.json`: download"):
        make_original_config(files)
