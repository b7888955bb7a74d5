"""Your policy in your own server: it streams what a model writes, and your code decides how many tokens are drafted.

    python custom_policy_server.py                                  # in one terminal; --port, --tokens
    curl -N -d "Why is the sky blue?" http://127.0.0.1:8000         # in another

`control, policy = spec_envs.agents.load("SpecK-v0")` takes a trained agent instead. The text is the model's own anyway.
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer

from spec_envs import generate, load_tokenizer
from spec_envs.controls.k import KControl
from spec_envs.prompts.sets import encode


class DoubleOrHalve:
    """A policy is any object with `predict`. This one doubles the draft after a chain that was accepted whole, else halves it."""

    def __init__(self, control):
        self.control = control

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        whole = observation[self.control.slices["last_acceptance"]][0] == 1
        k = 2 if state is None else min(max(1, 2 * state if whole else state // 2), self.control.k_max)
        return k, k  # the action, and what it is told as `state` at the next decision of this text


class Handler(BaseHTTPRequestHandler):
    """Answers a prompt, the body of a POST, with the text as it comes."""

    def do_POST(self):
        try:
            answer = self.server.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        except ValueError as error:  # such as an empty prompt
            return self.send_error(400, explain=str(error))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        for piece in answer.pieces():
            self.wfile.write(piece.encode())
        self.log_message("drafted %s tokens in turn; %.0f tokens/s", answer.actions, answer.tokens_per_second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="port on loopback; 0 takes a free one")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    args = parser.parse_args()
    control, tokenizer = KControl(), load_tokenizer("smollm2-135m")
    decoder, policy = control.open(target="smollm2-135m"), DoubleOrHalve(control)
    with HTTPServer(("127.0.0.1", args.port), Handler) as server:  # one request at a time: there is one decoder
        server.answer = lambda text: generate(decoder, control, policy, encode(tokenizer, text), args.tokens)
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
