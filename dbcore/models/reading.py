"""Reading models from a folder or the Hugging Face hub: an error says which of the two failed, and
how."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from dbcore.config import ConfigError
from dbcore.utils.errors import DBCoreError

if TYPE_CHECKING:
    import torch

# the packages between us and the hub
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
# of a file of weights, and its variant
VARIANT = re.compile(r"[^.]+(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
# the first that fits, by the name of an exception's class or of one it was made from
ANSWERS = {
    "GatedRepoError": "the hub wants its terms accepted first: open its page there, "
    "then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no model of this name, or a private one: "
    "check the name, or `hf auth login`",
    "RevisionNotFoundError": "the hub has no such --revision of it",
    "HFValidationError": "there is no such folder, and the hub's models are called owner/name",
    "RemoteEntryNotFoundError": "the hub's model lacks this file",
    "OfflineModeIsEnabled": "it is not in the hub's cache, and HF_HUB_OFFLINE keeps it from "
    "being downloaded",
    "LocalEntryNotFoundError": "it is not in the hub's cache, and the hub could not be reached: "
    "check the network",
}


@contextlib.contextmanager
def reading(what: str, hint: Callable[[], str | None] | None = None) -> Iterator[None]:
    """Turn a file that is missing, damaged or out of reach into a ConfigError.

    `what` says so, such as "--pretrained_model_name_or_path x: its unet cannot be loaded";
    `hint()`, asked only then, adds what to do, or None.
    """
    try:
        yield
    except DBCoreError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError,
            HFValidationError) as error:
        more = hub_answer(error) or (hint and hint())
        raise ConfigError(f"{what} ({first_line(error)})" + f": {more}" * bool(more)) from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def hub_answer(error: BaseException) -> str | None:
    """What the hub, or the way to it, has to do with an error, in words; None where it is the
    folder's own."""
    kinds = [kind for e in causes(error) for kind in type(e).__mro__]
    names = {kind.__name__ for kind in kinds}
    answer = next((words for name, words in ANSWERS.items() if name in names), None)
    if answer is None and any(kind.__module__.split(".")[0] in NETWORK for kind in kinds):
        return "the hub failed or could not be reached: check the network, or give a folder"
    return answer


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def other_variant(name_or_path: str | Path, part: str, revision: str | None = None,
                  variant: str | None = None) -> str | None:
    """The words for a network whose only files are of another `variant`; None where that is not
    so."""
    names = file_names(name_or_path, part, revision)
    marks = {match[1] for name in names if (match := VARIANT.fullmatch(name))}
    if variant and None in marks:
        return f"it has no files of variant {variant}: leave --variant out"
    there = sorted(mark for mark in marks - {None, variant})
    return (f"all its files are of variant {there[0]}: add --variant {there[0]}" if there
            and None not in marks else None)


def not_finite(module: torch.nn.Module) -> str | None:
    """The name of the first weight with an infinite number or a NaN in it, or None."""
    import torch

    weights = ((name, weight) for name, weight in module.state_dict().items()
               if weight.is_floating_point() and weight.numel())
    return next((name for name, weight in weights
                 if not torch.stack(torch.aminmax(weight)).isfinite().all()), None)


def load_pipeline(option: str, name_or_path: str | Path, **more: Any) -> Any:
    """A whole stock pipeline, in whichever variant its folder has.

    Raises ConfigError, which names the option.
    """
    from diffusers import DiffusionPipeline

    marks = {VARIANT.fullmatch(path.name) for path in Path(name_or_path).glob("*/*.safetensors")}
    variants = {mark and mark[1] for mark in marks}
    only = variants.pop() if len(variants) == 1 else None
    with reading(f"{option} {name_or_path}: no pipeline can be loaded from it"):
        DiffusionPipeline.load_config(name_or_path)  # which says more clearly that there is nothing
        pipeline = DiffusionPipeline.from_pretrained(name_or_path, variant=only, **more)
    check_finite(pipeline, f"{option} {name_or_path}")
    return pipeline


def check_finite(pipeline: Any, what: str) -> None:
    """Raises ConfigError where a network of a stock pipeline has a weight that is not finite."""
    import torch

    for name, part in pipeline.components.items():
        odd = isinstance(part, torch.nn.Module) and not_finite(part)
        if odd:
            raise ConfigError(f"{what}: {odd} of its {name} has numbers that are not "
                              "finite, and images would be black")


def file_names(name_or_path: str | Path, part: str, revision: str | None = None) -> list[str]:
    """The files of a network in a pipeline's folder, or on the hub where that answers."""
    if (folder := Path(name_or_path, part)).is_dir():
        return [path.name for path in folder.iterdir()]
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # a hint is not worth an error of its own
        files = HfApi().list_repo_files(str(name_or_path), revision=revision)
        return [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
    return []
