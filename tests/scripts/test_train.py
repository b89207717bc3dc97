"""scripts/train.py: a run from the command line, stopped, continued, validated, exported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["lightning.trainer.max_steps=2", "lightning.callbacks.images=1"]


def train(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.train", *args]
    where = {"cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run(command, **where, check=False)  # type: ignore[call-overload]


def test_help_is_there_without_torch() -> None:
    code = "import sys, scripts.train; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "False"
    assert "--gpus 0,1," in train("--help").stdout


def test_a_run_is_trained_continued_and_exported(tmp_path: Path) -> None:
    base = ["--base", "configs/train/tiny.yaml", "-l", str(tmp_path)]
    first = train(*base, "-t", *SMALL)
    assert first.returncode == 0, first.stderr
    weights = Path(first.stdout.strip())
    assert weights.parts[-2:] == ("checkpoints", "last.safetensors")
    link = tmp_path / "tiny"
    assert weights == link.resolve() / "checkpoints" / "last.safetensors"
    weights.unlink()
    exported = train("--resume", str(link))
    assert exported.returncode == 0, exported.stderr
    assert weights.exists()
    on = train("-t", *base, "--resume", "lightning.callbacks.images=1", "--max_steps", "3")
    assert on.returncode == 0, on.stderr
    assert (weights.parent / "state-00000003").is_dir()
    assert len(list((link / "configs").iterdir())) == 4
    assert len(list(tmp_path.glob("*_tiny"))) == 1


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    wrong = train("-b", "configs/train/tiny.yaml", "-t", "--max_stepz", "3", "-l", str(tmp_path))
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith(
        "error: command line: unknown option `max_stepz`, did you mean `max_steps`"
    )
    assert len(wrong.stderr.strip().splitlines()) == 1
    nothing = train("-t")
    assert nothing.returncode == 2
    assert "-b/--base is needed" in nothing.stderr
