"""Inspect a checkpoint: describe its content without executing pickled code."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ldm.loading.build import build_on_meta
from ldm.loading.families import Prediction
from ldm.loading.files.checkpoint import CONFIG_KEY, detect_format, read_checkpoint
from ldm.loading.files.pickles import foreign_imports, pickle_imports
from ldm.loading.legacy import translate_config
from ldm.loading.load import (
    TRANSPOSED,
    UPSCALER_PARTS,
    choose_config,
    find_variant,
    probe_weights,
    read_config,
)
from ldm.loading.matching import translate_names
from ldm.loading.modelspec import PREFIX
from ldm.loading.published import find_checkpoint, identify_hash, published_files
from ldm.loading.weight_names import has_engine_names, original_name
from ldm.loading.weights import Weights, has_transposed_projection, identify_weights
from ldm.model import LatentDiffusion
from ldm.pipelines.families import FAMILIES, family_of
from ldm.runtime.errors import MissingArgument, MissingFile
from ldm.runtime.hashes import find_cached_sha256, hash_file
from ldm.runtime.types import JsonObject

__all__ = ["Part", "Report", "inspect_checkpoint"]

ADAPTER = re.compile("(lora|lycoris)_(unet|te[12]?)_")  # prefix of kohya's layer names
LONGEST = 80  # characters of a value to show
SMALL = 1_000_000_000  # bytes; the hash of a larger file is computed only if it may be published


@dataclass(frozen=True)
class Part:
    """Tensors with a common prefix.

    Args:
        name: our name of the part.
        prefix: the original's prefix.
        tensors: number of tensors.
        parameters: number of their elements.
        dtypes: number of tensors by dtype.
    """

    name: str
    prefix: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The result of an inspection of one file."""

    path: str
    bytes: int
    sha256: str  # "" if it was not computed, as no published file has this size
    published: str | None = None  # the name of the published file with this hash, and its title
    kind: str | None = None
    refused: str | None = None  # why the file cannot be read; None = it can
    family: str | None = None
    title: str | None = None  # name of the family in messages
    task: str | None = None  # function of `ldm.pipelines` for it
    config: str | None = None
    prediction: Prediction | None = None
    parts: list[Part] = field(default_factory=list)
    has_ema: bool = False
    step: int | None = None
    extras: list[str] = field(default_factory=list)  # names of the entries beside the weights
    metadata: dict[str, str] = field(default_factory=dict)
    pickle_names: list[str] = field(default_factory=list)  # names that its pickle would import
    foreign_names: list[str] = field(default_factory=list)  # those of them weights do not need
    # names that the config needs and the file does not have; None if not compared
    missing: list[str] | None = None
    unexpected: list[str] | None = None  # names in the file that the config does not need
    variant: str | None = None  # kind of a few-step model, and how it was recognised
    note: str = ""  # why weights and config were not compared, or what looks wrong

    @property
    def model_spec(self) -> dict[str, str]:
        """The metadata of ModelSpec: title, author, licence …, without their common prefix."""
        texts = self.metadata.items()
        return {k.removeprefix(PREFIX): v for k, v in texts if k.startswith(PREFIX)}

    def as_dict(self) -> JsonObject:
        """Return plain values, for JSON."""
        plain = asdict(self)
        if self.prediction is not None:
            plain["prediction"]["disputed"] = self.prediction.disputed
        return plain

    def lines(self) -> Iterator[str]:
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
            doubt = ", but the methods disagree" if self.prediction.disputed else ""
            yield f"predicts    {self.prediction.kind or 'unknown'}{doubt}"
            for verdict in self.prediction.verdicts:
                yield f"  {verdict.method:10}{verdict.says or 'nothing'} ({verdict.evidence})"
        for i, (name, value) in enumerate(sorted(self.model_spec.items())):
            yield f"{'' if i else 'ModelSpec':12}{name:20}{_shorten(value)}"
        for i, part in enumerate(self.parts):
            dtypes = ", ".join(part.dtypes)
            count = f"{part.tensors:>5} tensors {part.parameters:>14,} parameters"
            yield f"{'parts' if not i else '':12}{part.name:20}{part.prefix:25}{count}  {dtypes}"
        if self.parts:
            yield f"EMA         {'yes, `ema` takes it' if self.has_ema else 'no'}"
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
) -> Report:
    """Inspect a checkpoint: family, config, prediction type, parts, and what does not fit.

    Args:
        config: YAML to compare with; None = that of the family.
        probe: whether to run the UNet once (which reads its weights) if the prediction type is in
            doubt.
    """
    path = find_checkpoint(path)
    if not path.is_file():
        raise MissingFile(f"no checkpoint `{path}`")
    size = path.stat().st_size
    needs_hash = size < SMALL or any(file.may_have(size) for file in published_files().values())
    digest = hash_file(path) if needs_hash else find_cached_sha256(path)
    report = Report(str(path), size, digest or "")
    if file := identify_hash(report.sha256):
        report = replace(report, published=f"{file.name}, {file.title}")
    try:
        kind = detect_format(path)
        report = replace(report, kind=kind)
        if kind != "safetensors":
            names, foreign = pickle_imports(path, kind), foreign_imports(path, kind)
            report = replace(report, pickle_names=names, foreign_names=foreign)
        weights = identify_weights(read_checkpoint(path))
    except ValueError as error:
        return replace(report, refused=str(error))
    if probe:
        weights.prediction = probe_weights(weights)
    if (family := weights.family) is not None:
        report = replace(report, family=family.name, title=family.title, task=family.task or None)
    report = replace(
        report,
        prediction=weights.prediction,
        parts=list(_list_parts(weights.state)),
        has_ema=weights.source.has_ema,
        step=weights.source.step,
        extras=list(weights.source.extras),
        variant=_describe_variant(weights),
        note=TRANSPOSED if has_transposed_projection(weights.state) else "",
        metadata=weights.source.metadata,
    )
    return _compare(report, weights, config)


def _shorten(text: str) -> str:
    """Return a text in one line, shortened: thumbnails have thousands of characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _format_size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"


def _list_parts(state: Mapping[str, Tensor]) -> Iterator[Part]:
    groups: dict[str, list[Tensor]] = {}
    engine = has_engine_names(state)
    for name, value in state.items():
        depth = 2 if name.startswith("conditioner.") else 1
        network = ADAPTER.match(name)
        part = network[0] if network else ".".join(name.split(".")[:depth]) + "."
        groups.setdefault(part, []).append(value)
    for part, values in groups.items():
        dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in values)
        name, prefix = part[:-1], original_name(part, engine=engine)
        yield Part(name, prefix, len(values), sum(value.numel() for value in values), dict(dtypes))


def _describe_variant(weights: Weights) -> str | None:
    family, found = weights.family, find_variant(weights)
    if found is None or family is None:
        return None
    return f"{found.variant}, by {found.told_by}"


def _compare(report: Report, weights: Weights, config: str | Path | None) -> Report:
    """Add the config to a report, how weights fit it, and the family by its encoders."""
    try:
        source = choose_config(weights) if config is None else str(config)
    except MissingArgument as error:
        kind = str(error).splitlines()[0]
        return replace(report, note=f"no config to compare with: {kind}")
    report = replace(report, config=source)
    try:
        where = Path(source).name
        _, raw = read_config(weights, config)
        model = build_on_meta(translate_config(raw, where=where), where=where)
    except ValueError as error:
        return replace(report, note=str(error))
    if report.family is None and isinstance(model, LatentDiffusion):
        family = FAMILIES.get(family_of(model.conditioner) or "")
        if family is not None:
            report = replace(report, title=family.title, task=family.function)
    names, state = model.state_dict(), translate_names(model, weights.state, weights.path)
    if weights.family is not None and weights.family.name == "x2":
        lost = [part for part in UPSCALER_PARTS if not any(n.startswith(part) for n in state)]
        titles = " and ".join(UPSCALER_PARTS[part] for part in lost)
        note = f"needs {titles} from another file, such as Stable Diffusion 1" if lost else ""
        report = replace(report, note=note)
        names = {n: v for n, v in names.items() if not n.startswith(tuple(lost))}
    engine = has_engine_names(names)
    return replace(
        report,
        missing=[original_name(name, engine=engine) for name in names if name not in state],
        unexpected=[original_name(name, engine=engine) for name in state if name not in names],
    )
