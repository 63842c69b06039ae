"""What is computed once and read many times: latents and text embeddings, kept on disk, not in
memory."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from dbcore.config import need
from dbcore.utils.devices import to_device
from dbcore.utils.files import writing

if TYPE_CHECKING:
    from dbcore.models.base import Family

NEAR = 16  # encoded prompts that are kept on the device; one of FLUX.2's has 16 MB


def scratch() -> str:
    """The words for the folder of temporary files, which few people know the place of."""
    return (f"the folder for temporary files ({tempfile.tempdir or 'none found'}; "
            "TMPDIR names another)")


class TensorStore:
    """Dicts of float tensors by key, in one nameless temporary file that goes when the store goes.

    5,000 photos' latents are some 650 MB at 512 pixels; read back one sample at a time from the
    disk's cache they cost the training no time and no memory. Nothing outlives the run, so nothing
    gets stale.
    """

    def __init__(self):
        with writing(scratch()):
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the store
        self.where = {}  # key -> (first byte, how many)

    def __contains__(self, key):
        return key in self.where

    def put(self, key: Hashable, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep {name: tensor} under `key`, as float32."""
        data = save({name: tensor.detach().float().cpu().contiguous()
                     for name, tensor in tensors.items()})
        with writing(scratch()):
            self.where[key] = self.file.seek(0, 2), self.file.write(data)
            self.file.flush()

    def get(self, key: Hashable) -> dict[str, torch.Tensor]:
        """{name: tensor}, as it was put, on the CPU."""
        first, count = self.where[key]
        self.file.seek(first)
        return load(self.file.read(count))


class PromptCache:
    """Prompts as a base's frozen text encoders encode them: each once, alone.

    It belongs to a run, not to the base, and holds what it was told to `add`.
    """

    def __init__(self, base: Family, prompts: Iterable[str] = ()):
        self.base, self.store = base, TensorStore()
        self.near: dict[str, dict[str, torch.Tensor]] = {}  # on the device
        self.add(prompts)

    @torch.no_grad()
    def add(self, prompts: Iterable[str]) -> None:
        """From now on no text encoder is needed for these prompts.

        Raises ConfigError while one has a LoRA or learns new tokens, and may change at any time.
        """
        need(not self.base.text_varies, "a prompt's encoding cannot be kept while the text "
             "encoder has a LoRA or learns new tokens: add it before")
        for prompt in prompts:
            if prompt not in self.store:
                cond = self.base.encode_text([prompt])
                self.store.put(prompt, {name: tensor[0] for name, tensor in cond.items()})

    def encode(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """As `Family.encode_text`, which is asked where one of the prompts is not held.

        While a text encoder has a LoRA or learns new tokens, all are encoded anew.
        """
        prompts = list(prompts)
        if self.base.text_varies or any(prompt not in self.store for prompt in prompts):
            return self.base.encode_text(prompts)
        rows = [self.recall(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def recall(self, prompt: str) -> dict[str, torch.Tensor]:
        """The encoding of one that is held; the few that come at each step stay on the device."""
        if prompt not in self.near:
            if len(self.near) == NEAR:
                self.near.clear()
            self.near[prompt] = to_device(self.store.get(prompt), self.base.device)
        return self.near[prompt]
