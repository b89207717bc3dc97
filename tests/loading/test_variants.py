"""Few-step models: how they are recognized, and their defaults in commands and Python."""

import shutil
from pathlib import Path

import pytest
import torch

import ldm
from ldm.commands.main import main
from ldm.generate.checks import find_few_step_warnings
from ldm.generate.plan import plan_batches
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import read_info
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.find_variant import find_variant_without_weights
from ldm.loading.variants import GUIDANCE_EMBED_KEY, VARIANTS, detect_lora_variant, detect_variant
from ldm.model import Defaults
from ldm.nets.lora import LoRA, LoRALayer
from ldm.runtime.errors import ArgumentError
from loading.tinyfamilies import change_json, write_family

QUICK = ["--n_samples", "1", "--n_iter", "1", "--skip_grid"]


@pytest.mark.parametrize(
    ("name", "variant", "steps"),
    [
        ("LCM_Dreamshaper_v7_4k.safetensors", "lcm", 4),
        ("dreamshaper_8LCM.safetensors", "lcm", 4),
        ("sd_turbo.safetensors", "turbo", 4),
        ("sdxl_lightning_8step.safetensors", "lightning", 8),
        ("sdxl_lightning_1step_x0.safetensors", "lightning-x0", 1),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", "hyper-1step", 1),
        ("hyperrealism_v3.safetensors", None, 0),
        ("v1-5-pruned.ckpt", None, 0),
    ],
)
def test_a_variant_is_recognized_by_the_name_of_a_model(name, variant, steps):
    detected = detect_variant(Path(name), {"modelspec.title": "Stable Diffusion XL 1.0 Base"})
    assert (detected and detected[:2]) == (variant and (variant, "the file's name"))
    by_title = detect_variant(Path("x"), {"modelspec.title": name})
    assert (by_title and by_title[:2]) == (variant and (variant, "metadata `modelspec.title`"))
    assert detected is None or detected.defaults.steps == steps


@pytest.mark.parametrize(
    ("path", "variant", "steps", "sampler"),
    [
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", "lcm", 4, "lcm"),
        ("models--latent-consistency--lcm-lora-sdxl/snapshots/a1/pytorch_lora_weights.safetensors",
         "lcm", 4, "lcm"),
        ("lcm-lora-sdxl/pytorch_lora_weights.fp16.safetensors", "lcm", 4, "lcm"),
        ("TCD-SD15-LoRA.safetensors", "tcd", 4, "tcd"),
        ("Hyper-SD15-1step-lora.safetensors", "hyper-1step", 1, "tcd"),
        ("Hyper-SDXL-8steps-lora.safetensors", "hyper", 8, "ddim"),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", "hyper-cfg", 12, "ddim"),
        ("sdxl_lightning_2step_lora.safetensors", "lightning", 2, "euler"),
        ("sd_xl_turbo_lora_v1.safetensors", "turbo", 4, "euler_a"),
        ("lightning_bolts.safetensors", None, 0, ""),
        ("turbo_cars_v2.safetensors", None, 0, ""),
    ],
)  # fmt: skip
def test_a_variant_is_recognized_by_the_name_of_a_lora(path, variant, steps, sampler):
    detected = detect_lora_variant(Path(path), {})
    assert (detected and detected.name) == variant
    if detected is not None:
        assert (detected.defaults.steps, detected.defaults.sampler) == (steps, sampler)
        metadata = {"ss_output_name": Path(path).parts[0]}
        assert detect_lora_variant(Path("x.safetensors"), metadata)


def test_a_model_that_embeds_the_guidance_scale_is_recognized_by_a_weight(tmp_path):
    path = tmp_path / "tiny.safetensors"
    write_family("sd1", path)
    file, width = read_checkpoint(path), ldm.load(path).unet.model_channels
    name = "model.diffusion_model.time_embedding.cond_proj.weight"
    state = file.state_dict | {name: 0.1 * torch.randn(width, 256)}
    write_checkpoint(tmp_path / "other.safetensors", state, file.metadata)
    model = ldm.load(tmp_path / "other.safetensors", variant="lcm")
    assert GUIDANCE_EMBED_KEY in model.state_dict()
    assert (model.guidance_embed_dim, model.defaults) == (256, VARIANTS["lcm-full"].defaults)
    with pytest.raises(ArgumentError, match="does not embed the guidance scale"):
        ldm.load(path, variant="lcm-full")
    with pytest.raises(ArgumentError, match="its variant is lcm-full, not turbo"):
        ldm.load(tmp_path / "other.safetensors", variant="turbo")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the demo model, with the name of that of LCM."""
    model = ldm.load()
    layers = {
        layer.kohya_name: LoRALayer(layer.target, 1) for layer in list_lora_targets(model)[:3]
    }
    path = tmp_path_factory.mktemp("loras") / "lcm-lora-sdv1-5.safetensors"
    write_lora(LoRA(layers), path, model)
    return path


@pytest.mark.slow
def test_a_lora_sets_the_defaults_unless_a_variant_is_given(lora):
    model = ldm.load(loras=[(lora, 1.0)])
    assert model.defaults == VARIANTS["lcm"].defaults
    assert model.provenance["variant"]["file"] == lora.name
    assert ldm.load(loras=[(lora, 1.0)], variant="base").defaults == ldm.load().defaults
    assert ldm.load(loras=[(lora, 1.0)], variant="tcd").defaults == VARIANTS["tcd"].defaults


def test_set_loras_sets_and_restores_the_defaults(lora):
    model = ldm.load()
    plain = model.defaults
    for _ in range(2):
        ldm.set_loras(model, [(lora, 1.0)])
        assert model.defaults == VARIANTS["lcm"].defaults
        ldm.set_loras(model, [(lora, "1:0")])  # no UNet
        assert (model.defaults, model.provenance.get("variant")) == (plain, None)
    for variant, defaults in (("base", plain), ("tcd", VARIANTS["tcd"].defaults)):
        model = ldm.load(variant=variant)
        ldm.set_loras(model, [(lora, 1.0)])
        assert model.defaults == defaults


@pytest.mark.parametrize(
    ("name", "variant"),
    [("LCMScheduler", "lcm"), pytest.param("TCDScheduler", "tcd", marks=pytest.mark.slow)],
)
def test_the_scheduler_of_a_folder_determines_the_variant(tiny_folder, name, variant):
    change_json(tiny_folder / "scheduler/scheduler_config.json", _class_name=name)
    model = ldm.load(tiny_folder)
    assert model.provenance["variant"]["evidence"] == f"its `{name}`"
    assert model.defaults == VARIANTS[variant].defaults
    assert ldm.load(tiny_folder, variant="base").defaults.steps == 50


def test_the_timestep_spacing_of_a_folder_sets_the_scheduler(tiny_folder):
    changes = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    change_json(tiny_folder / "scheduler/scheduler_config.json", **changes)
    assert ldm.load(tiny_folder).defaults == Defaults(scheduler="trailing")


@pytest.fixture(scope="module")
def written_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    write_family("sd1", root / "sd1.safetensors")
    convert(plan_conversion(root / "sd1.safetensors", root / "sd1"))
    (root / "sd1" / EXTRA_WEIGHTS).unlink()
    return root / "sd1"


@pytest.fixture
def tiny_folder(written_folder, tmp_path):
    return Path(shutil.copytree(written_folder, tmp_path / "sd1"))


@pytest.mark.slow
def test_loras_in_prompts_set_the_defaults_of_each_image(lora, tmp_path, capsys, caplog):
    tag = f"<lora:{lora.stem}:1>"
    prompts = [f"a cat {tag}", "a dog --s 2", f"an owl {tag} --s 2"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = ["--from-file", str(tmp_path / "prompts.txt"), "--lora-dir", str(lora.parent)]
    assert main(["txt2img", *flags, "--outdir", str(tmp_path), *QUICK]) == 0
    paths = capsys.readouterr().out.split()
    infos = [read_info(path) for path in paths]
    assert [info["sampler"] for info in infos] == ["lcm", "ddim", "lcm"]
    assert [info["steps"] for info in infos] == [4, 2, 2]
    assert [info["scale"] for info in infos] == [1, 2, 1]
    assert [info.get("variant") for info in infos] == ["lcm", None, "lcm"]
    assert caplog.text.count(f"`{lora.name}` is LCM (by ") == 2
    assert [main(["replay", path]) for path in paths] == [0, 0, 0]


def test_a_command_logs_and_records_the_variant_and_is_reproduced(lora, tmp_path, capsys, caplog):
    flags = ["--lora", str(lora), "--outdir", str(tmp_path), *QUICK]
    assert main(["txt2img", *flags]) == 0
    assert f"`{lora.name}` is LCM (by " in caplog.text
    assert ": sampler lcm, scheduler lcm, steps 4, guidance scale 1" in caplog.text
    path = capsys.readouterr().out.strip()
    info = read_info(path)
    keys = ("variant", "sampler", "scheduler_in_use", "steps", "scale")
    assert [info[key] for key in keys] == ["lcm", "lcm", "lcm", 4, 1.0]
    assert main(["replay", path]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.filterwarnings("default::UserWarning")
def test_options_override_the_defaults_of_a_variant_with_a_warning(lora, tmp_path, capsys, caplog):
    flags = ["--lora", str(lora), "--outdir", str(tmp_path), *QUICK]
    assert main(["txt2img", *flags, "--steps", "17", "--scale", "9", "--sampler", "euler"]) == 0
    info = read_info(capsys.readouterr().out.strip())
    assert (info["sampler"], info["steps"], info["scale"]) == ("euler", 17, 9)
    message = (
        f"`{lora.name}` is made for 4 steps and guidance scale 1: "
        "17 steps and guidance scale 9 will make"
    )
    assert caplog.text.count(message) == 1
    assert caplog.text.index(message) < caplog.text.index("running on")


def test_too_many_steps_for_a_pickle_named_lcm_are_warned_of_before_loading(tmp_path):
    path = tmp_path / "my-lcm.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}}, path)
    request = TASKS["txt2img"].build_request({"ckpt": str(path), "steps": 17})
    tasks = {(): request.task.prepare(request)}
    (warning,) = find_few_step_warnings(tasks, plan_batches(request))
    assert "`my-lcm.ckpt` is made for 4 steps" in warning
    state = {"model.diffusion_model.time_embedding.cond_proj.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, path)
    detected = find_variant_without_weights(path)
    assert detected is not None
    assert detected.name == "lcm-full"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert find_variant_without_weights(path) is None
