"""Answer over HTTP with a classifier that `lightpeft export --form onnx` wrote (pip install 'lightpeft[onnx]').

python examples/serve_onnx.py movies --port 8000
curl --data 'a moving film' http://127.0.0.1:8000

A line of what is posted is a text, and a line of the answer says its label. ONNX Runtime computes; lightpeft is
not needed.
"""

import argparse
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
from onnxruntime import InferenceSession
from transformers import AutoConfig, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what lightpeft export wrote")
parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
options = parser.parse_args()

tokenizer, config = AutoTokenizer.from_pretrained(options.folder), AutoConfig.from_pretrained(options.folder)
session = InferenceSession(f"{options.folder}/model.onnx")
ROWS = 32
"""At once: texts of similar length, so that few tokens are padding."""


def logits_of(texts: list[str]) -> np.ndarray:
    encoded = tokenizer(texts, truncation=True)
    order = sorted(range(len(texts)), key=lambda row: len(encoded["input_ids"][row]))
    logits = np.empty((len(texts), config.num_labels), np.float32)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        batch = tokenizer.pad({name: [of[row] for row in rows] for name, of in encoded.items()}, return_tensors="np")
        (logits[rows],) = session.run(["logits"], dict(batch))
    return logits


class Classifier(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        texts = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        if not texts:
            self.send_error(HTTPStatus.BAD_REQUEST, "post a text a line")
            return
        logits = logits_of(texts)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        answers = [{"label": config.id2label[int(row.argmax())], "p": round(float(row.max()), 3)} for row in chances]
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        self.wfile.write("".join(json.dumps(answer) + "\n" for answer in answers).encode())


# one request at a time: the tokenizer is not for several threads at once
with HTTPServer(("127.0.0.1", options.port), Classifier) as server:
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
