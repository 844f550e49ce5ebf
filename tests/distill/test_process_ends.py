"""How the processes of a launch end: at once, whatever the threads of their group still hold."""

import os
import subprocess
import sys

import pytest

from tests.distill.runs import free_port

# A command of which the second process is done while a sum of its group is not: a thread of the group then lets go of
# the tensor, for which it needs the interpreter. Networks that are alive keep the threads. What becomes of the first
# process, which may find the other gone, is not looked at.
LATE = """
import os, sys, time
import torch
from distill import cli
from distill.together import joined

def late(arguments):
    rank = joined(cpu=True).process_index
    cli.kept = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    torch.distributed.barrier()
    if rank == 0:
        time.sleep(WAIT)
    torch.distributed.all_reduce(torch.ones(3), async_op=rank == 1)
    print("done")

cli._COMMANDS["export"] = late
sys.argv = ["distill", "export", "run", "folder"]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0, 0.002, 0.005])
def test_a_process_that_has_done_its_work_is_not_aborted_by_its_groups_threads(wait: float) -> None:
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | launched | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE.replace("WAIT", str(wait))],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert (ranks[1].returncode, told[1]) == (0, "done\n")
