"""Only the package mapping: `kernels/` at the top level is installed as `prumerge_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    package_dir={"prumerge_fast": "prumerge_fast", "prumerge_fast.kernels": "kernels"},
    packages=[*find_packages(include=["prumerge_fast*"]), "prumerge_fast.kernels"],
)
