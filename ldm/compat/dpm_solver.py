"""`ldm.models.diffusion.dpm_solver.dpm_solver` of the original: the solver by itself.

Lu et al. 2022: DPM-Solver (arXiv:2206.00927) over the predicted noise, and DPM-Solver++
(arXiv:2211.01095) over the predicted x0. Both step from s to t by

    x_t = b x_s - a (phi_1 m + sign phi_2 m' + phi_3 m''),   phi_1 = exp(sign h) - 1

    phi_2 = phi_1 / h - sign,   phi_3 = phi_2 / h - 1/2

with lambda = log(alpha / sigma), half the log SNR; h = lambda_t - lambda_s; m the prediction;
m', m'' its derivatives in lambda, times h and h^2:

    m = noise    sign = 1     a = sigma_t    b = alpha_t / alpha_s
    m = x0       sign = -1    a = alpha_t    b = sigma_t / sigma_s
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.compat.sampling import Condition, join_conditions

__all__ = ["DPM_Solver", "NoiseScheduleVP", "expand_dims", "interpolate_fn", "model_wrapper"]

ModelFunction = Callable[[Tensor, Tensor], Tensor]
COSINE_S = 0.008
QUANTILE = 0.995  # of dynamic thresholding
INITIAL_STEP, SAFETY, TIME_TOLERANCE = 0.05, 0.9, 1e-5  # of adaptive steps


class NoiseScheduleVP:
    """A variance preserving noise schedule over times t in (0, T].

    alpha_t = sqrt(alphas_cumprod), sigma_t^2 = 1 - alpha_t^2.

    Args:
        schedule: "discrete": log alpha is interpolated linearly between entries of a table; or
            "linear" or "cosine", which are continuous.
        betas, alphas_cumprod: The table, either of them.
        continuous_beta_0, continuous_beta_1: Ends of "linear".
    """

    def __init__(
        self,
        schedule: str = "discrete",
        betas: Tensor | None = None,
        alphas_cumprod: Tensor | None = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ) -> None:
        if schedule not in ("discrete", "linear", "cosine"):
            raise ValueError(f"schedule must be discrete, linear or cosine, got `{schedule}`")
        self.schedule = schedule
        # At 1 the cosine schedule has no signal left, and its log SNR is -inf.
        self.T = 0.9946 if schedule == "cosine" else 1.0
        self.total_N = 1000
        self.beta_0 = continuous_beta_0
        self.beta_1 = continuous_beta_1
        if schedule == "discrete":
            if betas is not None:
                log_alphas = 0.5 * (1 - betas).log().cumsum(dim=0)
            elif alphas_cumprod is not None:
                log_alphas = 0.5 * alphas_cumprod.log()
            else:
                raise TypeError("a discrete schedule needs betas or alphas_cumprod")
            self.total_N = len(log_alphas)
            times = torch.linspace(0.0, 1.0, self.total_N + 1)[1:]
            self.t_array = times.reshape(1, -1).to(log_alphas)
            self.log_alpha_array = log_alphas.reshape(1, -1)

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """Return log alpha at times t."""
        if self.schedule == "discrete":
            t = t.reshape(-1, 1)
            return interpolate_fn(t, self.t_array.to(t), self.log_alpha_array.to(t)).reshape(-1)
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return torch.log(torch.cos((t + COSINE_S) / (1 + COSINE_S) * math.pi / 2)) - _COSINE_START

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """Return alpha at times t."""
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise at times t."""
        return (1.0 - (2.0 * self.marginal_log_mean_coeff(t)).exp()).sqrt()

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """Return log alpha - log of the standard deviation: half the log SNR."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * (1.0 - (2.0 * log_alpha).exp()).log()

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """Return the times of half log SNRs."""
        if self.schedule == "linear":
            span = self.beta_1 - self.beta_0
            scaled = 2.0 * span * _softplus(-2.0 * lamb)
            return scaled / ((self.beta_0**2 + scaled).sqrt() + self.beta_0) / span
        log_alpha = -0.5 * _softplus(-2.0 * lamb)
        if self.schedule == "discrete":
            log_alphas, times = (a.to(lamb).flip(1) for a in (self.log_alpha_array, self.t_array))
            return interpolate_fn(log_alpha.reshape(-1, 1), log_alphas, times).reshape(-1)
        angle = torch.arccos((log_alpha + _COSINE_START).exp())
        return angle * 2.0 * (1.0 + COSINE_S) / math.pi - COSINE_S


_COSINE_START = math.log(math.cos(COSINE_S / (1.0 + COSINE_S) * math.pi / 2.0))


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_type: str = "uncond",
    condition: Condition = None,
    unconditional_condition: Condition = None,
    guidance_scale: float = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: Mapping[str, Any] | None = None,
) -> ModelFunction:
    """Return the noise that a model predicts, as a function of x and continuous time.

    Args:
        model: (x, timesteps[, condition]); a discrete schedule's timesteps are 0 … 999, fractional.
        model_type: What it predicts: "noise", "x_start", "v" or "score".
        guidance_type: "uncond", "classifier" or "classifier-free".
        classifier_fn: (x, timesteps, condition) -> log probabilities.
    """
    if model_type not in ("noise", "x_start", "v", "score"):
        raise ValueError(f"unknown model_type `{model_type}`")
    if guidance_type not in ("uncond", "classifier", "classifier-free"):
        raise ValueError(f"unknown guidance_type `{guidance_type}`")

    def timesteps_of(t: Tensor) -> Tensor:
        if noise_schedule.schedule == "discrete":  # entry i of the table is the time (i + 1) / N
            return (t - 1.0 / noise_schedule.total_N) * 1000.0
        return t

    def predict_noise(x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        conditions = () if cond is None else (cond,)
        output = model(x, timesteps_of(t), *conditions, **(model_kwargs or {}))
        if model_type == "noise":
            return output
        alpha, std = (
            expand_dims(value, x.dim())
            for value in (noise_schedule.marginal_alpha(t), noise_schedule.marginal_std(t))
        )
        if model_type == "x_start":
            return (x - alpha * output) / std
        return alpha * output + std * x if model_type == "v" else -std * output

    def predict(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x)) if t.numel() == 1 else t
        if guidance_type == "uncond":
            return predict_noise(x, t)
        if guidance_type == "classifier":
            if classifier_fn is None:
                raise TypeError("guidance by a classifier needs classifier_fn")
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                options = classifier_kwargs or {}
                log_prob = classifier_fn(leaf, timesteps_of(t), condition, **options)
                (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
            std = expand_dims(noise_schedule.marginal_std(t), x.dim())
            return predict_noise(x, t) - guidance_scale * std * gradient
        if guidance_scale == 1.0 or unconditional_condition is None:
            return predict_noise(x, t, condition)
        joined = join_conditions(unconditional_condition, condition)
        uncond, cond = predict_noise(torch.cat([x] * 2), torch.cat([t] * 2), joined).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return predict


class DPM_Solver:
    """DPM-Solver, or DPM-Solver++, for a model and a noise schedule.

    Args:
        model_fn: (x, t) -> noise, of `model_wrapper`.
        predict_x0: Whether to solve for x0: DPM-Solver++.
        thresholding: Whether to apply dynamic thresholding of x0 (Imagen), to ±`max_val`.
    """

    def __init__(
        self,
        model_fn: ModelFunction,
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ) -> None:
        self.model = model_fn
        self.noise_schedule = noise_schedule
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.max_val = max_val

    def noise_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise of x."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Return x0 of x."""
        noise = self.noise_prediction_fn(x, t)
        alpha, std = self.noise_schedule.marginal_alpha(t), self.noise_schedule.marginal_std(t)
        x0 = (x - expand_dims(std, x.dim()) * noise) / expand_dims(alpha, x.dim())
        if self.thresholding:
            largest = x0.abs().flatten(1).quantile(QUANTILE, dim=1).clamp(min=self.max_val)
            limit = expand_dims(largest, x0.dim())
            x0 = x0.clamp(-limit, limit) / (limit / self.max_val)
        return x0

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what is solved for: x0 or noise."""
        predict = self.data_prediction_fn if self.predict_x0 else self.noise_prediction_fn
        return predict(x, t)

    def get_time_steps(
        self, skip_type: str, t_T: float, t_0: float, N: int, device: torch.device | str
    ) -> Tensor:
        """Return N + 1 times from t_T down to t_0, uniform in half log SNR, t or sqrt(t)."""
        if skip_type == "time_uniform":
            return torch.linspace(t_T, t_0, N + 1, device=device)
        if skip_type == "time_quadratic":
            return torch.linspace(t_T**0.5, t_0**0.5, N + 1, device=device) ** 2
        if skip_type != "logSNR":
            raise ValueError(
                f"skip_type must be logSNR, time_uniform or time_quadratic, got `{skip_type}`"
            )
        ends = self.noise_schedule.marginal_lambda(torch.tensor([t_T, t_0]))
        lambdas = torch.linspace(float(ends[0]), float(ends[1]), N + 1, device=device)
        return self.noise_schedule.inverse_lambda(lambdas)

    def get_orders_and_timesteps_for_singlestep_solver(
        self,
        steps: int,
        order: int,
        skip_type: str,
        t_T: float,
        t_0: float,
        device: torch.device | str,
    ) -> tuple[Tensor, list[int]]:
        """Return the K + 1 outer times and K orders, which sum to `steps` (model evaluations)."""
        orders = [order] * (steps // order)
        if order == 3 and steps % 3 == 0:
            orders[-1:] = [2, 1]
        elif steps % order:
            orders.append(steps % order)
        if skip_type == "logSNR":
            return self.get_time_steps(skip_type, t_T, t_0, len(orders), device), orders
        ends = torch.tensor([0, *orders]).cumsum(dim=0)
        return self.get_time_steps(skip_type, t_T, t_0, steps, device)[ends], orders

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """Step to time 0: x0 of x."""
        return self.data_prediction_fn(x, s)

    def dpm_solver_first_update(
        self, x: Tensor, s: Tensor, t: Tensor, model_s: Tensor | None = None
    ) -> Tensor:
        """Step from time s to t by one evaluation."""
        model_s = self.model_fn(x, s) if model_s is None else model_s
        return self._combine(x, s, t, model_s)

    def singlestep_dpm_solver_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
        r1: float | Tensor | None = None,
        r2: float | Tensor | None = None,
        model_s: Tensor | None = None,
    ) -> Tensor:
        """Step from time s to t by `order` evaluations: at r1 and r2 of the way in half log SNR."""
        model_s = self.model_fn(x, s) if model_s is None else model_s
        if order == 1:
            return self._combine(x, s, t, model_s)
        _check_solver_type(solver_type)
        schedule = self.noise_schedule
        start, h = schedule.marginal_lambda(s), self._h(s, t)
        r1 = (0.5 if order == 2 else 1.0 / 3.0) if r1 is None else r1
        s1 = schedule.inverse_lambda(start + r1 * h)
        model_s1 = self.model_fn(self._combine(x, s, s1, model_s), s1)
        D1_0 = (model_s1 - model_s) / r1
        if order == 2:
            return self._second_order_update(x, s, t, model_s, D1_0, solver_type)
        r2 = 2.0 / 3.0 if r2 is None else r2
        s2 = schedule.inverse_lambda(start + r2 * h)
        # D1_0 is h dm/dlambda; this step has length r2 h.
        model_s2 = self.model_fn(self._combine(x, s, s2, model_s, r2 * D1_0), s2)
        D1_1 = (model_s2 - model_s) / r2
        if solver_type == "dpm_solver":
            return self._combine(x, s, t, model_s, D1_1)
        D1 = (r2 * D1_0 - r1 * D1_1) / (r2 - r1)
        D2 = 2.0 * (D1_1 - D1_0) / (r2 - r1)
        return self._combine(x, s, t, model_s, D1, D2)

    def multistep_dpm_solver_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step to time t by the predictions at the last times, oldest first."""
        _check_solver_type(solver_type)
        s, model_s = t_prev_list[-1], model_prev_list[-1]
        if order == 1:
            return self._combine(x, s, t, model_s)
        h = self._h(s, t)
        slopes, widths = [], []
        for before, after in ((-2, -1), (-3, -2))[: order - 1]:
            width = self._h(t_prev_list[before], t_prev_list[after]) / h
            slope = model_prev_list[after] - model_prev_list[before]
            slopes.append(slope / expand_dims(width, x.dim()))
            widths.append(expand_dims(width, x.dim()))
        if order == 2:
            return self._second_order_update(x, s, t, model_s, slopes[0], solver_type)
        D2 = (slopes[0] - slopes[1]) / (widths[0] + widths[1])
        return self._combine(x, s, t, model_s, slopes[0] + widths[0] * D2, D2)

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        order: int,
        t_T: float,
        t_0: float,
        atol: float = 0.0078,
        rtol: float = 0.05,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step from t_T to t_0, with step sizes adapted to the local error estimate."""
        if order not in (2, 3):
            raise ValueError(f"adaptive steps have order 2 or 3, got {order}")
        schedule = self.noise_schedule
        s, end = (torch.full((1,), time, device=x.device) for time in (t_T, t_0))
        h, previous = INITIAL_STEP, x
        r1, r2 = (0.5, None) if order == 2 else (1.0 / 3.0, 2.0 / 3.0)
        while float((s - end).abs()) > TIME_TOLERANCE:
            t = schedule.inverse_lambda(schedule.marginal_lambda(s) + h)
            model_s = self.model_fn(x, s)
            low, high = (
                self.singlestep_dpm_solver_update(x, s, t, n, solver_type, r1, r2, model_s)
                for n in (order - 1, order)
            )
            scale = torch.maximum(low.abs(), previous.abs()).mul(rtol).clamp(min=atol)
            error = float(((high - low) / scale).square().flatten(1).mean(1).sqrt().max())
            if error <= 1.0:
                x, s, previous = high, t, low
            rest = float(schedule.marginal_lambda(end) - schedule.marginal_lambda(s))
            h = min(SAFETY * h * error ** (-1.0 / order), rest)
        return x

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> Tensor:
        """Solve from noise x (B, …) at t_start to t_end.

        Args:
            method: "multistep", "singlestep", "singlestep_fixed" (all steps of one order) or
                "adaptive".
            lower_order_final: Whether to lower the order of the last multisteps if steps < 15.
        """
        t_T = self.noise_schedule.T if t_start is None else t_start
        t_0 = 1.0 / self.noise_schedule.total_N if t_end is None else t_end
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol, rtol, solver_type)
        elif method == "multistep":
            if steps < order:
                raise ValueError(f"order {order} needs as many steps, got {steps}")
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)[:, None]
            models = [self.model_fn(x, times[0])]
            for step in range(1, steps + 1):
                n = min(order, step)
                if lower_order_final and steps < 15:
                    n = min(n, steps + 1 - step)
                x = self.multistep_dpm_solver_update(
                    x, models, list(times[:step]), times[step], n, solver_type
                )
                if step < steps:  # no step follows that would use the last one
                    models.append(self.model_fn(x, times[step]))
                models = models[-order:]
        elif method in ("singlestep", "singlestep_fixed"):
            if method == "singlestep":
                outer, orders = self.get_orders_and_timesteps_for_singlestep_solver(
                    steps, order, skip_type, t_T, t_0, x.device
                )
            else:
                orders = [order] * (steps // order)
                outer = self.get_time_steps(skip_type, t_T, t_0, len(orders), x.device)
            for i, n in enumerate(orders):
                ends = float(outer[i]), float(outer[i + 1])
                inner = self.get_time_steps(skip_type, *ends, n, x.device)
                lambdas = self.noise_schedule.marginal_lambda(inner)
                ratios = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
                r1, r2 = (ratios[k] if n > k else None for k in (1, 2))
                x = self.singlestep_dpm_solver_update(
                    x, outer[i : i + 1], outer[i + 1 : i + 2], n, solver_type, r1, r2
                )
        else:
            raise ValueError(f"unknown method `{method}`")
        if denoise_to_zero:
            x = self.denoise_to_zero_fn(x, torch.full((1,), t_0, device=x.device))
        return x

    def _h(self, s: Tensor, t: Tensor) -> Tensor:
        return self.noise_schedule.marginal_lambda(t) - self.noise_schedule.marginal_lambda(s)

    def _second_order_update(
        self, x: Tensor, s: Tensor, t: Tensor, model: Tensor, D1: Tensor, solver_type: str
    ) -> Tensor:
        if solver_type == "dpm_solver":
            return self._combine(x, s, t, model + 0.5 * D1)
        return self._combine(x, s, t, model, D1)

    def _combine(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        model: Tensor,
        D1: Tensor | None = None,
        D2: Tensor | None = None,
    ) -> Tensor:
        """Step from s to t by a prediction m and its derivatives D1 = m', D2 = m'': see the top."""
        schedule = self.noise_schedule
        sign = -1.0 if self.predict_x0 else 1.0
        scales = (schedule.marginal_alpha, schedule.marginal_std)
        model_scale, x_scale = scales if self.predict_x0 else scales[::-1]
        h = self._h(s, t)
        phi_1 = torch.expm1(sign * h)
        phi_2 = phi_1 / h - sign
        phi_3 = phi_2 / h - 0.5
        b, a, phi_1, phi_2, phi_3 = (
            expand_dims(value, x.dim())
            for value in (x_scale(t) / x_scale(s), model_scale(t), phi_1, sign * phi_2, phi_3)
        )
        change = phi_1 * model
        if D1 is not None:
            change = change + phi_2 * D1
        if D2 is not None:
            change = change + phi_3 * D2
        return b * x - a * change


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Interpolate x (N, C) linearly, also beyond the ends of the knots xp, yp (C, K), ascending."""
    columns = []
    for column, knots, values in zip(x.unbind(1), xp, yp, strict=True):
        right = torch.searchsorted(knots, column.contiguous()).clamp(1, len(knots) - 1)
        weight = (column - knots[right - 1]) / (knots[right] - knots[right - 1])
        columns.append(values[right - 1] + weight * (values[right] - values[right - 1]))
    return torch.stack(columns, dim=1)


def expand_dims(v: Tensor, dims: int) -> Tensor:
    """Append axes of length 1 to v (N,) until it has `dims`."""
    return v.reshape(-1, *(1,) * (dims - 1))


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _check_solver_type(solver_type: str) -> None:
    if solver_type not in ("dpm_solver", "taylor"):
        raise ValueError(f"solver_type must be dpm_solver or taylor, got `{solver_type}`")
