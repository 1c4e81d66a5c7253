"""Reference implementations of both forms of predictive coding, which optimise either errors or states between the blocks."""

from __future__ import annotations

import numpy as np

from ..reference import Arrays, Stage, forward, gradients, output_error

Part = list[Stage]


def epc(chain, params, feedback, x, y, steps=20, rate=0.1, momentum=0.0, **_) -> Arrays:
    """The local gradients after gradient descent on the errors e, which start at zero.

    A step is v = momentum v + dE/de, e = e - rate v, with s_l = f_l(s_{l-1}) + e_l.
    """
    parts = blocks(chain, feedback)
    errors = [np.zeros_like(value) for value in states_of(parts, params, x)]
    velocity = [np.zeros_like(value) for value in errors]
    for _step in range(steps):
        states = states_of(parts, params, x, errors)
        entering, above = [x, *states], output_delta(parts, params, states, y)
        for at in reversed(range(len(errors))):
            # The loss depends on e_l through all later layers.
            above = vjp(parts[at + 1], params, entering[at + 1], above)
            velocity[at] = momentum * velocity[at] + errors[at] + above
        errors = [error - rate * v for error, v in zip(errors, velocity, strict=True)]
    return weights(parts, params, x, states_of(parts, params, x, errors), y)


def pc(chain, params, feedback, x, y, steps=20, rate=0.1, momentum=0.0, **_) -> Arrays:
    """The local gradients after gradient descent on the states s, which start at the values of the forward pass.

    A step is v = momentum v + dE/ds, s = s - rate v.
    """
    parts = blocks(chain, feedback)
    states = states_of(parts, params, x)
    velocity = [np.zeros_like(value) for value in states]
    for _step in range(steps):
        entering = [x, *states]
        errors = [state - forward(part, params, start)[-1] for part, start, state in zip(parts, entering, states, strict=False)]
        for at in range(len(states)):
            # A state enters the energy through its own error and as the input of the next block.
            above = output_delta(parts, params, states, y) if at + 1 == len(states) else -errors[at + 1]
            velocity[at] = momentum * velocity[at] + errors[at] + vjp(parts[at + 1], params, states[at], above)
        states = [state - rate * v for state, v in zip(states, velocity, strict=True)]
    return weights(parts, params, x, states, y)


def blocks(chain, cuts) -> list[Part]:
    """The parts of the chain between cuts. The last part ends at the logits."""
    parts: list[Part] = [[]]
    for stage in chain:
        parts[-1].append(stage)
        if stage.name in cuts:
            parts.append([])
    return parts


def states_of(parts, params, x, errors=None) -> list[np.ndarray]:
    """The states s_1, ..., s_{L-1}."""
    states = []
    for number, part in enumerate(parts[:-1]):
        x = forward(part, params, x)[-1] + (0.0 if errors is None else errors[number])
        states.append(x)
    return states


def output_delta(parts, params, states, y) -> np.ndarray:
    """The gradient of the summed loss with respect to the logits."""
    return output_error(forward(parts[-1], params, states[-1])[-1], y) * len(y)


def through(part, params, start, error) -> tuple[Arrays, np.ndarray]:
    """The gradients of a part's parameters and the error at its input, computed from the error at its output."""
    at: Arrays = {}
    flat = Stage("flat", "flatten")  # `gradients` needs 2-D logits for its loss, whose error `given` replaces
    found = gradients([*part, flat], params, start, np.zeros(len(start), dtype=int), given={part[-1].name: error}, errors=at)
    return found, at[""]


def vjp(part, params, start, error) -> np.ndarray:
    return through(part, params, start, error)[1]


def weights(parts, params, x, states, y) -> Arrays:
    """The gradients dE/dW / N with all states fixed."""
    total: Arrays = {}
    for part, start, state in zip(parts, [x, *states], states, strict=False):
        total |= through(part, params, start, (forward(part, params, start)[-1] - state) / len(x))[0]
    return total | through(parts[-1], params, states[-1], output_delta(parts, params, states, y) / len(x))[0]


REFERENCES = {"epc": epc, "pc": pc}
CASES = {
    "epc": ("epc", {"steps": 3}),
    "epc-momentum": ("epc", {"steps": 3, "rate": 0.2, "momentum": 0.5}),
    "pc": ("pc", {"steps": 3, "rate": 0.4}),
    "pc-momentum": ("pc", {"steps": 3, "rate": 0.3, "momentum": 0.5}),
}
TRAITS = {"untrue_output": {"epc", "pc"}}
