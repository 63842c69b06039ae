"""How much memory a run will need, told before anything is loaded.

The networks are built from their configs, with shapes and no numbers. Then each part of a run is
traced on them by the run's own functions, and every tensor that PyTorch would allocate is counted
while it lives: batch, resolution, precision and gradient checkpointing need no formulas.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbcore.config import TrainConfig
from dbcore.engines.losses import batch_loss
from dbcore.engines.trained import inject
from dbcore.models.base import evaluating, load_base, resolve, torch_dtype
from dbcore.models.lora import lora_parameters

# Before the first tensor, measured: Python with its libraries; a CUDA context with its kernels.
OVERHEAD = {"cpu": 0.6e9, "cuda": 0.5e9}
# What a GPU's kernels work in: cuBLAS keeps 32 MiB for each thread and stream on Hopper, less on
# other cards, and cuDNN takes some. Measured on an H100 (data/results/gpu.md): 0.09 to 0.25 GB.
WORKSPACE = {"cpu": 0, "cuda": 0.2e9}
# A CPU's heap keeps gaps between tensors that come and go. Measured (`make bench BENCH=--memory`):
# from half as much as they take to twice as much, the latter with gradient checkpointing.
HEAP = 2.0
ENCODED, SAMPLED = 4, 8  # photos a pass of the autoencoder, images a batch: the defaults of both


@dataclass(frozen=True)
class Phase:
    """Bytes in use at the highest point of one part of a run; gradients are in `activations`."""

    name: str
    weights: int
    activations: int
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.optimizer


@dataclass(frozen=True)
class Forecast:
    """The parts of a run in their order; `overhead`: bytes before the first tensor; `workspace`:
    of a GPU's kernels."""

    phases: list[Phase]
    overhead: int
    workspace: int = 0

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator has given out at the highest point."""
        return self.workspace + self.largest.total

    @property
    def peak(self) -> int:
        return self.overhead + self.allocated


def forecast(config: TrainConfig, device: str = "cpu") -> Forecast:
    """What a run of `config` (TrainConfig) will hold on `device` ("cpu" or "cuda"), a `Forecast`.

    On a GPU the allocator's fragments come on top: some 5 % on an H100.
    """
    config = resolve(config, device)
    phases, gaps = list(phases_of(config, device)), HEAP if device == "cpu" else 1
    phases = [dataclasses.replace(p, activations=int(gaps * p.activations)) for p in phases]
    return Forecast(phases, int(OVERHEAD[device]), int(WORKSPACE[device]))


# --- a run of shapes ----------------------------------------------------------------------------


def phases_of(c: TrainConfig, device: str) -> Iterator[Phase]:
    """Each `Phase` of a run, `c` being its resolved config."""
    run = Shadow(c, c.mixed_precision)
    if device == "cpu" and c.low_vram:
        yield run.loading()
    apart = c.prior_generation_precision != c.mixed_precision
    both, words = ("denoiser", "autoencoder"), ("text_encoders",)
    if c.with_prior_preservation:
        maker = Shadow(c, c.prior_generation_precision) if apart else run
        yield maker.phase("class images", both if c.low_vram else (*both, *words),
                          maker.sample, c.sample_batch_size)
    stays = both if c.with_prior_preservation and not (apart or c.low_vram) else ()
    yield run.phase("encoding prompts", (*words, *stays), run.encode_prompt)
    once = c.pre_compute_text_embeddings and not c.trains_text
    each = () if once else words
    yield run.phase("encoding photos", ("autoencoder", *stays, *each), run.encode_photos)
    shown = max(c.num_report_images, c.num_validation_images * len(c.validation_prompt))
    keeps = both if c.validation_prompt or not c.cache_latents else both[:1]
    yield run.phase("steps", (*keeps, *each), run.step, optimizer=run.state(means=1))
    yield run.phase("validation and report", (*(both if shown else both[:1]), *each),
                    run.sample, min(SAMPLED, shown), optimizer=run.state(means=2))


class Shadow:
    """A base whose networks have shapes and no numbers, with LoRA where a run puts it."""

    def __init__(self, config: TrainConfig, precision: str):
        c, self.config = config, config
        self.base = load_base(
            c.pretrained_model_name_or_path, c.revision, c.variant, c.tokenizer_name, "meta",
            torch_dtype(precision), c.tokenizer_max_length, c.low_vram)
        for part in (*self.base.networks(), "process"):  # made here, so that no trace counts it
            getattr(self.base, part)
        self.modules = inject(self.base, c)
        for layer in [part for m in self.modules.values() for part in m.modules()]:
            if isinstance(layer, LycorisLayer):  # in training it asks a random number's value
                layer.training = False
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.base.device = torch.device("cpu")
        with self.fake, torch.no_grad():  # a CPU's tensors, so that attention takes its path there
            for network in self.base.loaded().values():
                network.to_empty(device="cpu")
                getattr(network, "tie_weights", tuple)()  # a language model's head is its table
            self.words = {k: v.shape[1:] for k, v in self.base.encode_text([""]).items()}
        self.parameters = [p for m in self.modules.values() for p in lora_parameters(m)]
        keeps_class = c.with_prior_preservation or c.prior_prediction
        self.batch = c.train_batch_size * (2 if keeps_class else 1)
        self.bucket = max(c.buckets, key=math.prod)  # the largest

    def phase(self, name: str, roles: tuple[str, ...], work: Callable, *args: int,
              optimizer: int = 0) -> Phase:
        """What `work(*args)` takes beside the weights of networks of these roles."""
        weights = sum(map(size, self.base.loaded(*set(roles)).values()))
        with self.fake, Live(self.base.loaded().values()) as live:
            work(*args)
        for parameter in self.parameters:
            parameter.grad = None
        return Phase(name, weights, live.peak, optimizer)

    def state(self, means: int) -> int:
        """Bytes of the optimizer's state, and of running means of the weights."""
        copies = 4 * means * self.config.use_ema
        return sum(state_bytes(self.config.optimizer, p) + copies * p.numel()
                   for p in self.parameters)

    def loading(self) -> Phase:
        """The denoiser, read whole before its weights are quantized."""
        count = sum(p.numel() for p in self.base.denoiser.parameters())
        return Phase("loading", count * self.base.dtype.itemsize, 0)

    @torch.no_grad()
    def encode_prompt(self) -> None:
        self.base.encode_text([""])

    def encode_photos(self) -> None:
        c = self.config
        count = min(ENCODED, self.batch * c.gradient_accumulation_steps)
        self.base.encode_images(torch.empty(count, 3, *self.bucket))

    def step(self) -> None:
        """Forward and backward through all that is trained."""
        c, x0 = self.config, self.latents(self.batch, self.bucket)
        batch = {"x0": x0, "noise": torch.empty_like(x0), "t": self.timesteps(x0),
                 "mask": torch.ones_like(x0[:, :1]), "geometry": None}
        cond = self.base.encode_text([""] * len(x0)) if c.trains_text else self.cond(len(x0))
        batch_loss(self.base.process, batch, cond, self.base.predict, c)[0].backward()

    @torch.no_grad()
    def sample(self, count: int) -> None:
        """A denoising step with guidance, and the images, of as many as are sampled at once."""
        if count:
            side = self.config.resolution
            x_t = self.latents(2 * self.base.at_once(count), (side, side))
            with evaluating(self.modules.values()):
                self.base.predict(x_t, self.timesteps(x_t), self.cond(len(x_t)))
            self.base.decode(x_t.chunk(2)[0])

    def latents(self, count: int, bucket: tuple[int, int]) -> torch.Tensor:
        return torch.empty(count, *self.base.latent_shape(*bucket))

    def cond(self, count: int) -> dict[str, torch.Tensor]:
        """Encoded prompts, from a cache."""
        return {name: torch.empty(count, *shape) for name, shape in self.words.items()}

    def timesteps(self, x_t: torch.Tensor) -> torch.Tensor:
        return self.base.process.timestep(torch.full((len(x_t),), 0.5), x_t[0, 0].numel())


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, but for `modules`': now, and at the highest point."""

    def __init__(self, modules: Iterable[torch.nn.Module] = ()):
        super().__init__()
        self.live = self.peak = 0
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self.sizes = {t.untyped_storage()._cdata: 0 for t in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:  # a view, or written in place
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


def state_bytes(optimizer: str, parameter: torch.nn.Parameter) -> int:
    """Bytes that an optimizer keeps for one parameter, beside its gradient, at most."""
    count = parameter.numel()
    if optimizer == "AdamW8bit":
        # bitsandbytes leaves smaller ones in float32, as LoRAs' mostly are
        return count * (2 if count >= 4096 else 8)
    if optimizer == "Adafactor":  # sums of rows and of columns
        return 4 * (count // parameter.shape[-1] + count // parameter.shape[-2])
    return count * (16 if optimizer == "Prodigy" else 8)  # two float32, and with Prodigy four


def size(module: torch.nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
