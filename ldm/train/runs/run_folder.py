"""Folders of runs, with the original's layout.

logs/2026-11-21T15-00-00_NAME/
    configs/2026-11-21T15-00-00-project.yaml   model and data
    configs/2026-11-21T15-00-00-lightning.yaml everything else
    checkpoints/ images/ log.csv tensorboard/
logs/NAME -> the newest of them
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from glob import escape
from pathlib import Path

from ldm.runtime.errors import make_unknown_name_error
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.request import TrainRequest

__all__ = [
    "ExistingRun", "find_run", "link_newest_run", "list_states", "prepare_folder", "read_config",
    "save_config",
]  # fmt: skip

log = logging.getLogger(__name__)

TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"
TIMESTAMP_PATTERN = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")
STATE_PATTERN = "checkpoints/state-*"
CONFIG_SECTIONS = ("model", "data", "lightning")
LAUNCH_FILE = ".launch.json"  # which torchruns started the run, and the state that they resumed


@dataclass(frozen=True)
class ExistingRun:
    """The folder of an existing run, and the state to resume from; None if it has none yet."""

    folder: Path
    state_path: Path | None


def find_run(request: TrainRequest, torchrun_ids: Sequence[str] = ()) -> ExistingRun | None:
    """Find the run to continue; None for a new one.

    Args:
        torchrun_ids: Ids of the torchruns that started these processes. A run that one of them
            started earlier is resumed, as after a failure, regardless of the request.
    Raises:
        ValueError: The requested run does not exist, or has no state to resume from.
    """
    logdir = request.logdir
    path = Path(request.resume).expanduser() if request.resume else None
    if torchrun_ids and request.train:
        candidates = [_find_run_folder(path), _find_run_folder(logdir / path)] if path else []
        for folder in (*candidates, *(file.parent for file in logdir.glob(f"*/{LAUNCH_FILE}"))):
            launch = _read_launch(folder)
            if not {*torchrun_ids}.isdisjoint(launch.get("starters", ())):
                return ExistingRun(folder.resolve(), _find_state_since(folder, launch))
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            message = (
                "found no run of this torchrun to resume; scripts that it starts must `exec` python"
            )
            log.warning(message)
    if path:
        return _find_run_by_path(path, logdir)
    if request.resume is None:
        return None
    if not request.name:
        raise ValueError("--resume without RUN needs the run's name: -n NAME or -b CONFIG")
    for folder in _list_runs(logdir, request.name):
        if states := list_states(folder / "checkpoints"):
            return ExistingRun(folder, states[-1])
    raise ValueError(f"no run `{request.name}` in `{logdir}` has a state to resume from")


def list_states(checkpoints: Path) -> list[Path]:
    """List the complete states in a folder, oldest first; incomplete ones have other names."""
    return sorted(path.parent for path in checkpoints.glob("state-*/run.json"))


def read_config(request: TrainRequest, existing_run: ExistingRun | None) -> JsonObject:
    """Read the config of the existing run, updated by files, then by overrides."""
    from ldm.loading.config import format_yaml, parse_yaml
    from ldm.train.config.renamed_keys import rename_keys

    saved_files = _find_configs(existing_run.folder) if existing_run else []
    files: list[str | Path] = [*saved_files, *request.configs]
    if not files:
        folder = existing_run.folder if existing_run else request.logdir
        raise ValueError(f"`{folder}` has no configs/*-project.yaml, give the config with --base")
    texts = [_read_config_text(file) for file in files]
    for path in (Path(file).expanduser() for file in files):
        if path.is_dir():  # its weights are the initial ones, regardless of the other files
            overlay = {"model": {"params": {"ckpt_path": str(path.resolve())}}}
            texts.append(format_yaml(overlay))
    where, sections = " + ".join(map(str, files)), CONFIG_SECTIONS[1:]
    config = parse_yaml(
        texts, request.overrides, where=where, sections=sections, rename=rename_keys
    )
    # Other sections may hold values for `${…}` references; an existing run has no references.
    text = "\n".join([*texts, *request.overrides])
    for key in config:
        is_used = key in CONFIG_SECTIONS or re.search(rf"\$\{{{re.escape(key)}[.}}]", text)
        if not (existing_run or is_used):
            raise make_unknown_name_error("section", key, CONFIG_SECTIONS, where)
    return {key: config[key] for key in CONFIG_SECTIONS if key in config}


def prepare_folder(
    request: TrainRequest, existing_run: ExistingRun | None, torchrun_ids: Sequence[str] = ()
) -> Path:
    """Return the folder of the existing or new run; save the ids of its torchruns there."""
    folder = existing_run.folder if existing_run else _make_new_folder(request)
    if torchrun_ids and request.train:
        state = existing_run.state_path if existing_run else None
        states = [path.name for path in list_states(folder / "checkpoints")]
        launch = {"starters": [*torchrun_ids], "from": state and state.name, "states": states}
        (folder / LAUNCH_FILE).write_text(json.dumps(launch), "utf-8")
    return folder


def _read_config_text(path: str | Path) -> str:
    """Return the YAML of a file, or that of a diffusers folder."""
    from ldm.loading.config import read_config_text
    from ldm.loading.files.checkpoint import CONFIG_KEY
    from ldm.loading.weights import open_checkpoint

    if Path(path).suffix in (".ckpt", ".safetensors"):
        raise ValueError(
            f"`{path}` is a checkpoint: give its config, and model.params.ckpt_path={path}"
        )
    is_folder = Path(path).expanduser().is_dir()
    return open_checkpoint(path).metadata[CONFIG_KEY] if is_folder else read_config_text(path)


def save_config(folder: Path, config: JsonMapping) -> None:
    """Write the config into a run folder, unless the newest one there is the same."""
    from ldm.loading.config import format_yaml

    project = {key: value for key, value in config.items() if key != "lightning"}
    configs = {"project": project, "lightning": {"lightning": config.get("lightning", {})}}
    texts = {name: format_yaml(content) for name, content in configs.items()}
    if [path.read_text("utf-8") for path in _find_configs(folder)] == list(texts.values()):
        return
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    now = datetime.now().strftime(TIME_FORMAT)
    for name, text in texts.items():
        (folder / "configs" / f"{now}-{name}.yaml").write_text(text, "utf-8")


def link_newest_run(request: TrainRequest, folder: Path) -> None:
    """Link LOGDIR/NAME to the folder of a run, if it is the newest of that name."""
    newest = _list_runs(request.logdir, request.name)[:1]
    if [folder.resolve()] == [path.resolve() for path in newest]:
        _replace_link(request.logdir / request.name, folder)


def _make_new_folder(request: TrainRequest) -> Path:
    """Return a new folder with the time in its name, created if the request is to train."""
    now = datetime.now()
    while True:
        folder = request.logdir / f"{now.strftime(TIME_FORMAT)}_{request.name}"
        if not request.train:
            return folder
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            now += timedelta(seconds=1)


def _find_run_by_path(path: Path, logdir: Path) -> ExistingRun:
    """Find a run by its folder, its name, or a path in its checkpoints/."""
    # The link logs/NAME may be missing where links are not allowed: look for runs of that name.
    candidates = (path, logdir / path, *_list_runs(logdir, path.name))
    path = next((candidate for candidate in candidates if candidate.exists()), path)
    if not path.exists():
        raise ValueError(f"there is no run or state `{path}`")
    checkpoints, folder = _find_checkpoints(path), _find_run_folder(path)
    if checkpoints and path != checkpoints and not path.name.startswith("last"):
        if not (path / "run.json").is_file():
            raise ValueError(
                f"`{path}` is not a resume state ({STATE_PATTERN})\nhint: to start a new run with "
                f"its weights, set model.params.ckpt_path={path}"
            )
        return ExistingRun(folder, path.resolve())
    states = list_states(folder / "checkpoints")
    if not states:
        raise ValueError(f"`{folder}` has no {STATE_PATTERN} to resume from")
    return ExistingRun(folder, states[-1])


def _find_checkpoints(path: Path) -> Path | None:
    """Return the folder `checkpoints` that a path is or is in; None if there is none."""
    return next((p for p in (path, *path.absolute().parents) if p.name == "checkpoints"), None)


def _find_run_folder(path: Path) -> Path:
    """Return the folder of the run that a path belongs to; it need not exist."""
    checkpoints = _find_checkpoints(path)
    return (checkpoints.parent if checkpoints else path).resolve()


def _read_launch(folder: Path) -> JsonObject:
    """Read the launch that `prepare_folder` saved; {} if there is none."""
    try:
        launch: JsonObject = json.loads((folder / LAUNCH_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return launch


def _find_state_since(folder: Path, launch: JsonMapping) -> Path | None:
    """Return the newest state since a launch, else the one that it resumed, else the newest."""
    states = {path.name: path for path in list_states(folder / "checkpoints")}
    newer_states = [path for name, path in states.items() if name not in launch["states"]]
    if newer_states:
        return newer_states[-1]
    return states.get(launch["from"], next(reversed(states.values()), None))


def _list_runs(logdir: Path, name: str) -> list[Path]:
    """List the folders of the runs of a name, newest first."""
    folders = [p for p in logdir.glob(f"*_{escape(name)}") if p.is_dir() and not p.is_symlink()]
    return sorted(
        (p for p in folders if TIMESTAMP_PATTERN.sub("", p.name, count=1) == name), reverse=True
    )


def _find_configs(folder: Path) -> list[Path]:
    """Return the newest project and lightning files of a run."""
    names = ("project", "lightning")
    files = [sorted((folder / "configs").glob(f"*-{name}.yaml")) for name in names]
    return [paths[-1] for paths in files if paths]


def _replace_link(link: Path, folder: Path) -> None:
    """Create or replace a relative link, but not a file or folder of that name."""
    if link.exists() and not link.is_symlink():
        log.warning("`%s` is not a link, so it does not point to the new run `%s`", link, folder)
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        if os.name == "nt":  # where a link to a folder cannot be replaced by renaming
            link.unlink(missing_ok=True)
        temporary.replace(link)
    except (OSError, NotImplementedError):  # links are not allowed
        temporary.unlink(missing_ok=True)
        log.info("the folder of the run is `%s`", folder)
