"""The original's names: published configs, weights renamed in both directions, classes."""

import re
from pathlib import Path

import pytest
import torch

from ldm.encoders import concat_images
from ldm.loading import legacy
from ldm.loading.build import build_on_meta
from ldm.loading.config import instantiate, read_yaml
from ldm.loading.legacy import translate_config
from ldm.loading.weight_names import rename_weights, restore_names, select_buffers
from ldm.runtime.errors import ConfigError
from nets.nethelp import describe_tensors, read_original_tensors
from quick import slow_except

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs/stable-diffusion").glob("*.yaml"))
NUM_PARAMETERS = {
    "v1-inference": 1066235307,
    "v2-inference": 1303597228,
    "v2-inference-v": 1303597228,
    "v2-inpainting-inference": 1303611628,
    "v2-midas-inference": 1426747093,
    "x4-upscaling": 882756588,
    "v2-1-stable-unclip-h-inference": 1991659693,
    "v2-1-stable-unclip-l-inference": 1734820781,
}
SLOTS_BY_KEY = {
    "v1-inpainting-inference": {"txt": "crossattn", "masked": "concat"},
    "v1-image-variation-inference": {"jpg": "crossattn"},
    "v2-inpainting-inference": {"txt": "crossattn", "masked": "concat"},
    "v2-midas-inference": {"txt": "crossattn", "depth": "concat"},
    "ldm3d": {"txt": "crossattn"},
    "ldm3d-4c": {"txt": "crossattn"},
    "ldm3d-sr": {"txt": "crossattn", "rgbd": "concat"},
    "x2-latent-upscaler": {"txt": "crossattn", "lowres_latent": "concat", "noise_sigma": "vector"},
    "x4-upscaling": {"txt": "crossattn", "lowres": "concat", "noise_level": "vector"},
    "v2-1-stable-unclip-h-inference": {"txt": "crossattn", "embedding": "vector"},
    "v2-1-stable-unclip-l-inference": {"txt": "crossattn", "embedding": "vector"},
}


def build_shipped(name):
    path = ROOT / f"configs/stable-diffusion/{name}.yaml"
    return build_on_meta(read_yaml(path), where=path.name)


def test_all_shipped_configs_are_tested_here():
    assert {path.stem for path in SHIPPED} == set(NUM_PARAMETERS) | set(SLOTS_BY_KEY)


LARGE_MODELS = {"v2-midas-inference", "v2-1-stable-unclip-l-inference"}


@pytest.mark.parametrize(
    "name", slow_except(NUM_PARAMETERS, *(NUM_PARAMETERS.keys() - LARGE_MODELS))
)
def test_models_have_the_names_and_shapes_of_published_files(name):
    model = build_shipped(name)
    state = restore_names(model.state_dict(), model.schedule.compute_buffers())
    assert describe_tensors(state) == read_original_tensors(name.removesuffix("-v"))
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[name]
    predicts_v = name == "v2-inference-v" or name.startswith(("x4", "v2-1-stable-unclip"))
    assert model.parameterization == ("v" if predicts_v else "eps")


@pytest.mark.parametrize(("name", "slots"), SLOTS_BY_KEY.items())
def test_encoders_of_a_config_have_the_keys_and_slots_of_its_family(name, slots):
    path = ROOT / f"configs/stable-diffusion/{name}.yaml"
    spec = translate_config(read_yaml(path))["params"]["conditioner"]
    encoders = build_on_meta(spec).children()
    assert {encoder.key: encoder.slot for encoder in encoders} == slots


def test_a_model_of_image_variations_needs_no_text_encoder():
    """Weights of one in a file are left out."""
    clip = build_shipped("v1-image-variation-inference").conditioner.text.model
    assert len(clip.visual.transformer.resblocks) == 24
    prefix = "cond_stage_model.model."
    state = {prefix + "visual.proj": torch.ones(1), prefix + "transformer.resblocks.0.x": None}
    assert list(rename_weights(state)) == ["conditioner.text.model.visual.proj"]


def test_renaming_back_and_forth_changes_nothing(tiny_state):
    ours = rename_weights(tiny_state)
    assert rename_weights(restore_names(ours)) == ours
    restored = restore_names(ours, select_buffers(tiny_state))
    assert restored.keys() == tiny_state.keys()


def test_position_ids_are_restored():
    name = "conditioner.text.transformer.text_model.embeddings.position_embedding.weight"
    state = restore_names({name: torch.zeros(77, 8)})
    ids = state["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(77)[None])
    assert set(rename_weights(state)) == {name}


@pytest.mark.parametrize(
    ("their_name", "our_name"),
    [
        ("cond_stage_model.transformer.encoder.x", "conditioner.text.transformer.text_model."
         "encoder.x"),
        ("cond_stage_model.transformer.text_model.a", "conditioner.text.transformer.text_model.a"),
        ("conditioner.embedders.0.model.ln_final.bias", "conditioner.text.model.ln_final.bias"),
        ("conditioner.embedders.1.token_ids", "conditioner.text_2.token_ids"),
        ("depth_model.model.a", "conditioner.depth.model.a"),
        ("embedder.model.a", "conditioner.image.clip.model.a"),
        ("noise_augmentor.betas", "conditioner.image.noise.betas"),
        ("low_scale_model.betas", "conditioner.lowres.betas"),
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ],
)  # fmt: skip
def test_names_of_other_programs_are_renamed(their_name, our_name):
    assert list(rename_weights({their_name: torch.ones(1)})) == [our_name]


def test_tensors_that_are_recomputed_are_left_out():
    names = (
        "betas", "posterior_mean_coef2", "lvlb_weights", "logvar", "model_ema.decay", "v_pred",
        "cond_stage_model.model.attn_mask", "first_stage_model.loss.logvar", "loss.discriminator.x",
        "cond_stage_model.transformer.text_model.embeddings.position_ids", "denoiser.sigmas",
        "cond_stage_model.transformer.embeddings.position_ids", "sqrt_recipm1_alphas_cumprod",
    )  # fmt: skip
    assert rename_weights(dict.fromkeys(names, torch.ones(1))) == {}


def read_params():
    return read_yaml(SHIPPED[0].with_name("v2-inference.yaml"))["model"]["params"]


def translate_params(params, skipped=None):
    spec = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    return translate_config({"model": spec}, where="x.yaml", skipped=skipped)


def test_every_parameter_of_the_original_is_accepted():
    for key in (
        "loss_type", "ckpt_path", "ignore_keys", "load_only_unet", "log_every_t", "clip_denoised",
        "original_elbo_weight", "l_simple_weight", "learn_logvar", "logvar_init", "make_it_fit",
        "ucg_training", "reset_ema", "reset_num_ema_updates", "concat_mode", "cond_stage_forward",
        "force_null_conditioning", "num_timesteps_cond", "scheduler_config", "monitor",
        "use_positional_encodings", "unet_trainable", "scale_by_std",
    ):  # fmt: skip
        assert translate_params(read_params() | {key: None}) == translate_params(read_params()), key
    schedule = {"beta_schedule": "cosine", "cosine_s": 8e-3, "v_posterior": 0.5}
    assert translate_params(read_params() | schedule)["target"] == legacy.LATENT_DIFFUSION


def test_concat_mode_is_not_skipped_unlike_parameters_of_training():
    skipped = []
    translate_params({**read_params(), "concat_mode": True, "logvar_init": 0.0}, skipped)
    assert "x.yaml: model.logvar_init" in skipped
    assert "x.yaml: model.concat_mode" not in skipped


def test_given_betas_make_the_schedule():
    spec = translate_params(read_params() | {"given_betas": [0.1, 0.2]})
    schedule = instantiate(spec["params"]["schedule"])
    assert schedule.betas.tolist() == [0.1, 0.2]


IDENTITY = {"target": "torch.nn.Identity", "params": {}}


@pytest.mark.parametrize(
    ("cond_stage", "names"),
    [("__is_unconditional__", []), ("__is_first_stage__", []), (IDENTITY, ["context"])],
)
def test_models_without_text_have_no_text_encoder(cond_stage, names):
    spec = translate_params(read_params() | {"cond_stage_config": cond_stage})
    assert list(spec["params"]["conditioner"]["params"]) == names


def test_the_first_stage_of_pixel_space_skips_the_originals_parameter():
    spec = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    skipped = []
    instantiate(spec | {"params": {"vq_interface": False}}, skipped=skipped)
    assert skipped == ["config.vq_interface"]


def test_a_trainable_text_encoder_is_not_frozen():
    params = read_params() | {"cond_stage_trainable": True}
    params["cond_stage_config"]["params"].pop("freeze")
    text = translate_params(params)["params"]["conditioner"]["params"]["text"]
    assert text["params"]["freeze"] is False


RESCALER = {"target": "ldm.modules.encoders.modules.SpatialRescaler"}


def translate_family(name, **changes):
    spec = read_yaml(SHIPPED[0].with_name(f"{name}.yaml"))["model"]
    return translate_config({**spec, "params": spec["params"] | changes}, where="x.yaml")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("v2-inpainting-inference", {"concat_keys": ["mask"], "masked_image_key": "masked_image"}),
        ("v2-midas-inference", {"concat_keys": ["midas_in"], "finetune_keys": ["x"]}),
        ("v2-midas-inference", {"keep_finetune_dims": 4, "c_concat_log_end": 1}),
        ("x4-upscaling", {"noise_level_key": None}),
        ("v2-1-stable-unclip-h-inference", {"embedding_dropout": 0.5}),
    ],
)
def test_parameters_of_training_are_accepted(name, changes):
    assert translate_family(name, **changes) == translate_family(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("v2-inference", {"scale_facto": 1.0}, "`scale_facto`, did you mean `scale_factor`"),
        ("v2-inference", {"conditioning_key": "concat"}, "conditioning_key `concat`"),
        ("v2-inference", {"cond_stage_config": RESCALER}, "`crossattn` does not fit"),
        ("x4-upscaling", {"low_scale_kee": "x"}, "LatentUpscaleDiffusion `low_scale_kee`, did you"),
        ("v2-midas-inference", {"conditioning_key": "concat"}, "only `hybrid`"),
        ("v2-inference", {"low_scale_key": "lr"}, "unknown parameter of LatentDiffusion"),
        ("v2-inference", {"given_betas": "x"}, r"^x\.yaml: invalid parameters: "),
        ("v2-inference", {"defaults": 5}, r"^x\.yaml: invalid parameters: "),
    ],
)
def test_parameters_that_a_family_does_not_support_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        translate_family(name, **changes)


@pytest.mark.parametrize(
    "target",
    [
        "taming.models.vqgan.GumbelVQ",
        "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder",
        "ldm.modules.encoders.modules.FrozenT5Embedder",
        "ldm.models.diffusion.ddpm.Layout2ImgDiffusion",
        "ldm.models.diffusion.ddpm_edit.LatentDiffusion",
        "cldm.cldm.ControlLDM",
        "ldm.models.diffusion.classifier.NoisyLatentImageClassifier",
    ],
)
def test_classes_that_are_not_supported_are_refused_by_name(target):
    with pytest.raises(ConfigError, match=rf" are not supported yet \(`{re.escape(target)}`\)"):
        translate_config({"target": target})


@pytest.mark.parametrize(
    ("former_name", "name"),
    [
        ("LowRes", "LowResImage"),
        *((name, name) for name in ("LowResLatent", "MaskedImage", "RGBDLatent")),
    ],
)
def test_former_module_of_encoders_is_read(former_name, name):
    encoder = instantiate({"target": f"ldm.encoders.lowres.{former_name}"})
    assert type(encoder) is getattr(concat_images, name)


def test_former_parameters_of_our_classes_are_read():
    spec = {"target": "ldm.encoders.lowres.Folded", "params": {"patch": 2}}
    assert instantiate(spec).patches_per_side == 2
    target = "ldm.diffusion.schedule.ContinuousSchedule"
    assert not instantiate({"target": target, "params": {"log_time": False}}).uses_log_sigma
    flags = {"log_time": True, "quantize_time": False, "flip_time": True}
    params = {"betas": torch.linspace(1e-4, 2e-2, 10)} | flags
    schedule = instantiate({"target": "ldm.diffusion.schedule.Schedule", "params": params})
    assert schedule.uses_log_sigma
    assert schedule.flip_timesteps
    assert not schedule.quantize_c_noise


def test_low_scale_config_with_patches_is_refused():
    changes = {"conditioning_key": "hybrid", "low_scale_config": {}, "concat_keys": ["lr"]}
    spec = {
        "target": legacy.LDM_DDPM + "LatentUpscaleFinetuneDiffusion",
        "params": read_params() | changes,
    }
    with pytest.raises(ValueError, match="low_scale_config with patches is not supported yet"):
        translate_config(spec)


def test_a_family_without_a_section_that_it_needs_is_refused():
    params = read_yaml(SHIPPED[0].with_name("x4-upscaling.yaml"))["model"]["params"]
    spec = {"target": legacy.LDM_DDPM + "LatentUpscaleDiffusion", "params": params}
    lowres = translate_config(spec)["params"]["conditioner"]["params"]["lowres"]
    assert lowres["params"]["low_scale_key"] == "lr"
    del params["low_scale_config"]
    with pytest.raises(ValueError, match="LatentUpscaleDiffusion needs `low_scale_config`"):
        translate_config(spec)
