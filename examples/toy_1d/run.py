"""Figure 2 of the paper: what the objective of the fake score does to its sampling trajectories, in one dimension.

The data are four points on a line, so the exact flow is known in closed form. Three small networks learn it: on the
full interval (Eq. 4), on (s, 1) from samples at s (Eq. 13), and there with x_s taken for x0 (biased). Each then
integrates the same noise from t = 1 to s. Writes figure2.png and figure2.json, the deviations from the exact paths.

    python examples/toy_1d/run.py --save runs/toy_1d

Takes about a minute on one core.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from megatron_pdmd.diffusion import FlowMatchingSchedule, NoiseSchedule, euler_path, sample_timesteps, to_flow
from megatron_pdmd.distillation import score_matching_loss
from megatron_pdmd.errors import parse_options, user_errors

POINTS = (-1.0, 0.0, 1.0, 2.0)
SHOW_EVERY = 5  # trajectories, so that the lines of a panel can be told apart
TITLES = {
    "full": "(a) full interval, Eq. 4",
    "subinterval": "(b) within ({s:g}, 1), Eq. 13",
    "biased": "(c) within ({s:g}, 1), x_s taken for x0",
}


@dataclass(frozen=True)
class ToyOptions:
    """How the toy is run."""

    save: Path = Path("runs/toy_1d")  # folder of the figure and the numbers
    s: float = 0.5  # lower end of the subinterval
    train_iters: int = 800
    batch_size: int = 128  # samples inside (s, 1); the full interval gets as many below s on top
    lr: float = 2e-3  # of Adam, with cosine decay to 0
    clamp_max: float = 10.0  # of Eq. 13
    dim: int = 512  # of the hidden layers
    euler_steps: int = 100  # from t = 1 to s
    trajectories: int = 200  # of which the figure shows every fifth
    seed: int = 0


class PointFlow(nn.Module):
    """Four linear layers that predict the flow from x and t."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 1] and t [B] -> flow [B, 1]."""
        return self.layers(torch.cat([x, t[:, None].to(x.dtype)], dim=1))


def exact_flow(x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """E[eps - x0 | x_t] for equally likely points, by the posterior over them: x_t [B, 1], t [B] -> [B, 1]."""
    points = torch.tensor(POINTS, dtype=x_t.dtype)
    log_likelihood = -((x_t - schedule.alpha(t)[:, None] * points) ** 2) / (2 * schedule.sigma(t)[:, None] ** 2)
    x0 = (log_likelihood.softmax(dim=1) * points).sum(dim=1, keepdim=True)
    return to_flow(x0, x_t, t, schedule, "x0")


def train(objective: str, options: ToyOptions, schedule: NoiseSchedule) -> PointFlow:
    """Trains one network; all objectives see the same points, noise and times inside (s, 1).

    The full interval gets a second half of batch below s, drawn as densely, which the others cannot have.
    """
    torch.manual_seed(options.seed)
    model = PointFlow(options.dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.train_iters)
    # Scrambled low-discrepancy points: with independent draws the panels would compare noise, not objectives.
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=options.seed)
    for _ in range(options.train_iters):
        draw = _draw(uniform.draw(options.batch_size, dtype=torch.float64), options, schedule)
        loss = _loss(objective, model, draw, options, schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Draw:
    """One batch: points [B, 1], two independent noises [B, 1], times in (s, 1) and in (0, s) [B]."""

    x0: Tensor
    eps: Tensor
    other_eps: Tensor
    t: Tensor
    t_below: Tensor


def _draw(uniform: Tensor, options: ToyOptions, schedule: NoiseSchedule) -> Draw:
    """A batch from numbers in [0, 1) [B, 4], multiples of 2^-30 in fp64: in fp32 some would be 1."""
    point, first, second, moment = uniform.split(1, dim=1)
    eps, other_eps = (torch.special.ndtri(u.clamp(min=2.0**-31)).float() for u in (first, second))
    return Draw(
        x0=torch.tensor(POINTS)[(point * len(POINTS)).long()],
        eps=eps,
        other_eps=other_eps,
        t=sample_timesteps(moment[:, 0], options.s, 1.0, schedule).float(),
        t_below=sample_timesteps(moment[:, 0], 0.0, options.s, schedule).float(),
    )


def _loss(objective: str, model: PointFlow, draw: Draw, options: ToyOptions, schedule: NoiseSchedule) -> Tensor:
    if objective == "full":
        x_s, eps = draw.x0.repeat(2, 1), torch.cat([draw.eps, draw.other_eps])
        t = torch.cat([draw.t, draw.t_below])
        s, kind = torch.zeros_like(t), "flow"
    else:
        data, s, eps, t = torch.zeros_like(draw.t), torch.full_like(draw.t, options.s), draw.eps, draw.t
        x_s, kind = schedule.diffuse(draw.x0, draw.other_eps, data, s), objective
    output = model(schedule.diffuse(x_s, eps, s, t), t)
    return score_matching_loss(output, x_s, eps, s, t, schedule, clamp_max=options.clamp_max, objective=kind)


def trajectories(flow: Callable[[Tensor, Tensor], Tensor], options: ToyOptions, schedule: NoiseSchedule) -> Tensor:
    """x along the Euler steps from t = 1 to s, from evenly spaced quantiles of the noise: [steps + 1, trajectories]."""
    quantiles = (torch.arange(options.trajectories, dtype=torch.float64) + 0.5) / options.trajectories
    x = torch.special.ndtri(quantiles).float()[:, None]
    times = torch.linspace(1.0, options.s, options.euler_steps + 1, dtype=torch.float64).tolist()
    return torch.stack([x, *euler_path(flow, x, times, schedule)]).squeeze(-1)


def draw_figure(
    paths: Mapping[str, Tensor], exact: Tensor, deviation: Mapping[str, float], options: ToyOptions
) -> None:
    """One panel per objective, its trajectories over the exact ones."""
    times = torch.linspace(1.0, options.s, options.euler_steps + 1)
    figure, panels = plt.subplots(1, len(paths), figsize=(13, 4.2), sharey=True, layout="constrained")
    for panel, (name, path) in zip(panels, paths.items(), strict=True):
        panel.plot(times, exact[:, ::SHOW_EVERY], color="0.7", linewidth=2.5)
        panel.plot(times, path[:, ::SHOW_EVERY], color="tab:red" if name == "biased" else "tab:blue", linewidth=0.7)
        panel.set_title(f"{TITLES[name].format(s=options.s)}\nrms deviation {deviation[name]:.4f}")
        panel.set_xlabel("t")
        panel.invert_xaxis()
    panels[0].set_ylabel("x_t (grey: exact)")
    figure.savefig(options.save / "figure2.png", dpi=150)
    plt.close(figure)


def main(options: ToyOptions) -> None:
    """Trains the three networks, integrates, and writes the figure and the numbers."""
    if not 0 < options.s < 1:
        raise ValueError(f"--s {options.s}: the subinterval (s, 1) needs an s strictly between 0 and 1")
    schedule = FlowMatchingSchedule()
    options.save.mkdir(parents=True, exist_ok=True)
    exact = trajectories(lambda x, t: exact_flow(x, t, schedule), options, schedule)
    paths, seconds, deviation = {}, {}, {}
    for objective, name in (("full", "full"), ("flow", "subinterval"), ("biased", "biased")):
        start = time.perf_counter()
        paths[name] = trajectories(train(objective, options, schedule), options, schedule)
        seconds[name] = time.perf_counter() - start
        deviation[name] = math.sqrt((paths[name] - exact)[1:].square().mean())
        print(f"{name:<12} rms deviation {deviation[name]:.4f}   {seconds[name]:.0f} s", flush=True)
    ratio = {name: deviation[name] / deviation["full"] for name in ("subinterval", "biased")}
    draw_figure(paths, exact, deviation, options)
    result = {
        "rms_deviation": deviation,
        "ratio_to_full": ratio,
        "seconds": seconds,
        "options": {**asdict(options), "save": str(options.save)},
    }
    (options.save / "figure2.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(parse_options(ToyOptions, __doc__))
