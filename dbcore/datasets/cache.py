"""What is computed once and read many times: latents and text embeddings, kept on disk, not in
memory."""

import tempfile
from collections.abc import Hashable, Mapping

import numpy as np
import torch

from dbcore.utils.files import writing


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
        self.where = {}  # key -> [(name, offset, shape), ...]

    def __contains__(self, key):
        return key in self.where

    def put(self, key: Hashable, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep {name: tensor} under `key`, as float32."""
        entry = []
        self.file.seek(0, 2)
        with writing(scratch()):
            for name, tensor in tensors.items():
                entry.append((name, self.file.tell(), tuple(tensor.shape)))
                self.file.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self.file.flush()
        self.where[key] = entry

    def get(self, key: Hashable, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """{name: tensor}, as it was put."""
        tensors = {}
        for name, offset, shape in self.where[key]:
            self.file.seek(offset)
            count = int(np.prod(shape))
            numbers = np.frombuffer(bytearray(self.file.read(4 * count)), dtype=np.float32)
            tensors[name] = torch.from_numpy(numbers).reshape(shape).to(device)
        return tensors
