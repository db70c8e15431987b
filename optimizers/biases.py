"""The constant that a product's result is shifted by: an input of Conv and Gemm, the Add behind a MatMul."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from deploykit.optimizers.editing import Editor, standard
from deploykit.optimizers.products import Product
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx

_BIAS = 2


class Biases:
    """Reads and shifts the biases of products.

    Args:
        editor: The graph; biases that do not exist are added to Conv and Gemm.
        products: Whose biases.

    Attributes:
        missing: Names of products that have nothing to shift.
    """

    def __init__(self, editor: Editor, products: Iterable[Product]) -> None:
        self._editor = editor
        nodes = {n.name: n for n in editor.light.proto.graph.node}
        self._names: dict[str, str] = {}
        self._channels: dict[str, int] = {}
        self.missing: list[str] = []
        for product in products:
            name = self._find(product, nodes[product.name])
            if name is None:
                self.missing.append(product.name)
            else:
                self._names[product.name] = name
                self._channels[product.name] = product.output_channels

    def __contains__(self, product: str) -> bool:
        return product in self._names

    def shift(self, product: str, by: Array) -> None:
        """Add ``by`` ``[channels]`` to the bias of a product."""
        name = self._names[product]
        values = self._editor.read(name)
        self._editor.write(name, values + by.reshape(-1).astype(np.float32))

    def snapshot(self) -> dict[str, Array]:
        """All values, for `restore`."""
        return {name: self._editor.read(name).copy() for name in self._names.values()}

    def restore(self, values: Mapping[str, Array]) -> None:
        """Undo all shifts since the snapshot."""
        for name, array in values.items():
            self._editor.write(name, array)

    def _find(self, product: Product, node: onnx.NodeProto) -> str | None:
        if product.op in ("Conv", "Gemm"):
            if len(node.input) <= _BIAS or not node.input[_BIAS]:
                name = self._editor.add_weight(f"{product.weight}_bias", np.zeros(product.output_channels))
                del node.input[_BIAS:]
                node.input.append(name)
                self._editor.readers[name].append(node)
                return name
            return self._usable(product, node, _BIAS)
        readers = self._editor.readers[product.output]
        if len(readers) != 1 or not standard(readers[0], "Add") or product.output in self._editor.outputs:
            return None
        return self._usable(product, readers[0], 0 if readers[0].input[1] == product.output else 1)

    def _usable(self, product: Product, node: onnx.NodeProto, index: int) -> str | None:
        """The name of a bias in memory that has a value for each channel and no other reader."""
        name = node.input[index]
        if not self._editor.is_weight(name):
            return None
        dims = self._editor.dims(name)
        if not dims or dims[-1] != product.output_channels or any(d != 1 for d in dims[:-1]):
            return None
        if self._editor.is_external(name):
            return None
        return self._editor.private(node, index)
