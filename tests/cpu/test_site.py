"""The site file: the example is valid, mistakes are named with the remedy, and no secret stands in it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.node import Limits, read_site
from cluster.site import Site, load_site

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "cluster" / "site.example.toml"


def write(folder: Path, text: str, shared: str = "/shared") -> Path:
    file = folder / "site.toml"
    file.write_text(f'[paths]\nshared = "{shared}"\n{text}', encoding="utf-8")
    return file


def test_the_example_is_valid_and_means_what_it_says() -> None:
    site = load_site(EXAMPLE)
    assert site.slurm.warning_seconds == 600 and site.container.mounts == ("/shared:/shared",)
    assert site.preflight.disk_paths == ("/shared/moetrain", "/tmp")
    environment = site.rank_environment()
    assert environment["NCCL_IB_HCA"] == "=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11"
    assert environment["NVSHMEM_HCA_LIST"].startswith("mlx5_0:1,mlx5_3:1,") and environment["EP_NIC_NAME"] == "mlx5_0"


def test_every_table_and_key_is_in_the_example() -> None:
    raw = tomllib.loads(EXAMPLE.read_text())
    text = EXAMPLE.read_text()
    assert set(raw) == set(Site.model_fields)
    for table in Site.model_fields.keys() - {"environment", "secrets"}:
        section = getattr(load_site(EXAMPLE), table)
        optional = {"env", "workdir"}  # of a container: what the rest of the file implies
        for key in vars(section).keys() - optional:
            assert key in raw[table] or f"# {key} = " in text, f"{table}.{key}"


def test_a_little_is_enough(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, ""))
    assert site.container is None and site.rank_environment() == {} and site.preflight == Limits()


def test_own_variables_win_over_what_the_devices_imply(tmp_path: Path) -> None:
    text = (
        '[infiniband]\ndevices = ["mlx5_1"]\n[environment]\nEP_NIC_NAME = "mlx5_7"\n[secrets]\nHF_TOKEN_PATH = "/s/t"\n'
    )
    found = load_site(write(tmp_path, text)).rank_environment()
    assert found == {
        "NCCL_IB_HCA": "=mlx5_1",
        "NVSHMEM_HCA_LIST": "mlx5_1:1",
        "EP_NIC_NAME": "mlx5_7",
        "HF_TOKEN_PATH": "/s/t",
    }


MISTAKES = [
    ('[slurm]\npartiton = "batch"', "slurm.partiton: unknown key; did you mean 'partition'?"),
    ("[slrum]\n", "slrum: unknown key; did you mean 'slurm'?"),
    ("[preflight]\ngpu = 8", "preflight.gpu: unknown key; did you mean 'gpus'?"),
    ("[preflight]\ngpus = 'many'", "preflight.gpus: Input should be a valid integer"),
    ('[container]\nimage = "/i.sqsh"\nmount = []', "container.mount: unknown key; did you mean 'mounts'?"),
    ("[storage]\nzzz = 1", "storage.zzz: unknown key; valid: write_gb_per_second"),
    ("[slurm]\ncpus_per_task = 0", "slurm.cpus_per_task: Input should be greater than 0"),
    ('[slurm]\npartition = "a b"', "slurm.partition: 'a b' is not a name"),
    ('[slurm]\nexclude = ["h100-01 --exclusive"]', "slurm.exclude.0: 'h100-01 --exclusive' is not a node name"),
    ('[environment]\n"A B" = "1"', "environment.A B.[key]: 'A B' is no name of an environment variable"),
    ('[environment]\nWANDB_API_KEY = "abc"', "environment.WANDB_API_KEY looks like a secret"),
    ('[environment]\nHF_TOKEN = "hf_abc"', "name the file under [secrets], such as HF_TOKEN_PATH"),
    ('[secrets]\nHF_TOKEN_PATH = "hf_abc"', "secrets.HF_TOKEN_PATH: 'hf_abc' is not an absolute path"),
    ('[slurm]\nconstraint = "h100 --uid=0"', "slurm.constraint: 'h100 --uid=0' is no expression of features"),
    ('[environment]\nSLURM_JOB_ID = "1"', "environment.SLURM_JOB_ID is for Slurm or the job itself to set"),
    ('[environment]\nPYXIS_CONTAINER_IMAGE = "x"', "environment.PYXIS_CONTAINER_IMAGE is for Slurm or the job itself"),
    ('[environment]\nRANK = "0"', "environment.RANK is for Slurm or the job itself"),
    ('[secrets]\nJOB_DIR = "/x"', "secrets.JOB_DIR is for Slurm or the job itself"),
    ("[slurm", "is not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_site(write(tmp_path, text))
    assert message in str(error.value) and "site.toml" in str(error.value)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        *(("slurm", key) for key in ("partition", "account", "qos", "reservation", "constraint", "gpu", "path")),
        ("environment", "NCCL_DEBUG"),
        ("secrets", "HF_TOKEN_PATH"),
        ("container", "image"),
    ],
)
@pytest.mark.parametrize("evil", ["x\\n#SBATCH --uid=0", "x\\u0000", "x\\u2028y"])
def test_no_value_holds_a_control_character(tmp_path: Path, table: str, key: str, evil: str) -> None:
    with pytest.raises(ValueError, match=f"{table}.{key}: holds the control character"):
        load_site(write(tmp_path, f'[{table}]\n{key} = "/{evil}"\n'))


def test_no_site_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no site file at .*nowhere\.toml; copy cluster/site\.example\.toml"):
        load_site(tmp_path / "nowhere.toml")


def test_a_secret_is_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    token = tmp_path / "token"
    site = load_site(write(tmp_path, f'[secrets]\nHF_TOKEN_PATH = "{token}"\n'))
    with pytest.raises(ValueError, match=r"secrets\.HF_TOKEN_PATH: there is no file"):
        site.check_secrets()
    token.write_text("hf_abc")
    token.chmod(0o640)
    with pytest.raises(ValueError, match="others than its owner can read"):
        site.check_secrets()
    token.chmod(0o600)
    site.check_secrets()
    assert "hf_abc" not in str(site.rank_environment())


def test_the_preflight_reads_the_same_file(tmp_path: Path) -> None:
    node, site = read_site(EXAMPLE), load_site(EXAMPLE)
    assert node.limits == site.preflight
    assert node.infiniband == site.infiniband.devices and node.image == site.container.image
    with pytest.raises(ValueError, match=r"preflight\.gpu: unknown key; valid: gpus, nvlinks"):
        read_site(write(tmp_path, "[preflight]\ngpu = 8"))


def test_types_of_the_preflight_table() -> None:
    site: Any = load_site(EXAMPLE)
    assert isinstance(site.preflight, Limits) and isinstance(site.preflight.gemm_tflops, float)
