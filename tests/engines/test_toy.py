"""The shipped base, a shipped subject, no GPU: what is learnt can be seen."""

import pytest

import dbcore
from dbcore.config import TrainConfig
from dbcore.engines.trainer import train


@pytest.mark.slow
def test_the_shipped_base_learns_a_subject_so_that_it_is_seen(tmp_path):
    path = train(TrainConfig(
        pretrained_model_name_or_path=str(dbcore.TOY_BASE),
        instance_data_dir=str(dbcore.SUBJECTS / "dog"),
        instance_prompt="a photo of sks dog", max_train_steps=60, report_to="none",
        output_dir=tmp_path / "run"))
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "Yes, it changed the images" in card
