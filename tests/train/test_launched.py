"""Runs that torch's launcher starts: several processes on one machine, and two machines made of network namespaces."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import run_command

from conftest import conversations
from preceptor.commands.train import _exit_code

SECONDS = 240  # of a command; a few suffice where nothing else runs
SOURCE = Path(__file__).parents[2] / "src"
TWO_NODES = Path(__file__).parents[2] / "recipes" / "launch" / "two_nodes.sh"


def environment(**more):
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    path = os.pathsep.join([str(SOURCE), *filter(None, [own.get("PYTHONPATH")])])
    programs = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    return {**own, "PYTHONPATH": path, "PATH": programs, "PYTHONUNBUFFERED": "1", **more}


def started(*command, **more):
    return subprocess.Popen(
        [*map(str, command)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def descendants(pid):
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, ())
    return found[1:]


def ended(process):
    """What it printed. It is killed, with all that it started, when it takes too long."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid)]:  # the ranks have sessions of their own
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"took more than {SECONDS} s: {process.communicate()[0]}")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(file, *arguments, **more):
    return started(sys.executable, "-m", "preceptor", "train", *arguments, file, **more)


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_nproc_trains_and_says_everything_once(run_file, tmp_path):
    file = run_file(eval_rows=conversations(2))
    process = train(file, "--nproc", 2)
    shown = ended(process)
    assert process.returncode == 0, shown
    assert "2 processes: the whole model in each" in shown
    for line in ("trained on", "all proved in", "step 4/4", "done in"):
        assert shown.count(line) == 1, shown
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["num_processes"] == 2
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "model").is_dir()
    again = run_command(2, "train", file)
    shown = "".join(each.shown for each in again)
    assert {each.code for each in again} == {6} and shown.count("this run is finished") == 1, shown
    assert shown.count("error: ") == 1, shown


def processes_of(file, tmp_path):
    """The processes of a run, by rank, as soon as it has taken a step."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (tmp_path / "run" / "metrics.jsonl").exists() and metrics(tmp_path / "run"):
            break
        time.sleep(0.05)
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().decode().split("\0")
            values = dict(line.partition("=")[::2] for line in (place / "environ").read_bytes().decode().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
        if str(file) in command and "RANK" in values:
            found[int(values["RANK"])] = int(place.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_process_ends_the_run_and_is_named(run_file, tmp_path):
    file = run_file(train__duration="100000 steps", eval__every=None, checkpoint__every=None)
    process = train(file, "--nproc", 2)
    os.kill(processes_of(file, tmp_path)[1], signal.SIGKILL)
    killed = time.monotonic()
    shown = ended(process)
    assert time.monotonic() - killed < 60
    assert process.returncode == 7, shown
    assert "killed: process 1 by SIGKILL" in shown and "Traceback" not in shown
    assert shown.count("error: ") == 1, shown


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([75, -9], 7),  # stopped by the launcher, as the other was killed
        ([75, 5], 5),
        ([7, 75, -9], 7),
        ([5, -9], 5),
        ([75, 75], 75),  # both were told to stop
        ([-15, -15], 7),
    ],
)
def test_the_exit_code_is_that_of_the_cause(codes, code, capsys):
    error = SimpleNamespace(failures={rank: SimpleNamespace(exitcode=own) for rank, own in enumerate(codes)})
    assert _exit_code(error) == code
    assert ("by SIGKILL" in capsys.readouterr().err) == (-9 in codes and 5 not in codes)


def test_a_signal_to_the_launcher_saves_and_says_how_to_go_on(run_file, tmp_path):
    file = run_file(train__duration="100000 steps", eval__every=None, checkpoint__every=None)
    process = train(file, "--nproc", 2)
    processes_of(file, tmp_path)
    process.terminate()
    shown = ended(process)
    assert process.returncode == 75, shown
    step = metrics(tmp_path / "run")[-1]["step"]
    assert shown.count(f"stopped by SIGTERM after step {step}, which is saved in") == 1, shown
    assert shown.count(f"this goes on: preceptor train --nproc 2 {file}") == 1, shown
    assert "Traceback" not in shown and "error: " not in shown
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08d}"]


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link between them: (name, address, interface) of each."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command `ip` here")
    names = [f"preceptor-{os.getpid()}-{host}" for host in "ab"]
    hosts = [(name, f"10.77.0.{place}", f"p{os.getpid() % 100000}{place}") for place, name in enumerate(names, 1)]
    (first, _, left), (second, _, right) = hosts
    commands = [f"ip netns add {first}", f"ip netns add {second}"]
    commands += [f"ip link add {left} netns {first} type veth peer name {right} netns {second}"]
    for name, address, interface in hosts:
        commands += [f"ip -n {name} addr add {address}/24 dev {interface}", f"ip -n {name} link set {interface} up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_train_together(run_file, tmp_path, two_hosts):
    """recipes/launch/two_nodes.sh on both, which see each other by the link alone."""
    file = run_file()
    processes = []
    for name, address, interface in two_hosts:
        more = {"NPROC_PER_NODE": "1", "PET_LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": interface}
        if name == two_hosts[0][0]:  # by its name, which both have, no host can tell that it is the first
            more["PET_RDZV_CONF"] = "is_host=1"
        command = ("ip", "netns", "exec", name, TWO_NODES, two_hosts[0][1], file, "parallel.strategy=shard")
        processes.append(started(*command, **more))
    shown = [ended(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(shown)
    assert sum(text.count("done in") for text in shown) == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "model").is_dir()
