"""What is in a checkpoint: everything that can be said without running anything in it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.loading import load
from ldm.loading.build import build_on_meta, fill_weights
from ldm.loading.config import parse_yaml, read_yaml
from ldm.loading.families import (
    PUBLISHED,
    Family,
    Prediction,
    detect_prediction,
    probe_prediction,
    recognise_family,
)
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, detect_format, read_checkpoint
from ldm.loading.files.pickles import foreign_imports, pickle_imports
from ldm.loading.legacy import original_name, rename_weights, translate_config

__all__ = ["Part", "Report", "inspect_checkpoint"]


@dataclass(frozen=True)
class Part:
    """Tensors whose names begin alike; `prefix` is the beginning in the file."""

    name: str
    prefix: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The answers about one file; `refused` says why there are no more of them.

    missing, unexpected: names that differ from what the config asks for, None if that was not
        compared (`note` says why).
    """

    path: str
    bytes: int
    kind: str | None = None
    refused: str | None = None
    family: str | None = None
    title: str | None = None
    script: str | None = None
    config: str | None = None
    prediction: Prediction | None = None
    parts: list[Part] = field(default_factory=list)
    has_ema: bool = False
    step: int | None = None
    extras: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    pickle_names: list[str] = field(default_factory=list)
    foreign_names: list[str] = field(default_factory=list)
    missing: list[str] | None = None
    unexpected: list[str] | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        if self.prediction is not None:
            plain["prediction"]["disputed"] = self.prediction.disputed
        return plain

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"file        {self.path}, {self.bytes / 1e9:.2f} GB, {self.kind or 'unknown'}"
        if self.refused:
            yield f"refused     {self.refused}"
        if self.parts:
            yield f"family      {self.title or 'none of the published ones'}"
            yield f"config      {self.config or 'unknown'}"
            yield f"script      {self.script or 'unknown'}"
        if self.prediction is not None:
            sure = ", but the methods disagree" if self.prediction.disputed else ""
            yield f"predicts    {self.prediction.kind or 'unknown'}{sure}"
            for verdict in self.prediction.verdicts:
                yield f"  {verdict.method:10}{verdict.says or 'nothing'} ({verdict.evidence})"
        for i, part in enumerate(self.parts):
            dtypes = ", ".join(part.dtypes)
            count = f"{part.tensors:>5} tensors {part.parameters:>14,} parameters"
            yield f"{'parts' if not i else '':12}{part.name:18}{part.prefix:24}{count}  {dtypes}"
        if self.parts:
            yield f"EMA         {'yes, `--ema` takes it' if self.has_ema else 'no'}"
            yield f"step        {'unknown' if self.step is None else self.step}"
            yield f"beside      {', '.join(self.extras) or 'nothing'}"
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
    """Looks at a checkpoint: family, config, prediction, parts, and what does not fit.

        config: compare with this YAML instead of the family's.
        probe: where one method alone says eps or v, ask the UNet (one pass, reads its weights).
    Raises FileNotFoundError; a file that is no checkpoint or not safe gives a report saying so.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint `{path}`")
    about: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    try:
        about["kind"] = kind = detect_format(path)
        if kind != "safetensors":
            about["pickle_names"] = pickle_imports(path, kind)
            about["foreign_names"] = foreign_imports(path, kind)
        file = read_checkpoint(path)
    except ValueError as error:
        return Report(**about, refused=str(error))
    state = rename_weights(file.state)
    family = recognise_family(state)
    found = detect_prediction(family, state, step=file.step, markers=load.markers(file))
    if probe and family is not None and not family.predicts and found.votes < 2:
        found = _probe(family, state, found)
    if config is None and EMBEDDED in file.metadata:
        config = EMBEDDED
    elif config is None and family is not None and family.config:
        config = f"{PUBLISHED}/{family.config_for(found.kind)}.yaml"
    if family is not None:
        about |= {"family": family.name, "title": family.title, "script": family.script}
    return Report(
        **about,
        **_compare(config, file, state),
        config=None if config is None else str(config),
        prediction=found,
        parts=list(_parts(state)),
        has_ema=file.has_ema,
        step=file.step,
        extras=list(file.extras),
        metadata=file.metadata,
    )


def _parts(state: Mapping[str, Tensor]) -> Iterator[Part]:
    groups: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        depth = 2 if name.startswith("conditioner.") else 1
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(value)
    for name, values in groups.items():
        dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in values)
        prefix = original_name(f"{name}.")
        yield Part(name, prefix, len(values), sum(value.numel() for value in values), dict(dtypes))


def _probe(family: Family, state: Mapping[str, Tensor], found: Prediction) -> Prediction:
    """Builds the UNet alone and asks it; a UNet that does not fit is not asked."""
    spec = translate_config(read_yaml(f"{PUBLISHED}/{family.config}.yaml"))
    unet = build_on_meta(spec["params"]["unet"])
    weights = {name: value for name, value in state.items() if name.startswith("unet.")}
    try:
        fill_weights(unet, weights)
    except ValueError:
        return found
    return probe_prediction(unet.eval(), found, family.context or 0)


def _compare(
    config: str | Path | None, file: Checkpoint, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Names that the config asks for and the file lacks, and the reverse."""
    if config is None:
        return {"note": "no config to compare with"}
    try:
        where = Path(config).name
        if config == EMBEDDED:
            raw = parse_yaml(file.metadata[EMBEDDED], where=where)
        else:
            raw = read_yaml(config)
        model = build_on_meta(translate_config(raw, where=where), where=where)
    except ValueError as error:
        return {"note": str(error)}
    wanted = model.state_dict()
    return {
        "missing": [original_name(name) for name in wanted if name not in state],
        "unexpected": [original_name(name) for name in state if name not in wanted],
    }
