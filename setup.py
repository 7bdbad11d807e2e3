"""What the package is and needs; pyproject.toml holds the build system and the settings of the tools."""

from pathlib import Path

from setuptools import setup

# docs/api.md says what was run at both ends of these.
train = ["transformers>=4.50", "peft>=0.14"]
trl = ["trl>=0.29.1,<2", "requests"]  # up to 1.14 TRL imports requests, and leaves it to others to bring it
html = ["jinja2>=3.1"]
test = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "hypothesis>=6.100",
    "setuptools>=71",  # builds the wheel that a test installs
    "numpy>=1.26,<2.4",  # what Triton's interpreter computes with; up to Triton 3.6 it fails with 2.4
    *train,
    *html,
]

setup(
    name="leafkernels",
    version="0.1.0",
    description="LEAF span advantages for GRPO loops: Triton kernels, vectorised PyTorch, and a pure-Python reference",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "leafkernels",
        "leafkernels._core",
        "leafkernels.rows",
        "leafkernels.credit",
        "leafkernels.vocabulary",
        "leafkernels.losses",
        "leafkernels.models",
        "leafkernels.kernels",
        "leafkernels.eager",
        "leafkernels.reference",
        "leafkernels.command",
        "leafkernels.data",
        "leafkernels.integrations",
        "leafkernels.lookahead",
        "python_ref",
    ],
    package_data={
        "leafkernels": ["py.typed"],
        "leafkernels.command": ["page/*"],
        "leafkernels.data": ["*.jsonl.gz"],
        "python_ref": ["py.typed"],
    },
    entry_points={"console_scripts": ["leafkernels = leafkernels.__main__:main"]},
    install_requires=["torch>=2.6", "triton>=3.2; platform_system == 'Linux'", "rich>=13"],
    extras_require={
        "train": train,
        "test": test,
        "html": html,
        "trl": trl,
        "lookahead": ["transformers>=5.23", "safetensors>=0.8", "accelerate>=1.3"],
        "verl": ["verl>=0.9,<1"],
        "speech": [
            "transformers>=5.23",
            "peft>=0.14",
            "numpy>=1.26",
            "soundfile>=0.12",
            "matplotlib>=3.8",
            "sacrebleu>=2.4",
            "jiwer>=3",
            "scipy>=1.11",
            "trl>=1.14,<2",
            "requests",
        ],
        "bench": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "numpy>=1.26",
            # what the vocabulary functions are compared with; verl only where it is there already
            "trl>=1.16; platform_system == 'Linux' and python_version >= '3.11'",
            "liger-kernel>=0.8.5; platform_system == 'Linux'",
            "cut-cross-entropy>=25.1.1; platform_system == 'Linux'",
            "matplotlib>=3.8",
        ],
    },
    zip_safe=False,
)
