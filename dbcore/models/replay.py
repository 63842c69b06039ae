"""A network's operations, recorded once and replayed without the Python between them.

The numbers are the same. A small network on a CPU loses much of its time in that Python, and so
does any network on a GPU that is faster than Python can give it work. torch.compile would take it
away too, after minutes of compiling; recording takes a second or two.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dbcore.models.lora import SampleDropout


def faster(predict: Callable, module: torch.nn.Module, compile: bool = False,
           batches: int = 1, shapes: int = 1) -> Callable:
    """`predict`, a function that calls a network and is trained through it, with less Python in it.

    `compile`: torch.compile the blocks that the network repeats, so that one is compiled for many.
    `batches`: how many are added up in one step's gradients. `shapes`: how many the inputs have.
    """
    if compile:
        if not getattr(module, "_repeated_blocks", None):
            return torch.compile(predict)
        module.compile_repeated_blocks()
    # a CUDA graph leaves its gradients in the same place each time: a second batch's would be added
    # to themselves; and each shape's graph keeps the memory of a step of its own
    replays = can_replay(module) and (module.device.type == "cpu" or batches == shapes == 1)
    return Replay(predict, module) if replays else predict


def can_replay(module: torch.nn.Module) -> bool:
    """Whether a replay of a network is worth it and right.

    With nothing random in it, and no Python on the way back.
    """
    random = any(part.p for part in module.modules()
                 if isinstance(part, (torch.nn.Dropout, SampleDropout)))
    there = module.device.type in ("cpu", "cuda")
    return there and not random and not module.is_gradient_checkpointing


class Replay:
    """A function that calls a network, recorded anew for each shape of its inputs.

    On a CPU torch.jit records it, on a GPU a CUDA graph. The inputs are tensors, alone or in tuples
    and dicts, and constants beside them; the output is a tensor, or a tuple of tensors. What may
    change from call to call is the inputs' numbers, and the parameters of `module`, the network
    (on a GPU, the trained ones). All else stays as it was recorded, and may (see `can_replay`).
    """

    def __init__(self, function: Callable, module: torch.nn.Module):
        self.function = function
        self.graphs: dict[Any, Callable] = {}
        self.on_gpu = module.device.type == "cuda"
        # torch.jit keeps what it has recorded for good, and constants with it: no weight is one
        self.places = [(place, name) for part in module.modules()
                       for place in (part._parameters, part._buffers)
                       for name, tensor in place.items() if tensor is not None]
        self.parameters = [place[name] for place, name in self.places]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        key = structure, tuple((leaf.shape, leaf.dtype, leaf.requires_grad) if torch.is_tensor(leaf)
                               else leaf for leaf in leaves)
        if key not in self.graphs:
            record = self.capture if self.on_gpu else self.record
            self.graphs[key] = record(tensors, leaves, structure)
        if self.on_gpu:
            return self.graphs[key](*tensors)
        with torch.jit.optimized_execution(False):  # it would change the third replay's last bits
            return self.graphs[key](*tensors, *self.parameters)

    @torch.no_grad()
    def record(self, tensors: list[torch.Tensor], leaves: list[Any], structure: Any) -> Callable:
        """The graph of the function for inputs of these shapes, and these constants."""
        count = len(tensors)

        def run(*inputs):
            self.put(inputs[count:])  # as inputs: the recorder takes all else for constants
            return call(self.function, *inputs[:count], leaves=leaves, structure=structure)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shapes become constants, as is meant
                return torch.jit.trace(run, (*tensors, *self.parameters), check_trace=False)
        finally:
            self.put(self.parameters)

    def capture(self, tensors: list[torch.Tensor], leaves: list[Any], structure: Any) -> Callable:
        """A CUDA graph of the function, and one of the way back; the function where that fails."""
        samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        eager = partial(call, self.function, leaves=leaves, structure=structure)
        trained = Trained(eager, [p for p in self.parameters if p.requires_grad])
        try:
            torch.cuda.make_graphed_callables(trained, samples, allow_unused_input=True)
        except RuntimeError as error:
            print("The steps cannot be recorded as a CUDA graph, and are slower: "
                  f"{str(error).splitlines()[0]}")
            return trained
        # it refers to the module: without the way back, the graph's memory goes when it is let go
        return trained.__dict__.pop("forward")

    def put(self, tensors: Iterable[torch.Tensor]) -> None:
        for (place, name), tensor in zip(self.places, tensors):
            place[name] = tensor


def call(function: Callable, *inputs: torch.Tensor, leaves: list[Any], structure: Any) -> Any:
    """The function of tensors, with the constants in their places."""
    given = iter(inputs)
    filled = [next(given) if torch.is_tensor(leaf) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(filled, structure)
    return function(*args, **kwargs)


class Trained(torch.nn.Module):
    """A function and the parameters through which it is trained, which a CUDA graph must know."""

    def __init__(self, function: Callable, parameters: Iterable[torch.nn.Parameter]):
        super().__init__()
        self.function, self.parameters_of = function, torch.nn.ParameterList(parameters)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


@contextmanager
def replayed(module: torch.nn.Module) -> Iterator[None]:
    """In the block, a pipeline's calls of a network are replays where they can be.

    The network must not change meanwhile. For many images: recording takes as long as some ten
    calls, and is lost at the end.
    """
    if not can_replay(module) or module.device.type != "cpu":
        yield
        return
    module.forward = Replay(module.forward, module)
    try:
        yield
    finally:
        del module.forward
