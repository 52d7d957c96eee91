"""The batch script: what reaches it and what cannot, and the requeue protocol of `job.sh`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from containers.spec import PYXIS_OPTIONS
from launch.job import ROOT
from moetrain.config import load_config
from tests.launches import QUOTED, RUN, container, make_job, python_without_moetrain, write_site


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


# --- injection ----------------------------------------------------------------------------------------------------

EVIL = ["x\n#SBATCH --uid=0", "x\r\ntouch pwned", "x\0", "x\x1b[2K", "x\u2028y"]
BACKSLASHES = ["\\", "a\\' b' --uid=0 'c\\", "x\\n#SBATCH --uid=0"]


def of_a_container(evil: str) -> list[dict[str, object]]:
    """Updates of a container's specification, past its own checks."""
    return [{"image": f"/{evil}"}, {"mounts": (f"/a:/{evil}",)}, {"workdir": f"/{evil}"}, {"env": (evil,)}]


@pytest.mark.parametrize("evil", BACKSLASHES)
def test_backslashes_reach_no_line_of_sbatch(shared: Path, evil: str) -> None:
    """sbatch takes them for escapes, between single quotes too: the second would add an option."""
    with pytest.raises(ValueError, match="comment of the run holds a backslash"):
        replace(RUN, comment=evil)
    job = make_job(write_site(shared))
    site = job.site
    for broken in (
        replace(job, comment=evil),
        replace(job, folder=Path(f"/shared/{evil}")),
        replace(job, site=site.model_copy(update={"slurm": site.slurm.model_copy(update={"constraint": evil})})),
        replace(job, site=site.model_copy(update={"paths": site.paths.model_copy(update={"shared": f"/{evil}"})})),
    ):
        with pytest.raises(ValueError, match="holds a backslash"):
            broken.script()


@pytest.mark.parametrize("evil", EVIL)
def test_control_characters_reach_no_script(shared: Path, evil: str) -> None:
    with pytest.raises(ValueError, match="name"):
        replace(RUN, name=evil)
    with pytest.raises(ValueError, match="comment of the run holds the control character"):
        replace(RUN, comment=evil)
    boxed = make_job(write_site(shared, container(shared / "image.sqsh"))).container
    job = make_job(write_site(shared))
    site = job.site
    for broken in (
        replace(job, comment=evil),
        replace(job, folder=Path(f"/shared/{evil}")),
        replace(job, configs=(job.configs[0].model_copy(update={"output_dir": evil}),)),
        replace(job, site=site.model_copy(update={"environment": {"NCCL_DEBUG": evil}})),
        replace(job, site=site.model_copy(update={"environment": {evil: "1"}})),
        replace(job, site=site.model_copy(update={"secrets": {"HF_TOKEN_PATH": f"/{evil}"}})),
        replace(job, site=site.model_copy(update={"slurm": site.slurm.model_copy(update={"partition": evil})})),
        *(
            replace(job, site=site.model_copy(update={"slurm": site.slurm.model_copy(update={key: evil})}))
            for key in ("account", "qos", "reservation", "constraint", "path")
        ),
        replace(job, site=site.model_copy(update={"slurm": site.slurm.model_copy(update={"exclude": (evil,)})})),
        replace(job, site=site.model_copy(update={"paths": site.paths.model_copy(update={"shared": f"/{evil}"})})),
        replace(job, site=site.model_copy(update={"paths": site.paths.model_copy(update={"python": evil})})),
        *(replace(job, container=boxed.model_copy(update=update)) for update in of_a_container(evil)),
    ):
        with pytest.raises(ValueError, match="holds the control character"):
            broken.script()


@pytest.mark.parametrize("evil", QUOTED)
def test_what_the_shell_could_take_for_code_stays_text(shared: Path, evil: str, tmp_path: Path) -> None:
    """The lines before the step are run by bash: values come out as they went in, and nothing else happens."""
    job = make_job(write_site(shared))
    site = job.site.model_copy(update={"environment": {"VALUE": evil}})
    job = replace(
        job, site=site, comment=evil, configs=(job.configs[0].model_copy(update={"output_dir": f"runs/{evil}"}),)
    )
    script = job.script()
    (line,) = [line for line in script.splitlines() if line.startswith("#SBATCH --comment=")]
    assert shlex.split(line.removeprefix("#SBATCH "), comments=False) == [f"--comment={evil}"]
    lines = script.partition("# setup\n")[2].partition("source ")[0]
    probe = f'{lines}\nprintf "%s\\0" "$VALUE" "${{OUTPUT_DIRS[0]}}" "$JOB_DIR"'
    result = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split("\0")[:3] == [evil, f"runs/{evil}", str(job.folder)]
    assert not (tmp_path / "pwned").exists()


def test_the_script_is_bash(shared: Path) -> None:
    for flags in ([], ["--array", "optim.lr=1,2"], ["--spares", "1"]):
        subprocess.run(["bash", "-n"], input=make_job(write_site(shared), *flags).script(), text=True, check=True)
    subprocess.run(["bash", "-n", str(ROOT / "launch" / "job.sh")], check=True)


def test_variables_of_sbatch_are_taken_out(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would win over the lines of the script."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\necho Submitted batch job 12\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_EXPORT", "ALL")
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    assert make_job(write_site(shared)).submit().job_id == "12"
    seen = (tmp_path / "seen").read_text()
    assert "SBATCH_" not in seen and "PATH=" in seen


# --- the job ------------------------------------------------------------------------------------------------------


def test_ranks_get_the_variables_of_the_site_and_their_own(shared: Path) -> None:
    tables = ['[environment]\nNCCL_DEBUG = "WARN"', '[infiniband]\ndevices = ["mlx5_1"]']
    bare = make_job(write_site(shared, *tables))
    image = shared / "image.sqsh"
    boxed = make_job(write_site(shared, *tables, container(image, 'env = ["TERM"]')))
    own = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"}
    site = {"NCCL_DEBUG", "NCCL_IB_HCA", "NVSHMEM_HCA_LIST", "EP_NIC_NAME"}
    assert set(bare.allowed()) == own | site | {"HOME", "LANG", "PATH", "USER"}
    assert set(boxed.allowed()) == own | site | {"TERM"}
    arguments = boxed.train_arguments()
    assert f"--export={','.join(boxed.allowed())}" in arguments
    assert f"--container-env={','.join(boxed.allowed())}" in arguments
    options = [word.removeprefix("--").partition("=")[0] for word in arguments if "container" in word]
    assert options and set(options) <= PYXIS_OPTIONS


def test_preflight_sees_the_image_and_its_hash(shared: Path) -> None:
    image = shared.parent / "image.sqsh"
    Path(f"{image}.sha256").write_text(f"{'ab' * 32}  image.sqsh\n")
    site = write_site(shared, container(image, mounts=f"{shared}:{shared}"), slurm="")
    site.write_text(site.read_text().replace("preflight = false", "preflight = true"))
    job = make_job(site, "--spares", "3")
    words = job.preflight_command()
    assert words[:4] == ["srun", "--nodes=5", "--ntasks=5", "--ntasks-per-node=1"]
    assert f"--container-mounts={shared}:{shared},{image}:{image}:ro" in words
    assert words[words.index("--image") + 1] == f"{image}={'ab' * 32}"
    assert words[words.index("--site") + 1] == str(job.folder / "site.toml")
    job.write()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(job.folder)}
    command = [sys.executable, "-m", "cluster.preflight", "--site", str(job.folder / "site.toml"), "infiniband"]
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 3, "the copy in the job's folder runs by itself"


def test_what_is_edited_later_does_not_change_a_waiting_job(shared: Path) -> None:
    site = write_site(shared)
    job = make_job(site)
    job.write()
    assert load_config(job.folder / "config.yaml") == job.configs[0]
    assert (job.folder / "site.toml").read_text() == site.read_text()
    assert (job.folder / "job.sh").read_text() == (ROOT / "launch" / "job.sh").read_text()


def test_site_settings_become_sbatch_lines(shared: Path) -> None:
    slurm = 'partition = "p"\naccount = "a"\nqos = "q"\nreservation = "r"\nconstraint = "h100&ib"\n'
    slurm += 'exclude = ["n1", "n[4-5]"]\nmemory_gb = 64\ncpus_per_task = 6\nrequest_gpus = false'
    script = make_job(write_site(shared, "[topology]\nmax_switches = 2\nwait_minutes = 30", slurm=slurm)).script()
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    wanted = ["--partition=p", "--account=a", "--qos=q", "--reservation=r", "--constraint='h100&ib'", "--mem=64GB"]
    wanted += ["--exclude='n1,n[4-5]'", "--cpus-per-task=6", "--switches=2@30", "--requeue", "--export=NIL"]
    assert set(wanted) <= set(lines)
    assert not any("gpus" in line for line in lines) and "EXCLUDE='n1,n[4-5]'" in script


# --- rank.sh ------------------------------------------------------------------------------------------------------


def become_rank(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    script = ["bash", str(ROOT / "launch" / "rank.sh"), *command]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_task_becomes_a_rank_and_the_command(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['RANK'], os.environ['LOCAL_RANK'], sys.argv[1:]); sys.exit(75)"
    found = become_rank(tmp_path, sys.executable, "-c", code, "a b", "*")
    assert (found.returncode, found.stdout, found.stderr) == (75, "11 3 ['a b', '*']\n", "")


@pytest.mark.parametrize("directory", [False, True], ids=["", "beside a directory of its name"])
def test_a_python_without_moetrain_is_the_users_to_mend(tmp_path: Path, directory: bool) -> None:
    if directory:
        (tmp_path / "moetrain").mkdir()
    python = str(python_without_moetrain(tmp_path))
    found = become_rank(tmp_path, python, "-m", "moetrain", "train", "config.yaml")
    assert (found.returncode, found.stderr) == (2, "")
    assert (
        found.stdout
        == f"error: {python} has no moetrain; paths.python of the site file must name a Python that has it\n"
    )


def test_no_python_at_all_is_said_by_the_shell(tmp_path: Path) -> None:
    found = become_rank(tmp_path, str(tmp_path / "python"), "-m", "moetrain")
    assert found.returncode == 127 and "No such file" in found.stderr


# --- job.sh: what happens when the step has ended -----------------------------------------------------------------

TOOL = """#!/bin/sh
echo "${{0##*/}} $@" >> {folder}/calls
[ "$1" != --noheader ] || printf '7.2\n7.batch\n'
[ "$1" != requeue ] || exit {code}
"""


def end_of_job(
    folder: Path, codes: list[int | tuple[int, int]], requeue_fails: bool = False, srun: str = ""
) -> tuple[list[int], str, str]:
    """Run the end of a job once for each exit code of its step; with (code, step) a checkpoint appears before.

    Args:
        srun: what it says of the ranks.

    Returns the exit codes of the batch script, what it said, and its calls of Slurm's tools.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name in ("scontrol", "scancel", "squeue"):
        (tools / name).write_text(TOOL.format(folder=folder, code=int(requeue_fails)))
        (tools / name).chmod(0o755)
    (folder / "calls").touch()
    ends, said = [], ""
    for start, item in enumerate(codes):
        code, step = item if isinstance(item, tuple) else (item, None)
        script = f"""
            JOB_DIR={folder} OUTPUT_DIRS=({folder}/out) NODES=1 RANKS_PER_NODE=1 EXCLUDE=n9 PREFLIGHT=()
            source {ROOT}/launch/job.sh
            begin
            exec 2> >(heed)
            heeding=$!
            printf '%s' {shlex.quote(srun)} >&2
            {f"mkdir -p {folder}/out/checkpoints/step-{step:08d}" if step is not None else ""}
            finish {code}
        """
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": str(start),
        }
        result = subprocess.run(["bash", "-u", "-c", script], env=environment, capture_output=True, text=True)
        assert result.stderr == "", result.stderr
        ends.append(result.returncode)
        said += result.stdout
    return ends, said, (folder / "calls").read_text()


def test_a_finished_job_is_not_requeued(tmp_path: Path) -> None:
    assert end_of_job(tmp_path, [0])[::2] == ([0], "")


@pytest.mark.parametrize("code", [2, 126, 127])
def test_what_a_restart_would_not_mend_ends_the_job(tmp_path: Path, code: int) -> None:
    ends, said, calls = end_of_job(tmp_path, [code])
    assert (ends, calls) == ([code], "") and "a restart would not mend this" in said


@pytest.mark.parametrize("code", [2, 126, 127])
def test_one_rank_with_an_error_to_mend_ends_the_step_and_the_job(tmp_path: Path, code: int) -> None:
    """The others wait for it and are killed: the step's code is theirs, since it is higher."""
    srun = f"srun: error: h100-02: tasks 3,5-6: Exited with exit code {code}\nsrun: error: h100-01: task 0: Killed\n"
    ends, said, calls = end_of_job(tmp_path, [137], srun=srun)
    assert ends == [code] and f"exit code {code} of rank 3,5-6: a restart would not mend this" in said
    assert calls == "squeue --noheader --steps --jobs=7 --format=%i\nscancel 7.2\n"
    assert srun in said, "what srun says stays in the log"


@pytest.mark.parametrize(
    "text", ["task 3: Exited with exit code 1", "task 3: Killed", "tasks 0-7: Exited with exit code 75"]
)
def test_other_ends_of_a_rank_leave_the_others_alone(tmp_path: Path, text: str) -> None:
    ends, _, calls = end_of_job(
        tmp_path, [137], srun=f"srun: error: h100-02: {text}\nerror: x: Exited with exit code 2\n"
    )
    assert (ends, calls) == ([75], "scontrol requeue 7\n")


def test_an_error_that_was_mended_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "wrong-7").write_text("2 0\n")  # of the start before someone requeued the job by hand
    assert end_of_job(tmp_path, [0])[0] == [0]


@pytest.mark.parametrize("code", [75, 1, 137, 143])
def test_other_ends_requeue_once(tmp_path: Path, code: int) -> None:
    ends, said, calls = end_of_job(tmp_path, [(code, 12)])
    assert (ends, calls) == ([75], "scontrol requeue 7\n")
    assert "newest checkpoint: step 12; restarts without a new one: 0; requeued" in said


def test_three_restarts_without_a_new_checkpoint_end_the_job(tmp_path: Path) -> None:
    ends, said, calls = end_of_job(tmp_path, [1, 75, 137, 1])
    assert ends == [75, 75, 75, 79] and calls == "scontrol requeue 7\n" * 3
    assert "3 restarts brought no new checkpoint (newest: step -1): not requeued" in said


def test_a_new_checkpoint_forgives_earlier_restarts(tmp_path: Path) -> None:
    ends, _, _ = end_of_job(tmp_path, [1, 1, 1, (1, 100), 1, 1, 1, 1])
    assert ends == [75] * 7 + [79]


def test_a_checkpoint_that_is_not_complete_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "out/checkpoints/step-00000090.incomplete").mkdir(parents=True)
    (tmp_path / "out/checkpoints/step-00000008").mkdir()
    _, said, _ = end_of_job(tmp_path, [(75, 9)])
    assert "newest checkpoint: step 9;" in said  # and 08 is no octal number


def test_a_job_that_cannot_be_requeued_says_what_to_do(tmp_path: Path) -> None:
    ends, said, _ = end_of_job(tmp_path, [(75, 3)], requeue_fails=True)
    assert ends == [75] and "submit it again, and it goes on from its newest checkpoint" in said
