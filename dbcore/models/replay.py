"""A network's operations, recorded once and replayed without the Python between them.

The numbers are the same. A small network on a CPU loses much of its time in that Python.
torch.compile would take it away too, after minutes of compiling; recording takes a second at most
for the toy base.
"""

import warnings
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dbcore.models.lora import SampleDropout


def can_replay(module):
    """Whether a replay of a network is worth it and right.

    On a CPU, with nothing random in it, and no Python on the way back.
    """
    random = any(part.p for part in module.modules()
                 if isinstance(part, (torch.nn.Dropout, SampleDropout)))
    return module.device.type == "cpu" and not random and not module.is_gradient_checkpointing


class Replay:
    """A function that calls a network, recorded anew for each shape of its inputs.

    The inputs are tensors, alone or in tuples and dicts, and constants beside them; the output is a
    tensor, or a tuple of tensors. What may change from call to call is the inputs' numbers, and the
    trainable parameters of `module`, the network. All else stays as it was recorded, and may (see
    `can_replay`).
    """

    def __init__(self, function, module):
        self.function, self.graphs = function, {}
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
                       for name, _ in named]

    def __call__(self, *args, **kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        shapes = tuple(leaf.shape if torch.is_tensor(leaf) else leaf for leaf in leaves)
        key, inputs = (structure, shapes), (*tensors, *self.parameters)
        if key not in self.graphs:
            self.graphs[key] = self.record(inputs, leaves, structure)
        with torch.jit.optimized_execution(False):  # it would change the third replay's last bits
            return self.graphs[key](*inputs)

    @torch.no_grad()
    def record(self, inputs, leaves, structure):
        """The graph of the function for inputs of these shapes, and these constants."""
        def run(*inputs):
            given = iter(inputs)
            filled = [next(given) if torch.is_tensor(leaf) else leaf for leaf in leaves]
            self.put(given)  # as inputs: the recorder takes everything else for constants
            args, kwargs = tree_unflatten(filled, structure)
            return self.function(*args, **kwargs)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shapes become constants, as is meant
                return torch.jit.trace(run, inputs, check_trace=False)
        finally:
            self.put(self.parameters)

    def put(self, tensors):
        for (module, name), tensor in zip(self.places, tensors):
            module._parameters[name] = tensor


@contextmanager
def replayed(module):
    """In the block, a pipeline's calls of a network are replays where they can be.

    The network must not change meanwhile. For many images: recording takes as long as some ten
    calls, and is lost at the end.
    """
    if not can_replay(module):
        yield
        return
    module.forward = Replay(module.forward, module)
    try:
        yield
    finally:
        del module.forward
