"""Commands on an imitation of Windows, or on Windows itself."""

import gc
from pathlib import Path

import pytest
import torch

import ldm
from ldm.app.backend import Backend
from ldm.app.library import Library
from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.commands.main import main
from ldm.generate.groups import ModelOptions
from ldm.generate.tasks import TASKS
from ldm.loading.files.checkpoint import read_checkpoint
from train.tinyrun import QUICK, TINY_YAML

ROOT = Path(__file__).parents[1]
MODEL = ROOT / (
    "tests/data/written_by_0_1/logs/2026-11-29T12-00-00_tiny/checkpoints/last.safetensors"
)
FORM_VALUES = {"width": 32, "height": 32, "steps": 1, "n_samples": 1, "n_iter": 1}

pytestmark = pytest.mark.usefixtures("windows")


def test_images_are_made_and_replayed(tmp_path: Path) -> None:
    flags = ["--H", "32", "--W", "32", "--steps", "1", "--n_iter", "1", "--n_samples", "2"]
    for _ in range(2):
        assert main(["txt2img", "--ckpt", str(MODEL), "--outdir", str(tmp_path), *flags]) == 0
    images = [f"samples/0000{number}.png" for number in range(4)]
    images += [f"grid-000{number}.png" for number in range(2)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == sorted(images)
    assert main(["replay", str(tmp_path / images[3]), "--ckpt", str(MODEL)]) == 0


@pytest.mark.slow
def test_a_model_is_converted_over_existing_files(tmp_path: Path) -> None:
    expected = ldm.load(MODEL).state_dict()
    folder, file, ckpt = (tmp_path / name for name in ("model", "a.safetensors", "a.ckpt"))
    for source, target in [(MODEL, folder), (folder, file), (file, ckpt)] * 2:
        assert main(["convert", str(source), str(target), "--force"]) == 0
    state = ldm.load(file).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_a_mapped_file_is_replaced_by_its_conversion(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(MODEL.read_bytes())
    assert main(["convert", str(file), str(file), "--dtype", "float16", "--force"]) == 0
    assert (
        read_checkpoint(file).state_dict["model.diffusion_model.out.2.bias"].dtype == torch.float16
    )


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # event loops of gradio
def test_the_app_is_built_and_makes_an_image(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'ldm-revived[app]'")
    from ldm.app.page import Page

    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.safetensors").write_bytes(MODEL.read_bytes())
    options = ModelOptions(device="cpu", precision="full")
    backend = Backend(Library(tmp_path / "models"), tmp_path / "out", options, Limits())
    assert Page(backend).build().blocks
    gc.collect()
    values = {"prompt": "a cat", **FORM_VALUES}
    progress = Progress()
    backend.generate(backend.build_request(TASKS["txt2img"], "tiny.safetensors", values), progress)
    assert [Path(info["path"]).name for info in progress.infos] == ["00000.png"]


@pytest.mark.slow
def test_a_run_is_trained_and_resumed_by_its_name(tmp_path: Path) -> None:
    logs = ["-l", str(tmp_path)]
    assert main(["train", "-b", str(TINY_YAML), *logs, "-t", "--max_steps", "1", *QUICK]) == 0
    name = str(tmp_path / "tiny")
    assert main(["train", "-t", *logs, "--resume", name, "lightning.trainer.max_steps=2"]) == 0
    (folder,) = tmp_path.glob("*_tiny")
    checkpoints = folder / "checkpoints"
    assert read_checkpoint(checkpoints / "last.safetensors").step == 2
    states = ["state-00000001", "state-00000002"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.safetensors", *states]
