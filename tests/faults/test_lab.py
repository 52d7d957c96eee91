"""Jobs that do not go well, on a real Slurm: signals, cancellation, unfit and dead nodes, ranks that fail."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import lab
from cluster.lab import Lab
from launch import cpu_smoke
from launch.job import RANK_EXIT_SECONDS, ROOT, Job
from launch.run import Run
from launch.submit import job_of, parse
from tests.lab import (
    ended,
    fake_job,
    log_of,
    needs_slurm,
    ranks_ready,
    running_lab,
    show,
    wait_until,
    write_site,
)
from tests.launches import python_without_moetrain
from tests.runs import records, tiny_run, write_text

pytestmark = needs_slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[Lab]:
    with running_lab() as started:
        yield started


@dataclass
class Submitted:
    job: Job
    job_id: str
    shared: Path

    def log(self) -> str:
        return log_of(self.job, self.job_id)


@pytest.fixture(scope="module")
def stories(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Jobs of fake ranks that run side by side; each test looks at the end of one."""
    found = {}
    for name in ("stops", "wrong", "lingers", "forgets"):
        shared = tmp_path_factory.mktemp(name)
        job = fake_job(shared, name)
        found[name] = Submitted(job, job.submit().job_id, shared)
    for name, spares in (("spare", "1"), ("unfit", "0")):
        shared = tmp_path_factory.mktemp(name)
        (shared / "unfit").write_text("1 0")  # the second node, in the first start
        job = fake_job(shared, "finishes", "--spares", spares, preflight=True)
        found[name] = Submitted(job, job.submit().job_id, shared)
    return found


def test_a_warned_job_saves_and_is_requeued_once(slurm: Lab, stories: dict[str, Submitted]) -> None:
    story = stories["stops"]
    ranks_ready(story.shared, "stops", 4)
    slurm.run("scancel", "--signal=USR2", story.job_id)  # as sbatch's --signal does before the time limit
    fields = ended(story.job_id)
    log = story.log()
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1", log
    assert log.count("stopped by a signal and saved; newest checkpoint: step 5") == 1
    assert "restarts without a new one: 0; requeued" in log
    assert len(ranks_ready(story.shared, "stops", 4, start=1)) == 4


def test_a_rank_with_an_error_to_mend_ends_the_job_at_once(stories: dict[str, Submitted]) -> None:
    """Rank 1 ends with 2, the others wait for it: they are killed, and the job has the code of rank 1."""
    fields = ended(stories["wrong"].job_id)
    log = stories["wrong"].log()
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "2:0" and fields["Restarts"] == "0", log
    assert "exit code 2 of rank 1: a restart would not mend this" in log and "Killed" in log
    minutes, seconds = fields["RunTime"].split(":")[-2:]
    assert int(minutes) == 0 and int(seconds) < RANK_EXIT_SECONDS / 2


def test_a_python_without_moetrain_ends_the_job_at_once(slurm: Lab, tmp_path: Path) -> None:
    site = write_site(tmp_path, str(python_without_moetrain(tmp_path)))
    run = Run(name="bare", config=tiny_run(tmp_path), nodes=2, gpus_per_node=2)
    job = job_of(run, run.config, parse(run, ["--site", str(site)]))
    job_id = job.submit().job_id
    fields = ended(job_id)
    log = log_of(job, job_id)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "2:0" and fields["Restarts"] == "0", log
    assert "bare-python has no moetrain; paths.python of the site file must" in log and "requeued" not in log


def test_a_cancelled_job_leaves_no_process_and_does_not_come_back(slurm: Lab, stories: dict[str, Submitted]) -> None:
    story = stories["lingers"]
    ranks = ranks_ready(story.shared, "lingers", 4)
    nodes = {variables["SLURMD_NODENAME"] for variables in ranks}
    assert all(lab.job_processes(slurm, node) for node in nodes)
    slurm.run("scancel", story.job_id)
    assert ended(story.job_id)["JobState"] == "CANCELLED"
    wait_until(lambda: not any(lab.job_processes(slurm, node) for node in nodes), "the end of its processes")
    assert show(story.job_id)["Restarts"] == "0" and "requeued" not in story.log()


def test_a_finished_job_takes_along_what_its_ranks_have_left(slurm: Lab, stories: dict[str, Submitted]) -> None:
    story = stories["forgets"]
    ranks = ranks_ready(story.shared, "forgets", 4)
    assert ended(story.job_id)["JobState"] == "COMPLETED"
    nodes = {variables["SLURMD_NODENAME"] for variables in ranks}
    wait_until(lambda: not any(lab.job_processes(slurm, node) for node in nodes), "the end of its processes")


def test_an_unfit_node_is_named_and_a_spare_takes_its_place(stories: dict[str, Submitted]) -> None:
    story = stories["spare"]
    fields = ended(story.job_id)
    log = story.log()
    bad = (story.shared / "checked-0-1").read_text().strip()
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "0" and fields["NumNodes"] == "3", log
    assert f"preflight: {bad} is unfit: CRITICAL gpus 7 x H100, expected 8" in log
    assert "preflight: 2 of 3 nodes are fit" in log
    good = [(story.shared / f"checked-0-{index}").read_text().strip() for index in (0, 2)]
    nodes = [variables["SLURMD_NODENAME"] for variables in ranks_ready(story.shared, "finishes", 4)]
    assert nodes == [good[0], good[0], good[1], good[1]]


def test_without_a_spare_the_job_goes_on_without_the_unfit_node(stories: dict[str, Submitted]) -> None:
    story = stories["unfit"]
    fields = ended(story.job_id)
    log = story.log()
    bad = (story.shared / "checked-0-1").read_text().strip()
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1", log
    assert fields["ExcNodeList"] == bad and "1 fit nodes are too few for 2" in log
    nodes = {variables["SLURMD_NODENAME"] for variables in ranks_ready(story.shared, "finishes", 4, start=1)}
    assert len(nodes) == 2 and bad not in nodes


def test_a_drained_node_gets_no_ranks(slurm: Lab, stories: dict[str, Submitted], tmp_path: Path) -> None:
    for story in stories.values():
        ended(story.job_id)
    wait_until(lambda: not lab.job_processes(slurm), "the end of the processes of ended jobs")
    slurm.run("scontrol", "update", "NodeName=h100-02", "State=DRAIN", "Reason=test")
    try:
        job = fake_job(tmp_path, "finishes", "--nodes", "15", exclude=["h100-09"])
        waiting = job.submit().job_id
        wait_until(lambda: show(waiting)["Reason"] not in ("None", "(null)"), "a reason to wait")
        slurm.run("scancel", waiting)
        job = replace(fake_job(tmp_path, "finishes", "--nodes", "14", exclude=["h100-09"]), folder=tmp_path / "second")
        assert ended(job.submit().job_id)["JobState"] == "COMPLETED"
        nodes = {variables["SLURMD_NODENAME"] for variables in ranks_ready(tmp_path, "finishes", 28)}
        assert nodes == set(slurm.nodes) - {"h100-02", "h100-09"}
    finally:
        slurm.run("scontrol", "update", "NodeName=h100-02", "State=RESUME")


@pytest.mark.slow  # waits for slurmctld, which a busy machine makes late
def test_the_prolog_drains_an_unfit_node_and_lets_a_fit_one_work(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns("lab", "__pycache__"))
    site = tmp_path / "cluster" / "site.toml"
    site.write_text("[preflight]\nfree_gb = 1e9\n")
    with running_lab(nodes=2, extra=[f"Prolog={tmp_path}/cluster/prolog.sh"]) as small:
        job_id = small.run("sbatch", "--parsable", "-N1", "-o", str(tmp_path / "out"), "--wrap", "hostname").strip()
        # not "drain": slurmctld drains the node once more, for the prolog's exit code, and then takes the job off it
        drained = wait_until(
            lambda: small.run("sinfo", "-h", "-N", "-t", "drained", "-o", "%N").split(), "a drained node"
        )
        reasons = small.run("sinfo", "-h", "-R", "-o", "%E")
        assert "preflight: CRITICAL disk /tmp has" in reasons and "expected 1,000,000,000" in reasons
        site.write_text("[preflight]\nfree_gb = 0\nfree_inodes = 0\n")
        small.run("scontrol", "update", f"NodeName={','.join(set(drained))}", "State=RESUME")
        assert ended(job_id)["JobState"] == "COMPLETED"
        site.write_text("[preflight]\nno_such_limit = 1\n")  # a mistake of the site says nothing of the node
        assert small.run("srun", "-N2", "echo", "fine") == "fine\nfine\n"


@pytest.mark.slow
def test_three_restarts_without_a_checkpoint_are_enough(slurm: Lab, tmp_path: Path) -> None:
    job = fake_job(tmp_path, "crashes")
    job_id = job.submit().job_id
    fields = ended(job_id, 180)
    log = log_of(job, job_id)
    assert fields["ExitCode"] == "79:0" and fields["Restarts"] == "3", log
    assert "3 restarts brought no new checkpoint (newest: step -1): not requeued" in log
    assert log.count("requeued") == 3 + 1


@pytest.mark.slow
def test_slurm_warns_before_the_time_limit(slurm: Lab, tmp_path: Path) -> None:
    job = fake_job(tmp_path, "stops", minutes=1, warning_seconds=40)
    job_id = job.submit().job_id
    fields = ended(job_id, 180)
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1", log_of(job, job_id)
    assert "stopped by a signal and saved; newest checkpoint: step 5" in log_of(job, job_id)


@pytest.mark.slow
def test_ranks_that_do_not_heed_the_limit_are_ended_by_it(slurm: Lab, tmp_path: Path) -> None:
    job = fake_job(tmp_path, "lingers", minutes=1, warning_seconds=5)
    job_id = job.submit().job_id
    ranks_ready(tmp_path, "lingers", 4)
    fields = ended(job_id, 240)
    assert fields["JobState"] == "TIMEOUT" and fields["Restarts"] == "0", log_of(job, job_id)
    wait_until(lambda: not lab.job_processes(slurm), "the end of its processes", 60)


def training_job(folder: Path, nodes: int, *flags: str, **sections: dict[str, Any]) -> Job:
    """A real run, one rank a node."""
    write_text(folder)
    data = {"seq_len": 64, "batch_size": 4}
    raw: dict[str, Any] = tiny_run(
        folder, **{"parallel": {"ep_size": 2}, "data": data, "checkpoint": {"export": False}, **sections}
    )
    raw["model"]["create"]["config"]["num_experts"] = 16
    run = Run(name="train", config=raw, nodes=nodes, gpus_per_node=1)
    return job_of(run, raw, parse(run, ["--site", str(write_site(folder / "shared")), *flags]))


def test_what_rank_0_alone_sees_ends_all_ranks(slurm: Lab, tmp_path: Path) -> None:
    """Real ranks: rank 0 refuses its output directory before there is a process group, which rank 1 waits for."""
    job = training_job(tmp_path, 2)
    (tmp_path / "out").write_text("a file")
    job_id = job.submit().job_id
    fields = ended(job_id, 120)
    log = log_of(job, job_id)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "2:0" and fields["Restarts"] == "0", log
    assert f"error: output_dir {tmp_path}/out cannot be written" in log and "exit code 2 of rank 0" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_outlives_its_node(slurm: Lab, tmp_path: Path) -> None:
    job = training_job(tmp_path, 2, train={"steps": 400, "eval_rows": 4}, checkpoint={"every": 20, "export": False})
    job_id = job.submit().job_id
    checkpoints = tmp_path / "out" / "checkpoints"
    wait_until(lambda: checkpoints.exists() and any(checkpoints.glob("step-????????")), "a checkpoint", 240)
    hosts = (job.folder / f"hosts-{job_id}").read_text().split()
    lab.kill_node(slurm, hosts[1])
    try:
        fields = ended(job_id, 300)
        log = log_of(job, job_id)
        assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, log
        assert hosts[1] not in (job.folder / f"hosts-{job_id}").read_text().split()
        assert re.search(r"goes on from .*step-\d+, step (?!0 )\d+ of 400", log)
        assert sorted(records(tmp_path)) == list(range(1, 401))
    finally:
        lab.start_node(slurm, hosts[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cancelled_training_leaves_nothing(slurm: Lab, tmp_path: Path) -> None:
    job = training_job(tmp_path, 2, train={"steps": 100_000, "eval_rows": 4})
    job_id = job.submit().job_id
    wait_until(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and records(tmp_path), "a step", 240)
    slurm.run("scancel", job_id)
    assert ended(job_id)["JobState"] == "CANCELLED"
    wait_until(lambda: not lab.job_processes(slurm), "the end of its processes", 60)
    assert show(job_id)["Restarts"] == "0"


def environments(slurm: Lab) -> dict[int, dict[str, str]]:
    """Environments of the ranks that run now."""
    found = {}
    for pid in lab.job_processes(slurm):
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            variables = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if "RANK" in variables:
                found[int(variables["RANK"])] = variables
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixteen_nodes_run_the_cpu_smoke(slurm: Lab, tmp_path: Path) -> None:
    """Real ranks on all nodes, one on each: two cores carry no more."""
    run, site = cpu_smoke.RUN, str(write_site(tmp_path))
    job = job_of(run, run.config, parse(run, ["--site", site, "--nodes", "16", "parallel.ep_size=16"]))
    job_id = job.submit().job_id
    ranks = wait_until(lambda: len(found := environments(slurm)) == 16 and found, "16 ranks", 120)
    for rank, variables in ranks.items():
        assert variables["SLURMD_NODENAME"] == f"h100-{rank + 1:02d}" and variables["LOCAL_RANK"] == "0"
        assert variables["WORLD_SIZE"] == "16" and variables["LOCAL_WORLD_SIZE"] == "1"
        assert variables["MASTER_PORT"] == str(20000 + int(job_id) % 10000)
    fields = ended(job_id, 500)
    log = log_of(job, job_id)
    assert fields["JobState"] == "COMPLETED" and fields["NumNodes"] == "16" and fields["Restarts"] == "0", log
    assert "16 ranks, ep=16 fsdp=16 replicas=1" in log
    assert (tmp_path / "runs" / "cpu_smoke" / "checkpoints" / "step-00000010").is_dir()
