"""An engine at the other end of a socket: what stands behind the trainer's seam in the tests.

The server knows nothing of the run but what is sent to it: the model, weights, prompts and keys.
"""

import contextlib
import dataclasses
import io
import json
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import Completion, Timings
from dppo_jax.sampling.rollouts import from_completions, prompt_ids


def hashable(fields: dict) -> dict:
    """A record's fields as they were before JSON made lists of tuples."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}


class Server:
    """Answers POSTs of /model, /weights and /generate; counts them in `asked`."""

    def __init__(self):
        self.asked = []

    def model(self, body: bytes) -> bytes:
        self._model = Model(DecoderConfig(**hashable(json.loads(body))))
        return b""

    def weights(self, body: bytes) -> bytes:
        arrays = np.load(io.BytesIO(body), allow_pickle=False)
        like = self._model.abstract_params
        flat, tree = jax.tree.flatten_with_path(like)
        leaves = [jnp.asarray(arrays[jax.tree_util.keystr(at)]) for at, _ in flat]
        self._params = jax.tree.unflatten(tree, leaves)
        return b""

    def generate(self, body: bytes) -> bytes:
        given = json.loads(body)
        columns = given["columns"]
        tokens, mask = np.zeros((2, len(given["prompts"]), columns), np.int32)
        for row, ids in enumerate(given["prompts"]):
            tokens[row, columns - len(ids) :], mask[row, columns - len(ids) :] = ids, True
        key = jax.random.wrap_key_data(jnp.array(given["key"], jnp.uint32))
        made = generate(
            self._model, self._params, Prompts(jnp.asarray(tokens), jnp.asarray(mask, bool)), key,
            settings=SamplingConfig(**hashable(given["settings"])),
        )  # fmt: skip
        made = SimpleNamespace(**jax.device_get(vars(made)))
        rows = [
            {
                "tokens": made.response_tokens[row, :count].tolist(),
                "logp": made.logp_rollout[row, :count].tolist(),
                "topk_ids": made.topk_ids[row, :count].tolist(),
                "topk_logp": made.topk_logp_rollout[row, :count].tolist(),
                "entropy": made.entropy_rollout[row, :count].tolist(),
                "finish_reason": int(made.finish_reason[row]),
            }
            for row, count in enumerate(made.response_mask.sum(axis=1))
        ]
        return json.dumps(rows).encode()


@contextlib.contextmanager
def serving():
    """The server and its address; its thread ends with the block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            server.asked.append(self.path[1:])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = getattr(server, self.path[1:])(body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield server, f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


class Remote:
    """A RolloutSource whose sampler is elsewhere; it sends weights when it sees new ones."""

    elsewhere = True

    def __init__(self, url, context):
        self._url, self._mesh, self._sent = url, context.mesh, None
        self._one_at_a_time = threading.Lock()  # weights, and what is asked of them
        self._post("model", json.dumps(dataclasses.asdict(context.model.config)).encode())

    def rollout(self, params, prompts, key, settings, *, first=0, version=0):
        with self._one_at_a_time:
            return self._asked(params, prompts, key, settings, version)

    def _asked(self, params, prompts, key, settings, version):
        if params is not self._sent:
            named = {jax.tree_util.keystr(at): x for at, x in jax.tree.leaves_with_path(params)}
            packed = io.BytesIO()
            np.savez(packed, **named)
            self._post("weights", packed.getvalue())
            self._sent = params
        request = {
            "prompts": prompt_ids(prompts, self._mesh),
            "columns": prompts.tokens.shape[1],
            "key": jax.random.key_data(key).tolist(),
            "settings": dataclasses.asdict(settings),
        }
        rows = json.loads(self._post("generate", json.dumps(request).encode()))
        made = [
            Completion(
                np.array(row["tokens"], np.int32),
                np.array(row["logp"], np.float32),
                np.array(row["topk_ids"], np.int32),
                np.array(row["topk_logp"], np.float32),
                np.array(row["entropy"], np.float32),
                np.full(len(row["tokens"]), version, np.int32),
                row["finish_reason"],
                Timings(0.0, 0.0, 0.0),
            )
            for row in rows
        ]
        return from_completions(prompts, made, settings, self._mesh)

    def _post(self, what, body):
        with urllib.request.urlopen(f"{self._url}/{what}", body, timeout=60) as answer:
            return answer.read()


def over_http(url: str):
    """For a recipe: rollouts from the engine at this address."""
    return lambda context: Remote(url, context)


if __name__ == "__main__":  # a process of its own, until its standard input ends
    with serving() as (_, address):
        print(address, flush=True)
        sys.stdin.read()
