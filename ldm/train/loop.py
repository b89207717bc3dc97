"""The training loop.

    batches -> losses -> gradients -> clip -> optimizer -> EMA
    now and then: save, draw samples, validate, export, evaluate

A step has `batches_per_step` batches: number of processes x gradient accumulation. Batches are
numbered through the whole run, and all random numbers of a batch depend on its index only, so that
an interrupted run resumes exactly, on any number of processes. Dropout draws from torch's global
generator, which is seeded for each batch.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.data.dataset import Sample
from ldm.data.unreadable import UnreadableFiles
from ldm.model import LatentDiffusion
from ldm.runtime.errors import NonFinite
from ldm.train.distributed import parallel
from ldm.train.distributed.signals import SignalHandler
from ldm.train.monitoring import sanity
from ldm.train.monitoring.evaluation import Evaluator
from ldm.train.monitoring.logs import Loggers, ProgressBar
from ldm.train.monitoring.samples import draw_samples
from ldm.train.monitoring.timers import Interval, StepTimer
from ldm.train.monitoring.timestep_losses import TimestepLosses
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run, seed_batch
from ldm.train.runs.exports import export, export_best, export_step, find_monitor
from ldm.train.state import TrainedNetwork
from ldm.train.tasks.task import Losses

__all__ = ["save", "train", "train_step"]

log = logging.getLogger(__name__)

IndexedBatches = Sequence[tuple[int, Sample]]  # of a step, with their indices in the run
Actions = dict[str, tuple[Interval, Callable[[], object]]]  # name -> (when, action)


def train(run: Run, on_start: Callable[[], object] = lambda: None) -> None:
    """Train until the end of the run or a signal (see `signals`), then save and export.

    Args:
        on_start: Called by the first process before the first step.
    Raises:
        FloatingPointError: Too many steps in a row had non-finite gradients.
    """
    state, ranks = run.state, run.ranks
    ranks.run_on_first(lambda: run.folder.mkdir(parents=True, exist_ok=True))

    # Convert epochs to steps, and compute the learning rate.
    batches_per_epoch = run.source.batches_per_epoch(run.batch_size)
    # A resumed run keeps its batches per step, on any number of processes.
    accumulation = state.batches_per_step // ranks.world_size
    settings = run.settings.replace(trainer={"accumulate_grad_batches": accumulation})
    settings = settings.convert_epochs(
        batches_per_epoch and batches_per_epoch / state.batches_per_step
    )
    run = replace(run, settings=settings)
    learning_rate, explanation = settings.build_lr_schedule(ranks.world_size)
    for line in (*settings.notes, explanation):
        log.info("%s", line)

    # Check the initial weights of a fine-tune.
    if run.is_fine_tune and not state.step and settings.trainer.sanity:
        with run.autocast():
            sanity.check_initial_weights(
                run.model,
                run.source.fixed_samples(sanity.SAMPLES),
                batch_size=run.batch_size,
                seed=run.seed,
                timesteps=run.timesteps,
            )

    # Validate one batch: wrong data or a wrong `monitor` would end the run only later.
    callbacks = settings.callbacks
    if callbacks.validate_steps and run.validation_source is not None:
        validation_losses = validate(run, batches=1)
        if callbacks.save_top_k:
            find_monitor(callbacks.monitor, validation_losses)

    # Open the logs.
    loggers = Loggers(
        run.folder,
        callbacks.loggers if ranks.is_first else (),
        start=state.step,
        wandb=callbacks.wandb,
        config=settings.raw,
    )
    # Losses of an autoencoder have no timesteps, so that no file is written.
    num_timesteps = len(run.model.schedule) if isinstance(run.model, LatentDiffusion) else 1
    timestep_losses = TimestepLosses(run.folder, ranks, num_timesteps, start=state.step)

    # Continue the sequence of batches at the position of the state.
    ranks.run_on_first(on_start)
    batches = run.source.batches(
        run.batch_size,
        start=state.position,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=settings.data.num_workers,
    )
    unreadable = UnreadableFiles(
        run.folder / "broken.txt", settings.trainer.max_unreadable_fraction, run.source
    )

    # Train.
    actions = _list_actions(run, loggers, timestep_losses)
    run.task.trainable.train()
    timer = StepTimer()
    progress = ProgressBar(
        loggers,
        ranks,
        run.device,
        start=state.step,
        steps=settings.trainer.max_steps,
        every=callbacks.log_every,
    )
    with (
        SignalHandler() as signals,
        _saving_on_error(run),
        contextlib.closing(loggers),
        contextlib.closing(progress),
    ):
        is_stopped = False
        while run.progress() < 1 and not is_stopped:
            step_batches = _next_batches(run, batches, unreadable)
            lr = learning_rate(state.step, run.progress())
            losses = train_step(run, step_batches, lr)
            is_stopped, due = _agree_on_actions(run, timer.stop(), signals.take(), actions)
            if "t" in losses:
                timestep_losses.add(losses["t"], losses["loss_per_sample"])
            with _log_failures("log"):
                progress.update(state.step, losses, lr, run.batch_size * state.batches_per_step)
            for name in due:
                with _log_failures(name):
                    actions[name][1]()
            timer.start()
        save(run)
        export(run)
        _draw(run, loggers, timestep_losses)


def train_step(run: Run, batches: IndexedBatches, lr: float) -> Losses:
    """Update all trained networks and the EMA once, and return the losses of this process."""
    state, task = run.state, run.task
    task.step = state.step
    losses: Losses = {}
    is_finite = True
    # The discriminator comes last: it is trained on what the updated model makes.
    for network in state.networks.values():
        if network is state.discriminator and not task.trains_discriminator:
            continue
        losses = {**_compute_gradients(run, network, batches), **losses}  # "loss" is the model's
        norm = _clip_gradients(network, state.scale.value, run.settings.trainer.gradient_clip_val)
        is_finite &= math.isfinite(norm)
        if math.isfinite(norm):
            # Until all networks are updated, there is nothing to resume from after an exception.
            state.is_consistent = False
            state.is_saved = False
            for group in network.optimizer.param_groups:
                group["lr"] = lr
            network.optimizer.step()
    if is_finite:
        state.ema.update(task.trainable)
        state.bad_steps = 0
    state.step += 1
    state.position += state.batches_per_step
    state.scale.update(is_finite)
    state.is_consistent = True
    if not is_finite and not state.scale.is_adapting:
        _count_bad_step(run, batches, losses)
    return losses


def save(run: Run) -> None:
    """Save a resume state, if anything has changed since the last one."""
    if not run.state.is_saved and run.is_finite("state"):
        run.states.save(run.state)


def _draw(run: Run, loggers: Loggers, timestep_losses: TimestepLosses) -> None:
    """Draw the sample grids, and the plot of the loss by timestep."""
    with _log_failures("draw"):  # not around `timestep_losses.write`, a collective of all processes
        for path in draw_samples(run):
            loggers.log_image(run.state.step, f"{path.parent.name}/samples", path)
    plot = timestep_losses.write(run.state.step)
    if plot is not None:
        loggers.log_image(run.state.step, "loss per timestep", plot)


def _validate(run: Run, loggers: Loggers) -> None:
    losses = validate(run)
    _log_scores(run, loggers, losses)
    export_best(run, losses)


def _log_scores(run: Run, loggers: Loggers, scores: Mapping[str, float]) -> None:
    """Log validation losses or scores of samples, on the console, too."""
    if scores and run.ranks.is_first:
        text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        log.info("step %d: %s", run.state.step, text)
    loggers.log_scalars(run.state.step, scores)


def _list_actions(run: Run, loggers: Loggers, timestep_losses: TimestepLosses) -> Actions:
    """Return all actions by name, in the order in which they run when several are due."""
    options = run.settings.callbacks
    draw_interval = Interval(
        minutes=options.image_minutes, steps=options.image_steps, early=options.image_early
    )
    save_interval = Interval(minutes=options.save_minutes, steps=options.save_steps)
    actions: Actions = {
        "save": (save_interval, lambda: save(run)),
        "draw": (draw_interval, lambda: _draw(run, loggers, timestep_losses)),
        "validate": (Interval(steps=options.validate_steps), lambda: _validate(run, loggers)),
        "export step": (Interval(steps=options.export_steps), lambda: export_step(run)),
    }
    if options.evaluation is not None:
        evaluator = Evaluator(run, options.evaluation)
        actions["evaluate"] = (
            Interval(steps=options.evaluation.steps),
            lambda: _log_scores(run, loggers, evaluator()),
        )
    return actions


def _next_batches(
    run: Run, batches: Iterator[Sample], unreadable: UnreadableFiles
) -> IndexedBatches:
    """Read this process's batches of the step."""
    state, ranks = run.state, run.ranks
    end = state.position + state.batches_per_step
    indices = range(state.position + ranks.rank, end, ranks.world_size)
    indexed = [(index, next(batches)) for index in indices]
    for _, batch in indexed:
        unreadable.add(batch.pop("unreadable", []), run.batch_size)
    return indexed


def _compute_gradients(run: Run, network: TrainedNetwork, batches: IndexedBatches) -> Losses:
    """Compute the mean gradients over the step's batches, times the loss scale."""
    network.optimizer.zero_grad(set_to_none=True)
    scale = run.state.scale.value / len(batches)
    outputs: list[Losses] = []
    for k, (index, batch) in enumerate(batches):
        with _gradient_sync(network, is_last=k == len(batches) - 1):
            with run.autocast():
                losses = network.loss(batch, seed_batch(run.seed, index))
            (losses["loss"] * scale).backward()
        outputs.append({name: value.detach() for name, value in losses.items()})
    return {name: _merge_losses([losses[name] for losses in outputs]) for name in outputs[0]}


def _merge_losses(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of scalars, all values of losses per sample (B,)."""
    return torch.cat(list(values)) if values[0].ndim else torch.stack(list(values)).mean()


def _gradient_sync(network: TrainedNetwork, *, is_last: bool) -> AbstractContextManager[None]:
    """Exchange gradients between processes only in the last batch's backward pass.

    Of sharded weights, this is switched here; of the others, by the returned context.
    """
    if isinstance(network.loss, DistributedDataParallel):
        return nullcontext() if is_last else network.loss.no_sync()
    parallel.sync_gradients(network.module, is_last)
    return nullcontext()


def _clip_gradients(network: TrainedNetwork, scale: float, max_norm: float | None) -> float:
    """Divide gradients by the loss scale and clip their norm; return the norm before clipping."""
    gradients = [p.grad for p in network.module.parameters() if p.grad is not None]
    # On all processes: the norm of sharded gradients is that of all shards together.
    total = parallel.gather_shards({"norm": nn.utils.get_total_norm(gradients)})["norm"]
    norm = float(total) / scale
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0  # as clip_grad_norm_
    if math.isfinite(norm) and factor / scale != 1:
        torch._foreach_mul_(gradients, factor / scale)  # no public torch function takes a list
    return norm


def _agree_on_actions(
    run: Run, seconds: float, requests: set[str], actions: Actions
) -> tuple[bool, list[str]]:
    """Agree with the other processes on training time, on stopping, and on due actions."""
    is_first = run.ranks.is_first
    due = [
        (interval.is_due(run.state.step) and is_first) or name in requests
        for name, (interval, _) in actions.items()
    ]
    # The first process's clock counts for all: the others contribute 0 to the maximum.
    total = run.state.seconds + seconds if is_first else 0.0
    run.state.seconds, stop, *flags = run.ranks.max([total, "stop" in requests, *due])
    return bool(stop), [name for name, flag in zip(actions, flags, strict=True) if flag]


def _count_bad_step(run: Run, batches: IndexedBatches, losses: Mapping[str, Tensor]) -> None:
    """Count a step with non-finite gradients; raise if there are too many in a row."""
    state = run.state
    state.skipped += 1
    state.bad_steps += 1
    loss = float(losses["loss"].detach())
    log.warning("step %d is skipped: its loss is %g", state.step, loss)
    if state.bad_steps >= run.settings.trainer.nan_limit or not run.is_finite("state"):
        path = run.folder / f"not-finite-rank{run.ranks.rank}.pt"
        torch.save([batch for _, batch in batches], path)
        raise FloatingPointError(
            f"{state.bad_steps} steps in a row had no finite gradients, the last loss is {loss:g}; "
            f"its batches are in `{path}`; `{run.checkpoints}` has earlier states"
        )


@contextmanager
def _saving_on_error(run: Run) -> Iterator[None]:
    """Save the last consistent state if a run of one process fails."""
    try:
        yield
    except Exception:
        state = run.state
        # All processes save together: of several, the others may never come here.
        if run.ranks.world_size == 1 and state.is_consistent and state.step:
            with contextlib.suppress(OSError):
                save(run)
        raise


@contextmanager
def _log_failures(what: str) -> Iterator[None]:
    """Log a full disk, a lack of GPU memory, or samples of NaN, and continue training."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError, NonFinite) as error:
        log.error("could not %s: %s; training goes on", what, error)
