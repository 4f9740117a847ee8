r"""The kernel on a GPU: chunks of whole rows, a Triton kernel for each, and the library's products for the gradients.

`core.kernel` describes the mathematics. A GPU needs larger parts than its tiles, no waiting for the processor, and products
of half precision. So there the same steps go over chunks of rows:

    1. `sums` (Triton) multiplies a tile, applies rules and weights, and writes the logs of the tile's rows and columns
    2. PyTorch adds the logs of a chunk's tiles: log Z of its rows, and log Y of all columns so far
    3. `pull` (Triton) makes g of the chunk, [R, M] in half precision, from the exponentials that step 1 kept or from new products
    4. two library products turn g into dq of the chunk and dk of all columns

Cost in products of N x M x D: 4, or 3 for chunks whose exponentials are kept; half of it for a set with itself. `known`
takes the arriving gradient of every row before the backward pass. Then steps 3 and 4 follow step 2 at once: 3 products at
any size, and 2 where the keys have no gradient.

No step reads a value on the processor. Rows that underflow under the reference of their tile are found, and computed again,
within the kernel. All sums have a fixed order, so two runs are equal to the last bit.

Products are of bf16, fp16, tf32 or float32 operands (`core.precision.products`). All sums are float32. For both
half precisions g is bf16, because fp16 has no room for the small probabilities of a large batch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoint.core.precision import Products, chosen_products, exact, half_type
from counterpoint.core.rules import Block, Diagonal, Labels, Rule, Views

# Bytes of a chunk's g: large enough for products at full speed.
CHUNK = 512 * 2**20

# Fraction of the GPU's memory that exponentials may take between forward and backward.
KEEP = 1 / 32

# Up to this many similarities the plain way costs less than starting the kernels.
SMALL = 1024 * 1024

# A row that lies this far below the reference of its tile is lost to rounding.
REACH = 60.0

# Ways to the similarities of a tile, as in `triton_kernels`.
PRODUCT, STORED, EXPONENTIALS = 0, 1, 2

TRITON = importlib.util.find_spec("triton") is not None

# For tests without a GPU: run the kernels on the processor, in Triton's interpreter.
interpreted = False


def usable(x: Tensor) -> bool:
    """Return whether the kernels can take this tensor: float32 on a CUDA device, with Triton installed."""
    return x.dtype == torch.float32 and (interpreted or (x.is_cuda and TRITON))


def keep_default(x: Tensor) -> int:
    """Return the bytes of exponentials to keep on this tensor's device."""
    return int(torch.cuda.get_device_properties(x.device).total_memory * KEEP) if x.is_cuda else 0


# ------------------------------------------------------------------------------------------- how a tile is made on a device


class Tiling(NamedTuple):
    """Shape of a program's tile, and how Triton runs it."""

    rows: int
    columns: int
    depth: int  # columns of the operands that one step of the product takes
    warps: int
    stages: int
    registers: int = 0  # most registers of a thread; 0: as many as it takes

    @property
    def options(self) -> dict[str, int]:
        """How Triton compiles and runs a program."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


def tiling(dtype: torch.dtype, width: int) -> Tiling:
    """Choose the tile for operands of this type and width; measured choices, made outside Triton's autotuner."""
    if interpreted:
        return Tiling(32, 64, 16, 4, 1)
    if dtype in (torch.bfloat16, torch.float16):
        # With 256 columns the sums of both directions spill registers (compiled for sm_90).
        return Tiling(128, 128, 64 if width >= 64 else 32, 8, 3)
    return Tiling(64, 128, 32, 4, 3)


@contextmanager
def library_products(kind: Products, device: str) -> Iterator[None]:
    """Turn autocast off, and let the library's float32 products be exact, or tf32, whatever the process has set."""
    matmul = torch.backends.cuda.matmul
    # PyTorch before 2.9 has allow_tf32 alone.
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, kind == "tf32" if name == "allow_tf32" else "tf32" if kind == "tf32" else "ieee")
    try:
        with exact(device):
            yield
    finally:
        setattr(matmul, name, before)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices of one type; the result is float32."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    try:
        return torch.mm(a, b, out_dtype=torch.float32)
    except TypeError:  # PyTorch before 2.8
        return (a @ b).float()


# ------------------------------------------------------------------------------------------------------ the rules of a chunk


@dataclass
class Rules:
    """The rules in the form that the kernels know, and the rest, which is written out for each chunk."""

    offsets: tuple[int, ...] = ()
    views: Views | None = None
    labels: Labels | None = None
    others: list[Rule] = field(default_factory=list)
    weight: Block | None = None

    @staticmethod
    def of(rules: Sequence[Rule], weight: Block | None) -> Rules:
        found = Rules(weight=weight)
        for rule in rules:
            if isinstance(rule, Diagonal) and len({*found.offsets, *rule.offsets}) <= 3:
                found.offsets = tuple(sorted({*found.offsets, *rule.offsets}))
            elif isinstance(rule, Views) and found.views is None:
                found.views = rule
            elif isinstance(rule, Labels) and found.labels is None:
                found.labels = rule
            else:
                found.others.append(rule)
        return found

    @property
    def written(self) -> bool:
        """Whether a chunk needs a matrix of numbers to add."""
        return bool(self.others) or self.weight is not None

    def added(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Write out a chunk's rules and weights as numbers to add to its similarities: -inf, or log d."""
        if not self.written:
            return None
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        if self.weight is not None:
            numbers = self.weight(rows, columns).to(torch.float32).log().contiguous()
        else:
            numbers = torch.zeros(shape, device=device)
        for rule in self.others:
            rule.exclude(numbers, rows, columns)
        return numbers


# ------------------------------------------------------------------------------------------------------------- the matrix


class Held(NamedTuple):
    """Exponentials of a chunk that the backward pass will use, with the reference and the state of each tile."""

    exponentials: Tensor
    references: Tensor
    spoilt: Tensor


@dataclass
class Chunk:
    """Some rows of the matrix against all columns from `left` on."""

    rows: slice
    left: int
    row: int  # position of its first row in the whole matrix
    column: int  # and of its first column


class Matrix:
    """The matrix of similarities of two operands, and its rules, for the kernels.

    Args:
        query: [N, D], float32.
        key: [M, D], float32.
        rules: which pairs have no place in Z and Y; default none.
        weight: d as a function of a chunk; default 1 everywhere.
        origin: position of the first row and column in the larger matrix that rules, weights and targets refer to.
        target: t as a function of a chunk; default no targets.
        kind: type of the products; default that of `core.precision.products`.
        symmetric: whether the matrix equals its transpose: then only the pairs on and above its diagonal are computed.
        softplus: whether to sum log(1 + exp(s)) in place of exp(s).
        product_in_kernel: whether the kernel multiplies float32 operands too; default the library does.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        rules: Sequence[Rule] = (),
        weight: Block | None = None,
        origin: tuple[int, int] = (0, 0),
        target: Block | None = None,
        kind: Products | None = None,
        *,
        symmetric: bool = False,
        softplus: bool = False,
        product_in_kernel: bool = False,
    ) -> None:
        self.kind = kind or chosen_products(query.device.type)
        dtype = half_type(self.kind) or torch.float32
        self.query = query.to(dtype).contiguous()
        self.key = self.query if key is query else key.to(dtype).contiguous()
        self.pulled = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.rules = Rules.of(rules, weight)
        self.origin, self.target, self.symmetric, self.softplus = origin, target, symmetric, softplus
        self.tile = tiling(dtype, query.shape[1])
        # Library products of float32 are faster than Triton's; in half precision the product stays within the kernel.
        self.library = dtype == torch.float32 and not product_in_kernel

    def chunks(self) -> Iterator[Chunk]:
        """Cut the rows so that a chunk's largest matrices fit into `CHUNK` bytes."""
        each = self.pulled.itemsize + 4 * (self.library + self.rules.written + (self.target is not None))
        rows, columns, high = len(self.query), len(self.key), self.tile.rows
        step = max(high, CHUNK // (each * max(columns, 1)) // high * high)
        # Equal chunks: a short last one would use the device badly.
        step = -(-rows // -(-rows // step))
        step = -(-step // high) * high
        for top in range(0, rows, step):
            part = slice(top, min(top + step, rows))
            left = top if self.symmetric else 0
            yield Chunk(part, left, part.start + self.origin[0], left + self.origin[1])

    # ------------------------------------------------------------------------------------------------- one kernel on a chunk

    def similarities(self, chunk: Chunk) -> Tensor | None:
        """Multiply a chunk's similarities with the library; None where the kernel multiplies."""
        return self.query[chunk.rows] @ self.key[chunk.left :].T if self.library else None

    def _common(self, chunk: Chunk) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
        """Return what both kernels take: tensors, numbers with switches, and a tensor for the arguments not in use."""
        rows, columns = chunk.rows.stop - chunk.rows.start, len(self.key) - chunk.left
        whole = slice(chunk.row, chunk.row + rows), slice(chunk.column, chunk.column + columns)
        query, key = self.query[chunk.rows], self.key[chunk.left :]
        unused = query
        rules = self.rules
        added = rules.added(*whole, query.device)
        target = None if self.target is None else self.target(*whole).to(torch.float32).contiguous()
        labels = rules.labels
        other = None if labels is None else labels.rows if labels.columns is None else labels.columns
        tensors = {
            "query": query,
            "key": key,
            "target": unused if target is None else target,
            "row_label": unused if labels is None else labels.rows[whole[0]].contiguous(),
            "column_label": unused if other is None else other[whole[1]].contiguous(),
            "added": unused if added is None else added,
        }
        offsets = (*rules.offsets, 0, 0, 0)
        numbers = {
            "R": rows, "M": columns, "D": query.shape[1],
            "row": chunk.row, "column": chunk.column,
            "offset_0": offsets[0], "offset_1": offsets[1], "offset_2": offsets[2],
            "pairs": rules.views.pairs if rules.views else 0,
            "pair_offset": rules.views.offset if rules.views else 0,
            "FUNCTION": int(self.softplus),
            "UPPER": self.symmetric,
            "OFFSETS": len(rules.offsets), "VIEWS": rules.views is not None,
            "LABELS": 0 if labels is None else 1 if labels.same else 2,
            "ADDED": added is not None, "TARGET": target is not None,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            "BLOCK_R": self.tile.rows, "BLOCK_M": self.tile.columns, "BLOCK_D": self.tile.depth, "BAND": 8,
            **self.tile.options,
        }  # fmt: skip
        return tensors, numbers, unused

    def _grid(self, numbers: dict[str, Any]) -> tuple[int, int]:
        """Return how many tiles a chunk has down and across."""
        return -(-numbers["R"] // self.tile.rows), -(-numbers["M"] // self.tile.columns)

    def sums(
        self, chunk: Chunk, *, columns: bool, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Held | None]:
        """Return a chunk's log Z [R], its part of log Y [M], T [R], and its exponentials; None for what is not wanted.

        For softplus, its rows' sums and no columns.
        """
        from counterpoint.core import triton_kernels

        tensors, numbers, unused = self._common(chunk)
        down, across = self._grid(numbers)
        new = self.new
        row = new(numbers["R"], across)
        column = new(down, numbers["M"]) if columns else None
        towards = new(numbers["R"], across) if numbers["TARGET"] else None
        held = None
        if keep:
            held = Held(
                new(numbers["R"], numbers["M"], dtype=self.pulled),
                new(down, across),
                new(down, across, dtype=torch.int32),
            )
        stored = self.similarities(chunk)
        triton_kernels.sums[(down * across,)](
            **tensors,
            stored=unused if stored is None else stored,
            row_log=row,
            column_log=unused if column is None else column,
            towards=unused if towards is None else towards,
            kept=unused if held is None else held.exponentials,
            references=unused if held is None else held.references,
            spoilt=unused if held is None else held.spoilt,
            least=math.exp(-REACH),
            COLUMNS=columns,
            KEEP=keep,
            FAST=not interpreted,
            SOURCE=PRODUCT if stored is None else STORED,
            **numbers,
        )
        return (
            row.sum(1) if self.softplus else row.logsumexp(1),
            None if column is None else column.logsumexp(0),
            None if towards is None else towards.sum(1),
            held,
        )

    def pull(
        self,
        chunk: Chunk,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor] | None,
        towards: Tensor | None,
        held: Held | None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Return g of a chunk, [R, M].

        Args:
            row: log Z and its gradient a, [R] each.
            column: log Y and its gradient b, [M] each; None for a loss over rows only.
            towards: gradient that arrives for T, [R]; None without targets.
            held: what `sums` kept; None computes the similarities again.
            into: memory for g; it may be that of the kept exponentials, which are then lost. Default new memory.
        """
        from counterpoint.core import triton_kernels

        tensors, numbers, unused = self._common(chunk)
        down, across = self._grid(numbers)
        stored = self.similarities(chunk) if held is None else held.exponentials
        gradient = self.new(numbers["R"], numbers["M"], dtype=self.pulled) if into is None else into
        triton_kernels.pull[(down * across,)](
            **tensors,
            stored=unused if stored is None else stored,
            row_log=row[0].contiguous(),
            row_gradient=row[1].contiguous(),
            column_log=unused if column is None else column[0].contiguous(),
            column_gradient=unused if column is None else column[1].contiguous(),
            towards_gradient=unused if towards is None else towards.contiguous(),
            references=unused if held is None else held.references,
            spoilt=unused if held is None else held.spoilt,
            gradient=gradient,
            reach=REACH,
            COLUMNS=column is not None,
            SOURCE=EXPONENTIALS if held is not None else PRODUCT if stored is None else STORED,
            **{**numbers, "TARGET": numbers["TARGET"] and towards is not None},
        )
        return gradient

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory for a tensor of this shape on the operands' device."""
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def add_products(self, chunk: Chunk, g: Tensor, to_query: Tensor | None, to_key: Tensor | None) -> None:
        """Add g k to dq of a chunk's rows, and g^T q to dk of its columns, unless None. Both may be one tensor."""
        if to_query is not None:
            to_query[chunk.rows] += multiply(g, self.key[chunk.left :].to(g.dtype))
        if to_key is not None:
            to_key[chunk.left :] += multiply(g.T, self.query[chunk.rows].to(g.dtype))


# ------------------------------------------------------------------------------------------------------ forward and backward


def forward(
    matrix: Matrix, *, columns: bool, keep: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Held | None]]:
    """Go through the chunks once; return log Z [N], log Y [M] or None, T [N] or None, and what each chunk kept.

    Args:
        matrix: the matrix; `softplus` returns row sums in place of log Z.
        columns: whether to compute log Y.
        keep: bytes of exponentials to keep; default none.
    """
    rows, new = len(matrix.query), matrix.new
    empty = 0.0 if matrix.softplus else -math.inf
    row = new(rows).fill_(empty)
    column = new(len(matrix.key)).fill_(-math.inf) if columns else None
    towards = None if matrix.target is None else new(rows)
    kept: list[Held | None] = []
    with library_products(matrix.kind, matrix.query.device.type):
        for chunk in matrix.chunks():
            size = (chunk.rows.stop - chunk.rows.start) * (len(matrix.key) - chunk.left) * matrix.pulled.itemsize
            fits = size <= keep
            keep -= size if fits else 0
            found, across, towards_part, held = matrix.sums(chunk, columns=columns or matrix.symmetric, keep=fits)
            row[chunk.rows] = found if not matrix.symmetric else torch.logaddexp(row[chunk.rows], found)
            into = row if matrix.symmetric else column
            if across is not None:
                assert into is not None
                into[chunk.left :] = torch.logaddexp(into[chunk.left :], across)
            if towards is not None and towards_part is not None:
                towards[chunk.rows] = towards_part
            kept.append(held)
    return row, column, towards, kept


def backward(
    matrix: Matrix,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor] | None,
    kept: Sequence[Held | None] = (),
    *,
    wanted: tuple[bool, bool] = (True, True),
    towards: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Go through the chunks once more and return dq [N, D] and dk [M, D], float32.

    Args:
        matrix: the matrix. Of a symmetric one, all of the gradient is in dq.
        row: log Z and its gradient, [N] each.
        column: log Y and its gradient, [M] each; None for a loss over rows only. A symmetric matrix takes `row`.
        kept: what `forward` kept; default nothing, every chunk is computed again.
        wanted: whether dq and dk are wanted; one that is not costs no product and stays 0.
        towards: gradient that arrives for T, [N]; None without targets.
    """
    new = matrix.new
    to_query = new(*matrix.query.shape).zero_()
    to_key = to_query if matrix.symmetric else new(*matrix.key.shape).zero_()
    if matrix.symmetric:
        column = row
    with library_products(matrix.kind, matrix.query.device.type):
        for number, chunk in enumerate(matrix.chunks()):
            g = matrix.pull(
                chunk,
                (row[0][chunk.rows], row[1][chunk.rows]),
                None if column is None else (column[0][chunk.left :], column[1][chunk.left :]),
                None if towards is None else towards[chunk.rows],
                kept[number] if kept else None,
            )
            both = matrix.symmetric
            matrix.add_products(
                chunk, g, to_query if both or wanted[0] else None, to_key if both or wanted[1] else None
            )
    return to_query, to_key


def known(matrix: Matrix, gradient: Tensor, *, to_key: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log Z [N], dq and dk for a gradient of log Z that is known before the backward pass.

    Args:
        matrix: the matrix, not symmetric and without targets.
        gradient: a, [N].
        to_key: whether dk is wanted: 3 products. Without it dk is None: 2 products.
    """
    row = matrix.new(len(matrix.query))
    to_query = matrix.new(*matrix.query.shape).zero_()
    into = matrix.new(*matrix.key.shape).zero_() if to_key else None
    with library_products(matrix.kind, matrix.query.device.type):
        for chunk in matrix.chunks():
            row[chunk.rows], _, _, held = matrix.sums(chunk, columns=False, keep=True)
            assert held is not None
            a = row[chunk.rows], gradient[chunk.rows]
            matrix.add_products(chunk, matrix.pull(chunk, a, None, None, held, into=held.exponentials), to_query, into)
    return row, to_query, into
