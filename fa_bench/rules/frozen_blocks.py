"""The floor for residual networks, with random blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fa_bench.errors import CoverageError, names
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.bp import BP
from fa_bench.utils.lazy import nn

#: The maximum number of layers that an error message suggests as blocks.
MAX_NAMES = 6


@ALGORITHMS.register("frozen_blocks")
@dataclasses.dataclass(eq=False)
class FrozenBlocks(BP):
    """Floor for residual networks: the blocks stay random, and the layers before and after them learn by backpropagation.

    This floor is "Frozen blocks" in the diagnostic protocol for feedback alignment (faeval, spring 2026). A rule that does not
    beat this floor trains nothing useful within the blocks.

    The option `blocks` names the modules that end the blocks; by default, the model declares them (``model.blocks`` or, if that
    is missing, ``model.cut_points``). A block extends from the end of the previous block to its own end. Every parameter of a
    block outside the embedding, including those of normalisation layers, keeps its initial value and does not decay. The
    embedding and everything after the last block learn from their true gradients, which pass through the random blocks.
    Parameters that belong directly to the model and not to a submodule also learn.

    The embedding is the part of the first block before the module that ends this block. In residual_mlp, vit_mini and decoder, it
    is everything that precedes the first residual block. If the module that ends the first block has no parameters, as in mlp,
    conv2 and convolutional residual networks, the embedding is the whole first block.

    The protocol does not specify what happens to batch normalisation in blocks. Here, it stays in training mode; its gains and
    biases are frozen, but its running statistics are updated.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"\Delta W &= 0 \quad \text{in blocks}",
        r"\nabla_W &= g^\top x \quad \text{in the embedding and after the last block}",
    )

    is_floor: ClassVar[bool] = True
    blocks: list[str] | None = option(
        None, "modules that end the blocks (names, or patterns such as 'layers.*'); null: those that the model declares"
    )

    def frozen_parameters(self, sample_input: Any) -> dict[int, str]:
        from fa_bench.mechanisms.blocks import block_ends, blocks_of, embedding_of

        model = type(self.model).__name__
        if not block_ends(self.model, self.blocks):
            inner = self._inner_modules()
            example = {"blocks": inner} if 0 < len(inner) <= MAX_NAMES else {}
            raise CoverageError(
                f"rule '{self.name}' needs blocks to freeze, but {model} declares none; list the modules "
                f"that end them in the option blocks{', for example {blocks}' if example else ''}, or set model.blocks",
                example,
            )
        if sample_input is None:
            self.trace(None)  # raises an error unless zeros can replace the sample
            first: Any = next(iter(self._layers.values()))
            sample_input = first.weight.new_zeros(2, first.in_features)
        blocks = blocks_of(self.model, sample_input, self.blocks)
        if not blocks:
            raise CoverageError(
                f"rule '{self.name}': no module that ends a block was called in a forward pass, or no block has "
                f"parameters (blocks: {names(sorted(block_ends(self.model, self.blocks)))})"
            )
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        learns = {id(parameters[name]) for name in embedding_of(self.model, blocks)}
        fixed = {id(parameters[name]): "trains nothing" for of_block in blocks.values() for name in of_block}
        fixed = {key: why for key, why in fixed.items() if key not in learns}
        if not fixed:
            raise CoverageError(
                f"rule '{self.name}' has no block to keep random: {model} has only the block "
                f"'{next(iter(blocks))}', which is its embedding; use rule 'frozen', or a deeper model"
            )
        return fixed

    def _inner_modules(self) -> list[str]:
        """The names of all layers except the first and the last. A layer within an attention or recurrent module, which does not
        call the layer, is represented by the name of this module."""
        from fa_bench.mechanisms.weighted_layers import CONVOLUTIONS

        def called_part(path: str) -> str:
            parent = path.rpartition(".")[0]
            is_called = isinstance(self.model.get_submodule(path), (nn.Linear, *CONVOLUTIONS))
            return path if is_called and not isinstance(self.model.get_submodule(parent), nn.MultiheadAttention) else parent

        parts = [called_part(path) for path in self._layers]
        # Attention has several layers, so it may contain both the first layer and inner ones.
        ends = {part for part in (*parts[:1], *parts[-1:]) if isinstance(self.model.get_submodule(part), nn.MultiheadAttention)}
        return [part for part in dict.fromkeys(parts[1:-1]) if part and part not in ends]
