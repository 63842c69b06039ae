"""A replay of the UNet gives the network's own numbers, to the last bit, as its LoRA learns."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import make_tiny_pipeline

from dbcore.models.base import load_base
from dbcore.models.lora import add_lora, lora_parameters, set_dropout
from dbcore.models.replay import Replay, can_replay, faster, replayed


@pytest.fixture
def base(tmp_path):
    return load_base(make_tiny_pipeline(tmp_path / "base"))


def batch(base, size, seed):
    generator = torch.Generator().manual_seed(seed)
    width = base.text_encoder.config.hidden_size
    x_t = torch.randn(size, *base.latent_shape(base.resolution), generator=generator)
    cond = torch.randn(size, base.tokenizer.model_max_length, width, generator=generator,
                       requires_grad=True)
    return x_t, torch.randint(1000, (size,), generator=generator), {"encoder_hidden_states": cond}


@pytest.mark.parametrize("more", [{}, {"layers": "all"}, {"layers": "all", "use_dora": True},
                                  {"use_rslora": True}], ids=str)
def test_a_replay_has_the_same_bits_forward_and_back_at_every_step_and_size(base, more):
    add_lora(base.unet, 4, 4, **more)
    base.unet.train()
    parameters = lora_parameters(base.unet)
    optimizer, replay = torch.optim.AdamW(parameters, lr=0.05), Replay(base.predict, base.unet)
    for step in range(5):
        x_t, t, cond = batch(base, 1 + step % 2, seed=step)
        leaves, seen = [*parameters, *cond.values()], []
        for predict in (base.predict, replay):
            prediction = predict(x_t, t, cond)
            seen.append((prediction, *torch.autograd.grad(prediction.square().mean(), leaves)))
        assert all(map(torch.equal, *seen))
        for parameter, gradient in zip(parameters, seen[0][1:]):
            parameter.grad = gradient
        optimizer.step()
    assert len(replay.graphs) == 2  # batches of one, and of two
    # the network has its own again
    assert all(a is b for a, b in zip(parameters, lora_parameters(base.unet)))


def test_what_python_decides_anew_each_time_is_not_replayed(base):
    assert can_replay(base.unet)
    base.unet.enable_gradient_checkpointing()
    assert not can_replay(base.unet)
    base.unet.disable_gradient_checkpointing()
    add_lora(base.unet, 4, 4, dropout=0.1)
    set_dropout({"unet": base.unet}, [0])
    assert not can_replay(base.unet)


def test_a_failed_recording_leaves_the_network_as_it_was(base):
    add_lora(base.unet, 4, 4)
    before = lora_parameters(base.unet)
    x_t, t, cond = batch(base, 1, seed=0)
    with pytest.raises(RuntimeError, match="channels"):
        Replay(base.predict, base.unet)(x_t[:, 1:], t, cond)
    after = lora_parameters(base.unet)
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(before, after))


def test_pictures_drawn_from_a_replay_are_the_same(base, monkeypatch):
    def draw():
        return [picture for count in (2, 1, 2) for picture in base.generate(
            ["a dog", "a cat"][:count], [1, 2][:count], num_inference_steps=3)]

    record, recorded = Replay.record, []
    monkeypatch.setattr(Replay, "record", lambda self, inputs, *rest: (
        recorded.append(len(inputs[0])), record(self, inputs, *rest))[1])
    plain, calls = draw(), []
    base.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with replayed(base.unet):
        replay = draw()
    assert recorded == [4, 2]
    assert len(calls) == 2
    assert all(map(np.array_equal, plain, replay))
    assert "forward" not in vars(base.unet)


def test_a_network_that_cannot_be_replayed_draws_as_ever(base):
    base.unet.enable_gradient_checkpointing()
    with replayed(base.unet):
        assert "forward" not in vars(base.unet)


def test_faster_is_the_same_function(base):
    add_lora(base.unet, 4, 4)
    x_t, t, cond = batch(base, 1, seed=0)
    found = faster(base.predict, base.unet)
    assert isinstance(found, Replay)
    assert torch.equal(found(x_t, t, cond), base.predict(x_t, t, cond))


def test_batches_that_add_up_are_not_replayed_by_a_gpu_whose_gradients_lie_in_one_place(base):
    gpu = SimpleNamespace(device=torch.device("cuda"), modules=list, named_parameters=list,
                          is_gradient_checkpointing=False)
    assert isinstance(faster(base.predict, gpu), Replay)
    assert faster(base.predict, gpu, batches=2) == base.predict
    assert faster(base.predict, gpu, shapes=2) == base.predict  # each shape's graph takes memory


def test_a_cuda_graph_is_asked_for_with_what_is_trained_and_where_it_fails_python_goes_on(
        base, monkeypatch, capsys):
    add_lora(base.unet, 4, 4)
    x_t, t, cond = batch(base, 1, seed=0)
    replay = Replay(base.predict, base.unet)
    replay.on_gpu = True

    def graphed(function, samples, allow_unused_input):
        asked.append((list(function.parameters()), [x.requires_grad for x in samples]))
        forward = function.forward
        function.forward = lambda *inputs: forward(*inputs) + 1
        return function

    def refused(function, samples, allow_unused_input):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    asked, wanted = [], base.predict(x_t, t, cond)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    assert torch.equal(replay(x_t, t, cond), wanted + 1)
    (parameters, gradients), = asked
    assert list(map(id, parameters)) == list(map(id, lora_parameters(base.unet)))
    assert gradients == [False, False, True]
    replay.graphs.clear()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refused)
    assert torch.equal(replay(x_t, t, cond), wanted)
    assert "not permitted when stream is capturing" in capsys.readouterr().out


def test_a_replay_goes_when_it_is_let_go(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda function, *_, **__: setattr(function, "forward", function.forward))
    replay = Replay(base.predict, base.unet)
    replay.on_gpu = True
    replay(*batch(base, 1, seed=0))
    gone = weakref.ref(replay)
    gc.disable()
    try:
        del replay
        assert gone() is None
    finally:
        gc.enable()


def test_a_recording_keeps_no_weight_of_a_network_that_is_gone(base):
    add_lora(base.unet, 4, 4)
    x_t, t, cond = batch(base, 1, seed=0)
    weights = [weakref.ref(tensor) for tensor in base.unet.state_dict(keep_vars=True).values()]
    replay = Replay(base.predict, base.unet)
    replay(x_t, t, cond)
    del replay, base.unet
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
