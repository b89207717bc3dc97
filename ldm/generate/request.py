"""Request: all options of one run as a frozen value.

    argv | form | PNG metadata  ->  Request  ->  images, PNG metadata, the command to repeat them

Options are fields, in groups (`ldm.generate.groups`). `command_line` converts from and to flags.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.generate.groups import (
    SDXL,
    Inputs,
    ModelOptions,
    Output,
    Prompts,
    Sampling,
    UpscalerOptions,
)
from ldm.generate.options import Value, decode_option
from ldm.prompts import PLAIN
from ldm.runtime.errors import ArgumentError, check_name

if TYPE_CHECKING:
    from ldm.generate.tasks.base import Task

__all__ = ["Request"]

InputsType = TypeVar("InputsType", bound=Inputs)


@dataclass(frozen=True)
class Request:
    """All options of one run.

    Args:
        inputs: The group of the task's inputs.
    Raises:
        ArgumentError: Options are out of range, exclude each other, or need others.
    """

    task: "Task"
    inputs: Inputs
    prompts: Prompts = field(default_factory=Prompts)
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: Sampling = field(default_factory=Sampling)
    sdxl: SDXL = field(default_factory=SDXL)
    upscaling: UpscalerOptions = field(default_factory=UpscalerOptions)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        sampling = self.sampling
        if sampling.sigmas is not None:
            steps = len(sampling.sigmas) - 1
            if sampling.steps not in (None, steps):
                raise ArgumentError(f"sigmas have {steps} steps, not {sampling.steps}", "steps")
        multiple = 64 if self.sdxl.refiner is not None else 8
        for name, side in zip(("height", "width"), sampling.size, strict=True):
            if side is not None and (side < 8 or side % multiple):
                reason = ", which a refiner needs" if multiple > 8 else ""
                raise ArgumentError(
                    f"{name} {side} is not a positive multiple of {multiple}{reason}", name
                )
        if self.prompts.syntax != PLAIN and self.upscaling.upscaler is not None:
            raise ArgumentError(
                "an x2 latent upscaler takes prompts of syntax plain only", "syntax"
            )

    @property
    def uses_demo_model(self) -> bool:
        """Whether the demo model is used, as no model is given."""
        return self.model.ckpt is None and self.model.config is None

    def get_inputs(self, group: type[InputsType]) -> InputsType:
        """Return the inputs, narrowed to the type of a task's group."""
        assert isinstance(self.inputs, group), f"{self.task.name} has no {group.__name__}"
        return self.inputs

    def get_values(self) -> dict[str, Value]:
        """Return the value of each option by name."""
        groups = self._get_groups().values()
        return {name: value for group in groups for name, value in vars(group).items()}

    def with_values(self, values: Mapping[str, object]) -> "Request":
        """Copy the request with some options set, each checked as on the command line.

        Raises:
            UnknownName: The task does not have the option.
            ArgumentError: The option does not allow the value.
        """
        options, decoded = self.task.options, {}
        for name, value in values.items():
            check_name(f"option of {self.task.name}", name, options, argument=name)
            decoded[name] = decode_option(name, options[name], value)
        groups = {
            key: replace(group, **{name: decoded[name] for name in vars(group).keys() & decoded})
            for key, group in self._get_groups().items()
        }
        return Request(self.task, **groups)

    def to_json(self, without_folders: bool = False) -> dict[str, Value]:
        """Return `get_values` with tuples as lists, as in JSON.

        Args:
            without_folders: Reduce paths to file names, except `config`, which replay must find.
        """
        values = self.get_values()
        if without_folders:
            paths = {name for name, option in self.task.options.items() if option.is_path}
            values |= {name: _remove_folders(values[name]) for name in paths - {"config"}}
        json_values: dict[str, Value] = json.loads(json.dumps(values))
        return json_values

    def _get_groups(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.task.groups}


def _remove_folders(value: Value) -> Value:
    if isinstance(value, tuple):
        return tuple(map(_remove_folders, value))
    return Path(value).name if isinstance(value, str) else value
