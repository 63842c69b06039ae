"""Did it learn? What a run leaves beside its weights: evidence, costs, and a model card.

The commonest complaint about LoRA training is a run that ends without an error and changes nothing.
So every run ends with the same prompts and seeds generated with the adapter on and off, the size of
the update in every layer, and the loss where it matters (by timestep), in `README.md` in the run's
folder.

matplotlib, behind `dbcore.utils.grids`, is imported where it draws: when the LoRA is saved, and
nobody waits for it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps

from dbcore.config import TrainConfig
from dbcore.engines.trained import Modules
from dbcore.models.embeddings import TokenFile, read_tokens
from dbcore.models.lora import adapter_layers, adapters_off
from dbcore.models.peft_adapters import weight_change
from dbcore.utils.files import home_folder, whole_file, write_whole

# Mean difference of images with and without the adapter, in grey levels of 255. Two renderings of
# one image in half and single precision differ by well under 1; a subject that is there differs
# by 10 or more.
VISIBLE = 2.0
BANDS = 5
ANIMATION = "training.gif"
FRAME, LAST_FRAME = 700, 2500  # milliseconds
Rows = list[list[Image.Image]]  # a row of images for each prompt
Records = list[dict[str, Any]]  # of log.jsonl, one a step
Generate = Callable[[list[str], list[int]], list[Image.Image]]
SECRETS = {"hub_token"}


@dataclass
class Evidence:
    """What the report measured.

    `difference`: grey levels, None without images; `update`: {layer: ||dW||_F / ||W||_F}.
    """

    difference: float | None
    update: dict[str, float]
    overall: float
    seconds: float
    memory: int
    memory_of: str

    @property
    def visible(self) -> bool:
        return self.difference is not None and self.difference >= VISIBLE

    def verdict(self) -> str:
        if self.difference is None:
            return ("No images were generated, as num_report_images is 0. "
                    f"The update is {self.overall:.2%} of the adapted layers' weights; "
                    "make some to see what that does.")
        words = ("the same prompts and seeds with the adapter on and off differ by "
                 f"{self.difference:.1f} of 255")
        if self.visible:
            return f"Yes, it changed the images: {words} grey levels on average."
        return (f"WARNING: nothing visible was learned: {words} grey levels on average "
                f"(visible: {VISIBLE:g}). Train for more steps, raise learning_rate or rank, "
                "and check that the prompt you generate with holds the words of instance_prompt.")


def write_report(modules: Modules, generate: Generate, config: TrainConfig, output_dir: str | Path,
                 history: Records, seconds: float) -> Evidence:
    """Measure what the run did, write the model card, and return the `Evidence`.

    `modules`: {name: network with LoRA layers}, those that were trained;
    `generate(prompts, seeds) -> list of PIL images`, one a pair, with the modules as they are;
    `config`: the run's TrainConfig; `history`: the records of log.jsonl, each {"step", "loss"} and,
    for the plot by band, "timesteps" and "losses", one value a sample; `seconds`: wall time of the
    run.
    """
    from dbcore.utils.grids import bar_plot, save_figure

    output_dir = Path(output_dir)
    prompts = report_prompts(config)
    seeds = range(config.num_report_images)
    difference = compare_images(output_dir / "report" / "on_off.png", modules, generate, prompts,
                                seeds) if seeds else None
    update, overall = update_sizes(modules)
    evidence = Evidence(difference, update, overall, seconds, *peak_memory())
    save_figure(output_dir / "report" / "update_by_layer.png",
                bar_plot(by_block(update), "size of the update, relative to the weights"))
    plot_loss(output_dir / "report" / "loss_by_timestep.png", history)
    animate(output_dir)
    write_whole(output_dir / "README.md", model_card(config, output_dir, evidence, prompts))
    return evidence


# Evidence -----------------------------------------------------------------------------------------

def report_prompts(config: TrainConfig) -> list[str]:
    """The instance prompt, then the validation prompts, without repeats; at most four."""
    asked = config.validation_prompt or []
    asked = [asked] if isinstance(asked, str) else list(asked)
    return list(dict.fromkeys([config.instance_prompt, *asked]))[:4]


def compare_images(path: Path, modules: Modules, generate: Generate, prompts: list[str],
                   seeds: Sequence[int]) -> float:
    """Generate without the adapter and with it, save both as a grid, and return how far they are
    apart in grey levels."""
    from dbcore.utils.grids import save_grid

    on, off = generate_on_and_off(modules, generate, prompts, seeds)
    rows = [images for pair in zip(off, on) for images in pair]
    labels = [f"{prompt}, {state}" for prompt in prompts for state in ("before", "after")]
    save_grid(path, rows, labels, [f"seed {seed}" for seed in seeds])
    return pixel_difference(on, off)


def generate_on_and_off(modules: Modules, generate: Generate, prompts: list[str],
                        seeds: Sequence[int]) -> tuple[Rows, Rows]:
    """Two lists (adapter on, adapter off) of one list of PIL images a prompt, one image a seed."""
    def rows():
        return [generate([prompt] * len(seeds), list(seeds)) for prompt in prompts]

    on = rows()
    with adapters_off(modules):
        return on, rows()


def lora_layers(modules: Modules) -> list[tuple[str, BaseTunerLayer]]:
    """[(network and module as one name, peft layer)] of {name: network}."""
    return [(f"{part}.{name}", layer) for part, module in modules.items()
            for name, layer in adapter_layers(module)]


@torch.no_grad()
def update_sizes(modules: Modules) -> tuple[dict[str, float], float]:
    """({layer: ||s B A||_F / ||W||_F}, the same over all adapted layers together)."""
    sizes, change, weight = {}, 0.0, 0.0
    for name, layer in lora_layers(modules):
        base_weight = layer.get_base_layer().weight
        delta = sum(weight_change(layer, adapter).square().sum().item()
                    for adapter in layer.active_adapters)
        norm = base_weight.float().square().sum().item()
        sizes[name] = (delta / norm) ** 0.5
        change, weight = change + delta, weight + norm
    return sizes, (change / weight) ** 0.5


def by_block(update: dict[str, float]) -> dict[str, float]:
    """{block and kind: mean size}: the hundred layers of a large network do not fit in one readable
    plot."""
    blocks: dict[str, list[float]] = {}
    for name, size in update.items():
        parts = name.split(".")
        kinds = [part for part in parts if part.startswith(("attn", "ff"))]
        # the network, its list of blocks, and which of them
        depth = 3 if parts[2:] and parts[2].isdigit() else 2
        blocks.setdefault(" ".join([".".join(parts[:depth]), *kinds[:1]]), []).append(size)
    return {name: float(np.mean(sizes)) for name, sizes in blocks.items()}


def pixel_difference(on: Rows, off: Rows) -> float:
    """Mean absolute difference in grey levels (0 to 255) of two equally shaped lists of lists of
    images."""
    pairs = [(a, b) for row_a, row_b in zip(on, off) for a, b in zip(row_a, row_b)]
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()
                          for a, b in pairs]))


def loss_by_band(history: Records, edges: Sequence[float]) -> dict[str, float]:
    """{band: mean loss} of the samples whose timestep lies in [edges[k], edges[k + 1]).

    The plain loss hardly falls in a DreamBooth run, because a step's loss depends far more on its
    timestep (how much noise was to be removed) than on what was learned. Within a band it can be
    compared.
    """
    samples = [pair for record in history
               for pair in zip(record.get("timesteps", []), record.get("losses", []))]
    bands = {}
    for low, high in pairwise(edges):
        inside = [loss for timestep, loss in samples if low <= timestep < high]
        if inside:
            name = f"t {low} to {high - 1}" if isinstance(high,
                                                          int) else f"t {low:.1f} to {high:.1f}"
            bands[name] = float(np.mean(inside))
    return bands


def band_edges(history: Records) -> list[float]:
    """Edges of `BANDS` equal bands of timesteps: whole numbers from 0, or in (0, 1), as they were
    logged."""
    times = [t for record in history for t in record.get("timesteps", [])]
    if all(isinstance(t, int) for t in times):
        return [round(edge) for edge in np.linspace(0, max(times, default=0) + 1, BANDS + 1)]
    return np.linspace(0, 1, BANDS + 1).tolist()


def plot_loss(path: Path, history: Records, parts: int = 6) -> None:
    """Loss over the run, a line a band of timesteps; where no timesteps were logged, the plain
    loss."""
    from dbcore.utils.grids import line_plot, save_figure

    edges = band_edges(history)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for rows in np.array_split(np.arange(len(history)), min(parts, len(history))):
        piece = [history[row] for row in rows]
        bands = loss_by_band(piece,
                             edges) or {"all timesteps": float(np.mean([r["loss"] for r in piece]))}
        for band, loss in bands.items():
            xs, ys = series.setdefault(band, ([], []))
            xs.append(float(np.mean([record["step"] for record in piece])))
            ys.append(loss)
    save_figure(path, line_plot(series, "step", "loss", "Loss by timestep (low t: little noise)"))


def animate(output_dir: Path) -> None:
    """`training.gif` of the validation grids, in order of steps; none where nothing was
    validated."""
    frames = [Image.open(path).convert("RGB") for path in validation_grids(output_dir)]
    if not frames:
        return
    # a longer title makes a grid wider, and all frames of a GIF have one size
    size = max(frame.width for frame in frames), max(frame.height for frame in frames)
    first, *rest = [ImageOps.pad(frame, size, color="white") for frame in frames]
    with whole_file(output_dir / ANIMATION) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=rest, loop=0,
                   duration=[FRAME] * len(rest) + [LAST_FRAME])


def peak_memory() -> tuple[int, str]:
    """(bytes, "GPU" or "process") at the highest point so far."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), "GPU"
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset, "process"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB
    return peak * (1 if sys.platform == "darwin" else 1024), "process"


# The model card -----------------------------------------------------------------------------------

def model_card(config: TrainConfig, output_dir: Path, evidence: Evidence,
               prompts: list[str]) -> str:
    """The text of README.md: front matter for the hub, then what was learned, how, from what."""
    base = base_facts(config.pretrained_model_name_or_path, config.revision)
    name = shown(config.pretrained_model_name_or_path)
    images = ["![before and after](report/on_off.png)"] if config.num_report_images else []
    sections = [
        f"# {config.instance_prompt}: a LoRA for {Path(name).name}",
        "Trained with DreamBooth and LoRA by dbcore.",
        "## Did it learn?", evidence.verdict(), *images, learned(evidence),
        "![loss](report/loss_by_timestep.png)", "![update](report/update_by_layer.png)",
        "## On the way", validation_links(output_dir),
        "## Use it", usage(name, config.instance_prompt, config.adapter,
                           read_tokens(output_dir)),
        "## The base", f"{name}. Licence: {base['license']}. {base['provenance']}",
        ("The photos it was trained on, and whoever they show, have rights of their own: "
         "ask before you share."),
        "## Settings", settings_table(config),
    ]
    return (f"---\n{front_matter(config, name, base, prompts)}\n---\n\n" + "\n\n".join(sections)
            + "\n")


def front_matter(config: TrainConfig, name: str, base: dict[str, str], prompts: list[str]) -> str:
    """YAML in the hub's words (https://huggingface.co/docs/hub/model-cards)."""
    return ModelCardData(
        base_model=Path(name).name if Path(config.pretrained_model_name_or_path).is_dir() else name,
        instance_prompt=config.instance_prompt,
        library_name="diffusers",
        license=base["license"] if base["license"] != "unknown" else "other",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "dreambooth", "template:sd-lora"],
        widget=[{"text": prompt, "output": {"url": "report/on_off.png"}} for prompt in prompts
                if config.num_report_images],
    ).to_yaml()


def base_facts(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """{"license", "provenance"} as the base's own card states them; nothing is guessed."""
    folder = Path(name_or_path)
    try:
        readme = folder / "README.md" if folder.is_dir() else hf_hub_download(
            name_or_path, "README.md", revision=revision)
        data = ModelCard(Path(readme).read_text(encoding="utf-8")).data.to_dict()
    except (OSError, HfHubHTTPError, ValueError):
        data = {}
    return {"license": str(data.get("license", "unknown")),
            "provenance": str(data.get("provenance",
                                       "Its card does not state what it was trained on."))}


def learned(evidence: Evidence) -> str:
    largest = max(evidence.update, key=evidence.update.__getitem__)
    size = f"{evidence.overall:.2%} of the adapted layers' weights (Frobenius norms)"
    memory = f"at most {evidence.memory / 1e9:.2f} GB ({evidence.memory_of})"
    return (f"- Size of the update: {size}; largest in `{largest}` "
            f"({evidence.update[largest]:.2%}).\n- Cost: {evidence.seconds:.0f} s, {memory}.")


def validation_links(output_dir: Path) -> str:
    """A link a validation image grid, in order of steps."""
    links = [f"[{int(path.parent.name.removeprefix('step-'))}]"
             f"({path.relative_to(output_dir).as_posix()})"
             for path in validation_grids(output_dir)]
    if not links:
        return "No validation was asked for."
    return (f"![the validation images over the steps]({ANIMATION})\n\n"
            f"Validation images after step {', '.join(links)}")


def validation_grids(output_dir: Path) -> list[Path]:
    """The grids of a run's validation images, in order of steps."""
    return sorted(output_dir.glob("validation/step-*/*grid*.png"))


def usage(name: str, prompt: str, adapter: str = "lora", tokens: TokenFile | None = None) -> str:
    if adapter != "lora":
        return (f"It is an adapter of the kind `{adapter}`, which no diffusers pipeline reads:\n\n"
                f"```\npython -m dbcore generate --checkpoint_dir . --prompt {quoted(prompt)}\n"
                "python -m dbcore export --lora . --format peft --output adapter\n```")
    words, tell = (tokens.spell(prompt), tokens.loading()) if tokens else (prompt, "")
    return f"""```python
from diffusers import DiffusionPipeline  # run in this folder

pipeline = DiffusionPipeline.from_pretrained({quoted(name)})
pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
{tell}pipeline({quoted(words)}).images[0]
```"""


def quoted(text: str) -> str:
    """Text as a Python string: JSON's escapes are Python's too."""
    return json.dumps(text, ensure_ascii=False)


def settings_table(config: TrainConfig) -> str:
    """One row a field of the config; secrets are left out, and no home folder is named."""
    rows = [f"| {field.name} | {shown(getattr(config, field.name))} |"
            for field in fields(config) if field.name not in SECRETS]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def shown(value: Any) -> str:
    """A value as text for others to read: paths in the working folder relative, below home from
    `~`, others by name."""
    text = str(value)
    if isinstance(value, (str, Path)) and Path(text).is_absolute():
        for parent, stands in ((Path.cwd(), ""), (home_folder(), "~/")):
            if parent and Path(text).is_relative_to(parent):
                return stands + Path(text).relative_to(parent).as_posix()
        return Path(text).name
    return text.replace("|", "\\|").replace("\n", " ")
