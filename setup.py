"""Build script. Every fact about the package stands in pyproject.toml."""

from setuptools import setup

setup()
