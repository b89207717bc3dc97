"""Golden files: what the original code computed, recorded once (tests/data/goldens/README.md)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from recipe import fill

FOLDERS = (
    Path(__file__).parent / "data" / "goldens",
    Path(os.environ.get("LDM_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens")),
)


@dataclass(frozen=True)
class GoldenFile:
    """One golden file: `tensors` by name, `meta` with JSON values parsed."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def cases(self) -> list[dict[str, Any]]:
        return self.meta.get("cases", [])

    def select(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def inputs(self, case: str) -> dict[str, Tensor]:
        return self.select(f"{case}/in/")

    def outputs(self, case: str) -> dict[str, Tensor]:
        return self.select(f"{case}/out/")

    def draws(self, case: str) -> list[Tensor]:
        """Return the noise that the case drew, in order."""
        return [v for _, v in sorted(self.select(f"{case}/rng/").items())]

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.cases if case["name"] == name)

    def info(self, case: str) -> dict[str, Any]:
        """Return the arguments and seeds of a case."""
        return self.case(case)["info"]

    def assert_close(self, case: str, **outputs: Any) -> None:
        """Allow 1e-4 of the largest value, and ten times the original's own rounding errors."""
        rounding = self.case(case).get("noise_mkldnn_off_1thread", {})
        recorded = self.outputs(case)
        for name, output in outputs.items():
            actual, expected = torch.as_tensor(output), recorded[name]
            assert actual.shape == expected.shape, name
            limit = 1e-4 * max(1.0, float(expected.abs().max())) + 10 * rounding.get(name, 0.0)
            assert (actual.double() - expected.double()).abs().max() <= limit, name

    def weights(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return the recorded weights, or those that `recipe` computes for `state`."""
        return self.select("state_dict/") or fill(state, self.meta["salt"], prefix)


def load_golden(name: str) -> GoldenFile:
    """Read the golden file `name` (no suffix); skip the test where it is missing."""
    paths = [folder / f"{name}.safetensors" for folder in FOLDERS]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        pytest.skip(f"golden file `{name}` is not in the repository; set LDM_GOLDENS to its folder")
    with safe_open(str(path), "pt") as file:
        meta = {key: _parse(value) for key, value in (file.metadata() or {}).items()}
        return GoldenFile({key: file.get_tensor(key) for key in file.keys()}, meta)  # noqa: SIM118


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
