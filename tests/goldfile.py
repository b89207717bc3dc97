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

IN_REPOSITORY = Path(__file__).parent / "data" / "goldens"
OUTSIDE = Path(os.environ.get("LDM_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))


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
        return [v for _, v in sorted(self.select(f"{case}/rng/").items())]

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.cases if case["name"] == name)

    def assert_close(self, case: str, **outputs: Any) -> None:
        """Compare outputs: within 1e-4 of the largest value, and ten times the original's noise."""
        expected, noise = self.outputs(case), self.case(case).get("noise_mkldnn_off_1thread", {})
        for name, output in outputs.items():
            ours, theirs = torch.as_tensor(output), expected[name]
            assert ours.shape == theirs.shape, name
            limit = 1e-4 * max(1.0, float(theirs.abs().max())) + 10 * noise.get(name, 0.0)
            assert (ours.double() - theirs.double()).abs().max() <= limit, name

    def weights(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        return self.select("state_dict/") or fill(state, self.meta["salt"], prefix)


def load_golden(name: str) -> GoldenFile:
    """Read the golden file `name` (no suffix); skip the test where it is missing."""
    path = next(
        (p for d in (IN_REPOSITORY, OUTSIDE) if (p := d / f"{name}.safetensors").is_file()), None
    )
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
