"""`ldm train`: the original's command line, run folders, devices, and processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.loading.config import parse_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.train.command import main, parse
from ldm.train.config.datamodules import read_data
from ldm.train.config.settings import Devices, read_settings
from ldm.train.distributed import launch
from ldm.train.distributed.parallel import Ranks
from ldm.train.memory_estimate import TrainingMemory
from ldm.train.request import TrainRequest
from ldm.train.run import build_run
from ldm.train.runs import run_folder
from ldm.train.runs.run_folder import ExistingRun, find_run, prepare_folder, read_config
from loading import tinyfamilies
from train.tinyrun import HELD_OUT, make_tiny_config

TINY_YAML = "configs/train/tiny.yaml"
WRITTEN_BY_0_1 = Path("tests/data/written_by_0_1").resolve()


def start_run(request: TrainRequest, *torchrun_ids: str, state: int | None = None) -> Path:
    """Create a run folder as training does, with a state of step `state` if given."""
    folder = prepare_folder(request, None, torchrun_ids)
    run_folder.save_config(folder, read_config(request, None))
    run_folder.link_newest_run(request, folder)
    if state is not None:
        save_state(folder, state)
    return folder


def save_state(folder: Path, step: int) -> Path:
    state = folder / "checkpoints" / f"state-{step:08}"
    state.mkdir(parents=True)
    (state / "run.json").write_text("{}")
    return state


def parse_tiny(tmp_path: Path, *args: str) -> TrainRequest:
    return parse(["-b", TINY_YAML, "-t", "-l", str(tmp_path), *args])


def test_a_command_of_the_original_is_parsed() -> None:
    command = (
        "--base a.yaml b.yaml -t --gpus 0,1, --max_epochs 3 --scale_lr False --no-test -s 7 "
        "-f _try data.params.batch_size=4 --benchmark model.params.x=1"
    )
    request = parse(command.split())
    assert request.configs == ("a.yaml", "b.yaml")
    assert (request.train, request.name, request.resume) == (True, "b_try", None)
    assert request.overrides == (
        "lightning.trainer.gpus=0,1,",
        "lightning.trainer.max_epochs=3",
        "lightning.trainer.benchmark=true",
        "lightning.trainer.seed=7",
        "lightning.trainer.scale_lr=false",
        "data.params.batch_size=4",
        "model.params.x=1",
    )


@pytest.mark.parametrize(
    ("args", "train"), [("-t", True), ("-t true", True), ("--train=n", False), ("-t 0", False)]
)
def test_a_switch_may_have_a_value(args: str, train: bool) -> None:
    assert parse(["-b", "a.yaml", *args.split(), "x.y=1"]).train is train


@pytest.mark.parametrize(
    ("args", "resume"),
    [
        ("-r", ""),
        ("-r -t", ""),
        ("-r data.params.batch_size=3", ""),
        ("-r logs/x", "logs/x"),
        ("--res=logs/x", "logs/x"),
        ("--resume_from_checkpoint logs/x", "logs/x"),
        ("-t", None),
    ],
)
def test_resume_may_have_the_name_of_a_run(args: str, resume: str | None) -> None:
    assert parse(["-b", "a.yaml", *args.split()]).resume == resume


def test_a_value_may_follow_the_letter_of_its_option() -> None:
    request = parse(["-ba.yaml", "-t1", "-nfoo", "-f_x", "-s5"])
    assert (request.configs, request.train, request.name) == (("a.yaml",), True, "foo_x")
    assert request.overrides == ("lightning.trainer.seed=5",)


@pytest.mark.parametrize(
    "option", ["--max_time=1:12:00:00", "lightning.trainer.max_time=1:12:00:00"]
)
def test_a_time_is_not_read_as_a_number_in_base_60(option: str) -> None:
    config = read_config(parse(["-b", TINY_YAML, option]), None)
    assert read_settings(config).trainer.max_time == 36 * 3600


def test_two_runs_cannot_be_resumed() -> None:
    with pytest.raises(ValueError, match="--resume and --resume_from_checkpoint name two runs"):
        parse(["-b", TINY_YAML, "-r", "logs/x", "--resume_from_checkpoint", "logs/y"])


def test_configs_of_repeated_flags_are_merged() -> None:
    assert parse(["-b", "a.yaml", "-t", "-b", "b.yaml"]).configs == ("a.yaml", "b.yaml")


def test_a_slash_in_the_name_of_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="the name `a/b` of the run has a `/`"):
        parse(["-b", TINY_YAML, "-n", "a/b"])


def test_an_unused_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text("lighting: {trainer: {max_steps: 3}}", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown section `lighting`, did you mean `lightning`"):
        read_config(parse(["-b", TINY_YAML, str(path)]), None)
    path.write_text("shared: {steps: 3}\nlightning: {trainer: {max_steps: '${shared.steps}'}}")
    config = read_config(parse(["-b", TINY_YAML, str(path)]), None)
    assert config["lightning"]["trainer"]["max_steps"] == 3
    assert [*config] == ["model", "data", "lightning"]


def test_a_tilde_in_paths_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert parse(["-b", "a.yaml", "-l=~/logs"]).logdir == tmp_path / "logs"
    train = {"root": "x", "transform": {"name": "photo", "size": 64}}
    params = {"batch_size": 1, "train": train, "latents": {"cache_dir": "~/cache"}}
    data = read_data({"params": params})
    assert data.latents is not None
    assert data.latents.cache_dir == tmp_path / "cache"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--finetune_from a.ckpt", "`finetune_from`, use model.params.ckpt_path=a.ckpt"),
        ("lightning.trainer.max_epochs=1 lightning.trainer.max_steps=null "
         "data.params.train.root=null data.params.train.split=null "
         "data.params.train.shards=http://x/0.tar",
         "the length of the data is unknown, give `max_steps`, or for shards `data.params.train"),
        ("--base a.ckpt",
         "`a.ckpt` is a checkpoint: give its config, and model.params.ckpt_path=a"),
        ("--n 3", "`--n` could be any of --name, --nan_limit, --no-test, --nproc, --num_nodes"),
        ("--max_stepz 3", "unknown option `max_stepz`, did you mean `max_steps`"),
        ("data.params.batch_size=0", "data.params.batch_size: `0` should be greater"),
        ("data.params.trains=1", "data.params: unknown key `trains`, did you mean `train`"),
        ("data.params.train.root=nope", "data.params.train.root: there is no folder `nope`"),
        ("data.params.train.metadata=nope", "data.params.train.metadata: no file `nope`"),
        ("data.params.train.transform.tags=1", "data.params.train.transform: unknown key"),
        ("data.params.train.transform={name: photo, size: 100, buckets: {step: 64}}",
         "data.params.train.transform: buckets: size 100 is not a multiple of step 64"),
        ("data.params.validation={shards: no-*.tar, transform: {name: photo}}",
         "data.params.validation.shards: no shard `no-*.tar`"),
        ("data.params.prior={root: x, prompt: x, count: 1, transform: {name: photo, buckets: {}}"
         "}", "data.params.prior: class images must have one size, not `buckets`"),
        ("model.base_learning_rate=null", "missing in the config: `model.base_learning_rate`"),
        ("--validate", "--validate needs held-out data, `data.params.validation`"),
        ("-r", "no run `tiny` in"),
        ("--validate -r nowhere", "there is no run or state `nowhere`"),
        ("-r nowhere -n other", "`nowhere` keeps its name: leave out --name and --postfix"),
        ("--gpus 0,1, --num_nodes 2", "hint: torchrun --nnodes 2"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_create_no_files(
    args: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [args] if args.startswith("data.") else args.split()
    assert main(["-t", "-b", TINY_YAML, "-l", str(tmp_path), *arguments], "ldm train") == 1
    error = capsys.readouterr().err
    assert error.startswith("ldm train: error: ")
    assert message in error
    if args.startswith("data."):
        assert main(["--dry-run", "-b", TINY_YAML, "-l", str(tmp_path), args]) == 1
        assert message in capsys.readouterr().err
    assert error.count("\n") <= 2  # with a hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.params.train.root=nope"], "data.params.train.root: there is no folder `nope`"),
        (["trainer.strategy=fsdp", "lora.rank=2"], "LoRAs, embeddings and autoencoders cannot"),
        (["trainer.strategy=fsdp", "trainer.ema_device=cpu"], "do not work with `channels_last`"),
        (["trainer.strategy=hsdp", "trainer.shard_size=2"], "it must divide the 3 processes"),
    ],
)
def test_data_and_strategy_are_checked_before_other_processes_start(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_replace_process", lambda arguments: pytest.fail("started"))
    overrides = [f"{'' if o.startswith('data') else 'lightning.'}{o}" for o in overrides]
    assert main(["-t", "-b", TINY_YAML, "-l", str(tmp_path), "--nproc", "3", *overrides]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-b", TINY_YAML, "--nproc=-1"], "`-1` should be a whole number"),
        (["-t"], "--base is needed"),
    ],
)
def test_invalid_usage_ends_with_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err


def test_a_config_is_checked_without_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-b", TINY_YAML, "-l", str(tmp_path / "logs")]) == 0
    assert capsys.readouterr().out == "the config is valid\n"
    assert not (tmp_path / "logs").exists()


def test_a_run_is_trained_resumed_exported_and_validated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["-b", TINY_YAML, "-l", str(tmp_path)]
    options = ["lightning.callbacks.max_images=0", "data.params.batch_size=2", HELD_OUT]
    assert main([*base, "-t", "--max_steps", "2", *options]) == 0
    weights = Path(capsys.readouterr().out.strip())
    assert weights == (tmp_path / "tiny").resolve() / "checkpoints" / "last.safetensors"
    weights.unlink()
    assert main(["--resume", str(tmp_path / "tiny")]) == 0
    assert capsys.readouterr().out.strip() == str(weights)
    assert weights.exists()
    assert main(["-t", *base, "--resume", *options, "--max_steps", "3", "--validate"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"val/loss", "val/loss_ema"} <= set(names)
    assert (weights.parent / "state-00000003").is_dir()
    assert len(list((tmp_path / "tiny" / "configs").iterdir())) == 4
    assert len(list(tmp_path.glob("*_tiny"))) == 1
    run = (tmp_path / "tiny").resolve()
    ckpt_path = f"model.params.ckpt_path={weights}"
    assert main([*base, "-t", "--max_steps", "1", *options, ckpt_path]) == 1
    assert "hardly better than a trivial baseline" in capsys.readouterr().err
    assert (tmp_path / "tiny").resolve() == run


def test_only_the_first_process_prints_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["data.params.batch_size=2", "lightning.callbacks.validate_batches=1", HELD_OUT]
    monkeypatch.setattr(Ranks, "is_main_process", False)
    assert main(["-b", TINY_YAML, "-l", str(tmp_path), "--validate", *args]) == 0
    assert capsys.readouterr().out == ""


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, ldm.train.command as c\ntry: c.main(['--help'])\n"
        "finally: print({'torch', 'pydantic', 'omegaconf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("set()\n")


def test_the_name_of_a_run_is_a_link_to_a_folder_with_the_time(tmp_path: Path) -> None:
    first, second = (start_run(parse_tiny(tmp_path, "-f", "_a")) for _ in range(2))
    names = {run_folder.TIMESTAMP_PATTERN.sub("", folder.name) for folder in (first, second)}
    assert names == {"tiny_a"}
    assert first != second
    assert os.readlink(tmp_path / "tiny_a") == second.name
    config_names = sorted(path.name[20:] for path in (second / "configs").iterdir())
    assert config_names == ["lightning.yaml", "project.yaml"]


def test_a_folder_with_the_name_of_the_link_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tiny").mkdir()
    start_run(parse_tiny(tmp_path))
    assert not (tmp_path / "tiny").is_symlink()
    assert "is not a link" in caplog.text


def test_a_diffusers_folder_as_base_gives_config_and_weights(tmp_path: Path) -> None:
    tinyfamilies.write_family("sd2-v", tmp_path / "tiny.safetensors")
    convert(plan_conversion(tmp_path / "tiny.safetensors", tmp_path / "folder"))
    bases = [str(tmp_path / "folder"), "configs/train/lora-photos.yaml"]
    config = read_config(parse(["-b", *bases, "-t", "data.params.batch_size=3"]), None)
    assert config["model"]["params"]["ckpt_path"] == str(tmp_path / "folder")
    assert config["model"]["params"]["parameterization"] == "v"
    assert (config["lightning"]["lora"]["rank"], config["data"]["params"]["batch_size"]) == (16, 3)


def test_a_config_is_saved_once_and_read_when_resuming(tmp_path: Path) -> None:
    request = parse_tiny(tmp_path, "lightning.trainer.max_steps=2", "data.params.batch_size=3")
    folder = start_run(request, state=2)
    resuming = parse(["-t", "-r", str(folder), "lightning.trainer.max_steps=5"])
    config = read_config(resuming, find_run(resuming))
    assert config["data"]["params"]["batch_size"] == 3
    assert config["lightning"]["trainer"]["max_steps"] == 5
    run_folder.save_config(folder, read_config(request, None))
    assert len(list((folder / "configs").iterdir())) == 2
    other = parse(["-r", str(folder), "-b", TINY_YAML])
    assert read_config(other, find_run(other))["data"]["params"]["batch_size"] == 8


def test_a_dry_run_prints_the_config_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = TrainingMemory(1, 1, 1, 1, 1, 1, 1, 1)
    monkeypatch.setattr("ldm.train.memory_estimate.estimate_training_memory", lambda *_: memory)
    assert main(["-b", TINY_YAML, "-l", str(tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("base_learning_rate: ") == 1


def test_former_names_of_keys_are_read_in_files_and_overrides(tmp_path: Path) -> None:
    """They are renamed before configs are merged, so that the last value counts by either name."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("lightning: {optimizer: {warm_up: 7, decay: linear}, trainer: {keep: 3}}")
    overrides = ["lightning.optimizer.decay=cosine", "lightning.objective.drop=0.2", "--keep", "4"]
    config = read_config(parse(["-b", TINY_YAML, str(overlay), "-t", *overrides]), None)
    optimizer = {"name": "muon", "lr_warmup_steps": 7, "lr_scheduler": "cosine", "ema_decay": 0.9}
    assert config["lightning"]["optimizer"] == optimizer
    assert config["lightning"]["objective"] == {"conditioning_dropout_prob": 0.2}
    assert config["lightning"]["trainer"] == {"max_steps": 40, "keep_states": 4}


@pytest.mark.parametrize(
    ("base", "overlay", "override"),
    [("lanes: 4", "streams: 5", "lanes=6"), ("streams: 4", "lanes: 5", "streams=6")],
)
def test_the_last_value_of_a_data_option_counts_by_either_name(
    tmp_path: Path, base: str, overlay: str, override: str
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    text = "{data: {params: {train: {%s, transform: {%s: {mask: {%s}}}}}}}"
    first.write_text(text % (base, "records", "whole: 0.1, boxes: 0.2"), "utf-8")
    second.write_text(text % (overlay, "conditions", "full_probability: 0.3"), "utf-8")
    for overrides, streams in (([], 5), ([f"data.params.train.{override}"], 6)):
        config = read_config(parse(["-b", str(first), str(second), "-t", *overrides]), None)
        mask = {"full_probability": 0.3, "box_probability": 0.2}
        expected = {"streams": streams, "transform": {"conditions": {"mask": mask}}}
        assert config["data"]["params"]["train"] == expected


def test_references_to_former_names_of_keys_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "lightning: {trainer: {keep: 3}, callbacks: {max_images: '${lightning.trainer.keep}', "
        "save_top_k: '${lightning.trainer.keep_states}'}}"
    )
    callbacks = read_config(parse(["-b", str(file), "-t"]), None)["lightning"]["callbacks"]
    assert callbacks == {"max_images": 3, "save_top_k": 3}


@pytest.mark.parametrize("name", ["tiny", "lora", "word", "autoencoder"])
def test_the_config_of_a_run_of_version_0_1_is_read(name: str) -> None:
    existing = ExistingRun(WRITTEN_BY_0_1 / f"logs/2026-11-29T12-00-00_{name}", None)
    request = parse(["-r", str(existing.folder), "lightning.optimizer.lr_warmup_steps=9"])
    settings = read_settings(read_config(request, existing))
    assert settings.optimizer.lr_warmup_steps == 9
    scheduler = {"tiny": "cosine", "word": "linear"}.get(name, "constant")
    assert settings.optimizer.lr_scheduler == scheduler


def test_a_run_is_found_by_folder_link_name_state_or_weights(tmp_path: Path) -> None:
    first = start_run(parse_tiny(tmp_path), state=1)
    start_run(parse_tiny(tmp_path))  # died before its first state
    other = start_run(parse_tiny(tmp_path, "-n", "other_tiny"), state=3)
    earlier = save_state(other, 2)
    (other / "checkpoints/last.ckpt").touch()
    expected = {
        "": (first, 1),
        str(first): (first, 1),
        str(tmp_path / "other_tiny"): (other, 3),
        "other_tiny": (other, 3),
        str(other / "checkpoints"): (other, 3),
        str(other / "checkpoints/last.ckpt"): (other, 3),
        str(earlier): (other, 2),
    }
    for resume, (folder, step) in expected.items():
        state = folder / f"checkpoints/state-{step:08}"
        assert find_run(parse_tiny(tmp_path, f"--resume={resume}")) == ExistingRun(folder, state), (
            resume
        )


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("", "no run `tiny` in .* has a state"),
        ("nothing", "there is no run or state"),
        ("{run}", "has no checkpoints/state-"),
        ("{run}/checkpoints/epoch=000001.ckpt", "start a new run .* model.params.ckpt_path="),
    ],
)
def test_the_error_says_why_a_run_cannot_be_resumed(
    tmp_path: Path, resume: str, message: str
) -> None:
    run = start_run(parse_tiny(tmp_path))
    (run / "checkpoints").mkdir()
    (run / "checkpoints/epoch=000001.ckpt").touch()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        find_run(parse_tiny(tmp_path, f"--resume={resume.format(run=run)}"))


def test_after_an_elastic_restart_the_same_run_is_resumed(tmp_path: Path) -> None:
    request = parse_tiny(tmp_path)
    run = start_run(request, "id node1 7", "id node2 7")
    start_run(request, "id node3 7", state=9)
    assert find_run(request) is None
    assert find_run(request, ["id node1 8"]) is None  # another torchrun with the same id
    assert find_run(request, ["id node1 7"]) == ExistingRun(run, None)
    state_4 = save_state(run, 4)
    torchrun_ids = ["id node2 7", "id node4 7"]  # node1 was replaced
    assert find_run(request, torchrun_ids) == ExistingRun(run, state_4)
    prepare_folder(request, find_run(request, torchrun_ids), torchrun_ids)
    # `tiny` links to another run by now.
    for args in ([], ["-r"], ["-r", str(state_4)], ["-r", "tiny"]):
        assert find_run(parse_tiny(tmp_path, *args), ["id node4 7"]) == ExistingRun(run, state_4)


def test_a_restart_after_resuming_an_older_state_continues_from_it(tmp_path: Path) -> None:
    folder = start_run(parse_tiny(tmp_path), state=4)
    state_2 = save_state(folder, 2)
    request = parse_tiny(tmp_path, "-r", str(state_2))
    prepare_folder(request, find_run(request, ["id"]), ["id"])
    assert find_run(request, ["id"]) == ExistingRun(folder, state_2)
    state_3 = save_state(folder, 3)
    shutil.rmtree(state_2)  # only the newest are kept
    assert find_run(request, ["id"]) == ExistingRun(folder, state_3)


@pytest.mark.parametrize(
    ("trainer", "gpus"),
    [
        ("{gpus: '0,1,'}", [0, 1]), ("{devices: '0,'}", [0]), ("{gpus: 2}", 2), ("{gpus: 0}", 0),
        ("{gpus: [1, 3]}", [1, 3]), ("{gpus: -1}", -1), ("{}", None), ("{devices: auto}", None),
        ("{accelerator: cpu, devices: 2}", 0),
    ],
)  # fmt: skip
def test_gpus_may_be_a_list_or_a_count(trainer: str, gpus: list[int] | int | None) -> None:
    config = parse_yaml(f"lightning: {{trainer: {trainer}}}")
    assert read_settings(config).devices == Devices(gpus)


@pytest.mark.parametrize("gpus", ["''", "-2", "[-1]", "'0,-1'"])
def test_an_invalid_number_of_gpus_is_refused(gpus: str) -> None:
    with pytest.raises(
        ValueError, match=r"trainer\.gpus: `.*` should be a count of GPUs or a list"
    ):
        read_settings(parse_yaml(f"lightning: {{trainer: {{gpus: {gpus}}}}}"))


def test_a_requested_gpu_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.runtime.device.pick_device", lambda: torch.device("cpu"))
    for accelerator, needs_gpu in (("gpu", True), ("cuda", True), ("auto", False), ("ddp", False)):
        config = parse_yaml(f"lightning: {{trainer: {{accelerator: {accelerator}}}}}")
        devices = read_settings(config).devices
        assert devices.needs_gpu == needs_gpu
        if needs_gpu:
            with pytest.raises(ValueError, match=r"accelerator requests a GPU, none is available"):
                launch.launch(devices, 0, [])


@pytest.mark.parametrize("trainer", ["accelerator: cpu", "gpus: 0"])
def test_a_config_may_select_the_cpu(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.train.run.pick_device", lambda name: torch.device(name or "meta"))
    settings = read_settings(make_tiny_config(f"lightning.trainer.{trainer.replace(': ', '=')}"))
    assert build_run(settings, tmp_path).device.type == "cpu"


def test_processes_are_counted_over_all_nodes_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert launch.count_processes(Devices(-1)) == 3
    assert launch.count_processes(Devices([0, 1], num_nodes=3)) == 6
    assert launch.count_processes(Devices(), nproc_per_node=4) == 4


def launch_devices(
    monkeypatch: pytest.MonkeyPatch, devices: Devices, *, available: int, per_node: int = 0
) -> list[str]:
    """Return the arguments of the torchrun that replaces the process, or [] if none does."""
    torchrun_args: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.setattr(launch, "_replace_process", torchrun_args.extend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch.launch(devices, per_node, ["-b", "a.yaml"])
    return torchrun_args


def test_two_gpus_are_launched_by_torchrun_and_others_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = launch_devices(monkeypatch, Devices([1, 3]), available=4)
    assert args[:2] == ["--standalone", "--nproc-per-node=2"]
    assert args[-2:] == ["-b", "a.yaml"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    for gpus, visible in (([3], "3"), (0, ""), (None, "")):
        assert launch_devices(monkeypatch, Devices(gpus), available=4) == []
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert launch_devices(monkeypatch, Devices([0]), available=0) == []
    args = launch_devices(monkeypatch, Devices([0, 1]), available=0, per_node=2)
    assert "--nproc-per-node=2" in args


@pytest.mark.parametrize(
    ("devices", "available", "message"),
    [
        (Devices([0, 1]), 0, "2 GPUs requested, none available\nhint: --nproc 2"),
        (Devices([0, 7]), 2, "GPU 7 requested, 2 available"),
        (Devices([0, 1], num_nodes=2), 2, "torchrun --nnodes 2 --nproc-per-node 2"),
    ],
)
def test_gpus_that_are_not_available_are_refused(
    monkeypatch: pytest.MonkeyPatch, devices: Devices, available: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launch_devices(monkeypatch, devices, available=available)
