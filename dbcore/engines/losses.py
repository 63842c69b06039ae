"""DreamBooth's loss: how far the prediction is from the target, on the subject and on its class."""

from collections.abc import Callable
from typing import Any

import torch

from dbcore.config import TrainConfig
from dbcore.models.process import Process


def batch_loss(process: Process, batch: dict[str, Any], cond: dict[str, torch.Tensor],
               predict: Callable, config: TrainConfig,
               predict_frozen: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, losses) of one batch, as `dreambooth_loss`.

    `process`: the base's `Process`. `batch`: from `DreamBoothData.batch`. `cond`: its encoded
    prompts. `predict`: as `Family.predict`. `config`: TrainConfig. `predict_frozen(x_t, t, prompts,
    geometry)`: the base's own prediction, which is then the class samples' target (Li and Hoiem
    2016, learning without forgetting).
    """
    t, num_instance = batch["t"], config.train_batch_size
    x_t = process.corrupt(batch["x0"], batch["noise"], t)
    target = process.target(batch["x0"], batch["noise"], t)
    if predict_frozen is not None:  # before the activations of the step are in memory
        prior = predict_frozen(*(batch_part[num_instance:] for batch_part in (
            x_t, t, batch["prompts"], batch["geometry"])))
        target = torch.cat([target[:num_instance], prior])
    prediction = predict(x_t, t, cond, batch["geometry"])
    return dreambooth_loss(prediction, target, batch["mask"], process.weight(t, config.snr_gamma),
                           num_instance, config.prior_loss_weight)


def dreambooth_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor,
    num_instance: int, prior_loss_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """E |w (y - y_theta)|^2 over the subject + lambda E |w (y' - y'_theta)|^2 over the class.

    Equation 2 of Ruiz et al. 2023 (DreamBooth), with the network's own kind of target y.
    `prediction`, `target`: (n, c, h, w), the first `num_instance` of the subject; `mask`:
    (n, 1, h, w) in [0, 1]; `weight`: (n,). Returns (loss, losses): a scalar, and the unweighted
    mean squared error of each sample, (n,).
    """
    errors = (prediction - target).square().mean(dim=1, keepdim=True) * mask
    losses = errors.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    weighted = losses * weight
    loss = weighted[:num_instance].mean()
    if len(losses) > num_instance:
        loss = loss + prior_loss_weight * weighted[num_instance:].mean()
    return loss, losses.detach()
