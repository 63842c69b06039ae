"""Exercises that check themselves: `check_...` runs the learner's function and says what it saw.

One function an exercise, named `check_<notebook>_<exercise>`. It raises `NotYet` through `expect`
or `same`, or returns what is right; `exercise` turns either, and any mistake in the learner's code,
into a `Verdict`, which prints itself as the last value of a cell and counts as True or False.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

CHECKS: dict[str, Callable] = {}


class NotYet(Exception):
    """The answer is not there yet; the message says what was seen and what was expected."""


class Verdict:
    """'Right: ...' or 'Not yet: ...'; true if right."""

    def __init__(self, right: bool, message: str):
        self.right, self.message = right, message

    def __bool__(self):
        return self.right

    def __repr__(self):
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


def exercise(check: Callable[..., str]) -> Callable[..., Verdict]:
    """Decorator: register a check and let it return a `Verdict`, whatever the learner's code
    does."""

    @functools.wraps(check)
    def verdict(*answers):
        if any(answer is None or answer is Ellipsis for answer in answers):
            return Verdict(False,
                           "nothing to look at yet; put your answer in the place of the dots.")
        try:
            return Verdict(True, check(*answers))
        except NotYet as reason:
            return Verdict(False, str(reason))
        except Exception as error:  # noqa: BLE001 - a learner's first try may raise anything
            return Verdict(False, f"your code stopped with {type(error).__name__}: {error}")

    CHECKS[check.__name__] = verdict
    return verdict


def expect(condition: object, message: str) -> None:
    """Raise `NotYet(message)` unless `condition`."""
    if not condition:
        raise NotYet(message)


def same(got: Any, wanted: Any, what: str, tolerance: float = 1e-4) -> None:
    """Raise `NotYet` unless `got` is a number, array or tensor like `wanted`, to `tolerance` of its
    size."""
    expect(got is not None and got is not Ellipsis,
           f"{what} gives nothing yet; does your function return it?")
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
def check_00_room(room: Callable) -> str:
    class Tokenizer:
        model_max_length = 24

        def __call__(self, prompt):
            return SimpleNamespace(input_ids=["start", *prompt.split(), "end"])

    tokenizer = Tokenizer()
    same(room(tokenizer, "a photo of a dog"), 17,
         "with room for 24 tokens, room(tokenizer, 'a photo of a dog')")
    tokenizer.model_max_length = 77
    same(room(tokenizer, ""), 75, "with room for 77 tokens, room(tokenizer, '')")
    return "the two special tokens take up room too."


@exercise
def check_00_clean(clean: Callable) -> str:
    import torch

    x0, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for abar in torch.tensor([0.9, 0.5, 0.05]):
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        same(clean(x_t, noise, abar), x0, f"clean(x_t, noise, {abar.item():.2g})", tolerance=1e-3)
    return ("if you know the noise, you know the image. That is why it is enough for a network "
            "to predict the noise.")


@exercise
def check_00_guided(guided: Callable) -> str:
    import torch

    wanted, unwanted = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    same(guided(wanted, unwanted, 1.0), wanted, "guided(wanted, unwanted, 1)")
    same(guided(wanted, wanted, 7.5), wanted, "guided(wanted, wanted, 7.5)")
    same(guided(wanted, unwanted, 0.0), unwanted, "guided(wanted, unwanted, 0)")
    same(guided(wanted, unwanted, 4.0), 4 * wanted - 3 * unwanted, "guided(wanted, unwanted, 4)",
         tolerance=1e-3)
    return ("with w = 1 only the wanted prediction is left; where both agree, guidance changes "
            "nothing.")


# --- 01 ---


@exercise
def check_01_corner(corner: Callable) -> str:
    same(corner(60, 40, 120), 40, "a square of 40 around 60, on a side of 120: corner(60, 40, 120)")
    same(corner(10, 40, 120), 0, "near the left edge: corner(10, 40, 120)")
    same(corner(115, 40, 120), 80, "near the right edge, where the square must end at 120: "
         "corner(115, 40, 120)")
    same(corner(30, 120, 120), 0, "a square as long as the side: corner(30, 120, 120)")
    return "around the subject if possible, and always inside the photo."


@exercise
def check_01_twins(twins: Callable) -> str:
    prints = [np.array(list(map(int, bits)))
              for bits in ("00000000", "11110000", "00000001", "11110111")]
    pairs = twins(prints, 2)
    expect(isinstance(pairs, list),
           "Return a list of pairs, [(i, j), ...]; an empty one if there are no twins.")
    found = [tuple(pair) for pair in pairs]
    expect((0, 0) not in found, "Every photo is the twin of itself; leave those pairs out.")
    expect((0, 2) in found,
           "Photos 0 and 2 differ in one sign of eight; with limit 2 they are twins.")
    expect((2, 0) not in found,
           "(0, 2) and (2, 0) are the same pair; give it once, the smaller number first.")
    expect((1, 3) not in found,
           "Photos 1 and 3 differ in three signs; with limit 2 they are not twins.")
    expect(found == [(0, 2)], f"found {found}; expected [(0, 2)]")
    same(len(twins(prints, 4)), 2, "the number of pairs with limit 4")
    return "each pair is compared once, and only near copies are named."


@exercise
def check_01_prompts(prompts: Callable) -> str:
    answer = prompts("sks", "teapot")
    expect(isinstance(answer, tuple) and len(answer) == 2,
           "Return two sentences: with the word, and without it.")
    named, plain = answer
    expect("sks" not in plain,
           "The class prompt is about any teapot, so the identifier must not be in it.")
    expect(named == "a photo of sks teapot",
           f"the first is {named!r}; expected 'a photo of sks teapot'")
    expect(plain == "a photo of a teapot",
           f"the second is {plain!r}; expected 'a photo of a teapot'")
    expect(prompts("ohwx", "owl")[1] == "a photo of an owl", "It should say 'an owl', not 'a owl'.")
    return "the same sentence twice; the identifier takes the place of the article."


# --- 02 ---


def _factors(d, k, rank, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((d, k), (rank, k), (d, rank))]


@exercise
def check_02_layer(lora_layer: Callable) -> str:
    import torch

    W, A, B = _factors(5, 7, 2, 0)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    same(lora_layer(x, W, A, 0 * B, 4), x @ W.T, "with B = 0, where it should be W x alone,")
    same(lora_layer(x, W, A, B, 2), x @ (W + B @ A).T,
         "with alpha = rank, where it should be (W + B A) x,")
    same(lora_layer(x, W, A, B, 6), x @ (W + 3 * B @ A).T,
         "with alpha = 3 rank, where it should be (W + 3 B A) x,")
    return "the old product, plus two thin ones times alpha / rank."


@exercise
def check_02_merge(merged: Callable) -> str:
    W, A, B = _factors(5, 7, 2, 2)
    _, A2, B2 = _factors(5, 7, 4, 3)
    before = W.clone()
    same(merged(W, []), W, "without any LoRA the weight")
    same(merged(W, [(A, B, 2, 1.0)]), W + B @ A, "with one LoRA at alpha = rank the weight")
    same(merged(W, [(A, B, 1, 0.5), (A2, B2, 8, 2.0)]), W + 0.25 * B @ A + 4 * B2 @ A2,
         "with two LoRAs the weight")
    expect(bool((before == W).all()),
           "W itself was changed: write W = W + ..., not W += ..., to leave the base alone.")
    return "updates add up; that is why LoRAs can be mixed, and removed again."


@exercise
def check_02_breakeven(largest_rank: Callable) -> str:
    for d, k in ((320, 320), (320, 768), (96, 64), (1280, 1280)):
        rank = largest_rank(d, k)
        expect(rank is not None, "largest_rank gives nothing yet; does it return a number?")
        expect(float(rank).is_integer(),
               f"A rank is a whole number; largest_rank({d}, {k}) is {rank}.")
        expect(rank * (d + k) < d * k,
               f"At rank {rank} a LoRA on ({d}, {k}) has {rank * (d + k):,.0f} numbers, and the "
               f"layer has {d * k:,}: no longer smaller.")
        expect((rank + 1) * (d + k) >= d * k,
               f"Rank {rank + 1} would still be smaller than a ({d}, {k}) layer.")
    return "for a square layer this is just under half of its side; rank 4 is far below it."


@exercise
def check_02_rank(rank_for: Callable) -> str:
    import torch

    left, right = (torch.linalg.qr(_factors(6, 6, 1, seed)[0])[0] for seed in (4, 5))
    # squares: 16, 4, 4, 1, of 25
    update = left @ torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0, 0.0])) @ right
    for share, rank in ((0.5, 1), (0.7, 2), (0.9, 3), (0.999, 4)):
        got = rank_for(update, share)
        expect(got is not None, "rank_for gives nothing yet; does it return a number?")
        expect(got == rank, f"the singular values are 4, 2, 2, 1, 0, 0; to keep {share:.1%} of "
               f"their squares takes rank {rank}, not {got}.")
    return "the smallest rank that keeps enough, read from the singular values."


# --- 03 ---


@exercise
def check_03_loss(two_part_loss: Callable) -> str:
    import torch

    numbers = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(4, 2, 3, 3, generator=numbers) for _ in range(2))
    errors = (prediction - target).square().mean(dim=(1, 2, 3))
    own, of_class = errors[:2].mean(), errors[2:].mean()
    same(two_part_loss(prediction, target, 0.0), own, "with lambda = 0, the subject's part alone,")
    got = two_part_loss(prediction, target, 1.0)
    expect(abs(float(got) - float(errors.mean())) > 1e-4,
           "With lambda = 1 you have the mean over all four: the parts are two means, added.")
    same(got, own + of_class, "with lambda = 1, the loss")
    same(two_part_loss(prediction, target, 0.3), own + 0.3 * of_class,
         "with lambda = 0.3, the loss")
    return "the subject's mean error plus lambda times the class's."


@exercise
def check_03_diversity(diversity_of: Callable) -> str:
    right_angles = np.eye(4)
    same(diversity_of(np.ones((3, 4)) / 2), 0.0, "for three times the same image it")
    got = diversity_of(right_angles)
    expect(got is not None and abs(float(got) - 0.75) > 1e-4,
           "For four vectors at right angles it is 0.75; expected 1. Leave out the pairs of a "
           "vector with itself.")
    same(got, 1.0, "for four vectors at right angles it")
    spread = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    same(diversity_of(spread), 1 - (0.8 + 0.6 + 0.96) / 3, "for cosines of 0.8, 0.6 and 0.96 it")
    return "one minus the mean cosine of different images."


@exercise
def check_03_name(folder_name: Callable) -> str:
    about = {"base": "4f1a", "prompt": "a photo of a dog", "resolution": 64, "seed": 0}
    name = folder_name(about)
    expect(isinstance(name, str) and name, f"folder_name gives {name!r}; expected some text.")
    expect(len(name) <= 64 and not set(name) & set('/\\: "'),
           "The name has to be a folder's: short, without / \\ : or spaces.")
    expect(folder_name(dict(about)) == name, "Twice the same entries have two names.")
    expect(folder_name(dict(reversed(about.items()))) == name,
           "The same entries in another order have another name.")
    for key, other in (("base", "90cc"), ("prompt", "a photo of a cat"), ("resolution", 128),
                       ("seed", 1)):
        expect(folder_name({**about, key: other}) != name,
               f"Another {key} has the same name: its images get mixed up.")
    return "the same name for the same images, and another name for all others."


# --- 04 ---


@exercise
def check_04_combine(combined: Callable) -> str:
    gradients = [np.array([1.0, -2.0]), np.array([3.0, 2.0]), np.array([5.0, 0.0])]
    got = combined(gradients, [2, 2, 2])
    if got is not None and np.shape(got) == (2,):
        expect(not np.allclose(got, [9.0, 0.0]),
               "That is their sum: the step would grow with the number of batches.")
    same(got, [3.0, 0.0], "for three batches of two photos it")
    same(combined(gradients, [4, 4, 1]), [(4 + 12 + 5) / 9, 0.0],
         "for batches of 4, 4 and 1 photos it")
    return "a mean over all photos, however they are divided into batches."


@exercise
def check_04_scale(smallest_scale: Callable) -> str:
    for gradient in (1e-8, 3e-9, 2e-5, 6.5e-8):
        scale = smallest_scale(gradient)
        expect(scale is not None, "smallest_scale gives nothing yet; does it return a number?")
        power = np.log2(float(scale))
        expect(power == int(power) and power >= 0,
               f"{scale} is not 1, 2, 4, 8, ...: only those leave the digits alone.")
        expect(np.float16(gradient * scale) != 0, f"{gradient:g} times {scale} is still 0 in fp16.")
        expect(scale == 1 or np.float16(gradient * scale / 2) == 0,
               f"{gradient:g} would also survive with half of {scale}.")
    return "multiply before, divide after: that is a loss scaler."


@exercise
def check_04_saved(saved: Any) -> str:
    expect(isinstance(saved, (set, list, tuple)),
           "Give a set of names, such as {'weights', 'seed'}.")
    saved = set(saved)
    known = {"base", "weights", "optimizer", "step", "latents", "random state", "losses"}
    expect(saved <= known,
           f"{', '.join(map(str, saved - known))}: not among the names in the list.")
    for name, why in (("weights", "without them everything that was learned is lost"),
                      ("optimizer", "Adam would start with empty means, and take other steps"),
                      ("step", "the run would see the photos of the first steps again")):
        expect(name in saved, f"{name} is missing: {why}.")
    for name, why in (("base", "it is frozen, and on the disk already"),
                      ("latents", "they can be computed again from the photos"),
                      ("random state",
                       "there is none: each random number is a function of seed and step"),
                      ("losses",
                       "a step depends on earlier ones only through weights and optimizer")):
        expect(name not in saved, f"{name} need not be saved: {why}.")
    return "weights, optimizer and the number of the step: a few megabytes."


# --- 05 ---


@exercise
def check_05_calls(looks: Callable) -> str:
    same(looks(1, 25, 1.0), 25, "one image of 25 steps without guidance")
    same(looks(1, 25, 4.0), 50, "one image of 25 steps with guidance 4, asked twice a step,")
    same(looks(6, 20, 7.5), 240, "six images of 20 steps with guidance")
    return "steps and guidance are what you pay for; the scale costs nothing."


@exercise
def check_05_right_scale(right_scale: Callable) -> str:
    same(right_scale(16, 16), 1.0, "right_scale(alpha=16, rank=16)")
    same(right_scale(8, 16), 0.5, "right_scale(alpha=8, rank=16)")
    same(right_scale(1, 64), 1 / 64, "right_scale(alpha=1, rank=64)")
    return ("alpha / rank, as in training. A file whose alpha is lost comes out too "
            "strong or too weak.")


@exercise
def check_05_side_by_side(side_by_side: Callable) -> str:
    _, A1, B1 = _factors(5, 7, 2, 6)
    _, A2, B2 = _factors(5, 7, 3, 7)
    answer = side_by_side(A1, B1, 0.6, A2, B2, 0.4)
    expect(isinstance(answer, (tuple, list)) and len(answer) == 2, "Return two matrices: A, B.")
    A, B = answer
    expect(tuple(A.shape) == (5, 7), f"A has shape {tuple(A.shape)}; with ranks 2 and 3, "
           "and 7 numbers in, expected (5, 7).")
    expect(tuple(B.shape) == (5, 5),
           f"B has shape {tuple(B.shape)}; with 5 numbers out and rank 5, expected (5, 5).")
    same(B @ A, 0.6 * B1 @ A1 + 0.4 * B2 @ A2, "B A")
    return "ranks add up, and each scale goes into one factor, once."


@exercise
def check_05_kohya(kohya_name: Callable) -> str:
    name = kohya_name("mid_block.attentions.0.proj_in")
    expect(isinstance(name, str), "Return a string.")
    expect(name.startswith("lora_unet_"), f"{name!r} should begin with lora_unet_")
    expect(name.endswith(".lora_down.weight"),
           f"{name!r} should end with .lora_down.weight, after the one dot that stays")
    wanted = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    expect(name == wanted, f"{name!r}; expected {wanted!r}")
    return "every dot of the module's name has become an underscore."


# --- 06 ---


@exercise
def check_06_moved(moved_by: Callable) -> str:
    numbers = np.random.default_rng(6)
    before = numbers.normal(size=(3, 8)) + 2
    same(moved_by(before, before), np.zeros(3), "for words that have not moved it")
    got = moved_by(before, 3 * before)
    same(got, np.zeros(3), "for hidden states three times as long it")
    after = np.stack([-before[0], before[1], np.roll(before[2], 3)])
    cosine = before[2] @ after[2] / (before[2] @ before[2])
    got = np.asarray(moved_by(before, after))
    expect(got.shape == (3,),
           f"You return something of shape {got.shape}; expected one value a word, (3,).")
    expect(abs(got[0] - 2) < 1e-4, "A vector turned round has cosine -1, so it has moved by 2; "
           f"yours says {got[0]:.2f}.")
    same(got, [2, 0, 1 - cosine], "for one turned round, one left alone and one mixed up it")
    return "one minus the cosine: 0 for a word that means what it meant; the length does not count."


@exercise
def check_06_reach(places_that_differ: Callable) -> str:
    def ask(tokens, others, wanted, why):
        got = places_that_differ(tokens.split(), others.split())
        expect(got is not None, "places_that_differ gives nothing yet; does it return a list?")
        expect(list(got) == wanted,
               f"{tokens!r} and {others!r}: {list(got)}; expected {wanted}, as {why}.")

    ask("a photo of sks dog", "a photo of sks dog", [], "the two are the same")
    ask("a photo of sks dog", "a photo of a dog", [3, 4],
        "dog is affected by sks, which comes before it")
    ask("a photo of a dog", "a photo of a cat", [4], "no token is affected by a later one")
    ask("sks is a photo of a dog", "ohwx is a photo of a cat", [0, 1, 2, 3, 4, 5, 6],
        "all come after the first one, or are it")
    return "from the first difference to the end, and nothing before it."


@exercise
def check_06_groups(groups: Any) -> str:
    unet, text_encoder = ["U1", "U2"], ["T1"]
    got = groups(unet, text_encoder, 2e-4)
    expect(isinstance(got, list) and all(isinstance(group, dict) for group in got),
           "Return a list of dictionaries.")
    expect(len(got) == 2, f"There are {len(got)} groups; expected one for each network.")
    rates = {}
    for group in got:
        expect({"params", "lr"} <= set(group),
               f"A group has {', '.join(group)}; expected params and lr.")
        rates.update(dict.fromkeys(group["params"], group["lr"]))
    expect(set(rates) == {"U1", "U2", "T1"},
           f"You train {', '.join(sorted(rates))}; expected U1, U2 and T1.")
    same([rates["U1"], rates["U2"]], [2e-4, 2e-4], "the UNet's rate")
    same(rates["T1"], 2e-5, "the text encoder's rate", tolerance=1e-6)
    return "one optimizer, two rates."


# --- 07 ---


@exercise
def check_07_fidelity(fidelity: Callable) -> str:
    generated = np.array([[3.0, 4.0], [0.0, 2.0]])
    photos = np.array([[5.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    got = fidelity(generated, photos)
    expect(got is None or np.ndim(got) == 0,
           f"fidelity gives shape {np.shape(got)}; expected one number.")
    if got is not None:
        expect(abs(float(got) - (generated @ photos.T).mean()) > 1e-4,
               "These are products of vectors of any length: "
               "divide each vector by its length first.")
    wanted = (0.6 + 0.8 + 1.4 / np.sqrt(2) + 0 + 1 + 1 / np.sqrt(2)) / 6
    same(got, wanted, "for two generated images and three photos it")
    same(fidelity(10 * generated, photos), wanted, "with vectors ten times as long it")
    return "a mean over all pairs; only directions count."


@exercise
def check_07_reached(reached: Callable) -> str:
    same(reached(0.4, 0.4, 0.8), 0.0, "what is no better than the base")
    same(reached(0.8, 0.4, 0.8), 1.0, "a value equal to the ceiling")
    same(reached(0.7, 0.4, 0.8), 0.75, "with floor 0.4 and ceiling 0.8, a cosine of 0.7")
    same(reached(0.7, 0.6, 0.8), 0.5, "with floor 0.6 and ceiling 0.8, a cosine of 0.7")
    same(reached(0.9, 0.4, 0.8), 1.25,
         "a value above the ceiling (do not cut it off)")
    return "the same cosine, 0.7, is good with one floor and half as good with another."


@exercise
def check_07_agreement(agreement: Callable) -> str:
    same(agreement([0.9, 0.2, 0.8, 0.1], [True, False, True, False]), 1.0,
         "when every right image is above every wrong one it")
    same(agreement([0.1, 0.9], [True, False]), 0.0, "when the wrong one is above it")
    same(agreement([0.9, 0.5, 0.7], [True, True, False]), 0.5,
         "for right ones at 0.9 and 0.5, a wrong one at 0.7, it")
    same(agreement([0.6, 0.6, 0.6], [True, False, False]), 0.5,
         "when all are equal (a tie counts a half) it")
    return "a perfect metric has 1, a coin 0.5."


@exercise
def check_07_better(better: Callable) -> str:
    rng = np.random.default_rng(7)
    first = rng.uniform(0.2, 0.9, 12)  # subjects are easy and hard
    gain, noise = first + 0.03 + rng.normal(0, 0.02, 12), first + rng.normal(0, 0.05, 12)
    noise -= (noise - first).mean() - 0.005
    expect(better(first, gain) is not None,
           "better gives nothing yet; does it return True or False?")
    expect(bool(better(first, gain)),
           "Here nearly every subject gains a little. Take the differences, subject by subject, "
           "instead of two intervals.")
    expect(not better(gain, first),
           "The other way round all differences are negative, and it says True.")
    expect(not better(first, noise),
           "Here the mean rises by 0.005, some subjects gain, some lose; it says True.")
    return "differences first, then the interval: how hard a subject is no longer counts."


@exercise
def check_07_diagnosis(diagnosis: Any) -> str:
    wanted = {"A": "good", "B": "not learned", "C": "copies", "D": "class lost"}
    hints = {"A": "Compare A with the floor and the ceiling: subject near the ceiling, CLIP-T near "
             "the base's, PRES low.",
             "B": "B's row is nearly the base's own.",
             "C": "C is nearer to single photos than photos are to each other, and it no longer "
             "follows the prompt.",
             "D": "D follows the prompt and has the subject. But what does it generate for the "
             "class alone? Look at PRES and DIV."}
    expect(isinstance(diagnosis, dict) and set(diagnosis) == set(wanted),
           "Give a dict with one word for each of A, B, C, D.")
    for name, word in wanted.items():
        expect(diagnosis[name] is not Ellipsis and diagnosis[name] is not None,
               f"{name} has no diagnosis yet.")
        expect(diagnosis[name] in wanted.values(),
               f"{diagnosis[name]!r}: choose from {', '.join(wanted.values())}.")
        expect(diagnosis[name] == word, f"{name} is not {diagnosis[name]!r}. {hints[name]}")
    return "no single column tells these four apart."


# --- 08 ---


@exercise
def check_08_diagnose(patients: Any) -> str:
    expect(isinstance(patients, dict) and set(patients) == set("ABCD"),
           "Give a dictionary with A, B, C and D.")
    known = ("underfit", "overfit", "rate", "noun", "background", "captions", "class images",
             "precision")
    signs = {"A": "the cat is right and so is its class; but the sofa of the "
             "photos comes with it",
             "B": "few things make a loss seven times as high within six steps",
             "C": "the LoRA changes nothing at all",
             "D": "the subject is as it should be, and only its class has become something else"}
    right = {"A": "background", "B": "rate", "C": "underfit", "D": "class images"}
    for name, answer in patients.items():
        expect(answer is not Ellipsis, f"{name} has no answer yet.")
        expect(answer in known, f"{answer!r} is none of {', '.join(known)}.")
        expect(answer == right[name], f"{name} is not {answer!r}: {signs[name]}.")
    return "all four; each has one sign that no other failure has."


@exercise
def check_08_alarm(alarm: Callable) -> str:
    def ask(losses, wanted, what, **more):
        got = alarm(losses, **more)
        expect(got == wanted, f"{what}: {got!r}; expected {wanted!r}.")

    ask([0.2] * 8 + [0.6] * 6, 10,
        "0.2 eight times, then 0.6: the mean of five passes 0.4 at the third of these")
    ask([0.5, 0.1] * 10, None, "0.5 and 0.1 in turn, which is noise and no trend")
    ask([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], None, "a loss that falls")
    ask([0.1, 0.1, 0.3], 2, "0.1, 0.1, 0.3 with a mean of one", width=1)
    ask([0.1, 5.0, 0.1], None, "three losses, fewer than the mean needs")
    return "stopped in time, and not by one noisy step."


@exercise
def check_08_captions(put_back: Callable) -> str:
    mixed = {"dog0.png": "a photo of ohwx dog", "cat0.png": "a photo of sks cat",
             "both.png": "a photo of sks and ohwx",
             "none.png": "a photo of a dog"}
    before, got = dict(mixed), put_back(mixed)
    expect(isinstance(got, dict), "put_back should return a dictionary.")
    expect(mixed == before, "You have changed the dictionary that was given; make a new one.")
    expect(set(got) == set(mixed), "Every file should keep its name.")
    for name, wanted in (("dog0.png", "a photo of sks dog"), ("cat0.png", "a photo of ohwx cat"),
                         ("both.png", "a photo of ohwx and sks"), ("none.png", "a photo of a dog")):
        expect(got[name] == wanted, f"{mixed[name]!r} became {got[name]!r}; expected {wanted!r}.")
    return "each word is replaced by the other, and none twice."


@exercise
def check_08_survives(survives: Callable) -> str:
    import torch

    for weight, update, dtype, lasts in (
            (1.0, 0.001, torch.bfloat16, False), (1.0, 0.001, torch.float16, True),
            (1.0, 0.0001, torch.float16, False),
            (1.0, 1e-6, torch.float32, True), (1.0, 1e-9, torch.float32, False),
            (0.01, 0.001, torch.bfloat16, True),
            (1.0, 0.005, torch.bfloat16, True), (8.0, 0.005, torch.bfloat16, False)):
        got = survives(weight, update, dtype)
        expect(got is not None, "survives gives nothing yet; does it return True or False?")
        kind = str(dtype).removeprefix("torch.")
        expect(bool(got) == lasts, f"{weight:g} + {update:g} in {kind}: you say {bool(got)}; "
               f"expected {lasts}.")
    return ("what counts is the size of the update beside that of the weight: a small weight can "
            "take a small update.")


# --- 09 ---


@exercise
def check_09_upright(upright: Callable) -> str:
    for turn, wanted in ((1, (4000, 3000)), (3, (4000, 3000)), (2, (4000, 3000)),
                         (6, (3000, 4000)), (8, (3000, 4000)), (5, (3000, 4000))):
        same(upright((4000, 3000), turn), wanted, f"upright((4000, 3000), {turn})")
    return "from 5 on, the camera lay on its side."


@exercise
def check_09_steps(steps_for: Callable) -> str:
    same(steps_for(5, 100, 1, 1), 500, "steps_for(5, 100, 1, 1)")
    same(steps_for(5, 100, 4, 1), 125, "steps_for(5, 100, batch=4, accumulation=1)")
    same(steps_for(5, 100, 1, 4), 125, "a step takes batch * accumulation photos: "
         "steps_for(5, 100, batch=1, accumulation=4)")
    same(steps_for(3, 1, 2, 1), 2, "one step of two photos leaves the third unseen: "
         "steps_for(3, 1, batch=2, accumulation=1)")
    return "photos over photos a step, rounded up."


@exercise
def check_09_verdict(verdict: Callable) -> str:
    for numbers, wanted, why in (
            ((0.3, 0.32, 0.8, 0.3, 0.3), "train longer", "a 25th of the way to the photos"),
            ((0.3, 0.7, 0.8, 0.3, 0.28), "keep", "four fifths of the way, and the prompt obeyed"),
            ((0.3, 0.79, 0.8, 0.3, 0.15), "stop earlier", "the subject, and the prompt forgotten"),
            ((0.3, 0.5, 0.8, 0.3, 0.1), "train longer", "two fifths of the way"),
            ((0.6, 0.75, 0.8, 0.3, 0.3), "keep", "a base that starts high")):
        got = verdict(*numbers)
        expect(got is not None, "verdict gives nothing yet; does it return one of the three?")
        expect(got == wanted, f"verdict{numbers}, {why}: you say {got!r}; expected {wanted!r}.")
    return "a number between floor and ceiling, and the prompt beside it."


# --- 10 ---


@exercise
def check_10_clean(clean: Callable) -> str:
    import torch

    x0, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(10))
    for t in (0.1, 0.5, 0.9):
        x_t = (1 - t) * x0 + t * noise
        got = clean(x_t, noise - x0, t)
        if got is not None and np.shape(got) == tuple(x0.shape):
            expect(not np.allclose(got, noise, atol=1e-3), "You have arrived at the noise: at a "
                   "larger t there is more noise, so walk in the other direction.")
        same(got, x0, f"clean(x_t, velocity, {t})", tolerance=1e-3)
    return "walk back along the velocity for as long as the noise was added."


@exercise
def check_10_ranks(active: Callable) -> str:
    for t, rank, a, wanted in ((0, 16, 1, 16), (1000, 16, 1, 1), (500, 16, 1, 8), (500, 16, 2, 4),
                               (900, 4, 1, 1), (100, 4, 1, 3)):
        got = active(t, 1000, rank, a)
        expect(got is not None, "active gives nothing yet; does it return a number?")
        expect(float(got).is_integer(),
               f"active({t}, 1000, {rank}, {a}) is {got}: a rank is a whole number, rounded down.")
        expect(got == wanted, f"active({t}, 1000, {rank}, {a}) is {got}; expected {wanted}.")
    return "all ranks without noise, one rank in pure noise."


@exercise
def check_10_slider(slider_target: Callable) -> str:
    import torch

    own, more, less = torch.randn((3, 2, 4, 4), generator=torch.Generator().manual_seed(11))
    same(slider_target(own, more, less, 0.0), own, "at scale 0, where nothing is to change, it")
    same(slider_target(own, own, own, 1.0), own,
         "where the two prompts say the same, so that no direction is left, it")
    same(slider_target(own, more, less, 1.0), own + more - less, "at scale 1 it")
    same(slider_target(own, more, less, -1.0), own - more + less, "at scale -1 it")
    return "the base's own prediction, moved along the difference of two prompts."


@exercise
def check_10_ties(ties: Callable) -> str:
    import torch

    first = torch.tensor([4.0, -3.0, 0.1, 2.0, 0.0, 1.0])
    second = torch.tensor([2.0, 5.0, -0.2, 0.3, -0.1, 3.0])
    got = ties(first, second, 0.5)
    if got is not None and np.shape(got) == (6,):
        expect(not np.allclose(got, [6.0, 2.0, 0.0, 2.0, 0.0, 3.0]),
               "That is the sum of what is kept: where the signs differ, the smaller one is "
               "still in it.")
    same(got, [3.0, 5.0, 0.0, 2.0, 0.0, 3.0], "with density 0.5 the merged update")
    same(ties(first, first, 1.0), first, "of two equal updates with density 1 the merge")
    same(ties(first, -2 * first, 1.0), -2 * first,
         "of an update and minus twice itself with density 1 the merge")
    return "keep the large numbers, let their signs vote, and average those that agree."
