"""Cut rules, the second of the two mechanisms. A cut rule cuts the graph at named modules and delivers an error to each of them
directly.

`cut_points` determines which modules can be cut, `capture` contains the hooks that cut, and `delivery` contains the backward
pass.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.errors import CoverageError, missing_method
from fa_bench.mechanisms.checkpointing import recomputing
from fa_bench.mechanisms.coverage import Coverage
from fa_bench.mechanisms.cut.capture import Capture, CapturedActivation
from fa_bench.mechanisms.cut.checks import missing_b, require_shape, wrong_rows
from fa_bench.mechanisms.cut.delivery import Delivery
from fa_bench.mechanisms.cut.positions import Layout, class_axis, layout_of, layouts_of
from fa_bench.mechanisms.feedback_options import output_option
from fa_bench.mechanisms.feedback_tensors import drop_tensors, feedback_tensor, put_tensor, require_tensor, tensors_of
from fa_bench.mechanisms.rule import INPUT, OUTPUT, Rule
from fa_bench.registry.options import option
from fa_bench.utils.sampling import initialiser_of, sample, seed_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.loss_scale import PassOutput
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor
    from fa_bench.mechanisms.weighted_layers import WeightedLayer


@dataclasses.dataclass(eq=False)
class CutRule(Rule):
    """A rule that delivers an error directly to each cut; subclasses implement `make_feedback` and may override `signal`.

    The cuts are the modules named in the option `cuts` or, if it is not set, in the model's attribute ``cut_points`` (``blocks``
    for rules that train whole blocks).

    Examples:
        >>> import dataclasses, math, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Direct(fa_bench.CutRule):
        ...     def make_feedback(self, features, classes):
        ...         for cut, shape in features.items():
        ...             self.put(cut, "B", "xavier_uniform", (classes, math.prod(shape)))
        ...
        ...     def signal(self, cut, captured, broadcast, target):
        ...         return self.project(cut, broadcast, captured)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, Direct(cuts=["1"]))
        >>> rule.feedback["1"]["B"].shape
        torch.Size([2, 3])
    """

    cuts: list[str] | None = option(
        None,
        "modules (names, or patterns such as 'act*'; * also matches dots) whose output is cut; "
        "null: the cut points that the model declares",
    )
    output: str | int | None = output_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = None if self.output is None else str(self.output)

    #: Only some rules make these fields options. `within` states how far the error at a cut is backpropagated exactly
    #: (`within_option`), and `error_at` names the module from whose output the error comes (`error_at_option`). `positions`
    #: states whether all positions of a cut share a matrix if the error has no positions (`positions_option`).
    within: str = dataclasses.field(default="layer", init=False)
    error_at: str | None = dataclasses.field(default=None, init=False)
    positions: str = dataclasses.field(default="own", init=False)
    #: Whether cuts must have the same positions as the output.
    same_positions = False
    #: Whether the errors of the layers above cross the cuts; `signal` is then added to them.
    crosses = False
    #: Whether the rule needs the labels in the backward pass.
    needs_target = False
    #: Whether `signal` or `feedback_gradients` reads captured activations, which are then kept until the backward pass.
    reads_values = False
    #: Whether some errors or gradients, such as errors computed from the labels, do not scale with the loss by themselves. The
    #: rule must then multiply them by `loss_factor`, the factor by which the loss was scaled.
    scales = False
    loss_factor = 1.0
    #: Whether targets may be numbers in the shape of the output, because errors are computed from the objective's loss, whatever
    #: its targets are.
    takes_numbers: ClassVar[bool] = False
    #: An option and its value, such as ``error_sign=true``, with which the rule computes its errors without targets, or an empty
    #: string if there is no such option.
    without_target: ClassVar[str] = ""
    #: Whether all errors are computed from the objective, so that any other loss would be ignored.
    learns_by_objective: ClassVar[bool] = False
    #: Whether `gradients` computes the gradients of the parameters in separate passes; see `fa_bench.mechanisms.cut.passes`.
    learns_in_passes = False
    output_learns_by_delta = False
    #: The description of an output layer's error in the coverage table.
    output_source: ClassVar[str] = "is the true one (output layer)"
    #: The rule that this one belongs to, and whose options it uses; None if it is an independent rule.
    part_of: ClassVar[Rule | None] = None

    @property
    def modular(self) -> bool:
        """Whether all layers between two cuts form one block, within which errors are backpropagated.

        In that case, not every layer needs a cut, and all weights of a block are covered.
        """
        return self.within == "block"

    @property
    def declared(self) -> str:
        """The name of the model's attribute that lists the cuts if the option `cuts` is not set."""
        return "blocks" if self.modular else "cut_points"

    @property
    def side(self) -> str:
        """The side of a module at which the rule cuts: the output by default, or the input."""
        return OUTPUT

    @property
    def changes_delta(self) -> bool:
        """Whether `output_error` returns an error other than δ."""
        return type(self).output_error is not CutRule.output_error

    @property
    def logits(self) -> Tensor | None:
        """The logits z in the model's shape, detached. The logits are available only while errors are computed, and only for
        rules that set `scales`; otherwise, the result is None.

        Raises:
            StateError: if they were changed in place after the forward pass.
        """
        return None if self.pass_output is None else self.pass_output.unchanged()

    # -------------------------------------------------------------------------------------------- for subclasses
    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        """Create the feedback tensors of all cuts, with `put`.

        Args:
            features: cut -> shape of its activation without the batch; (F,) if all positions share a matrix.
            classes: C, the number of columns of the errors.
        """

    def put(
        self,
        cut: str,
        name: str,
        value: str | Tensor,
        shape: tuple[int, ...] = (),
        density: float = 1.0,
        seeded_by: str | None = None,
        columns: int | None = None,
    ) -> None:
        """Give a cut the feedback tensor `name`, on the model's device and in its dtype.

        Args:
            cut: the cut's module path.
            name: the tensor's name; the module at the cut stores the tensor as ``feedback_NAME``.
            value: an initialiser, or the tensor itself; the arguments below are for initialisers.
            shape: the tensor's shape, (C, ...).
            density: fraction of the entries that are not masked.
            seeded_by: the path that seeds the tensor; default: the cut.
            columns: the number of columns to keep, counted from the first; default: all.

        Raises:
            ConfigError: for an unknown initialiser.
            ComponentError: if `value` is neither a string nor a tensor, or if it is an initialiser and `shape` does not consist
                of two or more whole numbers.
        """
        what = f"cut '{cut}', feedback tensor '{name}'"
        if isinstance(value, str):
            initialiser_of(value, what)
            require_shape(what, shape)
            value = sample(shape, value, seed_for(self.seed, seeded_by or cut, name), density)[:, :columns]
        put_tensor(self._cut_modules[cut], name, require_tensor(what, value).to(next(self.model.parameters())).contiguous())

    def tensor(self, cut: str, name: str) -> Tensor:
        """The feedback tensor `name` of a cut, detached."""
        return feedback_tensor(self._cut_modules[cut], name)

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        """The signal that `signal` receives at all cuts; by default, δ itself. This method is called once per backward pass.

        Args:
            delta: δ, the gradient of the loss at the logits: (N, C), or (N, P..., C) with the class axis last if the output has
                positions.
            target: as for `signal`.
        """
        return delta

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        """The error at one cut, in the shape of its activation; by default, the result of `project`.

        Args:
            cut: the cut's module path.
            captured: the cut's activation.
            broadcast: the result of the method `broadcast`.
            target: the labels, (N,) or (N, P...), if they were passed to ``rule.backward``.
        """
        return self.project(cut, broadcast, captured)

    def output_error(self, delta: Tensor) -> Tensor:
        """The error that trains the output layer, which by default is δ, the gradient of the loss at the logits."""
        return delta

    def project(self, cut: str, errors: Tensor, captured: CapturedActivation) -> Tensor:
        """The product of the errors, (N, C) or (N, P..., C), and B (C, features), in the shape of the activation."""
        feedback = self.matrix(cut, captured)
        if errors.dtype != feedback.dtype:
            errors = errors.to(feedback.dtype)
        if errors.shape[-1] != len(feedback):
            raise wrong_rows(cut, feedback.shape, errors.shape[-1])
        if not self._layouts:
            return self.in_shape(cut, errors.mm(feedback), captured)
        errors = self._layouts[cut].matched(errors, captured.shape)
        return self.in_shape(cut, errors.flatten(0, -2).mm(feedback).unflatten(0, errors.shape[:-1]), captured)

    def matrix(self, cut: str, captured: CapturedActivation) -> Tensor:
        """The matrix B (C, features) of a cut, with the features in the order in which `in_shape` expects them.

        Raises:
            ComponentError: if the cut has none.
        """
        feedback = feedback_tensor(self._cut_modules[cut], "B")
        if feedback is None:
            raise missing_b(self, cut)
        if not captured.channels_last:
            return feedback
        # On CPUs, compiled graphs store feature maps with their channels last. A fixed B is reordered only once.
        key, known = (feedback.data_ptr(), feedback._version), self._reordered.get(cut)
        if known is None or known[0] != key:
            ordered = feedback.unflatten(1, captured.shape[1:]).movedim(1, -1).flatten(1)
            self._reordered[cut] = known = (key, ordered)
        return known[1]

    def in_shape(self, cut: str, projected: Tensor, captured: CapturedActivation) -> Tensor:
        """Convert an error (N, features), or (N, P..., F) at the positions of the cut, to the shape of the activation."""
        if self._layouts:
            return self._layouts[cut].restored(projected, captured.shape)
        if projected.dim() == len(captured.shape):
            return projected
        if captured.channels_last:
            batch, channels, *size = captured.shape
            return projected.view(batch, *size, channels).movedim(-1, 1)
        try:
            return projected.view(captured.shape)
        except RuntimeError:
            raise CoverageError(
                f"cut '{cut}' has activations of shape {tuple(captured.shape[1:])}, but its feedback was made "
                f"for {projected.shape[1]} features; attach with a sample_input of the same size as the training "
                f"data"
            ) from None

    def trained_parameters(self, results: list[Tensor]) -> list[nn.Parameter]:
        """See `fa_bench.mechanisms.cut.passes.PassRule`."""
        raise missing_method(self, "trained_parameters")

    def gradients(
        self,
        parameters: list[nn.Parameter],
        activations: dict[str, Tensor],
        delta: Tensor,
        logits: Tensor,
        target: Tensor,
    ) -> list[Tensor | None]:
        """See `fa_bench.mechanisms.cut.passes.PassRule`."""
        raise missing_method(self, "gradients")

    def learned_at(self, cut: str) -> list[LearnedTensor]:
        """The learned tensors of one cut, in the order of `feedback_gradients`."""
        return []

    def feedback_gradients(
        self, cut: str, captured: CapturedActivation, delta: Tensor, target: Tensor | None
    ) -> list[Tensor | None]:
        """The gradients of the tensors that `learned_at` returns."""
        return []

    def error_and_gradients(
        self, cut: str, captured: CapturedActivation, broadcast: Tensor, delta: Tensor, target: Tensor | None, learns: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The error at one cut and, if `learns`, the gradients of its learned tensors. Override this method to compute both at
        once."""
        error = self.signal(cut, captured, broadcast, target)
        return error, self.feedback_gradients(cut, captured, delta, target) if learns else []

    # -------------------------------------------------------------------------------------------- attach and detach
    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.compound.base import Compound
        from fa_bench.mechanisms.cut.coverage import cut_coverage
        from fa_bench.mechanisms.cut.cut_points import check_cuts, named_origin
        from fa_bench.mechanisms.weighted_layers import weighted_layers

        #: The output from which errors are being computed; None at other times and for rules that do not set `scales`.
        self.pass_output: PassOutput | None = None
        self._cut_modules: dict[str, nn.Module] = {}
        self._layouts: dict[str, Layout] = {}
        self._reordered: dict[str, tuple[tuple[int, int], Tensor]] = {}
        origin = named_origin(self)
        named = self.find_cuts(sample_input)
        trace = self.trace(sample_input, watch=(*named, *origin))
        cuts = self.choose_cuts(named, trace)
        if cuts != named:
            trace = self.trace(sample_input, watch=(*cuts, *origin))
        check_cuts(self, trace, cuts)
        self._trace = trace
        self._cut_modules = {cut: self.model.get_submodule(cut) for cut in cuts}
        # A fused kernel would not call the layers at which the rule cuts.
        parents = [self.model.get_submodule(cut.rpartition(".")[0]) for cut in cuts]
        self.mode.layerwise = any(isinstance(parent, Compound) for parent in parents)
        layers = weighted_layers(self.model)
        self._covered = {path: layers[path] for path in trace.order}
        self._witness = next((layers[path] for path in (*trace.outputs, *trace.order) if layers[path].weight.requires_grad), None)
        shapes = trace.output_shapes if self.side == OUTPUT else trace.input_shapes
        at_cuts = {cut: shapes[cut] for cut in cuts}
        classes = self._lay_out(at_cuts, trace, layers)
        self.make_feedback(
            {cut: (shape[self._layouts[cut].axis],) if self._layouts else shape[1:] for cut, shape in at_cuts.items()}, classes
        )
        trainable = self.trainable_cuts(trace)
        frozen = {cut: self.learned_at(cut) for cut in cuts if cut not in trainable}
        for learned in (one for at_cut in frozen.values() for one in at_cut):
            learned.freeze()
        self._capture, self._delivery = Capture(self, self._cut_modules, trace, frozen), Delivery(self)
        return cut_coverage(self, layers, trace, self._cut_modules)

    def trainable_cuts(self, trace: Trace) -> set[str]:
        """The cuts at which tensors are learned, namely those whose error reaches a trainable parameter."""
        return self.after_first_trainable(trace) if self.crosses else trace.trainable

    def after_first_trainable(self, trace: Trace) -> set[str]:
        """The first cut, in the order of execution, that depends on a trainable parameter, and all later cuts."""
        executed = [path for path in trace.output_shapes if path in self._cut_modules]
        first = next((number for number, path in enumerate(executed) if path in trace.trainable), len(executed))
        return set(executed[first:])

    def _lay_out(self, cuts: dict[str, tuple[int, ...]], trace: Trace, layers: dict[str, WeightedLayer]) -> int:
        """Choose the axes of the errors and of the cuts (cut -> shape), and return C, the size of the errors' class axis."""
        shape = trace.result_shape if self.error_at is None else trace.output_shapes[self.error_at]
        axis = class_axis(shape) if self.error_at is None else layout_of(self.error_at, shape, (), trace, layers).axis
        if self.side == INPUT and len(shape) > 2:
            raise CoverageError(
                f"rule '{self.name}' with form=kernel needs outputs of shape (N, C), not {shape}; use form=neuron"
            )
        if self.side == OUTPUT:
            self._layouts = layouts_of(cuts, shape, axis, self.positions == "shared", self.same_positions, trace, layers)
        self.error_axis, self.error_dims = axis, len(shape)
        return shape[axis]

    def watched_modules(self) -> dict[str, nn.Module]:
        return {**self._covered, **self._cut_modules}

    def unwire(self) -> None:
        if (capture := getattr(self, "_capture", None)) is not None:  # None if `wire` failed
            capture.remove()
        for module in self.model.modules():
            drop_tensors(module)

    def find_cuts(self, sample_input: Any) -> tuple[str, ...]:
        """The cuts, in the order of the model's modules.

        Raises:
            CoverageError: if neither the option nor the model names any.
        """
        from fa_bench.mechanisms.cut.cut_points import named_cuts

        return named_cuts(self, sample_input)

    def choose_cuts(self, cuts: tuple[str, ...], trace: Trace) -> tuple[str, ...]:
        """The subset of the named cuts at which the rule cuts; all named cuts are watched in `trace`."""
        return cuts

    # -------------------------------------------------------------------------------------------- every pass
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        super().begin_forward(model, args, kwargs)
        self._capture.begin()

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        tape = self._capture.tape
        try:
            super().end_forward(model, args, output)
        finally:
            self._capture.end()
        return self.connect(output, tape)

    def connect(self, output: Any, tape: dict[str, CapturedActivation] | None, at: str | None = None) -> Any:
        """The output of the model, or of the module `at`, connected to the cuts; None outside a training pass or if the errors do
        not come from this output."""
        if tape is None or output is None:
            return None
        if self.error_at != at:
            self._capture.require_connected()
            return None
        if len(tape) < len(self._cut_modules) and not recomputing():
            self._capture.check_missing(tape)
        return self._delivery.connect(output, tape)

    def logits_of(self, result: Any) -> Tensor:
        """The output, in the result of an additional pass, from which the loss is computed."""
        from fa_bench.mechanisms.trace import loss_output

        return loss_output(result, next(iter(self._trace.results)) if self.loss_output is None else self.loss_output)

    def roots(self, output: Any) -> list[Any]:
        nodes = [captured.tensor.grad_fn for captured in (self._capture.tape or {}).values() if captured.tensor is not None]
        return [*super().roots(output), *(node for node in nodes if node is not None)]

    def transporting_layers(self) -> dict[str, Any]:
        beyond = set() if self.error_at is None else self._trace.beyond
        return {} if self.modular else {path: layer for path, layer in self._covered.items() if path not in beyond}

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        self._delivery.run(loss, target, loss_scale)

    # -------------------------------------------------------------------------------------------- feedback, metrics
    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        return {cut: tensors_of(module) for cut, module in self._cut_modules.items()}

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        if self.side == INPUT:
            return super().error_points(trace)
        return {layer: (cut, OUTPUT) for cut in self._cut_modules for layer in self._trace.feeds[cut]}

    def readouts(self) -> dict[str, Tensor]:
        return (
            {}
            if self.side == INPUT or self.error_at is not None
            else {cut: tensors["B"].detach() for cut, tensors in self.feedback.items() if "B" in tensors}
        )

    def readout_rows(self, cut: str, activation: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self._layouts:
            return super().readout_rows(cut, activation, logits)
        outputs, rows = self._layouts[cut].pairs(logits if logits.dim() == 2 else logits.movedim(self.error_axis, -1), activation)
        return rows, outputs

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The pairs (B, weight) of output layers, where B is that of the last cut. An output layer has a pair if errors come from
        the model's output and B has the shape of the weight."""
        if self.error_at is not None:
            return {}
        weights = {path: self._covered[path].weight.detach() for path in self._trace.outputs}
        tensors = self.feedback.get(list(self._cut_modules)[-1], {})
        return {
            path: (tensors["B"].detach(), w) for path, w in weights.items() if "B" in tensors and tensors["B"].shape == w.shape
        }
