"""Which weights a base has, told from its files: nothing is loaded, and no library's names are
used."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

HEAD = 1024  # bytes of each tensor: training changes every one of them
INDEX = "model_index.json"
NO_WEIGHTS = {"safety_checker", "feature_extractor"}  # parts that neither train nor draw


def fingerprint(name_or_path: str | Path, revision: str | None = None,
                variant: str | None = None) -> str:
    """Hex digest of a pipeline's weights (the first bytes of every tensor): other weights have
    another one.

    It depends neither on where the base lies nor on what its tensors are called, which versions of
    transformers disagree on, nor on what lies beside the pipeline, such as metric encoders; a copy
    in another precision has another one. A hub's base is looked up in the cache, or downloaded.
    """
    digest = hashlib.sha256()
    for part in sorted(weight_files(name_or_path, revision, variant)):
        digest.update(part.parent.name.encode())
        for head in sorted(tensor_heads(part)):
            digest.update(head)
    return digest.hexdigest()


def weight_files(name_or_path: str | Path, revision: str | None, variant: str | None) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: those of `variant`, or those of none."""
    wanted = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(name_or_path), revision=revision,
                                        allow_patterns=[wanted, INDEX],
                                        ignore_patterns=None if variant else "*/*.*.safetensors"))
    parts = json.loads((folder / INDEX).read_text(encoding="utf-8")).keys() - NO_WEIGHTS
    found = [path for path in folder.glob(wanted) if path.parent.name in parts]
    return found if variant else [path for path in found if "." not in path.stem]


def tensor_heads(path: Path) -> Iterator[bytes]:
    """Digests of the floating-point tensors of a safetensors file, by their type, size and first
    numbers."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, tensor in header.items():
            # integers number tokens; some versions leave them out
            if name == "__metadata__" or "F" not in tensor["dtype"]:
                continue
            first, last = tensor["data_offsets"]
            file.seek(8 + length + first)
            head = file.read(min(HEAD, last - first))
            yield hashlib.sha256(f"{tensor['dtype']} {last - first} ".encode() + head).digest()
