"""A network's operations recorded once and replayed: the same numbers, without the Python between them.

A small UNet on a CPU loses much of its time in the Python around its operations. torch.compile would take that away
too, after minutes of compiling; recording takes a second at most for the toy base.
"""

import warnings
from contextlib import contextmanager

import torch

from dbcore.models.lora import SampleDropout


def can_replay(module):
    """Whether a replay of a network is worth it and right: on a CPU, nothing random in it, no Python on the way back."""
    random = any(part.p for part in module.modules() if isinstance(part, (torch.nn.Dropout, SampleDropout)))
    return module.device.type == "cpu" and not random and not module.is_gradient_checkpointing


class Replay:
    """`predict(x_t, t, cond)` of a base (see `StableDiffusion.predict`), recorded anew for each shape of its inputs.

    What may change from call to call is what it is given, and the trainable parameters of `module`, the network. All
    else stays as it was when it was recorded: see `can_replay`.
    """

    def __init__(self, predict, module):
        self.predict, self.graphs = predict, {}
        parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in parameters]
        self.places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in parameters]

    def __call__(self, x_t, t, cond):
        inputs = (x_t, t, *cond.values(), *self.parameters)
        key = tuple((name, tensor.shape) for name, tensor in [("x_t", x_t), *cond.items()])
        if key not in self.graphs:
            self.graphs[key] = self.record(inputs, list(cond))
        with torch.jit.optimized_execution(False):  # which would rewrite the third replay, and so its last bits
            return self.graphs[key](*inputs)

    @torch.no_grad()
    def record(self, inputs, names):
        def run(x_t, t, *rest):
            self.put(rest[len(names):])  # as inputs: the recorder takes everything else for constants
            return self.predict(x_t, t, dict(zip(names, rest)))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shapes become constants, as is meant; torch.jit gets no new features
                return torch.jit.trace(run, inputs, check_trace=False)
        finally:
            self.put(self.parameters)

    def put(self, tensors):
        for (module, name), tensor in zip(self.places, tensors):
            module._parameters[name] = tensor


@contextmanager
def replayed(unet):
    """In the block, a pipeline's calls of `unet` are replays where they can be; it must not change meanwhile.

    For many pictures: recording takes as long as some ten calls, and is lost at the end.
    """
    if not can_replay(unet):
        yield
        return
    own = unet.forward
    replay = Replay(lambda x_t, t, cond: own(x_t, t, **cond).sample, unet)
    unet.forward = lambda x_t, t, encoder_hidden_states, **_: (
        replay(x_t, t, {"encoder_hidden_states": encoder_hidden_states}),)
    try:
        yield
    finally:
        del unet.forward
