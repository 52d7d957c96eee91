"""Turn a run into a job: `main(RUN)` is the command line of every run in this directory.

python launch/ultra_550b.py --nodes 16 --dry-run       print the job, the plan and what was checked; needs no Slurm
python launch/ultra_550b.py --nodes 16 optim.lr=2e-5   submit it
python launch/ultra_550b.py --local                    a small copy of it, on this machine
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.site import load_site
from containers.spec import ContainerSpec, one_line
from launch.job import ROOT, Job
from launch.run import Run, configure, parse_minutes, parse_sweep
from moetrain.config import CreateConfig, RunConfig, load_mapping

if TYPE_CHECKING:
    from moetrain.plan.search import Plan

SITE_FILE = ROOT / "cluster" / "site.toml"
USER_ERROR = 2
MAX_NODES = 10_000


def main(run: Run, argv: Sequence[str] | None = None) -> int:
    """Launch a run as its flags say; returns the exit code: 0, or 2 with one `error:` for what the user can mend."""
    args = parse(run, argv)
    try:
        raw = load_mapping(args.config) if args.config else run.config
        if args.local:
            from launch.local import run_local

            return run_local(run, raw, args.overrides)
        job = job_of(run, raw, args)
        return dry_run(run, job) if args.dry_run else submit(run, job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def job_of(run: Run, raw: Any, args: argparse.Namespace) -> Job:
    """The job that a run and its flags ask for.

    Raises:
        ValueError: the site file, the configuration or a flag is wrong.
    """
    site = load_site(args.site)
    container = site.container
    if args.image:
        if container is None:
            raise ValueError("--image: the site file has no [container]; its jobs run on the nodes themselves")
        container = _with_image(container, args.image)
    sweep = parse_sweep(args.array) if args.array else None
    config = configure(raw, args.overrides)
    configs: tuple[RunConfig, ...] = (config,)
    if sweep is not None:
        names = [f"{sweep.key}={value}" for value in sweep.values]
        outputs = [f"output_dir={config.output_dir}/{name.replace('/', '_')}" for name in names]
        configs = tuple(configure(raw, [*args.overrides, *pair]) for pair in zip(names, outputs, strict=True))
    for config in configs:
        try:
            one_line(config.output_dir)
        except ValueError as error:
            raise ValueError(f"output_dir {error}") from None
    return Job(
        name=run.name,
        comment=run.comment,
        site=site,
        site_file=Path(args.site),
        container=container,
        configs=configs,
        nodes=args.nodes,
        spares=args.spares,
        ranks_per_node=args.gpus_per_node,
        minutes=parse_minutes(args.time),
        parallel=sweep.parallel if sweep else 1,
        folder=Path(site.paths.shared) / "jobs" / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
    )


def _with_image(container: ContainerSpec, image: str) -> ContainerSpec:
    try:
        return ContainerSpec.model_validate(container.model_dump() | {"image": image, "sha256": None})
    except ValidationError as error:
        (found,) = error.errors()
        raise ValueError(f"--image: {found['msg'].removeprefix('Value error, ')}") from None


def submit(run: Run, job: Job) -> int:
    """Check, then submit; says how to follow the job."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch on PATH: launch from a machine of the cluster, look at the job with --dry-run, or try "
            "a small copy of it here with --local"
        )
    for mark, name, text in checks(run, job):
        if mark == "wrong":
            raise ValueError(f"{text} (nothing was submitted)")
        print(f"{mark:<7} {name:<8} {text}", flush=True)
    job_id = job.submit().job_id
    logs = f"{job_id}_*_0_log.out" if len(job.configs) > 1 else f"{job_id}_0_log.out"
    print(f"submitted job {job_id}: {job.folder}")
    print(f"  output of rank 0   tail -F {job.folder}/{logs}")
    print(f"  state              squeue --job {job_id}")
    print(f"  cancel             scancel {job_id}")
    return 0


def dry_run(run: Run, job: Job) -> int:
    """Print the batch script, the training step, the plan and what was checked; 2 where something is wrong."""
    print(job.script())
    print(f"\n# --- the training step of {job.nodes} nodes ---\n{_step(job)}")
    if job.container is not None and job.container.image.startswith("/"):
        print(f"\n# --- the same container on one machine ---\n{job.container.enroot_command(['moetrain', 'doctor'])}")
    planned = plan(run, job)
    print(f"\n# --- plan ---\n{planned if isinstance(planned, str) else planned.render()}")
    print("\n# --- checked ---", flush=True)
    found = [*checks(run, job), _memory(planned)]
    for mark, name, text in found:
        print(f"{mark:<7} {name:<8} {text}")
    return USER_ERROR if any(mark == "wrong" for mark, _, _ in found) else 0


def plan(run: Run, job: Job) -> Plan | str:
    """Memory, step time, tokens a day and checkpoints, as `moetrain plan` tells them; or why there is none."""
    if not job.site.slurm.request_gpus:
        return "none: the site has no GPUs"
    from moetrain.plan import plan_run  # here, because it brings torch

    planned = with_architecture(run, job.configs[0])
    try:
        return plan_run(planned, job.nodes, job.ranks_per_node, job.site.slurm.gpu)
    except ValueError as error:
        return f"none: {error}"


def _memory(planned: Plan | str) -> tuple[str, str, str]:
    """Whether the run as it is configured fits, as a line of `checks`."""
    if isinstance(planned, str):
        return "unseen", "memory", planned
    needed = f"{planned.best.memory.needed / 2**30:.1f} GiB a rank on {planned.machine.gpu}"
    if planned.fitting:
        return "ok", "memory", f"{needed}, by the plan"
    return "wrong", "memory", f"{needed} do not fit, by the plan, which names changes that would help"


def with_architecture(run: Run, config: RunConfig) -> RunConfig:
    """The configuration, with the run's architecture in place of a checkpoint that is not on this machine."""
    architecture = architecture_of(run, config)
    if not architecture or config.model.create is not None or Path(config.model.path).expanduser().is_dir():
        return config
    model = config.model.model_copy(update={"create": CreateConfig(config=dict(architecture))})
    return config.model_copy(update={"model": model})


def architecture_of(run: Run, config: RunConfig) -> Mapping[str, Any]:
    """The run's architecture, unless --config or an override has named another model."""
    return run.architecture if config.model.path == run.config["model"]["path"] else {}


def checks(run: Run, job: Job) -> Iterator[tuple[str, str, str]]:
    """Run all checks; (ok, unseen or wrong; what; text) of each."""
    from launch import checks as check  # here, because Transformers takes seconds

    config = job.configs[0]
    try:
        model = check.model_on_meta(config, architecture_of(run, config))
    except check.Unseen:
        model = None
    saving = None if model is None else check.save_seconds(job, model)
    table: dict[str, Callable[[], str]] = {
        "layout": lambda: check.check_layout(job),
        "model": lambda: check.check_model(job, model),
        "time": lambda: check.check_time(job, saving),
        "image": lambda: check.check_image(job),
        "mounts": lambda: check.check_mounts(job),
        "python": lambda: check.check_python(job),
        "shared": lambda: check.check_shared(job),
        "secrets": lambda: check.check_secrets(job),
        "run": lambda: check.check_run(job),
    }
    for name, action in table.items():
        try:
            yield "ok", name, action()
        except check.Unseen as error:
            yield "unseen", name, str(error)
        except ValueError as error:
            yield "wrong", name, str(error)


def _step(job: Job) -> str:
    line = next(line for line in job.script().splitlines() if line.startswith("srun "))
    return line.replace(" --", " \\\n    --").replace(" bash ", " \\\n    bash ")


def parse(run: Run, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of a run's command line; what is wrong in them ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=f"Launch {run.name}.",
        epilog="a.b=c overrides a value of the configuration. Exit codes: 0 submitted, or the dry run found nothing "
        "wrong; 2 an error you can mend, nothing was submitted.",
    )
    parser.add_argument("--nodes", type=_positive, default=run.nodes, metavar="N", help=f"default: {run.nodes}")
    parser.add_argument("--gpus-per-node", type=_positive, default=run.gpus_per_node, metavar="N", help="and ranks")
    parser.add_argument("--spares", type=_count, default=0, metavar="N", help="nodes more, to replace unfit ones")
    parser.add_argument("--site", default=str(SITE_FILE), metavar="FILE", help="default: cluster/site.toml")
    parser.add_argument("--image", metavar="IMAGE", help="squashfs file in place of the site's")
    parser.add_argument("--config", metavar="FILE", help="YAML file in place of the run's own configuration")
    parser.add_argument("--time", default=run.time, metavar="D-H:M:S", help=f"limit of a job (default: {run.time})")
    parser.add_argument("--array", metavar="a.b=V,V,...", help="a job for each value; %%N at the end: N at a time")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print job, plan and checks; submit nothing")
    instead.add_argument("--local", action="store_true", help="run a small copy on this machine, without Slurm")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    return parser.parse_intermixed_args(argv)


def _positive(text: str) -> int:
    number = _count(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or (number := int(text)) > MAX_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number up to {MAX_NODES:,}")
    return number
