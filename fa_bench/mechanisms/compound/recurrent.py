"""Recurrent and bilinear modules as compositions of linear layers.

Shapes: N batch, T steps, I inputs, H hidden units; R the sum of the lengths of all sequences in a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fa_bench.mechanisms.compound.base import Compound, Substitute, compound
from fa_bench.mechanisms.compound.projection import Projection

#: The state of a recurrent layer: (h,), or (h, c) for an LSTM, each of shape (N, H).
State: TypeAlias = tuple[Tensor, ...]
#: A function that computes the next state from the input's contribution to the gates, the state's contribution to the gates, and
#: the state itself.
Step: TypeAlias = Callable[[Tensor, Tensor, State], State]


def lstm_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'), with i, f, g, o = W x + b + U h + d."""
    i, f, g, o = (from_input + from_state).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """h' = n + σ(z) (h - n), with n = tanh(n_x + σ(r) n_h), r = r_x + r_h, z = z_x + z_h."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, dim=-1), from_state.chunk(3, dim=-1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return ((state[0] - n) * (z_x + z_h).sigmoid() + n,)


def tanh_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """h' = tanh(W x + b + U h + d)."""
    return ((from_input + from_state).tanh(),)


def relu_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """h' = relu(W x + b + U h + d)."""
    return ((from_input + from_state).relu(),)


#: Maps the name of each fused function of PyTorch to the function that computes one step.
STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": tanh_step, "rnn_relu": relu_step}


@compound(nn.LSTM, nn.GRU, nn.RNN)
class RecurrentLayers(Compound):
    """A recurrent module whose first layer consists of the linear layers ``ih_l0`` and ``hh_l0``. In an LSTM that projects its
    output, the first layer also has the linear layer ``hr_l0``.

    The error passes through ``hh_l0`` in every time step; the derivatives of the gates are exact.
    """

    batch_axis = 1

    def projections(self) -> dict[str, Projection]:
        module: Any = self
        found: dict[str, Projection] = {}
        for suffix in self._suffixes():
            for part in ("ih", "hh", *(("hr",) if module.proj_size else ())):
                bias = f"bias_{part}_{suffix}" if module.bias and part != "hr" else None
                found[f"{part}_{suffix}"] = Projection(self, f"weight_{part}_{suffix}", bias)
        return found

    def _suffixes(self) -> list[str]:
        module: Any = self
        directions = ("", "_reverse") if module.bidirectional else ("",)
        return [f"l{number}{direction}" for number in range(module.num_layers) for direction in directions]

    def layerwise_forward(self, *args: Any, **kwargs: Any) -> Any:
        with Substitute(**{name: functools.partial(self._run, step) for name, step in STEPS.items()}):
            return self.plain_class.forward(self, *args, **kwargs)

    def _run(self, step: Step, x: Tensor, second: Any, third: Any, *_: Any) -> tuple[Tensor, ...]:
        """Compute what the fused function would return, namely the outputs and the final states, which have the shape (layers
        times directions, N, H).

        The arguments after `step` are x (T, N, I), or (N, T, I) with ``batch_first``, and the initial state. For sequences of
        different lengths, the arguments are x (R, I), the number of sequences in each step, and the initial state.
        """
        module: Any = self
        if isinstance(second, Tensor) and second.dtype == torch.int64 and second.dim() == 1:
            sizes, initial = second.tolist(), third
            return self._layers(step, x, sizes, initial)
        y, *final = self._layers(step, x.transpose(0, 1) if module.batch_first else x, None, second)
        return y.transpose(0, 1) if module.batch_first else y, *final

    def _layers(self, step: Step, x: Tensor, sizes: list[int] | None, initial: Any) -> tuple[Tensor, ...]:
        """Run all layers, and return the outputs and the final states. The input x is (T, N, I) or, if `sizes` lists the number
        of sequences in each step, (R, I) with the steps in order."""
        module: Any = self
        states: list[Tensor] = [initial] if isinstance(initial, Tensor) else list(initial)
        finals: list[State] = []
        suffixes = self._suffixes()
        directions = 2 if module.bidirectional else 1
        for number in range(module.num_layers):
            if number and module.dropout and self.training:
                x = nn.functional.dropout(x, module.dropout)
            outputs = []
            for suffix in suffixes[number * directions : (number + 1) * directions]:
                state = tuple(each[len(finals)] for each in states)
                y, final = self._direction(step, x, sizes, state, suffix)
                outputs.append(y)
                finals.append(final)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _direction(self, step: Step, x: Tensor, sizes: list[int] | None, initial: State, suffix: str) -> tuple[Tensor, State]:
        """Run one layer in one direction, and return its outputs and its final state. Where the number of sequences changes from
        one step to the next, sequences end or begin."""
        module: Any = self
        ih, hh, hr = (getattr(module, f"{part}_{suffix}", None) for part in ("ih", "hh", "hr"))
        assert ih is not None and hh is not None
        from_input = ih(x).unbind() if sizes is None else ih(x).split(sizes)
        join = torch.stack if sizes is None else torch.cat
        sizes = [len(part) for part in from_input]
        is_reverse = suffix.endswith("_reverse")
        outputs: list[Tensor] = []
        ended: list[State] = []
        state = tuple(each[: sizes[-1]] for each in initial) if is_reverse else initial
        for number in range(len(sizes) - 1, -1, -1) if is_reverse else range(len(sizes)):
            size, current = sizes[number], len(state[0])
            if size > current:
                state = tuple(torch.cat([each, start[current:size]]) for each, start in zip(state, initial, strict=True))
            elif size < current:
                ended.append(tuple(each[size:] for each in state))
                state = tuple(each[:size] for each in state)
            state = step(from_input[number], hh(state[0]), state)
            if hr is not None:
                state = (hr(state[0]), *state[1:])
            outputs.append(state[0])
        final = tuple(torch.cat(parts) for parts in zip(*[state, *reversed(ended)], strict=True))
        return join(outputs[::-1] if is_reverse else outputs), final


@compound(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class CellLayers(Compound):
    """A recurrent cell with the layers ``ih`` and ``hh``."""

    def projections(self) -> dict[str, Projection]:
        module: Any = self
        return {part: Projection(self, f"weight_{part}", f"bias_{part}" if module.bias else None) for part in ("ih", "hh")}

    def layerwise_forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self

        def replacement(step: Any) -> Any:
            def run(x: Tensor, hidden: Tensor | Sequence[Tensor], *_: Any) -> Any:
                state = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
                after = step(module.ih(x), module.hh(state[0]), state)
                return after if len(after) == 2 else after[0]

            return run

        with Substitute(**{f"{name}_cell": replacement(step) for name, step in STEPS.items()}):
            return self.plain_class.forward(self, *args, **kwargs)


@compound(nn.Bilinear)
class BilinearLayers(Compound):
    """y_o = Σ_ij x1_i A_oij x2_j + b_o, computed by the linear layer ``product`` from the outer product of x1 (..., I1) and x2
    (..., I2).

    The layer's weight is A, (O, I1, I2), flattened to (O, I1 I2). The feedback of this layer yields the error at the outer
    product, from which the errors at x1 and x2 are computed with exact derivatives.
    """

    def projections(self) -> dict[str, Projection]:
        return {"product": Projection(self, "weight", "bias")}

    def layerwise_forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return self.product((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))  # type: ignore[operator]
