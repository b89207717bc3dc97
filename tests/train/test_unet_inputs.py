"""Inputs of every family's UNet in training, against the original's `get_input`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from goldfile import GoldenFile, load_golden
from ldm.model import LatentDiffusion
from ldm.train.tasks.diffusion import DiffusionTask
from pipelines.goldmodels import build_recorded_model

# Probabilities of dropping a condition, and configs, of cases that differ in them.
DROPOUTS: dict[str, dict[str, float]] = {"unclip_train": {"embedding": 0.25}}
CONFIGS = {"unclip_train": "unclip"}
CASES = ["base_eps", "inpaint", "depth", "upscale", "unclip", "unclip_train", "upscale_ft"]
# The recorder's own float32 differs from itself by 1.4e-6.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def golden() -> GoldenFile:
    """The recording, which the repository has in two files without repeated tensors."""
    concat, more = load_golden("get_input_concat"), load_golden("get_input_more")
    tensors = {f"{case}/in/jpg": more.tensors["shared/jpg"] for case in CASES}
    tensors |= more.tensors | concat.tensors
    mask, image = (tensors[f"inpaint/in/{name}"] for name in ("mask", "jpg"))
    tensors["inpaint/in/masked_image"] = image * (mask < 0.5)
    arch = load_golden("e2e_unclip").meta["tiny_arch"]
    return GoldenFile(tensors, more.meta | {"cases": concat.cases + more.cases, "tiny_arch": arch})


@pytest.mark.parametrize("case", CASES)
def test_inputs_equal_the_originals(
    case: str, golden: GoldenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_recorded_model(golden, CONFIGS.get(case, case))
    DiffusionTask(model)  # adds the 0.001 of training to the range of depth maps
    info, expected = golden.case(case)["info"], golden.outputs(case)
    batch = {name: to_image(name, value) for name, value in golden.inputs(case).items()}
    replay(golden.draws(case), monkeypatch)
    actual = prepare_inputs(model, {**batch, "txt": info["txt"]}, DROPOUTS.get(case, {}))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=f"{case} {name}", **CLOSE)


def test_the_first_stage_equals_the_originals(
    golden: GoldenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = replace(
        golden, tensors=load_golden("get_input").tensors
    )  # which alone has the decoded image
    model, expected = build_recorded_model(golden, "base_eps"), golden.outputs("base_first_stage")
    image = to_image("jpg", golden.inputs("base_first_stage")["jpg"])
    replay(golden.draws("base_first_stage"), monkeypatch)
    z = model.encode(image)
    torch.testing.assert_close(z, expected["z"], **CLOSE)
    mode = model.autoencoder.encode(image).mode() * model.scale_factor
    torch.testing.assert_close(mode, expected["z_mode"], **CLOSE)
    torch.testing.assert_close(model.decode(mode), expected["dec"], rtol=1e-4, atol=1e-4)
    nothing = model.condition({"txt": [""] * 3}).crossattn
    torch.testing.assert_close(nothing, expected["uc"], **CLOSE)


def prepare_inputs(
    model: LatentDiffusion, batch: dict[str, Any], drop: dict[str, float]
) -> dict[str, Tensor]:
    """z and the conditions, under the original's names."""
    with torch.no_grad():
        z = model.encode(batch["jpg"])
        cond = model.condition(model.prepare(batch, (z.shape[-2], z.shape[-1])), drop)
    names = {"crossattn": "c_crossattn", "concat": "c_concat", "vector": "c_adm"}
    conditions = {names[slot]: value for slot, value in cond.tensors().items()}
    return (
        {"z": z, **conditions} if len(conditions) > 1 else {"z": z, "c": conditions["c_crossattn"]}
    )


def to_image(name: str, value: Tensor) -> Tensor:
    """Move the channels first, as in our batches; those of `midas_in` are."""
    return value if name == "midas_in" else value.permute(0, 3, 1, 2)


def replay(recorded: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch draw the recorded numbers, in the original's order.

    Its last draw of four decides which rows are kept; ours, by comparison with the probability.
    """
    draws: Iterator[Tensor] = iter(recorded)
    for name in ("randn", "randint", "rand"):
        monkeypatch.setattr(torch, name, lambda *_, **__: next(draws).squeeze(-1))
