"""Jobs on a real Slurm: what ranks are told, in which order they stand, and that a preempted run ends as any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import lab
from cluster.lab import Lab
from launch.job import ROOT
from launch.run import Run
from launch.submit import job_of, parse
from moetrain.config import parse_config
from moetrain.trainer import train
from tests.lab import (
    ended,
    fake_job,
    log_of,
    needs_slurm,
    ranks_ready,
    read_environment,
    running_lab,
    show,
    wait_until,
    write_fake_rank,
    write_site,
)
from tests.launches import QUOTED
from tests.ranks import run_ranks
from tests.runs import tiny_run, write_text

pytestmark = needs_slurm
STEPS = 60


@pytest.fixture(scope="module")
def slurm() -> Iterator[Lab]:
    with running_lab() as started:
        yield started


def test_the_lab_is_sixteen_nodes_of_eight_gpus(slurm: Lab) -> None:
    lines = slurm.run("srun", "-N16", "--gpus-per-node=8", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert sorted(lines.splitlines()) == [f"h100-{number:02d} 0,1,2,3,4,5,6,7" for number in range(1, 17)]


def test_a_command_that_does_not_end_is_an_error(slurm: Lab) -> None:
    with pytest.raises(RuntimeError, match=r"sleep 600 did not end within 0\.2 s"):
        slurm.run("sleep", "600", timeout=0.2)
    assert slurm.run("sleep", "600", check=False, timeout=0.2) == ""


def test_a_lab_leaves_nothing(tmp_path: Path) -> None:
    with running_lab() as second:
        with pytest.raises(ValueError, match="already runs"):
            lab.up(second.root)
        second.run("sbatch", "--wrap", "sleep 300", "--output", str(tmp_path / "out"))
        wait_until(lambda: lab.job_processes(second), "the job")
        assert len(lab.daemons(second)) > 17
    assert lab.daemons(second) == [] and lab.job_processes(second) == []
    assert not Path(second.root).exists()


def test_the_lab_from_a_shell(tmp_path: Path) -> None:
    def shell(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "cluster.lab", *words, "--root", str(tmp_path / "lab")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    assert shell("status") == (1, f"no lab runs in {tmp_path}/lab\n")
    try:
        code, text = shell("up", "--nodes", "3", "--gpus", "2")
        assert code == 0 and "h100-[01-03]" in text and f"export SLURM_CONF={tmp_path}/lab/etc/slurm.conf" in text
        assert shell("up")[0] == 2 and shell("status")[0] == 0
        (tmp_path / "lab" / "mine").write_text("not the lab's")
    finally:
        assert "down in" in shell("down")[1]
    assert [path.name for path in (tmp_path / "lab").iterdir()] == ["mine"]
    assert shell("down") == (0, f"no lab runs in {tmp_path}/lab\n")


def test_jobs_of_a_lab_that_was_killed_do_not_run_in_the_next() -> None:
    with running_lab(nodes=2) as first:
        first.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300")
        first.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300")
        lab.down(first)
        second = lab.up(first.root, nodes=2)
        try:
            assert second.run("squeue", "--noheader") == ""
        finally:
            lab.down(second)


@pytest.fixture(scope="module")
def told(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]], str]:
    """128 ranks on 16 nodes of two switches, and what each found in its environment."""
    shared = tmp_path_factory.mktemp("told")
    job = fake_job(shared, "finishes", "--nodes", "16", "--gpus-per-node", "8", "parallel.ep_size=64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not yours")
        patch.setenv("SBATCH_EXPORT", "ALL")  # would win over the script's own lines
        submitted = job.submit()
    assert ended(submitted.job_id)["JobState"] == "COMPLETED", log_of(job, submitted.job_id)
    return shared, ranks_ready(shared, "finishes", 128), submitted.job_id


def test_every_rank_is_told_who_it_is(told: tuple[Path, list[dict[str, str]], str]) -> None:
    _, ranks, job_id = told
    for rank, variables in enumerate(ranks):
        assert variables["RANK"] == str(rank) and variables["LOCAL_RANK"] == str(rank % 8)
        assert variables["WORLD_SIZE"] == "128" and variables["LOCAL_WORLD_SIZE"] == "8"
        assert variables["MASTER_ADDR"] == "127.0.0.1"
        assert variables["MASTER_PORT"] == str(20000 + int(job_id) % 10000)
        assert variables["OMP_NUM_THREADS"] == "1"
        assert variables["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert variables["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1"


def test_an_expert_group_fills_the_nodes_of_one_switch(told: tuple[Path, list[dict[str, str]], str]) -> None:
    _, ranks, _ = told
    nodes = [variables["SLURMD_NODENAME"] for variables in ranks]
    assert nodes == [f"h100-{number:02d}" for number in range(1, 17) for _ in range(8)]
    for group in (ranks[:64], ranks[64:]):
        assert len({variables["SLURM_TOPOLOGY_ADDR"].split(".")[1] for variables in group}) == 1


def test_a_rank_gets_what_is_on_the_list_and_no_more(told: tuple[Path, list[dict[str, str]], str]) -> None:
    _, ranks, _ = told
    of_slurm = ("SLURM", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
    of_bash = {"PWD", "SHLVL", "_", "OLDPWD", "TMPDIR", "RANK", "LOCAL_RANK"}
    allowed = {
        *("HOME", "LANG", "PATH", "USER", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONPATH", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"),
    }
    for variables in ranks:
        others = {name for name in variables if not name.startswith(of_slurm)} - of_bash
        assert others <= allowed, others - allowed


def test_ranks_follow_the_switches_whatever_the_names(slurm: Lab, tmp_path: Path) -> None:
    topology = Path(slurm.root) / "etc" / "topology.conf"
    before = topology.read_text()
    leaves = "SwitchName=leaf0 Nodes=h100-[02,04,05-16]\nSwitchName=leaf1 Nodes=h100-[01,03]\n"
    topology.write_text(f"{leaves}SwitchName=spine Switches=leaf[0-1]\n")
    try:
        slurm.run("scontrol", "reconfigure")
        job = fake_job(tmp_path, "finishes", "--nodes", "4", exclude=["h100-[05-16]"])
        assert ended(job.submit().job_id)["JobState"] == "COMPLETED"
        nodes = [variables["SLURMD_NODENAME"] for variables in ranks_ready(tmp_path, "finishes", 8)]
        assert nodes == [f"h100-{number}" for number in ("02", "04", "01", "03") for _ in range(2)]
    finally:
        topology.write_text(before)
        slurm.run("scontrol", "reconfigure")


def test_an_array_is_a_job_a_value(slurm: Lab, tmp_path: Path) -> None:
    job = fake_job(tmp_path, "finishes", "--array", "optim.lr=1e-3,2e-3,3e-3%2")
    assert "#SBATCH --array=0-2%2" in job.script()
    array_id = job.submit().job_id
    for task, lr in enumerate((1e-3, 2e-3, 3e-3)):
        fields = ended(f"{array_id}_{task}")
        assert fields["JobState"] == "COMPLETED"
        config = yaml.safe_load((job.folder / f"config-{task}.yaml").read_text())
        assert config["optim"]["lr"] == lr and config["output_dir"].endswith(f"/optim.lr={lr:.0e}".replace("e-0", "e-"))
        assert len(list((tmp_path / config["output_dir"] / "env").iterdir())) == 4


def steps(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for line in lines if line.endswith("}") and (record := json.loads(line))["kind"] == "step"]


def train_rank(rank: int, world_size: int, raw: dict[str, Any]) -> None:
    train(parse_config(raw))


def test_a_preempted_run_has_the_losses_of_one_that_was_not(slurm: Lab, tmp_path: Path) -> None:
    write_text(tmp_path)
    raw = tiny_run(
        tmp_path,
        parallel={"ep_size": 2},
        data={"seq_len": 64, "batch_size": 4},
        train={"steps": STEPS},
        checkpoint={"export": False},
    )
    run_ranks(train_rank, 2, raw | {"output_dir": str(tmp_path / "plain")})

    site = write_site(tmp_path / "shared")
    run = Run(name="preempted", config=raw | {"output_dir": str(tmp_path / "preempted")}, nodes=2, gpus_per_node=1)
    job = job_of(run, run.config, parse(run, ["--site", str(site)]))
    job_id = job.submit().job_id
    wait_until(lambda: steps(tmp_path / "preempted"), "the first step", 120)
    nodes = show(job_id)["NodeList"]
    slurm.run("srun", "--partition=urgent", "--exclusive", f"--nodelist={nodes}", "-N2", "true", timeout=120)
    done_before = len(steps(tmp_path / "preempted"))
    fields = ended(job_id, 180)
    log = log_of(job, job_id)
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1", log
    assert f"stopped by SIGTERM after step {done_before}" in log and f"step {done_before} of {STEPS}" in log
    assert 0 < done_before < STEPS

    plain, preempted = steps(tmp_path / "plain"), steps(tmp_path / "preempted")
    assert [record["step"] for record in preempted] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[name] for record in preempted] == [record[name] for record in plain], name


def test_the_script_of_a_run_submits_it(slurm: Lab, tmp_path: Path) -> None:
    site = write_site(tmp_path, write_fake_rank(tmp_path))
    script = [sys.executable, str(ROOT / "launch" / "cpu_smoke.py"), "--site", str(site), "output_dir=runs/finishes"]
    result = subprocess.run(script, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    job_id = re.search(r"^submitted job (\d+)", result.stdout, re.MULTILINE)[1]
    assert ended(job_id)["JobState"] == "COMPLETED"
    assert f"scancel {job_id}" in result.stdout and len(ranks_ready(tmp_path, "finishes", 2)) == 2


def test_what_sbatch_refuses_is_told_in_its_own_words(
    slurm: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(tmp_path, "finishes", partition="nowhere")
    with pytest.raises(ValueError, match="invalid partition specified: nowhere"):
        job.submit()
    assert capsys.readouterr().err == "", "and told once, by the error"
    assert not job.folder.exists() and slurm.run("squeue", "-h", "-n", "finishes") == ""


def test_what_a_comment_holds_stays_a_comment(slurm: Lab, tmp_path: Path) -> None:
    """sbatch reads the lines of a script with a parser of its own, which is not the shell's."""
    job = replace(fake_job(tmp_path, "finishes"), comment=" ".join([*QUOTED, "' --partition=urgent '"]))
    job_id = job.submit().job_id
    found = slurm.run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%P %D %k")
    assert found == f"batch 2 {job.comment}\n"
    assert ended(job_id)["JobState"] == "COMPLETED"


def test_read_environment_keeps_values_with_equal_signs(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A==b,c\nBASH_FUNC_x%%=() {\n}\nB=\n")
    assert read_environment(tmp_path / "env") == {"A": "=b,c", "B": ""}
