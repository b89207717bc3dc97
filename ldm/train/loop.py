"""The training loop: a YAML in the original's format, a folder for the run, and one loop to read.

    model:      as for sampling; its weights start at random, or from `ckpt_path`
                base_learning_rate
    data:       params: batch_size, num_workers, train: {root, split, transform}, latents
                prior: {root, prompt, count, transform}                         DreamBooth
    lightning:  trainer: max_steps, max_time, gradient_clip_val, precision, …   optimizer: …
                objective: …   callbacks: …                                     see DEFAULTS
                lora: …   textual_inversion: …                                  see adaptation.py

    batch -> task.loss -> gradients -> clip -> optimizer -> average; now and then save and draw

A run is a folder: checkpoints/last.pt (to go on), checkpoints/last.safetensors (averaged weights
in the original's names), images/, log.csv, config.yaml.
"""

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.data import folder as folders, transforms
from ldm.data.folder import Folder, Order, WithPrior, batches
from ldm.loading import checkpoint, config, legacy
from ldm.model import LatentDiffusion
from ldm.nets import attention
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train import callbacks, objective, optim
from ldm.train.adaptation import Adaptation
from ldm.train.autoencoder import Reconstruction
from ldm.train.ema import EMA
from ldm.train.latents import cached_latents
from ldm.train.objective import Diffusion
from ldm.train.prior import make_pictures
from ldm.train.state import State

__all__ = ["DEFAULTS", "Run", "seconds"]

log = logging.getLogger(__name__)

# What `lightning:` may say, and what holds where it is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "trainer": {
        "max_steps": None,  # the run ends after so many steps …
        "max_time": None,  # … or so much time, DD:HH:MM:SS, over all sessions: whatever is first
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": 1,
        "precision": "32",  # or bf16-mixed
        "attention": None,  # a backend of nets.attention
        "seed": 23,
    },
    # name: adamw | muon; other keys go to the optimizer
    "optimizer": {"name": "adamw", "warm_up": 100, "decay": "cosine", "ema_decay": 0.9999},
    "objective": {},  # keywords of Diffusion or Reconstruction
    "callbacks": {"save_minutes": 3, "image_minutes": 10, "images": 16, "log_every": 20},
    "lora": {},  # keywords of what is trained beside a frozen model; empty: nothing is
    "textual_inversion": {},
}
TRANSFORMS = {"emoji": transforms.Emoji, "photo": transforms.Photo}


class Run:
    """One training run, from a config to weights.

    raw: the config as `config.read` gives it. text: the same as text, kept beside the weights.
    folder: where the run lives.
    """

    def __init__(self, raw: dict[str, Any], folder: Path, *, text: str = "") -> None:
        self.settings = _settings(raw)
        self.folder, self.text = folder, text
        trainer, optimizer = self.settings["trainer"], dict(self.settings["optimizer"])
        torch.manual_seed(trainer["seed"])
        attention.set_backend(trainer["attention"])
        self.model = config.instantiate(raw["model"], where="model")
        _start_from_checkpoints(self.model, raw["model"].get("params") or {})
        data = raw["data"]["params"]
        self.batch_size, self.workers = data["batch_size"], data.get("num_workers", 0)
        self.pictures = _folder(data["train"], seed=trainer["seed"])
        self.dataset = _dataset(self.model, self.pictures, data)
        self.task = _task(self.model, self.settings)
        self.lr, self.warm_up = raw["model"]["base_learning_rate"], optimizer.pop("warm_up")
        self.decay, ema_decay = optimizer.pop("decay"), optimizer.pop("ema_decay")
        self.optimizer = optim.make(self.task.trained, self.lr, **optimizer)
        ema = EMA(self.task.trained, ema_decay)
        self.state = State(self.task.trained, self.optimizer, ema, seed=trainer["seed"])
        self.stopped = False

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def progress(self) -> float:
        """How much of the run is done, 0 … 1, by steps or by time, whichever is further."""
        trainer, state = self.settings["trainer"], self.state
        by_steps = state.step / trainer["max_steps"] if trainer["max_steps"] else 0.0
        by_time = state.seconds / seconds(trainer["max_time"]) if trainer["max_time"] else 0.0
        return max(by_steps, by_time)

    def train(self) -> None:
        """Trains until the end or a signal (SIGTERM, SIGINT); saves either way."""
        options, trainer = self.settings["callbacks"], self.settings["trainer"]
        state, task = self.state, self.task
        self.folder.mkdir(parents=True, exist_ok=True)
        save = callbacks.Every(seconds=60 * options["save_minutes"])
        draw = callbacks.Every(seconds=60 * options["image_minutes"])
        report = callbacks.Progress(
            self.folder, start=state.step, steps=trainer["max_steps"], every=options["log_every"]
        )
        order = Order(len(self.dataset), seed=trainer["seed"])
        source = batches(
            self.dataset, order, self.batch_size, start=state.position, workers=self.workers
        )
        clock = callbacks.Clock()
        task.trained.train()
        with _signals(self):
            while self.progress() < 1 and not self.stopped:
                lr = optim.learning_rate(
                    self.lr, state.step, self.progress(), warm_up=self.warm_up, decay=self.decay
                )
                losses = self.step(source, lr)
                state.seconds += clock()
                report(state.step, losses, lr, self.batch_size * trainer["accumulate_grad_batches"])
                if save(state.step):
                    state.save(self.last)
                if draw(state.step):
                    self.draw()
                clock.restart()
        report.close()
        state.save(self.last)
        self.export()
        self.draw()

    def step(self, source: Iterator[dict[str, Any]], lr: float) -> dict[str, torch.Tensor]:
        """One update of the weights and of their average; returns the losses of the last batch."""
        state, trainer = self.state, self.settings["trainer"]
        parts = trainer["accumulate_grad_batches"]
        state.optimizer.zero_grad(set_to_none=True)
        for _ in range(parts):
            with self.precision():
                losses = self.task.loss(next(source), state.generator)
            if not torch.isfinite(losses["loss"]):
                raise FloatingPointError(
                    f"the loss is {float(losses['loss'])} at step {state.step}"
                )
            (losses["loss"] / parts).backward()
            state.position += self.batch_size
        parameters = [p for p in state.trained.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, trainer["gradient_clip_val"])
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.ema.update(state.trained)
        state.step += 1
        return losses

    def precision(self) -> Any:
        if self.settings["trainer"]["precision"] == "bf16-mixed":
            device = next(self.task.trained.parameters()).device.type
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    def draw(self) -> None:
        """A grid of samples made by the averaged weights."""
        n = self.settings["callbacks"]["images"]
        path = self.folder / "images" / f"gs-{self.state.step:06}.png"
        with self.state.ema.applied(self.task.trained):
            callbacks.draw(self.model, self.pictures, path, n)

    def export(self) -> None:
        """checkpoints/last.safetensors: the averaged weights in the original's names (or LoRA)."""
        path = self.last.with_suffix(".safetensors")
        task, step = self.task, self.state.step
        with self.state.ema.applied(task.trained):
            if isinstance(task, Adaptation):
                task.export(path, step=step)
            else:
                callbacks.export(task, path, self.pictures, config=self.text, step=step)


def seconds(text: str | int | float) -> float:
    """ "DD:HH:MM:SS", or a part of it from the right, or a number of seconds -> seconds."""
    if not isinstance(text, str):
        return float(text)
    total = 0.0
    for part, unit in zip(reversed(text.split(":")), (1, 60, 3600, 86400), strict=False):
        total += float(part) * unit
    return total


def _settings(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    given = raw.get("lightning") or {}
    for section in given:
        if section not in DEFAULTS:
            raise legacy.unknown("section", section, DEFAULTS, "lightning")
    for section in ("trainer", "callbacks"):
        for key in given.get(section) or {}:
            if key not in DEFAULTS[section]:
                raise legacy.unknown("key", key, DEFAULTS[section], f"lightning.{section}")
    merged = {name: {**values, **(given.get(name) or {})} for name, values in DEFAULTS.items()}
    if not merged["trainer"]["max_steps"] and not merged["trainer"]["max_time"]:
        raise ValueError("lightning.trainer needs `max_steps` or `max_time`")
    return merged


def _task(
    model: nn.Module, settings: dict[str, dict[str, Any]]
) -> Diffusion | Adaptation | Reconstruction:
    options, little = settings["objective"], (settings["lora"], settings["textual_inversion"])
    if isinstance(model, LatentDiffusion):
        task = Diffusion(model, **options)
        return Adaptation(task, *little) if any(little) else task
    if isinstance(model, AutoencoderKL):
        return Reconstruction(model, **options)
    raise ValueError(f"`{type(model).__name__}` cannot be trained, only whole models can")


def _folder(spec: dict[str, Any], *, seed: int) -> Folder:
    spec = dict(spec)
    options = dict(spec.pop("transform"))
    name = options.pop("name")
    if name not in TRANSFORMS:
        raise legacy.unknown("transform", name, TRANSFORMS, "data.params.train")
    return Folder(**spec, transform=TRANSFORMS[name](**options), seed=seed)


def _dataset(model: nn.Module, pictures: Folder, data: dict[str, Any]) -> Any:
    if not isinstance(model, LatentDiffusion):
        return pictures
    text = getattr(model.conditioner, "text", None)
    ids = getattr(text, "token_ids", None)
    if ids is not None and ids.equal(torch.arange(len(ids))):  # else it has learned words already
        rows = folders.read_metadata(pictures.root)
        texts = transforms.all_words(rows)
        text.token_ids.copy_(objective.vocabulary(texts, text))  # type: ignore[union-attr]
    dataset: Any = pictures
    if data.get("latents"):
        options = dict(data["latents"])
        dataset = cached_latents(model, pictures, Path(options.pop("cache")), **options)
    if data.get("prior"):
        return WithPrior(dataset, _prior(model, dict(data["prior"]), seed=pictures.seed))
    return dataset


def _prior(model: LatentDiffusion, spec: dict[str, Any], *, seed: int) -> Folder:
    """The pictures of a class; those that lack are made by the model as it is now."""
    for key in ("root", "prompt", "count", "transform"):
        if key not in spec:
            raise ValueError(f"data.params.prior needs `{key}`")
    prompt = spec.pop("prompt")
    make_pictures(model, Path(spec["root"]), prompt, spec.pop("count"))
    return _folder({**spec, "fields": {"text": prompt}}, seed=seed)


def _start_from_checkpoints(model: nn.Module, params: dict[str, Any]) -> None:
    """Loads `ckpt_path` of the model and of its first stage, where the config names one.

    The original's switches hold: `load_only_unet`; `ignore_keys`, starts of names that are not
    taken from the file; `finetune_keys`, weights that may have fewer input channels there (if not
    said, the UNet's first): the new ones start at zero.
    """
    first = (params.get("first_stage_config") or {}).get("params") or {}
    if first.get("ckpt_path"):
        _put(model.get_submodule("autoencoder"), first, "autoencoder.")
    if params.get("ckpt_path"):
        is_whole = isinstance(model, LatentDiffusion)
        part = "unet." if params.get("load_only_unet") else "" if is_whole else "autoencoder."
        widened = params.get("finetune_keys", [legacy.FIRST_WEIGHT]) or ()
        _put(model.get_submodule("unet" if part == "unet." else ""), params, part, widened)
    elif params.get("finetune_keys"):
        raise ValueError("`finetune_keys` needs a `ckpt_path` to start from")


def _put(
    module: nn.Module, params: dict[str, Any], prefix: str, widened: Sequence[str] = ()
) -> None:
    """Loads the file `ckpt_path`, or the part `prefix` of it if it holds a whole model."""
    state = legacy.rename(checkpoint.read(config.find(params["ckpt_path"])).state)
    if any(name.startswith(prefix) for name in state):
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    wanted, ignored = module.state_dict(), tuple(params.get("ignore_keys") or ())
    state = {n: v for n, v in state.items() if not n.startswith(ignored)}
    for name in legacy.rename(dict.fromkeys(widened, torch.empty(0))):
        name = name.removeprefix(prefix)
        if name in state and name in wanted and state[name].shape != wanted[name].shape:
            wide = torch.zeros_like(wanted[name])
            wide[:, : state[name].shape[1]] = state[name]
            state[name] = wide
    kept = {n: v for n, v in wanted.items() if n.startswith(ignored)}
    module.load_state_dict(kept | state)


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """SIGTERM and SIGINT end the run after the step that is under way."""

    def stop(*_: Any) -> None:
        run.stopped = True

    kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
