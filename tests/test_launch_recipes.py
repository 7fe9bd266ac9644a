"""The scripts of recipes/launch: what they start is a command that torchrun and our command line take."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer.main
import yaml
from torch.distributed.run import parse_args

from preceptor import cli, config

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"
RUN = "recipes/qwen3_8b_tools.yaml"


# Starts its task elsewhere, as on another node; told to end, it kills the task.
SRUN = """while [ "${{1#-}}" != "$1" ]; do shift; done
setsid "$@" &
echo $! > {folder}/task
trap 'kill -KILL $(cat {folder}/task); exit 137' TERM HUP QUIT
wait $!
"""
SCANCEL = """[ "$1 $2" = "--signal=TERM 7.0" ] && kill -TERM "$(cat {folder}/task)"
"""


@pytest.fixture
def commands(tmp_path):
    """Stand-ins for commands of a cluster, each of which writes its arguments to a file of its name; their folder."""

    def stand_in(name, text=""):
        file = tmp_path / name
        file.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/{name}.txt\n{text}\n')
        file.chmod(0o755)

    stand_in("torchrun")
    stand_in("srun", SRUN.format(folder=tmp_path))
    stand_in("scancel", SCANCEL.format(folder=tmp_path))
    stand_in("scontrol", 'if [ "$1" = show ]; then echo node-a; echo node-b; fi')
    return tmp_path


def test_what_is_installed_are_the_tested_versions():
    lines = [line for file in LAUNCH.iterdir() for line in file.read_text().splitlines() if "pip install" in line]
    assert lines and all("-c constraints.txt" in line for line in lines)


def started(command, commands, **environment):
    """What a script hands to torchrun."""
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, timeout=30, env={**os.environ, **environment, "PATH": path})
    return (commands / "torchrun.txt").read_text().splitlines()


def require_command(arguments, *, nnodes="2", nproc, endpoint, run=RUN, overrides=()):
    """The arguments are those of torchrun for `preceptor train` of a run file, on nodes that meet at an endpoint."""
    own = parse_args(arguments)
    assert (own.nnodes, own.nproc_per_node, own.rdzv_backend, own.rdzv_endpoint) == (nnodes, nproc, "c10d", endpoint)
    assert own.rdzv_id and own.module and own.training_script == "preceptor"
    name, *rest = own.training_script_args
    command = typer.main.get_command(cli.app).commands[name]
    given = command.make_context(name, rest).params
    assert (name, str(given["run_file"]), list(given["overrides"] or ())) == ("train", run, list(overrides))
    if run == RUN:
        config.load(LAUNCH.parents[1] / run)


@pytest.mark.parametrize("script", ["two_nodes.sh", "slurm.sbatch"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_two_nodes(commands):
    found = started(["bash", LAUNCH / "two_nodes.sh", "node-a", RUN, "train.seed=1"], commands)
    require_command(found, nproc="gpu", endpoint="node-a:29500", overrides=["train.seed=1"])


SLURM = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
SLURM["SLURM_CPUS_PER_TASK"] = "64"


def test_slurm(commands):
    found = started(["bash", LAUNCH / "slurm.sbatch", RUN, "out=a b"], commands, **SLURM)
    require_command(found, nproc="8", endpoint="node-a:29500", overrides=["out=a b"])
    assert "requeue" not in (commands / "scontrol.txt").read_text()
    assert "--cpus-per-task=64" in (commands / "srun.txt").read_text().splitlines()
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    settings = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@600"} <= set(settings)


def test_slurm_queues_a_job_again_whose_time_is_over(commands):
    """The run is told to stop by SIGTERM, and gets the time to save."""
    (commands / "torchrun").write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; touch {commands}/saved; exit 1' TERM\ntouch {commands}/began\n"
        "while true; do sleep 0.05; done\n"
    )
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", RUN], env={**os.environ, **SLURM, "PATH": path})
    try:
        for _ in range(200):
            if (commands / "began").exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == 0
    finally:
        job.kill()
    assert (commands / "saved").exists()
    assert (commands / "scontrol.txt").read_text().split()[-2:] == ["requeue", "7"]


def test_sky(commands):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["num_nodes"] == 2 and task["envs"]["RUN"] == RUN
    assert "file_mounts" not in task and task["envs"]["OUT"].startswith("/runs/") and "/runs" in task["volumes"]
    assert task["resources"]["accelerators"].endswith(":8")
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    found = started(["bash", "-euc", task["run"]], commands, **given, **task["envs"], SKYPILOT_TASK_ID="sky-1")
    require_command(found, nproc="8", endpoint="10.0.0.1:29500", overrides=[f"out={task['envs']['OUT']}"])


def test_kubernetes():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")  # headless
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert container["command"] == ["torchrun"]
    require_command(container["args"], nproc="gpu", endpoint=first, run="/training/run.yaml")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    user = re.search(r"^USER (\d+)$", (LAUNCH.parents[1] / "Dockerfile").read_text(), re.MULTILINE)
    assert pod["securityContext"]["fsGroup"] == int(user[1])
    assert pod["terminationGracePeriodSeconds"] > int(container["env"][0]["value"])
