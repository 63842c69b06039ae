"""What training changes, and nothing else: a checkpoint holds just this."""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from dbcore.config import ConfigError, TrainConfig
from dbcore.models.base import Family, checkpoint_gradients
from dbcore.models.embeddings import NewTokens, add_tokens, tokens_of
from dbcore.models.lora import PRESETS, add_lora, lora_parameters, multiply_in_half
from dbcore.models.peft_adapters import add_peft_adapter
from dbcore.models.tlora import mask_ranks

# of optimizers that PyTorch has not
PACKAGES = {"AdamW8bit": "bitsandbytes", "AdamWScheduleFree": "schedulefree",
            "Prodigy": "prodigyopt"}


@dataclass
class Trained:
    """The networks that are trained, and how far they are."""

    modules: dict[str, torch.nn.Module]  # by their names in the base
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # of the loss, in fp16 alone
    mean: list[torch.Tensor] | None = None  # running mean of the weights
    tokens: Sequence[NewTokens] = ()  # of the text encoders
    step: int = 0  # steps done
    seconds: float = 0.0  # that they took

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_rates(self, step: int) -> float:
        """The learning rates of a step, a function of the step alone; returns the first."""
        groups = self.optimizer.param_groups
        for group, rate, factor in zip(groups, self.schedule.base_lrs, self.schedule.lr_lambdas):
            group["lr"] = rate * factor(step)
        return groups[0]["lr"]

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Unscale and clip the gradients; whether one is no number, a bool on the device."""
        self.scaler.unscale_(self.optimizer)
        return ~torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm).isfinite()

    def update(self, skipped: torch.Tensor) -> torch.Tensor:
        """The optimizer's step, unless a gradient is no number: `skipped`, which is returned.

        PyTorch's fused optimizers leave their state alone where `found_inf` is 1, and no one waits
        for the device; others have to be asked for it.
        """
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        for part in self.tokens:
            part.keep_spread(skipped)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return skipped

    def average_weights(self, d: float) -> None:
        """The running mean after n steps: sum_k d^(n-k) w_k / sum_k d^(n-k), k = 1 ... n.

        The share of the newest is 1 / sum_k d^(n-k), as in Adam's bias correction (Kingma & Ba
        2015, section 3), so that the weights before the first step have none.
        """
        if self.mean is not None:
            newest = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.mean, newest, (1 - d) / (1 - d**self.step))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block, the running mean in place of the weights, where there is one.

        It is the run's own, or a schedule-free optimizer's (Defazio et al. 2024).
        """
        schedule_free: Any = self.optimizer if hasattr(self.optimizer, "eval") else None
        if self.mean is None and schedule_free is None:
            yield
            return
        now = [p.detach().clone() for p in self.parameters]
        if schedule_free:
            schedule_free.eval()
        copy_all(self.mean or [], self.parameters)
        try:
            yield
        finally:
            if schedule_free:
                schedule_free.train()
            copy_all(now, self.parameters)  # to the bit, which the optimizer's way back is not


def copy_all(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    for source, target in zip(sources, targets):
        target.data.copy_(source)


# --- setting up ---------------------------------------------------------------------------------


Modules = dict[str, torch.nn.Module]


def start_training(base: Family, modules: Modules, config: TrainConfig, world: int) -> Trained:
    """`Trained` before its first step. Raises ConfigError for a missing optimizer's package."""
    c = config
    larger = c.train_batch_size * c.gradient_accumulation_steps * world if c.scale_lr else 1
    rates = dict.fromkeys(base.roles["text_encoders"], c.text_encoder_lr)
    groups = [{"params": lora_parameters(module), "lr": rates.get(name, c.learning_rate) * larger}
              for name, module in modules.items()]
    optimizer = make_optimizer(c, groups)
    scaler = torch.amp.GradScaler(base.device.type, enabled=c.mixed_precision == "fp16")
    trained = Trained(modules, optimizer, make_schedule(c, optimizer), scaler,
                      tokens=tokens_of(modules))
    if c.use_ema:
        trained.mean = [p.detach().clone() for p in trained.parameters]
    return trained


def inject(base: Family, config: TrainConfig) -> Modules:
    """LoRA, or another adapter, on the denoiser and the text encoders if they are trained, and new
    tokens where they are asked for.

    Returns {name: network}.
    """
    c, modules = config, {base.roles["denoiser"][0]: base.denoiser}
    if c.train_text_encoder:
        modules |= base.text_encoders
    for name, module in modules.items():
        rank, alpha, layers = c.rank, c.lora_alpha, c.lora_layers
        if name in base.roles["text_encoders"]:
            rank, layers = c.text_encoder_rank, layers if layers in PRESETS else "attention"
            alpha = rank * (c.lora_alpha / c.rank)
        if c.adapter != "lora":
            add_peft_adapter(module, c.adapter, rank, alpha, layers, c.seed,
                             base.lora_targets[name])
            continue
        add_lora(module, rank, alpha, layers, c.lora_dropout, c.use_dora, c.use_rslora, c.seed,
                 presets=base.lora_targets[name])
        multiply_in_half(module)
    if c.use_tlora:
        mask_ranks(base, c.tlora_alpha)
    if c.train_text_encoder_ti:
        add_tokens(base, c)
        modules |= base.text_encoders
    return in_training(modules, c)


def in_training(modules: Modules, config: TrainConfig) -> Modules:
    """Networks in training mode, with gradient checkpointing if it is asked for; returns them."""
    for module in modules.values():
        module.train()
        if config.gradient_checkpointing:
            checkpoint_gradients(module)
    return modules


def make_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over [{"params", "lr"}]. Raises ConfigError for a missing package."""
    decay = config.adam_weight_decay
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon,
            "weight_decay": decay}
    if config.optimizer == "AdamW":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if config.optimizer == "AdamW8bit":
        bitsandbytes = optional("bitsandbytes", "--optimizer AdamW8bit")
        return bitsandbytes.optim.AdamW8bit(groups, **adam)
    if config.optimizer == "AdamWScheduleFree":
        schedulefree = optional("schedulefree", "--optimizer AdamWScheduleFree")
        optimizer = schedulefree.AdamWScheduleFree(groups, **adam)
        optimizer.train()
        return optimizer
    if config.optimizer == "Prodigy":
        prodigyopt = optional("prodigyopt", "--optimizer Prodigy")
        return prodigyopt.Prodigy(groups, lr=1.0, use_bias_correction=True, safeguard_warmup=True,
                                  **adam)
    from transformers import Adafactor

    return Adafactor(groups, scale_parameter=False, relative_step=False, weight_decay=decay)


def optional(package: str, option: str) -> ModuleType:
    """The package that an option needs. Raises ConfigError, with the command to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{option} needs one more package: pip install {package}") from None


def make_schedule(config: TrainConfig,
                  optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule over optimizer steps, whatever the accumulation or the processes."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
                         num_training_steps=config.max_train_steps, num_cycles=config.lr_num_cycles,
                         power=config.lr_power)
