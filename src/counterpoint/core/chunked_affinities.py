"""Cross-entropy between the softmaxes of two matrices of similarities on a GPU, in chunks of whole rows.

`core.affinities` has the mathematics, `core.chunks` the way of a GPU. Cost in products: both matrices forward, both again
backward, and two for each matrix that has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoint.core.chunks import Matrix, library_products, multiply
from counterpoint.core.precision import Products


class Pair:
    """The student's and the teacher's matrix of similarities, for the kernels.

    Args:
        query, key: the student's operands, [N, D] and [M, D], float32.
        teacher_query, teacher_key: the teacher's, [N, E] and [M, E], float32.
        kind: type of the products; see `core.precision.products`.
    """

    def __init__(
        self, query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, kind: Products | None = None
    ) -> None:
        self.student = Matrix(query, key, kind=kind, product_in_kernel=True)
        self.teacher = Matrix(teacher_query, teacher_key, kind=self.student.kind, product_in_kernel=True)

    def _launch(self, chunk: slice) -> tuple[dict[str, object], int, int, int]:
        student, teacher = self.student, self.teacher
        tile = student.tile
        rows, columns = chunk.stop - chunk.start, len(student.key)
        high = max(16, tile.rows // 2)
        down, across = -(-rows // high), -(-columns // tile.columns)
        common: dict[str, object] = {
            "query": student.query[chunk],
            "key": student.key,
            "teacher_query": teacher.query[chunk],
            "teacher_key": teacher.key,
            "R": rows,
            "M": columns,
            "D": student.query.shape[1],
            "E": teacher.query.shape[1],
            "PRECISION": "tf32" if student.kind == "tf32" else "ieee",
            "BLOCK_R": high,
            "BLOCK_M": tile.columns,
            "BLOCK_D": tile.depth,
            "BAND": 8,
            **tile.options,
        }
        return common, rows, down, across

    def forward(self, columns: bool) -> tuple[Tensor, Tensor | None]:
        """Return [4, N] for the rows and [4, M] for the columns: log Z of s and of t, and the means of s and t under t."""
        from counterpoint.core import triton_kernels

        new = self.student.new
        row = new(4, len(self.student.query))
        parts = []
        for chunk in self.student.chunks():
            common, rows, down, across = self._launch(chunk.rows)
            of_rows = new(4, rows, across)
            of_columns = new(4, down, len(self.student.key)) if columns else of_rows
            triton_kernels.cross_sums[(down * across,)](**common, row=of_rows, column=of_columns, COLUMNS=columns)
            row[:, chunk.rows] = _together(of_rows, 2)
            if columns:
                parts.append(_together(of_columns, 1))
        return row, _together(torch.stack(parts, 1), 1) if columns else None

    def backward(
        self,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor] | None,
        share: float,
        wanted: tuple[bool, bool, bool, bool],
    ) -> list[Tensor]:
        """Return the gradients of query, key, teacher_query and teacher_key; one that is not wanted stays 0.

        Args:
            row: what `forward` returned for the rows, and the gradient of the rows' cross-entropies, [N].
            column: the same for the columns; None for a loss over rows only.
            share: share of the target mass in the soft targets.
            wanted: which of the four gradients to compute.
        """
        from counterpoint.core import triton_kernels

        student, teacher = self.student, self.teacher
        operands = (student.query, student.key, teacher.query, teacher.key)
        out = [student.new(*x.shape).zero_() for x in operands]
        taught = wanted[2] or wanted[3]
        with library_products(student.kind, student.query.device.type):
            for chunk in student.chunks():
                common, rows, down, across = self._launch(chunk.rows)
                g = student.new(rows, len(student.key), dtype=student.pulled)
                u = torch.empty_like(g) if taught else g
                triton_kernels.cross_pull[(down * across,)](
                    **common,
                    row=row[0][:3, chunk.rows].contiguous(),
                    row_gradient=row[1][chunk.rows].contiguous(),
                    column=g if column is None else column[0][:3].contiguous(),
                    column_gradient=g if column is None else column[1].contiguous(),
                    student=g,
                    teacher=u,
                    share=share,
                    COLUMNS=column is not None,
                    TAUGHT=taught,
                )
                for pull, of, at in ((g, student, 0), (u, teacher, 2)):
                    if wanted[at]:
                        out[at][chunk.rows] += multiply(pull, of.key.to(pull.dtype))
                    if wanted[at + 1]:
                        out[at + 1] += multiply(pull.T, of.query[chunk.rows].to(pull.dtype))
        return out


def _together(parts: Tensor, dim: int) -> Tensor:
    """Combine log Z and means of the parts of a row along `dim` of [4, ...]. The teacher's share of a part is its weight."""
    logs_s, logs_t, *means = parts
    share = torch.softmax(logs_t, dim - 1)
    return torch.stack(
        [logs_s.logsumexp(dim - 1), logs_t.logsumexp(dim - 1), *((share * mean).sum(dim - 1) for mean in means)]
    )
