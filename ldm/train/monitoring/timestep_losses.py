"""The mean loss by timestep, as a table and a plot.

timesteps.csv                  step, from, to (inclusive), loss, samples (halved by each `write`)
images/loss-per-timestep.png   a curve for each of the last training steps, older ones paler
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from ldm.train.distributed.parallel import Ranks
from ldm.train.monitoring.logs import CsvLogger, read_table

__all__ = ["TimestepLosses"]

log = logging.getLogger(__name__)

MAX_CURVES = 8  # in the plot


class TimestepLosses:
    """Exponentially decayed means of the loss in bins of timesteps; `write` halves their weights.

    Args:
        num_timesteps: Timesteps of the noise schedule, which are divided into `num_bins`.
        start_step: Step that the run resumes from.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        num_timesteps: int,
        *,
        num_bins: int = 50,
        start_step: int = 0,
    ) -> None:
        self.plot_path = folder / "images" / "loss-per-timestep.png"
        self.ranks = ranks
        self.num_timesteps = num_timesteps
        self.num_bins = num_bins
        self.sums = torch.zeros(num_bins)
        self.weights = torch.zeros(num_bins)  # numbers of samples, halved by each `write`
        self.csv_logger: CsvLogger | None = None
        self.curves: dict[int, Tensor] = {}
        if ranks.is_main_process:
            self.csv_logger = CsvLogger(folder / "timesteps.csv", start_step=start_step)
            self._read_curves(self.csv_logger.path)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Add losses (B,) of samples at timesteps t (B,); non-finite ones are skipped."""
        bin_indices = (t.cpu() * self.num_bins // self.num_timesteps).clamp(0, self.num_bins - 1)
        values = losses.detach().float().cpu()
        finite = values.isfinite()
        self.sums.index_add_(0, bin_indices[finite], values[finite])
        self.weights.index_add_(0, bin_indices[finite], torch.ones(int(finite.sum())))

    def write(self, step: int) -> Path | None:
        """Write and plot the means over all processes, then halve the weight of the losses.

        Returns:
            The path of the plot; None on processes other than the first, without matplotlib, or
            without any losses.
        """
        totals = self.ranks.all_reduce_sum(torch.cat([self.sums, self.weights]).tolist())
        sums, weights = torch.tensor(totals).chunk(2)
        self.sums /= 2
        self.weights /= 2
        if self.csv_logger is None or not weights.any():
            return None
        self.curves[step] = torch.where(weights > 0, sums / weights.clamp(min=1e-9), torch.nan)
        for index, (loss, weight) in enumerate(zip(self.curves[step], weights, strict=True)):
            if weight > 0:
                first, last = self._get_bin_range(index)
                row = {"from": first, "to": last, "loss": float(loss), "samples": float(weight)}
                self.csv_logger.log_scalars(step, row)
        return self._plot()

    def _get_bin_range(self, bin_index: int) -> tuple[int, int]:
        """Return the first and last timestep of a bin."""
        first, end = (
            -(-edge * self.num_timesteps // self.num_bins) for edge in (bin_index, bin_index + 1)
        )
        return first, end - 1

    def _read_curves(self, path: Path) -> None:
        """Read the curves that the run wrote before it was resumed."""
        for row in read_table(path)[1]:
            if not row["samples"]:  # truncated by a crash
                continue
            bin_index = int(row["from"]) * self.num_bins // self.num_timesteps
            if bin_index < self.num_bins:
                empty = torch.full((self.num_bins,), torch.nan)
                self.curves.setdefault(int(row["step"]), empty)[bin_index] = float(row["loss"])

    def _plot(self) -> Path | None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.info("no plot of the loss by timestep, matplotlib is not installed")
            return None
        figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        steps = sorted(self.curves)[-MAX_CURVES:]
        bin_centers = torch.tensor([sum(self._get_bin_range(i)) / 2 for i in range(self.num_bins)])
        for index, step in enumerate(steps):
            recency = (index + 1) / len(steps)  # 1: the last step
            is_last = step == steps[-1]
            finite = self.curves[step].isfinite()
            axes.plot(
                bin_centers[finite],
                self.curves[step][finite],
                marker=".",
                color=(0.1, 0.3, 0.7, 0.15 + 0.85 * recency**2),
                linewidth=2 if is_last else 1,
                label=f"step {step}" if is_last or index == 0 else None,
            )
        axes.set(xlabel="timestep (0 = least noise)", ylabel="loss", xlim=(0, self.num_timesteps))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        self.plot_path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.plot_path)
        return self.plot_path
