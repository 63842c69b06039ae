"""A family that is none of the package's own, in this one file, through training and every tool.

A convolutional denoiser on pixels, without an autoencoder, by rectified flow, told the mean of the
words' vectors. What it needs is said here, and nowhere else: the proof that engines and tools know
no family.
"""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from pipelines import make_tokenizer
from runs import LORA, make_photos, read_run
from transformers import T5Config, T5EncoderModel

from dbcore.config import ConfigError, GenerateConfig, TrainConfig
from dbcore.engines import evaluate as metrics
from dbcore.engines.sample import generate
from dbcore.engines.trainer import train
from dbcore.models import base as models
from dbcore.models.process import Flow
from dbcore.tools import evaluate
from dbcore.tools.doctor import examine

SIDE, WIDTH, WORDS = 16, 8, 12


class PixelDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity of pixels from them, the time, and one vector a prompt."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, side=SIDE, width=WIDTH, words=WORDS):
        super().__init__()
        self.look, self.say = (torch.nn.Conv2d(*io, 3, padding=1)
                               for io in ((4, width), (width, 3)))
        self.listen = torch.nn.Linear(words, width)

    def forward(self, pixels, t, words, return_dict=False):
        time = t.to(pixels.dtype).view(-1, 1, 1, 1).expand(len(pixels), 1, *pixels.shape[2:])
        seen = self.look(torch.cat([pixels, time], dim=1)) + self.listen(words)[:, :, None, None]
        return (self.say(seen.tanh()),)


class PixelPipeline(DiffusionPipeline):
    def __init__(self, transformer, text_encoder, tokenizer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder,
                              tokenizer=tokenizer, scheduler=scheduler)

    def __call__(self, words, no_words, latents, num_inference_steps, guidance_scale, **_):
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            time = (t / 1000).expand(len(latents))
            with_words, without = (self.transformer(latents, time, w)[0] for w in (words, no_words))
            velocity = without + guidance_scale * (with_words - without)
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        return SimpleNamespace(images=latents)


class PixelFlow(models.Family):
    pipeline_class = PixelPipeline
    roles: ClassVar = {
        "denoiser": ("transformer",), "autoencoder": (), "text_encoders": ("text_encoder",)}
    lora_targets: ClassVar = {"transformer": {"attention": ["listen"],
                                              "attention+ff": ["listen", "say"]}}
    defaults: ClassVar = {**models.Family.defaults, "num_inference_steps": 2, "learning_rate": 0.05}
    timestep_argument = "t"
    process, side_multiple = Flow(mu=lambda positions: 0.1), 1

    def native_resolution(self):
        return self.config_of("transformer")["side"]

    def latent_shape(self, height, width=None):
        return 3, height, width or height

    def component_class(self, component):
        return PixelDenoiser if component == "transformer" else super().component_class(component)

    def encode_text(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", truncation=True,
                             return_tensors="pt").input_ids
        return {"words": self.text_encoder(ids.to(self.device))[0].mean(dim=1)}

    def pooled_text(self, prompts):
        return self.encode_text(prompts)["words"]

    def encode_images(self, pixels):
        pixels = pixels.to(self.device).float()
        return pixels, torch.zeros_like(pixels)

    def decode(self, latents):
        return latents.float().clamp(-1, 1)

    def predict(self, x_t, t, cond, geometry=None):
        return self.transformer(x_t.to(self.dtype), t, cond["words"].to(self.dtype))[0].float()

    def pipeline_inputs(self, cond, negative):
        return {"words": cond["words"], "no_words": negative["words"]}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.FAMILIES, "PixelPipeline", PixelFlow)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its folder, with random weights."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    PixelDenoiser().save_pretrained(folder / "transformer")
    tokenizer = make_tokenizer(folder / "tokenizer")
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=WORDS, d_kv=4, d_ff=8, num_layers=1,
                            num_heads=2)).save_pretrained(folder / "text_encoder")  # fmt: skip
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "PixelPipeline", "transformer": ["made_up", "PixelDenoiser"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def options(base, tmp_path_factory):
    return {
        "pretrained_model_name_or_path": str(base), "report_to": "none", "max_train_steps": 4,
        "instance_data_dir": str(make_photos(tmp_path_factory.mktemp("data") / "photos")),
        "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog",
        "with_prior_preservation": True, "num_class_images": 2, "snr_gamma": 5.0, "use_ema": True,
        "use_tlora": True, "weighting_scheme": "mode",
        "validation_prompt": "sks dog in snow", "validation_steps": 2, "num_validation_images": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "dog"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        train(TrainConfig(**options, output_dir=str(folder)))
    return folder


def test_it_is_trained_and_says_so(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(log) == 4
    assert all(0 < t < 1 for record in log for t in record["timesteps"])
    card = (run / "README.md").read_text()
    assert "it changed the" in card
    assert (run / "report" / "loss_by_timestep.png").is_file()


def test_a_resumed_run_is_the_same_bit_for_bit(run, options, tmp_path, monkeypatch):
    monkeypatch.setenv("DBCORE_CACHE", str(tmp_path / "cache"))
    for steps, more in ((2, {}), (4, {"resume_from_checkpoint": "latest"})):
        train(TrainConfig(**{**options, "max_train_steps": steps}, **more,
                          output_dir=str(tmp_path / "run")))
    assert read_run(tmp_path / "run") == read_run(run)


def test_images_are_generated_with_the_lora_and_differ_from_those_without(run, base):
    common = {"prompt": "a photo of sks dog", "num_images": 1}
    with_lora = generate(GenerateConfig(checkpoint_dir=[str(run)], **common))[0][0]
    without = generate(GenerateConfig(pretrained_model_name_or_path=str(base), **common))[0][0]
    assert with_lora.size == (SIDE, SIDE)
    assert with_lora.tobytes() != without.tobytes()


def test_a_run_is_evaluated(run, tmp_path, monkeypatch):
    def colours(images):
        return torch.tensor([[*image.resize((1, 1)).getpixel((0, 0)), 1.0] for image in images])

    monkeypatch.setattr(metrics, "load_encoders",
                        lambda base: [metrics.Encoder("colours", colours)])
    (tmp_path / "list.json").write_text('{"scenes": ["in snow"], "looks": ["red"]}')
    result = evaluate.evaluate([evaluate.read_run(run)], tmp_path / "out",
                               str(tmp_path / "list.json"), num_images=2)
    scores = result["subjects"]["dog"]
    assert scores["floor"]["subject, colours"] != scores["adapter"]["subject, colours"]


def test_doctor_looks_at_it(options):
    report = {title: "\n".join(lines) for title, lines in examine(TrainConfig(**options))}
    assert f"resolution: {SIDE}" in report["What auto becomes"]
    assert "'sks' is 1 token" in report["Identifier"]
    assert "It fits" in report["Memory"]


def test_a_text_encoder_that_no_preset_names_is_not_trained(options, tmp_path):
    with pytest.raises(ConfigError, match="--train_text_encoder"):
        train(TrainConfig(**options, train_text_encoder=True, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / LORA).exists()
