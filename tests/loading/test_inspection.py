"""`ldm inspect-checkpoint`: the content of a file as text and JSON, without running code."""

import json

import pytest
import torch

from ldm.commands.inspect_checkpoint import main
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.families import DetectedPredictionType, Detection
from ldm.loading.files.checkpoint import CONFIG_KEY, read_checkpoint, write_checkpoint
from ldm.loading.inspection import InspectionReport, inspect_checkpoint
from loading import payloads
from loading.tinyfamilies import write_family


@pytest.fixture
def path(tmp_path, tiny_state):
    state = {**tiny_state, "model_ema.diffusion_modelout2bias": torch.zeros(4)}
    state = {k: v.half() if k.startswith("first") else v for k, v in state.items()}
    torch.save({"state_dict": state, "global_step": 5, "epoch": 1}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_components_ema_and_step_are_reported(path, tiny_yaml, tiny_state):
    report = inspect_checkpoint(path, tiny_yaml)
    parts = {part.name: part for part in report.parts}
    assert set(parts) == {"unet", "autoencoder", "conditioner.text"}
    prefix = "first_stage_model."
    expected = sum(v.numel() for k, v in tiny_state.items() if k.startswith(prefix))
    assert parts["autoencoder"].parameters == expected
    assert parts["autoencoder"].prefix == prefix
    assert set(parts["autoencoder"].dtypes) == {"float16"}
    assert (report.has_ema, report.uses_ema) == (True, False)
    assert report.step == 5
    assert report.extras == ["global_step", "epoch"]
    assert (report.missing, report.unexpected) == ([], [])
    assert "torch.HalfStorage" in report.pickle_names
    assert report.foreign_names == []


def test_components_have_the_originals_prefixes(tmp_path):
    write_family("unclip-h", tmp_path / "x.safetensors")
    parts = inspect_checkpoint(tmp_path / "x.safetensors").parts
    assert {part.prefix for part in parts} == {
        "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "embedder.",
        "noise_augmentor.",
    }  # fmt: skip


def test_a_config_that_asks_for_ema_weights_is_reported(path, tiny_yaml, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(tiny_yaml.read_text().replace("use_ema: false", "use_ema: true"))
    report = inspect_checkpoint(path, config)
    assert "EMA         yes, used, as the config says" in report.format_lines()


def test_weights_that_do_not_fit_are_reported_by_their_names_in_the_file(path, tiny_yaml):
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.diffusion_model.out.2.bias"]
    content["state_dict"]["extra"] = torch.ones(1)
    torch.save(content, path)
    report = inspect_checkpoint(path, tiny_yaml)
    assert report.missing == ["model.diffusion_model.out.2.bias"]
    assert report.unexpected == ["extra"]


def test_text_and_json_report_the_same(path, tiny_yaml, capsys):
    assert main([str(path), "--config", str(tiny_yaml)]) == 0
    text = capsys.readouterr().out
    assert "EMA         yes" in text
    assert "missing     0" in text
    assert main([str(path), "--config", str(tiny_yaml), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 5
    assert {"family", "config", "prediction", "parts", "pickle_names"} <= report.keys()


def test_the_json_keys_of_a_prediction_type_are_stable():
    prediction = DetectedPredictionType("v", (Detection("marker", "v", "`v_pred`"),))
    assert InspectionReport("x.ckpt", 1, "", prediction=prediction).as_dict()["prediction"] == {
        "kind": "v",
        "verdicts": [{"method": "marker", "says": "v", "evidence": "`v_pred`"}],
        "disputed": False,
    }


def test_malicious_files_are_described_and_not_run(tmp_path, capsys):
    marker = tmp_path / "marker"
    for name, body in payloads.make_calls(marker).items():
        path = payloads.write_zip(tmp_path / "evil.ckpt", payloads.make_pickle(body))
        assert main([str(path)]) == 1
        out = capsys.readouterr().out
        assert "refused" in out
        assert name in out
    assert not marker.exists()


def test_files_that_are_not_checkpoints_are_described_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "absent.ckpt")]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "is a folder: pass a weights file in it" in capsys.readouterr().err
    (tmp_path / "page.ckpt").write_text("<html></html>")
    assert main([str(tmp_path / "page.ckpt")]) == 1
    assert "a web page" in capsys.readouterr().out


def test_a_lora_is_named_and_converted_unchanged(tmp_path):
    path = tmp_path / "lora.safetensors"
    write_checkpoint(path, {"lora_unet_x.lora_down.weight": torch.ones(1, 1)})
    assert "is a LoRA, which is merged into a model" in inspect_checkpoint(path).note
    convert(plan_conversion(path, tmp_path / "y.ckpt"))
    assert list(read_checkpoint(tmp_path / "y.ckpt").state_dict) == ["lora_unet_x.lora_down.weight"]


def test_a_file_with_its_own_yaml_is_compared_with_it(tmp_path, tiny_yaml, tiny_state):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, tiny_state, {CONFIG_KEY: tiny_yaml.read_text()})
    report = inspect_checkpoint(path)
    assert (report.missing, report.unexpected, report.note) == ([], [], "")


@pytest.mark.parametrize(
    ("names", "description"),
    [
        (["concept_embeds", "visual_projection.weight"], "the safety checker"),
        (["Mixed_5b.branch1x1.conv.weight", "fc.weight"], "an Inception network"),
        (["visual.conv1.weight", "transformer.resblocks.0.ln_1.weight"], "a CLIP"),
        (["text_model.final_layer_norm.weight", "vision_model.post_layernorm.weight"], "a CLIP"),
    ],
)
def test_the_type_of_a_file_without_a_model_is_named(tmp_path, names, description):
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "x.pth")
    assert description in inspect_checkpoint(tmp_path / "x.pth").note


@pytest.mark.parametrize(("name", "task"), [("ldm3d-4c", "txt2img"), ("ldm3d-sr", "upscale_rgbd")])
def test_ldm3d_is_recognized(tmp_path, name, task):
    write_family(name, tmp_path / "x.safetensors")
    report = inspect_checkpoint(tmp_path / "x.safetensors")
    assert (report.task, report.missing, report.unexpected) == (task, [], [])
