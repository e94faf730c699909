"""LitServe's own batching over the same sleeping workers: PORT MAX_BATCH TIMEOUT_S."""

import sys

import litserve
from _sleeping import load


class Squares(litserve.LitAPI):
    """What `_sleeping.load` computes."""

    def setup(self, device):
        self.run_batch = load(device)

    def decode_request(self, request):
        return request["input"]

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        outputs = self.run_batch(inputs)
        return [(output, len(inputs)) for output in outputs]

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"output": output[0], "batch": output[1]}


if __name__ == "__main__":
    api = Squares(max_batch_size=int(sys.argv[2]), batch_timeout=float(sys.argv[3]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=8, timeout=False)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
