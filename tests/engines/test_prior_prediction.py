"""Prior prediction: the class prompt's target is what the base, without anything trained, predicts
of the same noisy photo."""

import pytest
import torch
from pipelines import make_flux2_miniature, make_sdxl_miniature, make_tiny_pipeline
from runs import leave_out_report, make_photos, read_run

from dbcore.config import TrainConfig
from dbcore.engines import losses
from dbcore.engines.trainer import train
from dbcore.models.base import load_base

FAMILIES = {"sd": make_tiny_pipeline, "sdxl": make_sdxl_miniature, "flux2": make_flux2_miniature}
CLASS = "a photo of a dog"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function of a family and options: (options, folder, [(batch, prediction, target)])."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)

        def run(family, **more):
            folder = tmp_path_factory.mktemp(family)
            options = {
                "pretrained_model_name_or_path": str(FAMILIES[family](folder / "base")),
                "instance_data_dir": str(make_photos(folder / "photos")), "resolution": 32,
                "instance_prompt": "a photo of sks dog", "class_prompt": CLASS,
                "prior_prediction": True, "max_train_steps": 2, "learning_rate": 0.01, "rank": 2,
                "report_to": "none", "output_dir": str(folder / "run"), **more}  # fmt: skip
            seen, batch_loss, loss = [], losses.batch_loss, losses.dreambooth_loss
            with pytest.MonkeyPatch.context() as spy:
                spy.setattr("dbcore.engines.trainer.batch_loss", lambda process, batch, *rest: (
                    seen.append([batch]), batch_loss(process, batch, *rest))[1])
                spy.setattr(losses, "dreambooth_loss", lambda prediction, target, *rest: (
                    seen[-1].extend([prediction.detach(), target]),
                    loss(prediction, target, *rest))[1])
                train(TrainConfig(**options))
            return options, folder / "run", seen

        yield run


@pytest.mark.parametrize(("family", "more"), [
    ("sd", {}), ("sd", {"train_text_encoder": True, "text_encoder_lr": 0.1}), ("sdxl", {}),
    ("flux2", {})], ids=["sd", "text encoder", "sdxl", "flux2"])  # fmt: skip
def test_the_class_prompts_target_is_the_frozen_bases_prediction(runs, family, more):
    options, folder, seen = runs(family, **more)
    base = load_base(options["pretrained_model_name_or_path"])
    for batch, _, target in seen:
        x_t, t = base.process.corrupt(batch["x0"], batch["noise"], batch["t"])[1:], batch["t"][1:]
        with torch.no_grad():
            frozen = base.predict(x_t, t, base.encode_text([CLASS]), batch["geometry"][1:])
        torch.testing.assert_close(target[1:], frozen, rtol=0, atol=1e-6)
        learnt = base.process.target(batch["x0"], batch["noise"], batch["t"])[:1]
        assert torch.equal(target[:1], learnt)
    drift = [(prediction - target)[1:].abs().max() for _, prediction, target in seen]
    assert drift[0] < 1e-6  # B is 0
    assert drift[1] > 1e-4
    assert [len(record["losses"]) for record in read_run(folder)["log"]] == [2, 2]
