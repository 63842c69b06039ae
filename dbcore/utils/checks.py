"""Exercises that mark themselves: `check_...` runs the learner's function and says what it saw.

One function an exercise, named `check_<notebook>_<exercise>`. It raises `NotYet` through `expect` or `same`,
or returns what is right; `exercise` turns either, and any mistake in the learner's code, into a `Verdict`,
which prints itself as the last value of a cell and counts as True or False.
"""

import functools
from types import SimpleNamespace

import numpy as np

CHECKS = {}


class NotYet(Exception):
    """The answer is not there yet; the message says what was seen and what was expected."""


class Verdict:
    """'Right: ...' or 'Not yet: ...'; true if right."""

    def __init__(self, right, message):
        self.right, self.message = right, message

    def __bool__(self):
        return self.right

    def __repr__(self):
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


def exercise(check):
    """Decorator: register a check and let it return a `Verdict`, whatever the learner's code does."""

    @functools.wraps(check)
    def verdict(*answers):
        if any(answer is None or answer is Ellipsis for answer in answers):
            return Verdict(False, "nothing to look at yet; put your answer in the place of the dots.")
        try:
            return Verdict(True, check(*answers))
        except NotYet as reason:
            return Verdict(False, str(reason))
        except Exception as error:  # noqa: BLE001 - a learner's first try may raise anything
            return Verdict(False, f"your code stopped with {type(error).__name__}: {error}")

    CHECKS[check.__name__] = verdict
    return verdict


def expect(condition, message):
    """Raise `NotYet(message)` unless `condition`."""
    if not condition:
        raise NotYet(message)


def same(got, wanted, what, tolerance=1e-4):
    """Raise `NotYet` unless `got` is a number, array or tensor like `wanted`, to `tolerance` of its size."""
    expect(got is not None and got is not Ellipsis, f"{what} gives nothing yet; does your function return it?")
    got, wanted = _array(got), _array(wanted)
    expect(got.dtype.kind in "biuf", f"{what} is not made of numbers.")
    expect(got.shape == wanted.shape, f"{what} has shape {got.shape}; expected {wanted.shape}.")
    expect(np.isfinite(got).all(), f"{what} holds infinite values or NaN.")
    worst = float(np.abs(got - wanted).max(initial=0))
    allowed = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
    expect(worst <= allowed, f"{what} {_compared(got, wanted)}.")


def _array(values):
    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    array = np.asarray(values)
    return array.astype(float) if array.dtype.kind in "biuf" else array


def _compared(got, wanted):
    if got.size == 1:
        return f"is {got.item():.4g}; expected {wanted.item():.4g}"
    k = int(np.abs(got - wanted).argmax())
    return f"is off most at entry {k}: {got.flat[k]:.4g}; expected {wanted.flat[k]:.4g}"


# --- 00 ---


@exercise
def check_00_room(room):
    def tokenizer(prompt):
        return SimpleNamespace(input_ids=["start", *prompt.split(), "end"])

    tokenizer.model_max_length = 24
    same(room(tokenizer, "a photo of a dog"), 17, "with room for 24 tokens, room(tokenizer, 'a photo of a dog')")
    tokenizer.model_max_length = 77
    same(room(tokenizer, ""), 75, "with room for 77 tokens, room(tokenizer, '')")
    return "the two marks take their places too."


@exercise
def check_00_clean(clean):
    import torch

    x0, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for abar in torch.tensor([0.9, 0.5, 0.05]):
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        same(clean(x_t, noise, abar), x0, f"clean(x_t, noise, {abar.item():.2g})", tolerance=1e-3)
    return "whoever knows the noise knows the picture. That is why a network need only learn the noise."


@exercise
def check_00_guided(guided):
    import torch

    wanted, unwanted = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    same(guided(wanted, unwanted, 1.0), wanted, "guided(wanted, unwanted, 1)")
    same(guided(wanted, wanted, 7.5), wanted, "guided(wanted, wanted, 7.5)")
    same(guided(wanted, unwanted, 0.0), unwanted, "guided(wanted, unwanted, 0)")
    same(guided(wanted, unwanted, 4.0), 4 * wanted - 3 * unwanted, "guided(wanted, unwanted, 4)", tolerance=1e-3)
    return "with w = 1 it is the wanted answer alone; where both agree, guidance changes nothing."


# --- 01 ---


@exercise
def check_01_corner(corner):
    same(corner(60, 40, 120), 40, "a square of 40 around 60, on a side of 120: corner(60, 40, 120)")
    same(corner(10, 40, 120), 0, "near the left edge: corner(10, 40, 120)")
    same(corner(115, 40, 120), 80, "near the right edge, where the square must end at 120: corner(115, 40, 120)")
    same(corner(30, 120, 120), 0, "a square as long as the side: corner(30, 120, 120)")
    return "around the subject where that is possible, and always inside the photo."


@exercise
def check_01_twins(twins):
    prints = [np.array(list(map(int, bits))) for bits in ("00000000", "11110000", "00000001", "11110111")]
    found = [tuple(pair) for pair in twins(prints, 2)]
    expect((0, 0) not in found, "Every photo is the twin of itself; leave those pairs out.")
    expect((0, 2) in found, "Photos 0 and 2 differ in one sign of eight; with limit 2 they are twins.")
    expect((2, 0) not in found, "(0, 2) and (2, 0) are the same pair; give it once, the smaller number first.")
    expect((1, 3) not in found, "Photos 1 and 3 differ in three signs; with limit 2 they are no twins.")
    expect(found == [(0, 2)], f"found {found}; expected [(0, 2)]")
    same(len(twins(prints, 4)), 2, "the number of pairs with limit 4")
    return "each pair is compared once, and only near copies are named."


@exercise
def check_01_prompts(prompts):
    answer = prompts("sks", "teapot")
    expect(isinstance(answer, tuple) and len(answer) == 2, "Return two sentences: with the word, and without it.")
    named, plain = answer
    expect("sks" not in plain, "The class prompt speaks of any teapot, so the word must not be in it.")
    expect(named == "a photo of sks teapot", f"the first is {named!r}; expected 'a photo of sks teapot'")
    expect(plain == "a photo of a teapot", f"the second is {plain!r}; expected 'a photo of a teapot'")
    expect(prompts("ohwx", "owl")[1] == "a photo of an owl", "It should say 'an owl', not 'a owl'.")
    return "the same sentence twice; the word stands where the article was."


# --- 02 ---


def _factors(d, k, rank, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((d, k), (rank, k), (d, rank))]


@exercise
def check_02_layer(lora_layer):
    import torch

    W, A, B = _factors(5, 7, 2, 0)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    same(lora_layer(x, W, A, 0 * B, 4), x @ W.T, "with B = 0, where it should be W x alone,")
    same(lora_layer(x, W, A, B, 2), x @ (W + B @ A).T, "with alpha = rank, where it should be (W + B A) x,")
    same(lora_layer(x, W, A, B, 6), x @ (W + 3 * B @ A).T, "with alpha = 3 rank, where it should be (W + 3 B A) x,")
    return "two thin products beside the old one, times alpha / rank."


@exercise
def check_02_merge(merged):
    W, A, B = _factors(5, 7, 2, 2)
    _, A2, B2 = _factors(5, 7, 4, 3)
    before = W.clone()
    same(merged(W, []), W, "without any LoRA the weight")
    same(merged(W, [(A, B, 2, 1.0)]), W + B @ A, "with one LoRA at alpha = rank the weight")
    same(merged(W, [(A, B, 1, 0.5), (A2, B2, 8, 2.0)]), W + 0.25 * B @ A + 4 * B2 @ A2, "with two LoRAs the weight")
    expect(bool((W == before).all()), "W itself was changed: write W = W + ..., not W += ..., to leave the base alone.")
    return "updates add up; that is why LoRAs can be mixed, and taken out again."


@exercise
def check_02_breakeven(largest_rank):
    for d, k in ((320, 320), (320, 768), (96, 64), (1280, 1280)):
        rank = largest_rank(d, k)
        expect(rank is not None, "largest_rank gives nothing yet; does it return a number?")
        expect(float(rank).is_integer(), f"A rank is a whole number; largest_rank({d}, {k}) is {rank}.")
        expect(rank * (d + k) < d * k, f"At rank {rank} a LoRA on ({d}, {k}) has {rank * (d + k):,.0f} numbers, and the "
               f"layer has {d * k:,}: no longer smaller.")
        expect((rank + 1) * (d + k) >= d * k, f"Rank {rank + 1} would still be smaller than a ({d}, {k}) layer.")
    return "for a square layer that is just under half its side; a LoRA of rank 4 is far from it."


@exercise
def check_02_rank(rank_for):
    import torch

    left, right = (torch.linalg.qr(matrix)[0] for matrix in _factors(6, 6, 1, 4)[:1] + _factors(6, 6, 1, 5)[:1])
    update = left @ torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0, 0.0])) @ right  # squares: 16, 4, 4, 1, of 25
    for share, rank in ((0.5, 1), (0.7, 2), (0.9, 3), (0.999, 4)):
        got = rank_for(update, share)
        expect(got is not None, "rank_for gives nothing yet; does it return a number?")
        expect(got == rank, f"the singular values are 4, 2, 2, 1, 0, 0; to keep {share:.1%} of their squares takes "
               f"rank {rank}, not {got}.")
    return "the smallest rank that keeps enough, read off the spectrum."


# --- 05 ---


@exercise
def check_05_calls(looks):
    same(looks(1, 25, 1.0), 25, "one picture of 25 steps without guidance")
    same(looks(1, 25, 4.0), 50, "one picture of 25 steps with guidance 4, asked twice a step,")
    same(looks(6, 20, 7.5), 240, "six pictures of 20 steps with guidance")
    return "steps and guidance are what you pay for; the scale costs nothing."


@exercise
def check_05_right_scale(right_scale):
    same(right_scale(16, 16), 1.0, "right_scale(alpha=16, rank=16)")
    same(right_scale(8, 16), 0.5, "right_scale(alpha=8, rank=16)")
    same(right_scale(1, 64), 1 / 64, "right_scale(alpha=1, rank=64)")
    return "alpha / rank, as in training. A file whose alpha is lost comes out too strong or too weak."


@exercise
def check_05_side_by_side(side_by_side):
    _, A1, B1 = _factors(5, 7, 2, 6)
    _, A2, B2 = _factors(5, 7, 3, 7)
    answer = side_by_side(A1, B1, 0.6, A2, B2, 0.4)
    expect(isinstance(answer, (tuple, list)) and len(answer) == 2, "Return two matrices: A, B.")
    A, B = answer
    expect(tuple(A.shape) == (5, 7), f"A has shape {tuple(A.shape)}; with ranks 2 and 3, and 7 numbers in, expected (5, 7).")
    expect(tuple(B.shape) == (5, 5), f"B has shape {tuple(B.shape)}; with 5 numbers out and rank 5, expected (5, 5).")
    same(B @ A, 0.6 * B1 @ A1 + 0.4 * B2 @ A2, "B A")
    return "ranks add up, and each scale goes into one factor, once."


@exercise
def check_05_kohya(kohya_name):
    name = kohya_name("mid_block.attentions.0.proj_in")
    expect(isinstance(name, str), "Return a string.")
    expect(name.startswith("lora_unet_"), f"{name!r} should begin with lora_unet_")
    expect(name.endswith(".lora_down.weight"), f"{name!r} should end with .lora_down.weight, after the one dot that stays")
    wanted = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    expect(name == wanted, f"{name!r}; expected {wanted!r}")
    return "every dot of the module's name has become an underscore."
