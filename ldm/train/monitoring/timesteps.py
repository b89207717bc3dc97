"""The loss by timestep: where, between hardly any noise and nothing else, a model still errs.

timesteps.csv                  step, from, to, loss, samples
images/loss-per-timestep.png   the same, drawn; the earlier, the paler
"""

import csv
import logging
from pathlib import Path

import torch
from torch import Tensor

from ldm.train.distributed.parallel import Ranks

__all__ = ["TimestepLog"]

log = logging.getLogger(__name__)

COLUMNS = ("step", "from", "to", "loss", "samples")
SHOWN = 8  # curves in the plot


class TimestepLog:
    """Running means of the loss in bins of timesteps; each `write` halves the weight of the past.

    timesteps: of the schedule. start: the step that the run goes on from.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, timesteps: int = 1000, *, bins: int = 50, start: int = 0
    ) -> None:
        self.folder, self.ranks, self.timesteps, self.bins = folder, ranks, timesteps, bins
        self.sums, self.counts = torch.zeros(bins), torch.zeros(bins)
        self.curves = self._read(start)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """t: (B,) timesteps. losses: (B,), detached."""
        places = (t.cpu() * self.bins // self.timesteps).clamp(0, self.bins - 1)
        values = losses.detach().float().cpu()
        fine = values.isfinite()
        self.sums.index_add_(0, places[fine], values[fine])
        self.counts.index_add_(0, places[fine], torch.ones(int(fine.sum())))

    def write(self, step: int) -> Path | None:
        """Writes what all processes have seen; the plot, where this is the first and can draw."""
        sums, counts = (self._over_ranks(values) for values in (self.sums, self.counts))
        self.sums, self.counts = self.sums / 2, self.counts / 2
        if not self.ranks.is_first or not counts.any():
            return None
        self.curves[step] = torch.where(counts > 0, sums / counts.clamp(min=1e-9), torch.nan)
        path = self.folder / "timesteps.csv"
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            for k, (loss, count) in enumerate(zip(self.curves[step], counts, strict=True)):
                if count > 0:
                    writer.writerow([step, *self._edges(k), f"{loss:.6g}", f"{count:g}"])
        return self._plot(self.folder / "images" / "loss-per-timestep.png")

    def _edges(self, k: int) -> tuple[int, int]:
        """First and last timestep of a bin."""
        first, after = (-(-place * self.timesteps // self.bins) for place in (k, k + 1))
        return first, after - 1

    def _over_ranks(self, values: Tensor) -> Tensor:
        named = {str(k): float(value) for k, value in enumerate(values)}
        return torch.tensor(list(self.ranks.mean(named).values())) * self.ranks.world

    def _read(self, start: int) -> dict[int, Tensor]:
        """The curves of an earlier session; what came after the state will come again."""
        path, curves = self.folder / "timesteps.csv", dict[int, Tensor]()
        if not path.exists():
            return curves
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
        kept = [row for row in rows[1:] if int(row[0]) <= start]
        if self.ranks.is_first and len(kept) < len(rows) - 1:
            part = path.with_name(path.name + ".part")
            with part.open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *kept])
            part.replace(path)
        for step, first, _, loss, _ in kept:
            k = int(first) * self.bins // self.timesteps
            if k < self.bins:
                empty = torch.full((self.bins,), torch.nan)
                curves.setdefault(int(step), empty)[k] = float(loss)
        return curves

    def _plot(self, path: Path) -> Path | None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.info("no plot of the loss per timestep, matplotlib is not installed")
            return None
        figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        steps = sorted(self.curves)[-SHOWN:]
        middles = torch.tensor([sum(self._edges(k)) / 2 for k in range(self.bins)])
        for place, step in enumerate(steps):
            colour, is_last = (place + 1) / len(steps), step == steps[-1]
            seen = self.curves[step].isfinite()
            axes.plot(
                *(middles[seen], self.curves[step][seen]),
                marker=".",
                color=(0.1, 0.3, 0.7, 0.15 + 0.85 * colour**2),
                linewidth=2 if is_last else 1,
                label=f"step {step}" if is_last or place == 0 else None,
            )
        axes.set(xlabel="timestep (0: hardly any noise)", ylabel="loss", xlim=(0, self.timesteps))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path
