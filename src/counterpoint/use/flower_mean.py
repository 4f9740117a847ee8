"""A strategy of Flower's that averages parties' networks of one form: FedAvg, by the rules of `core.party_means`.

    from counterpoint.use.flower_mean import MeanOfParties

    @server.main()
    def main(grid, context):
        arrays = ArrayRecord(learner.state_dict())
        result = MeanOfParties(min_available_nodes=3).start(grid, arrays, num_rounds=10, timeout=600)

It takes FedAvg's options. Flower's own mean turns integers and booleans into float64. It makes NaN of the NaN of a party without
examples, and divides by zero where all are empty. Here counters and masks are voted on, and such a party is left out. A round
goes on without it, and the log names the node and the reason. Where no party counts, the server keeps its arrays.

CreamFL's own federation (`use.flower`) sends representations and averages no weights.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before flwr is imported

import math
from collections.abc import Iterable
from logging import WARNING, getLogger
from typing import Any

import torch

try:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    raise ImportError("counterpoint.use.flower_mean needs Flower: pip install 'counterpoint[federated]'") from error
from torch import Tensor

from counterpoint.core.party_means import mean_of_parties

LOG = getLogger("flwr")


class MeanOfParties(FedAvg):
    """FedAvg with a mean that leaves out parties by name.

    Attributes:
        left_out: round -> node -> reason, of the parties that a round went on without.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.left_out: dict[int, dict[str, str]] = {}
        self.sent: dict[str, Tensor] = {}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Iterable[Message]:
        """Remember the server's arrays, and ask nodes as FedAvg does."""
        self.sent = tensors_of(arrays)
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the arrays and the metrics of the nodes that count."""
        answers = self._answers(server_round, replies)
        states = {node: tensors_of(arrays) for node, (arrays, _) in answers.items() if arrays is not None}
        weights = {node: self._weight(metrics) for node, (_, metrics) in answers.items()}
        mean, left_out = mean_of_parties(states, weights, self.sent)
        left_out |= {node: "it sent no arrays" for node in answers if node not in states}
        self._leave_out(server_round, left_out)
        if mean is None:
            return None, None
        counted = {node: metrics for node, (_, metrics) in answers.items() if node not in left_out}
        return ArrayRecord({name: Array(value.numpy()) for name, value in mean.items()}), self._metrics(counted)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the nodes that have examples."""
        answers = {node: metrics for node, (_, metrics) in self._answers(server_round, replies).items()}
        return self._metrics({node: metrics for node, metrics in answers.items() if self._weight(metrics) > 0})

    def _answers(self, number: int, replies: Iterable[Message]) -> dict[str, tuple[ArrayRecord | None, dict[str, Any]]]:
        """Return the arrays and metrics of each node that answered."""
        found, failed = {}, {}
        for reply in replies:
            node = str(reply.metadata.src_node_id)
            if reply.has_error():
                failed[node] = f"dropped out: {reply.error.reason}"
                continue
            arrays = next(iter(reply.content.array_records.values()), None)
            found[node] = (arrays, dict(next(iter(reply.content.metric_records.values()), {})))
        self._leave_out(number, failed)
        return found

    def _leave_out(self, number: int, reasons: dict[str, str]) -> None:
        for node, reason in reasons.items():
            self.left_out.setdefault(number, {})[node] = reason
            LOG.log(WARNING, "round %d goes on without node %s: %s", number, node, reason)

    def _weight(self, metrics: dict[str, Any]) -> float:
        value = metrics.get(self.weighted_by_key, 0)
        return float(value) if isinstance(value, int | float) else math.nan

    def _metrics(self, counted: dict[str, dict[str, Any]]) -> MetricRecord | None:
        """Return the weighted means of the metrics, each over the nodes where it is finite."""
        found: dict[str, Any] = {}
        for name in dict.fromkeys(name for metrics in counted.values() for name in metrics):
            pairs = [(m[name], self._weight(m)) for m in counted.values() if name in m]
            known = [(torch.as_tensor(value, dtype=torch.float64), weight) for value, weight in pairs]
            known = [(value, weight) for value, weight in known if bool(value.isfinite().all())]
            if name == self.weighted_by_key or not known or len({value.shape for value, _ in known}) > 1:
                continue
            mean = sum(weight * value for value, weight in known) / sum(weight for _, weight in known)
            found[name] = torch.as_tensor(mean).tolist()
        return MetricRecord(found) if found else None


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of a record as tensors by name."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
