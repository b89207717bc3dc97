"""scripts/train.py: a run from the command line, stopped, continued, validated, exported."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.train import main

ROOT = Path(__file__).parents[2]
TINY = ["--base", "configs/train/tiny.yaml"]
HELD_OUT = (
    "data.params.validation="
    f"{{root: {ROOT}/tests/data/emoji, split: heldout, transform: {{name: emoji, size: 32}}}}"
)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch: Any) -> Iterator[None]:
    """From the root of the project; the log goes where it went before."""
    monkeypatch.chdir(ROOT)
    log = logging.getLogger("ldm")
    kept = (log.handlers, log.level)
    yield
    log.handlers, log.level = kept


def failed(*argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return str(stopped.value.code)


def test_a_start_that_fails_leaves_the_run_before_as_it_was(tmp_path: Path) -> None:
    base = [*TINY, "-l", str(tmp_path), "-t", "--max_steps", "1", "lightning.callbacks.images=0"]
    main([*base, "data.params.batch_size=2"])
    before = {path.name: path.resolve() for path in tmp_path.iterdir()}
    assert "unknown key `rnk`" in failed(*base, "lightning.lora.rnk=3")
    assert {path.name: path.resolve() for path in tmp_path.iterdir()} == before
    (weights,) = tmp_path.glob("tiny/checkpoints/last.safetensors")
    start = f"model.params.ckpt_path={weights}"
    assert "hardly better than a guess" in failed(*base, start)
    assert (tmp_path / "tiny").resolve() == before["tiny"]


def test_help_is_there_without_torch() -> None:
    code = "import sys, scripts.train as t\ntry: t.main(['--help'])\nfinally: print(*sys.modules)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" not in out.splitlines()[-1].split()
    assert "--gpus 0,1," in out


def test_a_run_is_trained_continued_exported_and_validated(tmp_path: Path, capsys: Any) -> None:
    base = [*TINY, "-l", str(tmp_path)]
    few = ["lightning.callbacks.images=0", "data.params.batch_size=2", HELD_OUT]
    main([*base, "-t", "--max_steps", "2", *few])
    weights = Path(capsys.readouterr().out.strip())
    assert weights == (tmp_path / "tiny").resolve() / "checkpoints" / "last.safetensors"
    weights.unlink()
    main(["--resume", str(tmp_path / "tiny")])
    assert capsys.readouterr().out.strip() == str(weights)
    assert weights.exists()
    main(["-t", *base, "--resume", *few, "--max_steps", "3", "--validate"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"val/loss", "val/loss_ema"} <= set(names)
    assert (weights.parent / "state-00000003").is_dir()
    assert len(list((tmp_path / "tiny" / "configs").iterdir())) == 4
    assert len(list(tmp_path.glob("*_tiny"))) == 1


def test_a_config_is_checked_without_a_folder(tmp_path: Path, capsys: Any) -> None:
    main([*TINY, "-l", str(tmp_path / "logs")])
    assert capsys.readouterr().out.strip() == "the config fits"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_stepz", "3"], "unknown option `max_stepz`, did you mean `max_steps`"),
        (["--validate", "-r", "nowhere"], "no run and no state `nowhere`"),
        (["lightning.trainer.maxsteps=3"], "did you mean `max_steps`"),
        (["-t", "--gpus", "0,1,", "--num_nodes", "2"], "hint: torchrun --nnodes 2"),
        (["--debug=maybe"], "2"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, argv: list[str], message: str) -> None:
    said = failed(*TINY, "-l", str(tmp_path), *argv)
    assert message in said
    assert len(said.splitlines()) <= 2
