"""The folders of runs, laid out as the original does.

logs/2026-11-21T15-00-00_NAME/
    configs/2026-11-21T15-00-00-project.yaml   model and data
    configs/2026-11-21T15-00-00-lightning.yaml everything else
    checkpoints/ images/ log.csv tensorboard/
logs/NAME -> the newest of them
"""

import contextlib
import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

__all__ = ["Old", "begin", "complete", "discard", "find", "link", "note", "read"]

log = logging.getLogger(__name__)

STAMP = "%Y-%m-%dT%H-%M-%S"
STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")
STATES = "checkpoints/state-*"
LAUNCH = ".launch.json"  # in a run's folder: which torchruns have started it, and from what state


@dataclass(frozen=True)
class Old:
    """A run that exists, and the state in it to go on from; None if it died before the first."""

    folder: Path
    state: Path | None


def name(args: Namespace) -> str:
    """Of the run: as given, or that of the last config file."""
    return (args.name or (Path(args.base[-1]).stem if args.base else "")) + args.postfix


def find(args: Namespace, starters: Sequence[str] = ()) -> Old | None:
    """The run to go on with, None if a new one shall begin.

    starters: the torchruns of these processes. A run that one of them has started before goes on,
        as after a failure, whatever else is asked for.
    Raises ValueError if a run is asked for and there is none.
    """
    logdir = _logdir(args)
    given = Path(args.resume).expanduser() if args.resume else None
    if starters and args.train:
        named = [_folder(given), _folder(logdir / given)] if given else []
        for folder in (*named, *(path.parent for path in logdir.glob(f"*/{LAUNCH}"))):
            if (started := _started(folder)) and not {*starters}.isdisjoint(started["starters"]):
                return Old(folder.resolve(), _state_after(folder, started))
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            log.warning("no run of this torchrun was found to go on with; wrappers must `exec`")
    if given:
        return _named(given, logdir)
    if args.resume is None:
        return None
    if not name(args):
        raise ValueError("--resume alone needs -n NAME or -b CONFIG to know which run is meant")
    for folder in _of_name(logdir, name(args)):
        if state := newest_state(folder):
            return Old(folder, state)
    raise ValueError(f"no run `{name(args)}` in `{logdir}` has a state to resume from")


def newest_state(folder: Path) -> Path | None:
    """The last state that a run has saved."""
    states = complete(folder / "checkpoints")
    return states[-1] if states else None


def complete(checkpoints: Path) -> list[Path]:
    """The states in a folder, oldest first; what is still being written has another name."""
    return sorted(path.parent for path in checkpoints.glob("state-*/run.json"))


def read(args: Namespace, old: Old | None) -> dict[str, Any]:
    """The config: of the old run if there is one, the given files over it, overrides over all."""
    from ldm.loading.config import read_yaml

    files = [*(_configs(old.folder) if old else []), *args.base]
    if not files:
        folder = old.folder if old else args.logdir
        raise ValueError(f"`{folder}` has no configs/*-project.yaml, give the config with --base")
    return read_yaml(files[0], args.overrides, *files[1:], sections=("data", "lightning"))


def begin(args: Namespace, old: Old | None, starters: Sequence[str] = ()) -> Path:
    """The folder of the run, a new one if there is none; who has started it is noted there."""
    folder = old.folder if old else _new_folder(args)
    if starters and args.train:
        state = old.state.name if old and old.state else None
        states = [path.name for path in complete(folder / "checkpoints")]
        started = {"starters": [*starters], "from": state, "states": states}
        (folder / LAUNCH).write_text(json.dumps(started), "utf-8")
    return folder


def _new_folder(args: Namespace) -> Path:
    """A folder with the time in its name, made now."""
    logdir, now = _logdir(args), datetime.now()
    while True:
        folder = logdir / f"{now.strftime(STAMP)}_{name(args)}"
        try:
            folder.mkdir(parents=True) if args.train else None
        except FileExistsError:
            now += timedelta(seconds=1)
            continue
        return folder


def link(args: Namespace, folder: Path) -> None:
    """Lets NAME lead to the folder of a run that has begun, if it is the newest of that name."""
    logdir = _logdir(args)
    if [folder.resolve()] == [path.resolve() for path in _of_name(logdir, name(args))[:1]]:
        _link(logdir / name(args), folder)


def discard(folder: Path) -> None:
    """Removes the folder of a run that never began, if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def note(args: Namespace, folder: Path, raw: Mapping[str, Any]) -> None:
    """Keeps the config in the run's folder, unless the one kept there last says the same."""
    from ldm.loading.config import format_yaml

    others = {key: value for key, value in raw.items() if key != "lightning"}
    parts = {"project": others, "lightning": {"lightning": raw.get("lightning", {})}}
    texts = {kind: format_yaml(part) for kind, part in parts.items()}
    if [path.read_text("utf-8") for path in _configs(folder)] == list(texts.values()):
        return
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    now = datetime.now().strftime(STAMP)
    for kind, text in texts.items():
        (folder / "configs" / f"{now}-{kind}.yaml").write_text(text, "utf-8")


def _logdir(args: Namespace) -> Path:
    logdir: Path = args.logdir
    return logdir / "debug_runs" if args.debug else logdir


def _named(path: Path, logdir: Path) -> Old:
    """A run by its folder, its name in the folder of runs, or something in its checkpoints/."""
    path = next((place for place in (path, logdir / path) if place.exists()), path)
    if not path.exists():
        raise ValueError(f"no run and no state `{path}`")
    inside, folder = _checkpoints(path), _folder(path)
    state = newest_state(folder)
    if inside and path != inside and not path.name.startswith("last"):
        state = path.resolve()
        if not (path / "run.json").is_file():
            raise ValueError(
                f"`{path}` is no state to resume from, those are {STATES}\nhint: to start anew "
                f"with its weights, set model.params.ckpt_path={path}"
            )
    if state is None:
        raise ValueError(f"`{folder}` has no {STATES} to resume from")
    return Old(folder, state)


def _checkpoints(path: Path) -> Path | None:
    """The folder `checkpoints` that a path is, or lies in."""
    return next((p for p in (path, *path.absolute().parents) if p.name == "checkpoints"), None)


def _folder(path: Path) -> Path:
    """Of the run that a path means, which need not exist any more."""
    inside = _checkpoints(path)
    return (inside.parent if inside else path).resolve()


def _started(folder: Path) -> dict[str, Any]:
    """What `begin` has noted last."""
    try:
        found: dict[str, Any] = json.loads((folder / LAUNCH).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _state_after(folder: Path, started: dict[str, Any]) -> Path | None:
    """The newest state since the start, else that which it went on from."""
    states = {path.name: path for path in complete(folder / "checkpoints")}
    new = [path for name, path in states.items() if name not in started["states"]]
    return new[-1] if new else states.get(started["from"], newest_state(folder))


def _of_name(logdir: Path, wanted: str) -> list[Path]:
    """Folders of runs of a name, newest first."""
    found = [p for p in logdir.glob(f"*_{wanted}") if p.is_dir() and not p.is_symlink()]
    return sorted((p for p in found if STAMPED.sub("", p.name, count=1) == wanted), reverse=True)


def _configs(folder: Path) -> list[Path]:
    """The newest project and lightning files that a run keeps."""
    kinds = ("project", "lightning")
    found = [sorted((folder / "configs").glob(f"*-{kind}.yaml"))[-1:] for kind in kinds]
    return [path for paths in found for path in paths]


def _link(link: Path, folder: Path) -> None:
    """A relative link, put in place at once; nothing else of that name is touched."""
    if link.exists() and not link.is_symlink():
        log.warning("`%s` is not a link, so it does not lead to the new run `%s`", link, folder)
        return
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        beside.symlink_to(folder.name, target_is_directory=True)
        beside.replace(link)
    except OSError:  # a file system without links
        beside.unlink(missing_ok=True)
        log.info("the run is `%s`", folder)
