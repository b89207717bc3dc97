"""scripts/train.py: a run from the command line, stopped and continued."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.train", "--base", "configs/train/tiny.yaml"]
    where = {"cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run([*command, *args], **where, check=False)  # type: ignore[call-overload]


def test_a_run_is_trained_continued_and_exported(tmp_path: Path) -> None:
    first = train("-t", "-l", str(tmp_path), "lightning.trainer.max_steps=2")
    assert first.returncode == 0, first.stderr
    weights = tmp_path / "tiny" / "checkpoints" / "last.safetensors"
    assert first.stdout.strip() == str(weights)
    weights.unlink()
    exported = train("--resume", "-l", str(tmp_path))
    assert exported.returncode == 0, exported.stderr
    assert weights.exists()
    again = train("-t", "-l", str(tmp_path))
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
