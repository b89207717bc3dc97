"""The training loop: a YAML in the original's format, a folder for the run, and one loop to read.

    batch -> loss -> gradients -> clip -> optimizer -> average; now and then save, draw, validate

A step is `parts` batches, over all processes and all accumulated ones. Batches are numbered through
the whole run, and all chance in one comes from its number, so that a run that was interrupted goes
on exactly, on as many processes as there are then.

`ldm.train.runs` says what a run's folder holds, `ldm.train.settings` what a config may contain.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.data.broken import BrokenFiles
from ldm.loading.config import instantiate
from ldm.model import LatentDiffusion
from ldm.nets import attention
from ldm.runtime.device import pick_device
from ldm.train import build, memory
from ldm.train.batches.sources import open_sources
from ldm.train.config.settings import Settings
from ldm.train.distributed import parallel
from ldm.train.distributed.signals import Wishes
from ldm.train.monitoring import cadence, logs, samples, sanity, validation
from ldm.train.monitoring.timesteps import TimestepLog
from ldm.train.optim.schedules import Rate
from ldm.train.runs import exports, initial
from ldm.train.runs.states import States
from ldm.train.state import Player

__all__ = ["Run"]

log = logging.getLogger(__name__)

Work = Sequence[tuple[int, dict[str, Any]]]  # batches and their numbers


class Run:
    """One training run, from a config to weights.

    settings: read from a config. text: the same config as text, kept beside the weights.
    folder: where the run lives. device: by default the best there is.
    commands: whether shards may come from commands that the config names.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        text: str = "",
        device: torch.device | None = None,
        commands: bool = False,
    ) -> None:
        self.settings, raw = settings, settings.raw
        self.raw, self.folder, self.text = raw, folder, text
        trainer, data = settings.trainer, raw["data"]["params"]
        self.seed = trainer.seed
        self.device = device or pick_device(None)
        self.ranks = parallel.start(self.device, silence=trainer.timeout)
        torch.manual_seed(self.seed)
        torch.backends.cudnn.benchmark = trainer.benchmark
        attention.set_backend(trainer.attention)
        self.model = instantiate(raw["model"], where="model").to(self.device)
        self.is_fine_tune = initial.from_checkpoints(self.model, raw["model"].get("params") or {})
        memory.apply(
            self.model,
            checkpoint=trainer.checkpoint_gradients,
            channels_last=trainer.channels_last,
            compiled=trainer.compile,
        )
        self.batch_size, self.workers = settings.data.batch_size, settings.data.num_workers
        with self.ranks.first_before_others():
            self.source, self.held_out = open_sources(
                self.model, raw["data"], seed=self.seed, commands=commands
            )
        params = raw["model"].get("params") or {}
        if params.get("scale_by_std") and not self.is_fine_tune:
            initial.measure_scale(self.model, self.source, data, self._chance(0))
        self.task: Any = build.task(self.model, params, self.settings)
        self.state = build.state(self.task, self.settings, self.ranks, self.device)
        self.states = States(folder / "checkpoints", self.ranks, keep=trainer.keep)
        self.loggers = logs.Loggers(folder, ())
        self.timesteps: TimestepLog | None = None
        self.wishes, self.ends = Wishes(), False  # what signals ask for, what all agreed on
        self.bad = 0  # steps in a row without finite gradients

    @property
    def last(self) -> Path:
        """The weights as they were written last."""
        return self.folder / "checkpoints" / "last.safetensors"

    def progress(self) -> float:
        """How much of the run is done, 0 … 1, by steps or by time, whichever is further."""
        trainer, state = self.settings.trainer, self.state
        by_steps = state.step / trainer.max_steps if trainer.max_steps else 0.0
        by_time = state.seconds / trainer.max_time if trainer.max_time else 0.0
        return max(by_steps, by_time)

    def resume(self, path: Path | None = None) -> None:
        """Goes on from a state, by default the newest of this run; keeps the size of a step.

        Raises ValueError if there is none, or these processes cannot share such a step.
        """
        path = path or self.states.newest()
        if path is None:
            raise ValueError(f"`{self.states.folder}` has no state to resume from")
        self.states.load(self.state, path)
        world, parts = self.ranks.world, self.state.parts
        if parts % world:
            raise ValueError(
                f"a step of `{path}` is {parts} batches, {world} processes cannot share them"
            )
        if parts // world != self.settings.trainer.accumulate_grad_batches:
            log.info("%d batches per step, as before: %d x %d ranks", parts, parts // world, world)
            trainer = {"accumulate_grad_batches": parts // world}
            self.settings = self.settings.change(trainer=trainer)

    def train(self, begun: Callable[[], None] = lambda: None) -> None:
        """Trains until the end or a signal (SIGTERM, SIGINT), and saves; SIGUSR1 saves at once.

        begun: done by the first process when nothing speaks against the first step.
        """
        state, rate = self.state, self._begin()
        self.ranks.once(begun)
        batches = self.source.batches(
            self.batch_size,
            start=state.position,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            workers=self.workers,
        )
        share = self.settings.trainer.broken_share
        broken = BrokenFiles(self.folder / "broken.txt", share, self.source)
        every, clock = cadence.cadences(self.settings.callbacks), cadence.Clock()
        self.task.trained.train()
        with self._report() as report, self.wishes, self._saved_on_error():
            while self.progress() < 1 and not self.ends:
                work = self._next(batches, broken)
                lr = rate(state.step, self.progress())
                losses = self.step(work, lr)
                due = self._agreed(clock(), {name: on(state.step) for name, on in every.items()})
                report(state.step, losses, lr, self.batch_size * state.parts)
                for duty in due:
                    with _keep_going(duty):
                        getattr(self, duty)()
                clock.restart()
            self.finish()

    def finish(self) -> None:
        """The state, the weights and a grid, at the end."""
        self.save()
        self.export()
        self.draw()

    def step(self, work: Work, lr: float) -> dict[str, Tensor]:
        """One update of all players' weights and of the average; the losses of this process."""
        state = self.state
        self.task.step = state.step
        losses: dict[str, Tensor] = {}
        are_finite = True
        for name, player in state.players.items():
            if name == "rival" and not self.task.competes:
                continue
            losses = {**self._gradients(player, work), **losses}  # "loss" is the first player's
            norm = self._clip(player)
            are_finite &= math.isfinite(norm)
            if math.isfinite(norm):
                self._update(player, lr)
        if are_finite:
            state.ema.update(self.task.trained)
        state.step += 1
        state.position += state.parts
        state.scale.update(are_finite)
        state.is_whole = True
        if not are_finite and not state.scale.is_adapting:
            self._skipped(work, losses)
        self.bad = 0 if are_finite else self.bad
        return losses

    def save(self) -> None:
        """A state to go on from. Steps that change nothing push out none that may be needed."""
        changed = self.state.step - self.bad
        if not (self.bad and self.states.has(changed)) and self._is_finite("state"):
            self.states.save(self.state)

    def export(self) -> None:
        """checkpoints/last.safetensors (or what is asked for), in the original's names; or LoRA."""
        if self._is_finite("export"):
            exports.export(self, self.last.with_suffix(""))

    def export_step(self) -> None:
        """The same under the number of the step, to stay."""
        if self._is_finite("export"):
            exports.export_step(self)

    def draw(self) -> None:
        """Grids of samples, with and without averaging, and the loss by timestep."""
        with _keep_going("draw"):  # here, as others may wait below
            if self.ranks.is_first or parallel.is_split(self.task.trained):
                for path in samples.draw(self, write=self.ranks.is_first):
                    self.loggers.image(self.state.step, f"{path.parent.name}/samples", path)
        if self.timesteps is not None:
            plot = self.timesteps.write(self.state.step)
            if plot is not None:
                self.loggers.image(self.state.step, "loss per timestep", plot)

    def validate(self) -> None:
        """The loss on held-out data, into the logs; the weights stay if they are among the best."""
        found = validation.validate(self)
        self.loggers.scalars(self.state.step, found)
        exports.export_best(self, found)

    def precision(self) -> Any:
        """The context in which losses are computed."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(
            self.settings.trainer.precision
        )
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def _next(self, batches: Iterator[dict[str, Any]], broken: BrokenFiles) -> Work:
        """This process's batches of the step, with their numbers."""
        state, ranks = self.state, self.ranks
        numbers = range(state.position + ranks.rank, state.position + state.parts, ranks.world)
        work = [(number, next(batches)) for number in numbers]
        for _, batch in work:
            broken.add(batch.pop("broken", []), self.batch_size)
        return work

    def _gradients(self, player: Player, work: Work) -> dict[str, Tensor]:
        """Mean gradients over the step's batches, times the scale; the losses of all of them."""
        player.optimizer.zero_grad(set_to_none=True)
        found: list[dict[str, Tensor]] = []
        for place, (number, batch) in enumerate(work):
            with self._exchange(player, is_last=place == len(work) - 1):
                with self.precision():
                    losses = player.loss(batch, self._chance(number))
                (losses["loss"] * (self.state.scale.value / len(work))).backward()
            found.append({name: value.detach() for name, value in losses.items()})
        return {name: _joined([losses[name] for losses in found]) for name in found[0]}

    def _chance(self, number: int) -> torch.Generator:
        """The source of all chance in a batch; dropout draws from torch's own, seeded alike."""
        seed = (self.seed * 0x9E3779B1 + number) % 2**32
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def _clip(self, player: Player) -> float:
        """Brings gradients to their true scale, and below the limit; returns their norm before."""
        gradients = [p.grad for p in player.module.parameters() if p.grad is not None]
        total = parallel.whole({"norm": nn.utils.get_total_norm(gradients)})["norm"]
        norm = float(total) / self.state.scale.value
        limit = self.settings.trainer.gradient_clip_val
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        if math.isfinite(norm) and factor / self.state.scale.value != 1:
            torch._foreach_mul_(gradients, factor / self.state.scale.value)
        return norm

    def _update(self, player: Player, lr: float) -> None:
        self.state.is_whole = False
        for group in player.optimizer.param_groups:
            group["lr"] = lr
        player.optimizer.step()

    def _exchange(self, player: Player, *, is_last: bool) -> Any:
        """Only the last batch's backward pass sends gradients to the other processes."""
        if isinstance(player.loss, DistributedDataParallel):
            return nullcontext() if is_last else player.loss.no_sync()
        parallel.sync_gradients(player.module, is_last)
        return nullcontext()

    def _agreed(self, spent: float, due: Mapping[str, bool]) -> list[str]:
        """Adds the first process's time; what all do now if the first, or a signal, asks for it."""
        heard, is_first = self.wishes.take(), self.ranks.is_first
        mine = [name in heard or (is_first and due[name]) for name in due]
        seconds = self.state.seconds + spent if is_first else 0.0
        self.state.seconds, stop, *all_ = self.ranks.greatest([seconds, "stop" in heard, *mine])
        self.ends = bool(stop)
        return [name for name, is_due in zip(due, all_, strict=True) if is_due]

    def _is_finite(self, what: str) -> bool:
        """Whether all processes still have numbers; if not, says that `what` is not written."""
        (is_lost,) = self.ranks.greatest([not self.state.is_finite()])
        if is_lost:
            log.error("step %d: weights are not finite, no %s is written", self.state.step, what)
        return not is_lost

    def _skipped(self, work: Work, losses: Mapping[str, Tensor]) -> None:
        """Counts a step without finite gradients.

        Raises FloatingPointError after too many in a row, with the batches on disk.
        """
        self.state.skipped += 1
        self.bad += 1
        loss = float(losses["loss"].detach())
        log.warning("step %d is skipped: its loss is %g", self.state.step, loss)
        if self.bad >= self.settings.trainer.nan_limit or not self._is_finite("state"):
            path = self.folder / f"not-finite-rank{self.ranks.rank}.pt"
            torch.save([batch for _, batch in work], path)
            raise FloatingPointError(
                f"{self.bad} steps in a row had no finite gradients, the last loss is {loss:g}; "
                f"its batches are in `{path}`; `{self.states.folder}` has earlier states"
            )

    def _begin(self) -> Rate:
        """A folder, the logs, and what there is to say before the first step; the learning rate."""
        self.ranks.once(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        epoch = self.source.batches_per_epoch(self.batch_size)
        self.settings = self.settings.count_epochs(epoch and epoch / self.state.parts)
        rate, line = self.settings.learning_rate(self.ranks.world)
        if self.ranks.is_first:
            for note in (*self.settings.notes, line):
                log.info(note)
        options, start_ = self.settings.callbacks, self.state.step
        self.loggers = logs.Loggers(
            self.folder,
            options.loggers if self.ranks.is_first else (),
            start=start_,
            wandb=options.wandb,
            config=self.raw,
        )
        if isinstance(self.model, LatentDiffusion):
            timesteps = len(self.model.schedule)
            self.timesteps = TimestepLog(self.folder, self.ranks, timesteps, start=start_)
        if self.is_fine_tune and not start_:
            sanity.check(self)
        return rate

    @contextmanager
    def _report(self) -> Iterator[Callable[..., None]]:
        """What is told of every step: (step, losses, lr, images)."""
        progress = logs.Progress(
            *(self.loggers, self.ranks, self.device),
            start=self.state.step,
            steps=self.settings.trainer.max_steps,
            every=self.settings.callbacks.log_every,
        )

        def report(step: int, losses: dict[str, Tensor], lr: float, images: int) -> None:
            if self.timesteps is not None and "t" in losses:
                self.timesteps.add(losses["t"], losses["losses"])
            with _keep_going("log"):
                progress(step, losses, lr, images)

        try:
            yield report
        finally:
            progress.close()
            self.loggers.close()

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Alone, a run that fails is saved as it was after its last step; the error goes on."""
        try:
            yield
        except Exception:
            if self.ranks.world == 1 and self.state.is_whole and self.state.step:
                with contextlib.suppress(OSError):
                    self.save()
            raise


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Means of batches become their mean, numbers per sample are strung together."""
    return torch.cat(list(values)) if values[0].ndim else torch.stack(list(values)).mean()


@contextmanager
def _keep_going(what: str) -> Iterator[None]:
    """A full disk or too little memory for a grid is no reason to end the training; it is told."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError) as error:
        log.error("could not %s: %s; training goes on", what.replace("_", " "), error)
