"""How much memory a run will need, told before anything is loaded.

The networks are built from their configs without numbers, only shapes; then one encoding, one step
and one drawing are traced on them, and every tensor that PyTorch would allocate is counted while it
lives. So batch, resolution, precision and gradient checkpointing need no formulas: the trace runs
the training's own code.
"""

import dataclasses
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbcore.engines.losses import dreambooth_loss
from dbcore.engines.trained import inject
from dbcore.models.base import load_base, settle, torch_dtype
from dbcore.models.lora import lora_parameters

# Memory in vendors' GB (10^9 bytes), and the half precision that the card is good at.
CARDS = {"T4": (16e9, "fp16"), "RTX 4060": (8e9, "bf16"), "A100": (40e9, "bf16"),
         "H200": (141e9, "bf16")}
# Python and its libraries; a CUDA context with its kernels
OVERHEAD = {"cpu": 0.6e9, "cuda": 0.5e9}
# A CPU's heap keeps the gaps between tensors that came and went: half as much again as they took,
# over the runs of `make bench BENCH=--memory`. With MALLOC_MMAP_THRESHOLD_=1048576 there are no
# gaps, but steps of 256 pixels take 1.6 times as long. Where blocks are computed again, what is
# kept lies between what comes and goes, and the gaps are larger: 2.3 times what was traced for the
# toy base, 3.0 for Stable Diffusion's shape.
GAPS, GAPS_CHECKPOINTING = 1.5, 2.4
# photos a pass of the autoencoder, pictures a batch when drawing: the defaults of both
ENCODED, DRAWN = 4, 8


@dataclass(frozen=True)
class Phase:
    """Bytes in use at the highest point of one part of a run; `pages`: of a mapped file, taken back
    at need."""

    name: str
    weights: int
    activations: int
    gradients: int = 0
    optimizer: int = 0
    pages: int = 0

    @property
    def total(self):
        return self.weights + self.activations + self.gradients + self.optimizer + self.pages


@dataclass(frozen=True)
class Forecast:
    """Bytes by phase.

    `overhead`: what is there before the first tensor; `cache`: on the disk, not in memory.
    """

    phases: list[Phase]
    overhead: int
    cache: int = 0

    @property
    def largest(self):
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self):
        return self.overhead + self.largest.total

    @property
    def needed(self):
        """The peak on a machine with no room for pages of files."""
        return self.overhead + max(phase.total - phase.pages for phase in self.phases)

    def table(self):
        """Markdown, in MB of 10^6 bytes; the last line of the run is its highest point."""
        columns = ("weights", "activations", "gradients", "optimizer", "pages", "total")
        lines = ["| MB | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for phase in self.phases:
            cells = (f"{getattr(phase, name) / 1e6:,.1f}" for name in columns)
            lines.append(f"| {phase.name} | " + " | ".join(cells) + " |")
        lines.append(f"| highest ({self.largest.name}) with {self.overhead / 1e6:,.0f} before "
                     f"the first tensor | | | | | | {self.peak / 1e6:,.1f} |")
        lines.append(f"| caches (on the disk, 0 in memory) | | | | | | {self.cache / 1e6:,.1f} |")
        return "\n".join(lines)


def forecast(config, device="cpu", photos=5):
    """What a run of `config` (TrainConfig) will hold on `device` ("cpu" or "cuda"), a `Forecast`.

    `photos`: how many, for the size of the caches. Nothing is loaded but the configs of the base.
    On a GPU the working space of its kernels and the allocator's fragments come on top, some 10 %;
    on a CPU they are counted.
    """
    config = settle(config, device)
    run = Shadow(config)
    phases = [run.class_images()] if config.with_prior_preservation else []
    phases += [run.encoding(), run.steps(), run.pictures()]
    if device == "cpu":
        phases = [run.loading(), *(run.in_a_heap(phase) for phase in phases)]
    return Forecast(phases, int(OVERHEAD[device]), run.cache(photos))


def by_card(config, photos=5):
    """{card: (its bytes, the precision, `Forecast`)}; a `mixed_precision` that was asked for is
    kept."""
    rows, known = {}, {}
    for card, (memory, half) in CARDS.items():
        precision = half if config.mixed_precision == "auto" else config.mixed_precision
        if precision not in known:
            known[precision] = forecast(in_precision(config, precision), "cuda", photos)
        rows[card] = memory, precision, known[precision]
    return rows


def in_precision(config, precision):
    """`config` with every `auto` precision settled, for a device that is not this machine's."""
    prior = config.prior_generation_precision
    return dataclasses.replace(config, mixed_precision=precision,
                               prior_generation_precision=precision if prior == "auto" else prior)


def advise(config, memory, device="cuda"):
    """What to change so that a run fits into `memory` bytes: {option: value}, {} if it fits, None
    if nothing helps.

    Options are changed in order of what they cost: first those that only take time, then the
    resolution.
    """
    config, changes = settle(config, device), {}
    if forecast(config, device).needed <= memory:
        return changes
    for change in savings(config, device):
        changes |= change
        if forecast(dataclasses.replace(config, **changes), device).needed <= memory:
            return changes
    return None


def savings(config, device):
    """Changes that make a settled run smaller, the cheapest first."""
    if config.mixed_precision == "no" and device == "cuda":
        yield {"mixed_precision": "bf16", "prior_generation_precision": "bf16"}
    if config.with_prior_preservation and config.sample_batch_size > 1:
        yield {"sample_batch_size": 1}
    if not config.cache_latents:
        yield {"cache_latents": True}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.train_batch_size > 1:
        yield {"train_batch_size": 1,
               "gradient_accumulation_steps": config.train_batch_size
               * config.gradient_accumulation_steps}
    if not config.low_vram:
        yield {"low_vram": True}
    yield {"resolution": config.resolution * 3 // 4 // 64 * 64 or config.resolution // 16 * 8 or 8}


def flags(changes):
    """{option: value} as a command line takes them."""
    return " ".join(f"--{name} {value}" for name, value in changes.items()).replace(" True", "")


def remedy(config, device):
    """A sentence on what makes a run smaller whose memory was full, as little as will do.

    Where the forecast says that it fits, something else holds memory: then the cheapest change that
    there is.
    """
    changes = advise(config, there(device), device)
    if changes == {}:
        changes = next(savings(settle(config, device), device))
    if changes is None:
        return "No option makes it small enough: take a larger card"
    return (f"It takes less with {flags(changes)}; `dbcore doctor` with the same options "
            "counts the memory")


def there(device):
    """Bytes of memory that this process has or can have, beside what others hold."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    import psutil

    return psutil.virtual_memory().available


# --- a run of shapes ------------------------------------------------------------------------------


class Shadow:
    """A run whose networks have shapes and no numbers: LoRA goes where a real run's does."""

    def __init__(self, config):
        self.config = config
        self.base = shadow_base(config, config.mixed_precision)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules = inject(self.base, config)
        parameters = [p for module in self.modules.values() for p in lora_parameters(module)]
        self.trained = sum(p.numel() for p in parameters)
        self.state = sum(state_bytes(config.optimizer, p) for p in parameters)
        materialise(self.base, self.fake)
        with self.fake, torch.no_grad():  # the shape of each of one encoded prompt's tensors
            self.word_shapes = {name: tensor.shape[1:]
                                for name, tensor in self.base.encode_text([""]).items()}

    # --- phases, in the order of a run

    def loading(self):
        """The denoiser's weights, before they are quantized, beside the file that they are copied
        from."""
        variant, folder = self.config.variant, Path(self.base.name, self.base.roles["denoiser"][0])
        ending = f".{variant}.safetensors" if variant else ".safetensors"
        files = [path for path in folder.glob(f"*{ending}")
                 if "." not in path.name.removesuffix(ending)]
        weights = sum(p.numel() for p in self.base.denoiser.parameters()) * self.base.dtype.itemsize
        return Phase("loading", weights, 0, pages=sum(path.stat().st_size for path in files)
                     or weights)

    def class_images(self):
        """Pictures are drawn `sample_batch_size` at a time; the text encoder stays, unless memory
        is short."""
        c, base = self.config, self.base
        if c.prior_generation_precision != c.mixed_precision:
            base = shadow_base(c, c.prior_generation_precision)
            materialise(base, self.fake)
        roles = ("denoiser", "autoencoder") if c.low_vram else base.roles
        weights = sum(map(size, base.loaded(*roles).values()))
        return Phase("class images", weights, self.drawing(base, c.sample_batch_size))

    def encoding(self):
        """Photos through the autoencoder, before the denoiser is loaded, unless class images were
        drawn with it."""
        c, base = self.config, self.base
        drawn = (c.with_prior_preservation and c.prior_generation_precision == c.mixed_precision
                 and not c.low_vram)
        count = min(ENCODED, self.batch * c.gradient_accumulation_steps)
        with self.traced(base) as live:
            base.encode_images(torch.empty(count, 3, c.resolution, c.resolution))
        return Phase("encoding photos", self.resident("autoencoder", *["denoiser"] * drawn),
                     live.peak)

    def steps(self):
        """Forward and backward through the denoiser, and the text encoders if they are trained."""
        c, base = self.config, self.base
        with self.traced(base) as live:
            x_t, target = (torch.empty(self.batch, *base.latent_shape(c.resolution))
                           for _ in range(2))
            mask = torch.ones_like(target[:, :1])
            prediction = base.predict(x_t, timesteps(base, x_t), self.words(self.batch))
            loss, _ = dreambooth_loss(prediction, target, mask, torch.ones(self.batch),
                                      c.train_batch_size, c.prior_loss_weight)
            loss.backward()
        keep = [] if c.cache_latents and not c.validation_prompt else ["autoencoder"]
        means = 4 * self.trained if c.use_ema else 0
        return Phase("steps", self.resident("denoiser", *keep), live.peak - 4 * self.trained,
                     4 * self.trained, self.state + means)

    def pictures(self):
        """Validation, and the report at the end: the autoencoder is back, gradients are gone."""
        c = self.config
        count = min(DRAWN,
                    max(c.num_report_images, c.num_validation_images * len(c.validation_prompt)))
        for module in self.modules.values():
            module.eval()
        activations = self.drawing(self.base, count) if count else 0
        drawer = ["autoencoder"] if count else []
        means = 2 * 4 * self.trained if c.use_ema else 0
        return Phase("validation and report", self.resident("denoiser", *drawer), activations,
                     optimizer=self.state + means)

    def in_a_heap(self, phase):
        """The phase with the gaps that a CPU's heap keeps."""
        gaps = (GAPS_CHECKPOINTING if phase.name == "steps" and self.config.gradient_checkpointing
                else GAPS)
        return dataclasses.replace(phase, activations=int(gaps * phase.activations))

    def cache(self, photos):
        """Bytes of latents (mean, std and mask, float32) on the disk."""
        channels, height, width = self.base.latent_shape(self.config.resolution)
        count = photos + (self.config.num_class_images if self.config.with_prior_preservation
                          else 0)
        return count * 4 * (2 * channels + 1) * height * width if self.config.cache_latents else 0

    # --- what they are made of

    @property
    def batch(self):
        return self.config.train_batch_size * (2 if self.config.with_prior_preservation else 1)

    def resident(self, *roles):
        """Bytes of the weights of networks, and of the text encoders where each step needs them."""
        c = self.config
        words = ([] if c.pre_compute_text_embeddings and not c.train_text_encoder
                 else ["text_encoders"])
        return sum(map(size, self.base.loaded(*words, *roles).values()))

    def words(self, count):
        """Encoded prompts, with all that the text encoders keep for their gradients if they are
        trained."""
        if self.config.train_text_encoder:
            return self.base.encode_text([""] * count)
        return {name: torch.empty(count, *shape) for name, shape in self.word_shapes.items()}

    def drawing(self, base, count):
        """Bytes beside the weights while `count` pictures are drawn with guidance."""
        count, shapes = base.at_once(count), self.word_shapes
        with self.traced(base) as live, torch.no_grad():
            latents = torch.empty(count, *base.latent_shape(self.config.resolution))
            cond = {name: torch.empty(2 * count, *shape) for name, shape in shapes.items()}
            base.predict(torch.cat([latents, latents]), timesteps(base, latents).repeat(2), cond)
            base.decode(latents)
        return live.peak

    @contextmanager
    def traced(self, base):
        """Counts what lives, beside the weights, in the code of the block."""
        with self.fake, Live(base.loaded().values()) as live:
            yield live
        for parameter in base.denoiser.parameters():
            parameter.grad = None


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive (`live`) and were at the highest point (`peak`), but for
    `modules`'."""

    def __init__(self, modules=()):
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

    def see(self, storage):
        if storage._cdata in self.sizes:  # a view, or written in place
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, address):
        self.live -= self.sizes.pop(address)


def shadow_base(config, precision):
    """The base with its networks on PyTorch's `meta` device: shapes, no numbers, no memory."""
    c = config
    base = load_base(c.pretrained_model_name_or_path, c.revision, c.variant, c.tokenizer_name,
                     "meta", torch_dtype(precision), c.tokenizer_max_length, c.low_vram)
    # made here, and not counted where they are first used
    for part in (*base.networks(), "process"):
        getattr(base, part)
    return base


def materialise(base, fake):
    """Give the networks of a `meta` base a pretended CPU, so that attention takes the path it takes
    there."""
    base.device = torch.device("cpu")
    with fake:
        for part in (part for network in base.loaded().values() for part in network.modules()):
            for name, p in part._parameters.items():
                if p is not None:
                    empty = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
                    part._parameters[name] = torch.nn.Parameter(empty,
                                                                requires_grad=p.requires_grad)
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def timesteps(base, x_t):
    """A timestep for each of a batch of latents, as training takes them."""
    return base.process.timestep(torch.full((len(x_t),), 0.5), x_t[0, 0].numel())


def state_bytes(optimizer, parameter):
    """Bytes that an optimizer keeps for one parameter, beside its gradient, at most."""
    count = parameter.numel()
    if optimizer == "AdamW8bit":
        # bitsandbytes leaves smaller ones in float32, as LoRAs' mostly are
        return count * (2 if count >= 4096 else 8)
    if optimizer == "Adafactor":  # sums of rows and of columns
        return 4 * (count // parameter.shape[-1] + count // parameter.shape[-2])
    return count * {"AdamW": 8, "Prodigy": 16}[optimizer]  # two float32, and with Prodigy four


def size(module):
    """Bytes of a network's weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
