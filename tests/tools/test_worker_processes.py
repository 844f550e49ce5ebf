"""Batches in real processes: killed, told to end, refused by the disk, launched by others; the numbers are the same."""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distill.tiny import save_teacher
from tests.tools.batches import COMMAND, Running, environment, fid, manifest, save_pictures, stamps, values_in
from tests.tools.batches import write_manifest as write
from tools.manifest import read_manifest
from tools.processes import run_batch

MADE = re.compile(r"\[([0-9a-f]{8}-\d+)\]: image")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {f"teacher {k}": save_teacher(place / str(k), seed=k) for k in range(3)}


@pytest.fixture
def file(models: dict[str, Path], tmp_path: Path) -> Path:
    """Of a manifest with eight jobs, of five chunks each."""
    chosen = dict(list(models.items())[:2])
    fields = manifest(save_pictures(tmp_path / "reference"), chosen, sampler=["euler", "heun"], draw=[0, 1])
    return write(tmp_path / "batch.yaml", fields)


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of two megabytes, seen through the process that holds it; None where that is not allowed."""
    place.mkdir()
    script = f"mount -t tmpfs -o size=2m tmpfs '{place}' && echo mounted && exec sleep 1000"
    holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert holder.stdout is not None
        yield Path(f"/proc/{holder.pid}/root{place}") if holder.stdout.readline() == b"mounted\n" else None
    finally:
        holder.kill()
        holder.wait()


def fill(disk: Path) -> Path:
    """Leaves not a byte."""
    with open(disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(b"\0" * 4096)
    return disk / "ballast"


def drafts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Chunk -> the bytes of its features, labels and logits."""
    files = (folder / "features").rglob("*.safetensors")
    return {
        str(f.relative_to(folder)): {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a small disk", "a limit of the process"])
def test_24_jobs_survive_kills_and_a_full_disk(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Three workers: one is killed, one is told to end, and the disk of the third is full; then three go on."""
    fields = manifest(
        save_pictures(tmp_path / "reference"), models, sampler=["euler", "heun"], steps=[2, 3], draw=[0, 1]
    )
    file = write(tmp_path / "batch.yaml", fields)
    assert Running("batch", file, "--out", tmp_path / "undisturbed", log=tmp_path / "0.log").wait() == 0
    expected = values_in(tmp_path / "undisturbed")
    assert len(expected) == 24

    with small_disk(tmp_path / "disk") as disk:
        if disk is None and kind == "a small disk":
            pytest.skip("this machine does not let its users mount")
        out = (disk if disk is not None and kind == "a small disk" else tmp_path) / "out"
        logs = [tmp_path / f"{k}.log" for k in range(1, 8)]
        workers = [Running("batch", file, "--out", out, log=log) for log in logs[:3]]

        workers[0].until(lambda: len(stamps(out)) >= 40)
        assert workers[0].end(signal.SIGKILL) == -signal.SIGKILL
        workers[1].until(lambda: len(stamps(out)) >= 90)
        assert workers[1].end(signal.SIGTERM) == 128 + signal.SIGTERM
        workers[2].until(lambda: len(stamps(out)) >= 140)
        if kind == "a small disk":
            ballast, refused = fill(out.parent), workers[2]
            assert refused.wait() == 2
            ballast.unlink()
        else:
            refused = Running("batch", file, "--out", out, log=logs[3], file_limit=1500)
            assert refused.wait() == 2
            assert workers[2].end(signal.SIGKILL) == -signal.SIGKILL
        reason = "No space left on device" if kind == "a small disk" else "File too large"
        assert refused.text.splitlines()[-1] == f"distill-fid: error: {out}: {reason}", refused.text
        assert "Traceback" not in "".join(worker.text for worker in workers)
        before = stamps(out)
        assert 140 <= len(before) < 24 + 2 * 5 * 25

        again = [Running("batch", file, "--out", out, log=log) for log in logs[4:]]
        assert [worker.wait() for worker in again] == [0, 0, 0], [worker.text for worker in again]
        after = stamps(out)
        assert len(after) == 24 + 2 * 5 * 25
        assert before.items() <= after.items()
        assert values_in(out) == expected
        assert rows_in(out) == rows_in(tmp_path / "undisturbed")
        assert not drafts(out / "features") + drafts(out / "results")
        made = Counter(MADE.findall("".join(log.read_text() for log in logs if log.exists())))
        assert set(made.values()) == {1}
        assert 5 * 25 - 2 <= len(made) <= 5 * 25  # who is killed may not have said what it had just finished


@pytest.mark.slow
def test_one_two_and_four_processes_give_the_same_bits(file: Path, tmp_path: Path) -> None:
    """Of one command, of a launch, and of shards that are run apart; on one thread and on two."""
    one = fid("batch", file, "--out", tmp_path / "one", OMP_NUM_THREADS="2")
    assert one.returncode == 0, one.stderr
    expected, rows = values_in(tmp_path / "one"), rows_in(tmp_path / "one")
    assert len(expected) == 8
    for count in (2, 4):
        launched = launch(count, "batch", file, "--out", tmp_path / f"launch {count}", cwd=tmp_path)
        assert launched.returncode == 0, launched.stderr
        assert launched.stdout.count("| digits fd |") == 1  # the table is the first process' to print
    shards = [
        Running("batch", file, "--out", tmp_path / "shards", "--shard", f"{i}/2", log=tmp_path / f"{i}") for i in (1, 2)
    ]
    assert [shard.wait() for shard in shards] == [0, 0]
    own = fid("batch", file, "--out", tmp_path / "workers", "--workers", 2)
    assert own.returncode == 0, own.stderr
    for name in ("launch 2", "launch 4", "shards", "workers"):
        assert values_in(tmp_path / name) == expected, name
        assert rows_in(tmp_path / name) == rows, name


def launch(count: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on a port that is free; README.md has the options that keep it on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", count, "--num_machines", 1)
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "tools.fid")
    command = [sys.executable, *map(str, (*launcher, *more, *arguments))]
    given = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_process_pools_and_submitit_give_the_same_bits(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    asked = read_manifest(file)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = run_batch(asked, tmp_path / "pool", executor=pool, workers=2)
    assert len(results) == 8
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    assert run_batch(asked, tmp_path / "submitit", executor=executor, workers=2)[7].values == results[7].values
    options = ("--workers", 2, "--submitit", "cluster=local,timeout_min=5")
    command = fid("batch", file, "--out", tmp_path / "command", *options)
    assert command.returncode == 0, command.stderr
    assert "]: image" not in command.stderr  # the jobs did it
    for name in ("submitit", "command"):
        assert values_in(tmp_path / name) == values_in(tmp_path / "pool"), name


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL of all workers"])
def test_a_command_that_is_ended_ends_its_workers_in_order(file: Path, tmp_path: Path, how: str) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [*COMMAND, "batch", str(file), "--out", str(out), "--workers", "2"]
    with open(log, "wb") as text:
        process = subprocess.Popen(command, env=environment(), stdout=text, stderr=text, start_new_session=True)
    while len(stamps(out)) < 20:
        assert process.poll() is None, log.read_text()
        time.sleep(0.001)
    if how == "Ctrl-C":  # the terminal tells the whole group
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)
    code, said = process.wait(60), log.read_text()
    assert "Traceback" not in said
    if how == "Ctrl-C":
        assert code == 130
        # Not always the last line: multiprocessing's resource tracker may have something to say after it.
        assert "distill-fid: interrupted; the same command continues" in said.splitlines()
    elif how == "SIGTERM":
        assert code == 128 + signal.SIGTERM
    else:
        assert code == 2
        assert "\ndistill-fid: error: worker 2 of 2 was ended by SIGKILL; none is left; the same command" in said
    deadline = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < deadline:  # multiprocessing's resource tracker is the last to go
        time.sleep(0.01)
    assert not _alive(process.pid)
    assert how == "SIGKILL of all workers" or not drafts(out / "features")
    before = stamps(out)
    assert len(before) < 8 + 2 * 5 * 9
    again = Running("batch", file, "--out", out, log=tmp_path / "again")
    assert again.wait() == 0, again.text
    assert before.items() <= stamps(out).items()
    assert not drafts(out)


@pytest.mark.slow
def test_a_worker_that_dies_leaves_its_work_to_the_others(file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [*COMMAND, "batch", str(file), "--out", str(out), "--workers", "2"]
    with open(log, "wb") as text:
        process = subprocess.Popen(command, env=environment(), stdout=text, stderr=text)
    while len(stamps(out)) < 20:
        assert process.poll() is None, log.read_text()
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(100) == 0, log.read_text()
    assert re.search("^worker [12] of 2 was ended by SIGKILL; what it held is taken over$", log.read_text(), re.M)
    assert len(values_in(out)) == 8


@pytest.mark.slow
def test_an_image_that_changes_while_a_batch_runs(models: dict[str, Path], tmp_path: Path) -> None:
    """Its job fails, naming the file, the others are done, and the same command does it under another key."""
    pictures = save_pictures(tmp_path / "b", 40, seed=1)
    sources = {**models, "pictures": pictures}
    file = write(tmp_path / "batch.yaml", manifest(save_pictures(tmp_path / "reference"), sources, draw=[0, 1], n=20))
    out = tmp_path / "out"
    worker = Running("batch", file, "--out", out, log=tmp_path / "log").until(lambda: len(stamps(out)) > 12)
    (pictures / "new").write_bytes((pictures / "0001.png").read_bytes())
    (pictures / "new").replace(pictures / "0000.png")
    assert worker.wait() == 2
    last = worker.text.splitlines()[-1]
    assert last.startswith("distill-fid: error: 1 of 8 jobs failed, the others are done; the first: pictures: ")
    assert "b/0000.png: has changed since it was hashed" in last
    before = stamps(out)
    assert len(values_in(out)) == 7
    assert Running("batch", file, "--out", out, log=tmp_path / "again").wait() == 0
    assert before.items() <= stamps(out).items()
    shutil.rmtree(out / "results")
    assert Running("batch", file, "--out", out, log=tmp_path / "again").wait() == 0
    assert len(values_in(out)) == 8
