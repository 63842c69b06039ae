"""One training loop for every network of the toy base: seeded, and resumable after a kill."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dbcore.utils.files import whole_file


def step_rng(seed: int, stage: str, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Randomness as a function of (seed, stage, step): a resumed run draws what it would have
    drawn."""
    key = np.random.SeedSequence([seed, step, *stage.encode()])
    return np.random.default_rng(key), torch.Generator().manual_seed(int(key.generate_state(1)[0]))


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on `device`; a GPU copies it when it comes to it, and nobody waits."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def half_where_fast(device: str = "cpu") -> torch.autocast:
    """An autocast to bfloat16 where the processor multiplies it natively; nothing elsewhere."""
    kind = torch.device(device).type
    native = (torch.cuda.is_bf16_supported() if kind == "cuda"
              else torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(kind, torch.bfloat16, enabled=native)


def cosine_rate(progress: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Factor of the learning rate at a fraction of the run."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def trapezoid_rate(progress: float, warmup: float = 0.005, decay: float = 0.25) -> float:
    """Factor of the learning rate: up, level, then straight down to 0 over the last `decay` of the
    run.

    For a run of days: while it is level, how long the run will be need not be known.
    """
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


def orthogonalised(matrices: list[torch.Tensor], steps: int = 5) -> list[torch.Tensor]:
    """Matrices with all singular values brought near 1: roughly U V^T of each U S V^T.

    The quintic Newton-Schulz iteration of Muon, X <- (a + b XX^T + c (XX^T)^2) X, run on the Gram
    matrices of the shorter sides alone, all of one size at once. So the long sides are multiplied
    twice, not at each iteration, and sqrt(|XX^T|) bounds the largest singular value more closely
    than |X| does, which brings small ones up sooner.
    """
    wide = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    out = list(matrices)
    for side in {m.shape[0] for m in wide}:
        here = [k for k, m in enumerate(wide) if m.shape[0] == side]
        grams = torch.stack([wide[k] @ wide[k].T for k in here])
        bounds = grams.norm(dim=(1, 2), keepdim=True).clamp(min=1e-14)
        whole = newton_schulz(grams / bounds, steps) / bounds.sqrt()
        for k, factor in zip(here, whole):
            out[k] = factor @ wide[k] if wide[k] is matrices[k] else (factor @ wide[k]).T
    return out


def newton_schulz(grams: torch.Tensor, steps: int) -> torch.Tensor:
    """(k, m, m) Gram matrices XX^T of norm at most 1 to the matrices that orthogonalise X from the
    left."""
    whole = None
    for step in range(steps):
        factor = torch.baddbmm(grams, grams, grams, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        whole = factor if whole is None else factor @ whole
        if step < steps - 1:
            grams = factor @ grams @ factor
    return whole


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for linear and convolution weights, seen as (out, in * k * k)
    matrices.

    The step is the orthogonalised Nesterov momentum, scaled to the size of an AdamW step
    (Liu et al. 2025), so that both take the same learning rate. torch's own takes matrices only,
    and multiplies in bfloat16, which most processors do slowly.
    """

    def __init__(self, weights: Iterable[torch.Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One step; the weights of a group together, since a GPU waits for each launch."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            momenta = self._momenta(weights, group["momentum"])
            updates = orthogonalised([mean.flatten(1) for mean in momenta])
            sizes = [0.2 * max(update.shape) ** 0.5 for update in updates]
            torch._foreach_mul_(updates, sizes)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, [u.reshape(w.shape) for u, w in zip(updates, weights)],
                                alpha=-group["lr"])

    def _momenta(self, weights, momentum):
        """Nesterov's: the running means of the gradients, and a step further."""
        for weight in weights:
            if weight not in self.state:
                self.state[weight]["mean"] = torch.zeros_like(weight)
        means, grads = [self.state[w]["mean"] for w in weights], [w.grad for w in weights]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        return torch._foreach_lerp(grads, means, momentum)


def make_optimizers(module: nn.Module, lr: float, muon: bool = False) -> list:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            inner = (muon and p.dim() >= 2 and "embed" not in name and "conv_in" not in name
                     and "conv_out" not in name)
            (matrices if inner else others).append(p)
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    return optimizers + ([Muon(matrices, lr)] if matrices else [])


def save_half(module: nn.Module, folder: Path) -> None:
    """The weights as `folder/model.safetensors`, in half precision."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous().cpu() for k, v in module.state_dict().items()},
              folder / "model.safetensors")


class Average:
    """Running mean of a module's weights, shorter at the start of a run (Polyak averaging)."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.live = decay, module.state_dict()
        self.values = {name: value.clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.live.values()), share)


def progress(step: int, steps: int, seconds: float, minutes: float | None) -> float:
    """The fraction of a run that is done: of its steps or of its minutes, whichever is further.

    A run of no steps is done from the start.
    """
    return max(step / steps if steps else 1.0, seconds / (60 * minutes) if minutes else 0.0)


def fit(stage: str, folder: Path, module: nn.Module, loss_at: Callable[[int, float], dict],
        steps: int, lr: float, minutes: float | None = None, muon: bool = False, ema: float = 0.0,
        device: str = "cpu", save_every: float = 120.0, log_every: int = 50,
        rate: Callable[[float], float] = cosine_rate) -> nn.Module:
    """Train `module` and return it (with averaged weights if `ema`), in eval mode, on `device`.

    It ends after `steps` steps or, where they are given, after `minutes` of training, whichever is
    first. `loss_at(step, progress)` gives a dict of scalars whose "loss" is minimised; the learning
    rate is `lr * rate(progress)`, progress in [0, 1]. Every `save_every` seconds and at the end the
    whole state goes to `folder/<stage>.pt`, and a later call goes on from there: steps and minutes
    are those of all calls together. It may ask for more; the rate then follows the new schedule.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, module = folder / f"{stage}.pt", module.to(device)
    optimizers = make_optimizers(module, lr, muon)
    average = Average(module, ema) if ema else None
    step, spent = load_state(path, module, optimizers, average) if path.exists() else (0, 0.0)
    module.train()
    began = saved = time.monotonic()
    seconds = spent
    while (done := progress(step, steps, seconds, minutes)) < 1:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * rate(progress(step + 1, steps, seconds, minutes))
        terms = take_step(module, optimizers, loss_at(step, done))
        step += 1
        if average:
            average.update(step)
        seconds = spent + time.monotonic() - began
        last = progress(step, steps, seconds, minutes) >= 1
        if step % log_every == 0 or last:
            log(stage, step, steps, seconds, terms)
        if time.monotonic() - saved > save_every or last:
            save_state(path, module, optimizers, average, step, seconds)
            saved = time.monotonic()
    if average:
        module.load_state_dict(average.values)
    return module.eval()


def take_step(module: nn.Module, optimizers: list, terms: dict) -> dict:
    """One step down the gradient of `terms["loss"]`, clipped at norm 1; `terms` again."""
    terms["loss"].backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return terms


def log(stage: str, step: int, steps: int, seconds: float, terms: dict) -> None:
    """One line of JSON; on a GPU, the only thing in the loop that waits for it."""
    line = {"stage": stage, "step": step, "of": steps, "seconds": round(seconds, 1)}
    line |= {name: round(float(value.detach()), 5) for name, value in terms.items()}
    print(json.dumps(line), flush=True)


def steps_done(folder: Path, stage: str) -> int:
    """The steps that the stage's checkpoint in `folder` has behind it; 0 where there is none."""
    path = folder / f"{stage}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["step"] if path.exists() else 0


def save_state(path: Path, module: nn.Module, optimizers: list, average: Average | None, step: int,
               seconds: float) -> None:
    """A checkpoint that is whole or not there at all."""
    state = {"module": module.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
             "average": average and average.values, "step": step, "seconds": seconds}
    with whole_file(path) as partial:
        torch.save(state, partial)


def load_state(path: Path, module: nn.Module, optimizers: list,
               average: Average | None) -> tuple[int, float]:
    """Put a checkpoint back; returns the steps done and the seconds they took.

    One without optimizers, as `weights.py` writes them, starts those anew.
    """
    held = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(held["module"])
    if held["optimizers"]:
        for optimizer, state in zip(optimizers, held["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    if average:
        for name, value in average.values.items():
            value.copy_(held["average"][name])
    return held["step"], held["seconds"]
