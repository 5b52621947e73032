"""Weights from the trainer's GPUs to a server's, by vLLM's own weight transfer over NCCL.

The first rank sends; the others only take part in gathering each tensor from its shards. The
trainer's environment needs vLLM too, for its half of the transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from xopd.vllm.http import Deadline, HttpClient, ServerError
from xopd.vllm.options import HttpConfig, ServerConfig
from xopd.vllm.sync import LanguageModel


class NcclSender:
    """One connection to a server, made at the first update and kept."""

    def __init__(
        self, client: HttpClient, server: ServerConfig, http: HttpConfig, weights: LanguageModel
    ) -> None:
        from vllm.distributed.weight_transfer import (
            ParamMeta,
            WeightSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        class Source(WeightSource):  # type: ignore[misc]  # its base is imported late
            """`LanguageModel` as vLLM wants it."""

            def metadata(self) -> list[Any]:
                return [ParamMeta(info.name, info.dtype, info.shape) for info in weights.infos()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(weights)

        control = Control(client, http)
        init = NCCLTrainerInitInfo(
            rank=0,
            master_address=server.nccl_host,
            master_port=server.nccl_port,
            world_size=control.workers() + 1,
        )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init, client=control, source=Source()
        )

    def send(self) -> None:
        """One update; the server holds its weights when this returns."""
        self._engine.send_weights()

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()


class Control:
    """vLLM's own control calls over our client: with its deadline, and none of them repeated."""

    def __init__(self, client: HttpClient, http: HttpConfig) -> None:
        self._client, self._http = client, http

    def workers(self) -> int:
        """How many workers the server has."""
        count = self._client.get("/get_world_size", self._deadline()).get("world_size")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ServerError(f"server {self._client.name} says it has {count!r} workers.")
        return count

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See vLLM's VLLMWeightSyncClient."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """See vLLM's VLLMWeightSyncClient."""
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """See vLLM's VLLMWeightSyncClient."""
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See vLLM's VLLMWeightSyncClient; the version is set after the caches are reset."""
        self._post("/finish_weight_update", {})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._client.post(path, body, self._deadline(), may_repeat=False)

    def _deadline(self) -> Deadline:
        return Deadline(self._http.deadline_s)
