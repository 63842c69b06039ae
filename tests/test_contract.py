"""The contract of model families: what the rooms above `models` must not know."""

import ast
import re
from pathlib import Path

import pytest

ROOMS = ("engines", "datasets", "tools")
# What would betray a family. Options that users know (--train_text_encoder, --text_encoder_lr) may
# be named, and roles (text_encoders, autoencoder, denoiser), which every family has.
BETRAYED = re.compile(
    r"\b((unet|UNet)\w*|vae|transformer|text_encoder(_\d)?|CLIPText\w+|AutoencoderKL\w*|alphas_cumprod"
    r"|(num_)?train_timesteps|noise_scheduler|encoder_hidden_states|prompt_embeds|added_cond_kwargs"
    r"|latent_channels|in_channels|scaling_factor|shift_factor|attn[12]|(down|mid|up)_blocks?"
    r"|StableDiffusion\w*|Flux\w*)\b")  # fmt: skip


def betrayals(path):
    """Its lines, with their numbers, that name a part of one family."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [f"{path.name}:{number}: {line.strip()}" for number, line in lines
            if BETRAYED.search(line)]


def sources():
    return sorted(path for room in ROOMS for path in Path("dbcore", room).glob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_engines_datasets_and_tools_know_no_family(path):
    assert betrayals(path) == []


@pytest.mark.parametrize("line", [
    "unet = base.unet", 'getattr(base, "vae")', "base.text_encoder(ids)", 'release("text_encoder")',
    "t = randint(noise_scheduler.config.num_train_timesteps)",
    "from diffusers import UNet2DConditionModel",
])  # fmt: skip
def test_a_line_that_names_a_part_is_found(line, tmp_path):
    (tmp_path / "engine.py").write_text(f"x = 1\n{line}\n")
    assert betrayals(tmp_path / "engine.py") == [f"engine.py:2: {line}"]


def test_options_and_roles_are_no_betrayal(tmp_path):
    (tmp_path / "engine.py").write_text(
        "config.train_text_encoder, config.text_encoder_lr\nbase.text_encoders, base.denoiser\n")
    assert betrayals(tmp_path / "engine.py") == []


# --- type hints, which mypy then checks -----------------------------------------------------------

# Notebooks 02 and 05 show the source of these two, as it is stored.
SHOWN = {"add_lora", "set_scale"}


def public(tree):
    """The public functions and methods of a module: [(name, node, is it a method?)]."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                        not method.name.startswith("_") or method.name in ("__init__", "__call__")):
                    yield f"{node.name}.{method.name}", method, True


def unhinted(path):
    """Names of a file's public functions that leave the type of an argument or result open."""
    for name, node, is_method in public(ast.parse(path.read_text(encoding="utf-8"))):
        static = any(ast.unparse(line) == "staticmethod" for line in node.decorator_list)
        given = [*node.args.posonlyargs, *node.args.args][is_method and not static:]
        given += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        open_ = [argument.arg for argument in given if argument.annotation is None]
        if name not in SHOWN and (open_ or (node.returns is None and node.name != "__init__")):
            yield name


@pytest.mark.parametrize("path", sorted(Path("dbcore").rglob("*.py")), ids=str)
def test_public_functions_say_their_types(path):
    assert list(unhinted(path)) == []


def test_a_function_without_hints_is_found(tmp_path):
    (tmp_path / "a.py").write_text(
        "def f(x: int): ...\ndef g(x) -> int: ...\ndef h(x: int) -> int: ...\ndef _i(x): ...\n"
        "class A:\n    def __init__(self): ...\n    def b(self, *c) -> int: ...\n"
        "    @staticmethod\n    def d(e) -> int: ...\n")
    assert list(unhinted(tmp_path / "a.py")) == ["f", "g", "A.b", "A.d"]
