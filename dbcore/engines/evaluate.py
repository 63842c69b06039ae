"""Did it learn, in numbers: the measures of the DreamBooth paper (Ruiz et al. 2023, section 4.1 and
4.3).

Every measure is a mean cosine between feature vectors. What it says depends on the encoder that
made them: CLIP's image tower sees kind, colour and place; DINO, trained to tell images apart
without words, sees more of the individual. A base's folder may bring encoders of its own world, or
name others (`metrics` in its recommended.json).
Compare numbers of one encoder only, and only between a floor (the base without adapter) and a
ceiling (real photos against each other).
"""

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from dbcore.config import ConfigError
from dbcore.datasets.dreambooth import to_pixels
from dbcore.models.base import Family, best_device, recommended
from dbcore.models.reading import first_line, hub_answer, reading
from dbcore.utils.errors import InputError
from dbcore.utils.seeding import key

Images: TypeAlias = list[Image.Image] | torch.Tensor  # or their vectors, made before
ENCODERS = ("openai/clip-vit-base-patch32", "facebook/dino-vits16")  # for a base that brings none


# --- encoders -------------------------------------------------------------------------------------


@dataclass
class Encoder:
    """Images, and for some encoders texts, to unit vectors.

    `note` says what to keep in mind of it.
    """

    name: str
    embed_images: Callable  # list of PIL images -> (n, d)
    embed_texts: Callable | None = None  # list of strings -> (n, d) in the same space
    note: str = ""

    @torch.no_grad()
    def images(self, images: Iterable[Image.Image], batch_size: int = 32) -> torch.Tensor:
        """(n, d) float32 unit vectors on the CPU. Raises ValueError if there is no image."""
        return self._batches(self.embed_images, images, batch_size, "image")

    @torch.no_grad()
    def texts(self, prompts: Iterable[str], batch_size: int = 32) -> torch.Tensor:
        """(n, d) float32 unit vectors on the CPU.

        Raises ValueError for an encoder of images alone.
        """
        if self.embed_texts is None:
            raise InputError(f"{self.name} reads images and no text: "
                             "take a CLIP for prompt fidelity")
        return self._batches(self.embed_texts, prompts, batch_size, "prompt")

    def _batches(self, embed, things, size, what):
        things = list(things)
        if not things:
            raise InputError(f"{self.name}: no {what} was given; give at least one")
        parts = [embed(things[first:first + size]) for first in range(0, len(things), size)]
        return normalize(torch.cat(parts).float().cpu(), dim=-1)


def load_encoder(base_or_name: Family | str | Path) -> Encoder:
    """One `Encoder`: the first for a base, or the one of that name.

    `base_or_name`: a `Family`, its folder, or a CLIP or a ViT (DINO) of transformers, as a folder
    or a name on the hub. Raises ConfigError if it is none of these.
    """
    if isinstance(base_or_name, Family) or Path(base_or_name, "model_index.json").is_file():
        return load_encoders(base_or_name)[0]
    return load_hub_encoder(str(base_or_name))


def load_encoders(base: Family | str | Path) -> list[Encoder]:
    """Every encoder for a base (itself, its folder, or its name on the hub), the one that also
    reads prompts first; see `load_encoder`."""
    folder = Path(base.name if isinstance(base, Family) else base)
    own = [name for name in OWN if (folder / name).is_dir()]
    named = recommended(folder).get("metrics") or own or ENCODERS
    named = [named] if isinstance(named, str) else named
    return [load_own(name, folder) if name in OWN else load_hub_encoder(name) for name in named]


def load_own(name: str, folder: Path) -> Encoder:
    """The encoder that a base brings in its folder `name`."""
    loader, label, note = OWN[name]
    encoder = pkgutil.resolve_name(loader)(folder)
    return Encoder(label, encoder.embed_images, getattr(encoder, "embed_texts", None), note)


OWN = {  # folder that a base may bring: (what loads it, its name in tables, what to know of it)
    # a CLIP trained with the base's text encoder (Radford et al. 2021, in miniature)
    "clip_image": ("dbcore.toybox.clip:load_clip", "clip_image",
                   ("its text tower is the base's own text encoder, so prompt fidelity is "
                    "biased upward")),
    # which individual it is; it shares no weight and no image with the base
    "subject": ("dbcore.toybox.encoder:load_subject_encoder", "subject encoder",
                ("plays DINO's part: taught to tell renders of one character from "
                 "those of all others")),
}


def load_hub_encoder(name: str) -> Encoder:
    """A CLIP, or a ViT such as DINO (Caron et al. 2021), of transformers.

    Raises ConfigError for another kind.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        make = {"clip": hub_clip, "vit": hub_vit, "dinov2": hub_vit}.get(kind)
    except (OSError, ValueError) as error:  # transformers' ValueError: a kind it does not know
        raise ConfigError(f"metric encoder {name}: neither a base's folder nor a model "
                          f"of transformers ({first_line(error)}): "
                          f"{hub_answer(error) or 'check the name'}") from error
    if make is None:
        raise ConfigError(f"metric encoder {name} is a {kind}: give a CLIP or a ViT, such as "
                          f"{' or '.join(ENCODERS)}")
    with reading(f"metric encoder {name} cannot be loaded"):
        return make(name, "cuda" if torch.cuda.is_available() else "cpu")


def hub_clip(name: str, device: str) -> Encoder:
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(name).eval().to(device)
    tokenizer, prepare = AutoTokenizer.from_pretrained(name), preprocessing(name)

    def embed_images(images):
        return clip.visual_projection(clip.vision_model(prepare(images).to(device)).pooler_output)

    def embed_texts(prompts):
        ids = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        return clip.text_projection(clip.text_model(**ids).pooler_output)

    return Encoder(name, embed_images, embed_texts)


def hub_vit(name: str, device: str) -> Encoder:
    """Its [CLS] vector, as the paper takes it."""
    from transformers import AutoModel

    model, prepare = AutoModel.from_pretrained(name).eval().to(device), preprocessing(name)
    return Encoder(name,
                   lambda images: model(prepare(images).to(device)).last_hidden_state[:, 0])


def preprocessing(name: str) -> Callable[[list[Image.Image]], torch.Tensor]:
    """A function from PIL images to the pixels (n, 3, h, w) that the model of that name was trained
    on."""
    from transformers.image_processing_utils import BaseImageProcessor

    asked, _ = BaseImageProcessor.get_image_processor_dict(name)
    size = asked.get("crop_size") or asked["size"]
    side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    mean, std = (torch.tensor(asked[which]).view(3, 1, 1) for which in ("image_mean", "image_std"))

    def prepare(images):
        squares = [ImageOps.fit(p.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
                   for p in images]
        return torch.stack([((to_pixels(square) + 1) / 2 - mean) / std for square in squares])

    return prepare


# --- measures -------------------------------------------------------------------------------------


def features(images: Images, encoder: Encoder) -> torch.Tensor:
    """(n, d) unit vectors of PIL images; vectors that `encoder.images` made before are taken as
    they are."""
    return images if torch.is_tensor(images) else encoder.images(images)


def subject_fidelity(images: Images, photos: Images, encoder: Encoder) -> float:
    """Is it this one? Mean cosine over all pairs of a generated image and a real photo, in [-1, 1].

    With CLIP's image tower this is CLIP-I, with DINO it is DINO (Ruiz et al. 2023, section 4.1).
    Copies of the photos score highest: read it beside `prompt_fidelity` and `nearest_photo`.
    """
    return float((features(images, encoder) @ features(photos, encoder).T).mean())


def real_against_real(photos: Images, encoder: Encoder) -> float:
    """The ceiling of `subject_fidelity`: mean cosine over all pairs of different photos of the
    subject."""
    vectors = features(photos, encoder)
    count = len(vectors)
    if count < 2:
        raise InputError("one image alone cannot be compared: give two or more")
    cosines = vectors @ vectors.T
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def prompt_fidelity(images: Images, prompts: list[str], encoder: Encoder) -> float:
    """Does it show what was asked? Mean cosine of each image and its prompt (CLIP-T), in [-1, 1].

    `prompts`: one an image, or one for all, without the identifier: to CLIP it is a stray word.
    Raises ValueError if the numbers differ, or the encoder reads no text.
    """
    vectors = features(images, encoder)
    prompts = [prompts] * len(vectors) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(vectors):
        raise InputError(f"{len(prompts)} prompts for {len(vectors)} images: "
                         "give one an image, or one for all")
    unique = list(dict.fromkeys(prompts))
    texts = encoder.texts(unique)[[unique.index(prompt) for prompt in prompts]]
    return float((vectors * texts).sum(dim=1).mean())


def prior_preservation_metric(class_images: Images, photos: Images,
                              encoder: Encoder) -> float:
    """PRES: do others of its class now look like the subject? Mean cosine over all pairs; lower is
    better.

    `class_images`: generated for the class prompt, without the identifier, after training. The
    number of the untrained base is what a perfect prior would keep (Ruiz et al. 2023, section 4.3).
    """
    return subject_fidelity(class_images, photos, encoder)


def diversity(images: Images, encoder: Encoder) -> float:
    """DIV: how much images of one prompt differ, 1 - the mean cosine of different ones, in [0,
    2].

    The paper takes LPIPS between them (`lpips_diversity`); this is the encoder's own distance.
    Higher is better while the subject is kept. Raises ValueError for fewer than two images.
    """
    return 1 - real_against_real(images, encoder)


def load_lpips() -> Callable:
    """LPIPS on AlexNet (Zhang et al. 2018): two (n, 3, h, w) in [-1, 1] -> n distances.

    Raises ConfigError without it.
    """
    from dbcore.engines.trained import optional

    try:
        network = optional("lpips", "--lpips").LPIPS(net="alex", verbose=False)
    except OSError as error:
        raise ConfigError("--lpips: AlexNet's weights, which torchvision fetches once, "
                          f"cannot be had ({error})") from None
    return network.eval().to(best_device())


@torch.no_grad()
def lpips_diversity(images: list[Image.Image], distance: Callable) -> float:
    """DIV as the paper has it: the mean LPIPS over all pairs of PIL images of one prompt; 0 for
    copies.

    `distance`: from `load_lpips`. Raises InputError for fewer than two images.
    """
    pairs = list(combinations([to_pixels(image.convert("RGB")) for image in images], 2))
    if not pairs:
        raise InputError("one image alone cannot be compared: give two or more")
    ones, others = (torch.stack(side).to(best_device()) for side in zip(*pairs))
    return float(distance(ones, others).mean())


def nearest_photo(images: Images, photos: Images,
                  encoder: Encoder) -> tuple[list[int], list[float]]:
    """Is it a copy? (which, cosine) for each image: the photo nearest to it, and how near, each
    (n,).

    A cosine above what photos of the subject reach among themselves, with a place that was not
    asked for, is a memorised photo.
    """
    cosines, which = (features(images, encoder) @ features(photos, encoder).T).max(dim=1)
    return which.tolist(), cosines.tolist()


def share_of_copies(images: Images, photos: Images, encoder: Encoder) -> float:
    """Are they learnt by heart? Share of images that are nearer to a photo than any two photos are
    to each other, in [0, 1].

    New photos of the subject would have 2 / (n + 1) beside n photos: of all n + 1, any two may be
    the nearest pair. Raises ValueError for fewer than two photos.
    """
    vectors = features(photos, encoder)
    if len(vectors) < 2:
        raise InputError("one photo alone is as near to itself as can be: give two or more")
    limit = float((vectors @ vectors.T).fill_diagonal_(-1).max())
    nearest = nearest_photo(images, vectors, encoder)[1]
    return sum(cosine > limit for cosine in nearest) / len(nearest)


def agreement(values: Sequence[float], right: Sequence[bool]) -> float | None:
    """Does a metric see the truth? The chance that a right image has a higher value than a wrong
    one, in [0, 1].

    `values`: one an image; `right`: the truth of each, booleans. It is the area under the ROC
    curve: 1 is full agreement, 0.5 a coin. None if all images are right, or none is.
    """
    values, right = np.asarray(values, dtype=float), np.asarray(right, dtype=bool)
    good, bad = values[right][:, None], values[~right]
    if not good.size or not bad.size:
        return None
    return float(((good > bad) + 0.5 * (good == bad)).mean())


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = 0.95,
                       count: int = 10_000) -> tuple[float, float]:
    """(low, high) of the mean of `values`: the percentile bootstrap (Efron 1979), values drawn with
    return.

    Give one value a subject: images of one subject are not independent. One value gives (value,
    value). Raises ValueError if there is none.
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise InputError("bootstrap_interval: no values were given; give one a subject")
    picks = np.random.default_rng(key(seed, "bootstrap")).integers(0, len(values),
                                                                   (count, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
