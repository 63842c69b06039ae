"""A LoRA in its plain form, and its arithmetic: sums, lower ranks, the difference of two models.

For each layer two thin matrices and a number,
    W' = W + scale * up @ down                   (Hu et al. 2021, equation 3; scale = alpha / rank)
and with DoRA one magnitude for each output row,
    W' = magnitude * (W + scale * up @ down) / norm of its rows      (Liu et al. 2024, equation 5)
"""

import math
from dataclasses import dataclass, field

import torch
from peft.utils import merge_utils

from dbcore.utils import seeding
from dbcore.utils.errors import InputError


class LoraFileError(InputError):
    """A LoRA that cannot be read, does not fit its base, or holds what the wanted format cannot."""


@dataclass(frozen=True)
class Layer:
    """One layer's update.

    Linear: down [rank, in], up [out, rank]; convolution: [rank, in, k, k] and [out, rank, 1, 1].
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None  # [out], DoRA only

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """scale * up @ down in float32, of the weight's shape (before DoRA's magnitude)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """A whole LoRA: layers["unet"]["down_blocks.0...to_q"] is a `Layer`.

    `notes`: texts that travel in its file.
    """

    layers: dict[str, dict[str, Layer]]
    notes: dict[str, str] = field(default_factory=dict)

    def every(self) -> list[tuple[str, str, Layer]]:
        """[(component, module, layer)] of all networks."""
        return [(c, name, one) for c, named in self.layers.items() for name, one in named.items()]

    @property
    def has_dora(self) -> bool:
        return any(layer.magnitude is not None for _, _, layer in self.every())


# --- sums and lower ranks ---------------------------------------------------------------------


def merge_adapters(
    adapters: list[Adapter], weights: list[float], rank: int | None = None,
    method: str = "sum", density: float = 0.5, seed: int = 0,
) -> tuple[Adapter, float]:
    """The LoRA whose update is sum_i weights[i] * adapters[i], and the relative Frobenius error.

    Exact without `rank`: the factors are laid side by side, [up_1 up_2] @ [down_1; down_2], so that
    ranks add up. With `rank` each layer is its best approximation of that rank (Eckart and Young
    1936). `method`: another than "sum" merges the updates by peft's function of that name, see
    `_task_arithmetic`; without `rank` the result has the largest rank among them, as in peft.
    Raises `LoraFileError` unless there is one finite weight for each LoRA, and for DoRA, whose
    update depends on the base.
    """
    _check_merge(adapters, weights)
    layers: dict[str, dict[str, Layer]] = {}
    lost, kept = 0.0, 0.0
    for component, module in sorted({(c, m) for a in adapters for c, m, _ in a.every()}):
        there = [adapter.layers.get(component, {}).get(module) for adapter in adapters]
        pairs = [(layer, weight) for layer, weight in zip(there, weights) if layer is not None]
        _check_sizes(pairs, module)
        if method == "sum":
            layer, dropped = _side_by_side(pairs), 0.0
            if rank is not None and layer.rank > rank:
                layer, dropped = truncate_rank(layer, rank)
        else:
            update = _task_arithmetic(pairs, method, density, seeding.key(seed, "merge " + module))
            layer = extract_layer(update, rank or max(layer.rank for layer, _ in pairs))
            dropped = float((update - layer.delta()).square().sum())
        lost += dropped
        kept += float(layer.delta().square().sum())
        layers.setdefault(component, {})[module] = layer
    error = math.sqrt(lost / (lost + kept)) if lost else 0.0
    return Adapter(layers, _common_notes(adapters)), error


def _check_merge(adapters, weights):
    if len(adapters) != len(weights):
        raise LoraFileError(f"{len(weights)} weights for {len(adapters)} LoRAs: give one each")
    if not all(math.isfinite(weight) for weight in weights):
        raise LoraFileError(f"weights {' '.join(map(str, weights))}: give finite numbers")
    if any(adapter.has_dora for adapter in adapters):
        raise LoraFileError("a DoRA does not add up with others: "
                            "export it with --format merged, then extract")


def _task_arithmetic(pairs, method, density, seed):
    """The updates of [(layer, weight)] as one of the weight's shape, by a function of peft.

    "ties" (Yadav et al. 2023, arXiv 2306.01708) keeps the largest `density` of each update's
    numbers, and of these the ones that have the sign of most; "dare_linear" and "dare_ties" (Yu et
    al. 2023, arXiv 2311.03099) keep a random `density`, scaled by its inverse; "magnitude_prune"
    keeps the largest and adds them.
    """
    updates = [layer.delta() for layer, _ in pairs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(merge_utils, method)(updates, torch.tensor([w for _, w in pairs]), density)


def _common_notes(adapters):
    words, bases = (
        [adapter.notes[key] for adapter in adapters if adapter.notes.get(key)]
        for key in ("trigger_words", "base")
    )
    notes = {"trigger_words": ", ".join(dict.fromkeys(words))} if words else {}
    return {**notes, "base": bases[0]} if len(set(bases)) == 1 else notes


def _check_sizes(pairs, module):
    shapes = {(layer.down.shape[1:], layer.up.shape[0]) for layer, _ in pairs}
    if len(shapes) > 1:
        raise LoraFileError(f"{module} has another size in one of the LoRAs: "
                            "they belong to different bases")


def _side_by_side(pairs):
    ups = [layer.up.float() * (weight * layer.scale) for layer, weight in pairs]
    return Layer(torch.cat([layer.down.float() for layer, _ in pairs]), torch.cat(ups, dim=1), 1.0)


def truncate_rank(layer: Layer, rank: int) -> tuple[Layer, float]:
    """(`layer` at `rank`, squared Frobenius norm of what fell away), without forming the weight.

    With up = Q1 R1 and down^T = Q2 R2, up @ down has the singular values of the small R1 R2^T.
    """
    down, up = layer.down.float().flatten(1), layer.up.float().flatten(1) * layer.scale
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()  # a layer of few channels has fewer singular values than `rank`
    new_up = ((q_up @ u[:, :rank]) * root).reshape(len(up), -1, *layer.up.shape[2:])
    new_down = (root[:, None] * (vh[:rank] @ q_down.T)).reshape(-1, *layer.down.shape[1:])
    return Layer(new_down, new_up, 1.0), float(s[rank:].square().sum())


# --- the difference of two models -------------------------------------------------------------


def extract_layer(difference: torch.Tensor, rank: int) -> Layer:
    """The `Layer` of `rank` nearest to a weight difference [out, in] or [out, in, k, k]."""
    flat = difference.float().flatten(1)
    rank = min(rank, *flat.shape)
    if min(flat.shape) <= 512:
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    else:  # a full decomposition of a large layer takes seconds; the leading part is enough
        u, s, v = torch.svd_lowrank(flat, q=min(rank + 16, *flat.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    if difference.dim() == 4:
        return Layer(down.reshape(-1, *difference.shape[1:]), up[:, :, None, None], 1.0)
    return Layer(down, up, 1.0)


def extract_adapter(base: dict, tuned: dict, rank: int) -> tuple[Adapter, dict[str, float]]:
    """A LoRA of `rank` out of two models of one shape, {component: torch module} each, and figures.

    `error`: the relative Frobenius error over all layers that a LoRA can hold; `outside`: the share
    of the change (by squared norm) in biases, norms and embeddings, which it cannot. Raises
    `LoraFileError` if the shapes differ or nothing changed.
    """
    layers: dict[str, dict[str, Layer]] = {}
    change, lost, outside = 0.0, 0.0, 0.0
    for component, module, difference in _differences(base, tuned):
        norm = float(difference.square().sum())
        if module is None:
            outside += norm
            continue
        layer = extract_layer(difference, rank)
        lost += float((difference - layer.delta()).square().sum())
        change += norm
        layers.setdefault(component, {})[plain_name(component, module)] = layer
    if not layers:
        raise LoraFileError("the fine-tuned model's layers equal the base's: nothing to extract")
    figures = {"error": math.sqrt(lost / change), "outside": outside / (outside + change)}
    return Adapter(layers), figures


def _differences(base, tuned):
    """(component, module, change of its weight); no module where a LoRA cannot hold the change."""
    for component, network in base.items():
        before, after = network.state_dict(), tuned[component].state_dict()
        if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
            raise LoraFileError(f"the two {component}s differ in shape: "
                                "the second is no fine-tune of the first")
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        fitting = {name for name, module in network.named_modules() if isinstance(module, kinds)}
        for key, weight in before.items():
            module, _, kind = key.rpartition(".")
            if not torch.equal(weight, after[key]):
                inside = kind == "weight" and module in fitting
                yield component, module if inside else None, after[key].float() - weight.float()


def plain_name(component: str, module: str) -> str:
    """A CLIP module's name without the `text_model.` that transformers had until version 5."""
    return module.removeprefix("text_model.") if component.startswith("text_encoder") else module
