"""`callbacks.evaluation`: metrics in the log, and errors before the first step."""

import csv
from dataclasses import replace

import pytest
import torch

from ldm.encoders.towers import CLIP
from ldm.runtime.errors import ConfigError, FileFormatError, NonFinite
from ldm.train.distributed.parallel import Ranks
from ldm.train.loop import train
from ldm.train.monitoring.evaluation import Evaluator
from train.tinyrun import EMOJI, build_tiny_run

PREFIX = "lightning.callbacks.evaluation."


@pytest.fixture
def overrides(tmp_path):
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14, "heads": 1}
    torch.save(CLIP(text | {"embed_dim": 64}, vision).state_dict(), tmp_path / "clip.pt")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    return [
        "lightning.trainer.max_steps=2",
        "lightning.callbacks.sampling.steps=1",
        PREFIX + "every_n_steps=2",
        PREFIX + f"prompts={tmp_path / 'prompts.txt'}",
        PREFIX + "scales=[1,3]",
        PREFIX + f"clip={tmp_path / 'clip.pt'}",
    ]


@pytest.mark.usefixtures("no_states")
def test_metrics_of_each_guidance_scale_are_logged(tmp_path, overrides):
    run = build_tiny_run(tmp_path / "run", *overrides)
    train(run)
    with (run.folder / "log.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["eval/prompt_score_scale_3"]]
    assert [row["step"] for row in rows] == ["2"]
    assert -1 < float(rows[0]["eval/prompt_score_scale_1"]) < 1
    assert run.task.trainable.training


def test_only_the_first_process_loads_networks_of_metrics(tmp_path, overrides):
    run = build_tiny_run(tmp_path / "run", *overrides)
    second = replace(run, ranks=Ranks(rank=1, world_size=2))
    evaluators = [Evaluator(r, run.settings.callbacks.evaluation) for r in (run, second)]
    assert [evaluator.prompt_scorer is None for evaluator in evaluators] == [False, True]
    assert evaluators[1]() == {}


@pytest.mark.usefixtures("no_states")
def test_non_finite_images_do_not_end_the_run(tmp_path, overrides, monkeypatch, caplog):
    def fail(*args, **options):
        raise NonFinite("the VAE")

    monkeypatch.setattr("ldm.train.monitoring.evaluation.txt2img", fail)
    run = build_tiny_run(tmp_path / "run", *overrides)
    train(run)
    assert run.state.step == 2
    assert "could not evaluate: the VAE returned values that are not finite" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts=nowhere.txt", "nowhere.txt"),
        ("clip=null", "needs `reference`, a folder of images, or `clip`, a file"),
        ("prompts=steps.txt", "prompts: `a cat --steps 9` has options or LoRAs of its own"),
        ("prompts=lora.txt", "prompts: `a cat <lora:x:1>` has options or LoRAs of its own"),
        ("count=9", "9 prompts requested, there are 3"),
        (f"clip={EMOJI / 'metadata.jsonl'}", "metadata.jsonl"),
    ],
)
def test_an_invalid_setting_ends_the_run_before_its_first_step(
    tmp_path, overrides, monkeypatch, override, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.txt").write_text("a dog\na cat --steps 9\n")
    (tmp_path / "lora.txt").write_text("a cat <lora:x:1>\n")
    run = build_tiny_run(tmp_path / "run", *overrides, PREFIX + override)
    assert run.settings.callbacks.evaluation is not None
    with pytest.raises((ConfigError, FileFormatError, ValueError, OSError), match=message):
        Evaluator(run, run.settings.callbacks.evaluation)
