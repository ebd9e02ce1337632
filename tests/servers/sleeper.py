"""A small server with vLLM's routes for sleep, which loses what it throws away and answers nobody in its sleep."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch

from tests.servers.mini import MiniServer, Refusal

ALL = frozenset({"weights", "kv_cache"})
WEIGHTS = frozenset({"weights"})
NEEDED = {"/v1/completions": ALL, "/collective_rpc": WEIGHTS, "/v1/load_lora_adapter": WEIGHTS}
"""What has to be awake."""


class Sleeper(MiniServer):
    def __init__(
        self, folder: Path, *, flag: bool = True, device: str = "cuda", insomniac: bool = False, **how: Any
    ) -> None:
        """`flag`: was started with --enable-sleep-mode; an insomniac says that it sleeps and does not."""
        super().__init__(folder, **how)
        self.flag, self.device, self.insomniac = flag, device, insomniac
        self.sleeping: frozenset[str] = frozenset()
        self.paths: list[str] = []
        self.noting = threading.Lock()

    def answer(self, path: str, body: dict[str, Any] | None, request_id: str) -> Any:
        with self.noting:
            self.paths.append(path)
        route, _, query = path.partition("?")
        if route == "/server_info":
            config = {"model_config": {"enable_sleep_mode": self.flag}, "device_config": {"device": self.device}}
            return {"vllm_config": config, "system_env": {}}
        if route == "/is_sleeping":
            return {"is_sleeping": bool(self.sleeping)}
        if route == "/sleep":
            return self.sleep(query)
        if route == "/wake_up":
            self.sleeping -= {query.removeprefix("tags=")} if query else ALL
            return {"status": "sleeping" if self.sleeping else "awake"}
        needed = NEEDED.get(route, frozenset())
        if needed & self.sleeping:
            raise Refusal(400, f"{route} was asked for, but {sorted(self.sleeping)} are asleep")
        return super().answer(path, body, request_id)

    def sleep(self, query: str) -> dict[str, Any]:
        if not self.insomniac:
            self.sleeping = ALL
        if query == "level=2":
            self.model = copy.deepcopy(self.model)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
        return {"status": "sleeping"}
