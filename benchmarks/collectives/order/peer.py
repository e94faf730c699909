"""OR-tools' routing solver (guided local search) on a matrix from standard input; runs in an environment of its own.

python peer.py SECONDS < cost.npy > order.json
"""

import io
import json
import sys
import time

import numpy as np
from ortools.constraint_solver import pywrapcp, routing_enums_pb2


def main() -> None:
    """Read, solve, write the order and the CPU seconds."""
    seconds = float(sys.argv[1])
    cost = np.load(io.BytesIO(sys.stdin.buffer.read()))
    whole = np.rint(cost * 1000).astype(int).tolist()
    start = time.process_time()
    manager = pywrapcp.RoutingIndexManager(len(whole), 1, 0)
    model = pywrapcp.RoutingModel(manager)
    model.SetArcCostEvaluatorOfAllVehicles(model.RegisterTransitMatrix(whole))
    parameters = pywrapcp.DefaultRoutingSearchParameters()
    parameters.first_solution_strategy = routing_enums_pb2.FirstSolutionStrategy.PATH_CHEAPEST_ARC
    parameters.local_search_metaheuristic = routing_enums_pb2.LocalSearchMetaheuristic.GUIDED_LOCAL_SEARCH
    parameters.time_limit.FromMilliseconds(int(seconds * 1000))
    solution = model.SolveWithParameters(parameters)
    order, at = [], model.Start(0)
    while not model.IsEnd(at):
        order.append(manager.IndexToNode(at))
        at = solution.Value(model.NextVar(at))
    json.dump({"order": order, "cpu": time.process_time() - start}, sys.stdout)


if __name__ == "__main__":
    main()
