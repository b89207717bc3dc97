"""The command line of training: the original's grammar, folders of runs, and which processes."""

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import parse_yaml
from ldm.train.command import parse, work
from ldm.train.distributed import launch
from ldm.train.runs import run_folder

TINY = "configs/train/tiny.yaml"


def begun(args: Namespace, *starters: str, state: int | None = None) -> Path:
    """A run as `train.py` leaves it, with a state if it got so far."""
    folder = run_folder.begin(args, None, starters)
    run_folder.note(args, folder, run_folder.read(args, None))
    run_folder.link(args, folder)
    if state is not None:
        saved(folder, state)
    return folder


def saved(folder: Path, step: int) -> Path:
    state = folder / "checkpoints" / f"state-{step:08}"
    state.mkdir(parents=True)
    (state / "run.json").write_text("{}")
    return state


def flags(tmp_path: Path, *words: str) -> Namespace:
    return parse(["-b", TINY, "-t", "-l", str(tmp_path), *words])


def test_a_command_of_the_original_means_what_it_meant() -> None:
    args = parse(
        [
            "--base",
            "a.yaml",
            "b.yaml",
            "-t",
            "--gpus",
            "0,1,",
            "--max_epochs",
            "3",
            "--scale_lr",
            "False",
            "--no-test",
            "-s",
            "7",
            "-f",
            "_try",
            "data.params.batch_size=4",
            "--benchmark",
            "model.params.x=1",
        ]
    )
    assert args.base == ["a.yaml", "b.yaml"]
    assert (args.train, args.no_test, args.postfix, args.resume) == (True, True, "_try", None)
    assert args.overrides == [
        "lightning.trainer.gpus=0,1,",
        "lightning.trainer.max_epochs=3",
        "lightning.trainer.benchmark=true",
        "lightning.trainer.seed=7",
        "lightning.trainer.scale_lr=false",
        "data.params.batch_size=4",
        "model.params.x=1",
    ]


@pytest.mark.parametrize(
    ("words", "train"), [("-t", True), ("-t true", True), ("--train=n", False), ("-t 0", False)]
)
def test_switches_take_a_value_or_none(words: str, train: bool) -> None:
    assert parse(["-b", "a.yaml", *words.split(), "x.y=1"]).train is train


@pytest.mark.parametrize(
    ("words", "resume"),
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
def test_a_run_to_go_on_with_may_be_named_or_not(words: str, resume: str | None) -> None:
    assert parse(["-b", "a.yaml", *words.split()]).resume == resume


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="unknown option `max_stepz`, did you mean `max_steps`"):
        parse(["-b", "a.yaml", "--max_stepz", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-b", TINY, "data.params.batch_size=0"), "data.params.batch_size: `0` should be greater"),
        (
            ("-b", TINY, "model.base_learning_rate=null"),
            "config: `model.base_learning_rate`",
        ),
        (
            ("-b", "configs/stable-diffusion/v2-inference.yaml"),
            "missing in the config: `data.p",
        ),
    ],
)
def test_nothing_is_made_for_a_config_that_cannot_be(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        list(work(parse(["-t", "-l", str(tmp_path / "logs"), *words])))
    assert not list(tmp_path.iterdir())


def test_counts_of_processes_and_threads_are_none_below_zero(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(["-b", TINY, "--nproc=-1"])
    assert "argument --nproc: `-1` is no whole number >= 0" in capsys.readouterr().err


def test_a_run_has_the_time_in_its_name_and_a_link_without(tmp_path: Path) -> None:
    first = begun(flags(tmp_path, "-f", "_a"))
    second = begun(flags(tmp_path, "-f", "_a"))
    assert (
        run_folder.STAMPED.sub("", first.name)
        == run_folder.STAMPED.sub("", second.name)
        == "tiny_a"
    )
    assert first != second
    assert os.readlink(tmp_path / "tiny_a") == second.name
    stems = sorted(path.name[20:] for path in (second / "configs").iterdir())
    assert stems == ["lightning.yaml", "project.yaml"]


def test_a_folder_in_the_place_of_the_link_stays(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "tiny").mkdir()
    begun(flags(tmp_path))
    assert not (tmp_path / "tiny").is_symlink()
    assert "is not a link" in caplog.text


def test_a_config_is_kept_once_and_read_again(tmp_path: Path) -> None:
    args = flags(tmp_path, "lightning.trainer.max_steps=2", "data.params.batch_size=3")
    folder = begun(args, state=2)
    again = parse(["-t", "-r", str(folder), "lightning.trainer.max_steps=5"])
    raw = run_folder.read(again, run_folder.find(again))
    assert raw["data"]["params"]["batch_size"] == 3
    assert raw["lightning"]["trainer"]["max_steps"] == 5
    run_folder.note(args, folder, run_folder.read(args, None))
    assert len(list((folder / "configs").iterdir())) == 2
    over = parse(["-r", str(folder), "-b", TINY])
    assert run_folder.read(over, run_folder.find(over))["data"]["params"]["batch_size"] == 8


def test_a_run_is_found_by_folder_link_name_state_or_weights(tmp_path: Path) -> None:
    old = begun(flags(tmp_path), state=1)
    begun(flags(tmp_path))  # died before its first state
    new = begun(flags(tmp_path, "-n", "other_tiny"), state=3)
    earlier = saved(new, 2)
    expected = {
        "": (old, 1),
        str(old): (old, 1),
        str(tmp_path / "other_tiny"): (new, 3),
        "other_tiny": (new, 3),
        str(new / "checkpoints"): (new, 3),
        str(new / "checkpoints/last.ckpt"): (new, 3),
        str(earlier): (new, 2),
    }
    (new / "checkpoints/last.ckpt").touch()
    for given, (folder, step) in expected.items():
        found = run_folder.find(flags(tmp_path, f"--resume={given}"))
        assert found is not None
        assert found.state == folder / f"checkpoints/state-{step:08}", given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "no run `tiny` in .* has a state"),
        ("nothing", "no run and no state"),
        ("{run}", "has no checkpoints/state-"),
        ("{run}/checkpoints/epoch=000001.ckpt", "hint: to start anew .* model.params.ckpt_path="),
    ],
)
def test_what_cannot_be_resumed_says_why(tmp_path: Path, given: str, message: str) -> None:
    run = begun(flags(tmp_path))
    (run / "checkpoints").mkdir()
    (run / "checkpoints/epoch=000001.ckpt").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        run_folder.find(flags(tmp_path, f"--resume={given.format(run=run)}"))


def test_after_an_elastic_restart_the_same_run_goes_on(tmp_path: Path) -> None:
    args = flags(tmp_path)
    mine = begun(args, "id node1 7", "id node2 7")
    begun(args, "id node3 7", state=9)
    assert run_folder.find(args) is None
    assert run_folder.find(args, ["id node1 8"]) is None  # started anew, with the same id
    assert run_folder.find(args, ["id node1 7"]) == run_folder.Old(mine, None)
    four = saved(mine, 4)
    after = ["id node2 7", "id node4 7"]  # node1 was replaced
    assert run_folder.find(args, after) == run_folder.Old(mine, four)
    run_folder.begin(args, run_folder.find(args, after), after)
    for words in ([], ["-r"], ["-r", str(four)], ["-r", "tiny"]):  # where `tiny` is another by now
        assert run_folder.find(flags(tmp_path, *words), ["id node4 7"]) == run_folder.Old(
            mine, four
        )


def test_a_restart_after_resuming_an_older_state_stays_on_its_branch(tmp_path: Path) -> None:
    folder = begun(flags(tmp_path), state=4)
    two = saved(folder, 2)
    args = flags(tmp_path, "-r", str(two))
    run_folder.begin(args, run_folder.find(args, ["id"]), ["id"])
    assert run_folder.find(args, ["id"]) == run_folder.Old(folder, two)
    three = saved(folder, 3)
    shutil.rmtree(two)  # as no more than the newest are kept
    assert run_folder.find(args, ["id"]) == run_folder.Old(folder, three)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("{gpus: '0,1,'}", [0, 1]), ("{devices: '0,'}", [0]), ("{gpus: 2}", 2), ("{gpus: 0}", 0),
        ("{gpus: [1, 3]}", [1, 3]), ("{gpus: -1}", -1), ("{}", None), ("{devices: auto}", None),
        ("{accelerator: cpu, devices: 2}", 0),
    ],
)  # fmt: skip
def test_gpus_are_listed_or_counted(trainer: str, expected: Any) -> None:
    assert launch.gpus(parse_yaml(f"lightning: {{trainer: {trainer}}}")) == expected


def test_processes_are_counted_over_all_nodes() -> None:
    raw = parse_yaml("lightning: {trainer: {gpus: '0,1,', num_nodes: 3}}")
    assert launch.processes(raw) == 6
    assert launch.processes(parse_yaml("lightning: {}"), nproc=4) == 4


def started(monkeypatch: Any, trainer: str, *, gpus: int, nproc: int = 0) -> list[str]:
    """The words of torchrun that `launch` would become, [] if it stays."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch, "_replace", found.extend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    raw = parse_yaml(f"lightning: {{trainer: {trainer}}}")
    launch.launch(raw, nproc, ["-b", "a.yaml"])
    return found


def test_two_gpus_mean_torchrun_with_two_processes_that_see_them(monkeypatch: Any) -> None:
    words = started(monkeypatch, "{gpus: '1,3,'}", gpus=4)
    assert words[:2] == ["--standalone", "--nproc-per-node=2"]
    assert words[-2:] == ["-b", "a.yaml"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert started(monkeypatch, "{gpus: '3,'}", gpus=4) == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert started(monkeypatch, "{gpus: 0}", gpus=4) == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert started(monkeypatch, "{gpus: '0,'}", gpus=0) == []
    assert "--nproc-per-node=2" in started(monkeypatch, "{gpus: '0,1,'}", gpus=0, nproc=2)


@pytest.mark.parametrize(
    ("trainer", "gpus", "message"),
    [
        ("{gpus: '0,1,'}", 0, "2 GPUs are asked for and there is none\nhint: --nproc 2"),
        ("{gpus: '0,7,'}", 2, "GPU 7 is asked for, here are 2"),
        ("{gpus: '0,1,', num_nodes: 2}", 2, "torchrun --nnodes 2 --nproc-per-node 2"),
        ("{gpus: two}", 2, "`two` is neither a number of GPUs nor a list"),
    ],
)
def test_gpus_that_are_not_there_are_named(
    monkeypatch: Any, trainer: str, gpus: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        started(monkeypatch, trainer, gpus=gpus)
