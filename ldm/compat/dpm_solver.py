"""`ldm.models.diffusion.dpm_solver` of the original, with its modules `dpm_solver` and `sampler`.

Lu et al. 2022: DPM-Solver (arXiv:2206.00927) for noise prediction, and DPM-Solver++
(arXiv:2211.01095) for x0 prediction. Both step from time s to time t by

    x_t = b x_s - a (phi_1 m + sign phi_2 m' + phi_3 m''),   phi_1 = exp(sign h) - 1

    phi_2 = phi_1 / h - sign,   phi_3 = phi_2 / h - 1/2

where lambda = log(alpha / sigma) is half the log SNR, h = lambda_t - lambda_s, m the prediction of
the model, and m' and m'' its derivatives with respect to lambda, multiplied by h and h^2:

    m = noise    sign = 1     a = sigma_t    b = alpha_t / alpha_s
    m = x0       sign = -1    a = alpha_t    b = sigma_t / sigma_s
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.sampling import Condition, DiffusionModel, Sampler, apply_with_guidance

ModelFunction = Callable[[Tensor, Tensor], Tensor]
MODEL_TYPES = {"eps": "noise", "v": "v"}  # parameterization -> `model_type` of `model_wrapper`
COSINE_S = 0.008  # offset of the cosine schedule (arXiv:2102.09672)
THRESHOLDING_QUANTILE = 0.995  # of |x0|, for dynamic thresholding
# For adaptive steps
INITIAL_LAMBDA_STEP = 0.05
SAFETY_FACTOR = 0.9  # of the estimated step size
TIME_TOLERANCE = 1e-5  # sampling ends when the time is this close to the last one


class NoiseScheduleVP:
    """A variance preserving noise schedule over times t in (0, T].

    alpha_t = √ᾱ, sigma_t² = 1 - ᾱ.

    Args:
        schedule: "discrete", which interpolates log alpha linearly between the timesteps of a
            model; or "linear" or "cosine", which are continuous.
        betas, alphas_cumprod: Schedule of the model, (N,); "discrete" needs one of them.
        continuous_beta_0, continuous_beta_1: First and last beta of "linear", per unit of time.
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
        # At time 1 the cosine schedule has no signal left: a log SNR of -inf.
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
        log_cosine = torch.log(torch.cos((t + COSINE_S) / (1 + COSINE_S) * math.pi / 2))
        return log_cosine - _LOG_COSINE_AT_0

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """Return alpha at times t."""
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise at times t."""
        return (1.0 - (2.0 * self.marginal_log_mean_coeff(t)).exp()).sqrt()

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """Return lambda = log(alpha / sigma), half the log SNR, at times t."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * (1.0 - (2.0 * log_alpha).exp()).log()

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """Return the times at which half the log SNR is `lamb`."""
        if self.schedule == "linear":
            span = self.beta_1 - self.beta_0
            scaled = 2.0 * span * F.softplus(-2.0 * lamb)
            return scaled / ((self.beta_0**2 + scaled).sqrt() + self.beta_0) / span
        log_alpha = -0.5 * F.softplus(-2.0 * lamb)
        if self.schedule == "discrete":
            log_alphas, times = (
                array.to(lamb).flip(1) for array in (self.log_alpha_array, self.t_array)
            )
            return interpolate_fn(log_alpha.reshape(-1, 1), log_alphas, times).reshape(-1)
        angle = torch.arccos((log_alpha + _LOG_COSINE_AT_0).exp())
        return angle * 2.0 * (1.0 + COSINE_S) / math.pi - COSINE_S


# Subtracted from log alpha of the cosine schedule, so that alpha is 1 at time 0
_LOG_COSINE_AT_0 = math.log(math.cos(COSINE_S / (1.0 + COSINE_S) * math.pi / 2.0))


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
    """Return a function (x, time) -> predicted noise, with guidance, for a model of any type.

    Args:
        model: Called with (x, timesteps), or (x, timesteps, condition). Timesteps are fractional,
            0 … 999, for a discrete noise schedule, and the times themselves for a continuous one.
        model_type: What the model predicts: "noise", "x_start", "v" or "score".
        model_kwargs: Keyword arguments of the model; None = {}.
        guidance_type: "uncond" (no guidance), "classifier" or "classifier-free".
        condition: Condition of the model, or of the classifier; None = unconditional.
        unconditional_condition: Negative condition; None disables "classifier-free".
        classifier_fn: (x, timesteps, condition) -> log probabilities, needed for "classifier".
        classifier_kwargs: Keyword arguments of `classifier_fn`; None = {}.
    """
    if model_type not in ("noise", "x_start", "v", "score"):
        raise ValueError(f"unknown model_type `{model_type}`")
    if guidance_type not in ("uncond", "classifier", "classifier-free"):
        raise ValueError(f"unknown guidance_type `{guidance_type}`")

    def to_timesteps(t: Tensor) -> Tensor:
        if noise_schedule.schedule == "discrete":  # timestep i of the model is at (i + 1) / N
            return (t - 1.0 / noise_schedule.total_N) * 1000.0
        return t

    def predict_noise(x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        args = () if cond is None else (cond,)
        output = model(x, to_timesteps(t), *args, **(model_kwargs or {}))
        if model_type == "noise":
            return output
        alpha, std = (
            expand_dims(value, x.dim())
            for value in (noise_schedule.marginal_alpha(t), noise_schedule.marginal_std(t))
        )
        if model_type == "x_start":
            return (x - alpha * output) / std
        return alpha * output + std * x if model_type == "v" else -std * output

    def predict_guided_noise(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x)) if t.numel() == 1 else t
        if guidance_type == "uncond":
            return predict_noise(x, t)
        if guidance_type == "classifier-free":
            return apply_with_guidance(
                predict_noise, x, t, condition, guidance_scale, unconditional_condition
            )
        if classifier_fn is None:
            raise TypeError("guidance_type `classifier` needs classifier_fn")
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            kwargs = classifier_kwargs or {}
            log_prob = classifier_fn(x_in, to_timesteps(t), condition, **kwargs)
            (grad,) = torch.autograd.grad(log_prob.sum(), x_in)
        std = expand_dims(noise_schedule.marginal_std(t), x.dim())
        return predict_noise(x, t) - guidance_scale * std * grad

    return predict_guided_noise


class DPM_Solver:
    """DPM-Solver, or DPM-Solver++, for a model and a noise schedule.

    Args:
        model_fn: (x, t) -> noise, from `model_wrapper`.
        predict_x0: Whether to use DPM-Solver++, else DPM-Solver.
        thresholding: Whether to apply dynamic thresholding (Imagen, arXiv:2205.11487) with
            `predict_x0`.
        max_val: Bound of |x0| with `thresholding`.
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
        """Predict the noise in x."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict x0 from x."""
        noise = self.noise_prediction_fn(x, t)
        alpha, std = self.noise_schedule.marginal_alpha(t), self.noise_schedule.marginal_std(t)
        x0 = (x - expand_dims(std, x.dim()) * noise) / expand_dims(alpha, x.dim())
        if self.thresholding:
            quantile = x0.abs().flatten(1).quantile(THRESHOLDING_QUANTILE, dim=1)
            limit = expand_dims(quantile.clamp(min=self.max_val), x0.dim())
            x0 = x0.clamp(-limit, limit) / (limit / self.max_val)
        return x0

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict x0 if `predict_x0`, else the noise."""
        predict = self.data_prediction_fn if self.predict_x0 else self.noise_prediction_fn
        return predict(x, t)

    def get_time_steps(
        self, skip_type: str, t_T: float, t_0: float, N: int, device: torch.device | str
    ) -> Tensor:
        """Return N + 1 times from t_T down to t_0, uniform in t, √t or the log SNR."""
        if skip_type == "time_uniform":
            return torch.linspace(t_T, t_0, N + 1, device=device)
        if skip_type == "time_quadratic":
            return torch.linspace(t_T**0.5, t_0**0.5, N + 1, device=device) ** 2
        if skip_type != "logSNR":
            raise ValueError(
                f"skip_type must be logSNR, time_uniform or time_quadratic, got `{skip_type}`"
            )
        lambda_T, lambda_0 = self.noise_schedule.marginal_lambda(torch.tensor([t_T, t_0])).tolist()
        lambdas = torch.linspace(lambda_T, lambda_0, N + 1, device=device)
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
        """Return the K + 1 times that bound K steps, and the order of each step.

        The order of a step is its number of model evaluations; the orders sum up to `steps`.
        """
        orders = [order] * (steps // order)
        if order == 3 and steps % 3 == 0:
            orders[-1:] = [2, 1]
        elif steps % order:
            orders.append(steps % order)
        if skip_type == "logSNR":
            num_steps = 1 if order == 1 else len(orders)  # 1 is a defect of the original
            return self.get_time_steps(skip_type, t_T, t_0, num_steps, device), orders
        indices = torch.tensor([0, *orders]).cumsum(dim=0)
        return self.get_time_steps(skip_type, t_T, t_0, steps, device)[indices], orders

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """Step from time s to time 0: predict x0."""
        return self.data_prediction_fn(x, s)

    def dpm_solver_first_update(
        self, x: Tensor, s: Tensor, t: Tensor, model_s: Tensor | None = None
    ) -> Tensor:
        """Step from time s to t with one model evaluation.

        Args:
            model_s: Prediction at s; None computes it.
        """
        model_s = self.model_fn(x, s) if model_s is None else model_s
        return self._integrate(x, s, t, model_s)

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
        """Step from time s to t with `order` model evaluations.

        Args:
            solver_type: How derivatives are estimated, "dpm_solver" or "taylor".
            r1, r2: Positions of the second and third evaluation, as fractions of the step in
                lambda; None = 1/2 for order 2, 1/3 and 2/3 for order 3.
            model_s: Prediction at s; None computes it.
        """
        model_s = self.model_fn(x, s) if model_s is None else model_s
        if order == 1:
            return self._integrate(x, s, t, model_s)
        _check_solver_type(solver_type)
        schedule = self.noise_schedule
        lambda_s, h = schedule.marginal_lambda(s), self._get_lambda_step(s, t)
        r1 = (0.5 if order == 2 else 1.0 / 3.0) if r1 is None else r1
        s1 = schedule.inverse_lambda(lambda_s + r1 * h)
        model_s1 = self.model_fn(self._integrate(x, s, s1, model_s), s1)
        D1_0 = (model_s1 - model_s) / r1
        if order == 2:
            return self._integrate_second_order(x, s, t, model_s, D1_0, solver_type)
        r2 = 2.0 / 3.0 if r2 is None else r2
        s2 = schedule.inverse_lambda(lambda_s + r2 * h)
        # D1_0 is the derivative times h, and the length of this step is r2 h.
        model_s2 = self.model_fn(self._integrate(x, s, s2, model_s, r2 * D1_0), s2)
        D1_1 = (model_s2 - model_s) / r2
        if solver_type == "dpm_solver":
            return self._integrate(x, s, t, model_s, D1_1)
        D1 = (r2 * D1_0 - r1 * D1_1) / (r2 - r1)
        D2 = 2.0 * (D1_1 - D1_0) / (r2 - r1)
        return self._integrate(x, s, t, model_s, D1, D2)

    def multistep_dpm_solver_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step to time t from the predictions at the last `order` times, oldest first."""
        _check_solver_type(solver_type)
        s, model_s = t_prev_list[-1], model_prev_list[-1]
        if order == 1:
            return self._integrate(x, s, t, model_s)
        h = self._get_lambda_step(s, t)
        slopes, ratios = [], []  # difference quotients, and earlier steps relative to h
        for start, end in ((-2, -1), (-3, -2))[: order - 1]:
            ratio = self._get_lambda_step(t_prev_list[start], t_prev_list[end]) / h
            ratios.append(expand_dims(ratio, x.dim()))
            slopes.append((model_prev_list[end] - model_prev_list[start]) / ratios[-1])
        if order == 2:
            return self._integrate_second_order(x, s, t, model_s, slopes[0], solver_type)
        D2 = (slopes[0] - slopes[1]) / (ratios[0] + ratios[1])
        return self._integrate(x, s, t, model_s, slopes[0] + ratios[0] * D2, D2)

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
        """Step from t_T to t_0, with step sizes adapted to the estimated error.

        Args:
            order: 2 or 3; the error is the difference from a solver of the next lower order.
            atol, rtol: Absolute and relative tolerance of the error.
        """
        if order not in (2, 3):
            raise ValueError(f"order must be 2 or 3 for adaptive steps, got {order}")
        schedule = self.noise_schedule
        s, t_end = (torch.full((1,), time, device=x.device) for time in (t_T, t_0))
        h, x_prev = INITIAL_LAMBDA_STEP, x
        r1, r2 = (0.5, None) if order == 2 else (1.0 / 3.0, 2.0 / 3.0)
        while float((s - t_end).abs()) > TIME_TOLERANCE:
            t = schedule.inverse_lambda(schedule.marginal_lambda(s) + h)
            model_s = self.model_fn(x, s)
            x_lower, x_higher = (
                self.singlestep_dpm_solver_update(x, s, t, n, solver_type, r1, r2, model_s)
                for n in (order - 1, order)
            )
            tolerance = torch.maximum(x_lower.abs(), x_prev.abs()).mul(rtol).clamp(min=atol)
            relative = (x_higher - x_lower) / tolerance
            error = float(relative.square().flatten(1).mean(1).sqrt().max())
            if error <= 1.0:  # else the step is rejected, and repeated with a smaller h
                x, s, x_prev = x_higher, t, x_lower
            remaining = float(self._get_lambda_step(s, t_end))
            growth = error ** (-1.0 / order) if error > 0.0 else math.inf
            h = min(SAFETY_FACTOR * h * growth, remaining)
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
        """Sample from noise x (B, …).

        Args:
            steps: Number of model evaluations; ignored by "adaptive".
            t_start: First time; None = T of the noise schedule.
            t_end: Last time; None = 1 / total_N of the noise schedule.
            skip_type: "time_uniform", "logSNR" or "time_quadratic", see `get_time_steps`.
            method: "multistep", "singlestep", "singlestep_fixed" (all steps have the same order)
                or "adaptive".
            lower_order_final: Whether the last steps of "multistep" have lower orders if there are
                fewer than 15 steps.
            denoise_to_zero: Whether the last step predicts x0.
        """
        t_T = self.noise_schedule.T if t_start is None else t_start
        t_0 = 1.0 / self.noise_schedule.total_N if t_end is None else t_end
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol, rtol, solver_type)
        elif method == "multistep" or (method == "singlestep" and order == 1):  # the same steps
            if steps < order:
                raise ValueError(f"steps must be at least the order, {order}, got {steps}")
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)[:, None]
            predictions = [self.model_fn(x, times[0])]
            for step in range(1, steps + 1):
                step_order = min(order, step)
                if lower_order_final and steps < 15:
                    step_order = min(step_order, steps + 1 - step)
                x = self.multistep_dpm_solver_update(
                    x, predictions, list(times[:step]), times[step], step_order, solver_type
                )
                if step < steps:  # the prediction at the last time is not needed
                    predictions.append(self.model_fn(x, times[step]))
                predictions = predictions[-order:]
        elif method in ("singlestep", "singlestep_fixed"):
            if method == "singlestep":
                times, orders = self.get_orders_and_timesteps_for_singlestep_solver(
                    steps, order, skip_type, t_T, t_0, x.device
                )
            else:
                orders = [order] * (steps // order)
                times = self.get_time_steps(skip_type, t_T, t_0, len(orders), x.device)
            for i, step_order in enumerate(orders):
                start, end = float(times[i]), float(times[i + 1])
                step_times = self.get_time_steps(skip_type, start, end, step_order, x.device)
                lambdas = self.noise_schedule.marginal_lambda(step_times)
                ratios = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
                r1, r2 = (ratios[k] if step_order > k else None for k in (1, 2))
                x = self.singlestep_dpm_solver_update(
                    x, times[i : i + 1], times[i + 1 : i + 2], step_order, solver_type, r1, r2
                )
        else:
            raise ValueError(f"unknown method `{method}`")
        if denoise_to_zero:
            x = self.denoise_to_zero_fn(x, torch.full((1,), t_0, device=x.device))
        return x

    def _get_lambda_step(self, s: Tensor, t: Tensor) -> Tensor:
        return self.noise_schedule.marginal_lambda(t) - self.noise_schedule.marginal_lambda(s)

    def _integrate_second_order(
        self, x: Tensor, s: Tensor, t: Tensor, model_s: Tensor, D1: Tensor, solver_type: str
    ) -> Tensor:
        if solver_type == "dpm_solver":  # phi_2 is about phi_1 / 2
            return self._integrate(x, s, t, model_s + 0.5 * D1)
        return self._integrate(x, s, t, model_s, D1)

    def _integrate(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        model_s: Tensor,
        D1: Tensor | None = None,
        D2: Tensor | None = None,
    ) -> Tensor:
        """Step from time s to t, given m, m' (D1) and m'' (D2) of the module's docstring."""
        schedule = self.noise_schedule
        sign = -1.0 if self.predict_x0 else 1.0
        functions = (schedule.marginal_alpha, schedule.marginal_std)
        model_coef, x_coef = functions if self.predict_x0 else functions[::-1]
        h = self._get_lambda_step(s, t)
        phi_1 = torch.expm1(sign * h)
        phi_2 = phi_1 / h - sign
        phi_3 = phi_2 / h - 0.5
        b, a, phi_1, phi_2, phi_3 = (
            expand_dims(value, x.dim())
            for value in (x_coef(t) / x_coef(s), model_coef(t), phi_1, sign * phi_2, phi_3)
        )
        integral = phi_1 * model_s
        if D1 is not None:
            integral = integral + phi_2 * D1
        if D2 is not None:
            integral = integral + phi_3 * D2
        return b * x - a * integral


class DPMSolverSampler(Sampler):
    """DPM-Solver++ 2M, which calls `apply_model` with fractional timesteps.

    As in the original, `sample` ignores all arguments except the number of steps, the shape, the
    conditions, the guidance scale and `x_T`.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, model: DiffusionModel, device: str | torch.device | None = None, **kwargs: object
    ) -> None:
        super().__init__(model, device)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float())

    def make_schedule(self, ddim_num_steps: int, *ignored: object, **options: object) -> None:
        self.steps = ddim_num_steps

    def sample_loop(
        self,
        cond: Condition,
        shape: Sequence[int],
        *,
        x_T: Tensor | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        **ignored: object,
    ) -> tuple[Tensor, None]:
        device = self.model.betas.device
        x = torch.randn(*shape, device=device) if x_T is None else x_T
        schedule = NoiseScheduleVP("discrete", alphas_cumprod=self.alphas_cumprod.to(device))
        predict_noise = model_wrapper(
            lambda x, t, c=None: self.model.apply_model(x, t, c),
            schedule,
            model_type=MODEL_TYPES[self.model.parameterization],
            guidance_type="classifier-free",
            condition=cond,
            unconditional_condition=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
        )
        solver = DPM_Solver(predict_noise, schedule, predict_x0=True)
        return solver.sample(x, steps=self.steps, order=2, method="multistep"), None


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Interpolate C functions linearly at x (N, C), and extrapolate beyond their knots.

    Args:
        xp, yp: K knots of each function, ascending, and its values there, (C, K) each.
    """
    outputs = []
    for inputs, knots, values in zip(x.unbind(1), xp, yp, strict=True):
        right = torch.searchsorted(knots, inputs.contiguous()).clamp(1, len(knots) - 1)
        weight = (inputs - knots[right - 1]) / (knots[right] - knots[right - 1])
        outputs.append(values[right - 1] + weight * (values[right] - values[right - 1]))
    return torch.stack(outputs, dim=1)


def expand_dims(v: Tensor, dims: int) -> Tensor:
    """Append axes of length 1 to v (N,) until it has `dims` axes."""
    return v.reshape(-1, *(1,) * (dims - 1))


def _check_solver_type(solver_type: str) -> None:
    if solver_type not in ("dpm_solver", "taylor"):
        raise ValueError(f"solver_type must be dpm_solver or taylor, got `{solver_type}`")
