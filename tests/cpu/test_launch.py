"""Launching without Slurm: flags, what is checked before a submission, dry runs, and the runs themselves."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoConfig

import moetrain.plan
from launch import cpu_smoke, nemotron_nano, qwen3_30b, submit, ultra_550b
from launch.job import ROOT
from launch.run import Run, configure, parse_minutes, parse_sweep, scaled_down
from launch.submit import job_of, main, parse
from moetrain.config import RunConfig, load_config
from moetrain.create import meta_model, new_config
from tests.launches import CONFIG, RUN, container, make_job, python_without_moetrain, write_site

RUNS = [cpu_smoke.RUN, nemotron_nano.RUN, qwen3_30b.RUN, ultra_550b.RUN]
EXAMPLE = ROOT / "cluster" / "site.example.toml"
PLAN_RUN = moetrain.plan.plan_run
WITH_MOETRAIN = f'[environment]\nPYTHONPATH = "{ROOT}"'


class FakePlan(NamedTuple):
    """What was planned; planning itself takes seconds and has its own tests."""

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpu: str
    fitting: bool = True

    @property
    def machine(self) -> FakePlan:
        return self

    @property
    def best(self) -> FakePlan:
        return self

    @property
    def memory(self) -> FakePlan:
        return self

    @property
    def needed(self) -> int:
        return 58 * 2**30

    def render(self) -> str:
        return (
            f"a plan of {self.config.model.create.config['model_type']}, {self.nodes} x {self.gpus_per_node} {self.gpu}"
        )


@pytest.fixture(autouse=True)
def _same_time_and_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.time, "strftime", lambda _: "STAMP")
    monkeypatch.setattr(moetrain.plan, "plan_run", FakePlan)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:00", 30),
        ("30:01", 31),
        ("2:30:00", 150),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:01", 2881),
    ],
)
def test_time_limits_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:00", "1h", "-1", "1:2:3:4", "1-2:3:4:5", "10\n", "infinite"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        parse_minutes(text)


def test_an_array_is_one_value_varied() -> None:
    sweep = parse_sweep("optim.lr=1e-5,2e-5,5e-5%2")
    assert (sweep.key, sweep.values, sweep.parallel) == ("optim.lr", ("1e-5", "2e-5", "5e-5"), 2)
    assert parse_sweep("train.seed=1,2").parallel == 2
    for text in ("0-3", "optim.lr", "optim.lr=", "optim.lr=1,,2", "lr=1,2", "optim.lr=1%0"):
        with pytest.raises(ValueError, match="--array"):
            parse_sweep(text)


def test_an_array_has_a_configuration_and_an_output_for_each_value(shared: Path) -> None:
    job = make_job(write_site(shared), "--array", "optim.lr=1e-5,2e-5%1", "train.seed=7")
    assert [(config.optim.lr, config.train.seed) for config in job.configs] == [(1e-5, 7), (2e-5, 7)]
    assert [config.output_dir for config in job.configs] == ["runs/test/optim.lr=1e-5", "runs/test/optim.lr=2e-5"]
    job.write()
    assert load_config(job.folder / "config-1.yaml") == job.configs[1]
    assert "#SBATCH --array=0-1%1" in job.script() and "%A_%a_%t_log.out" in job.script()


def test_flags_reach_the_job(shared: Path) -> None:
    config = shared.parent / "other.yaml"
    config.write_text("output_dir: runs/other\nmodel: {path: m}\ndata: {train: [{path: d}]}\ntrain: {steps: 9}\n")
    flags = ["--nodes", "6", "--spares", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--config", str(config)]
    arguments = parse(RUN, ["--site", str(write_site(shared)), *flags, "optim.lr=3e-5", "train.steps=11"])
    job = job_of(RUN, submit.load_mapping(config), arguments)
    script = job.script()
    for line in ("--nodes=8", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=60", "--job-name=test"):
        assert f"#SBATCH {line}\n" in script
    assert "NODES=6 RANKS_PER_NODE=4" in script
    assert "--nodes=6 --ntasks=24" in next(line for line in script.splitlines() if line.startswith("srun "))
    assert job.configs[0].output_dir == "runs/other" and job.configs[0].optim.lr == 3e-5
    assert job.configs[0].train.steps == 11


def test_the_output_of_an_array_is_one_name_a_value(shared: Path) -> None:
    job = make_job(write_site(shared), "--array", "data.cache_dir=/a/b,../..")
    assert [config.output_dir for config in job.configs] == [
        "runs/test/data.cache_dir=_a_b",
        "runs/test/data.cache_dir=.._..",
    ]
    assert [config.data.cache_dir for config in job.configs] == ["/a/b", "../.."]
    with pytest.raises(ValueError, match="names a value twice"):
        parse_sweep("train.seed=1,2,1")


def test_two_launches_of_one_second_do_not_share_a_folder(shared: Path) -> None:
    site = write_site(shared)
    make_job(site).write()
    with pytest.raises(ValueError, match="belongs to another launch of this second"):
        make_job(site).write()


def test_overrides_may_stand_anywhere(shared: Path) -> None:
    site = str(write_site(shared))
    for flags in (["train.seed=1", "--site", site, "train.steps=5"], ["--site", site, "train.seed=1", "train.steps=5"]):
        assert parse(RUN, flags).overrides == ["train.seed=1", "train.steps=5"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--nodes", text] for text in ("0", "x", "\u00b2", "1" + "0" * 20)),
        ["--gpus-per-node", "-1"],
        ["--nosuch"],
        ["--dry-run", "--local"],
    ],
)
def test_wrong_flags_end_with_two(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(RUN, flags)
    assert exit.value.code == 2


# --- what is wrong is told before anything is submitted -----------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], site: Path | str, *flags: str, run: Run = RUN, dry: bool = True) -> str:
    """What a launch that must fail says."""
    assert main(run, ["--site", str(site), *(["--dry-run"] if dry else []), *flags]) == 2
    out, err = capsys.readouterr()
    return out + err


def test_no_site_file(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    assert "no site file at" in fails(capsys, shared / "none.toml")


def test_without_sbatch_the_ways_out_are_named(
    capsys: pytest.CaptureFixture[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    text = fails(capsys, write_site(shared), dry=False)
    assert "no sbatch on PATH" in text and "--dry-run" in text and "--local" in text
    assert not (shared / "jobs").exists()


def test_a_configuration_with_a_mistake(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    assert "did you mean 'lr'" in fails(capsys, write_site(shared), "optim.lrr=1")


def test_nodes_that_the_experts_do_not_divide(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    site = write_site(shared)
    text = fails(capsys, site, "--nodes", "12", "parallel.ep_size=64", run=replace(ultra_550b.RUN, time="1-0"))
    assert "12 nodes x 8 ranks = 96 ranks are not a multiple of ep_size=64" in text
    assert "valid for --nodes: 8, 16, 24, 32, 40, 48, ..." in text
    assert "one divides the other" in fails(capsys, site, "--nodes", "6", "--gpus-per-node", "4", "parallel.ep_size=6")
    text = fails(capsys, site, "parallel.ep_size=16")
    assert "ep_size=16 does not divide the model's 8 experts" in text


def test_a_time_limit_shorter_than_a_save(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    site = write_site(shared, "[storage]\nwrite_gb_per_second = 0.1", slurm="warning_seconds = 900")
    text = fails(capsys, site, run=ultra_550b.RUN)  # 549 billion parameters in bf16 with bf16 states
    assert "one save takes about 2060 s, and slurm.warning_seconds=900" in text
    assert "--time of 20 minutes is too short" in fails(capsys, site, "--time", "20")


def test_an_image_that_is_missing_or_another(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    image = shared / "image.sqsh"
    assert f"image {image} does not exist" in fails(capsys, write_site(shared, container(image)))
    image.write_bytes(b"squashed")
    digest = hashlib.sha256(b"squashed").hexdigest()
    site = write_site(shared, container(image, f'sha256 = "{"0" * 64}"'))
    assert f"has SHA-256 {digest}, expected 0000" in fails(capsys, site)
    other = shared / "other.sqsh"
    assert f"image {other} does not exist" in fails(capsys, site, "--image", str(other))
    for name, why in (
        ("other.sqsh", "neither the absolute path"),
        ("/x\n#SBATCH --uid=0", "control character U+000A"),
    ):
        text = fails(capsys, site, "--image", name)
        assert "error: --image: " in text and why in text and "validation error" not in text
    assert "has no [container]" in fails(capsys, write_site(shared), "--image", "/image.sqsh")


def test_a_shared_directory_that_ranks_would_not_see(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    image = shared / "image.sqsh"
    image.write_bytes(b"squashed")
    for mounts, text in (
        ("/data:/data", f"add '{shared}:{shared}'"),
        (f"{shared}:/elsewhere", f"add '{shared}:{shared}'"),
        (f"{shared}:{shared}:ro+rprivate", "is read-only"),
    ):
        assert text in fails(capsys, write_site(shared, container(image, mounts=mounts)))


def test_a_python_that_ranks_could_not_use(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    bare, broken, silent = python_without_moetrain(shared), shared / "broken-python", shared / "silent-python"
    broken.write_text("no program")
    silent.write_text("#!/bin/sh\nexit 9\n")
    silent.chmod(0o755)
    for python, text in (
        (bare, f"paths.python={bare} of the site file: {bare} has no moetrain; paths.python of the site file must"),
        (broken, "Permission denied"),
        (silent, f"paths.python={silent} of the site file: it ends with 9"),
    ):
        assert text in fails(capsys, write_site(shared, WITH_MOETRAIN, paths=f'python = "{python}"'))
    site = write_site(shared, paths=f'python = "{shared}/gone"')
    assert main(RUN, ["--site", str(site), "--dry-run"]) == 0, "the nodes may have it where this machine has not"
    assert f"{shared}/gone is looked for on the nodes" in capsys.readouterr().out


def test_secrets_are_checked(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    token = shared / "token"
    token.write_text("hf_secret")
    token.chmod(0o644)
    text = fails(capsys, write_site(shared, f'[secrets]\nHF_TOKEN_PATH = "{token}"'))
    assert "others than its owner can read" in text and "hf_secret" not in text


def test_what_the_run_itself_lacks(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    text = fails(capsys, write_site(shared), "data.train=[{path: nowhere.jsonl}]")
    assert "nowhere.jsonl" in text and "wrong" in text


def test_a_partition_that_does_not_exist_is_sbatchs_to_tell(
    capsys: pytest.CaptureFixture[str], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gone' >&2; exit 1\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    text = fails(capsys, write_site(shared), dry=False)
    assert "sbatch refuses the job" in text and "invalid partition specified: gone" in text
    assert not (shared / "jobs").exists()
    (shared / "jobs").mkdir()
    fails(capsys, write_site(shared), dry=False)
    assert list((shared / "jobs").iterdir()) == []


def test_an_output_directory_with_a_line_feed_is_refused(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    text = fails(capsys, write_site(shared), 'output_dir="runs/x\\n#SBATCH --uid=0"')
    assert "error: output_dir holds the control character U+000A" in text and "#!/bin/bash" not in text


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that leaves a file where it is called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\necho Submitted batch job 12\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path / "called"


def test_what_is_right_is_submitted(capsys: pytest.CaptureFixture[str], shared: Path, sbatch: Path) -> None:
    assert main(RUN, ["--site", str(write_site(shared))]) == 0
    assert "submitted job 12" in capsys.readouterr().out and sbatch.exists()


def test_nothing_is_made_where_the_shared_directory_is_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sbatch: Path
) -> None:
    absent = tmp_path / "cluster" / "shared"
    absent.parent.mkdir()
    text = fails(capsys, write_site(absent), dry=False)
    assert f"paths.shared={absent} of the site file is not on this machine: launch from where" in text
    assert "--dry-run" in text and not sbatch.exists() and not absent.exists()


@pytest.mark.parametrize(
    ("tables", "slurm", "flags", "text"),
    [
        ([], "", ["--site", "/nowhere.toml"], "no site file at /nowhere.toml"),
        ([], "", ["--gpus-per-node", "3", "parallel.ep_size=8"], "6 ranks are not a multiple of ep_size=8"),
        (["MISSING"], "", [], "does not exist; make it with `make sqsh`"),
        (["OTHER"], "", [], "expected 0000"),
        ([], "", ["--time", "15"], "--time of 15 minutes is too short"),
        (["[storage]\nwrite_gb_per_second = 1e-4"], "warning_seconds = 1", [], "one save takes about"),
        ([], "", ["data.train=[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["BARE"], "", [], "has no moetrain"),
    ],
    ids=["no site", "nodes and experts", "no image", "another image", "time limit", "warning", "data", "python"],
)
def test_what_is_wrong_is_not_submitted(
    capsys: pytest.CaptureFixture[str],
    shared: Path,
    sbatch: Path,
    tables: list[str],
    slurm: str,
    flags: list[str],
    text: str,
) -> None:
    image = shared / "image.sqsh"
    image.write_bytes(b"squashed")
    boxes = {"MISSING": container(shared / "gone.sqsh"), "OTHER": container(image, f'sha256 = "{"0" * 64}"')}
    paths = f'python = "{python_without_moetrain(shared)}"' if "BARE" in tables else ""
    tables = [boxes.get(table, table) for table in tables if table != "BARE"]
    site = write_site(shared, *tables, paths=paths, slurm=slurm)
    assert text in fails(capsys, site, *flags, dry=False)
    assert not sbatch.exists() and not (shared / "jobs").exists()


def test_a_model_that_is_not_here_is_unseen(
    capsys: pytest.CaptureFixture[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The architecture of a run says nothing of the model that another configuration names."""
    monkeypatch.setattr(moetrain.plan, "plan_run", PLAN_RUN)
    config = shared.parent / "mine.yaml"
    config.write_text("output_dir: runs/mine\nmodel: {path: mine}\ndata: {train: [{path: d}]}\ntrain: {steps: 9}\n")
    for flags in (["--config", str(config)], ["model.path=mine"]):
        assert main(qwen3_30b.RUN, ["--site", str(write_site(shared)), "--dry-run", *flags]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^unseen +model +model.path=mine is not a directory here", out, re.MULTILINE), out
        assert "qwen3_moe" not in out


def test_a_plan_that_does_not_fit_is_wrong(
    capsys: pytest.CaptureFixture[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moetrain.plan, "plan_run", lambda *args: FakePlan(*args)._replace(fitting=False))
    text = fails(capsys, write_site(shared))
    assert re.search(r"^wrong +memory +58.0 GiB a rank on h100-80gb do not fit", text, re.MULTILINE)


# --- the runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_runs_are_short_values_with_a_valid_configuration(run: Run) -> None:
    path = ROOT / "launch" / f"{run.name}.py"
    assert len(path.read_text().splitlines()) <= 120
    config = configure(run.config)
    world = run.nodes * run.gpus_per_node
    assert world % config.parallel.ep_size == 0
    help_text = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in (
        "--nodes",
        "--gpus-per-node",
        "--site",
        "--image",
        "--config",
        "--time",
        "--array",
        "--dry-run",
        "--local",
    ):
        assert flag in help_text


@pytest.mark.parametrize(
    ("run", "billions"),
    [(ultra_550b.RUN, 549.3), (nemotron_nano.RUN, 31.58), (qwen3_30b.RUN, 30.53)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_architectures_have_the_published_size(run: Run, billions: float) -> None:
    config = configure({**run.config, "model": {"path": "-", "create": {"config": dict(run.architecture)}}})
    model = meta_model(new_config(config.model.create), config.model)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_small_copy_is_the_same_run(run: Run) -> None:
    config, small = configure(run.config), configure(scaled_down(run, run.config, ranks=2))
    assert small.optim.states == config.optim.states and small.optim.lr == config.optim.lr
    assert small.model.activation_checkpointing == config.model.activation_checkpointing
    assert small.model.dtype == config.model.dtype and small.parallel.ep_size == min(2, config.parallel.ep_size)
    assert small.train.steps == 4 and small.data.train[0].path == "python:stdlib"
    made = new_config(small.model.create)
    if run.architecture:
        whole = AutoConfig.for_model(**run.architecture)
        assert made.model_type == whole.model_type
        assert set(getattr(made, "layers_block_type", [])) == set(getattr(whole, "layers_block_type", []))
    assert made.vocab_size == 512 or not run.architecture
    assert meta_model(made, small.model).num_parameters() < 2e7


def test_all_of_a_small_copy_lies_where_it_was_wanted(tmp_path: Path) -> None:
    small = scaled_down(RUN, CONFIG, ranks=2, output_dir=tmp_path)
    assert small["output_dir"] == str(tmp_path) and small["model"]["path"] == str(tmp_path / "start")
    assert scaled_down(RUN, CONFIG, ranks=2)["output_dir"] == f"runs/local/{RUN.name}"


@pytest.mark.slow
@pytest.mark.parametrize("run", [nemotron_nano.RUN, qwen3_30b.RUN, ultra_550b.RUN], ids=lambda run: run.name)
def test_runs_fit_where_they_are_made_for(run: Run) -> None:
    planned = PLAN_RUN(submit.with_architecture(run, configure(run.config)), run.nodes, run.gpus_per_node, "h100-80gb")
    assert planned.fitting, f"{planned.best.memory.needed / 2**30:.1f} GiB"


def test_a_run_of_an_unknown_architecture_has_no_small_copy() -> None:
    with pytest.raises(ValueError, match="has no architecture"):
        scaled_down(RUN, {**CONFIG, "model": {"path": "somewhere"}}, ranks=2)
    with pytest.raises(ValueError, match="has no architecture of another"):
        scaled_down(qwen3_30b.RUN, {**qwen3_30b.RUN.config, "model": {"path": "another"}}, ranks=2)


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The site file of a cluster whose file system no machine has."""
    file = tmp_path_factory.mktemp("site") / "site.toml"
    file.write_text(EXAMPLE.read_text().replace("/shared", "/not-here"))
    return str(file)


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    elsewhere: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert main(ultra_550b.RUN, ["--nodes", "16", "--site", elsewhere, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (
        "#!/bin/bash",
        "# --- the training step of 16 nodes",
        "--container-image=",
        "enroot start",
        "--- plan",
    ):
        assert part in out
    assert "a plan of nemotron_h, 16 x 8 h100-80gb" in out
    assert "128 ranks: 1 replica of 128, an expert group of 64 on 8 nodes" in out
    assert "nemotron_h of 549.3 billion parameters" in out and "a save takes about 103 s" in out
    assert re.search(r"^unseen +image +/not-here/moetrain is not on this machine", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_is_that_of_moetrain(
    elsewhere: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moetrain.plan, "plan_run", PLAN_RUN)
    assert main(cpu_smoke.RUN, ["--site", elsewhere, "--dry-run"]) == 0
    plan = capsys.readouterr().out.partition("# --- plan ---")[2].partition("# --- checked ---")[0]
    for part in ("memory of a rank", "time of a step", "tokens; a day", "a checkpoint: "):
        assert part in plan


def test_a_plan_that_cannot_be_made_says_why(
    capsys: pytest.CaptureFixture[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such GPU")

    monkeypatch.setattr(moetrain.plan, "plan_run", refuse)
    assert main(RUN, ["--site", str(write_site(shared)), "--dry-run"]) == 0
    assert "none: no such GPU" in capsys.readouterr().out
    assert main(RUN, ["--site", str(write_site(shared, slurm="request_gpus = false")), "--dry-run"]) == 0
    assert "none: the site has no GPUs" in capsys.readouterr().out


def test_a_dry_run_on_the_cluster_says_what_is_fine(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    site = write_site(shared, WITH_MOETRAIN, paths=f'python = "{sys.executable}"')
    layout = ["parallel.ep_size=8", "parallel.dp_replicate_size=2"]
    assert main(RUN, ["--site", str(site), "--dry-run", *layout]) == 0
    out = capsys.readouterr().out
    assert "wrong" not in out and "unseen" not in out and out.count("\nok") >= 9
    assert list(shared.iterdir()) == []
