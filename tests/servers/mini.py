"""A small real server: a tiny model of transformers behind vLLM's (and SGLang's) JSON, computing every number it gives.

with MiniServer(folder) as server:
    server.url
"""

from __future__ import annotations

import json
import sys
import threading
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.servers.rows import by_token, likeliest, of_written
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Finish, Request, Sampling

LOADING = threading.Lock()
"""Reading weights sets torch's default dtype, and more, for all threads: one at a time."""


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@cache
def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; nobody changes them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@lru_cache(maxsize=1000)
def rows_of(model: Any, ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Row t describes token t; row 0 is of no use.  Kept, since many servers are asked about the same texts."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0].float() / temperature
    return torch.cat([torch.zeros_like(logits_TV[:1]), logits_TV.log_softmax(-1)[:-1]])


class QuietServer(ThreadingHTTPServer):
    """Whoever asked may go away in the middle of an answer."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class MiniServer:
    """Serves until the block ends."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "tiny",
        max_logprobs: int = 64,
        max_model_len: int = 256,
        key: str | None = None,
        temperature: float = 1.0,
        keeps_tied_head: bool = False,
        ignores_reload: bool = False,
        port: int = 0,
    ) -> None:
        """`keeps_tied_head` loads new weights as vLLM does from a tied export: all but the head."""
        self.model, self.tokenizer = load(folder)
        self.folder, self.name, self.key = folder, name, key
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.temperature = temperature
        self.keeps_tied_head, self.ignores_reload = keeps_tied_head, ignores_reload
        self.adapters: dict[str, Any] = {}
        self.asked = self.model
        self.engine: TransformersEngine | None = None
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.http = QuietServer(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> MiniServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any] | None, request_id: str) -> Any:
        with self.lock:
            if body is not None:
                self.requests.append(body)
            if path == "/health":
                return {}
            if path == "/v1/models":
                card = {"id": self.name, "root": str(self.folder), "max_model_len": self.max_model_len}
                adapters = [{"id": name, "root": name, "parent": self.name} for name in self.adapters]
                return {"object": "list", "data": [card, *adapters]}
            if body is None:
                raise Refusal(404, "Not Found")
            if path == "/collective_rpc":
                return self.reload(body)
            if path == "/reset_prefix_cache":
                return {"success": True}
            if path == "/v1/load_lora_adapter":
                return self.load_adapter(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                return self.adapters.pop(body["lora_name"]) and {}
            if path == "/tokenize":
                ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
                return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids}
            if path == "/v1/completions":
                return self.completions(body, request_id)
            if path == "/v1/chat/completions":
                return self.chat(body, request_id)
            if path == "/generate":
                return self.generate(body)
            raise Refusal(404, "Not Found")

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        if not self.ignores_reload:
            head = self.model.get_output_embeddings().weight.detach()
            with LOADING:
                self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32)
            if self.model.config.tie_word_embeddings and self.keeps_tied_head:
                self.model.get_output_embeddings().weight = torch.nn.Parameter(head)
        return {"results": [None]}

    def load_adapter(self, name: str, folder: str) -> dict[str, Any]:
        from peft import PeftModel

        if name in self.adapters:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        with LOADING:
            base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            self.adapters[name] = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
        return {}

    def drawn_from(self, ids: list[int]) -> torch.Tensor:
        """As `logprobs`, of the tokens of a text when they are drawn: the model's own."""
        return MiniServer.logprobs(self, ids)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return rows_of(self.asked, tuple(ids), self.temperature)

    def completions(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        self.asked = self.adapters.get(body["model"], self.model)
        if body["model"] not in (self.name, *self.adapters):
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        top_k = body.get("prompt_logprobs")
        if top_k is not None and top_k > self.max_logprobs:
            raise Refusal(
                400,
                f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs}",
            )
        for ids in prompts:
            if len(ids) + body["max_tokens"] > self.max_model_len:
                raise Refusal(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        choices = [self._choice(index, ids, body, top_k) for index, ids in enumerate(prompts)]
        about = {"object": "text_completion", "model": body["model"]}
        return {
            "id": f"cmpl-{request_id}",
            **about,
            "choices": choices,
            "usage": {"prompt_tokens": sum(map(len, prompts))},
        }

    def _choice(self, index: int, ids: list[int], body: dict[str, Any], top_k: int | None) -> dict[str, Any]:
        written = self._write(ids, body) if top_k is None else None
        choice: dict[str, Any] = {
            "index": index,
            "text": "",
            "finish_reason": "length" if written is None or written.finish is Finish.LENGTH else "stop",
            "token_ids": [0] if written is None else list(written.token_ids),
            "prompt_token_ids": ids,
            "prompt_logprobs": None,
            "logprobs": None,
        }
        if written is not None and body.get("logprobs") is not None:
            choice["logprobs"] = self._drawn(ids, list(written.token_ids), body["logprobs"])
        if top_k is not None:
            rows_TV = self.logprobs(ids)
            choice["prompt_logprobs"] = [None, *by_token(rows_TV[1:], ids[1:], top_k)]
        return choice

    def _drawn(self, ids: list[int], new: list[int], top_k: int) -> dict[str, Any]:
        """Of a text: the token that was drawn, and the likeliest ones."""
        rows_TV = self.drawn_from([*ids, *new])[len(ids) :].clamp_min(-9999.0)
        own = of_written(rows_TV, new)
        tops = [{f"token_id:{i}": x for x, i, _ in top} for top in likeliest(rows_TV, top_k)]
        names = [f"token_id:{i}" for i in new]
        all_ = [{name: x} | top for name, x, top in zip(names, own, tops, strict=True)]
        return {"tokens": names, "token_logprobs": own, "top_logprobs": all_}

    def _write(self, ids: list[int], body: dict[str, Any]) -> Any:
        request = Request(
            token_ids=tuple(ids),
            max_new_tokens=body["max_tokens"],
            seed=body.get("seed") or 0,
            sampling=Sampling(temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"]),
            stop_ids=tuple(body.get("stop_token_ids") or ()),
        )
        if self.engine is None or self.engine.model is not self.asked:
            self.engine = TransformersEngine(self.asked)
        return self.engine.generate([request])[0]

    def chat(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        limit = body["max_tokens"]
        written = self._write(ids, {**body, "top_k": 0, "stop_token_ids": [self.tokenizer.eos_token_id]})
        text = self.tokenizer.decode(written.token_ids, skip_special_tokens=True)
        reason = "stop" if written.finish is Finish.STOP or len(written.token_ids) < limit else "length"
        message = {"role": "assistant", "content": text}
        return {"id": request_id, "model": self.name, "choices": [{"message": message, "finish_reason": reason}]}

    def generate(self, body: dict[str, Any]) -> Any:
        """SGLang's own route: a list of texts is scored, one text is continued."""
        if not isinstance(body["input_ids"][0], list):
            return self._continue(body)
        pairs = zip(body["input_ids"], body["rid"], strict=True)
        return [self._score(ids, rid, body["top_logprobs_num"]) for ids, rid in pairs]

    def _score(self, ids: list[int], rid: str, top_k: int) -> dict[str, Any]:
        rows_TV = self.logprobs(ids)
        own = [[None if t == 0 else x, ids[t], None] for t, x in enumerate(of_written(rows_TV, ids))]
        top = likeliest(rows_TV[1:], top_k)
        meta = {"id": rid, "prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": [None, *top]}
        return {"text": "", "meta_info": meta}

    def _continue(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["sampling_params"]
        values = {
            "max_tokens": asked["max_new_tokens"],
            "seed": asked["sampling_seed"],
            "top_k": max(asked["top_k"], 0),
        }
        written = self._write(body["input_ids"], {**asked, **values})
        end = {"type": "length" if written.finish is Finish.LENGTH else "stop"}
        meta = {"id": body["rid"], "finish_reason": end, "prompt_tokens": len(body["input_ids"])}
        if body.get("return_logprob"):
            ids = list(written.token_ids)
            rows_TV = self.drawn_from([*body["input_ids"], *ids])[-len(ids) :]
            meta["output_token_logprobs"] = [[x, i, None] for x, i in zip(of_written(rows_TV, ids), ids, strict=True)]
            meta["output_top_logprobs"] = likeliest(rows_TV, body["top_logprobs_num"])
        return {"text": "", "output_ids": list(written.token_ids), "meta_info": meta}


def _handler(server: MiniServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any] | None) -> None:
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                status, found = 401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}}
            else:
                try:
                    request_id = self.headers.get("X-Request-Id", "unnamed")
                    status, found = 200, server.answer(self.path, body, request_id)
                except Refusal as refusal:
                    status, found = refusal.status, {"error": {"message": str(refusal)}}
                except Exception as defect:  # a refusal too: whoever asked would try again until its deadline
                    words = f"the tests' small server fails: {type(defect).__name__}: {defect}"
                    status, found = 400, {"error": {"message": words}}
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
