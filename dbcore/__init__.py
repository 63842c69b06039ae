"""DreamBooth + LoRA: teach a text-to-image model a new subject."""

import logging
from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
# A wheel carries data/ inside the package; a clone has it beside the package.
DATA = _here / "data" if (_here / "data").is_dir() else _here.parent / "data"
TOY_BASE = DATA / "toy_base"
SUBJECTS = DATA / "subjects"

# Where bitsandbytes is installed, peft's import brings it, and it warns of 4-bit kernels that
# nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
