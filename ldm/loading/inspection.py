"""Inspect a checkpoint: describe its content without executing pickled code."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.loading.build import build_on_meta
from ldm.loading.families import LATENT_UPSCALER, DetectedPredictionType
from ldm.loading.files.checkpoint import CONFIG_KEY, detect_format, read_checkpoint
from ldm.loading.files.pickles import list_foreign_imports, list_pickle_imports
from ldm.loading.find_variant import detect_model_variant
from ldm.loading.matching import translate_names
from ldm.loading.model_config import asks_for_ema, probe_weights, read_config
from ldm.loading.modelspec import MODELSPEC_PREFIX
from ldm.loading.published import find_by_sha256, read_published_files, resolve_checkpoint
from ldm.loading.replace_components import UPSCALER_COMPONENTS
from ldm.loading.weight_names import has_prefix, has_sgm_names, select_prefix, to_original_name
from ldm.loading.weights import (
    TRANSPOSED_WARNING,
    Weights,
    has_transposed_projection,
    identify_weights,
)
from ldm.model import LatentDiffusion
from ldm.pipelines.families import FAMILIES, find_family
from ldm.runtime.errors import ArgumentError, MissingArgument, MissingFile
from ldm.runtime.hashes import find_cached_sha256, get_sha256
from ldm.runtime.types import JsonObject

__all__ = ["InspectionReport", "TensorGroup", "inspect_checkpoint"]

LORA_LAYER_PREFIX = re.compile("(lora|lycoris)_(unet|te[12]?)_")  # of kohya's layer names
MAX_VALUE_LENGTH = 80  # characters of a metadata value to show
# Bytes. Hashing takes seconds for a larger file: only done if its size is that of a published one.
MAX_SIZE_TO_HASH = 1_000_000_000


@dataclass(frozen=True)
class TensorGroup:
    """Tensors with a common prefix, such as those of the UNet.

    Args:
        name: Our name of the component.
        prefix: The original's prefix.
        tensors, parameters: Numbers of tensors, and of their elements.
        dtypes: Number of tensors by dtype.
    """

    name: str
    prefix: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass
class InspectionReport:
    """The result of the inspection of a file; None = unknown, unless stated otherwise.

    Args:
        bytes: Size of the file.
        sha256: "" = not computed, as no published file has this size.
        published: Name and title of the published file with this hash.
        kind: Format of the file: "zip", "legacy" or "safetensors".
        refused: Reason why the file cannot be read; None = it can be read.
        task: Name of its function in `ldm.pipelines`.
        uses_ema: Whether `load` uses its EMA weights by default, with this config.
        config: Path of the config that the weights are compared with, or CONFIG_KEY.
        extras: Names of entries beside the weights.
        pickle_names: Names that its pickle would import.
        foreign_names: Names among them that weights do not need.
        missing: The original's names of weights that the config needs and the file does not have;
            None = not compared.
        unexpected: Names in the file that the config does not need; None = not compared.
        variant: Few-step variant, and how it was recognized; None = an ordinary model.
        note: Reason why weights and config were not compared, or what looks wrong.
    """

    path: str
    bytes: int
    sha256: str
    published: str | None = None
    kind: str | None = None
    refused: str | None = None
    family: str | None = None
    title: str | None = None
    task: str | None = None
    config: str | None = None
    prediction: DetectedPredictionType | None = None
    parts: list[TensorGroup] = field(default_factory=list)
    has_ema: bool = False
    uses_ema: bool = False
    step: int | None = None
    extras: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    pickle_names: list[str] = field(default_factory=list)
    foreign_names: list[str] = field(default_factory=list)
    missing: list[str] | None = None
    unexpected: list[str] | None = None
    variant: str | None = None
    note: str = ""

    @property
    def model_spec(self) -> dict[str, str]:
        """The metadata of ModelSpec (title, author, license …), without their common prefix."""
        return select_prefix(self.metadata, MODELSPEC_PREFIX)

    def as_dict(self) -> JsonObject:
        """Return the report for JSON."""
        content = asdict(self)
        if self.prediction is not None:
            content["prediction"] = {  # keys that programs read: not the names of the fields
                "kind": self.prediction.value,
                "verdicts": [
                    {"method": d.method, "says": d.value, "evidence": d.evidence}
                    for d in self.prediction.detections
                ],
                "disputed": self.prediction.is_disputed,
            }
        return content

    def format_lines(self) -> Iterator[str]:
        """Yield the report as text."""
        yield f"file        {self.path}, {_format_size(self.bytes)}, {self.kind or 'unknown'}"
        digest = f"SHA-256 {self.sha256}" if self.sha256 else "no published file has this size"
        yield f"published   {self.published or 'unknown'} ({digest})"
        if self.refused:
            yield f"refused     {self.refused}"
        if self.parts:
            yield f"family      {self.title or 'unknown'}"
            config = "inside the file" if self.config == CONFIG_KEY else self.config
            yield f"config      {config or 'unknown'}"
            yield f"task        {self.task or 'unknown'}"
        if self.variant is not None:
            yield f"variant     {self.variant}"
        if self.prediction is not None:
            remark = ", but the methods disagree" if self.prediction.is_disputed else ""
            yield f"predicts    {self.prediction.value or 'unknown'}{remark}"
            for detection in self.prediction.detections:
                method, result = detection.method, detection.value or "nothing"
                yield f"  {method:10}{result} ({detection.evidence})"
        for i, (name, value) in enumerate(sorted(self.model_spec.items())):
            yield f"{'' if i else 'ModelSpec':12}{name:20}{_shorten(value)}"
        for i, group in enumerate(self.parts):
            dtypes = ", ".join(group.dtypes)
            count = f"{group.tensors:>5} tensors {group.parameters:>14,} parameters"
            yield f"{'' if i else 'parts':12}{group.name:20}{group.prefix:25}{count}  {dtypes}"
        if self.parts:
            use = "used, as the config says" if self.uses_ema else "used only with `ema`"
            yield f"EMA         {f'yes, {use}' if self.has_ema else 'no'}"
            yield f"step        {'unknown' if self.step is None else self.step}"
            yield f"other keys  {', '.join(self.extras) or 'nothing'}"
        if self.pickle_names:
            yield f"pickle      names {', '.join(self.pickle_names)}"
        if self.foreign_names:
            yield f"foreign     {', '.join(self.foreign_names)}"
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names is not None:
                more = ", …" if len(names) > 10 else ""
                yield f"{label:12}{len(names)} {', '.join(names[:10])}{more}".rstrip()
        if self.note:
            yield f"note        {self.note}"


def inspect_checkpoint(
    path: str | Path, config: str | Path | None = None, *, probe: bool = True
) -> InspectionReport:
    """Inspect a checkpoint: family, prediction type, tensor groups, missing and unexpected weights.

    Args:
        config: YAML to compare with; None = that of the family.
        probe: Whether to run the UNet once, which reads its weights, if the prediction type is
            uncertain.
    """
    path = resolve_checkpoint(path)
    if path.is_dir():
        message = f"`{path}` is a folder: pass a weights file in it, or convert it to one file"
        raise ArgumentError(f"{message} first")
    if not path.is_file():
        raise MissingFile(f"no checkpoint `{path}`")
    size = path.stat().st_size
    needs_hash = size < MAX_SIZE_TO_HASH or any(
        file.may_have_size(size) for file in read_published_files().values()
    )
    digest = get_sha256(path) if needs_hash else find_cached_sha256(path)
    report = InspectionReport(str(path), size, digest or "")
    if file := find_by_sha256(digest):
        report.published = f"{file.name}, {file.title}"
    try:
        report.kind = detect_format(path)
        if report.kind != "safetensors":
            report.pickle_names = list_pickle_imports(path, report.kind)
            report.foreign_names = list_foreign_imports(path, report.kind)
        weights = identify_weights(read_checkpoint(path))
    except ValueError as error:
        report.refused = str(error)
        return report
    if probe:
        weights.prediction_type = probe_weights(weights)
    report.prediction = weights.prediction_type
    if weights.family is not None:
        report.family, report.title = weights.family.name, weights.family.title
        report.task = weights.family.task or None
        if variant := detect_model_variant(weights):
            report.variant = f"{variant.name}, by {variant.evidence}"
    report.parts = list(_list_tensor_groups(weights.state_dict))
    report.has_ema = weights.checkpoint.has_ema
    report.step = weights.checkpoint.step
    report.extras = list(weights.checkpoint.other_keys)
    report.metadata = weights.checkpoint.metadata
    if has_transposed_projection(weights.state_dict):
        report.note = TRANSPOSED_WARNING
    _compare_with_config(report, weights, config)
    return report


def _shorten(text: str) -> str:
    """Return a text in one line, shortened: thumbnails have thousands of characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[:MAX_VALUE_LENGTH]} …"


def _format_size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"


def _list_tensor_groups(state: Mapping[str, Tensor]) -> Iterator[TensorGroup]:
    groups: dict[str, list[Tensor]] = {}  # by prefix of our names
    is_sgm = has_sgm_names(state)
    for name, tensor in state.items():
        depth = 2 if name.startswith("conditioner.") else 1
        depth += name.startswith("conditioner.image.")  # the original's embedder, noise_augmentor
        match = LORA_LAYER_PREFIX.match(name)
        prefix = match[0] if match else ".".join(name.split(".")[:depth]) + "."
        groups.setdefault(prefix, []).append(tensor)
    for prefix, tensors in groups.items():
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        original_prefix = to_original_name(prefix, sgm=is_sgm)
        parameters = sum(tensor.numel() for tensor in tensors)
        yield TensorGroup(prefix[:-1], original_prefix, len(tensors), parameters, dict(dtypes))


def _compare_with_config(
    report: InspectionReport, weights: Weights, config: str | Path | None
) -> None:
    """Set a report's config, missing and unexpected weights, and its family if it is unknown."""
    try:
        path, config_dict = read_config(weights, config)
        report.config, where = path, Path(path).name
        model = build_on_meta(config_dict, where=where)
    except MissingArgument as error:
        report.note = f"no config to compare with: {str(error).splitlines()[0]}"
        return
    except ValueError as error:
        report.note = str(error)
        return
    family = find_family(model.conditioner) if isinstance(model, LatentDiffusion) else None
    if report.family is None and family is not None:
        report.title, report.task = FAMILIES[family].title, FAMILIES[family].function
    expected, state = model.state_dict(), translate_names(model, weights.state_dict, weights.path)
    if weights.family is LATENT_UPSCALER:
        missing = [prefix for prefix in UPSCALER_COMPONENTS if not has_prefix(state, prefix)]
        if missing:
            titles = " and ".join(UPSCALER_COMPONENTS[prefix] for prefix in missing)
            report.note = f"needs {titles} from another file, such as Stable Diffusion 1"
        expected = {n: v for n, v in expected.items() if not n.startswith(tuple(missing))}
    is_sgm = has_sgm_names(expected)
    report.uses_ema = weights.checkpoint.has_litema_weights and asks_for_ema(config_dict)
    report.missing = [to_original_name(n, sgm=is_sgm) for n in expected if n not in state]
    report.unexpected = [to_original_name(n, sgm=is_sgm) for n in state if n not in expected]
