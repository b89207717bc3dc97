"""Model classes under the original's names: recorded values, attributes that others read.

Worst errors, as a fraction of the largest value: conditioning_routes 3.0e-6, ancestral 1.3e-4 (the
original's own noise there is 1.7e-4), train_losses 6.6e-7, train_step 1.8e-6.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from compathelp import TINY, UNET, build_model, build_recorded_model, randomize_zeros
from torch import nn

from goldfile import load_golden
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.ema import LitEma
from ldm.modules.losses import LPIPSWithDiscriminator
from quick import slow_except
from recipe import fill

SLOW = pytest.mark.slow


def test_conditions_reach_the_unet_as_recorded():
    golden = load_golden("conditioning_routes")
    shared, inputs = golden.select("shared/"), golden.inputs("crossattn_tensor")
    c, concat = inputs["c"], shared["cc"]
    hybrid = {"c_concat": [concat], "c_crossattn": [c]}
    conditions = {
        "crossattn_tensor": c,
        "crossattn_two": [c, shared["uc"]],
        "concat": concat,
        "hybrid": hybrid,
        "hybrid-adm": {**hybrid, "c_adm": shared["y"]},
        "crossattn-adm": {"c_crossattn": [c], "c_adm": shared["adm"]},
        "adm": {"c_crossattn": [shared["y"]]},
        "uncond": {},
        "sequential_crossattn": {"c_crossattn": [c, shared["uc"]]},
    }
    for case in golden.cases:
        model = build_recorded_model("conditioning_routes", case["info"]["config"])
        with torch.no_grad():
            out = model.apply_model(inputs["x"], inputs["t"], conditions[case["name"]])
        golden.assert_close(case["name"], out=out)


@pytest.mark.parametrize("parameterization", slow_except(["eps", "x0"], "eps"))
def test_ancestral_loops_equal_the_recorded_ones(parameterization):
    case, golden = f"ancestral_{parameterization}", load_golden("ancestral")
    model = build_recorded_model("ancestral", f"config_{parameterization}")
    inputs, t = golden.inputs(case), torch.tensor([3, 0])
    c, x0, x_T = inputs["c"], inputs["x0"], inputs["x_T"]
    torch.manual_seed(5)
    outputs = {}
    outputs["loop"], xs = model.p_sample_loop(c, x_T.shape, return_intermediates=True, x_T=x_T)
    torch.manual_seed(6)
    outputs["prog"], estimates = model.progressive_denoising(
        c, shape=x_T.shape[1:], batch_size=2, temperature=1, mask=inputs["mask"], x0=x0
    )
    torch.manual_seed(7)
    outputs["sample5"] = model.sample(c, batch_size=2, timesteps=5, shape=x_T.shape)
    outputs |= {"inter": torch.stack(xs), "prog_inter": torch.stack(estimates)}
    with torch.no_grad():
        gaussians = {
            "pm": model.p_mean_variance(x_T, c, t, clip_denoised=True),
            "q": model.q_posterior(x0, x_T, t),
            "qs": model.q_mean_variance(x0, t),
        }
    for name, moments in gaussians.items():
        names = (f"{name}_{moment}" for moment in ("mean", "var", "logvar"))
        outputs |= dict(zip(names, moments, strict=True))
    outputs["start_from_noise"] = model.predict_start_from_noise(x_T, t, x0)
    outputs["eps_from_start"] = model._predict_eps_from_xstart(x_T, t, x0)
    golden.assert_close(case, **outputs, prior_bpd=model._prior_bpd(x0))


def test_conversions_between_v_x0_and_eps_are_as_recorded():
    golden, model = load_golden("ancestral"), build_recorded_model("ancestral", "config_ddim_x0")
    inputs = golden.inputs("v_helpers")
    x0, x_T, t = inputs["x0"], inputs["x_T"], inputs["t"]
    golden.assert_close(
        "v_helpers", get_v=model.get_v(x0, x_T, t), q_sample=model.q_sample(x0, t, x_T),
        start=model.predict_start_from_z_and_v(x_T, t, x0),
        eps=model.predict_eps_from_z_and_v(x_T, t, x0),
    )  # fmt: skip
    inputs = golden.inputs("ddim_on_x0_model")
    samples, intermediates = DDIMSampler(model).sample(
        4, 2, (4, 8, 12), inputs["c"], x_T=inputs["x_T"], log_every_t=1
    )
    stacked = {name: torch.stack(tensors) for name, tensors in intermediates.items()}
    golden.assert_close("ddim_on_x0_model", samples=samples, **stacked)
    model.parameterization = "v"
    with pytest.raises(NotImplementedError):
        model.p_sample(inputs["x_T"], inputs["c"], torch.zeros(2, dtype=torch.long))
    model.parameterization = "x0"


QUICK_LOSSES = ("eps_elbo_train", "v_l2_train", "learn_logvar_train", "eps_l1_eval")
LOSSES = [name for case in load_golden("train_losses").cases
          if (name := case["name"]) != "forward_rng"]  # fmt: skip


@pytest.mark.parametrize("case", slow_except(LOSSES, *QUICK_LOSSES))
def test_losses_and_gradients_equal_the_recorded_ones(case):
    golden = load_golden("train_losses")
    shared, (config, mode) = golden.select("shared/"), case.rsplit("_", 1)
    model = build_model(golden.meta[f"config_{config}"])
    model.train(mode == "train")
    loss, loss_dict = model.p_losses(shared["x_start"], shared["c"], shared["t"], shared["noise"])
    outputs = {"loss": loss.detach()}
    outputs |= {f"dict/{name}": value.detach() for name, value in loss_dict.items()}
    if mode == "train":
        loss.backward()
        gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
        outputs |= {name: gradients[name] for name in gradients.keys() & golden.outputs(case)}
    assert outputs.keys() == golden.outputs(case).keys()
    golden.assert_close(case, **outputs)


def test_a_pixel_space_diffusion_model_is_trained():
    unet = {**TINY, "in_channels": 3, "out_channels": 3, "use_spatial_transformer": False}
    config = {"target": UNET, "params": {**unet, "context_dim": None}}
    model = DDPM(config, timesteps=10, use_ema=False, original_elbo_weight=0.5)
    model = randomize_zeros(model).train()
    images = torch.rand(2, 8, 8, 3)
    torch.manual_seed(0)
    loss, loss_dict = model.shared_step({"image": images})
    torch.manual_seed(0)
    t, x = torch.randint(0, 10, (2,)), images.movedim(-1, 1).contiguous()
    noise = torch.randn_like(x)
    mse = (model.model(model.q_sample(x, t, noise), t) - noise).square().mean((1, 2, 3))
    vlb = (model.lvlb_weights[t] * mse).mean()
    torch.testing.assert_close(loss, mse.mean() + 0.5 * vlb)
    assert loss_dict.keys() == {"train/loss_simple", "train/loss_vlb", "train/loss"}
    model.learning_rate = 1e-3
    (group,) = model.configure_optimizers().param_groups
    assert len(group["params"]) == len(list(model.model.parameters()))


def test_forward_draws_timesteps_then_noise():
    golden = load_golden("train_losses")
    shared, model = golden.select("shared/"), build_recorded_model("train_losses", "config_eps_l2")
    torch.manual_seed(1004)
    loss, _ = model(shared["x_start"], shared["c"])
    golden.assert_close("forward_rng", loss=loss.detach())


def test_steps_of_the_optimizer_and_the_ema_equal_the_recorded_ones():
    golden = load_golden("train_step")
    inputs, model = golden.inputs("adamw"), build_model(golden.meta["config"])
    model.model_ema = LitEma(model.model)
    model.learning_rate = 1e-3
    optimizer, outputs = model.configure_optimizers(), {}
    model.train()
    for step in range(2):
        noise = inputs["noise"].roll(step, 0)
        loss, _ = model.p_losses(inputs["x_start"], inputs["c"], inputs["t"], noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.on_train_batch_end()
        outputs[f"loss{step}"] = loss.detach()
        outputs |= {f"step{step}/{name}": v.clone() for name, v in model.state_dict().items()}
    expected = golden.outputs("adamw")
    golden.assert_close("adamw", **{name: outputs[name] for name in expected})
    weight = model.model.diffusion_model.out[2].weight
    trained = weight.detach().clone()
    with model.ema_scope():
        ema_weight = dict(model.model_ema.named_buffers())["diffusion_modelout2weight"]
        assert torch.equal(weight, ema_weight)
    assert torch.equal(weight, trained)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("get_input_concat", "inpaint"), ("get_input_concat", "depth"),
        ("get_input_more", "base_eps"), ("get_input_more", "unclip_train"),
        pytest.param("get_input_concat", "upscale", marks=SLOW),
        pytest.param("get_input_more", "upscale_ft", marks=SLOW),
        pytest.param("get_input_more", "unclip", marks=SLOW),
    ],
)  # fmt: skip
def test_batches_are_encoded_as_recorded(name, case):
    """Observed error: 1e-6 of the largest value."""
    golden = load_golden(name)
    info, inputs = golden.info(case), golden.inputs(case)
    image = load_golden("get_input_more").tensors["shared/jpg"]
    batch = {"txt": info["txt"], "jpg": image, **inputs}
    if case == "inpaint":
        batch["masked_image"] = image * (batch["mask"] < 0.5)
    model = build_recorded_model(name, f"config_{case.removesuffix('_train')}")
    model.train(case == "unclip_train")
    torch.manual_seed(info["seed"])
    z, c = model.get_input(batch, "jpg")[:2]
    assert not model.first_stage_model.training
    outputs = {"z": z, **(c if isinstance(c, dict) else {"c": c})}
    for key in ("c_concat", "c_crossattn"):
        if key in outputs:
            (outputs[key],) = outputs[key]
    golden.assert_close(case, **outputs)
    model.eval()


def test_first_stage_and_prompts_of_a_batch_are_as_recorded():
    golden = load_golden("get_input_more")
    model = build_recorded_model("get_input_more", "config_base_eps")
    image = golden.tensors["shared/jpg"].movedim(-1, 1).contiguous()
    posterior = model.encode_first_stage(image)
    torch.manual_seed(3)
    z = model.get_first_stage_encoding(posterior)
    z_mode = model.scale_factor * posterior.mode()
    uc = model.get_unconditional_conditioning(3, [""])
    golden.assert_close("base_first_stage", z=z, z_mode=z_mode, uc=uc)
    assert model.decode_first_stage(z).shape == image.shape
    with pytest.raises(NotImplementedError):
        model.get_first_stage_encoding("a string")
    with pytest.raises(NotImplementedError, match="null_label"):
        model.get_unconditional_conditioning(3)


@pytest.mark.parametrize("case", ["finetune_extend", "make_it_fit"])
def test_first_convolutions_of_checkpoints_are_widened_as_recorded(case, tmp_path):
    golden = load_golden("misc_cond")
    name, path = "model.diffusion_model.input_blocks.0.0.weight", tmp_path / "narrow.ckpt"
    write_checkpoint(path, {name: golden.inputs(case)["conv_in_4ch"]})
    (expected,) = (v for k, v in golden.outputs(case).items() if k.startswith("conv_in"))
    config = copy.deepcopy(load_golden("get_input_concat").meta["config_inpaint"])
    if case == "make_it_fit":
        config = copy.deepcopy(load_golden("ddim_eps").meta["config"])
        config["params"]["make_it_fit"] = True
    else:
        config["params"].pop("finetune_keys")
    for key in ("cond_stage_config", "first_stage_config"):
        config["params"][key] = {"target": "torch.nn.Identity"}
    config["params"]["unet_config"]["params"]["in_channels"] = expected.shape[1]
    model = build_model(config)
    model.init_from_ckpt(str(path))
    assert torch.equal(model.state_dict()[name], expected)


def test_the_scale_factor_of_the_first_batch_is_as_recorded():
    golden = load_golden("misc_cond")
    config = load_golden("get_input_more").meta["config_base_eps"]
    arch = load_golden("unclip_condition").meta["tiny_arch"]
    changes = {"scale_by_std": True, "scale_factor": 1.0, "first_stage_key": "jpg"}
    model = build_model(config, arch=arch, **changes)
    torch.manual_seed(1031)
    model.on_train_batch_start({"jpg": golden.inputs("scale_by_std")["jpg"]}, 0)
    golden.assert_close("scale_by_std", scale_factor=model.state_dict()["scale_factor"])


def test_conditions_are_noised_on_their_own_timestep_schedule():
    model = build_model(load_golden("ddim_eps").meta["config"], num_timesteps_cond=3)
    assert model.shorten_cond_schedule
    assert model.cond_ids[[0, 1, 2, 3, 999]].tolist() == [0, 500, 999, 999, 999]
    shared = load_golden("ddim_eps").select("shared/")
    loss, _ = model(shared["x0"], shared["c"])
    assert loss.isfinite()


@pytest.mark.slow
def test_logged_images_have_the_names_of_the_original():
    model = build_recorded_model("get_input_more", "config_base_eps")
    image = load_golden("get_input_more").tensors["shared/jpg"]
    batch = {"jpg": image[:, :64, :64], "txt": ["a cube", "a ball"]}
    model.register_schedule(timesteps=4)  # the loop of all timesteps is long
    try:
        log = model.log_images(
            batch, N=2, n_row=1, ddim_steps=2, split="train", plot_denoise_rows=True,
            unconditional_guidance_scale=2.0, unconditional_guidance_label=[""],
        )  # fmt: skip
        selected = model.log_images(batch, N=1, ddim_steps=2, inpaint=False, return_keys=["inputs"])
    finally:
        model.register_schedule(linear_start=0.00085, linear_end=0.012)
    assert log.keys() == {
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "denoise_row",
        "samples_cfg_scale_2.00", "mask", "samples_inpainting", "samples_outpainting",
        "progressive_row",
    }  # fmt: skip
    assert log["samples"].shape == log["conditioning"].shape == (2, 3, 64, 64)
    assert log["progressive_row"].shape == (3, 66 * 2 + 2, 66 * 2 + 2)
    assert selected.keys() == {"inputs"}


def test_models_have_the_attributes_that_third_party_code_reads():
    model = build_recorded_model("ddim_eps")
    keys = list(model.state_dict())
    assert keys[:2] == ["betas", "alphas_cumprod"]
    assert not hasattr(model, "conditioner")
    assert not hasattr(model, "split_input_params")
    assert (model.num_timesteps, model.channels, model.image_size) == (1000, 4, 8)
    assert model.logvar.shape == (1000,)
    assert "logvar" not in keys
    assert "lvlb_weights" not in keys
    assert model.model.conditioning_key == "crossattn"
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.cond_stage_key = "edit"
    model.first_stage_model, removed = None, model.first_stage_model
    model.first_stage_model = removed
    model.register_schedule(timesteps=10)
    assert model.betas.shape == (10,)
    model.register_schedule(linear_start=0.00085, linear_end=0.012)


@pytest.mark.parametrize(
    "case", slow_except(["gen_after_disc", "disc_vanilla", "lpips_gen"], "gen_after_disc")
)
def test_losses_of_the_autoencoder_equal_the_recorded_ones(case):
    golden = load_golden("ae_loss")
    info, shared = golden.info(case), golden.select("shared/")
    config = golden.meta["config_vae"]
    model = build_model(config, lossconfig={"target": "torch.nn.Identity"})
    loss_module = LPIPSWithDiscriminator(**info["loss_params"])
    loss_module.load_state_dict(fill(loss_module.state_dict(), golden.meta["salt"]))
    loss_module.train(info["loss_training"])
    posterior = model.encode(shared["x"])
    rec = model.decode(posterior.mean + posterior.std * shared["posterior_noise"])
    loss, loss_dict = loss_module(
        shared["x"], rec, posterior, info["optimizer_idx"], info["global_step"],
        last_layer=model.get_last_layer(), split="train",
    )  # fmt: skip
    outputs = {"loss": loss.detach(), **{f"log/{k}": v for k, v in loss_dict.items()}}
    golden.assert_close(case, **outputs)


def test_an_identity_first_stage_returns_its_input():
    x = torch.zeros(1, 3, 4, 4)
    assert IdentityFirstStage().encode(x) is x
    assert IdentityFirstStage().quantize(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x)[1:] == (None, [None, None, None])
    assert not isinstance(nn.Identity(), AutoencoderKL)


SPLIT_PARAMS = {
    "clip_min_weight": 0.01, "clip_max_weight": 0.5, "clip_min_tie_weight": 0.01,
    "clip_max_tie_weight": 0.5, "vqf": 4, "patch_distributed_vq": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["concat", "crossattn"])
def test_patches_are_extracted_and_merged_as_recorded(name):
    """Observed error: 1.4e-6 of the largest value; weights are equal."""
    golden = load_golden("patches_of_models")
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    model = build_model(golden.meta[f"config_{name}"], first_stage_config=identity)
    inputs = golden.inputs("apply_concat_tie0")
    cond = golden.inputs("apply_crossattn").get("ctx") if name == "crossattn" else inputs["c"]
    for case in golden.cases:
        if not case["name"].startswith(f"apply_{name}"):
            continue
        info = case["info"]
        model.split_input_params = SPLIT_PARAMS | {
            "ks": info["ks"], "stride": info["stride"], "tie_braker": info.get("tie_braker", False),
        }  # fmt: skip
        with torch.no_grad():
            eps = model.apply_model(inputs["x"], inputs["t"], cond)
        golden.assert_close(case["name"], eps=eps)
    model.split_input_params = {**SPLIT_PARAMS, "tie_braker": True}
    x = golden.inputs("fold_w_rect")["x"]
    fold, unfold, normalization, weighting = model.get_fold_unfold(x, (7, 4), (3, 2))
    refolded = fold(unfold(x) * weighting.repeat(1, 2, 1, 1, 1).flatten(1, 3)) / normalization
    outputs = {"weighting": weighting, "normalization": normalization, "refolded": refolded}
    golden.assert_close("fold_w_rect", **outputs)
    up = model.get_fold_unfold(torch.zeros(1, 3, 12, 16), (8, 8), (4, 4), uf=4)[2:]
    down = model.get_fold_unfold(torch.zeros(1, 3, 48, 64), (32, 32), (16, 16), df=4)[2:]
    outputs = {}
    for name, (normalization, weighting) in (("up", up), ("down", down)):
        outputs |= {f"{name}_normalization": normalization, f"{name}_weighting": weighting[..., 0]}
    golden.assert_close("fold_uf_df", **outputs)
    golden.assert_close("delta_border_5x8", d=model.delta_border(5, 8))
    del model.split_input_params
    assert not model.uses_patches


class Pooling(nn.Module):
    """An autoencoder in which a pixel depends only on its neighborhood."""

    def encode(self, x):
        return F.avg_pool2d(x, 4)

    def decode(self, z):
        return F.interpolate(z, scale_factor=4.0)


def test_patches_give_the_same_result_as_the_whole_image():
    config = load_golden("patches_of_models").meta["config_concat"]
    model = build_model(config, first_stage_config={"target": f"{__name__}.Pooling"})
    x, z = torch.randn(1, 3, 48, 64), torch.randn(1, 3, 12, 16)
    image = model.decode_first_stage(z)
    patches = {"tie_braker": True, "ks": (32, 32), "stride": (16, 16)}
    model.split_input_params = SPLIT_PARAMS | patches
    torch.testing.assert_close(model.encode_first_stage(x), F.avg_pool2d(x, 4))
    assert model.split_input_params["original_image_size"] == (48, 64)
    model.split_input_params |= {"ks": (8, 8), "stride": (4, 4)}
    torch.testing.assert_close(model.decode_first_stage(z), image)
