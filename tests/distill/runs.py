"""What several tests do with runs: launch them on two processes, kill them, compare what they left."""

import json
import random
import socket
import time
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

from distill import checkpoint
from tests.distill.command import Result, Running, fresh


def assert_refused(result: Result, *parts: str) -> None:
    assert result.code == 2, (result.code, result.err)
    assert result.err.startswith("distill: error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


def entries(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


DDP = ("--multi_gpu",)
FSDP = ("--use_fsdp", "--fsdp_version", 2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launcher(kind: tuple[object, ...] = DDP, precision: str = "no", compiler: str = "no") -> tuple[object, ...]:
    """The words of `accelerate launch` with two processes on a port that is free."""
    # With --cpu the launcher starts one process whatever --num_processes says (accelerate 1.15), unless through MPI;
    # with --multi_gpu it starts two, and the environment keeps them on the CPU.
    words = ("-m", "accelerate.commands.launch", *kind, "--num_processes", 2, "--num_machines", 1)
    return (*words, "--mixed_precision", precision, "--dynamo_backend", compiler, "--main_process_port", free_port())


def launch(
    place: Path,
    *arguments: object,
    kind: tuple[object, ...] = DDP,
    precision: str = "no",
    compiler: str = "no",
    **environment: str,
) -> str:
    """`accelerate launch` of the command with two processes; returns the exit code and both streams."""
    words = (*launcher(kind, precision, compiler), "-m", "distill.cli", *arguments)
    variables = {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"} | environment
    result = fresh(*words, cwd=place, timeout=400, **variables)
    return f"{result.returncode}\n{result.stdout}\n{result.stderr}"


def forked(place: Path, *arguments: object, kind: tuple[object, ...] = DDP, other: Path | None = None) -> str:
    """As `launch`, without a launcher: processes that are told what it tells its own, and ended when another fails.

    other: where the second process is at work, on a disk of its own.
    Forked from a server that has imported everything, they take a fifth of the time; real ones: test_processes.py.
    """
    args = launch_command_parser().parse_args([*map(str, launcher(kind)[2:]), "script.py"])
    told, _, _ = _validate_launch_command(args)
    environment = prepare_multi_gpu_env(told) | {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    places = {"0": place, "1": other or place}
    own = {k: environment | {"RANK": k, "LOCAL_RANK": k} for k in places}
    ranks = [Running(arguments, places[k], environment=own[k]) for k in places]
    ended = time.monotonic() + 400
    while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < ended:
        time.sleep(0.02)
        if any(rank.process.exitcode for rank in ranks):
            ended = min(ended, time.monotonic() + 10)
    for rank in ranks:
        if rank.process.is_alive():
            rank.kill()
    results = [rank.wait() for rank in ranks]
    code = next((result.code for result in results if result.code), 0)
    return "\n".join([str(code), *(text for result in results for text in (result.out, result.err))])


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without the time, which is not repeated."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same(run: Path, other: Path) -> None:
    """Weights, optimizers and metrics, bit for bit."""
    files = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, other)]
    assert files[0] == files[1]
    for a in sorted((run / "checkpoints" / files[0][-1]).glob("*.safetensors")):
        b = other / "checkpoints" / files[0][-1] / a.name
        assert a.read_bytes() == b.read_bytes(), a.name
    assert lines(run) == lines(other)
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]


def kill_somewhere(
    command: tuple[object, ...], run: Path, place: Path, rng: random.Random, until: int, after: int = 0
) -> int:
    """Starts the command and kills it a random wait past a random step, `after` .. `until`; returns the newest whole
    checkpoint."""
    found = checkpoint.newest(run / "checkpoints")
    begun = int(found.name[5:]) if found else 0
    running = Running(command, place)
    step = rng.randint(max(begun, after), until)
    metrics = run / "metrics.jsonl"
    while running.process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.001)
    time.sleep(rng.random() * 0.03)
    running.kill()
    assert running.wait().code in (-9, 0)
    found = checkpoint.newest(run / "checkpoints")
    return int(found.name[5:]) if found else 0
