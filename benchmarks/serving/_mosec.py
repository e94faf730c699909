"""mosec over the same sleeping workers: PORT MAX_BATCH WAIT_MS. Needs mosec alone, in an environment of its own."""

import sys

from _sleeping import load
from mosec import Server, Worker

PORT, MAX_BATCH, WAIT_MS = sys.argv[1:4]
sys.argv = [sys.argv[0], "--port", PORT, "--address", "127.0.0.1", "--timeout", "20000"]


class Squares(Worker):
    """What `_sleeping.load` computes."""

    def __init__(self):
        super().__init__()
        self.run_batch = load("cpu")

    def forward(self, data):
        return [{"output": output, "batch": len(data)} for output in self.run_batch([one["input"] for one in data])]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Squares, num=8, max_batch_size=int(MAX_BATCH), max_wait_time=int(WAIT_MS))
    server.run()
