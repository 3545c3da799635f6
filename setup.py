"""Tessera: lottery tickets, routed experts, parallelism and scaling laws in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# The one place that states the version is `tessera.__version__`.
VERSION = re.findall(r'^__version__ = "(.+)"$', (HERE / "tessera/__init__.py").read_text(encoding="utf-8"), re.M)
# Address of the public repository, shown by `pip show`. None is known yet; then it goes into CITATION.cff too.
URL = ""
LINKS = {"Issues": f"{URL}/issues", "Changelog": f"{URL}/blob/main/CHANGELOG.md"}

LIBRARIES = ("lottery", "moe", "sharding", "scaling", "tessera")
CORE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11",
    "fsspec>=2024.10",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "scipy>=1.13",
    "absl-py>=2.1",
    "jaxtyping>=0.3",
    "grain>=0.2.12",
    "rich>=13.7",
]
EXTRAS = {
    "reports": ["matplotlib>=3.9"],
    "data": ["scikit-learn", "pooch>=1.8", "tokenizers", "pyarrow", "zstandard", "pillow", "datasets"],
    "hf": ["safetensors", "tokenizers", "jinja2", "gguf"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30", "pydantic>=2", "prometheus-client", "llguidance"],
    "urls": ["s3fs", "gcsfs"],
    "tensorboard": ["tensorboardX"],
    "wandb": ["wandb"],
    "slurm": ["submitit>=1.5"],
    "ray": ["ray[default]>=2.9"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]>=0.11"],
    "docs": ["mkdocs-material", "mkdocstrings[python]", "nbclient", "ipykernel"],
    # For golden values (`make golden`) and for the benchmarks' columns of other libraries; nothing here imports them.
    "baselines": ["torch", "transformers", "peft", "lm-eval", "llama-cpp-python"],
    "dev": [
        *("pytest>=8", "pytest-xdist", "pytest-cov", "hypothesis", "beartype", "chex>=0.1.90"),
        *("ruff", "mypy"),
        # What the default suite needs of the extras.
        *("matplotlib>=3.9", "scikit-learn", "pooch>=1.8", "tensorboardX", "tokenizers", "safetensors", "gguf"),
        # `datasets` brings pandas and dill, 15 MB beside the 55 of pyarrow: the suite reads what it saves.
        *("pyarrow", "zstandard", "pillow", "datasets"),
        *("starlette>=0.40", "uvicorn>=0.30", "pydantic>=2", "prometheus-client", "openai", "submitit>=1.5"),
        *("jinja2", "llguidance"),
    ],
}

setup(
    name="tessera-jax",
    version=VERSION[0],
    description="Lottery tickets, routed experts, parallelism and compute-optimal scaling in JAX and Flax.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The Tessera authors",
    **({"url": URL, "project_urls": LINKS} if URL else {}),
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords="jax flax lottery-ticket pruning sparsity mixture-of-experts parallelism scaling-laws chinchilla",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    packages=[*find_packages(include=[f"{name}*" for name in LIBRARIES]), "tessera.configs"],
    # The experiments' files lie beside the code in a checkout and inside the package in a wheel.
    package_dir={"tessera.configs": "configs"},
    package_data={**{name: ["py.typed"] for name in LIBRARIES}, "moe": ["py.typed", "kernels/**/*.json"]},
    entry_points={"console_scripts": ["tessera = tessera.cli.main:main"]},
)
