"""No option is dead: change each field of TrainConfig, and its own effect must be seen, which was
not there before."""

import contextlib
import dataclasses
import io
import json
import re
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_tokenizer
from runs import add_variant, leave_out_report, make_base, make_hub, make_options, make_photos
from safetensors.torch import load_file

from dbcore.config import ConfigError, TrainConfig
from dbcore.datasets.dreambooth import DreamBoothData
from dbcore.engines import trainer
from dbcore.engines.callbacks import Result
from dbcore.engines.report import write_report
from dbcore.engines.trained import Trained
from dbcore.engines.trainer import train
from dbcore.models.embeddings import EMBEDS_NAME
from dbcore.models.lora import SampleDropout, lora_layers
from dbcore.models.process import Density
from dbcore.models.stable_diffusion import StableDiffusion as BASE
from dbcore.utils.seeding import normal, uniform

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 3}
TEXT = {"train_text_encoder": True}
TOKENS = {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK and sks"}
VALIDATED = {"validation_prompt": ["a photo of sks dog"], "num_validation_images": 1}
HUB = {"push_to_hub": True}
FINISHED = {"output_dir": "finished"}
RATE = 1e-2


def is_of(facts, base):
    """Whether the networks hold that base's weights."""
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.equal(facts.run.base.unet.conv_in.weight, stored["conv_in.weight"])


def known(facts):
    return {part for part in ("text_encoder", "vae", "unet") if part in vars(facts.run.base)}


def factors(facts):
    """Each step's learning rate, of the first group, as a share of what was asked for."""
    return [rates[0] / RATE for rates in facts.rates]


def paths(facts, is_class=False):
    return {sample.photo.path.parent for sample in facts.samples if sample.is_class == is_class}


def prompts(facts, is_class=False):
    return {sample.prompt for sample in facts.samples if sample.is_class == is_class}


def colours(image):
    return set(map(tuple, np.asarray(image).reshape(-1, 3)))


def ranks(facts, component="unet"):
    return {len(t) for name, t in facts.weights.items() if name.startswith(component)
            and "lora_A" in name}


def scales(facts):
    return {layer.scaling["default"] for _, layer in lora_layers(facts.run.base.unet)}


def begun(facts):
    """The vectors of the new tokens before the first step."""
    return next(t for name, t in facts.path_of_weights[0].items() if name.endswith("rows"))


def vectors(world, *words):
    """Those of words, one token each, in the base's table."""
    table = load_file(world / "base" / "text_encoder" / "model.safetensors")
    vocabulary = json.loads((world / "base" / "tokenizer" / "vocab.json").read_text())
    (weight,) = (t for name, t in table.items() if "token_embedding" in name)
    return weight[[vocabulary[f"{word}</w>"] for word in words]]


def norms(facts, component):
    """The length of each step's gradient of a component."""
    return [sum(float(grad.norm()) for name, grad in grads.items() if name.startswith(component))
            for grads in facts.grads]


def first_step(facts):
    """[(w before, w after, gradient, state)] of the first step's parameters: A, whose gradient is
    0, and B, which is 0."""
    return [(facts.path_of_weights[0][name], facts.path_of_weights[1][name], facts.grads[0][name],
             facts.states[name])
            for name in facts.grads[0]]


def loss_is(facts, weight=lambda t: 1.0, prior=1.0):
    """Whether every logged loss is that of its samples: the photo's, then the class's."""
    shares = [1.0, prior]
    return all(record["loss"] == pytest.approx(sum(
        share * weight(t) * loss
        for share, t, loss in zip(shares, record["timesteps"], record["losses"])), rel=1e-4)
        for record in facts.log)


def min_snr(facts):
    abar = facts.run.base.noise_scheduler.alphas_cumprod
    return lambda t: min(float(abar[t] / (1 - abar[t])), 5) / float(abar[t] / (1 - abar[t]))


def ranks_learn(facts, exponent):
    """Whether B has a gradient in just the columns of the ranks that are active at each step."""
    wanted = [int((1 - record["timesteps"][0] / 1000) ** exponent * 7 + 1) for record in facts.log]
    found = [{int(grad.any(dim=0).sum()) for name, grad in grads.items() if "lora_B" in name}
             for grads in facts.grads]
    return found == [{count} for count in wanted]


def timesteps(facts):
    return [record["timesteps"] for record in facts.log]


def timesteps_by(scheme, **more):
    """What a run of three steps draws by a density."""
    u = torch.tensor([uniform(0, "timestep", step, 0) for step in range(3)], dtype=torch.float64)
    return [[t] for t in (Density(scheme, **more)(u) * 1000).long().tolist()]


def mean_of(facts, decay):
    """Whether what was saved is the mean of each step's weights, the newest counting most."""
    shares = torch.tensor([decay ** (3 - k) for k in (1, 2, 3)])
    wanted = [sum(share * step[name]
                  for share, step in zip(shares / shares.sum(), facts.path_of_weights[1:]))
              for name in facts.grads[0]]
    saved = [facts.saved[name] for name in facts.grads[0]]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(saved, wanted))


def validated(facts):
    return {int(name.split("step-")[1][:6]) for name in facts.files if "validation/step-" in name}


def saved_steps(facts):
    return {int(match[1]) for name in facts.files
            if (match := re.search(r"checkpoint-(\d+)/state", name))}


def shift_of_noise(before, after):
    """What was added to the noise: one number a channel."""
    shift = after.batches[0]["noise"] - before.batches[0]["noise"]
    return shift.std(dim=(2, 3)).max() < 1e-6 and shift.abs().max() > 1e-3


def decayed(facts, decay):
    return all(torch.allclose(new, old * (1 - RATE * decay), rtol=1e-5)
               for old, new, grad, _ in first_step(facts)
               if not grad.any())


def moved_by(facts, epsilon):
    return all(torch.allclose(new, -RATE * grad / (grad.abs() + epsilon), rtol=1e-3, atol=1e-8)
               for old, new, grad, _ in first_step(facts) if grad.any())


# option: (changed value, options of both runs, what is seen of the run with it; of the run before,
# it must not hold). Each is given (facts of the one run, facts of the run before, the world's
# folder).
EFFECTS = {
    "pretrained_model_name_or_path": ("{world}/other base", {},
                                      lambda f, _, w: is_of(f, w / "other base")),
    "revision": ("second", {"pretrained_model_name_or_path": "tiny/base"},
                 lambda f, _, w: is_of(f, w / "other base")),
    "variant": ("fp16", {}, lambda f, _, w: is_of(f, w / "other base")),
    "tokenizer_name": ("{world}/tokenizer", {},
                       lambda f, _, w: f.run.base.tokenizer.get_vocab()["dog</w>"] == json.loads(
        (w / "tokenizer" / "vocab.json").read_text())["dog</w>"]),
    "instance_data_dir": ("{world}/other photos", {},
                          lambda f, _, w: paths(f) == {w / "other photos"}),
    "instance_prompt": ("a blue car", {}, lambda f, *_: prompts(f) == {"a blue car"}),
    "class_data_dir": ("{world}/class photos", PRIOR,
                       lambda f, _, w: paths(f, True) == {w / "class photos"}),
    "class_prompt": ("a red car", PRIOR,
                     lambda f, *_: prompts(f, True) == f.class_prompts == {"a red car"}),
    "resolution": (24, {}, lambda f, *_: f.batches[0]["x0"].shape == (1, 4, 12, 12)),
    "aspect_ratio_buckets": ("40,24;24,40", {},
                             lambda f, *_: f.batches[0]["x0"].shape == (1, 4, 12, 20)),
    "center_crop": (True, {}, lambda f, *_: {sample.place for sample in f.samples} == {0.5}),
    "random_flip": (True, {},
                    lambda f, *_: {sample.mirrored for sample in f.samples} == {True, False}),
    "image_interpolation_mode": ("nearest", {}, lambda f, _, w: colours(f.seen) <= set().union(*(
        # the others mix colours
        colours(Image.open(path)) for path in (w / "photos").glob("?.png")))),
    "use_masks": (False, {}, lambda f, *_: all((batch["mask"] == 1).all() for batch in f.batches)),
    "caption_dropout": (0.6, {"max_train_steps": 8},
                        lambda f, *_: prompts(f) == {"a photo of sks dog", ""}),
    "shuffle_tags": (True, {"instance_prompt": "sks dog, red, blue", "max_train_steps": 8},
                     lambda f, *_: prompts(f) == {"sks dog, red, blue", "sks dog, blue, red"}),
    "with_prior_preservation": (True, {"num_class_images": 3}, None),
    "prior_prediction": (True, {}, None),
    "prior_loss_weight": (0.5, PRIOR, lambda f, *_: loss_is(f, prior=0.5)),
    "num_class_images": (1, PRIOR, lambda f, *_: len(f.run.data.class_photos) == 1),
    "sample_batch_size": (1, {**PRIOR, "class_data_dir": "classes"},
                          lambda f, *_: f.class_batches == [1, 1, 1]),
    "prior_generation_precision": ("bf16", {**PRIOR, "class_data_dir": "classes"}, lambda f, *_: (
        f.class_dtypes == {torch.bfloat16} and f.run.base.dtype == torch.float32)),
    "adapter": ("oft", {}, lambda f, *_: all("oft_R" in name for name in f.weights)),
    "rank": (2, {}, lambda f, *_: ranks(f) == {2}),
    "lora_alpha": (1, {}, lambda f, *_: scales(f) == {1 / 4}),
    "lora_dropout": (0.5, {}, lambda f, *_: f.dropped and 0.3 < np.mean(f.dropped) < 0.7),
    "use_dora": (True, {}, lambda f, *_: any("magnitude" in name for name in f.weights)),
    "use_rslora": (True, {}, lambda f, *_: scales(f) == {4 / 4 ** 0.5}),
    "use_tlora": (True, {"rank": 8}, lambda f, *_: ranks_learn(f, 1.0)),
    "tlora_alpha": (4.0, {"rank": 8, "use_tlora": True}, lambda f, *_: ranks_learn(f, 4.0)),
    "lora_layers": ("attention+ff", {},
                    lambda f, *_: any(".ff.net." in name for name in f.weights)),
    "train_text_encoder": (True, {}, lambda f, *_: all(
        t.any() for name, t in f.weights.items() if name.startswith("text_encoder"))
                           and ranks(f, "text_encoder")),
    "train_text_encoder_ti": (True, {"instance_prompt": "a photo of TOK dog"},
                              lambda f, *_: set(f.tokens) == {"clip_l"}),
    "token_abstraction": ("sks", TOKENS,
                          lambda f, *_: f.run.base.new_tokens == ("sks", "<s0><s1>")),
    "num_new_tokens_per_abstraction": (3, TOKENS, lambda f, *_: len(f.tokens["clip_l"]) == 3),
    "initializer_concept": ("red dog", TOKENS, lambda f, _, w: torch.equal(
        begun(f), vectors(w, "red", "dog"))),
    "train_text_encoder_ti_frac": (0.4, {**TOKENS, "train_text_encoder_ti_frac": 1.0},
                                   lambda f, *_: (
        [norm > 0 for norm in norms(f, "text_encoder")] == [True, True, False]
        and all(norms(f, "unet")))),
    "text_encoder_lr": (0.1, TEXT, lambda f, *_: f.rates == [[RATE, 0.1]] * 3),
    "text_encoder_rank": (2, TEXT,
                          lambda f, *_: (ranks(f), ranks(f, "text_encoder")) == ({4}, {2})),
    "train_text_encoder_frac": (0.4, TEXT, lambda f, *_: (
        [norm > 0 for norm in norms(f, "text_encoder")] == [True, True, False]
        and all(norms(f, "unet")))),
    "tokenizer_max_length": (4, {"instance_prompt": "sks dog in the photo"},
                             lambda f, *_: f.lengths == {4}),
    "learning_rate": (2e-2, {}, lambda f, *_: f.rates == [[2e-2]] * 3),
    "scale_lr": (True, {"train_batch_size": 2}, lambda f, *_: factors(f) == [2, 2, 2]),
    "lr_scheduler": ("linear", {}, lambda f, *_: factors(f) == pytest.approx([1, 2 / 3, 1 / 3])),
    "lr_warmup_steps": (2, {"lr_scheduler": "constant_with_warmup"},
                        lambda f, *_: factors(f) == [0, 0.5, 1]),
    "lr_num_cycles": (2, {"lr_scheduler": "cosine_with_restarts"},
                      lambda f, *_: factors(f) == pytest.approx([1, 0.25, 0.75])),
    "lr_power": (2, {"lr_scheduler": "polynomial"},
                 lambda f, *_: factors(f) == pytest.approx([1, 4 / 9, 1 / 9], rel=1e-3)),
    "train_batch_size": (2, {},
                         lambda f, *_: [len(batch["t"]) for batch in f.batches] == [2, 2, 2]),
    "gradient_accumulation_steps": (2, {}, lambda f, *_: (
        [len(batch["t"]) for batch in f.batches] == [1] * 6 and len(f.rates) == 3)),
    "max_train_steps": (2, {}, lambda f, *_: [record["step"] for record in f.log] == [1, 2]),
    "num_train_epochs": (1, {"num_train_epochs": 2, "max_train_steps": None},
                         lambda f, *_: len(f.log) == 3),
    "optimizer": ("Adafactor", {},
                  lambda f, *_: type(f.run.trained.optimizer).__name__ == "Adafactor"),
    "adam_beta1": (0.5, {}, lambda f, *_: all(
        torch.allclose(state["exp_avg"], 0.5 * grad, rtol=1e-4)
        for *_, grad, state in first_step(f))),
    "adam_beta2": (0.9, {}, lambda f, *_: all(
        torch.allclose(state["exp_avg_sq"], 0.1 * grad ** 2, rtol=1e-4, atol=0)
        for *_, grad, state in first_step(f))),
    "adam_weight_decay": (0.5, {}, lambda f, *_: decayed(f, 0.5)),
    "adam_epsilon": (1e-2, {}, lambda f, *_: moved_by(f, 1e-2)),
    "max_grad_norm": (1e-7, {}, lambda f, *_: all(
        sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
        == pytest.approx(1e-7, rel=0.1)
        for grads in f.grads)),
    "snr_gamma": (5, {"max_train_steps": 8}, lambda f, *_: loss_is(f, min_snr(f))),
    "weighting_scheme": ("mode", {}, lambda f, *_: timesteps(f) == timesteps_by("mode")),
    "logit_mean": (2.0, {"weighting_scheme": "logit_normal"},
                   lambda f, *_: timesteps(f) == timesteps_by("logit_normal", logit_mean=2.0)),
    "logit_std": (0.1, {"weighting_scheme": "logit_normal"},
                  lambda f, *_: timesteps(f) == timesteps_by("logit_normal", logit_std=0.1)),
    "mode_scale": (0.5, {"weighting_scheme": "mode"},
                   lambda f, *_: timesteps(f) == timesteps_by("mode", mode_scale=0.5)),
    "noise_offset": (0.1, {}, lambda f, before, _: shift_of_noise(before, f)),
    "use_ema": (True, {}, lambda f, *_: mean_of(f, 0.99)),
    "ema_decay": (0.5, {"use_ema": True}, lambda f, *_: mean_of(f, 0.5)),
    "seed": (1, {}, lambda f, *_: torch.equal(f.batches[0]["noise"],
                                              normal((4, 16, 16), 1, "noise", 0, [0]))),
    "mixed_precision": ("bf16", {}, lambda f, *_: (
        f.run.base.dtype == torch.bfloat16
        and {p.dtype for p in f.run.trained.parameters} == {torch.float32})),
    "gradient_checkpointing": (True, {}, lambda f, *_: f.run.base.unet.is_gradient_checkpointing),
    # in each step, and none before it
    "cache_latents": (False, {}, lambda f, *_: f.encoded == [True] * 3),
    "pre_compute_text_embeddings": (False, {}, lambda f, *_: not f.run.prompts.store.where
                                    and "text_encoder" in known(f)),
    "low_vram": (True, {"gradient_checkpointing": True}, lambda f, *_: torch.int8 in {
        p.dtype for p in f.run.base.unet.parameters()}),
    "allow_tf32": (True, {}, lambda f, *_: f.tf32 == {True}),
    # one block of several, not the whole network
    "compile": (True, {}, lambda f, *_: f.compiled == sum(
        type(part).__name__ == "BasicTransformerBlock" for part in f.run.base.unet.modules())),
    "validation_prompt": (["a photo of sks dog"], {}, lambda f, *_: validated(f) == {1, 2, 3}),
    "num_validation_images": (2, VALIDATED, lambda f, *_: any(name.endswith("step-000003/0-1.png")
                                                              for name in f.files)),
    "validation_steps": (2, VALIDATED, lambda f, *_: validated(f) == {2}),
    "validation_epochs": (1, VALIDATED, lambda f, *_: validated(f) == {3}),
    "num_report_images": (0, {"num_report_images": 1},
                          lambda f, *_: not any("on_off" in name for name in f.files)),
    "report_to": ("tensorboard", {},
                  lambda f, *_: any("/logs/dbcore/events" in name for name in f.files)),
    "logging_dir": ("curves", {"report_to": "tensorboard"},
                    lambda f, *_: any("/curves/dbcore/events" in name for name in f.files)),
    "output_dir": ("elsewhere", {},
                   lambda f, *_: {name.split("/")[0] for name in f.files} == {"elsewhere"}),
    "overwrite_output_dir": (True, FINISHED, None),
    "checkpointing_steps": (1, {}, lambda f, *_: saved_steps(f) == {1, 2, 3}),
    "checkpoints_total_limit": (1, {"checkpointing_steps": 1}, lambda f, *_: saved_steps(f) == {3}),
    "resume_from_checkpoint": ("latest", FINISHED, None),
    "push_to_hub": (True, {},
                    lambda f, *_: [name for name, *_ in f.uploads] == ["lora-dreambooth-model"]),
    "hub_model_id": ("me/dog", HUB, lambda f, *_: [name for name, *_ in f.uploads] == ["me/dog"]),
    "hub_token": ("hf_sentinel", HUB,
                  lambda f, *_: [token for _, token, _ in f.uploads] == ["hf_sentinel"]),
}  # fmt: skip
OWN_TESTS = {name for name, (*_, effect) in EFFECTS.items() if effect is None}


class Hub:
    """huggingface_hub's HfApi, as far as `push` calls it."""

    uploads: ClassVar = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, exist_ok):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
        self.uploads.append((repo_id, self.token, folder_path))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with bases, photos and a hub's cache; every run's base and photos are there."""
    world = tmp_path_factory.mktemp("world")
    make_options(world)
    other = make_base(world / "other base", seed=1)
    make_photos(world / "other photos", seed=1)
    make_photos(world / "class photos", seed=2)
    Image.fromarray(np.eye(40, 48, dtype=np.uint8) * 255).save(world / "photos" / "0.mask.png")
    make_tokenizer(world / "tokenizer")
    vocabulary = json.loads((world / "tokenizer" / "vocab.json").read_text())
    turned = dict(zip(vocabulary, list(vocabulary.values())[::-1]))
    (world / "tokenizer" / "vocab.json").write_text(json.dumps(turned))
    add_variant(world / "base", other)
    return world


@pytest.fixture(scope="module")
def outcome(world, tmp_path_factory):
    """A function: train with some options in a new working folder, and return what a user sees of
    it."""
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        patch.setenv("DBCORE_CACHE", str(world / "cache"))
        patch.setattr("huggingface_hub.HfApi", Hub)
        make_hub(world / "hub", patch, main=world / "base", second=world / "other base")

        def run(**more):
            key = repr(sorted(more.items()))
            if key not in known:
                known[key] = watch(world, tmp_path_factory.mktemp("here"), more, patch)
            return known[key]

        yield run


def watch(world, here, more, patch):
    options = {"pretrained_model_name_or_path": f"{world}/base",
               "instance_data_dir": f"{world}/photos",
               "instance_prompt": "a photo of sks dog", "learning_rate": RATE, "max_train_steps": 3,
               "report_to": "none", **more}  # fmt: skip
    options = {name: value.format(world=world) if isinstance(value, str) else value
               for name, value in options.items()}
    patch.chdir(here)
    if options.get("output_dir") == "finished":
        train(TrainConfig(**{**options, "overwrite_output_dir": True,
                             "resume_from_checkpoint": None}))
    facts = new_facts()
    said = io.StringIO()
    with spies(facts), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as back:
        if "num_report_images" in more:
            back.setattr("dbcore.engines.callbacks.write_report", write_report)
        try:
            facts.path = train(TrainConfig(**options))
        except ConfigError as error:
            facts.error = str(error)
    facts.said, facts.uploads = said.getvalue(), Hub.uploads[:]
    facts.files = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    if facts.path:
        facts.weights = load_file(facts.path)
        if (facts.path.parent / EMBEDS_NAME).is_file():
            facts.tokens = load_file(facts.path.parent / EMBEDS_NAME)
        facts.log = [json.loads(line)
                     for line in (facts.path.parent / "log.jsonl").read_text().splitlines()]
    return facts


def new_facts():
    return SimpleNamespace(
        error=None, path=None, run=None, saved=None, tokens={}, samples=[], batches=[], rates=[],
        grads=[], states={},
        path_of_weights=[], encoded=[], dropped=[], lengths=set(), class_batches=[],
        class_dtypes=set(), class_prompts=set(), tf32=set(), compiled=0)  # fmt: skip


def named(trained):
    """{"unet.name": parameter} of what a run trains."""
    return {f"{part}.{name}": p for part, module in trained.modules.items()
            for name, p in module.named_parameters() if p.requires_grad}


def copies(tensors):
    return {name: torch.zeros(1) if t is None else t.detach().clone()
            for name, t in tensors.items()}


@contextlib.contextmanager
def spies(facts):
    """Note what a run does, step by step."""
    Hub.uploads.clear()
    with pytest.MonkeyPatch.context() as patch:
        spy_on_steps(facts, patch)
        spy_on_the_base(facts, patch)
        yield


def spy_on_steps(facts, patch):
    update, finish, batch = Trained.update, Result.after_train, DreamBoothData.batch

    def updating(trained, skipped):
        grads = {name: p.grad for name, p in named(trained).items()}
        facts.path_of_weights = facts.path_of_weights or [copies(named(trained))]
        facts.grads.append(copies(grads))
        facts.rates.append([group["lr"] for group in trained.optimizer.param_groups])
        facts.tf32.add(torch.backends.cuda.matmul.allow_tf32)
        result = update(trained, skipped)
        facts.path_of_weights.append(copies(named(trained)))
        facts.states = facts.states or {name: copies({
            key: t for key, t in trained.optimizer.state[p].items() if torch.is_tensor(t)})
            for name, p in named(trained).items()}
        return result

    def finishing(result, run):
        facts.run, run.predict = run, None  # what was recorded for replays is large
        with run.trained.averaged():
            facts.saved = copies(named(run.trained))
        return finish(result, run)

    def batching(data, base, samples, step):
        facts.samples += samples
        before = len(facts.encoded)
        facts.batches.append(batch(data, base, samples, step))
        facts.encoded[before:] = [True] * (len(facts.encoded) > before)
        return facts.batches[-1]

    patch.setattr(Trained, "update", updating)
    patch.setattr(Result, "after_train", finishing)
    patch.setattr(DreamBoothData, "batch", batching)


def spy_on_the_base(facts, patch):
    generate, encode, predict = BASE.generate, BASE.encode_images, BASE.predict
    drop = SampleDropout.forward

    def generating(base, prompts, *args, stream="picture", **more):
        if stream == "class image":
            facts.class_batches.append(len(prompts))
            facts.class_dtypes.add(base.dtype)
            facts.class_prompts.update(prompts)
        return generate(base, prompts, *args, stream=stream, **more)

    def encoding(base, pixels):
        facts.seen = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        facts.encoded.append(False)
        return encode(base, pixels)

    def predicting(base, x_t, t, cond, *rest):
        facts.lengths.update(int(c.shape[1]) for c in cond.values())
        return predict(base, x_t, t, cond, *rest)

    def dropping(module, x):
        out = drop(module, x)
        facts.dropped.append(float((out == 0).float().mean()))
        return out

    def compiling(function):
        facts.compiled += 1
        return function

    for cls, name, spy in ((BASE, "generate", generating), (BASE, "encode_images", encoding),
                           (BASE, "predict", predicting),
                           (SampleDropout, "forward", dropping), (torch, "compile", compiling),
                           (trainer, "COMPILE_FROM", 1)):
        patch.setattr(cls, name, spy)


def test_every_field_is_in_the_table():
    assert list(EFFECTS) == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize("name", [name for name in EFFECTS if name not in OWN_TESTS])
def test_an_option_has_its_own_effect(name, outcome, world):
    value, both, effect = EFFECTS[name]
    before, after = outcome(**both), outcome(**{**both, name: value})
    assert before.error is after.error is None
    assert effect(after, before, world)
    assert not effect(before, before, world)


def test_prior_preservation_learns_as_many_pictures_of_the_class(outcome):
    more = {"class_prompt": "a photo of a dog", "num_class_images": 3}
    assert "--class_prompt does nothing without --with_prior_preservation" in outcome(**more).error
    assert "--prior_loss_weight does nothing" in outcome(prior_loss_weight=0.5).error
    after = outcome(**more, with_prior_preservation=True)
    assert [sample.is_class for sample in after.samples] == [False, True] * 3
    assert loss_is(after)


def test_prior_prediction_learns_the_same_noisy_photo_under_the_class_prompt(outcome):
    prior = {"class_prompt": "a photo of a dog", "prior_prediction": True}
    after = outcome(**prior)
    assert [sample.prompt for sample in after.samples] == ["a photo of sks dog",
                                                           "a photo of a dog"] * 3
    assert all((rows[0] == rows[1]).all() for batch in after.batches
               for rows in (batch["x0"], batch["noise"], batch["t"]))
    assert loss_is(after)
    assert loss_is(outcome(**prior, prior_loss_weight=0.5), prior=0.5)
    assert after.class_batches == []


def test_a_finished_run_is_guarded_replaced_or_gone_on_with(outcome):
    assert "holds a run already" in outcome(**FINISHED).error
    replaced, resumed = (outcome(**FINISHED, **more) for more in (
        {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}))
    assert len(replaced.rates) == 3
    assert "is finished" not in replaced.said
    assert not resumed.rates
    assert "is finished (checkpoint-3); nothing was changed" in resumed.said
