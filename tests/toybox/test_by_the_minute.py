"""The recipe by the minute, from nothing to a base, in sizes that a CPU makes in seconds."""

import functools
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from dbcore.toybox import __main__ as toybox
from dbcore.toybox import corpus, encoder, fresh, tracer, weights
from dbcore.toybox.corpus import sample
from dbcore.toybox.denoiser import greedy_noise
from dbcore.toybox.scene import caption, mirror
from dbcore.toybox.words import train_tokenizer

pytest.importorskip("numba")


@pytest.fixture
def small(monkeypatch):
    """Few scenes, and quick renders: 8 pixels a side, each shown as 8 x 8."""
    real = tracer._render
    eight = np.ones((8, 8, 1), np.float32)
    monkeypatch.setattr(tracer, "_render", lambda *scene: np.kron(real(*scene[:-1], 8), eight))
    for module, name, value in (
            (corpus, "SHARD", 16), (encoder, "AMONG", 2),
            (encoder, "SUBJECTS", 12), (fresh, "CHUNK", 16), (weights, "PART", 2**20)):
        monkeypatch.setattr(module, name, value)


def test_a_base_is_made_by_the_minute_and_taken_up_from_its_weights(tmp_path, small, capsys):
    def run(name, *options):
        toybox.main(["--device", "cpu", "--minutes", "0.002", "--count", "16", "--unet_batch", "8",
                     "--work_dir", str(tmp_path / name), "--output_dir", str(tmp_path / "base"),
                     "--weights_dir", str(tmp_path / "weights"), *options])
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    assert len(run("first", "--until", "save")) == 6  # stages, each ended by its time
    parts = sorted((tmp_path / "weights").iterdir())
    assert len(parts) > 2
    assert all(part.stat().st_size <= 2**20 for part in parts)
    unet = torch.load(tmp_path / "first" / "unet.pt", weights_only=True)
    assert unet["seconds"] >= 0.002 * 60 * 4.5 / 8
    assert (tmp_path / "base" / "model_index.json").exists()
    # elsewhere, from the weights alone, nothing is left to do
    assert not run("second", "--until", "subject")
    taken_up = torch.load(tmp_path / "second" / "unet.pt", weights_only=True)
    assert taken_up["step"] == unet["step"]
    for name, average in unet["average"].items():
        torch.testing.assert_close(taken_up["module"][name].float(), average, atol=1e-3, rtol=1e-3)


def test_a_prepared_chunk_holds_scenes_and_captions_of_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh, "CHUNK", 3)
    folder = train_tokenizer(tmp_path)
    packed, ids = fresh.prepare(folder, 0, 2)
    scenes = [sample(0, k) for k in (6, 7, 8)]
    for held, right in zip(packed, tracer.pack(scenes), strict=True):
        np.testing.assert_array_equal(held, right)
    tokenizer = fresh.load_tokenizer(folder)
    assert ids.shape == (3, 2, fresh.CAPTIONS, tokenizer.model_max_length)
    for k, scene in enumerate(scenes):
        for side, shown in enumerate((scene, mirror(*scene))):
            texts = tokenizer.batch_decode(ids[k, side].int(), skip_special_tokens=True)
            words = [text.replace(",", " ").split() for text in texts]
            whole = caption(*shown).replace(",", " ").split()
            assert words[0] == whole
            assert all(set(part) <= {*whole, "a", "an"} for part in words[1:])


class Now:
    """Workers whose results are there when they are `ready`."""

    ready = True

    def submit(self, function, *args):
        done, number = Future(), args[-1]
        if self.ready:
            ids = torch.full((2, 2, fresh.CAPTIONS, 56), number, dtype=torch.int16)
            done.set_result(([np.full(2, number)], ids))
        return done

    def shutdown(self, **options):
        pass


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """Latents whose every number is that of their chunk of 2; 4 scenes first, in room for 8."""
    monkeypatch.setattr(fresh, "CHUNK", 2)
    monkeypatch.setattr(fresh, "start_workers", lambda device: Now())
    monkeypatch.setattr(tracer, "render_packed", lambda packed, size, device:
                        torch.from_numpy(packed[0]).view(-1, 1, 1, 1).expand(-1, 64, 64, 3))
    monkeypatch.setattr(fresh, "to_pixels", lambda pictures: pictures.permute(0, 3, 1, 2))
    monkeypatch.setattr(fresh, "scaled_latents",
                        lambda net, x: x[:, :1, :16, :16].float().expand(-1, 8, -1, -1))
    net, folder = torch.nn.Linear(1, 1), train_tokenizer(tmp_path)
    net.device = torch.device("cpu")
    return functools.partial(fresh.FreshLatents, net, folder, 0, batch=32, first=4, capacity=8)


def test_scenes_come_with_the_steps_and_the_oldest_go(latents):
    data = latents()
    for step, count in ((0, 4), (1, 6), (1, 6), (2, 8), (3, 10)):
        z, noise, u, ids = data.inputs(step)
        assert data.count == count
    assert data.latents[:, 0, 0, 0, 0].tolist() == [4, 4, 1, 1, 2, 2, 3, 3]
    assert z.shape == noise.shape == (32, 8, 16, 16)
    told = ids[:, 1] != data.empty[0, 1]  # the others have no caption
    assert 16 < told.sum() <= 32
    assert torch.equal(z[told][:, 0, 0, 0].long(), ids[told][:, 0])
    assert all(k <= 32 * one <= k + 1 for k, one in enumerate(sorted(u.tolist())))
    assert (u.diff() < 0).any()


def test_a_step_does_not_wait_for_a_scene(latents):
    data = latents()
    data.inputs(0)
    data.waiting[0] = Future()
    data.inputs(3)
    assert data.count == 4


def test_a_second_run_goes_on_with_other_scenes(latents):
    data = latents(steps_done=10)  # which saw 4 + 10 * 32 / 16 scenes
    data.inputs(10)
    assert data.latents[:4, 0, 0, 0, 0].tolist() == [12, 12, 13, 13]


def test_greedy_noise_is_like_the_free_one_but_nearer():
    z = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    noise = greedy_noise(z)
    torch.manual_seed(2)
    free = torch.randn(2, 32, 8, 4, 4).flatten(0, 1)
    for group in range(2):  # the same ones, in other places
        taken, offered = (x[32 * group:32 * group + 32].flatten(1) for x in (noise, free))
        assert torch.equal(taken.sort(0).values, offered.sort(0).values)
    assert (noise - z).square().mean() < 0.95 * (free - z).square().mean()


def test_weights_are_written_while_a_stage_trains(tmp_path):
    state = {"module": {"w": torch.ones(2)}, "average": None, "optimizers": [], "step": 3,
             "seconds": 1.0}
    (tmp_path / "work").mkdir()
    torch.save(state, tmp_path / "work" / "unet.pt")
    with weights.weights_kept(tmp_path / "work", tmp_path / "weights", every=0.01):
        for _ in range(500):
            if list((tmp_path / "weights").glob("weights.*")):
                break
            time.sleep(0.01)
        else:
            pytest.fail("nothing is written before the end")
    weights.read_weights(tmp_path / "weights", tmp_path / "other")
    assert torch.load(tmp_path / "other" / "unet.pt", weights_only=True)["step"] == 3


@pytest.mark.gpu
def test_no_step_on_a_gpu_waits_for_it(tmp_path, monkeypatch):
    pytest.importorskip("numba_cuda")  # scenes are rendered on the GPU too
    from dbcore.toybox import denoiser
    from dbcore.toybox.autoencoder import make_autoencoder
    from dbcore.toybox.clip import make_text_encoder

    folder = train_tokenizer(tmp_path)
    text = make_text_encoder(fresh.load_tokenizer(folder))
    autoencoder = make_autoencoder().to("cuda")
    data = fresh.FreshLatents(autoencoder, folder, 0, batch=64, first=256, capacity=512)
    losses = []

    def steps(stage, folder, net, loss_at, *args, **options):
        for step in range(100):
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            loss = loss_at(step, 0.0)["loss"]
            loss.backward()
            losses.append(loss.detach())
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(denoiser, "fit", steps)
    denoiser.train_unet(text, data, tmp_path, 0, device="cuda")
    data.close()
    assert data.count > 256
    assert torch.isfinite(torch.stack(losses)).all()
