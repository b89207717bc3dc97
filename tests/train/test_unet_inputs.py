"""Inputs of UNets in training, compared with the original's `get_input`."""

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

# Dropout probabilities and configs of cases, if not the default.
DROPOUT_PROBS: dict[str, dict[str, float]] = {"unclip_train": {"embedding": 0.25}}
CONFIGS = {"unclip_train": "unclip"}
CASES = ["base_eps", "inpaint", "depth", "upscale", "unclip", "unclip_train", "upscale_ft"]
# Another run of the original differs by 1.4e-6.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def golden() -> GoldenFile:
    """The golden file, which is stored in two files without duplicate tensors."""
    concat, others = load_golden("get_input_concat"), load_golden("get_input_more")
    tensors = {f"{case}/in/jpg": others.tensors["shared/jpg"] for case in CASES}
    tensors |= others.tensors | concat.tensors
    mask, image = (tensors[f"inpaint/in/{name}"] for name in ("mask", "jpg"))
    tensors["inpaint/in/masked_image"] = image * (mask < 0.5)
    arch = load_golden("e2e_unclip").meta["tiny_arch"]
    meta = others.meta | {"cases": concat.cases + others.cases, "tiny_arch": arch}
    return GoldenFile(tensors, meta)


@pytest.mark.parametrize("case", CASES)
def test_inputs_equal_the_originals(
    case: str, golden: GoldenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_recorded_model(golden, CONFIGS.get(case, case))
    DiffusionTask(model)  # adds the 0.001 of training to the range of depth maps
    info, expected = golden.case(case)["info"], golden.outputs(case)
    inputs = golden.inputs(case)
    batch = {name: move_channels_first(name, value) for name, value in inputs.items()}
    replay_draws(golden.draws(case), monkeypatch)
    actual = prepare_inputs(model, {**batch, "txt": info["txt"]}, DROPOUT_PROBS.get(case, {}))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=f"{case} {name}", **TOLERANCE)


def test_the_first_stage_equals_the_originals(
    golden: GoldenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only this file has the decoded image.
    golden = replace(golden, tensors=load_golden("get_input").tensors)
    model = build_recorded_model(golden, "base_eps")
    expected = golden.outputs("base_first_stage")
    image = move_channels_first("jpg", golden.inputs("base_first_stage")["jpg"])
    replay_draws(golden.draws("base_first_stage"), monkeypatch)
    z = model.encode(image)
    torch.testing.assert_close(z, expected["z"], **TOLERANCE)
    mode = model.autoencoder.encode(image).mode() * model.scale_factor
    torch.testing.assert_close(mode, expected["z_mode"], **TOLERANCE)
    torch.testing.assert_close(model.decode(mode), expected["dec"], rtol=1e-4, atol=1e-4)
    uncond = model.condition({"txt": [""] * 3}).crossattn
    torch.testing.assert_close(uncond, expected["uc"], **TOLERANCE)


def prepare_inputs(
    model: LatentDiffusion, batch: dict[str, Any], dropout_prob: dict[str, float]
) -> dict[str, Tensor]:
    """Make z and the conditions, with the original's names."""
    with torch.no_grad():
        z = model.encode(batch["jpg"])
        cond = model.condition(model.prepare(batch, (z.shape[-2], z.shape[-1])), dropout_prob)
    names = {"crossattn": "c_crossattn", "concat": "c_concat", "vector": "c_adm"}
    conditions = {names[slot]: value for slot, value in cond.tensors().items()}
    return {"z": z, **(conditions if len(conditions) > 1 else {"c": conditions["c_crossattn"]})}


def move_channels_first(name: str, value: Tensor) -> Tensor:
    """Move the channels first, as in our batches; in `midas_in` they are."""
    return value if name == "midas_in" else value.permute(0, 3, 1, 2)


def replay_draws(recorded: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch draw the recorded numbers, in the original's order.

    The last of four draws decides which conditions are dropped.
    """
    draws: Iterator[Tensor] = iter(recorded)
    for name in ("randn", "randint", "rand"):
        monkeypatch.setattr(torch, name, lambda *_, **__: next(draws).squeeze(-1))
