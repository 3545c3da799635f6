"""Tessera: lottery tickets, routed experts, parallelism and scaling laws in JAX."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11",
    "ml-collections>=1.0",
    "chex>=0.1.90",
    "absl-py",
    "numpy>=2.0",
    "scipy",
    "grain>=0.2.12",
    "rich",
    "matplotlib",
    "scikit-learn",
    "tensorboardX",
    "jaxtyping",
    "pooch",
]
EXTRAS = {
    "text": ["tokenizers"],
    "wandb": ["wandb"],
    "export": ["safetensors"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "slurm": ["submitit>=1.5"],
    "ray": ["ray[default]>=2.9"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]>=0.11"],
    "dev": [
        *("pytest", "pytest-xdist", "hypothesis", "beartype", "ruff", "mypy", "tokenizers", "safetensors"),
        *("openai", "starlette>=0.40", "uvicorn>=0.30", "submitit>=1.5"),
    ],
}

setup(
    name="tessera-jax",
    version="0.1.0",
    description="Lottery tickets, routed experts, parallelism and compute-optimal scaling in JAX and Flax.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    packages=find_packages(include=["lottery*", "moe*", "sharding*", "scaling*", "tessera*", "configs*", "scripts*"]),
    # Measured tile sizes, one table per kind of device.
    package_data={"moe.kernels": ["tilings/*.json"]},
)
