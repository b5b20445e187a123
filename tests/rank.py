"""One rank of a process group, started by torchrun: prints what `tune(group=...)` and a plain call come to, as JSON."""

import json
import sys

import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs import Problem
from compiled_logprobs.tuning import serving

distributed.init_process_group("gloo")
rank, what = distributed.get_rank(), sys.argv[1]
problem = Problem("cpu", 1024, 1031, torch.float32)
if what == "another environment" and rank == 1:
    torch.set_num_threads(torch.get_num_threads() + 1)
if what == "other problems" and rank == 1:
    problem = problem._replace(vocab=1033)
if what == "cannot measure" and rank == 0:
    serving.Tuner = None  # whatever goes wrong where it is measured
found = {"rank": rank}
try:
    (decision,) = clp.tune([problem], budget_s=20, group=distributed.group.WORLD)
    found |= {"chosen": decision.chosen, "code": decision.code, "seed": decision.seed}
except clp.LogProbsError as error:
    found["error"] = f"{type(error).__name__}: {error}"
logits, labels = torch.randn(1020, problem.vocab), torch.randint(problem.vocab, (1020,))
found["right"] = bool((clp.log_probs_from_logits(logits, labels) <= 0).all())
found["source"] = clp.explain(logits, labels).source
distributed.barrier()
for turn in range(distributed.get_world_size()):  # one after the other, so that lines do not mix
    if turn == rank:
        print(json.dumps(found), flush=True)
    distributed.barrier()
distributed.destroy_process_group()
